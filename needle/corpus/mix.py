"""The training examples and the fixed evaluation suites of a data setting."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, product
from typing import TYPE_CHECKING

import numpy as np

from needle.corpus.answers import Told, Weighed, recorded, usable, vary_together
from needle.corpus.distractors import ToolPool, show_tools
from needle.corpus.values import ValuePool
from needle.schema import Example, Tool

if TYPE_CHECKING:
    from needle.data.settings import DataSettings


def generator(*parts: object) -> np.random.Generator:
    """A generator that depends on its parts only: examples do not change when others come or go."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


class Mixer:
    """Draws examples; `train` and `tools` are of the seen domains of the slice, `given` brings its own tools. `told`:
    what the teacher's samples say of `train`, by example id."""

    def __init__(
        self,
        settings: "DataSettings",
        *,
        train: Sequence[Example],
        tools: Mapping[str, Sequence[Tool]],
        given: Sequence[Example] = (),
        told: Mapping[str, Told] | None = None,
    ):
        self.settings = settings
        self.train, self.given = train, given
        self.seen = {d: t for d, t in tools.items() if d not in settings.split.unseen_domains}
        self.tools = ToolPool(self.seen) if self.seen else None
        self.values, self.given_values = ValuePool(train), ValuePool(given)
        self.told = told or {}
        self._usable: dict[str, list[Weighed]] = {}

    @property
    def count(self) -> int:
        """Of all copies."""
        return self.settings.copies_per_request * len(self.train) + self.settings.given_copies * len(self.given)

    def training(self, places: range | None = None) -> Iterator[Example]:
        """Every training example of `copies`."""
        return (one.example for answers in self.copies(places) for one in answers)

    def copies(self, places: range | None = None) -> Iterator[list[Weighed]]:
        """The answers to the copies of requests at these places of `range(count)`, or to all of them; copy k of a
        request depends on (seed, request, k). One answer, or with data.answers=all every one that the teacher gave:
        then for the same words and tools, weights adding up to 1."""
        places = range(self.count) if places is None else places
        train = product(range(self.settings.copies_per_request), self.train, [self.tools], [self.values])
        given = product(range(self.settings.given_copies), self.given, [None], [self.given_values])
        for copy, example, pool, values in islice(chain(train, given), places.start, places.stop, places.step):
            rng = generator(self.settings.seed, example.id, copy)
            tools = pool if pool is not None and has_pool(example, self.seen) else None
            varied = vary_together(
                self.answers(example), augment=self.settings.augment, rng=rng, tools=tools, values=values
            )
            for number, one in enumerate(varied):
                name = f"{example.id}-{copy}" + (f".{number}" if number else "")
                varied[number] = one._replace(example=one.example.replace(id=name, split="train"))
            yield varied

    def answers(self, example: Example) -> list[Weighed]:
        """What is learnt for a request, before it is varied."""
        told = self.told.get(example.id)
        if self.settings.answers == "all":
            if example.id not in self._usable:  # every copy asks, and schemas are slow to check
                self._usable[example.id] = usable(example, told, self.seen)
            return self._usable[example.id]
        return [recorded(example, told)]


def has_pool(example: Example, tools: Mapping[str, Sequence[Tool]]) -> bool:
    """Whether other tools may stand beside the example's own. Not where its domain has no list of tools (it came with
    its own), nor where it is about being shown none."""
    return example.domain in tools and example.kind != "no_tools"


def evaluation(
    examples: Sequence[Example], tools: Mapping[str, Sequence[Tool]], settings: "DataSettings"
) -> list[Example]:
    """Each request once, with distractors from `tools` and nothing else changed; the same for every student and
    seed."""
    pool = ToolPool(tools) if tools else None
    rule = settings.evaluation
    shown = []
    for example in examples:
        if pool is None or not has_pool(example, tools):
            shown.append(example)
            continue
        rng = generator("evaluation", example.id)
        count = int(rng.integers(rule.tools_min, rule.tools_max + 1))
        shown.append(show_tools(example, rng=rng, pool=pool, count=count, hard_frac=rule.hard_frac, remove_gold=False))
    return shown
