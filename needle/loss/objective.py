"""What a run minimises: the loss mixed with labels, weighted by token, and the terms beside it.

    tokens = share * loss + (1 - share) * cross-entropy        at every target token, weighted mean over the batch
    total  = balance(tokens, auxiliary_1, auxiliary_2, ...)

The training, the benchmarks and the doctor all measure through this one class.
"""

# R rows, T target tokens, V vocabulary, K teacher tokens

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from needle.data.packing import network_inputs
from needle.loss.balance import Balance
from needle.loss.base import AuxiliarySettings, Loss, reduce
from needle.loss.hard_label import HardLabel, cross_entropy
from needle.loss.schedule import Mixing
from needle.loss.weighting import Weighting

TOKENS = "tokens"  # the loss's own term; the others are named in the configuration
# Needs that speak of a teacher's distributions: losses with one of them are mixed with labels.
DISTRIBUTIONS = frozenset({"top_k", "full_logits"})
# Needs that are met by running the teacher's network on every batch.
NETWORK = frozenset({"full_logits", "features", "live"})


def needs_of(loss: Loss, auxiliaries: Mapping[str, AuxiliarySettings]) -> frozenset[str]:
    """All that an objective of these asks of the teacher."""
    return frozenset().union(loss.needs, *(term.needs for term in auxiliaries.values()))


class Measured(NamedTuple):
    """One micro-batch. `nats_RT`: the mixed loss; `loss_nats_RT`: the distillation loss alone; `label_nats_RT`:
    cross-entropy with the labels; `sums`: every term's sum over its units, for the backward pass."""

    nats_RT: Tensor
    loss_nats_RT: Tensor
    label_nats_RT: Tensor
    right_RT: Tensor
    sums: dict[str, Tensor]


class Objective(nn.Module):
    """`teacher`: a network that scores every batch, None where all it says is stored. It is not trained, moved or
    checkpointed here."""

    def __init__(
        self,
        *,
        loss: Loss,
        mixing: Mixing,
        weighting: Weighting,
        balance: Balance,
        auxiliaries: Mapping[str, AuxiliarySettings],
        student: nn.Module,
        teacher: nn.Module | None,
    ):
        super().__init__()
        self.loss, self.mixing, self.weighting, self.settings = loss, mixing, weighting, dict(auxiliaries)
        self.distils = bool(loss.needs & DISTRIBUTIONS)
        self._teacher = (teacher,)  # in a tuple, so that it is not a part of this module
        self.auxiliaries = nn.ModuleDict(
            {name: settings.attach(student=student, teacher=teacher) for name, settings in auxiliaries.items()}
        )
        self.balance = balance.attach([TOKENS, *auxiliaries])
        state = loss.initial_state() if hasattr(loss, "initial_state") else None  # type: ignore[attr-defined]
        self.register_buffer("state", state)

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every term's sum over this batch is to be divided by. From the data alone."""
        terms = {name: term.count(batch) for name, term in self.auxiliaries.items()}
        return {TOKENS: self.weighting(**batch).sum(), **terms}

    def coefficients(self, progress: float) -> dict[str, float]:
        return {TOKENS: 1.0} | {name: settings.weight.at(progress) for name, settings in self.settings.items()}

    def measure(
        self, batch: Mapping[str, Tensor], *, student: nn.Module, progress: Tensor, share: Tensor | float
    ) -> Measured:
        """Runs the student, and the teacher where the loss needs its network.

        Args:
            progress: share of the training that is behind, a scalar tensor.
            share: of the distillation loss in the mixture, a scalar.
        """
        outputs = student(**network_inputs(batch))
        teacher_outputs = self.teacher_outputs(batch)
        signals = {**batch, "progress": progress}
        if "full_logits" in self.loss.needs and teacher_outputs is not None:
            signals["teacher_logits_RTV"] = teacher_outputs.logits
        if self.state is not None:
            signals["state"] = self.state
        loss_nats = self.loss(student_logits_RTV=outputs.logits, **signals)
        if not self.distils:
            label_nats = nats = loss_nats
            if not isinstance(self.loss, HardLabel):
                with torch.no_grad():
                    label_nats = cross_entropy(student_logits_RTV=outputs.logits, labels_RT=batch["labels_RT"])
        else:
            # Not in the graph where only the distillation loss counts: one copy of the logits less.
            labels_count = not self.mixing.is_always(1.0) or "teacher_log_probs_RTK" in batch
            with torch.set_grad_enabled(torch.is_grad_enabled() and labels_count):
                label_nats = cross_entropy(student_logits_RTV=outputs.logits, labels_RT=batch["labels_RT"])
            nats = share * loss_nats + (1 - share) * label_nats
            if "teacher_log_probs_RTK" in batch:
                nats = torch.where(covered(batch["teacher_log_probs_RTK"]), nats, label_nats)
        weights_RT = self.weighting(**batch)
        focus_RT = self.weighting.focus(label_nats_RT=label_nats)
        weighed = nats if focus_RT is None else nats * focus_RT
        sums = {TOKENS: reduce(nats_RT=weighed, weights_RT=weights_RT).sum_nats}
        for name, term in self.auxiliaries.items():
            sums[name] = term(batch=batch, student=student, student_outputs=outputs, teacher_outputs=teacher_outputs)
        right_RT = outputs.logits.detach().argmax(dim=-1) == batch["labels_RT"]
        return Measured(nats, loss_nats.detach(), label_nats.detach(), right_RT, sums)

    @torch.no_grad()
    def teacher_outputs(self, batch: Mapping[str, Tensor]) -> Any:
        return None if self.teacher is None else self.teacher(**network_inputs(batch))

    def total(
        self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], *, progress: float, part_frac: float
    ) -> Tensor:
        """The scalar of one micro-batch, `part_frac` of the batch that `counts` is of; over a batch they add up to the
        objective."""
        # A batch may hold none of a term's units: it then adds nothing, not a division by zero.
        means = {name: total / counts[name].clamp_min(1e-9) for name, total in sums.items()}
        return self.balance(means, self.coefficients(progress), part_frac)

    def advance(self, *, loss_nats_RT: Tensor, weights_RT: Tensor, progress: float) -> None:
        """Moves the loss's state on after a step, for losses that have one."""
        if self.state is not None:
            mean = (loss_nats_RT * weights_RT).sum() / weights_RT.sum()
            self.state.copy_(self.loss.next_state(self.state, mean_nats=mean, progress=progress))  # type: ignore[attr-defined]


def covered(teacher_log_probs_RTK: Tensor) -> Tensor:
    """[R, T]: where the teacher says anything; a place without a distribution holds -inf throughout."""
    return (teacher_log_probs_RTK > -torch.inf).any(dim=-1)
