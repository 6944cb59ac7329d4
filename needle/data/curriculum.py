"""Curricula: which training examples a student sees early, and which share of them is symbolic.

A curriculum is a list of phases, counted in optimizer steps, one batch a step. A phase draws from a part of the train
split (few tools, short prompts: Bengio et al. 2009) and mixes in symbolic examples (needle.corpus.symbolic), which
nothing but copying solves. After the last phase the whole train split follows, until the run ends.
"""

# N examples

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from needle.data.shards import Shard
from needle.errors import ConfigError

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Phase:
    """`frac`: of the curriculum's steps. `symbolic_frac`: share of the examples that are symbolic, kept to one
    example over every packed window and so nearly over every batch. `tools_max`, `source_tokens_max`: only training
    examples that show at most so many tools, whose prompt has at most so many tokens; null: all. They do not choose
    among the symbolic examples, which show as many tools as training examples do."""

    frac: Annotated[float, Field(gt=0, le=1)]
    symbolic_frac: Annotated[float, Field(ge=0, le=1)]
    tools_max: Count | None
    source_tokens_max: Count | None

    def __post_init__(self) -> None:
        # A share below that would need epochs of more examples than there are for one of them.
        if 0 < self.symbolic_frac < 0.01 or 0.99 < self.symbolic_frac < 1:
            raise ValueError(f"symbolic_frac={self.symbolic_frac}: it may be 0, 0.01 to 0.99, or 1")


@dataclass(frozen=True)
class Stretch:
    """A part of the stream that is drawn from one choice of examples.

    `batches`: how many it has; None: without end. `number`: 0 for the whole train split, the phases count from 1.
    `symbolic_N` are indices beyond the train split's.
    """

    number: int
    batches: int | None
    train_N: np.ndarray
    symbolic_N: np.ndarray
    symbolic_frac: float

    @staticmethod
    def whole(train: Shard) -> "Stretch":
        return Stretch(0, None, np.arange(len(train)), np.zeros(0, np.int64), 0.0)

    def generator(self, seed: int, epoch: int) -> np.random.Generator:
        return np.random.default_rng([seed, epoch, self.number] if self.number else [seed, epoch])

    def order(self, rng: np.random.Generator, *, seed: int, epoch: int) -> np.ndarray:
        """The examples of an epoch, in order. From one pool: each once. From two: as many as use up the pool that is
        sooner used up; the other one goes on from there in the next epoch."""
        if self.symbolic_frac in (0.0, 1.0):
            pool = self.symbolic_N if self.symbolic_frac else self.train_N
            return pool[rng.permutation(len(pool))]
        examples = self._examples_an_epoch()
        # Symbolic where the running share passes the next whole number: spread evenly, so in every window.
        is_symbolic = np.diff(np.floor(np.arange(examples + 1) * self.symbolic_frac + 1e-9)) > 0
        symbolic = int(is_symbolic.sum())
        order_N = np.empty(examples, np.int64)
        order_N[is_symbolic] = self._drawn(self.symbolic_N, epoch * symbolic, symbolic, seed, pool_number=1)
        train = examples - symbolic
        order_N[~is_symbolic] = self._drawn(self.train_N, epoch * train, train, seed, pool_number=2)
        return order_N

    def _examples_an_epoch(self) -> int:
        frac = self.symbolic_frac
        # At least one of each kind: a pool of a few examples is gone through more than once.
        least = max(np.ceil(1 / frac), np.ceil(1 / (1 - frac)))
        return int(max(least, min(len(self.train_N) / (1 - frac), len(self.symbolic_N) / frac)))

    def _drawn(self, pool: np.ndarray, start: int, count: int, seed: int, *, pool_number: int) -> np.ndarray:
        """`count` examples from position `start` of an endless sequence of permutations of the pool."""
        first, last = start // len(pool), (start + count - 1) // len(pool)
        # The pool's number stands last and is not 0: numpy takes [a, b] and [a, b, 0] for the same seed.
        keys = ([seed, turn, self.number, pool_number] for turn in range(first, last + 1))
        turns = np.concatenate([np.random.default_rng(key).permutation(len(pool)) for key in keys])
        offset = start - first * len(pool)
        return pool[turns[offset : offset + count]]


@dataclass(frozen=True)
class Curriculum:
    """`steps`: what the phases' fractions are of. It is settled when a run starts: continued to another length, a run
    keeps its phases where they were. `phases`: name -> Phase, in this order."""

    steps: Count
    phases: Mapping[str, Any]

    def __post_init__(self) -> None:
        whole = sum(phase.frac for phase in self.phases.values())
        if whole > 1 + 1e-9:
            raise ValueError(f"the phases' fractions add up to {whole:g}; they may reach 1 at most, lower one of them")

    @property
    def uses_symbolic(self) -> bool:
        return any(phase.symbolic_frac > 0 for phase in self.phases.values())

    def check(self, *, symbolic_examples: int) -> None:
        """Raises ConfigError when a phase wants symbolic examples of a data setting that has none."""
        for name, phase in self.phases.items():
            if phase.symbolic_frac > 0 and not symbolic_examples:
                raise ConfigError(
                    f"curriculum.phases.{name}.symbolic_frac={phase.symbolic_frac}: data.symbolic_examples=0, so there "
                    "are none; set data.symbolic_examples=20000 and run needle.prepare with it"
                )

    def batches(self) -> dict[str, int]:
        """How many each phase has: its end is rounded to the nearest step."""
        ends = np.cumsum([0.0, *(phase.frac for phase in self.phases.values())])
        steps = [round(float(end) * self.steps) for end in ends]
        return {name: after - before for name, before, after in zip(self.phases, steps, steps[1:], strict=False)}

    def stretches(self, train: Shard, symbolic: Shard | None) -> list[Stretch]:
        """The stream's parts in order; the last is the whole train split, without end.

        Raises:
            ConfigError: a phase chooses no example.
        """
        found = []
        counts = self.batches()
        beyond = np.arange(len(symbolic) if symbolic is not None else 0) + len(train)
        for number, (name, phase) in enumerate(self.phases.items(), 1):
            chosen = _chosen(train, phase)
            if phase.symbolic_frac < 1 and not len(chosen):
                raise ConfigError(_nothing_chosen(name, phase, train))
            if phase.symbolic_frac > 0 and not len(beyond):
                raise ConfigError(
                    f"curriculum.phases.{name}.symbolic_frac={phase.symbolic_frac}: these shards hold 0 symbolic "
                    "examples; prepare with data.symbolic_examples=20000"
                )
            found.append(Stretch(number, counts[name], chosen, beyond, phase.symbolic_frac))
        return [*found, Stretch.whole(train)]


def _chosen(train: Shard, phase: Phase) -> np.ndarray:
    fits = np.ones(len(train), bool)
    if phase.tools_max is not None:
        fits &= train.tools <= phase.tools_max
    if phase.source_tokens_max is not None:
        fits &= train.source_lengths_N <= phase.source_tokens_max
    return np.flatnonzero(fits)


def _nothing_chosen(name: str, phase: Phase, train: Shard) -> str:
    shortest, fewest = int(train.source_lengths_N.min()), int(train.tools.min())
    return (
        f"curriculum.phases.{name}: none of the {len(train):,} training examples shows at most "
        f"tools_max={phase.tools_max} tools in at most source_tokens_max={phase.source_tokens_max} tokens (the fewest "
        f"tools are {fewest}, the fewest tokens {shortest}); raise them, or leave one out with null"
    )
