"""Divergences between a teacher's next-token distribution, stored as top-k log-probabilities, and the student's."""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from needle.loss.base import IGNORE

TAIL_FLOOR = 1e-7  # float32 cannot tell 1 - sum of probabilities from 0 below this


def log_tail(log_probs_RTK: Tensor) -> Tensor:
    """log(1 - sum over K of p), [R, T]: the mass of all tokens that are not stored, floored at log(1e-7)."""
    return (1 - log_probs_RTK.exp().sum(dim=-1)).clamp_min(TAIL_FLOOR).log()


def forward_kl_topk(*, student_log_probs_RTV: Tensor, teacher_ids_RTK: Tensor, teacher_log_probs_RTK: Tensor) -> Tensor:
    """Forward KL over K + 1 buckets: sum over k of p_teacher * log(p_teacher / p_student) plus the same for the tail.

    In nats, [R, T], at least 0 and at most the full divergence, which it meets at K = V. Renormalising the stored
    tokens instead would ask the student to put no mass elsewhere; the tail bucket asks for the teacher's amount.
    The vocabulary is gathered, not copied: memory is [R, T, K].
    """
    student_log_probs_RTK = student_log_probs_RTV.gather(-1, teacher_ids_RTK)
    teacher = torch.cat((teacher_log_probs_RTK, log_tail(teacher_log_probs_RTK).unsqueeze(-1)), dim=-1)
    student = torch.cat((student_log_probs_RTK, log_tail(student_log_probs_RTK).unsqueeze(-1)), dim=-1)
    probabilities = teacher.exp()
    # A stored probability of exactly 0 is log -inf; 0 * log 0 is 0 by the divergence's definition.
    terms = torch.where(probabilities > 0, probabilities * (teacher.clamp_min(-1e4) - student.clamp_min(-1e4)), 0.0)
    return terms.sum(dim=-1)


@dataclass(frozen=True)
class ForwardKL:
    """temperature^2 * KL(p_teacher || p_student) (Hinton et al. 2015), in nats.

    Both distributions are at `temperature`; the factor keeps the gradient's size when it changes. The teacher's must
    have been stored at that temperature, since a truncated distribution cannot be re-tempered.
    """

    temperature: Annotated[float, Field(gt=0)]
    needs: ClassVar[frozenset[str]] = frozenset({"top_k"})

    def __call__(
        self,
        *,
        student_logits_RTV: Tensor,
        labels_RT: Tensor,
        teacher_ids_RTK: Tensor,
        teacher_log_probs_RTK: Tensor,
        **_: Tensor,
    ) -> Tensor:
        divergence = forward_kl_topk(
            student_log_probs_RTV=(student_logits_RTV.float() / self.temperature).log_softmax(dim=-1),
            teacher_ids_RTK=teacher_ids_RTK,
            teacher_log_probs_RTK=teacher_log_probs_RTK,
        )
        return divergence.masked_fill(labels_RT == IGNORE, 0.0) * self.temperature**2
