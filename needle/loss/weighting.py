"""Weights of target tokens: by what they are part of, by their example, and by how hard the student finds them. They
apply to every loss alike."""

# R rows, T target tokens

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from needle.loss.base import IGNORE
from needle.schema import KINDS
from needle.text.render import Span

Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Weighting:
    """weight = span's * kind's * confidence^confidence_power * the answer's share among the teacher's samples.

    The loss is divided by the sum of these weights over the batch, so their common scale does not matter and the
    expected loss is the same however examples are packed, padded or split into micro-batches.

    `confidence` is how far the answer is trusted, 0 to 1: needle.corpus.answers (1 where nothing is known). With
    `focal_gamma` above 0 a token's loss is multiplied by (1 - p_student(label))^gamma (Lin et al. 2017), which is taken
    as a constant by the gradient and does not enter the divisor: tokens that are learnt fade out.
    """

    structure: Weight
    name: Weight
    key: Weight
    value: Weight
    stop: Weight
    kinds: Mapping[str, Weight]
    confidence_power: Annotated[float, Field(ge=0)]
    focal_gamma: Annotated[float, Field(ge=0)]

    def __post_init__(self) -> None:
        if sum(self._spans()) == 0:
            raise ValueError("every span weight is 0: nothing would be learnt; give at least one span a weight above 0")
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"kinds.{unknown[0]}: there is no such kind of example; they are {', '.join(KINDS)}")
        if all(self.kinds.get(kind) == 0 for kind in KINDS):
            raise ValueError("every kind's weight is 0: nothing would be learnt")

    def __call__(
        self,
        *,
        spans_RT: Tensor,
        labels_RT: Tensor,
        kinds_RT: Tensor,
        confidences_RT: Tensor,
        answer_weights_RT: Tensor,
        **_: Tensor,
    ) -> Tensor:
        """Weights [R, T], float32, 0 where the label is ignored."""
        weights = self._table(self._spans(), spans_RT) * answer_weights_RT
        if self.kinds:
            weights = weights * self._table([self.kinds.get(kind, 1.0) for kind in KINDS], kinds_RT)
        if self.confidence_power:
            weights = weights * confidences_RT**self.confidence_power
        return weights.masked_fill(labels_RT == IGNORE, 0.0)

    def focus(self, *, label_nats_RT: Tensor) -> Tensor | None:
        """The focal factor [R, T] from -log p_student(label); None without one."""
        if not self.focal_gamma:
            return None
        return (1 - (-label_nats_RT.detach()).exp()).clamp_min(0.0) ** self.focal_gamma

    def _spans(self) -> list[float]:
        return [getattr(self, span.name.lower()) for span in Span]

    def _table(self, weights: list[float], numbers_RT: Tensor) -> Tensor:
        return torch.tensor(weights, dtype=torch.float32, device=numbers_RT.device)[numbers_RT]
