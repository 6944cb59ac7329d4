"""Other values in the same request: a copied span is exchanged in the request and in the answer alike."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from needle.schema import Example, ToolCall

MAX_WORDS = 5


class ValuePool:
    """String values of the train split by parameter name, each once, sorted."""

    def __init__(self, examples: Iterable[Example]):
        found: dict[str, set[str]] = defaultdict(set)
        for example in examples:
            for call in example.calls:
                for key, value in call.arguments.items():
                    if isinstance(value, str) and _span(example.query, value) and len(value.split()) <= MAX_WORDS:
                        found[key].add(value)
        self.by_key = {key: sorted(values) for key, values in found.items()}

    def draw(self, key: str, rng: np.random.Generator) -> str | None:
        values = self.by_key.get(key, [])
        return values[int(rng.integers(len(values)))] if len(values) > 1 else None


def swap_values(example: Example, *, rng: np.random.Generator, pool: ValuePool, probability: float) -> Example:
    """Exchanges each swappable value with `probability`.

    Swappable: a free string, or an integer in digits without bounds, that stands exactly once in the request as whole
    words, is the value of exactly one argument, and neither holds nor lies in another value's span.
    """
    if not probability or not example.calls:
        return example
    schemas = {tool.name: tool.properties for tool in example.tools}
    leaves = [(i, key, v) for i, call in enumerate(example.calls) for key, v in call.arguments.items()]
    texts = [text for call in example.calls for text in _texts(call.arguments)]
    query, calls = example.query, [dict(call.arguments) for call in example.calls]
    for i, key, value in leaves:
        if rng.random() >= probability or not _is_free(value, schemas[example.calls[i].name].get(key, {})):
            continue
        old = str(value)
        span = _span(query, old)
        if span is None or any(old in text or text in old for text in _others(texts, old)):
            continue
        new = pool.draw(key, rng) if isinstance(value, str) else _other_integer(value, rng)
        if new is None or str(new) == old or _occurs(query, str(new)) or any(str(new) in text for text in texts):
            continue
        query = query[: span[0]] + str(new) + query[span[1] :]
        calls[i][key] = new
        texts[texts.index(old)] = str(new)
    changed = tuple(ToolCall(call.name, arguments) for call, arguments in zip(example.calls, calls, strict=True))
    return example.replace(query=query, calls=changed)


def _is_free(value: Any, schema: dict[str, Any]) -> bool:
    if isinstance(value, bool) or "enum" in schema or "format" in schema or "pattern" in schema:
        return False
    if isinstance(value, int):
        return value > 0 and not {"minimum", "maximum"} & schema.keys()
    return isinstance(value, str)


def _other_integer(value: int, rng: np.random.Generator) -> int:
    """One with as many digits."""
    digits = len(str(value))
    return int(rng.integers(10 ** (digits - 1), 10**digits))


def _others(texts: list[str], one: str) -> list[str]:
    rest = list(texts)
    rest.remove(one)
    return rest


def _texts(value: Any) -> Iterable[str]:
    """Every leaf of the arguments as it would stand in a request."""
    if isinstance(value, dict):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _texts(child)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _occurs(query: str, text: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", query, re.IGNORECASE))


def _span(query: str, text: str) -> tuple[int, int] | None:
    """Where `text` stands in the request as whole words, if exactly once."""
    if not text:
        return None
    found = [m.span() for m in re.finditer(rf"(?<![\w.]){re.escape(text)}(?![\w]|[.,]\d)", query)]
    return found[0] if len(found) == 1 else None
