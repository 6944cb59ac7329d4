"""Calls in a text: the formats in which models that were trained on tools write them."""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from needle.schema import ToolCall, strict_json

AnswerFormat = Literal["hermes", "json_list", "llama", "pythonic"]
_CALL_LIKE = re.compile(r'"name"\s*:|</?tool_call>')


def read_calls(text: str, *, answer_format: AnswerFormat, tool_names: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    """The calls in an answer as `{"name", "arguments"}`; none in a text that names no call.

    Raises:
        ValueError: it holds something like a call that the format does not explain. To take that for an answer without
            calls would teach the student to be silent.
    """
    calls = _READERS[answer_format](text.strip())
    if calls is None:
        names = "|".join(re.escape(name) for name in tool_names)
        if _CALL_LIKE.search(text) or (names and re.search(rf"(?<![\w.])({names})\(", text)):
            raise ValueError(f"something like a call that is not in the format {answer_format}: {text.strip()[:80]!r}")
        return ()
    return tuple({"name": call.name, "arguments": call.arguments} for call in calls)


def _read_hermes(text: str) -> list[ToolCall] | None:
    """`<tool_call>` JSON `</tool_call>` blocks, text around them; the last block's end may be missing."""
    calls: list[ToolCall] = []
    outside, opened, rest = text.partition("<tool_call>")
    while opened:
        record, rest = _json_prefix(rest.lstrip())
        rest = rest.lstrip()
        if rest and not rest.startswith("</tool_call>"):
            raise ValueError(f"after a call, not </tool_call> but {rest[:40]!r}")
        calls.append(ToolCall.from_dict(record))
        between, opened, rest = rest.removeprefix("</tool_call>").partition("<tool_call>")
        outside += between
    if calls and _CALL_LIKE.search(outside):
        raise ValueError(f"a call outside <tool_call>: {outside.strip()[:80]!r}")
    return calls or None


def _read_json_list(text: str) -> list[ToolCall] | None:
    """A JSON list of calls, or one call, in a code fence or bare."""
    bare = unfenced(text)
    if not bare.startswith(("[", "{")):
        return None
    records = strict_json(bare)
    return [ToolCall.from_dict(record) for record in (records if isinstance(records, list) else [records])]


def _read_llama(text: str) -> list[ToolCall] | None:
    """`{"name", "parameters"}` objects, parted by semicolons or blanks, perhaps after `<|python_tag|>`."""
    rest = text.removeprefix("<|python_tag|>").lstrip()
    if not rest.startswith("{"):
        return None
    calls: list[ToolCall] = []
    while rest:
        record, rest = _json_prefix(rest)
        rest = rest.lstrip("; \n\t")
        if isinstance(record, Mapping) and "parameters" in record:
            record = {**record, "arguments": record["parameters"]}
        calls.append(ToolCall.from_dict(record))
    return calls


def _read_pythonic(text: str) -> list[ToolCall] | None:
    """`[f(a=1), g(b="x")]`: Python syntax, read and never run; keyword arguments with literal values only."""
    if not text.startswith("["):
        return None
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"not Python: {error}") from error
    calls = [_python_call(element) for element in node.elts] if isinstance(node, ast.List) else None
    if calls is None:
        raise ValueError(f"not a list of calls: {text[:80]!r}")
    return calls


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call):
        raise ValueError(f"not a call: {ast.unparse(node)[:80]}")
    name = ast.unparse(node.func)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name[:80]!r} is no name of a tool")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"call of {name}: every argument needs its name")
    arguments = {str(keyword.arg): _python_value(keyword.value) for keyword in node.keywords}
    return ToolCall(name, strict_json(json.dumps(arguments)))


def _python_value(node: ast.expr) -> Any:
    """A literal as a JSON value; also JSON's own true, false and null."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_python_value(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError(f"keys of {ast.unparse(node)[:80]} must be text")
        return dict(zip(keys, map(_python_value, node.values), strict=True))
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"{ast.unparse(node)[:80]} is no JSON value")
    return value


_READERS: Mapping[str, Callable[[str], list[ToolCall] | None]] = {
    "hermes": _read_hermes,
    "json_list": _read_json_list,
    "llama": _read_llama,
    "pythonic": _read_pythonic,
}


def _json_prefix(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, read strictly, and what follows it."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    return strict_json(text[:end]), text[end:]


def unfenced(text: str) -> str:
    found = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return (found.group(1) if found else text).strip()
