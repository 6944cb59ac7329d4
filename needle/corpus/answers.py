"""A teacher's several answers to one request as training examples: which can be used, and how they are varied together.

answers.jsonl of a corpus (see needle.generate) has a line for each request with more to tell than its calls:
`{"id", "weight", "answers": [{"calls", "weight"}]}`. The line's weight is the share of a judge's samples that agree
with the recorded answer (1 without a judge), an answer's is its share of the teacher's own samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from needle.corpus.augment import Augment
from needle.corpus.distractors import ToolPool
from needle.corpus.labelling import WeightedAnswer, kind_of_answer, same_answer, shown_tools
from needle.corpus.values import ValuePool, swap_values
from needle.errors import DataError
from needle.schema import BadLine, Example, Tool, ToolCall, read_lines

# Counts changes of what a line of answers.jsonl does to a training example; part of the address of such shards.
ANSWERS_VERSION = 2


@dataclass(frozen=True)
class Told:
    """What a line of answers.jsonl says of an example."""

    confidence: float
    answers: tuple[WeightedAnswer, ...]


class Weighed(NamedTuple):
    """A training example, the share of its answer among the request's, and how far the teacher is trusted."""

    example: Example
    answer_weight: float
    confidence: float


def read_answers(path: Path) -> dict[str, Told]:
    """By example id; empty where the corpus has no such file.

    Raises:
        DataError: a line cannot be read, or a weight is none.
    """
    if not path.is_file():
        return {}
    found: dict[str, Told] = {}
    for number, line in read_lines(path):
        if isinstance(line, BadLine):
            raise DataError(f"{path}, line {number}: {line.reason}; run needle.generate again")
        try:
            answers = tuple(_answer(record) for record in line["answers"])
            found[line["id"]] = Told(_weight(line["weight"], least=0.0), answers)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: {error!r}; run needle.generate again") from error
    return found


def _answer(record: Mapping[str, Any]) -> WeightedAnswer:
    calls = tuple(ToolCall.from_dict(call) for call in record["calls"])
    return WeightedAnswer(calls, _weight(record["weight"], least=1e-6))


def _weight(value: Any, *, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1 + 1e-6:
        raise ValueError(f"weight {value!r} is not a number from {least:g} to 1")
    return min(1.0, float(value))


def recorded(example: Example, told: Told | None) -> Weighed:
    """The recorded answer alone, trusted as far as the judge does times its share among the teacher's samples."""
    if told is None:
        return Weighed(example, 1.0, 1.0)
    if not told.answers:
        return Weighed(example, 1.0, told.confidence)
    own = same_answer(example.calls)
    share = sum(answer.weight for answer in told.answers if same_answer(answer.calls) == own)
    return Weighed(example, 1.0, told.confidence * min(1.0, share))


def usable(example: Example, told: Told | None, tools: Mapping[str, Sequence[Tool]]) -> list[Weighed]:
    """An example for each answer that breaks no schema of the tools that the teacher saw, all of them showing the tools
    that any of them calls; their weights add up to 1. The recorded example alone where fewer than two are valid. How
    often the teacher gave an answer is its weight, and so no part of its confidence.

    `tools`: of each domain, among which the teacher chose.
    """
    shown = shown_tools(example, tools)
    valid = []
    for answer in told.answers if told is not None else ():
        kind = kind_of_answer(example.kind, answer.calls)
        one = example.replace(tools=shown, calls=answer.calls, kind=kind)
        if not one.problems():
            valid.append((one, answer.weight))
    confidence = told.confidence if told is not None else 1.0
    if len(valid) < 2:
        return [Weighed(example, 1.0, confidence)]
    if example.domain in tools:
        called = {call.name for one, _ in valid for call in one.calls}
        shown = tuple(tool for tool in shown if tool.name in called)
    total = sum(weight for _, weight in valid)
    return [Weighed(one.replace(tools=shown), weight / total, confidence) for one, weight in valid]


def vary_together(
    answers: Sequence[Weighed], *, augment: Augment, rng: np.random.Generator, tools: ToolPool | None, values: ValuePool
) -> list[Weighed]:
    """Varied copies of a request's answers that show the same tools for the same words.

    Every answer's calls are put into one example, varied as one, and taken apart again; only values are exchanged
    before, since the same value stands in several answers. Answers that a variation makes equal (no tool is left to
    call) become one.
    """
    if len(answers) == 1:
        only = answers[0]
        return [only._replace(example=augment(only.example, rng=rng, tools=tools, values=values))]
    swapped = _swap_together([one.example for one in answers], rng=rng, values=values, probability=augment.swap_value)
    together = tuple(call for one in swapped for call in one.calls)
    first = swapped[0]
    whole = first.replace(calls=together, kind=kind_of_answer(first.kind, together))
    varied = replace(augment, swap_value=0.0)(whole, rng=rng, tools=tools, values=values)
    if len(varied.calls) != len(together):  # the right tools are not shown: nothing can be called
        return [Weighed(varied, sum(one.answer_weight for one in answers), answers[0].confidence)]
    parts, start = [], 0
    for before, one in zip(swapped, answers, strict=True):
        calls = varied.calls[start : start + len(before.calls)]
        start += len(before.calls)
        example = varied.replace(calls=calls, kind=before.kind)
        parts.append(one._replace(example=example))
    return parts


def _swap_together(
    examples: Sequence[Example], *, rng: np.random.Generator, values: ValuePool, probability: float
) -> list[Example]:
    """Values exchanged in the request and in every answer that holds them; the examples as they are where an answer
    would not stand that.

    The first answer's values are exchanged as those of a single answer are, while values that only other answers hold
    stand beside them, so that none of their words is touched.
    """
    first, *others = examples
    own = _texts([call.arguments for call in first.calls])
    strange = [text for other in others for text in _texts([call.arguments for call in other.calls]) if text not in own]
    # A call that has no tool's parameters: what it holds is seen, but never exchanged.
    guard = ToolCall(first.calls[0].name, {"": strange}) if first.calls else None
    guarded = first.replace(calls=(*first.calls, guard)) if guard is not None else first
    changed = swap_values(guarded, rng=rng, pool=values, probability=probability)
    calls = changed.calls[: len(first.calls)]
    new = _exchanged(first.calls, calls)
    if not new:
        return list(examples)
    swapped = [first.replace(query=changed.query, calls=calls)]
    for other in others:
        replaced = tuple(ToolCall(call.name, _with(call.arguments, new)) for call in other.calls)
        swapped.append(other.replace(query=changed.query, calls=replaced))
    return list(examples) if any(one.problems() for one in swapped) else swapped


def _exchanged(before: Sequence[ToolCall], after: Sequence[ToolCall]) -> dict[str, Any]:
    """Text of an old value -> the new value. Only values that an answer holds once are exchanged."""
    pairs = zip(before, after, strict=True)
    changed = [(old.arguments[key], value) for old, new in pairs for key, value in new.arguments.items()]
    return {str(old): new for old, new in changed if old != new}


def _with(value: Any, new: Mapping[str, Any]) -> Any:
    """The same arguments with other values, each written as the old one was (text or number)."""
    if isinstance(value, Mapping):
        return {key: _with(child, new) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_with(child, new) for child in value]
    if value is None or isinstance(value, bool) or str(value) not in new:
        return value
    return str(new[str(value)]) if isinstance(value, str) else new[str(value)]


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for child in value.values() for text in _texts(child)]
    if isinstance(value, list | tuple):
        return [text for child in value for text in _texts(child)]
    return [] if value is None or isinstance(value, bool) else [str(value)]
