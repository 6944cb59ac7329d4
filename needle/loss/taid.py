"""Distillation from a teacher that starts as the student and moves to the real one as training goes (Shing et al.
2025)."""

# X positions, N buckets or tokens

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from needle.loss.divergences import Divergence, kl
from needle.loss.schedule import Fraction


@dataclass(frozen=True, kw_only=True)
class TAID(Divergence):
    """T^2 * KL(p_t || q), p_t = softmax((1 - t) * logits of q, held constant, + t * logits of p), both at temperature T
    (Temporally Adaptive Interpolated Distillation, Shing et al. 2025).

    t goes up from `t_start` to `t_end`. After a step whose mean was J, with J' that of the step before:

        m <- beta_momentum * m + (1 - beta_momentum) * (J' - J) / J'
        t <- min(t_end, max(t_linear, t + alpha * sigmoid(m) * (1 - t)))

    so that t hurries while the loss falls, and never lies below t_linear = t_start + (t_end - t_start) * progress. The
    state is [t, m, J'], J' infinite before the first step. The gradient is that of forward KL to the fixed p_t.

    The tail is one more token: p_t takes the geometric mean of the two tails' masses, not the sum of the tokens' means.
    It converges as K grows, not always from below. The value is no measure of fit: its target moves.
    """

    t_start: Fraction
    t_end: Fraction
    alpha: Annotated[float, Field(ge=0, le=1)]
    beta_momentum: Annotated[float, Field(ge=0, lt=1)]

    def __post_init__(self) -> None:
        if self.t_start > self.t_end:
            raise ValueError(f"t_start={self.t_start} is above t_end={self.t_end}; the target moves to the teacher")

    def initial_state(self) -> Tensor:
        return torch.tensor([self.t_start, 0.0, torch.inf])

    def next_state(self, state: Tensor, *, mean_nats: Tensor, progress: float) -> Tensor:
        """A mean that is not a number (a batch without labels) changes nothing but t_linear."""
        t, momentum, before = state.unbind()
        mean = mean_nats.detach().to(state)
        # A first step has nothing to compare with, and moves t by the linear schedule alone.
        compares = before.isfinite() & mean.isfinite()
        fall = torch.where(compares, (before - mean) / before.clamp_min(1e-12), 0.0)
        momentum = torch.where(compares, self.beta_momentum * momentum + (1 - self.beta_momentum) * fall, momentum)
        hurry = torch.where(compares, self.alpha * momentum.sigmoid() * (1 - t), 0.0)
        t = (t + hurry).clamp_min(self._linear(progress)).clamp_max(self.t_end)
        return torch.stack((t, momentum, torch.where(mean.isfinite(), mean, before)))

    def between(
        self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, state: Tensor, progress: Tensor, **_
    ) -> Tensor:
        t = torch.maximum(state[0], self._linear(progress.to(state))).to(student_log_probs_XN)
        mixed = (1 - t) * student_log_probs_XN.detach() + t * teacher_log_probs_XN
        return kl(mixed.log_softmax(dim=-1), student_log_probs_XN)

    def _linear(self, progress):
        return self.t_start + (self.t_end - self.t_start) * progress
