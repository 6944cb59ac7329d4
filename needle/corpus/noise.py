"""Spoken and typed noise around the values of a request; no word of a value is touched."""

import re
from typing import Any

import numpy as np

from needle.schema import Example

_FILLERS = ("um", "uh", "er", "like", "well", "so")
_BEFORE = ("hey", "please", "could you", "can you please", "ok so", "hi,", "quick one:", "when you get a chance,")
_AFTER = ("please", "thanks", "thank you", "if you can", "asap", "cheers")


def disturb(example: Example, *, rng: np.random.Generator, probability: float) -> Example:
    """One kind of noise with `probability`: politeness, fillers, a typing slip, lost punctuation."""
    if not probability or rng.random() >= probability:
        return example
    kept = _protected(example)
    words = example.query.split()
    free = [i for i, word in enumerate(words) if not _bare(word) & kept]
    kind = int(rng.integers(4))
    if kind == 0 or not free:
        before = rng.random() < 0.5
        phrases = _BEFORE if before else _AFTER
        phrase = phrases[int(rng.integers(len(phrases)))]
        words = [phrase, *words] if before else [*words, phrase]
    elif kind == 1:
        at = free[int(rng.integers(len(free)))]
        # Before a free word whose predecessor is free too, so that no value is torn apart.
        if at == 0 or at - 1 in free:
            words.insert(at, _FILLERS[int(rng.integers(len(_FILLERS)))])
    elif kind == 2:
        at = free[int(rng.integers(len(free)))]
        words[at] = _slip(words[at], rng)
    else:
        words[-1] = words[-1].rstrip(".!?") if len(words) - 1 in free and words[-1].rstrip(".!?") else words[-1]
        words[0] = words[0].lower() if 0 in free else words[0]
    return example.replace(query=" ".join(words))


def _slip(word: str, rng: np.random.Generator) -> str:
    if len(word) < 4 or not word.isalpha():
        return word
    at = int(rng.integers(1, len(word) - 2))
    kind = int(rng.integers(3))
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :] if kind == 1 else word[:at] + word[at] + word[at:]


def _bare(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _protected(example: Example) -> set[str]:
    """Every word of every value: where one of them stands, the request stays as it is."""
    words: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            for child in value.values():
                visit(child)
        elif isinstance(value, (list, tuple)):
            for child in value:
                visit(child)
        else:
            words.update(_bare(str(value)))

    for call in example.calls:
        visit(dict(call.arguments))
    return words
