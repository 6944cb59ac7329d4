"""What each term of an objective does to one student on given batches: its size, its gradient, and whom it pulls
against. Measured through needle.loss.objective.Objective, which training uses too.

Cost: a forward pass, and a backward pass a term, over the batches; a copy of the gradient for each term.
"""

# R rows, T target tokens, K stored teacher tokens

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from needle.data.packing import network_inputs
from needle.loss.base import IGNORE
from needle.loss.objective import TOKENS, Objective, covered
from needle.text.render import Span

Batch = Mapping[str, Tensor]
DISTILLATION, LABELS = "distillation", "labels"
FAINT = 0.01  # a term whose gradient is less than this share of the largest one's has no say
AGAINST = -0.3  # cosine of two gradients that undo each other


@dataclass(frozen=True)
class Term:
    """`mean`: as the term itself counts (nats a token, for the most part), before `coefficient`, which is what the
    balance, schedules and the mixing make of it. `gradient_norm`: of coefficient * mean, by the student's weights."""

    mean: float
    coefficient: float
    gradient_norm: float


@dataclass(frozen=True)
class Diagnosis:
    """`cosines`: between the gradients of two terms, None where one is 0."""

    tokens: dict[str, Any]
    signal: dict[str, float]
    terms: dict[str, Term]
    cosines: dict[tuple[str, str], float | None]

    def warnings(self) -> Iterator[str]:
        """What deserves a look, in sentences."""
        largest = max(term.gradient_norm for term in self.terms.values())
        for name, term in self.terms.items():
            if term.coefficient == 0:
                yield f"{name} has the coefficient 0 here: it teaches nothing at this point of the training"
            elif term.mean == 0:
                yield f"{name} is 0: the student has it already, or no unit of these batches counts for it"
            elif term.gradient_norm == 0:
                yield f"{name} sends the student no gradient"
            elif term.gradient_norm < FAINT * largest:
                yield f"{name} has {term.gradient_norm / largest:.1e} of the largest gradient: it has no say; raise it"
        for (first, second), cosine in self.cosines.items():
            if cosine is not None and cosine < AGAINST:
                yield f"{first} and {second} pull against each other: cosine {cosine:.2f}"
        silent, stored = self.signal.get("uncovered_frac", 0.0), self.signal.get("stored_mass", 1.0)
        if silent > 0.5:
            yield f"the teacher says nothing at {silent:.0%} of the tokens: labels stand in there"
        if stored < 0.5:
            yield f"only {stored:.0%} of the teacher's mass is stored; store more with teacher.top_k"
        if self.tokens["masked_frac"] > 0.5:
            yield f"{self.tokens['masked_frac']:.0%} of the target slots hold no token: see data.packing"


class _Summed(NamedTuple):
    """Sums over units, and the gradients of those sums divided by the batches' counts."""

    sums: dict[str, float]
    gradients: dict[str, list[Tensor | None]]


def diagnose(
    objective: Objective, *, student: nn.Module, batches: Sequence[Batch], progress: float, share: float
) -> Diagnosis:
    """Gradients are means over all of the batches, as if they were one.

    Args:
        objective: its mixing must not leave labels out (it may be read anywhere between: `share` counts).
        share: of the distillation in the mixture.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    all_counts = [objective.counts(batch) for batch in batches]
    counts = {name: torch.stack([c[name] for c in all_counts]).sum().clamp_min(1e-9) for name in all_counts[0]}
    total = _summed(objective, student, batches, parameters, counts, progress)
    shares = {DISTILLATION: share, LABELS: 1 - share} if objective.distils else {TOKENS: 1.0}
    means = {name: total.sums[name] / float(counts.get(name, counts[TOKENS])) for name in total.sums}
    weights = _weights(objective, means, shares, progress)
    terms, flat = {}, {}
    for name, gradient in total.gradients.items():
        flat[name] = torch.cat(
            [
                g.flatten() if g is not None else p.new_zeros(p.numel())
                for g, p in zip(gradient, parameters, strict=True)
            ]
        )
        terms[name] = Term(means[name], weights[name], abs(weights[name]) * float(flat[name].norm()))
    names = list(terms)
    cosines = {
        (first, second): _cosine(flat[first], flat[second])
        for place, first in enumerate(names)
        for second in names[place + 1 :]
    }
    return Diagnosis(_tokens(objective, batches), _signal(objective, batches), terms, cosines)


def _summed(
    objective: Objective,
    student: nn.Module,
    batches: Sequence[Batch],
    parameters: list[nn.Parameter],
    counts: Mapping[str, Tensor],
    progress: float,
) -> _Summed:
    sums: dict[str, float] = {}
    gradients: dict[str, list[Tensor | None]] = {}
    # The mixture is linear in the share, so both its parts are measured by a share of 1 and of 0.
    parts = {DISTILLATION: 1.0, LABELS: 0.0} if objective.distils else {TOKENS: 1.0}
    for batch in batches:
        for part, share in parts.items():
            measured = objective.measure(batch, student=student, progress=torch.tensor(progress), share=share)
            # The terms beside it do not depend on the share.
            values = measured.sums if part == next(iter(parts)) else {TOKENS: measured.sums[TOKENS]}
            for name, value in values.items():
                label = part if name == TOKENS else name
                sums[label] = sums.get(label, 0.0) + float(value.detach())
                gradients[label] = _added(gradients.get(label), _gradient(value / counts[name], parameters))
    order = [*parts, *(name for name in sums if name not in parts)]
    return _Summed({name: sums[name] for name in order}, {name: gradients[name] for name in order})


def _gradient(value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(parameters)
    return list(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))


def _added(before: list[Tensor | None] | None, more: list[Tensor | None]) -> list[Tensor | None]:
    if before is None:
        return more
    return [b if m is None else m if b is None else b + m for b, m in zip(before, more, strict=True)]


def _weights(
    objective: Objective, means: Mapping[str, float], shares: Mapping[str, float], progress: float
) -> dict[str, float]:
    """What one nat of each term is worth in the total, by the balance as it is now."""
    tokens = sum(share * means[name] for name, share in shares.items())
    leaves = {TOKENS: tokens} | {name: mean for name, mean in means.items() if name not in shares}
    tensors = {name: torch.tensor(mean, requires_grad=True) for name, mean in leaves.items()}
    total = objective.balance(tensors, objective.coefficients(progress), 1.0)
    slopes = dict(zip(tensors, map(float, torch.autograd.grad(total, list(tensors.values()))), strict=True))
    return {name: slopes[TOKENS] * shares[name] if name in shares else slopes[name] for name in means}


def _cosine(first: Tensor, second: Tensor) -> float | None:
    norms = float(first.norm() * second.norm())
    return float(first @ second) / norms if norms > 0 else None


def _tokens(objective: Objective, batches: Sequence[Batch]) -> dict[str, Any]:
    """Slots, and for each span its share of the tokens and of their weights."""
    labels, spans = (torch.cat([batch[name].flatten() for batch in batches]) for name in ("labels_RT", "spans_RT"))
    weights = torch.cat([objective.weighting(**batch).flatten() for batch in batches])
    kept = labels != IGNORE
    by_span = {}
    for span in Span:
        chosen = kept & (spans == span)
        if chosen.any():
            by_span[span.name.lower()] = {
                "tokens": int(chosen.sum()),
                "tokens_frac": float(chosen.sum() / kept.sum()),
                "weight_frac": float(weights[chosen].sum() / weights.sum()),
            }
    return {
        "slots": labels.numel(),
        "labelled": int(kept.sum()),
        "masked_frac": float(1 - kept.float().mean()),
        "spans": by_span,
    }


@torch.no_grad()
def _signal(objective: Objective, batches: Sequence[Batch]) -> dict[str, float]:
    """How much the teacher says: of its stored distributions, or of its network's."""
    if "teacher_log_probs_RTK" in batches[0]:
        log_probs, ids, labels = (
            torch.cat([batch[name].flatten(0, 1) for batch in batches])
            for name in ("teacher_log_probs_RTK", "teacher_ids_RTK", "labels_RT")
        )
        kept = labels != IGNORE
        log_probs, ids, labels = log_probs[kept], ids[kept], labels[kept]
        says = covered(log_probs)
        mass = log_probs[says].exp().sum(dim=-1)
        hit = (ids[says] == labels[says, None]) & (log_probs[says] > -torch.inf)
        return {
            "stored_tokens": float(ids.shape[-1]),
            "uncovered": float((~says).sum()),
            "uncovered_frac": float((~says).float().mean()),
            "stored_mass": float(mass.mean()),
            "tail_mass": float((1 - mass).clamp_min(0).mean()),
            "tail_mass_most": float((1 - mass).clamp_min(0).max()),
            "label_stored_frac": float(hit.any(dim=-1).float().mean()),
            "label_likeliest_frac": float(hit[:, 0].float().mean()),
        }
    if objective.teacher is None:
        return {}
    entropies, likeliest = [], []
    for batch in batches:
        kept = batch["labels_RT"] != IGNORE
        log_probs = objective.teacher(**network_inputs(batch)).logits[kept].float().log_softmax(dim=-1)
        entropies.append(-(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(dim=-1))
        likeliest.append(log_probs.argmax(dim=-1) == batch["labels_RT"][kept])
    return {
        "entropy_nats": float(torch.cat(entropies).mean()),
        "label_likeliest_frac": float(torch.cat(likeliest).float().mean()),
    }
