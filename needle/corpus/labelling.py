"""A teacher's answers to requests that exist: several samples of each, distinct ones weighted by how often they came.

The teacher is shown every tool of the request's domain, so that what it calls is its choice among near neighbours, not
a hint; the example keeps the called tools, as the recorded corpus does, and others join them when shards are prepared.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from needle.metrics.matching import call_key
from needle.schema import EMPTY_KINDS, BadLine, Example, Tool, ToolCall, kind_of_calls
from needle.teacher.base import AskedTeacher, TeacherCall
from needle.teacher.purchase import Answer

# Kinds that say how a request is put; its answer may have any number of calls.
MANNERS = frozenset({"implicit", "disfluent", "garbled"})


@dataclass(frozen=True)
class Label:
    """`requests`: a file or folder in `layout`, whose requests join none of the recorded ones; null: the recorded
    corpus's. `splits`: whose requests are labelled, of the recorded corpus. `limit`: so many of them, the first."""

    requests: str | None
    layout: str
    splits: tuple[Literal["train", "validation", "test", "unseen"], ...]
    samples: Annotated[int, Field(ge=1)]
    limit: Annotated[int, Field(ge=1)] | None


@dataclass(frozen=True)
class WeightedAnswer:
    """One distinct answer of a teacher to a request; `weight` is its share of the usable samples."""

    calls: tuple[ToolCall, ...]
    weight: float


def shown_tools(example: Example, tools: Mapping[str, Sequence[Tool]]) -> tuple[Tool, ...]:
    """What a teacher is shown for a request: its domain's tools, or those that came with it."""
    if example.kind == "no_tools":
        return ()
    return tuple(tools.get(example.domain, ())) or example.tools


def label_calls(
    teacher: AskedTeacher,
    examples: Iterable[Example],
    tools: Mapping[str, Sequence[Tool]],
    *,
    samples: int,
    instruction: str,
) -> Iterator[TeacherCall]:
    """`samples` questions for each example, one after the other."""
    for example in examples:
        shown = shown_tools(example, tools)
        for sample in range(samples):
            yield teacher.label_call(instruction=instruction, query=example.query, tools=shown, sample=sample)


def read_calls(answer: Answer) -> tuple[ToolCall, ...] | str:
    """The calls of an answer, or why there are none that can be used."""
    reply = answer.reply
    if reply is None:
        return answer.reason
    if reply.status != "ok" or reply.calls is None:
        return f"{reply.status}: {reply.reason or 'no calls can be read from the answer'}"
    try:
        return tuple(ToolCall.from_dict(call) for call in reply.calls)
    except ValueError as error:
        return f"malformed: {error}"


def same_answer(calls: Sequence[ToolCall]) -> Any:
    """Equal for answers that call the same tools with equal arguments, in whatever order."""
    return frozenset(Counter(map(call_key, calls)).items())


def weigh(samples: Sequence[tuple[ToolCall, ...]]) -> list[WeightedAnswer]:
    """Distinct answers, the commonest first, ties in the order in which they came."""
    counts: Counter[Any] = Counter()
    first: dict[Any, tuple[ToolCall, ...]] = {}
    for calls in samples:
        key = same_answer(calls)
        counts[key] += 1
        first.setdefault(key, calls)
    return [WeightedAnswer(first[key], times / len(samples)) for key, times in counts.most_common()]


def labelled(
    example: Example, tools: Mapping[str, Sequence[Tool]], answers: Sequence[Answer], *, teacher: str
) -> tuple[Example | None, list[WeightedAnswer], list[BadLine]]:
    """The example with the teacher's commonest answer (None without a usable one), every distinct answer, and what
    could not be used."""
    usable: list[tuple[ToolCall, ...]] = []
    refused: list[BadLine] = []
    for number, answer in enumerate(answers, 1):
        calls = read_calls(answer)
        if isinstance(calls, str):
            refused.append(BadLine(f"label {example.id}", number, calls, answer.reply.text if answer.reply else ""))
        else:
            usable.append(calls)
    if not usable:
        return None, [], refused
    weighted = weigh(usable)
    chosen = weighted[0].calls
    called = {call.name for call in chosen}
    shown = shown_tools(example, tools)
    kept = tuple(tool for tool in shown if tool.name in called) if example.domain in tools else shown
    return (
        example.replace(calls=chosen, tools=kept, kind=kind_of_answer(example.kind, chosen), teacher=teacher),
        weighted,
        refused,
    )


def kind_of_answer(asked_kind: str, calls: Sequence[ToolCall]) -> str:
    """The kind of a request that got these calls: how it is put stays, what it wants follows from the answer."""
    if not calls:
        return asked_kind if asked_kind in EMPTY_KINDS else "none"
    return asked_kind if asked_kind in MANNERS else kind_of_calls(calls)
