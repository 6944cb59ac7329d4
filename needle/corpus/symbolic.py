"""Symbolic examples: invented tools under opaque names, and requests that name one and quote its values.

No word of them means anything, so the only way to answer is to find in the prompt what the request names and to copy
what it quotes, the circuit that forms slowly in small students (induction heads: Olsson et al. 2022). They are made of
syllables from a seed alone: no recorded request, tool or value has a part in them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from needle.corpus.mix import generator
from needle.schema import Example, Tool, ToolCall, kind_of_calls

DOMAIN = "symbolic"
PARAMETERS_MAX = 3
NONE_FRAC = 0.1  # of the requests: none of the shown tools serves them
CALLS_FRAC = (0.7, 0.2, 0.1)  # of the others: they want one call, two, three
_CONSONANTS, _VOWELS = list("bdfgklmnprstvz"), list("aeiou")
_NAME_STYLES = ("{0}", "{0}_{1}", "{0}{3}", "{0}-{1}", "{0}_{2}", "fn_{2}", "{0}.{1}")
# {0}: what names the tool, {1}: its arguments as the request puts them.
_CALL_FORMS = ("use {0} with {1}", "run {0}: {1}", "{0}, {1}", "please {0} for {1}", "call {0} and give it {1}")
_BARE_FORMS = ("use {0}", "run {0} now", "{0} please", "call {0}")
# {0}: a parameter, {1}: its value.
_ARGUMENT_FORMS = ("{0} {1}", "{0} = {1}", "{0}: {1}", "{1} as {0}", '{0} "{1}"', "set {0} to {1}")
_DESCRIPTIONS = ("Does {0}.", "For {0}.", "The one for {0}.", "Takes care of {0}.")
_JOINTS = (", then ", " and then ", "; ", ". after that ")


@dataclass(frozen=True)
class _Invented:
    """A tool and the word of its description that a request may name it by."""

    tool: Tool
    keyword: str


class _Words:
    """Syllables joined to words, none of them twice in one example."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.taken = rng, set[str]()

    def word(self) -> str:
        while True:
            syllables = int(self.rng.integers(2, 4))
            new = "".join(_pick(_CONSONANTS, self.rng) + _pick(_VOWELS, self.rng) for _ in range(syllables))
            new += _pick(_CONSONANTS, self.rng) if self.rng.random() < 0.4 else ""
            if new not in self.taken:
                self.taken.add(new)
                return new

    def name(self) -> str:
        while True:
            first, second, number = self.word(), self.word(), int(self.rng.integers(10, 1000))
            new = _pick(_NAME_STYLES, self.rng).format(first, second, number, second.capitalize())
            if new not in self.taken or new == first:
                self.taken.add(new)
                return new


def symbolic_examples(numbers: range, *, tools_max: int, seed: int) -> Iterator[Example]:
    """The examples of these numbers; number n depends on (seed, n) and `tools_max` only.

    Each shows 1 to `tools_max` tools, the called ones among them.
    """
    for number in numbers:
        yield _example(generator(seed, DOMAIN, number), tools_max=tools_max, number=number)


def _example(rng: np.random.Generator, *, tools_max: int, number: int) -> Example:
    words = _Words(rng)
    shown = [_invent(words) for _ in range(int(rng.integers(1, tools_max + 1)))]
    by_keyword = bool(rng.random() < 0.5)
    if rng.random() < NONE_FRAC:
        wanted, calls = [_invent(words)], []
    else:
        wanted = [_pick(shown, rng) for _ in range(int(rng.choice([1, 2, 3], p=CALLS_FRAC)))]
        calls = wanted
    parts, answer = [], []
    for invented in wanted:
        arguments = _arguments(invented.tool, words)
        parts.append(_request(invented, arguments, by_keyword=by_keyword, rng=rng))
        answer.append(ToolCall(invented.tool.name, arguments))
    query = parts[0] + "".join(_pick(_JOINTS, rng) + part for part in parts[1:])
    kept = tuple(answer) if calls else ()
    return Example(
        id=f"{DOMAIN}-{number}",
        query=query,
        tools=tuple(invented.tool for invented in shown),
        calls=kept,
        kind=kind_of_calls(kept),
        domain=DOMAIN,
        source=DOMAIN,
        teacher=DOMAIN,
        split="train",
    )


def _invent(words: _Words) -> _Invented:
    rng = words.rng
    properties = {words.word(): _schema(words) for _ in range(int(rng.integers(0, PARAMETERS_MAX + 1)))}
    required = [key for key in properties if rng.random() < 0.7]
    keyword = words.word()
    description = _pick(_DESCRIPTIONS, rng).format(keyword)
    parameters = {"type": "object", "properties": properties, "required": required}
    return _Invented(Tool(words.name(), description, parameters), keyword)


def _schema(words: _Words) -> dict[str, Any]:
    kind = words.rng.choice(["string", "integer", "enum"], p=[0.6, 0.25, 0.15])
    if kind == "enum":
        return {"type": "string", "enum": [words.word() for _ in range(int(words.rng.integers(2, 5)))]}
    return {"type": str(kind)}


def _arguments(tool: Tool, words: _Words) -> dict[str, Any]:
    """Every required parameter and some of the optional ones."""
    given = [key for key in tool.properties if key in tool.required or words.rng.random() < 0.5]
    return {key: _value(tool.properties[key], words) for key in given}


def _value(schema: dict[str, Any], words: _Words) -> Any:
    rng = words.rng
    if "enum" in schema:
        return _pick(schema["enum"], rng)
    if schema["type"] == "integer":
        return int(rng.integers(1, 10 ** int(rng.integers(1, 5))))
    return " ".join(words.word() for _ in range(int(rng.integers(1, 4))))


def _request(invented: _Invented, arguments: dict[str, Any], *, by_keyword: bool, rng: np.random.Generator) -> str:
    named = invented.keyword if by_keyword else invented.tool.name
    if not arguments:
        return _pick(_BARE_FORMS, rng).format(named)
    form = _pick(_ARGUMENT_FORMS, rng)
    # A single value may stand alone: there is one place only where it can go.
    form = "{1}" if len(invented.tool.properties) == 1 and rng.random() < 0.5 else form
    keys = [list(arguments)[i] for i in rng.permutation(len(arguments))]
    listed = [form.format(key, arguments[key]) for key in keys]
    joined = ", ".join(listed[:-1]) + (" and " if len(listed) > 1 else "") + listed[-1]
    return _pick(_CALL_FORMS, rng).format(named, joined)


def _pick(options: Sequence[Any], rng: np.random.Generator) -> Any:
    return options[int(rng.integers(len(options)))]
