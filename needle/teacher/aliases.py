"""Names of functions that a provider accepts, in place of ours, and the way back."""

import re
from collections.abc import Iterable, Iterator
from itertools import count


class Aliases:
    """A legal name for each of `names`: one to one, and the same for the same names in the same order.

    A name that is legal already keeps itself. Of any other, characters that are not legal become `_`, and where that
    is taken or still illegal a number or a leading `f_` tells it apart.
    """

    def __init__(self, names: Iterable[str], *, legal: re.Pattern[str], max_length: int):
        """`legal` is matched against a whole name of at most `max_length` characters; it must accept letters, digits
        and `_` after a letter.

        Raises:
            ValueError: a name stands twice.
        """
        self._legal, self._max_length = legal, max_length
        ours = list(names)
        twice = next((name for i, name in enumerate(ours) if name in ours[:i]), None)
        if twice is not None:
            raise ValueError(f"two tools are named {twice!r}: rename one, an answer could not tell them apart")
        self._alias_of = {name: name for name in ours if self._is_legal(name)}
        taken = set(self._alias_of)
        for name in ours:
            if name not in self._alias_of:
                alias = next(candidate for candidate in self._candidates(name) if candidate not in taken)
                taken.add(alias)
                self._alias_of[name] = alias
        self._name_of = {alias: name for name, alias in self._alias_of.items()}

    def to_legal(self, name: str) -> str:
        """Raises KeyError for a name that was not given."""
        return self._alias_of[name]

    def to_original(self, alias: str) -> str:
        """Ours, or the argument itself where it is no alias: a model may make up a name, or write ours."""
        return self._name_of.get(alias, alias)

    def _is_legal(self, name: str) -> bool:
        return len(name) <= self._max_length and self._legal.fullmatch(name) is not None

    def _candidates(self, name: str) -> Iterator[str]:
        stem = "".join(char if self._legal.fullmatch("a" + char) else "_" for char in name)
        if not self._legal.fullmatch(stem):
            stem = f"f_{stem}"
        yield stem[: self._max_length]
        for number in count(2):
            suffix = f"_{number}"
            yield stem[: self._max_length - len(suffix)] + suffix
