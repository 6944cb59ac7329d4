"""What a loss is: which teacher signals it needs, and its value at every target token."""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

IGNORE = -100


class LossTerms(NamedTuple):
    """A weighted sum in nats and the sum of the weights, apart, so that only the caller divides: accumulation over
    micro-batches, devices and packed rows then gives the same mean."""

    sum_nats: Tensor
    weight: Tensor


class Loss(Protocol):
    """A loss is called with keyword tensors only and returns nats [R, T], 0 where labels are ignored."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, *, student_logits_RTV: Tensor, labels_RT: Tensor, **signals: Tensor) -> Tensor: ...


def reduce(*, nats_RT: Tensor, weights_RT: Tensor) -> LossTerms:
    """`weights_RT` is 0 at padding."""
    return LossTerms((nats_RT * weights_RT).sum(), weights_RT.sum())
