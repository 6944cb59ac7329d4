"""A truncated distribution as K + 1 buckets: the stored tokens one by one, all others together as the tail.

Every divergence here is at most the one over the whole vocabulary (the data-processing inequality) and meets it as K
grows. Renormalising the stored tokens instead would ask the student to put no mass elsewhere; the tail asks for the
teacher's amount. Memory: one float copy of the student's logits for a moment, the gradient, and K + 1 wide tensors.
"""

# R rows, T target tokens, V vocabulary, K stored teacher tokens, N = K + 1 buckets, X positions of any shape

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Stands for log 0, so that 0 * log 0 is 0 and nothing is infinite. A student's probability below it gets no gradient:
# only masks lie there (the copy head ends near -69).
LOG_ZERO = -1e4
# What a teacher's stored probabilities leave is known to a few roundings of its precision.
ROUNDINGS = 4


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def stored_tokens(teacher_log_probs_XK: Tensor) -> Tensor:
    """[X, K]: which of the stored tokens the teacher speaks of. One at -inf is no statement: it counts as tail."""
    return teacher_log_probs_XK > -torch.inf


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, without cancellation near 0 (Maechler 2012); at least the log of the rounding error
    of 1."""
    near = (-torch.expm1(x)).clamp_min(torch.finfo(x.dtype).eps).log()
    return torch.where(x > -0.6931, near, torch.log1p(-x.clamp_max(-0.6931).exp()))


def teacher_buckets(teacher_log_probs_XK: Tensor, *, vocabulary: int) -> Tensor:
    """The teacher's log-probabilities of the buckets, [X, N].

    The tail is 1 - sum over K of p. Where that is no more than rounding error, it is at most the least stored
    probability for each token that is not stored (those stored are the likeliest), and 0 where all are stored.
    """
    log_probs = wide(teacher_log_probs_XK.detach())
    stored = stored_tokens(log_probs)
    others = vocabulary - log_probs.shape[-1]
    if others <= 0:
        tail = torch.full_like(log_probs[..., 0], LOG_ZERO)
    else:
        tail = log1mexp(log_probs.logsumexp(dim=-1))
        bound = log_probs.masked_fill(~stored, torch.inf).amin(dim=-1) + math.log(others)
        noise = tail < math.log(ROUNDINGS * torch.finfo(tail.dtype).eps)
        tail = torch.where(noise, torch.minimum(tail, bound), tail)
    return torch.cat((log_probs, tail.unsqueeze(-1)), dim=-1).clamp_min(LOG_ZERO)


def student_buckets(
    student_logits_RTV: Tensor, *, teacher_ids_RTK: Tensor, stored_RTK: Tensor, temperature: float
) -> Tensor:
    """The student's log-probabilities of the same buckets, [R, T, N].

    The tail is a logsumexp over the tokens that are not stored, not a difference to 1: it is exact, gradient included,
    however small the student's tail becomes.
    """
    scores = _BucketScores.apply(student_logits_RTV, teacher_ids_RTK, stored_RTK, temperature)
    # Scores of -inf (masked logits, an empty tail) would give a gradient of nan.
    return scores.clamp_min(-1e30).log_softmax(dim=-1).clamp_min(LOG_ZERO)


def label_buckets(*, labels_RT: Tensor, teacher_ids_RTK: Tensor, stored_RTK: Tensor) -> Tensor:
    """The bucket that each label is in, [R, T]: K, the tail, where it is not stored."""
    found = (teacher_ids_RTK == labels_RT.unsqueeze(-1)) & stored_RTK
    return torch.where(found.any(dim=-1), found.int().argmax(dim=-1), found.shape[-1])


class _BucketScores(torch.autograd.Function):
    """Tempered logits of the stored tokens and the logsumexp of the others'. Written out so that neither direction
    holds a second copy of [R, T, V]: the backward pass makes the gradient in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits_RTV: Tensor, ids_RTK: Tensor, stored_RTK: Tensor, temperature: float):
        scaled = wide(logits_RTV) / temperature
        scores = scaled.gather(-1, ids_RTK).masked_fill(~stored_RTK, -torch.inf)
        others = _without(scaled, ids_RTK, stored_RTK)
        top = others.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(others.dtype).min)
        tail = top + others.sub_(top).exp_().sum(dim=-1, keepdim=True).log()
        ctx.save_for_backward(logits_RTV, ids_RTK, stored_RTK, tail)
        ctx.temperature = temperature
        return torch.cat((scores, tail), dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient_RTN: Tensor):
        logits, ids, stored, tail = ctx.saved_tensors
        gradient_RTN = gradient_RTN / ctx.temperature
        gradient = _without(wide(logits) / ctx.temperature, ids, stored)
        # exp(-inf) = 0 at the stored tokens; a tail without any mass is -inf itself.
        gradient.sub_(tail.clamp_min(torch.finfo(tail.dtype).min)).exp_().mul_(gradient_RTN[..., -1:])
        gradient.scatter_add_(-1, ids, gradient_RTN[..., :-1].masked_fill(~stored, 0.0))
        return gradient.to(logits.dtype), None, None, None


def _without(scaled_RTV: Tensor, ids_RTK: Tensor, stored_RTK: Tensor) -> Tensor:
    """In place, -inf at the stored tokens. An id that is stored and, as padding, also not stored is stored."""
    limit = torch.where(stored_RTK, -torch.inf, torch.inf).to(scaled_RTV.dtype)
    return scaled_RTV.scatter_reduce_(-1, ids_RTK, limit, "amin")
