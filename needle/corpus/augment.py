"""One recorded request becomes many training examples: other tools beside it, other values in it, other names for all.

Every function here is pure given its generator and keeps the example valid. Each transformation is a field of `Augment`
and is switched off by 0.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from needle.corpus.distractors import ToolPool, show_tools
from needle.corpus.noise import disturb
from needle.corpus.rename import rename
from needle.corpus.values import ValuePool, swap_values
from needle.schema import EMPTY_KINDS, Example

Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Augment:
    tools_max: Annotated[int, Field(ge=1, le=10)]
    few_tools_bias: Annotated[float, Field(ge=0)]
    hard_frac: Probability
    remove_gold: Probability
    no_tools: Probability
    swap_value: Probability
    rename_tools: Probability
    rename_parameters: Probability
    opaque_names: Probability
    drop_description: Probability
    drop_optional: Probability
    shuffle_parameters: Probability
    noise: Probability

    def __call__(
        self, example: Example, *, rng: np.random.Generator, tools: ToolPool | None, values: ValuePool
    ) -> Example:
        """A varied copy; its id is the original's. Without a pool of `tools` the example keeps those that it shows."""
        example = swap_values(example, rng=rng, pool=values, probability=self.swap_value)
        example = disturb(example, rng=rng, probability=self.noise)
        if example.calls and rng.random() < self.no_tools:
            return example.replace(tools=(), calls=(), kind="no_tools")
        if tools is not None:
            example = self._show(example, rng, tools)
        return rename(
            example,
            rng=rng,
            tools=self.rename_tools,
            parameters=self.rename_parameters,
            opaque=self.opaque_names,
            drop_description=self.drop_description,
            drop_optional=self.drop_optional,
            shuffle_parameters=self.shuffle_parameters,
        )

    def _show(self, example: Example, rng: np.random.Generator, tools: ToolPool) -> Example:
        removed = bool(example.calls) and rng.random() < self.remove_gold
        example = show_tools(
            example, rng=rng, pool=tools, count=self._count(rng), hard_frac=self.hard_frac, remove_gold=removed
        )
        if removed and example.kind not in EMPTY_KINDS:
            example = example.replace(calls=(), kind="near_miss" if example.tools else "no_tools")
        return example

    def _count(self, rng: np.random.Generator) -> int:
        """1 to tools_max; the larger `few_tools_bias`, the fewer (0: uniform)."""
        weights = np.arange(1, self.tools_max + 1, dtype=float) ** -self.few_tools_bias
        return int(rng.choice(self.tools_max, p=weights / weights.sum())) + 1
