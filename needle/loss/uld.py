"""Universal Logit Distillation: a distance between distributions over different vocabularies."""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from needle.loss.base import IGNORE
from needle.loss.buckets import wide


def sorted_distance(*, student_probs_RTV: Tensor, teacher_log_probs_RTK: Tensor) -> Tensor:
    """Sum over ranks k of |p_student(k) - p_teacher(k)|, both in falling order, 0 to 2, [R, T].

    The teacher's stored K are its first ranks; what it has beyond them is one bucket, compared with the student's mass
    beyond its first K. By the triangle inequality that is at most the distance of the full distributions, which it
    meets at K = V. The shorter vocabulary counts as filled up with zeros.
    """
    kept = min(teacher_log_probs_RTK.shape[-1], student_probs_RTV.shape[-1])
    teacher_RTK = teacher_log_probs_RTK.exp().sort(dim=-1, descending=True).values
    student_RTK = student_probs_RTV.topk(kept, dim=-1).values
    ranks_RT = (student_RTK - teacher_RTK[..., :kept]).abs().sum(dim=-1) + teacher_RTK[..., kept:].sum(dim=-1)
    student_tail_RT = 1 - student_RTK.sum(dim=-1)
    teacher_tail_RT = (1 - teacher_RTK.sum(dim=-1)).clamp_min(0.0)
    if kept == student_probs_RTV.shape[-1]:
        student_tail_RT = torch.zeros_like(student_tail_RT)  # nothing is left, but for rounding
    return ranks_RT + (student_tail_RT - teacher_tail_RT).abs()


@dataclass(frozen=True)
class ULD:
    """temperature * sum over ranks of |p_student - p_teacher| (Boizard et al. 2024, Towards Cross-Tokenizer
    Distillation): the Wasserstein distance where all pairs of tokens are equally far apart. No nats, but 0 to
    2 * temperature.

    Which token is meant is not looked at, so any vocabulary may teach any other. Both distributions are at
    `temperature`; a gradient of probabilities falls with 1 / temperature, which the factor undoes.
    """

    temperature: Annotated[float, Field(gt=0)]
    needs: ClassVar[frozenset[str]] = frozenset({"top_k"})
    reads_ids: ClassVar[bool] = False

    def __call__(
        self, *, student_logits_RTV: Tensor, labels_RT: Tensor, teacher_log_probs_RTK: Tensor, **_: Tensor
    ) -> Tensor:
        distance = sorted_distance(
            student_probs_RTV=(wide(student_logits_RTV) / self.temperature).softmax(dim=-1),
            teacher_log_probs_RTK=teacher_log_probs_RTK.detach(),
        )
        return distance.masked_fill(labels_RT == IGNORE, 0.0) * self.temperature
