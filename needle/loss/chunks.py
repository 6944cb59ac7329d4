"""Divergences over the whole vocabulary, a chunk of positions at a time.

A divergence written plainly holds the student's and the teacher's log-probabilities, their difference and its products
as [R, T, V] tensors until the backward pass. Here each chunk of labelled positions gives its nats and, by a graph of
its own that is then dropped, its gradient, which goes into the one buffer that the backward pass must return anyway.
Memory: student logits + teacher logits + that gradient + about ten copies of [chunk, V]. Positions that are ignored
cost nothing. Chunks of positions bound memory for any divergence, those that sort or normalise anew included; chunks of
the vocabulary would need a rule of merging for each.
"""

# R rows, T target tokens, V vocabulary, P positions (R * T), C positions of a chunk

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from needle.loss.base import IGNORE
from needle.loss.buckets import LOG_ZERO, wide

# (teacher_log_probs_CV=, student_log_probs_CV=, target_C=) -> nats [C]
Between = Callable[..., Tensor]


@torch.compiler.disable  # it walks over a number of positions that only the data know
def chunked(
    between: Between,
    *,
    student_logits_RTV: Tensor,
    teacher_logits_RTV: Tensor,
    labels_RT: Tensor,
    temperature: float,
    chunk_tokens: int | None,
) -> Tensor:
    """`between` of the two distributions at `temperature` at every labelled position, [R, T], 0 elsewhere.

    Differentiable once, by the student's logits. `chunk_tokens`: positions in a chunk; None: all in one.
    """
    walk = _Walk(between, temperature, chunk_tokens or max(1, labels_RT.numel()))
    with_gradient = torch.is_grad_enabled() and student_logits_RTV.requires_grad
    return _Chunked.apply(student_logits_RTV, teacher_logits_RTV.detach(), labels_RT, walk, with_gradient)


class _Walk:
    def __init__(self, between: Between, temperature: float, chunk_tokens: int):
        self.between, self.temperature, self.chunk_tokens = between, temperature, chunk_tokens

    def __call__(
        self, student_RTV: Tensor, teacher_RTV: Tensor, labels_RT: Tensor, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Nats [R, T], and their gradient [R, T, V] in the student's precision."""
        student_PV, teacher_PV, labels_P = student_RTV.flatten(0, 1), teacher_RTV.flatten(0, 1), labels_RT.flatten()
        nats_P = torch.zeros_like(labels_P, dtype=wide(student_RTV[:0]).dtype)
        gradient_PV = torch.zeros_like(student_PV) if with_gradient else None
        for place_C in (labels_P != IGNORE).nonzero().squeeze(-1).split(self.chunk_tokens):
            teacher_CV = wide(teacher_PV[place_C])  # a copy, which what follows may overwrite
            teacher_CV = teacher_CV.div_(self.temperature).log_softmax(dim=-1).clamp_min_(LOG_ZERO)
            with torch.set_grad_enabled(with_gradient):
                student_CV = wide(student_PV[place_C].detach()).requires_grad_(with_gradient)
                tempered_CV = student_CV if self.temperature == 1 else student_CV / self.temperature
                nats_C = self.between(
                    teacher_log_probs_XN=teacher_CV,
                    student_log_probs_XN=tempered_CV.log_softmax(dim=-1).clamp_min(LOG_ZERO),
                    target_X=labels_P[place_C],
                )
                if gradient_PV is not None:
                    (gradient_CV,) = torch.autograd.grad(nats_C.sum(), student_CV)
                    gradient_PV[place_C] = gradient_CV.to(gradient_PV.dtype)
            nats_P[place_C] = nats_C.detach()
        return nats_P.view_as(labels_RT), None if gradient_PV is None else gradient_PV.view_as(student_RTV)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, student: Tensor, teacher: Tensor, labels: Tensor, walk: _Walk, with_gradient: bool
    ) -> Tensor:
        nats, ctx.gradient = walk(student, teacher, labels, with_gradient=with_gradient)
        ctx.walk = walk
        ctx.save_for_backward(student, teacher, labels)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, nats_gradient_RT: Tensor) -> tuple[Any, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # a second pass over a retained graph: the first one gave the buffer away
            _, gradient = ctx.walk(*ctx.saved_tensors, with_gradient=True)
        return gradient.mul_(nats_gradient_RT.unsqueeze(-1)), None, None, None, None
