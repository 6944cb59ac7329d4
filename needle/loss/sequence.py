"""Sequence-level distillation from several answers a teacher gave to one request."""

# R rows, T target tokens, V vocabulary

from dataclasses import dataclass
from typing import ClassVar

from needle.loss.hard_label import HardLabel


@dataclass(frozen=True)
class ExpectedCrossEntropy(HardLabel):
    """E over answers y of the teacher [-log q(y | x)], in nats, estimated from n samples a request.

    KL(p || q) over whole answers is E_p[-log q(y | x)] - H(p): with n samples y_i of p, of which the distinct ones have
    shares w_i (sum 1), the sum of w_i * CE_i, CE_i = sum over tokens of -log q(y_it | x, y_i<t), is an unbiased
    estimate of that KL up to the teacher's entropy, which no student changes. n = 1, or the one likeliest answer,
    is sequence-level distillation (Kim & Rush 2016); more samples also carry how sure the teacher is.

    Every distinct answer is packed as an example of its own, with w_i as answer_weights_RT at each of its tokens. Here
    is only -log q(label) at every token, as in HardLabel; `Weighting` multiplies it by w_i, and the mean over tokens is

        sum of w_i * CE_i / sum of w_i * tokens_i

    which weighs all requests by their expected length, as hard labels do. No temperature: the samples have the
    teacher's. Memory: one float copy of the logits.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"samples"})
