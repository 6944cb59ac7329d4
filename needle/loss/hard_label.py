"""Cross-entropy with the teacher's answer: the undistilled baseline, and sequence-level distillation (Kim & Rush
2016)."""

# R rows, T target tokens, V vocabulary

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from needle.loss.base import IGNORE
from needle.loss.buckets import LOG_ZERO, wide


def cross_entropy(*, student_logits_RTV: Tensor, labels_RT: Tensor) -> Tensor:
    """-log p_student(label), in nats [R, T]; 0 where the label is -100. A label whose logit is masked to -inf costs
    10,000 nats and gives no gradient. Memory: one float copy of the logits."""
    # Flat: a vocabulary that does not lie last in memory is many times slower.
    nats = F.cross_entropy(
        wide(student_logits_RTV).flatten(0, 1), labels_RT.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return nats.clamp_max(-LOG_ZERO).view_as(labels_RT)


@dataclass(frozen=True)
class HardLabel:
    """Sum over labelled tokens of -log p_student(label), in nats."""

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __call__(self, *, student_logits_RTV: Tensor, labels_RT: Tensor, **_: Tensor) -> Tensor:
        return cross_entropy(student_logits_RTV=student_logits_RTV, labels_RT=labels_RT)
