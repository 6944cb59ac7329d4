"""Twelve faults that losses have in practice, put into any loss or mean, to see that the suite would notice them.

`python -m needle.doctor mutations=true` and tests/loss/test_mutations.py print the table. Where a fault is no change
for a loss, it is left out by a rule that looks at the loss and its formula, never at what the suite says.
"""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from needle.loss import conformance
from needle.loss.base import IGNORE, LossTerms
from needle.loss.conformance import Property, both_directions, check, symmetric
from needle.loss.trials import DoesNotApply, Subject, Trials, changed

Signals = dict[str, Tensor]
Fault = Callable[[Any, Signals], Tensor]  # (loss, its keyword tensors) -> nats [R, T]
NAMES = ("student_logits_RTV", "teacher_logits_RTV", "teacher_log_probs_RTK")


@dataclass(frozen=True)
class FaultyLoss:
    """A loss with a fault around it; its settings and needs are the loss's own."""

    loss: Any
    fault: Fault
    is_wrapper = True

    def __call__(self, **signals: Tensor) -> Tensor:
        return self.fault(self.loss, signals)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loss":
            raise AttributeError(name)
        return getattr(self.loss, name)

    def changed(self, **settings: Any) -> "FaultyLoss":
        return FaultyLoss(changed(self.loss, **settings), self.fault)


@dataclass(frozen=True)
class Mutation:
    """`reason_against`: why the fault is no change for this loss, or "". `suspects`: properties that are tried
    first."""

    name: str
    mutate: Callable[[Subject], Subject]
    reason_against: Callable[[Subject], str]
    suspects: tuple[Property, ...]


@dataclass
class Row:
    """What became of one mutation: losses by outcome. `caught` counts by the first property that did."""

    mutation: str
    caught: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    not_applicable: dict[str, str] = field(default_factory=dict)


def survey(subjects: Sequence[Subject], mutations: Sequence[Mutation] | None = None) -> list[Row]:
    """Every mutation on every subject. What a subject fails without any mutation proves nothing and is left out."""
    rows = []
    failed = [{result.name for result in check(subject) if result.passed is False} for subject in subjects]
    for mutation in MUTATIONS if mutations is None else mutations:
        rows.append(row := Row(mutation.name))
        for subject, known in zip(subjects, failed, strict=True):
            if reason := mutation.reason_against(subject):
                row.not_applicable[subject.name] = reason
                continue
            mutated = mutation.mutate(subject)
            results = check(mutated, first=mutation.suspects, without=known, until_failure=True)
            if results and results[-1].passed is False:
                row.caught[results[-1].name] += 1
            else:
                row.missed.append(subject.name)
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """The table, and how many mutations were caught wherever they apply."""
    wide = max(len(row.mutation) for row in rows)
    lines = [f"{'mutation':{wide}}  caught  n/a  by"]
    for row in rows:
        caught = row.caught.total()
        by = ", ".join(f"{name} ({count})" for name, count in row.caught.most_common())
        missed = f"; MISSED: {', '.join(row.missed)}" if row.missed else ""
        counts = f"{caught:2} / {caught + len(row.missed):<2} {len(row.not_applicable):3}"
        lines.append(f"{row.mutation:{wide}}  {counts}  {by}{missed}")
    reasons = {(row.mutation, reason): [] for row in rows for reason in row.not_applicable.values()}
    for row in rows:
        for name, reason in row.not_applicable.items():
            reasons[row.mutation, reason].append(name)
    lines += ["", "n/a, by rule:"] if reasons else []
    for (mutation, reason), names in reasons.items():
        lines.append(f"  {mutation}: {reason}: {', '.join(names)}")
    whole = sum(bool(row.caught) and not row.missed for row in rows)
    tried = sum(bool(row.caught) or bool(row.missed) for row in rows)
    return "\n".join([*lines, "", f"{whole}/{tried} mutations caught"])


# ---- rules


def _always(subject: Subject) -> str:
    return ""


def _of_teacher(subject: Subject) -> str:
    return "" if Trials(subject).reads_teacher else "it reads no teacher's distribution"


def _of_top_k(subject: Subject) -> str:
    return "" if Trials(subject).reads_top_k else "it reads no truncated distribution"


def _of_temperature(subject: Subject) -> str:
    return "" if hasattr(subject.loss, "temperature") else "it has no temperature"


def _of_direction(subject: Subject) -> str:
    if reason := _of_teacher(subject):
        return reason
    try:
        return "the formula is symmetric" if symmetric(*both_directions(Trials(subject))) else ""
    except DoesNotApply:  # no formula is known
        return ""


# ---- faults of losses


def _shift_by_one(loss: Any, signals: Signals) -> Tensor:
    """The logits of the token before are compared with this one's label and signals."""
    return loss(**{**signals, "student_logits_RTV": signals["student_logits_RTV"].roll(1, dims=1)})


def _drop_temperature(loss: Any, signals: Signals) -> Tensor:
    return loss(**signals) / loss.temperature**2


def _swap(loss: Any, signals: Signals) -> Tensor:
    """Teacher and student exchanged. A truncated teacher becomes a student whose tail is even."""
    student = signals["student_logits_RTV"]
    instead: Signals = {}
    if "teacher_logits_RTV" in signals:
        instead = {"student_logits_RTV": signals["teacher_logits_RTV"], "teacher_logits_RTV": student}
    if "teacher_log_probs_RTK" in signals:
        temperature = getattr(loss, "temperature", 1.0)
        ids, log_probs = signals["teacher_ids_RTK"], signals["teacher_log_probs_RTK"]
        others = max(student.shape[-1] - ids.shape[-1], 1)
        tail = (1 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp_min(1e-7).log() - torch.tensor(others).log()
        scattered = tail.expand_as(student).scatter(-1, ids, log_probs)
        instead |= {
            "student_logits_RTV": temperature * scattered.to(student.dtype),
            "teacher_log_probs_RTK": (student / temperature).log_softmax(dim=-1).gather(-1, ids),
        }
    return loss(**{**signals, **instead})


def _forget_tail(loss: Any, signals: Signals) -> Tensor:
    """The tokens that are not stored do not exist: both distributions are over the stored ones."""
    logits, ids = signals["student_logits_RTV"], signals["teacher_ids_RTK"]
    stored = torch.full_like(logits, -torch.inf).scatter(-1, ids, 0.0)
    return _renormalise(loss, {**signals, "student_logits_RTV": logits + stored})


def _renormalise(loss: Any, signals: Signals) -> Tensor:
    """The teacher's stored probabilities are made to sum to 1; the student's are over all tokens."""
    return loss(**{**signals, "teacher_log_probs_RTK": signals["teacher_log_probs_RTK"].log_softmax(dim=-1)})


def _ignore_zero(loss: Any, signals: Signals) -> Tensor:
    labels = signals["labels_RT"]
    return loss(**{**signals, "labels_RT": torch.where(labels == IGNORE, 0, labels).masked_fill(labels == 0, IGNORE)})


def _keep_teachers_graph(loss: Any, signals: Signals) -> Tensor:
    """The same values, and a gradient for the teacher, as where its part is not detached."""
    nats = loss(**signals)
    for name in NAMES[1:]:
        if name in signals:
            share = signals[name].clamp_min(-1e4).mean(dim=-1)
            nats = nats + (share - share.detach()).masked_fill(signals["labels_RT"] == IGNORE, 0.0)
    return nats


def _in_float16(loss: Any, signals: Signals) -> Tensor:
    return loss(**{**signals, **{name: signals[name].half() for name in NAMES if name in signals}}).half().float()


def _leak_between_segments(loss: Any, signals: Signals) -> Tensor:
    """Each segment's first token also pays for the last one of the segment packed before it."""
    nats, labels, segments = loss(**signals), signals["labels_RT"], signals.get("target_segments_RT")
    if segments is None:
        return nats
    first = (segments != segments.roll(1, dims=1)) & (labels != IGNORE)
    first[:, 0] = False
    return nats + 0.1 * nats.roll(1, dims=1) * first


# ---- faults of means


def _mean_over_padding(*, nats_RT: Tensor, weights_RT: Tensor) -> LossTerms:
    return LossTerms((nats_RT * weights_RT).sum(), weights_RT.sum() + (weights_RT == 0).sum())


def _divide_by_count(*, nats_RT: Tensor, weights_RT: Tensor) -> LossTerms:
    return LossTerms((nats_RT * weights_RT).sum(), (weights_RT > 0).sum().to(nats_RT.dtype))


def _mean_of_means(parts: Sequence[LossTerms]) -> Tensor:
    return torch.stack([part.sum_nats / part.weight for part in parts]).mean()


def _of_loss(fault: Fault) -> Callable[[Subject], Subject]:
    return lambda subject: dataclasses.replace(subject, loss=FaultyLoss(subject.loss, fault))


def _of_mean(**parts: Any) -> Callable[[Subject], Subject]:
    return lambda subject: dataclasses.replace(subject, **parts)


MUTATIONS = (
    Mutation("shift by one", _of_loss(_shift_by_one), _always, (conformance.looks_at_its_own_token_only,)),
    Mutation(
        "drop T squared",
        _of_loss(_drop_temperature),
        _of_temperature,
        (conformance.keeps_the_gradients_size_at_any_temperature,),
    ),
    Mutation("mean over padding", _of_mean(reduce=_mean_over_padding), _always, (conformance.divides_by_the_weights,)),
    Mutation("swap direction", _of_loss(_swap), _of_direction, (conformance.has_the_direction_of_its_formula,)),
    Mutation("forget tail mass", _of_loss(_forget_tail), _of_top_k, (conformance.counts_the_tail,)),
    Mutation("ignore label 0", _of_loss(_ignore_zero), _always, (conformance.leaves_ignored_labels_out,)),
    Mutation(
        "weights not normalised", _of_mean(reduce=_divide_by_count), _always, (conformance.divides_by_the_weights,)
    ),
    Mutation(
        "teacher not detached",
        _of_loss(_keep_teachers_graph),
        _of_teacher,
        (conformance.sends_the_teacher_no_gradient,),
    ),
    Mutation("top-k renormalised", _of_loss(_renormalise), _of_top_k, (conformance.counts_the_tail,)),
    Mutation("float16 overflow", _of_loss(_in_float16), _always, (conformance.is_finite_at_the_extremes,)),
    Mutation(
        "mean of batch means",
        _of_mean(divide=_mean_of_means),
        _always,
        (conformance.makes_one_mean_however_batches_are_cut,),
    ),
    Mutation("packing leak", _of_loss(_leak_between_segments), _always, (conformance.looks_at_its_own_token_only,)),
)
