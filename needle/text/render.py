"""Example <-> text. Every target character belongs to a span.

The prompt is `<tools>` + tools + `<query>` + request. The target is strict JSON without spaces,

    [{"name":"set_timer","arguments":{"duration":" ten minutes","count":2}}]

with arguments in the order of the tool's schema, and with one convention: every string *value* (enum members
included; names and keys excluded) opens with one space, which `parse_calls` takes off again. A word inside a request is
tokenised with the space before it, so the value is then made of the very tokens that stand in the request and can be
copied one by one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from needle.schema import Tool, ToolCall, strict_json

STYLES = ("signature", "json")
_SHORT_TYPES = {"string": "str", "integer": "int", "number": "num", "boolean": "bool", "object": "obj", "null": "null"}


class Span(IntEnum):
    """What a target character (and so a target token) is part of."""

    STRUCTURE = 0
    NAME = 1
    KEY = 2
    VALUE = 3
    STOP = 4


class Segment(NamedTuple):
    text: str
    span: Span


def render_tools(tools: Sequence[Tool], *, style: str) -> str:
    """The tools' part of a prompt.

    `signature`: a line a tool, `name(key:type,key?:type= a| b) description`, `?` marking optional parameters and enum
    members written with the leading space that they have in a target. `json`: one JSON object a line, as OpenAI's
    API has them, without spaces. In both styles a line break stands between two tools and nowhere else.
    """
    if style == "signature":
        return "\n".join(_signature(tool) for tool in tools)
    if style == "json":
        records = ({"name": t.name, "description": t.description, "parameters": t.parameters} for t in tools)
        return "\n".join(json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records)
    raise ValueError(f"style {style!r} is not one of {', '.join(STYLES)}")


def render_query(query: str) -> str:
    """The request with one leading space, so that its first word is tokenised like every other."""
    return " " + " ".join(query.split())


def render_calls(calls: Sequence[ToolCall], tools: Sequence[Tool]) -> list[Segment]:
    """The target as segments; joined, their text is what `parse_calls` reads. The stop token is the tokenizer's."""
    schemas = {tool.name: tool.parameters for tool in tools}
    pieces: list[Segment] = [Segment("[", Span.STRUCTURE)]
    for index, call in enumerate(calls):
        pieces.append(Segment(',{"name":"' if index else '{"name":"', Span.STRUCTURE))
        pieces.append(Segment(_escaped(call.name), Span.NAME))
        pieces.append(Segment('","arguments":', Span.STRUCTURE))
        pieces += _value(call.arguments, schemas.get(call.name, {}))
        pieces.append(Segment("}", Span.STRUCTURE))
    pieces.append(Segment("]", Span.STRUCTURE))
    return list(_merged(pieces))


def parse_calls(text: str) -> list[ToolCall]:
    """Reads a target back.

    Raises:
        ValueError: the text is not JSON, or not a list of `{"name", "arguments"}`.
    """
    try:
        records = strict_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(records, list):
        raise ValueError(f"not a list of calls but {type(records).__name__}")
    calls = [ToolCall.from_dict(record) for record in records]
    return [ToolCall(call.name, _without_leading_space(call.arguments)) for call in calls]


def _signature(tool: Tool) -> str:
    fields = _fields(tool.parameters)
    description = " ".join(tool.description.split())
    return f"{_escaped(tool.name)}({fields})" + (f" {description}" if description else "")


def _fields(schema: Mapping[str, Any]) -> str:
    required = set(schema.get("required", ()))
    return ",".join(
        f"{_escaped(key)}{'' if key in required else '?'}:{_type_name(child)}"
        for key, child in schema.get("properties", {}).items()
    )


def _type_name(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        return "any"
    if "enum" in schema or "const" in schema:
        members = schema["enum"] if "enum" in schema else [schema["const"]]
        return "|".join(f" {_escaped(m)}" if isinstance(m, str) else json.dumps(m) for m in members)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return "/".join(_type_name(option) for option in schema[union])
    kind = schema.get("type")
    if isinstance(kind, list):
        return "/".join(_type_name({**schema, "type": one}) for one in kind)
    if kind == "array":
        return f"[{_type_name(schema.get('items', {}))}]"
    if kind == "object" and schema.get("properties"):
        return "{" + _fields(schema) + "}"
    name = _SHORT_TYPES.get(kind or "", "any")
    return f"{name}:{_escaped(schema['format'])}" if "format" in schema else name


def _value(value: Any, schema: Any) -> Iterator[Segment]:
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, str):
        yield Segment('"', Span.STRUCTURE)
        yield Segment(" " + _escaped(value), Span.VALUE)
        yield Segment('"', Span.STRUCTURE)
    elif isinstance(value, Mapping):
        yield Segment("{", Span.STRUCTURE)
        properties = schema.get("properties", {})
        ordered = [key for key in properties if key in value] + [key for key in value if key not in properties]
        for index, key in enumerate(ordered):
            yield Segment(',"' if index else '"', Span.STRUCTURE)
            yield Segment(_escaped(key), Span.KEY)
            yield Segment('":', Span.STRUCTURE)
            yield from _value(value[key], properties.get(key) or schema.get("additionalProperties"))
        yield Segment("}", Span.STRUCTURE)
    elif isinstance(value, (list, tuple)):
        yield Segment("[", Span.STRUCTURE)
        for index, item in enumerate(value):
            if index:
                yield Segment(",", Span.STRUCTURE)
            yield from _value(item, schema.get("items"))
        yield Segment("]", Span.STRUCTURE)
    else:
        yield Segment(json.dumps(value), Span.VALUE)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _merged(pieces: Iterable[Segment]) -> Iterator[Segment]:
    """Joins neighbours of one span, so that `"},{"name":"` reaches the tokenizer whole; drops empty segments."""
    text, span = "", None
    for piece in (piece for piece in pieces if piece.text):
        if piece.span == span:
            text += piece.text
        else:
            if span is not None:
                yield Segment(text, span)
            text, span = piece
    if span is not None:
        yield Segment(text, span)


def _without_leading_space(value: Any) -> Any:
    if isinstance(value, str):
        return value[1:] if value.startswith(" ") else value
    if isinstance(value, Mapping):
        return {key: _without_leading_space(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_without_leading_space(item) for item in value]
    return value
