"""The small batches that a loss is tried on, and what is measured there: the ground of needle.loss.conformance."""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from needle.loss.base import IGNORE, Loss, LossTerms, reduce
from needle.loss.hard_label import cross_entropy
from needle.loss.objective import DISTRIBUTIONS
from needle.loss.references import REFERENCES, Case, Facts

R, T, V, K = 3, 10, 13, 4
# First label that is ignored in each row, and where a second packed segment begins. Segments are never of one length.
ENDS, SECOND = (10, 6, 8), (4, 3, 5)
PROGRESS = 0.4
Batch = dict[str, Tensor]


class Violation(Exception):
    """A property does not hold; the message has the offending numbers."""


class DoesNotApply(Exception):
    """The property says nothing about this loss; the message says why."""


def divide(parts: Sequence[LossTerms]) -> Tensor:
    """The mean over micro-batches: sums are added, weights are added, and divided once."""
    return torch.stack([part.sum_nats for part in parts]).sum() / torch.stack([part.weight for part in parts]).sum()


@dataclass(frozen=True)
class Subject:
    """A loss and how its mean is made. `weighting` is called with the batch and gives weights [R, T]."""

    loss: Loss
    weighting: Callable[..., Tensor]
    reduce: Callable[..., LossTerms] = reduce
    divide: Callable[[Sequence[LossTerms]], Tensor] = divide

    @property
    def name(self) -> str:
        """The class, with the form of the distribution where there are two."""
        form = getattr(self.loss, "distribution", None)
        return type(unwrapped(self.loss)).__name__ + (f"[{form}]" if form else "")


def unwrapped(loss: Any) -> Any:
    """The loss itself, without what mutations put around it."""
    return unwrapped(loss.loss) if getattr(loss, "is_wrapper", False) else loss


def changed(loss: Any, **settings: Any) -> Any:
    """A copy of a loss with other settings."""
    if hasattr(loss, "changed"):
        return loss.changed(**settings)
    if dataclasses.is_dataclass(loss):
        return dataclasses.replace(loss, **settings)  # type: ignore[type-var]
    other = copy.copy(loss)
    for name, value in settings.items():
        setattr(other, name, value)
    return other


def forms(loss: Any) -> list[Any]:
    """The loss in every form of the teacher's distribution that it takes: stored top-k, and all logits."""
    if getattr(loss, "distribution", None) not in ("top_k", "full"):
        return [loss]
    return [changed(loss, distribution=form) for form in ("top_k", "full")]


def facts_of(loss: Any) -> Facts:
    """What is known of the formula: of the project's own losses by class, of another by its attributes of these
    names (`reference` for the formula itself, a needle.loss.references.Reference)."""
    loss = unwrapped(loss)
    if type(loss).__module__.startswith("needle.loss.") and type(loss).__name__ in REFERENCES:
        return REFERENCES[type(loss).__name__]
    return Facts(
        nats=getattr(loss, "reference", None),
        zero_at_teacher=getattr(loss, "zero_at_teacher", bool(loss.needs & DISTRIBUTIONS)),
        smooth=getattr(loss, "smooth", True),
        rises_with_k=getattr(loss, "rises_with_k", False),
        stops_gradient=getattr(loss, "stops_gradient", False),
    )


class Trials:
    """A subject, the batches that it is measured on, and what is known of it."""

    def __init__(self, subject: Subject):
        self.subject, self.loss, self.facts = subject, subject.loss, facts_of(subject.loss)
        self.reads_teacher = bool(self.loss.needs & DISTRIBUTIONS)
        self.reads_top_k = "top_k" in self.loss.needs

    # ---- batches

    def logits(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (scale * torch.randn(*shape, V, generator=generator, dtype=torch.float64)).to(dtype)

    def batch(self, *, seed: int = 1, k: int = K, dtype: torch.dtype = torch.float32, loss: Any = None) -> Batch:
        """Packed rows in the layout of needle.data.packing.collate, with padding and, at (0, 0), label 0, which is also
        the number of the padding token; student logits and what the loss needs of a teacher."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(1, V, (R, T), generator=generator)
        labels[0, 0] = 0
        segments = torch.ones(R, T, dtype=torch.int64)
        for row, (second, end) in enumerate(zip(SECOND, ENDS, strict=True)):
            segments[row, second:], segments[row, end:], labels[row, end:] = 2, 0, IGNORE
        return {
            "student_logits_RTV": self.logits(R, T, seed=1000 + seed, dtype=dtype),
            "labels_RT": labels,
            "target_segments_RT": segments,
            "decoder_ids_RT": labels.roll(1, dims=1).clamp_min(0),
            "spans_RT": torch.randint(0, 5, (R, T), generator=generator),
            "kinds_RT": torch.randint(0, 9, (R, T), generator=generator),
            "answer_weights_RT": 0.25 + 0.75 * torch.rand(R, T, generator=generator),
            "confidences_RT": 0.25 + 0.75 * torch.rand(R, T, generator=generator),
            "progress": torch.tensor(PROGRESS),
            **self.teacher(self.logits(R, T, seed=2000 + seed, dtype=dtype), k=k, loss=loss),
        }

    def teacher(self, logits_RTV: Tensor, *, k: int = K, loss: Any = None) -> Batch:
        """A teacher of these logits, as the loss asks for it."""
        loss = loss or self.loss
        signals: Batch = {}
        if "top_k" in loss.needs:
            tempered = logits_RTV.double() / getattr(loss, "temperature", 1.0)
            top = tempered.log_softmax(dim=-1).topk(k, dim=-1)
            signals |= {"teacher_ids_RTK": top.indices, "teacher_log_probs_RTK": top.values.to(logits_RTV.dtype)}
        if "full_logits" in loss.needs:
            signals["teacher_logits_RTV"] = logits_RTV
        if hasattr(loss, "initial_state"):
            signals["state"] = loss.initial_state()
        return signals

    # ---- measures

    def nats(self, batch: Batch, *, loss: Any = None, **instead: Tensor) -> Tensor:
        return (loss or self.loss)(**{**batch, **instead})

    def with_gradient(self, batch: Batch, *, loss: Any = None) -> tuple[Tensor, Tensor]:
        """Nats [R, T] and the gradient of their sum by the student's logits."""
        logits = batch["student_logits_RTV"].detach().clone().requires_grad_()
        nats = self.nats(batch, loss=loss, student_logits_RTV=logits)
        return nats.detach(), gradient_of(nats.sum(), logits)

    def mean(self, parts: Sequence[Batch]) -> Tensor:
        return self.subject.divide([self.terms(part) for part in parts])

    def terms(self, batch: Batch) -> LossTerms:
        """As needle.loss.objective.Objective makes them."""
        weighed = self.nats(batch)
        if (focus := self.focus(batch)) is not None:
            weighed = weighed * focus
        return self.subject.reduce(nats_RT=weighed, weights_RT=self.subject.weighting(**batch))

    def focus(self, batch: Batch) -> Tensor | None:
        given = getattr(self.subject.weighting, "focus", None)
        if given is None:
            return None
        logits, labels = batch["student_logits_RTV"], batch["labels_RT"]
        return given(label_nats_RT=cross_entropy(student_logits_RTV=logits, labels_RT=labels))

    def reference(self, batch: Batch, *, student_logits_RTV: Tensor | None = None) -> np.ndarray:
        """The formula's nats in float64. `student_logits_RTV`: where a derivative is taken; what the formula takes as
        constant stays at the batch's."""
        if self.facts.nats is None:
            raise DoesNotApply("no reference formula is known for this loss; give it one as its attribute `reference`")

        def array(name: str) -> np.ndarray | None:
            tensor = batch.get(name)
            if tensor is None:
                return None
            return (tensor.double() if tensor.is_floating_point() else tensor).numpy()

        moved = batch["student_logits_RTV"] if student_logits_RTV is None else student_logits_RTV
        return self.facts.nats(
            unwrapped(self.loss),
            Case(
                student_logits_RTV=moved.double().numpy(),
                constant_logits_RTV=array("student_logits_RTV"),
                labels_RT=array("labels_RT"),
                teacher_ids_RTK=array("teacher_ids_RTK"),
                teacher_log_probs_RTK=array("teacher_log_probs_RTK"),
                teacher_logits_RTV=array("teacher_logits_RTV"),
                progress=float(batch["progress"]),
                state=array("state"),
            ),
        )

    def needs_teacher(self) -> None:
        if not self.reads_teacher:
            raise DoesNotApply("it reads labels alone, no teacher's distribution")


def gradient_of(total: Tensor, by: Tensor) -> Tensor:
    """Zeros where `total` does not depend on it."""
    if not total.requires_grad:
        return torch.zeros_like(by)
    (gradient,) = torch.autograd.grad(total, by, allow_unused=True, retain_graph=True)
    return torch.zeros_like(by) if gradient is None else gradient


def require(holds: bool | Tensor, message: str) -> None:
    if not bool(holds):
        raise Violation(message)


def finite(name: str, *tensors: Tensor) -> None:
    for tensor, what in zip(tensors, ("value", "gradient"), strict=False):
        bad = (~tensor.isfinite()).sum().item()
        require(bad == 0, f"{what} is not finite at {bad} of {tensor.numel()} places: {name}")


def _worst(ours: Tensor | np.ndarray, theirs: Tensor | np.ndarray, *, at_least: float) -> tuple[float, str]:
    """The largest relative difference, with both numbers; differences are relative to no less than `at_least`."""
    a, b = (np.asarray(x.detach().double() if isinstance(x, Tensor) else x, np.float64).ravel() for x in (ours, theirs))
    differences = np.abs(a - b) / np.maximum(np.maximum(np.abs(a), np.abs(b)), at_least)
    place = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
    return float(differences[place]), f"{a[place]:.9g} against {b[place]:.9g}"


def agree(what: str, ours: Any, theirs: Any, *, within: float, at_least: float = 1e-6) -> str:
    """Raises Violation unless they agree; gives the largest relative difference."""
    worst, numbers = _worst(ours, theirs, at_least=at_least)
    require(worst <= within, f"{what}: {numbers}, {worst:.1e} apart, {within:.0e} allowed")
    return f"{what}: {worst:.1e} apart at most"


def rows(batch: Batch, rows: slice) -> Batch:
    return {name: x[rows] if x.dim() > 1 else x for name, x in batch.items()}


def slots(batch: Batch, row: int, slots: slice) -> Batch:
    return {name: x[row : row + 1, slots] if x.dim() > 1 else x for name, x in batch.items()}


def joined(parts: Sequence[Batch]) -> Batch:
    """Side by side in one row."""
    return {name: torch.cat([p[name] for p in parts], dim=1) if x.dim() > 1 else x for name, x in parts[0].items()}
