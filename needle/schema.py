"""Tool, ToolCall and Example: the records that every stage exchanges, (de)serialised and validated here only.

An example on disk is one JSON object a line: `id, query, tools, calls, kind, domain, source, teacher, split`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import jsonschema

from needle.errors import DataError

SCHEMA_VERSION = 1
KINDS = ("single", "multi", "repeat", "implicit", "disfluent", "garbled", "none", "near_miss", "no_tools")
EMPTY_KINDS = frozenset({"none", "near_miss", "no_tools"})
SPLITS = ("train", "validation", "test", "unseen")
EVALUATION_SPLITS = SPLITS[1:]
# Sources that begin so must never be trained on.
EVALUATION_ONLY = "bfcl"


def strict_json(text: str) -> Any:
    """`json.loads` of what every reader accepts and every writer can write again.

    Raises:
        ValueError: not JSON, NaN or Infinity, half of a surrogate pair, a number too long, or nested too deep.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a surrogate pair, {error.object[error.start]!r}, is no character") from error
    return value


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large for a float")
    return value


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a call may name. `parameters` is a JSON Schema of type object (draft 2020-12)."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @staticmethod
    def from_dict(record: Any) -> "Tool":
        """Reads `{"name", "description"?, "parameters"?}`, bare or wrapped in `{"type": "function", "function": ...}`.

        Raises:
            ValueError: not an object, no usable name, or parameters that are not a JSON Schema of an object.
        """
        if isinstance(record, Mapping) and record.get("type") == "function" and "function" in record:
            record = record["function"]
        if not isinstance(record, Mapping):
            raise ValueError(f"a tool must be an object, not {type(record).__name__}")
        name = record.get("name")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a tool needs a non-empty name, not {name!r}")
        description = record.get("description") or ""
        if not isinstance(description, str):
            raise ValueError(f"tool {name!r}: description must be text, not {type(description).__name__}")
        parameters = record.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping):
            raise ValueError(f"tool {name!r}: parameters must be a JSON Schema object")
        problem = _schema_problem(canonical_json(parameters))
        if problem:
            raise ValueError(f"tool {name!r}: {problem}")
        return Tool(name, description, {"type": "object", "properties": {}, **parameters})

    @property
    def properties(self) -> Mapping[str, Any]:
        return self.parameters.get("properties", {})

    @property
    def required(self) -> Sequence[str]:
        return self.parameters.get("required", ())


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; `arguments` are JSON values."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_dict(record: Any) -> "ToolCall":
        if not isinstance(record, Mapping) or not isinstance(record.get("name"), str):
            raise ValueError(f"a call must be an object with a name, not {record!r}")
        arguments = {} if record.get("arguments") is None else record["arguments"]
        if not isinstance(arguments, Mapping):
            raise ValueError(f"call of {record['name']!r}: arguments must be an object, not {type(arguments).__name__}")
        return ToolCall(record["name"], dict(arguments))


@dataclass(frozen=True, slots=True)
class Example:
    """A request, the tools shown, and the right calls in order (possibly none)."""

    id: str
    query: str
    tools: tuple[Tool, ...]
    calls: tuple[ToolCall, ...]
    kind: str
    domain: str = ""
    source: str = ""
    teacher: str = ""
    split: str = ""

    @staticmethod
    def from_dict(record: Any) -> "Example":
        """Raises ValueError naming the first field that is wrong. Arguments are checked by `problems()`, not here."""
        if not isinstance(record, Mapping):
            raise ValueError(f"an example must be an object, not {type(record).__name__}")
        query = record.get("query")
        if not isinstance(query, str) or not query.strip():
            raise ValueError("query is missing or empty")
        if not isinstance(record.get("tools"), list):
            raise ValueError("tools must be a list")
        if not isinstance(record.get("calls"), list):
            raise ValueError("calls must be a list")
        kind = record.get("kind")
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
        return Example(
            id=str(record.get("id", "")),
            query=query,
            tools=tuple(Tool.from_dict(tool) for tool in record["tools"]),
            calls=tuple(ToolCall.from_dict(call) for call in record["calls"]),
            kind=kind,
            **{key: str(record.get(key) or "") for key in ("domain", "source", "teacher", "split")},
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def replace(self, **changes: Any) -> "Example":
        return replace(self, **changes)

    def problems(self) -> list[str]:
        """Why this example cannot be trained on, one reason an entry; empty when it is sound."""
        names = [tool.name for tool in self.tools]
        found = [f"two tools are named {name!r}" for name in sorted({name for name in names if names.count(name) > 1})]
        if self.kind in EMPTY_KINDS and self.calls:
            found.append(f"kind {self.kind} must have no call, this has {len(self.calls)}")
        if self.kind not in EMPTY_KINDS and not self.calls:
            found.append(f"kind {self.kind} has no call")
        by_name = {tool.name: tool for tool in self.tools}
        for call in self.calls:
            found += call_problems(call, by_name)
        return found


def kind_of_calls(calls: Sequence[ToolCall]) -> str:
    """none, single, multi (of several tools) or repeat (of one tool)."""
    if len(calls) < 2:
        return "single" if calls else "none"
    return "multi" if len({call.name for call in calls}) > 1 else "repeat"


def call_problems(call: ToolCall, tools: Mapping[str, Tool]) -> list[str]:
    """Breaches of the called tool's schema; arguments that it does not name are breaches unless it allows them."""
    tool = tools.get(call.name)
    if tool is None:
        return [f"call of unknown tool {call.name!r}"]
    validator = _validator(canonical_json(tool.parameters))
    try:
        return [
            f"{call.name}.{'.'.join(map(str, error.absolute_path)) or '*'}: {error.message[:160]}"
            for error in validator.iter_errors(call.arguments)
        ]
    except Exception as error:  # a $ref that leads nowhere or to itself; jsonschema has no public class for it
        return [f"{call.name}: its schema cannot be followed: {str(error)[:160]}"]


@lru_cache(maxsize=8192)
def _schema_problem(parameters_json: str) -> str | None:
    schema = json.loads(parameters_json)
    if schema.get("type", "object") != "object":
        return f"parameters must be a schema of type object, not {schema['type']!r}"
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        return f"parameters are not a JSON Schema: {error.message[:160]}"
    remote = [target for target in _references(schema) if not target.startswith("#")]
    if remote:  # jsonschema would fetch it over the network
        return f"$ref {remote[0]!r} leads out of the parameters; put what it names under $defs"
    missing = [name for name in schema.get("required", ()) if name not in schema.get("properties", {})]
    if missing and schema.get("additionalProperties", False) is False:
        return f"required parameter {missing[0]!r} is not among the properties"
    return None


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for key, child in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(child, str):
                yield child
            yield from _references(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from _references(child)


@lru_cache(maxsize=8192)
def _validator(parameters_json: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"additionalProperties": False, **json.loads(parameters_json)})


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of an input file that could not be used, kept with its reason."""

    path: str
    line_number: int
    reason: str
    text: str

    def to_json(self) -> str:
        """As a line of a quarantine.jsonl."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_lines(path: Path) -> Iterator[tuple[int, Any | BadLine]]:
    """`read_stream` of a file.

    Raises:
        DataError: the file cannot be opened.
    """
    try:
        stream = Path(path).open("rb")  # noqa: SIM115 (closed by read_stream)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    yield from read_stream(stream, str(path))


def read_stream(stream: BinaryIO, name: str) -> Iterator[tuple[int, Any | BadLine]]:
    """Yields `(line number, JSON value or BadLine)` for every line that is not blank; never raises for a bad line."""
    with stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            try:
                yield number, strict_json(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                reason = f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}"
                yield number, BadLine(name, number, reason, raw.decode("utf-8", "backslashreplace").rstrip("\n"))
            except ValueError as error:
                cut = "" if raw.endswith(b"\n") else " (the last line has no end: was the file cut off?)"
                reason = f"not JSON: {error}{cut}"
                yield number, BadLine(name, number, reason, raw.decode("utf-8").rstrip("\n"))


def read_examples(path: Path) -> tuple[list[Example], list[BadLine]]:
    """Every sound example of a JSONL file, and every other line with its reason.

    Raises:
        DataError: the file cannot be opened, or holds not one sound example.
    """
    examples: list[Example] = []
    bad: list[BadLine] = []
    for number, value in read_lines(path):
        if isinstance(value, BadLine):
            bad.append(value)
            continue
        try:
            example = Example.from_dict(value)
            reasons = example.problems()
        except ValueError as error:
            reasons = [str(error)]
        if reasons:
            bad.append(BadLine(str(path), number, "; ".join(reasons), canonical_json(value)))
        else:
            examples.append(example)
    if not examples:
        why = f"; first reason: line {bad[0].line_number}: {bad[0].reason}" if bad else " (the file is empty)"
        raise DataError(f"{path} holds no usable example{why}")
    return examples, bad
