"""How a coefficient moves while a student trains."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` between two points of the training, level before and after.

    linear: start + (end - start) * x. cosine: start + (end - start) * (1 - cos(pi x)) / 2, slow at both ends. constant:
    `start` throughout, which `end` must repeat. x is how far training is between `begin_frac` and `end_frac`.
    """

    shape: Literal["constant", "linear", "cosine"]
    start: Annotated[float, Field(ge=0)]
    end: Annotated[float, Field(ge=0)]
    begin_frac: Fraction
    end_frac: Fraction

    def __post_init__(self) -> None:
        if self.begin_frac > self.end_frac:
            raise ValueError(f"begin_frac={self.begin_frac} lies behind end_frac={self.end_frac}")
        if self.shape == "constant" and self.start != self.end:
            raise ValueError(
                f"shape=constant with start={self.start} and end={self.end}: set both alike, or choose linear or cosine"
            )

    def at(self, progress: float) -> float:
        """The value when `progress` (0 to 1) of the training is behind."""
        if self.begin_frac == self.end_frac:
            way = float(progress >= self.end_frac)
        else:
            way = min(1.0, max(0.0, (progress - self.begin_frac) / (self.end_frac - self.begin_frac)))
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.end - self.start) * way

    def is_always(self, value: float) -> bool:
        return self.start == self.end == value


@dataclass(frozen=True)
class Mixing(Schedule):
    """The share of the distillation loss; the rest is cross-entropy with the labels. It applies to losses over a
    teacher's distributions; a loss over labels alone is not mixed with itself."""

    start: Fraction
    end: Fraction
