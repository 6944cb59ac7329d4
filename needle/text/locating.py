"""Where the names, keys and values of calls stand in a teacher's answer, whatever form the answer has.

A part is found by its bytes alone, in the order in which the teacher wrote: a call's name, then each key with its
value behind it. Between a key and its value only marks may stand (quotes, colons, brackets, blanks). What is spelled
otherwise than the student's targets spell it, an escaped character or a Python `True`, is not found.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from needle.schema import ToolCall
from needle.text.render import Segment, Span

QUOTES = b"\"'"
AFTER_PLAIN = b",}])>; \t\r\n"  # what ends a number, true, false or null
_MARKS = re.compile(rb"[\s\"':=,{}\[\]()]*")


class Part(NamedTuple):
    """Of which call, what it is, and the way to it through the arguments: positions of keys and items, in the order in
    which they were written. Renaming a key changes none of it."""

    call: int
    span: Span
    steps: tuple[int, ...]


class Place(NamedTuple):
    """`start`: byte of the answer; `body`: the bytes there; `ends`: bytes that end it."""

    start: int
    body: bytes
    ends: bytes


def locate(calls: Sequence[ToolCall], answer: bytes) -> dict[Part, Place]:
    """The parts of `calls` that are found in the answer."""
    found: dict[Part, Place] = {}
    cursor = 0
    for number, call in enumerate(calls):
        place = next(_words(answer, call.name, cursor), None)
        if place is None:
            continue
        found[Part(number, Span.NAME, ())] = place
        cursor = _mapping(answer, call.arguments, place.start + len(place.body), number, (), found)
    return found


def parts(calls: Sequence[ToolCall], segments: Sequence[Segment]) -> dict[Part, int]:
    """The parts of `calls` by the number of their segment in `render_calls`.

    Raises:
        ValueError: the segments are not those of the calls.
    """
    found: dict[Part, int] = {}
    told = iter([(i, segment) for i, segment in enumerate(segments) if segment.span != Span.STRUCTURE])

    def visit(value: Any, call: int, steps: tuple[int, ...]) -> None:
        if isinstance(value, Mapping):
            keys = {_spelled(key): (place, key) for place, key in enumerate(value)}
            for _ in value:
                number, segment = next(told, (0, Segment("", Span.STOP)))
                if segment.span != Span.KEY or segment.text not in keys:
                    raise ValueError(f"{segment.text!r} is none of the keys {list(value)}")
                place, key = keys[segment.text]
                found[Part(call, Span.KEY, (*steps, place))] = number
                visit(value[key], call, (*steps, place))
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                visit(item, call, (*steps, place))
        else:
            number, segment = next(told, (0, Segment("", Span.STOP)))
            if segment.span != Span.VALUE:
                raise ValueError(f"{segment.text!r} is no value")
            found[Part(call, Span.VALUE, steps)] = number

    for number, call in enumerate(calls):
        place, segment = next(told, (0, Segment("", Span.STOP)))
        if segment.span != Span.NAME:
            raise ValueError(f"{segment.text!r} is no name")
        found[Part(number, Span.NAME, ())] = place
        visit(call.arguments, number, ())
    return found


def _mapping(
    answer: bytes, value: Mapping[str, Any], start: int, call: int, steps: tuple[int, ...], found: dict[Part, Place]
) -> int:
    """Finds an object's keys and values from `start` on; where the last of them ends."""
    end = start
    for number, (key, child) in enumerate(value.items()):
        here = (*steps, number)
        best: tuple[Place, dict[Part, Place], int] | None = None
        for place in _words(answer, key, end):
            inner: dict[Part, Place] = {}
            behind = _value(answer, child, place.start + len(place.body), call, here, inner)
            if best is None or inner:
                best = (place, inner, behind)
            if inner:
                break
        if best is not None:
            found[Part(call, Span.KEY, here)] = best[0]
            found |= best[1]
            end = best[2]
    return end


def _value(answer: bytes, value: Any, start: int, call: int, steps: tuple[int, ...], found: dict[Part, Place]) -> int:
    """Finds a value that stands right behind `start`; where it ends, or `start` where it is not there."""
    if isinstance(value, Mapping):
        return _mapping(answer, value, start, call, steps, found)
    if isinstance(value, list | tuple):
        for number, item in enumerate(value):
            start = _value(answer, item, start, call, (*steps, number), found)
        return start
    place = _text(answer, value, start) if isinstance(value, str) else _plain(answer, value, start)
    if place is None:
        return start
    found[Part(call, Span.VALUE, steps)] = place
    return place.start + len(place.body)


def _words(answer: bytes, name: str, start: int) -> Iterator[Place]:
    """Where a name or key stands: in quotes first, then as a word of its own."""
    body = _spelled(name).encode()
    bare = []
    at = answer.find(body, start) if body else -1
    while at >= 0:
        before, behind = answer[at - 1 : at] if at else b"", answer[at + len(body) : at + len(body) + 1]
        if before and before in QUOTES and before == behind:
            yield Place(at, body, behind)
        elif not (_is_word(before) or _is_word(behind)):
            bare.append(Place(at, body, behind))
        at = answer.find(body, at + 1)
    yield from bare


def _text(answer: bytes, value: str, start: int) -> Place | None:
    """A text in quotes. Without quotes it could be anything's end."""
    body = _spelled(value).encode()
    marks = _MARKS.match(answer, start)
    assert marks is not None  # it matches nothing, too
    for at in range(start + 1, marks.end() + 1):
        quote = answer[at - 1 : at]
        if quote in QUOTES and answer.startswith(body + quote, at):
            return Place(at, body, quote)
    return None


def _plain(answer: bytes, value: Any, start: int) -> Place | None:
    """A number, true, false or null."""
    body = json.dumps(value).encode()
    marks = _MARKS.match(answer, start)
    assert marks is not None
    behind = answer[marks.end() + len(body) : marks.end() + len(body) + 1]
    if not answer.startswith(body, marks.end()) or (behind and behind not in AFTER_PLAIN):
        return None
    return Place(marks.end(), body, AFTER_PLAIN)


def _spelled(text: str) -> str:
    """As a target spells it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_word(character: bytes) -> bool:
    return character.isalnum() or character == b"_" or character >= b"\x80"
