"""What a model in the author's part is asked, and how its answers are read: requests with their calls, and tools.

    for round in range(plan.rounds):
        for question in questions(plan, round=round, realised=realised, pools=pools):
            text = ...  # teacher.author_call(instruction=plan.wording.instruction, prompt=question.prompt, ...)
            examples, bad = read(text, question.brief)
            realised.add(plan, question.brief, accepted)  # those of the examples that pass every other check

`questions` sees what earlier rounds brought, so all of a round is asked before the next one's are made.

Answer schemas keep to what every schema-constrained mode takes: objects with all properties required and no others, no
bounds. Such modes refuse objects with free keys (OpenAI wants additionalProperties false everywhere, Gemini a named
property at least), so arguments and parameters are asked for as JSON text and parsed here. Since there are no bounds,
any number of items is read.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from needle.corpus.distractors import ToolPool
from needle.corpus.plan import COUNTED_KINDS, Brief, Invention, Plan, Pools, Realised, band_of
from needle.schema import BadLine, Example, Tool, ToolCall, canonical_json, kind_of_calls, strict_json
from needle.text.render import render_tools

SOURCE = "authored"
_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_SLUG = re.compile(r"[a-z][a-z0-9_]{2,39}")
_SIMPLE_TYPES = ("string", "integer", "number", "boolean")


class Question(NamedTuple):
    """An authoring call for requests; it is asked with plan.wording.instruction."""

    brief: Brief
    prompt: str
    schema: Mapping[str, Any]
    sample: int


class ToolQuestion(NamedTuple):
    """An authoring call for a new domain's tools; it is asked with plan.wording.tools_instruction."""

    area: str
    prompt: str
    schema: Mapping[str, Any]
    sample: int


@dataclass(frozen=True)
class Domain:
    name: str
    tools: tuple[Tool, ...]


def questions(plan: Plan, *, round: int, realised: Realised, pools: Pools) -> list[Question]:
    """The round's calls in a fixed order. `sample` differs from call to call, so that two equal prompts are two
    draws."""
    return [
        Question(brief, requests_prompt(plan, brief, realised), requests_schema(brief), brief.number)
        for brief in plan.briefs(round, realised, pools)
    ]


def requests_prompt(plan: Plan, brief: Brief, realised: Realised) -> str:
    parts = [f"Domain: {brief.domain.replace('_', ' ')}"]
    if brief.tools:
        parts.append(f"Tools shown, one JSON object a line:\n{render_tools(brief.tools, style='json')}")
    else:
        parts.append("Tools shown: none.")
    if brief.hidden:
        listed = "\n".join(f"- {tool.name}: {' '.join(tool.description.split())}" for tool in brief.hidden)
        parts.append(f"{_hidden_rule(brief)}\n{listed}")
    low, high = band_of(brief.words)
    parts.append(
        "\n".join(
            [
                f"Write {brief.count} requests, all of one kind.",
                f"Kind: {brief.kind}. {plan.wording.kinds[brief.kind].strip()}",
                *([_focus_rule(brief)] if len(brief.tools) > 1 and not brief.is_empty else []),
                f"Length: {low} to {high} words each, spread over that range.",
                f"Language: {brief.language}. Values are given in it as the user would; names and enum members stay as "
                "the schemas have them.",
                f"Who asks: {brief.persona}.",
                f"When: {brief.scenario}.",
                f"Register: {brief.register}.",
            ]
        )
    )
    taken = realised.openings_of(brief.domain, plan.openings_max)
    if taken:
        parts.append("Begin otherwise than these, which are used up: " + "; ".join(map(_quoted, taken)) + ".")
    parts.append(_answer_form(brief))
    return "\n\n".join(parts)


def _hidden_rule(brief: Brief) -> str:
    if not brief.tools:
        return "The tools that this domain usually has, of which the user is shown none:"
    if brief.is_empty:
        return "Tools that the same app has besides. Not one of the requests may be served by these either:"
    return "Tools that the same app has besides. No request may need one of these, or be served better by it:"


def _focus_rule(brief: Brief) -> str:
    return f"About half of the requests call {brief.focus}; spread the others over the remaining tools."


def _answer_form(brief: Brief) -> str:
    if brief.is_empty:
        return 'Answer with JSON: {"requests": [{"query": "..."}, ...]}'
    return (
        'Answer with JSON: {"requests": [{"query": "...", "calls": [{"name": "...", "arguments": "..."}]}, ...]}, '
        "where arguments is a JSON object written as a string."
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def requests_schema(brief: Brief) -> dict[str, Any]:
    """Of the answer to a brief. Names are held to the tools shown; requests without a call have no place for one."""
    text = {"type": "string"}
    if brief.is_empty:
        return _list_schema("requests", {"query": text})
    name = {"type": "string", "enum": [tool.name for tool in brief.tools]}
    calls = {"type": "array", "items": _object_schema({"name": name, "arguments": text})}
    return _list_schema("requests", {"query": text, "calls": calls})


def _list_schema(key: str, item: Mapping[str, Any], **beside: Any) -> dict[str, Any]:
    return _object_schema({**beside, key: {"type": "array", "items": _object_schema(item)}})


def _object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def read(text: str, brief: Brief) -> tuple[list[Example], list[BadLine]]:
    """The sound examples of an answer, and everything else in it with its reason; nothing is dropped.

    single, multi and repeat follow from the calls that came; other kinds are the brief's. An example shows the brief's
    tools. An answer that was cut off, or holds one broken item, still gives the others.
    """
    examples: list[Example] = []
    items, bad = _items(text, "requests", brief.id)
    seen: set[str] = set()
    for number, item in items:
        try:
            example = _example(item, brief)
            reasons = example.problems()
        except ValueError as error:
            reasons = [str(error)]
        else:
            if example.id in seen:
                reasons.append("repeats an earlier request of this answer")
        if reasons:
            bad.append(_refused(brief.id, number, "; ".join(reasons), item))
        else:
            seen.add(example.id)
            examples.append(example)
    return examples, sorted(bad, key=lambda line: line.line_number)


def _example(item: Any, brief: Brief) -> Example:
    if not isinstance(item, Mapping):
        raise ValueError(f"a request must be an object, not {type(item).__name__}")
    query = item.get("query")
    if not isinstance(query, str) or not query.strip():
        raise ValueError("query is missing or empty")
    calls = item.get("calls", [] if brief.is_empty else None)
    if not isinstance(calls, list):
        raise ValueError("calls must be a list")
    query = query.strip()
    found = tuple(_call(call) for call in calls)
    return Example(
        id=f"{brief.domain}-{hashlib.sha1(query.encode()).hexdigest()[:10]}",
        query=query,
        tools=brief.tools,
        calls=found,
        kind=_kind(brief, found),
        domain=brief.domain,
        source=SOURCE,
    )


def _kind(brief: Brief, calls: Sequence[ToolCall]) -> str:
    if brief.kind not in COUNTED_KINDS:
        return brief.kind
    return kind_of_calls(calls) if calls else "single"  # which the schema's check refuses


def _call(record: Any) -> ToolCall:
    """A call whose arguments are JSON text, or an object where the mode was free."""
    if isinstance(record, Mapping) and isinstance(record.get("arguments"), str):
        try:
            arguments = strict_json(record["arguments"])
        except ValueError as error:
            raise ValueError(f"call of {record.get('name')!r}: arguments are not JSON: {error}") from None
        if not isinstance(arguments, Mapping):
            raise ValueError(
                f"call of {record.get('name')!r}: arguments must be an object, not {type(arguments).__name__}"
            )
        record = {**record, "arguments": arguments}
    return ToolCall.from_dict(record)


def tool_questions(plan: Plan, *, taken: Sequence[str], sample: int) -> list[ToolQuestion]:
    """A call for each area of the plan. `taken` are the domains that exist; another `sample` asks for other tools."""
    invention = plan.invention
    return [
        ToolQuestion(area, tools_prompt(area, invention, taken), tools_schema(), sample) for area in invention.areas
    ]


def tools_prompt(area: str, invention: Invention, taken: Sequence[str]) -> str:
    known = ", ".join(sorted(taken))
    return "\n\n".join(
        [
            f"Area: {area}",
            f"Write {invention.tools_min} to {invention.tools_max} tools of one app of this area.",
            *([f"These apps exist; do what they do not: {known}."] if known else []),
            'Answer with JSON: {"domain": "...", "tools": [{"name": "...", "description": "...", "parameters": "..."}, '
            "...]}, where parameters is a JSON Schema of an object, written as a string.",
        ]
    )


def tools_schema() -> dict[str, Any]:
    text = {"type": "string"}
    return _list_schema("tools", {"name": text, "description": text, "parameters": text}, domain=text)


def read_tools(
    text: str, question: ToolQuestion, *, invention: Invention, taken: Mapping[str, Sequence[Tool]]
) -> tuple[Domain | None, list[BadLine]]:
    """The new domain, and each tool that was refused with its reason. None, and the whole answer with its reason, where
    there is no usable name or too few tools are left. `taken` are all other domains, invented ones included."""
    place = f"tools-{re.sub(r'[^a-z0-9]+', '-', question.area.lower()).strip('-')}"
    items, bad = _items(text, "tools", place)
    name, problem = _domain_name(text, taken)
    tools: dict[int, Tool] = {}
    for number, item in items:
        try:
            tool = _tool(item)
            if tool.name in {other.name for other in tools.values()}:
                raise ValueError(f"two tools are named {tool.name!r}")
        except ValueError as error:
            bad.append(_refused(place, number, str(error), item))
        else:
            tools[number] = tool
    raw = dict(items)
    for number, double in _doubles(tools, taken, invention.same_tool_cosine).items():
        bad.append(_refused(place, number, f"tool {tools.pop(number).name!r} does what {double} does", raw[number]))
    for number in list(tools)[invention.tools_max :]:
        del tools[number]
        bad.append(_refused(place, number, f"more than tools_max={invention.tools_max} tools", raw[number]))
    if not problem and len(tools) < invention.tools_min:
        problem = f"{len(tools)} usable tools, fewer than tools_min={invention.tools_min}"
    if problem and all(line.line_number for line in bad):  # else the whole answer is among them already
        bad.append(BadLine(place, 0, problem, text))
    bad.sort(key=lambda line: line.line_number)
    return None if problem else Domain(name, tuple(tools.values())), bad


def _domain_name(text: str, taken: Mapping[str, Any]) -> tuple[str, str | None]:
    """The answer's name for its domain as a slug, and what is wrong with it."""
    try:
        found = strict_json(text)
        name = found.get("domain") if isinstance(found, Mapping) else None
    except ValueError:  # cut off; the name comes first
        match = re.search(r'"domain"\s*:\s*"([^"\\]*)"', text)
        name = match[1] if match else None
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") if isinstance(name, str) else ""
    if not _SLUG.fullmatch(slug):
        return slug, f"domain {name!r} makes no name of 3 to 40 Latin letters, digits and underscores"
    return slug, f"there is a domain {slug!r} already" if slug in taken else None


def _tool(item: Any) -> Tool:
    """A tool whose parameters are JSON text, or an object where the mode was free."""
    if not isinstance(item, Mapping):
        raise ValueError(f"a tool must be an object, not {type(item).__name__}")
    parameters = item.get("parameters")
    if isinstance(parameters, str):
        try:
            parameters = strict_json(parameters)
        except ValueError as error:
            raise ValueError(f"tool {item.get('name')!r}: parameters are not JSON: {error}") from None
    tool = Tool.from_dict({**item, "parameters": parameters})
    if not _TOOL_NAME.fullmatch(tool.name):
        raise ValueError(f"tool {tool.name!r}: a name has Latin letters, digits, _ . - and 64 characters at most")
    if not tool.description.strip():
        raise ValueError(f"tool {tool.name!r} has no description")
    for key, schema in tool.properties.items():
        if not _is_simple(schema):
            raise ValueError(
                f"tool {tool.name!r}: parameter {key!r} is neither a text, number, boolean or enum nor a list of them"
            )
    absent = [key for key in tool.required if key not in tool.properties]
    if absent:
        raise ValueError(f"tool {tool.name!r}: required parameter {absent[0]!r} is not among the properties")
    return tool


def _is_simple(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    if schema.get("type") == "array":
        items = schema.get("items")
        return isinstance(items, Mapping) and items.get("type") in _SIMPLE_TYPES
    return schema.get("type") in _SIMPLE_TYPES


def _doubles(tools: Mapping[int, Tool], taken: Mapping[str, Sequence[Tool]], same_tool_cosine: float) -> dict[int, str]:
    """Those that are too much like a tool of another domain, with that tool as DOMAIN/TOOL."""
    if not tools or not taken:
        return {}
    pool = ToolPool({**taken, "": list(tools.values())})
    others = len(pool.tools) - len(tools)
    like = pool.similarity[others:, :others]
    nearest = like.argmax(axis=1)
    return {
        number: f"{pool.domains[at]}/{pool.tools[at].name}"
        for number, row, at in zip(tools, like, nearest, strict=True)
        if row[at] >= same_tool_cosine
    }


def _items(text: str, key: str, place: str) -> tuple[list[tuple[int, Any]], list[BadLine]]:
    """The numbered items of the list `key`, and what of the text is none. Items of a text that is not JSON as a whole
    (cut off, fenced, one of them broken) are read one by one as far as they go."""
    try:
        value = strict_json(text)
    except ValueError as error:
        return _rescued(text, key, place, str(error))
    found = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(found, list):
        return [], [BadLine(place, 0, f"the answer has no list {key!r}", text)]
    return list(enumerate(found, 1)), []


def _rescued(text: str, key: str, place: str, reason: str) -> tuple[list[tuple[int, Any]], list[BadLine]]:
    start = re.search(rf'"{key}"\s*:\s*\[', text)
    if start is None:
        return [], [BadLine(place, 0, f"not JSON: {reason}", text)]
    found: list[tuple[int, Any]] = []
    bad: list[BadLine] = []
    at, number, decoder = start.end(), 1, json.JSONDecoder()
    while True:
        at = re.compile(r"[\s,]*").match(text, at).end()
        try:
            end = decoder.raw_decode(text, at)[1]
        except (ValueError, RecursionError):
            break
        try:
            found.append((number, strict_json(text[at:end])))
        except ValueError as error:
            bad.append(BadLine(place, number, f"not JSON: {error}", text[at:end]))
        at, number = end, number + 1
    rest = text[at:].strip()
    if not re.fullmatch(r"\]\s*\}\s*(```)?", rest):  # what closes an answer, with the fence that some modes add
        bad.append(BadLine(place, number, f"not JSON, or cut off: {reason}", rest))
    return found, bad


def _refused(place: str, number: int, reason: str, item: Any) -> BadLine:
    return BadLine(place, number, reason, canonical_json(item))
