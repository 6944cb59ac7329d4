"""Cross-entropy with the teacher's answer: the undistilled baseline, and sequence-level distillation (Kim & Rush
2016)."""

# R rows, T target tokens, V vocabulary

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from needle.loss.base import IGNORE


def cross_entropy(*, student_logits_RTV: Tensor, labels_RT: Tensor) -> Tensor:
    """-log p_student(label), in nats [R, T]; 0 where the label is -100. Memory: one float copy of the logits."""
    return F.cross_entropy(student_logits_RTV.float().transpose(1, 2), labels_RT, ignore_index=IGNORE, reduction="none")


@dataclass(frozen=True)
class HardLabel:
    """Sum over labelled tokens of -log p_student(label), in nats."""

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __call__(self, *, student_logits_RTV: Tensor, labels_RT: Tensor, **_: Tensor) -> Tensor:
        return cross_entropy(student_logits_RTV=student_logits_RTV, labels_RT=labels_RT)
