"""Weights of target tokens by what they are part of. They apply to every loss alike."""

# R rows, T target tokens

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from needle.loss.base import IGNORE
from needle.text.render import Span

Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class SpanWeighting:
    """A weight a span. The loss divides by the sum of weights, so their common scale does not matter."""

    structure: Weight
    name: Weight
    key: Weight
    value: Weight
    stop: Weight

    def __post_init__(self) -> None:
        if sum(vars(self).values()) == 0:
            raise ValueError("every span weight is 0: nothing would be learnt; give at least one span a weight above 0")

    def __call__(self, *, spans_RT: Tensor, labels_RT: Tensor) -> Tensor:
        """Weights [R, T], float32, 0 where the label is ignored."""
        weights = [getattr(self, span.name.lower()) for span in Span]
        table = torch.tensor(weights, dtype=torch.float32, device=spans_RT.device)
        return table[spans_RT].masked_fill(labels_RT == IGNORE, 0.0)
