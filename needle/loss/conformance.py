"""What every loss must hold to, measured: labels, locality, values, gradients, temperature, tail, means, extremes.

`check(Subject(loss, weighting))` tries the loss on small batches of its own and gives one `Result` a property. It takes
any object that follows needle.loss.base.Loss, a user's own class too; `python -m needle.doctor` prints it. A loss may
say more of itself than the contract asks (needle.loss.trials.facts_of); what it does not say is not checked.

A property is a function of `Trials`. It returns what it measured, or raises `Violation` with the offending numbers, or
`DoesNotApply` with the reason. Cost: about 50 ms a loss on one core.
"""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from needle.loss.base import IGNORE
from needle.loss.objective import DISTRIBUTIONS
from needle.loss.trials import (
    ENDS,
    SECOND,
    Batch,
    DoesNotApply,
    K,
    R,
    Subject,
    T,
    Trials,
    V,
    Violation,
    agree,
    changed,
    finite,
    gradient_of,
    joined,
    require,
    rows,
    slots,
)

DRAWABLE = DISTRIBUTIONS | {"text", "samples"}


class Result(NamedTuple):
    """`passed` is None where the property does not apply; `detail`: numbers, or the reason."""

    name: str
    passed: bool | None
    detail: str


def check(
    subject: Subject,
    *,
    first: Sequence["Property"] = (),
    without: Collection[str] = (),
    until_failure: bool = False,
) -> list[Result]:
    """One result a property. A loss that raises has failed the property.

    Args:
        first: properties to begin with; the others follow in their order.
        without: names of properties to leave out.
        until_failure: stop at the first property that does not hold.
    """
    results: list[Result] = []
    for holds in (*first, *(other for other in PROPERTIES if other not in first)):
        if name_of(holds) in without:
            continue
        results.append(_result(holds, Trials(subject)))
        if until_failure and results[-1].passed is False:
            break
    return results


def name_of(holds: "Property") -> str:
    return holds.__name__.replace("_", " ")


def _result(holds: "Property", trials: Trials) -> Result:
    unmet = sorted(trials.loss.needs - DRAWABLE)
    if unmet:
        return Result(name_of(holds), None, f"it needs {', '.join(unmet)}, which only a network gives")
    try:
        return Result(name_of(holds), True, holds(trials))
    except DoesNotApply as reason:
        return Result(name_of(holds), None, str(reason))
    except Violation as violation:
        return Result(name_of(holds), False, str(violation))
    except Exception as error:  # whatever a user's own class raises is told, not thrown
        said = str(error).strip().splitlines()[:1]
        return Result(name_of(holds), False, f"it raises {type(error).__name__}: {''.join(said)}")


# ---- the contract


def gives_nats_for_every_token_in_float32(trials: Trials) -> str:
    """[R, T] in float32 whatever the student computes in: bfloat16 has 3 digits, which a sum over a vocabulary loses.

    Catches: a mean or sum taken inside the loss; a softmax in the autocast precision; float16 overflow.
    """
    batch = trials.batch()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = batch["student_logits_RTV"].to(dtype)
        nats = trials.nats(batch, student_logits_RTV=rounded)
        require(nats.shape == (R, T), f"shape {tuple(nats.shape)} for labels of shape {(R, T)}")
        require(nats.dtype == torch.float32, f"{dtype} logits give {nats.dtype}")
        wide = trials.nats(batch, student_logits_RTV=rounded.float())
        agree(f"{dtype} logits against the same in float32", nats, wide, within=1e-6)
    alone = trials.nats(slots(rows(batch, slice(0, 1)), 0, slice(0, 1)))
    require(alone.shape == (1, 1), f"shape {tuple(alone.shape)} for one token")
    huge = {**batch, "student_logits_RTV": batch["student_logits_RTV"].sign() * 1e5}
    finite("logits of +-100,000, beyond float16", *trials.with_gradient(huge))
    return "float32, bfloat16, float16"


def leaves_ignored_labels_out(trials: Trials) -> str:
    """Padding costs exactly 0 and teaches exactly nothing, whatever stands there; token 0 is a token like others.

    Catches: an ignore index of 0 (also the padding token); a mask that multiplies infinities; garbage read at padding.
    """
    batch = trials.batch()
    nats, gradient = trials.with_gradient(batch)
    ignored = batch["labels_RT"] == IGNORE
    worst = nats[ignored].abs().max().item()
    require(worst == 0, f"{worst:.6g} nats at an ignored label")
    worst = gradient[ignored].abs().max().item()
    require(worst == 0, f"a gradient of {worst:.6g} at an ignored label")
    require(nats[0, 0] != 0, "0 nats at a token whose label is 0")
    require(gradient[0, 0].abs().max() > 0, "no gradient at a token whose label is 0")
    garbage = dict(batch)
    for name in ("student_logits_RTV", "teacher_logits_RTV"):
        if name in batch:
            garbage[name] = torch.where(ignored[..., None], 1e4 * batch[name].roll(1, dims=-1), batch[name])
    if "teacher_ids_RTK" in batch:  # as collate fills them
        garbage["teacher_ids_RTK"] = batch["teacher_ids_RTK"].masked_fill(ignored[..., None], 0)
        garbage["teacher_log_probs_RTK"] = batch["teacher_log_probs_RTK"].masked_fill(ignored[..., None], 0.0)
    other_nats, other_gradient = trials.with_gradient(garbage)
    agree("nats, with and without garbage at padding", nats, other_nats, within=1e-6)
    agree("gradient, with and without garbage at padding", gradient, other_gradient, within=1e-5, at_least=1e-3)
    return f"{int(ignored.sum())} ignored of {R * T}"


def looks_at_its_own_token_only(trials: Trials) -> str:
    """nats[r, t] depends on logits, label and signals at (r, t) alone.

    Catches: labels or signals shifted by one; a softmax, a sort or a normalisation that reaches into the neighbouring
    packed example.
    """
    batch = trials.batch()
    logits = batch["student_logits_RTV"].clone().requires_grad_()
    nats = trials.nats(batch, student_logits_RTV=logits)
    others = trials.batch(seed=5)
    # The first token, the first and last of a segment, and one in the midst.
    for place in ((0, 0), (1, SECOND[1]), (1, SECOND[1] - 1), (2, 2)):
        gradient = gradient_of(nats[place], logits)
        require(gradient[place].abs().max() > 0, f"the nats at {place} do not depend on the logits there")
        elsewhere_RT = gradient.abs().amax(dim=-1)
        elsewhere_RT[place] = 0.0
        worst, where = elsewhere_RT.max().item(), divmod(int(elsewhere_RT.argmax()), T)
        require(worst == 0, f"the nats at {place} depend on the logits at {where}: gradient {worst:.3g}")
        moved = dict(batch)
        for name in ("student_logits_RTV", "labels_RT", *(n for n in batch if n.startswith("teacher_"))):
            moved[name] = others[name].clone()
            moved[name][place] = batch[name][place]
        nats_here, nats_moved = float(nats[place].detach()), float(trials.nats(moved)[place])
        require(
            abs(nats_here - nats_moved) <= 1e-5 * max(1.0, abs(nats_here)),
            f"the nats at {place} go from {nats_here:.6g} to {nats_moved:.6g} when other tokens' inputs change",
        )
    return "no gradient and no change from other tokens"


# ---- values


def has_the_known_value_where_it_is_known(trials: Trials) -> str:
    """A divergence is 0, with gradient 0, where the student is the teacher, and nowhere less; cross-entropy with labels
    is log V for a student that knows nothing, and falls as the label's logit rises.

    Catches: a dropped tail (its gradient is not 0 there); a forgotten entropy term; two temperatures; a wrong sign.
    """
    batch = trials.batch()
    kept = batch["labels_RT"] != IGNORE
    if not trials.facts.zero_at_teacher:
        if trials.reads_teacher:
            raise DoesNotApply("it says that it is not 0 where the student is the teacher")
        nats = trials.nats(batch)[kept]
        raised = batch["student_logits_RTV"] + torch.nn.functional.one_hot(batch["labels_RT"].clamp_min(0), V)
        rise = (trials.nats(batch, student_logits_RTV=raised)[kept] - nats).max().item()
        require(rise < 0, f"{rise:+.6g} nats where the label's logit was raised by 1")
        if trials.facts.nats is None:
            return "falls as the label's logit rises"
        nothing = trials.nats(batch, student_logits_RTV=torch.zeros(R, T, V))[kept]
        return agree("uniform student against log V", nothing, torch.full_like(nothing, V).log(), within=1e-6)
    teacher = trials.logits(R, T, seed=7)
    same = {**batch, "student_logits_RTV": teacher, **trials.teacher(teacher)}
    nats, gradient = trials.with_gradient(same)
    value, slope = nats.abs().max().item(), gradient.abs().max().item()
    require(value < 2e-5, f"{value:.6g} nats where the student is the teacher")
    # The derivative of an absolute difference is not 0 there, but any number between its two sides.
    if trials.facts.smooth:
        require(
            slope < 2e-4,
            f"a gradient of {slope:.6g} where the student is the teacher (smooth = False: it has a kink there)",
        )
    least = trials.nats(batch)[kept].min().item()
    require(least > 0, f"{least:.6g} nats, where the student is not the teacher")
    return f"{value:.1e} nats, gradient {slope:.1e}"


def is_the_formula(trials: Trials) -> str:
    """The reference, written from the paper in float64, on several draws.

    Catches: anything that changes the value: a wrong base of logarithm, a mean over V, a term left out.
    """
    told = ""
    for seed in (1, 2, 3):
        batch = trials.batch(seed=seed, k=2 * seed)
        told = agree("loss against reference", trials.nats(batch), trials.reference(batch), within=1e-4, at_least=1e-2)
    return told


def has_the_direction_of_its_formula(trials: Trials) -> str:
    """Where the two directions differ by far: a teacher sure of one token, a student that prefers others.

    Catches: teacher and student exchanged, which random draws of like sharpness may hide.
    """
    trials.needs_teacher()
    right, wrong = both_directions(trials)
    if symmetric(right, wrong):
        raise DoesNotApply(f"the formula is symmetric: {right:.6g} nats both ways")
    value = float(trials.nats(_one_sided(trials)[0])[0, 0])
    require(
        abs(value - right) < 1e-3 * abs(right),
        f"{value:.6g} nats; the formula gives {right:.6g}, and {wrong:.6g} with teacher and student exchanged",
    )
    return f"{value:.6g} nats, {wrong:.6g} the other way"


def both_directions(trials: Trials) -> tuple[float, float]:
    """The formula's nats, and with teacher and student exchanged. Raises DoesNotApply without a formula."""
    here, there = (float(trials.reference(batch)[0, 0]) for batch in _one_sided(trials))
    return here, there


def symmetric(right: float, wrong: float) -> bool:
    return abs(right - wrong) < 1e-6 * abs(right)


def _one_sided(trials: Trials) -> tuple[Batch, Batch]:
    teacher, student = torch.zeros(2, 1, 1, V).unbind()
    teacher[..., 0], student[..., :3] = 7.0, torch.tensor([2.0, 3.0, -1.0])
    one = slots(trials.batch(), 0, slice(0, 1))
    here = {**one, "student_logits_RTV": student, **trials.teacher(teacher)}
    there = {**one, "student_logits_RTV": teacher, **trials.teacher(student)}
    if trials.reads_top_k:  # over the same buckets
        ids, temperature = here["teacher_ids_RTK"], getattr(trials.loss, "temperature", 1.0)
        log_probs = (student / temperature).log_softmax(dim=-1).gather(-1, ids)
        there |= {"teacher_ids_RTK": ids, "teacher_log_probs_RTK": log_probs}
    return here, there


# ---- gradients


def has_the_gradient_of_its_value(trials: Trials) -> str:
    """Against central differences in float64: of the reference, or of the loss itself where there is none; then the
    float32 gradient against the float64 one.

    Catches: a hand-written backward pass that is wrong, a detach too many, a where() that cuts the gradient.
    """
    cut, step = slice(0, 2), 1e-5
    batch = slots(trials.batch(dtype=torch.float64), 0, cut)
    nats, gradient = trials.with_gradient(batch)
    if nats.dtype != torch.float64:
        raise DoesNotApply(f"float64 logits give {nats.dtype}: differences would be rounding errors")
    by_reference = trials.facts.nats is not None
    if trials.facts.stops_gradient and not by_reference:
        raise DoesNotApply("it takes something that depends on the student as constant; only a reference can tell what")

    def value(logits: Tensor) -> np.ndarray:
        if by_reference:
            return trials.reference(batch, student_logits_RTV=logits)
        return trials.nats(batch, student_logits_RTV=logits).detach().numpy()

    differences = torch.zeros(1, 2, V, dtype=torch.float64)
    for token in range(V):  # positions are independent, so both are moved at once
        move = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor(token), step)
        ahead, behind = value(batch["student_logits_RTV"] + move), value(batch["student_logits_RTV"] - move)
        differences[..., token] = torch.from_numpy((ahead - behind) / (2 * step))
    size = gradient.abs().max().item()
    source = "reference" if by_reference else "loss"
    what = f"gradient against differences of the {source}"
    told = agree(what, gradient, differences, within=1e-5, at_least=max(0.01 * size, 1e-4))
    low = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    agree("float32 gradient against float64", trials.with_gradient(low)[1], gradient, within=1e-3, at_least=0.1 * size)
    return told


def sends_the_teacher_no_gradient(trials: Trials) -> str:
    """The teacher is given. Catches: a forgotten detach, which trains a teacher that shares weights or scores live."""
    trials.needs_teacher()
    batch = trials.batch()
    names = [name for name in batch if name.startswith("teacher_") and batch[name].is_floating_point()]
    leaves = {name: batch[name].clone().requires_grad_() for name in names}
    logits = batch["student_logits_RTV"].clone().requires_grad_()
    total = trials.nats(batch, student_logits_RTV=logits, **leaves).sum()
    for name, leaf in leaves.items():
        worst = gradient_of(total, leaf).abs().max().item()
        require(worst == 0, f"a gradient of {worst:.6g} by {name}")
    return ", ".join(names)


# ---- temperature and truncation


def keeps_the_gradients_size_at_any_temperature(trials: Trials) -> str:
    """Twice as hot, far above the logits' range, the gradient is as large as before (Hinton et al. 2015).

    Catches: a dropped T^2; T^2 where the gradient falls with T only; a temperature for one side only.
    """
    trials.needs_teacher()
    if not hasattr(trials.loss, "temperature"):
        raise DoesNotApply("it has no temperature")
    sizes = {}
    for temperature in (20.0, 40.0):
        loss = changed(trials.loss, temperature=temperature)
        batch = trials.batch(loss=loss, dtype=torch.float64, k=V - 1)
        sizes[temperature] = trials.with_gradient(batch, loss=loss)[1].norm().item()
    cold, hot = sizes.values()
    require(cold > 0, "no gradient at temperature 20")
    ratio = hot / cold
    require(0.7 < ratio < 1.4, f"gradient norm {cold:.4g} at temperature 20, {hot:.4g} at 40: ratio {ratio:.3g}")
    return f"ratio {ratio:.3f} from temperature 20 to 40"


def counts_the_tail(trials: Trials) -> str:
    """A teacher's stored tokens need not sum to 1, and what they leave has an effect: they are not renormalised.

    Catches: stored tokens renormalised by the teacher's side, the student's or both.
    """
    if not trials.reads_top_k:
        raise DoesNotApply("it reads no truncated distribution")
    batch = trials.batch()
    kept = batch["labels_RT"] != IGNORE
    thinner = {**batch, "teacher_log_probs_RTK": batch["teacher_log_probs_RTK"] + np.log(0.6)}
    nats, other = trials.nats(batch)[kept], trials.nats(thinner)[kept]
    difference = (nats - other).abs().max().item()
    require(
        difference > 1e-3 * nats.abs().mean().item(),
        f"{nats[0]:.6g} nats with {batch['teacher_log_probs_RTK'][0, 0].exp().sum():.3f} of the teacher's mass stored, "
        f"{other[0]:.6g} with 0.6 times that",
    )
    return f"up to {difference:.3g} nats for a tail of another size"


def nears_the_full_divergence_as_k_grows(trials: Trials) -> str:
    """K stored tokens and a tail: at K = V - 1 the buckets are the tokens, so nothing changes any more; before, an
    f-divergence only rises (the data-processing inequality).

    Catches: a tail counted twice or not at all; stored ids that are looked up in the wrong place.
    """
    if not trials.reads_top_k:
        raise DoesNotApply("it reads no truncated distribution")
    by_k = torch.stack([trials.nats(trials.batch(k=k, dtype=torch.float64)) for k in range(1, V + 1)])
    full, told = by_k[-1], "at K = V"
    if getattr(trials.loss, "distribution", None) == "top_k":
        loss = changed(trials.loss, distribution="full")
        full, told = trials.nats(trials.batch(loss=loss, dtype=torch.float64), loss=loss), "over all logits"
    for k in (V - 1, V):
        agree(f"K = {k} against the divergence {told}", by_k[k - 1], full, within=1e-4, at_least=1e-3)
    gap = (by_k - full).abs().mean(dim=(1, 2))
    require(gap[V - 3] <= gap[0], f"{gap[0]:.4g} nats from the full value at K = 1, {gap[V - 3]:.4g} at K = {V - 2}")
    if trials.facts.rises_with_k:
        fall = by_k.diff(dim=0).min().item()
        require(fall > -1e-5, f"one more stored token lowers the value by {-fall:.4g} nats")
    return f"{gap[0]:.3g} nats from it at K = 1, {gap[K - 1]:.3g} at K = {K}"


# ---- means


def makes_one_mean_however_batches_are_cut(trials: Trials) -> str:
    """The mean over tokens: the same for whole batches, uneven micro-batches, longer padding, and packing into one row.

    Catches: means of means; padding in the divisor; a mean over rows.
    """
    batch = trials.batch()
    singles = [rows(batch, slice(r, r + 1)) for r in range(R)]
    unpadded = [slots(batch, r, slice(0, end)) for r, end in enumerate(ENDS)]
    ways = {
        "row by row": singles,
        "uneven micro-batches": [singles[0], rows(batch, slice(1, R))],
        "without padding": unpadded,
        "packed into one row": [joined(unpadded)],
        "segment by segment": [
            slots(batch, r, cut) for r in range(R) for cut in (slice(0, SECOND[r]), slice(SECOND[r], ENDS[r]))
        ],
    }
    whole = trials.mean([batch])
    finite("the mean", whole)
    for way, parts in ways.items():
        agree(f"mean of the whole batch against {way}", whole, trials.mean(parts), within=1e-5)
    return f"{float(whole):.4g} nats in {len(ways) + 1} ways"


def divides_by_the_weights(trials: Trials) -> str:
    """Sum of nats * weight over sum of weights: by hand, and whatever the weights' common scale.

    Catches: weights that are not used, or not normalised; padding in the divisor.
    """
    batch = trials.batch()
    nats, weights = trials.nats(batch).double(), trials.subject.weighting(**batch).double()
    if (focus := trials.focus(batch)) is not None:
        nats = nats * focus.double()
    kept = batch["labels_RT"] != IGNORE
    by_hand = (nats * weights)[kept].sum() / weights[kept].sum()
    told = agree("mean against sum of nats * weight / sum of weights", trials.mean([batch]), by_hand, within=1e-5)
    weighting = trials.subject.weighting
    focus_of = getattr(weighting, "focus", None)

    class Louder:
        focus = staticmethod(focus_of) if focus_of else None

        def __call__(self, **signals: Tensor) -> Tensor:
            return 3.5 * weighting(**signals)

    louder = Trials(dataclasses.replace(trials.subject, weighting=Louder()))
    agree("mean with 3.5 times the weights", trials.mean([batch]), louder.mean([batch]), within=1e-5)
    return told


# ---- limits


def is_finite_at_the_extremes(trials: Trials) -> str:
    """Value and gradient, where a student or a teacher has no mass, all of it, or says nothing.

    Catches: 0 * log 0; the infinity of reverse KL; a NaN that where() lets into the gradient.
    """
    nowhere = torch.full((V,), -torch.inf)
    students = {
        "ordinary": torch.linspace(-3, 3, V),
        "sure of another token": torch.full((V,), -1e30).index_fill(0, torch.tensor([5]), 0.0),
        "of -inf but for two tokens": nowhere.index_fill(0, torch.tensor([3, 5]), 0.0),
        "as steep as 10,000 a token": torch.arange(V) * 1e4,
    }
    teachers = {
        "one-hot": nowhere.index_fill(0, torch.tensor([3]), 0.0),
        "uniform": torch.zeros(V),
        "nearly one-hot": torch.full((V,), -200.0).index_fill(0, torch.tensor([3]), 0.0),
    }
    # A row a case: three tokens of which one is ignored.
    cases = [(student, teacher) for student in students for teacher in teachers]
    labels = torch.tensor([[3, IGNORE, 5]]).expand(len(cases), -1)
    batch = {"labels_RT": labels, "progress": trials.batch()["progress"]}
    batch["student_logits_RTV"] = torch.stack([students[student].expand(3, V) for student, _ in cases])
    logits = torch.stack([teachers[teacher].expand(3, V) for _, teacher in cases])
    for told, signals in _extreme_teachers(trials, logits).items():
        nats, gradient = trials.with_gradient({**batch, **signals})
        bad = ~(nats.isfinite().all(dim=-1) & gradient.isfinite().flatten(1).all(dim=-1))
        if bad.any():
            student, teacher = cases[int(bad.int().argmax())]
            place = bad.int().argmax()
            raise Violation(
                f"nats {nats[place].tolist()}, gradient of norm {gradient[place].norm():.3g}: "
                f"student {student}, teacher {teacher}{told}"
            )
    return f"{len(cases)} cases"


def _extreme_teachers(trials: Trials, logits_RTV: Tensor) -> dict[str, Batch]:
    if not trials.reads_top_k:
        return {"": trials.teacher(logits_RTV)}
    cases = {f", K = {k}": trials.teacher(logits_RTV, k=k) for k in (1, 3, V)}
    silent = trials.teacher(logits_RTV)
    silent["teacher_log_probs_RTK"] = torch.full_like(silent["teacher_log_probs_RTK"], -torch.inf)
    return {**cases, " but without a distribution": silent}


def moves_a_state_that_is_a_finite_tensor(trials: Trials) -> str:
    """A loss that adapts keeps its shape of state, stays finite, and gives the same for the same.

    Catches: a state hidden in the object, which a checkpoint would lose; a division by a mean of 0.
    """
    if not hasattr(trials.loss, "initial_state"):
        raise DoesNotApply("it has no state")
    first = state = trials.loss.initial_state()
    for step, mean in enumerate((3.0, 2.0, 2.5, 0.0, 0.0, 1.0)):
        before = state
        moves = [trials.loss.next_state(before, mean_nats=torch.tensor(mean), progress=step / 6) for _ in range(2)]
        state = moves[0]
        require(state.shape == first.shape, f"a state of shape {tuple(state.shape)}, at first {tuple(first.shape)}")
        require(torch.equal(*moves), f"two states {moves[0].tolist()} and {moves[1].tolist()} from one")
        require(bool(state.isfinite().all()), f"the state is {state.tolist()} after a mean of {mean} nats")
    return f"{first.tolist()} to {[round(x, 4) for x in state.flatten().tolist()]} in 6 steps"


Property = Callable[[Trials], str]
PROPERTIES: tuple[Property, ...] = (
    gives_nats_for_every_token_in_float32,
    leaves_ignored_labels_out,
    looks_at_its_own_token_only,
    has_the_known_value_where_it_is_known,
    is_the_formula,
    has_the_direction_of_its_formula,
    has_the_gradient_of_its_value,
    sends_the_teacher_no_gradient,
    keeps_the_gradients_size_at_any_temperature,
    counts_the_tail,
    nears_the_full_divergence_as_k_grows,
    makes_one_mean_however_batches_are_cut,
    divides_by_the_weights,
    is_finite_at_the_extremes,
    moves_a_state_that_is_a_finite_tensor,
)
