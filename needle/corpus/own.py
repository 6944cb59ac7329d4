"""A user's own tools and requests as examples, checked as the corpus's are.

Tools: a JSON list, or an object with `tools`, of tools as in OpenAI's API, wrapped in {"type": "function"} or bare.
Requests: JSONL, a line {"query", "calls": [{"name", "arguments"}]}, `calls` empty where no tool serves the request.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from needle.artifacts import fingerprint
from needle.corpus.mix import generator
from needle.errors import DataError
from needle.schema import BadLine, Example, Tool, ToolCall, kind_of_calls, read_lines, strict_json

SOURCE = "own"


def read_tools(path: Path) -> tuple[Tool, ...]:
    """Raises DataError with the first tool that cannot be used, and why."""
    try:
        value = strict_json(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read tools from {path}: {error}") from error
    records = value.get("tools") if isinstance(value, dict) else value
    if not isinstance(records, list) or not records:
        raise DataError(f'{path}: a list of tools belongs there, or an object {{"tools": [...]}} with at least one')
    tools = []
    for number, record in enumerate(records, 1):
        try:
            tools.append(Tool.from_dict(record))
        except ValueError as error:
            raise DataError(f"{path}: tool {number}: {error}") from error
    names = [tool.name for tool in tools]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: two tools are named {twice[0]!r}; a call could mean either")
    return tuple(tools)


def read_requests(path: Path, tools: Sequence[Tool]) -> list[Example]:
    """Examples that show the called tools.

    Raises:
        DataError: with the first line that is no request, or whose answer breaks its tool's schema.
    """
    by_name = {tool.name: tool for tool in tools}
    found = []
    for number, value in read_lines(path):
        where = f"{path}, line {number}"
        if isinstance(value, BadLine):
            raise DataError(f"{where}: {value.reason}")
        try:
            calls = tuple(ToolCall.from_dict(call) for call in value["calls"])
            kind = kind_of_calls(calls)
            names = dict.fromkeys(call.name for call in calls)
            unknown = [name for name in names if name not in by_name]
            if unknown:
                raise ValueError(f"call of unknown tool {unknown[0]!r}; there are {', '.join(by_name)}")
            record = {"id": fingerprint(query=value["query"]), "query": value["query"], "tools": [], "calls": []}
            example = Example.from_dict({**record, "kind": kind, "domain": SOURCE, "source": SOURCE, "teacher": SOURCE})
        except (KeyError, TypeError, ValueError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}: {told}") from error
        example = example.replace(calls=calls, tools=tuple(by_name[name] for name in names))
        problems = example.problems()
        if problems:
            raise DataError(f"{where}: {problems[0]}")
        found.append(example)
    if len({example.id for example in found}) < len(found):
        raise DataError(f"{path}: a request stands there twice")
    if not found:
        raise DataError(f"{path} holds no request")
    return found


def with_tools(examples: Sequence[Example], tools: Sequence[Tool], *, shown: int, seed: int) -> list[Example]:
    """The examples with `shown` of the tools (more where more are called), the called ones among them, in random
    order. Another seed shows others, under other ids."""
    varied = []
    for example in examples:
        rng = generator(seed, example.id)
        called = {tool.name for tool in example.tools}
        others = [tool for tool in tools if tool.name not in called]
        drawn = rng.permutation(len(others))[: max(0, shown - len(example.tools))]
        there = [*example.tools, *(others[i] for i in drawn)]
        chosen = tuple(there[i] for i in rng.permutation(len(there)))
        varied.append(example.replace(id=f"{example.id}-{seed}", tools=chosen))
    return varied


def held_out(examples: Sequence[Example], *, every: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(to learn from, held out): of the requests for the same tools, in a random order, each `every`-th is held out."""
    groups: dict[tuple[str, ...], list[Example]] = defaultdict(list)
    for example in examples:
        groups[tuple(sorted({call.name for call in example.calls}))].append(example)
    learnt, kept = [], []
    number = 0
    for _, some in sorted(groups.items()):
        for i in generator(seed, "held out", len(some)).permutation(len(some)):
            number += 1
            (kept if number % every == 0 else learnt).append(some[i])
    return learnt, kept


def write(examples: Sequence[Example], path: Path) -> Path:
    """As JSONL, for `data.given` and for a suite."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(example.to_json() + "\n" for example in examples), "utf-8")
    return Path(path)


def write_requests(examples: Sequence[Example], path: Path) -> Path:
    """Without the answers: what needle.predict reads."""
    lines = [{"id": one.id, "query": one.query, "tools": [_openai(tool) for tool in one.tools]} for one in examples]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return Path(path)


def _openai(tool: Tool) -> dict:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}
