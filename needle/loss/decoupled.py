"""Forward KL taken apart into the label against the rest, and the rest within itself (Zhao et al. 2022)."""

# X positions, N buckets or tokens

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from needle.loss.buckets import LOG_ZERO
from needle.loss.divergences import Divergence, kl

Factor = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class DecoupledKD(Divergence):
    """T^2 * (alpha * TCKD + beta * NCKD) (Zhao et al. 2022), the label y as target class:

        TCKD = KL([p(y), 1 - p(y)] || [q(y), 1 - q(y)])
        NCKD = KL(p without y, renormalised || q without y, renormalised)

    KL(p || q) = TCKD + (1 - p(y)) * NCKD: forward KL cares less for the rest the surer the teacher is of y; here it
    cares by a constant. Where p leaves nothing for the rest (one-hot) NCKD is 0.

    The tail is one more token of the rest; where y itself is not stored, the tail is the target class. Near a confident
    teacher the tail's share of the rest is known to rounding only (needle.loss.buckets). It converges as K grows, not
    always from below.
    """

    alpha: Factor
    beta: Factor

    def __post_init__(self) -> None:
        if self.alpha == self.beta == 0:
            raise ValueError("alpha=0 and beta=0: nothing would be learnt; give one of them a value above 0")

    def between(self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, target_X: Tensor, **_) -> Tensor:
        target_X1 = target_X.clamp_min(0).unsqueeze(-1)
        teacher_two, teacher_rest = _apart(teacher_log_probs_XN, target_X1)
        student_two, student_rest = _apart(student_log_probs_XN, target_X1)
        target_class = kl(teacher_two, student_two)
        # Between two rests of log 0 alone there is nothing to compare, and their softmax would be uniform.
        nothing = teacher_two[..., 1] < LOG_ZERO / 2
        others = kl(teacher_rest, student_rest).masked_fill(nothing, 0.0)
        return self.alpha * target_class + self.beta * others


def _apart(log_probs_XN: Tensor, target_X1: Tensor) -> tuple[Tensor, Tensor]:
    """log [p(y), 1 - p(y)], [X, 2], and the log of the rest renormalised, [X, N], LOG_ZERO at y."""
    rest = log_probs_XN.scatter(-1, target_X1, LOG_ZERO)
    mass = rest.logsumexp(dim=-1, keepdim=True)
    two = torch.cat((log_probs_XN.gather(-1, target_X1), mass), dim=-1).clamp_min(LOG_ZERO)
    return two, (rest - mass).scatter(-1, target_X1, LOG_ZERO)
