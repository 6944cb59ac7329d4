"""Keeps the vocabulary's logits from drifting: a penalty on the logarithm of their softmax's denominator."""

# R rows, T target tokens, V vocabulary

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from needle.loss.base import IGNORE, Auxiliary
from needle.loss.schedule import Schedule


@dataclass(frozen=True)
class ZLoss:
    """(log sum over V of exp(logit))^2 a labelled target token, in nats^2 (Chowdhery et al. 2022).

    Over the logits of the vocabulary before a copy head's mixture: the mixture's are log-probabilities, whose sum is
    always 1. No token or example weighs more than another. Beside any loss; memory: no copy of the logits.
    """

    weight: Schedule
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def attach(self, *, student: nn.Module, teacher: nn.Module | None) -> Auxiliary:
        return _ZLoss()


class _ZLoss(Auxiliary):
    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Labelled tokens."""
        return (batch["labels_RT"] != IGNORE).sum()

    def forward(
        self, *, batch: Mapping[str, Tensor], student: nn.Module, student_outputs: Any, teacher_outputs: Any
    ) -> Tensor:
        logits_RTV = getattr(student_outputs, "vocabulary_logits", None)
        if logits_RTV is None:  # a student that knows of no mixture
            logits_RTV = student_outputs.logits
        return z_squares(logits_RTV=logits_RTV, labels_RT=batch["labels_RT"]).sum()


def z_squares(*, logits_RTV: Tensor, labels_RT: Tensor) -> Tensor:
    """(log sum exp)^2 in nats^2 [R, T]; 0 where the label is -100."""
    return logits_RTV.float().logsumexp(dim=-1).square().masked_fill(labels_RT == IGNORE, 0.0)
