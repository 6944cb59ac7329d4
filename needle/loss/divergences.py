"""Divergences between a teacher's next-token distribution p and the student's q, in nats a target token.

`distribution: top_k` reads what needle.signals stored: K log-probabilities, compared over K + 1 buckets, the tail being
one (needle.loss.buckets). `distribution: full` reads the teacher's logits over the whole vocabulary, which its network
gives for every batch (needle.loss.chunks). What a class says of p and q holds for both: sums go over the tokens, or
over the buckets.

Temperature: p and q are both softmax(logits / temperature). Far above the logits' range a divergence with a second
derivative at p = q has gradients that shrink as 1 / T^2, one made of absolute differences as 1 / T. The value is
multiplied by T^2 or T accordingly (`gradient_power`), so that the gradient keeps its size (Hinton et al. 2015). A
truncated distribution cannot be tempered anew: it must have been stored at `temperature`.

Memory beside the student's logits. top_k: a float copy of them for a moment, their gradient, and tensors K + 1 wide.
full: the teacher's logits, the gradient, and about ten copies of [chunk_tokens, V].

conf/loss/ lists them all: a file a class.
"""

# R rows, T target tokens, V vocabulary, K stored teacher tokens, X positions, N buckets or tokens

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from needle.loss.base import IGNORE
from needle.loss.buckets import label_buckets, stored_tokens, student_buckets, teacher_buckets
from needle.loss.chunks import chunked

Inside = Annotated[float, Field(gt=0, lt=1)]


def kl(log_p_XN: Tensor, log_q_XN: Tensor) -> Tensor:
    """KL(p || q): sum of p * log(p / q), [X]. Both finite."""
    return (log_p_XN.exp() * (log_p_XN - log_q_XN)).sum(dim=-1)


def log_mixture(log_p_XN: Tensor, log_q_XN: Tensor, *, p_frac: float) -> Tensor:
    """log(p_frac * p + (1 - p_frac) * q)."""
    return torch.logaddexp(log_p_XN + math.log(p_frac), log_q_XN + math.log1p(-p_frac))


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What all have in common; a subclass says `between`. `chunk_tokens` is read by `distribution: full` alone."""

    temperature: Annotated[float, Field(gt=0)]
    distribution: Literal["top_k", "full"]
    chunk_tokens: Annotated[int, Field(ge=1)] | None
    gradient_power: ClassVar[int] = 2

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"top_k" if self.distribution == "top_k" else "full_logits"})

    def between(
        self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, target_X: Tensor, tail: bool, **_: Tensor
    ) -> Tensor:
        """Nats [X], before the factor for temperature, from log-probabilities of at least LOG_ZERO.

        Args:
            target_X: where among N the label is.
            tail: whether the last of N is the tail.
            _: signals of the whole batch: progress, and state where the loss has one.
        """
        raise NotImplementedError

    def __call__(self, *, student_logits_RTV: Tensor, labels_RT: Tensor, **signals: Tensor) -> Tensor:
        whole = {name: signals[name] for name in ("progress", "state") if name in signals}
        if self.distribution == "full":
            nats_RT = chunked(
                partial(self.between, tail=False, **whole),
                student_logits_RTV=student_logits_RTV,
                teacher_logits_RTV=signals["teacher_logits_RTV"],
                labels_RT=labels_RT,
                temperature=self.temperature,
                chunk_tokens=self.chunk_tokens,
            )
            return nats_RT * self.temperature**self.gradient_power
        ids_RTK, log_probs_RTK = signals["teacher_ids_RTK"], signals["teacher_log_probs_RTK"]
        stored = {"teacher_ids_RTK": ids_RTK, "stored_RTK": stored_tokens(log_probs_RTK)}
        nats_RT = self.between(
            teacher_log_probs_XN=teacher_buckets(log_probs_RTK, vocabulary=student_logits_RTV.shape[-1]),
            student_log_probs_XN=student_buckets(student_logits_RTV, temperature=self.temperature, **stored),
            target_X=label_buckets(labels_RT=labels_RT, **stored),
            tail=True,
            **whole,
        )
        return (nats_RT * self.temperature**self.gradient_power).masked_fill(labels_RT == IGNORE, 0.0)


class ForwardKL(Divergence):
    """T^2 * KL(p || q) = T^2 * sum p * log(p / q) (Hinton et al. 2015), p the teacher: mass-covering.

    The tail is one more token; a teacher's tail of 0 costs nothing.
    """

    def between(self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, **_) -> Tensor:
        return kl(teacher_log_probs_XN, student_log_probs_XN)


class ReverseKL(Divergence):
    """T^2 * KL(q || p) = T^2 * sum q * log(q / p) (Gu et al. 2024, token by token), q the student: mode-seeking.

    The tail is one more token. A teacher's probability of 0 counts as e^-10000, and its tail, unless all tokens are
    stored, as no less than the rounding error of 1: a confident teacher punishes a student's tail by at most 16 nats.
    """

    def between(self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, **_) -> Tensor:
        return kl(student_log_probs_XN, teacher_log_probs_XN)


class SymmetricKL(Divergence):
    """T^2 * (KL(p || q) + KL(q || p)) / 2: the mean of both directions, half of Jeffreys' J (Jeffreys 1946).

    The tail is one more token, with the limits of ReverseKL.
    """

    def between(self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, **_) -> Tensor:
        # (p - q) * (log p - log q): both sums at once.
        difference = teacher_log_probs_XN.exp() - student_log_probs_XN.exp()
        return 0.5 * (difference * (teacher_log_probs_XN - student_log_probs_XN)).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Divergence):
    """T^2 * (beta * KL(p || m) + (1 - beta) * KL(q || m)), m = beta * p + (1 - beta) * q (Agarwal et al. 2024, GKD).

    beta 0.5 is the symmetric divergence, at most log 2. Divided by beta it nears KL(p || q) as beta nears 0, divided
    by 1 - beta KL(q || p) as beta nears 1. The tail is one more token.
    """

    beta: Inside

    def between(self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, **_) -> Tensor:
        middle = log_mixture(teacher_log_probs_XN, student_log_probs_XN, p_frac=self.beta)
        return self.beta * kl(teacher_log_probs_XN, middle) + (1 - self.beta) * kl(student_log_probs_XN, middle)


@dataclass(frozen=True, kw_only=True)
class SkewForwardKL(Divergence):
    """T^2 * KL(p || alpha * p + (1 - alpha) * q) (Ko et al. 2024, DistiLLM): forward KL that is at most -log alpha,
    with bounded gradients where the student has no mass.

    Gradients are about (1 - alpha)^2 those of ForwardKL near p = q. The tail is one more token.
    """

    alpha: Inside

    def between(self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, **_) -> Tensor:
        mixed = log_mixture(teacher_log_probs_XN, student_log_probs_XN, p_frac=self.alpha)
        return kl(teacher_log_probs_XN, mixed)


@dataclass(frozen=True, kw_only=True)
class SkewReverseKL(Divergence):
    """T^2 * KL(q || (1 - alpha) * p + alpha * q) (Ko et al. 2024, DistiLLM): reverse KL that is at most -log alpha,
    whatever the teacher's zeros.

    Gradients are about (1 - alpha)^2 those of ReverseKL near p = q. The tail is one more token.
    """

    alpha: Inside

    def between(self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, **_) -> Tensor:
        mixed = log_mixture(teacher_log_probs_XN, student_log_probs_XN, p_frac=1 - self.alpha)
        return kl(student_log_probs_XN, mixed)


class TotalVariation(Divergence):
    """T * 1/2 * sum |p - q| (Wen et al. 2023), from 0 to T.

    The factor is T and not T^2: the derivative of |p - q| keeps its size as p nears q, so only d q / d logits, which
    is O(1 / T), shrinks. The tail is one more token.
    """

    gradient_power: ClassVar[int] = 1

    def between(self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, **_) -> Tensor:
        return 0.5 * (teacher_log_probs_XN.exp() - student_log_probs_XN.exp()).abs().sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Divergence):
    """T^2 * (h * KL(p || q) + t * KL(q || p)) / (h + t) (Wu et al. 2024).

    The teacher's head is the fewest of its likeliest tokens that hold at least `head_mass` (the paper: 0.5), the rest
    is its tail; h = sum over the head of |p - q|, t the same over the rest. Forward KL fits the head first, reverse KL
    the rest, and the one that lags gets the weight. The weights are constants for the gradient; where p = q both are
    1/2.

    The bucket of tokens that are not stored stands last: it belongs to the head only where the stored ones hold less
    than head_mass. Its |p - q| is of sums, at most the sum of the tokens', so t is a lower bound and the value no
    f-divergence: it converges as K grows, not always from below. Cost: a sort over N.
    """

    head_mass: Inside

    def between(self, *, teacher_log_probs_XN: Tensor, student_log_probs_XN: Tensor, tail: bool, **_) -> Tensor:
        forward_frac = self.forward_frac(
            teacher_XN=teacher_log_probs_XN.exp(), student_XN=student_log_probs_XN.detach().exp(), tail=tail
        )
        forward = kl(teacher_log_probs_XN, student_log_probs_XN)
        reverse = kl(student_log_probs_XN, teacher_log_probs_XN)
        return forward_frac * forward + (1 - forward_frac) * reverse

    def forward_frac(self, *, teacher_XN: Tensor, student_XN: Tensor, tail: bool) -> Tensor:
        """h / (h + t), [X]."""
        if tail:
            sorted_XK, order_XK = teacher_XN[..., :-1].sort(dim=-1, descending=True)
            last = torch.full_like(order_XK[..., :1], order_XK.shape[-1])
            sorted_XN = torch.cat((sorted_XK, teacher_XN[..., -1:]), dim=-1)
            order_XN = torch.cat((order_XK, last), dim=-1)
        else:
            sorted_XN, order_XN = teacher_XN.sort(dim=-1, descending=True)
        gaps_XN = (sorted_XN - student_XN.gather(-1, order_XN)).abs()
        # A token is in the head where those before it do not yet hold head_mass.
        head_XN = sorted_XN.cumsum(dim=-1) - sorted_XN < self.head_mass
        head, whole = (gaps_XN * head_XN).sum(dim=-1), gaps_XN.sum(dim=-1)
        tiny = torch.finfo(whole.dtype).tiny
        return (head + tiny) / (whole + 2 * tiny)
