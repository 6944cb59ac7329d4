"""Cross-entropy with labels that leave some mass to every token: the control for distillation from soft targets."""

# R rows, T target tokens, V vocabulary

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from needle.loss.base import IGNORE
from needle.loss.buckets import LOG_ZERO, wide


@dataclass(frozen=True)
class LabelSmoothing:
    """(1 - smoothing_frac) * -log q(label) + smoothing_frac * mean over V of -log q, in nats (Szegedy et al. 2016), q
    the student.

    That is the cross-entropy with a teacher who knows nothing but the label: what soft targets give beyond it comes
    from the teacher (Yuan et al. 2020). Its least value is the smoothed label's entropy, not 0. The mean is over
    log-probabilities, so those of a copy head, near -69 where neither vocabulary nor source has a token, are paid in
    full: smoothing_frac * 69 nats at the start is expected. Below e^-10000, at masked tokens, the penalty is constant
    and gives no gradient. No temperature. Memory: two float copies of the logits.
    """

    smoothing_frac: Annotated[float, Field(ge=0, lt=1)]
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __call__(self, *, student_logits_RTV: Tensor, labels_RT: Tensor, **_: Tensor) -> Tensor:
        log_probs = wide(student_logits_RTV).log_softmax(dim=-1).clamp_min(LOG_ZERO)
        label = log_probs.gather(-1, labels_RT.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        nats = -(1 - self.smoothing_frac) * label - self.smoothing_frac * log_probs.mean(dim=-1)
        return nats.masked_fill(labels_RT == IGNORE, 0.0)
