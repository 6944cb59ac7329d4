"""Values and calls written as text: JSON, Python literals, and the pythonic calls `[f(a="x"), g(b=1)]`. Nothing is
ever evaluated.

Python literals become JSON values where nothing is lost: a tuple becomes a list. Sets, bytes, complex numbers, NaN,
infinities and keys that are not text are refused.
"""

import ast
import math
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from needle.schema import ToolCall, strict_json

# Words of JSON that stand in recorded Python text; they mean nothing else there.
_JSON_WORDS = {"true": True, "false": False, "null": None}
_STRING = r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^'\\]|\\.)*'"
_STRING_OR_MARK = re.compile(rf"{_STRING}|[()\[\]{{}},]", re.DOTALL)
_STRINGS = re.compile(_STRING, re.DOTALL)
_ESCAPE_OR_BREAK = re.compile(r"\\.|\n|\r", re.DOTALL)


def json_value(value: Any) -> Any:
    """`value` as JSON has it, tuples as lists.

    Raises:
        ValueError: JSON has no such value.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a JSON number")
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a surrogate pair, {value[error.start]!r}, is no character") from error
        return value
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise ValueError(f"key {odd[0]!r} is not text")
        return {json_value(key): json_value(child) for key, child in value.items()}
    raise ValueError(f"JSON has no {type(value).__name__}")


def python_value(text: str) -> Any:
    """The JSON value of a Python literal; `true`, `false` and `null` are read as well.

    Raises:
        ValueError: not a literal, or a value that JSON has not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape, such as "\d", stays as it is written
            tree = ast.parse(text.strip(), mode="eval")
            value = ast.literal_eval(_JSONWords().visit(tree.body))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text[:80]!r} is not a literal") from error
    return json_value(value)


def any_value(text: str) -> Any:
    """JSON or else a Python literal.

    Raises:
        ValueError: neither.
    """
    try:
        return strict_json(text)
    except ValueError as json_error:
        try:
            return python_value(text)
        except ValueError as error:
            raise ValueError(f"neither JSON ({json_error}) nor a Python literal ({error})") from error


def listed(value: Any, name: str) -> list[Any]:
    """A list that may be written as text.

    Raises:
        ValueError: it is no list.
    """
    if isinstance(value, str):
        try:
            value = any_value(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, not {type(value).__name__}")
    return value


def pythonic_calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """Reads `[name(key=literal, ...), ...]`. Names may hold any character where they are among `names`, and any but
    `(` elsewhere; a line break inside a string counts as `\\n`.

    Raises:
        ValueError: not of this form, a positional argument, a repeated key, or a value that is not a literal.
    """
    text = text.strip()
    if not text.startswith("["):
        raise ValueError("calls must stand in [ ]")
    known = sorted(names, key=len, reverse=True)
    calls: list[ToolCall] = []
    position = _after_space(text, 1)
    while not text.startswith("]", position):
        name, position = _name(text, position, known)
        pieces, position = _arguments(text, position)
        calls.append(ToolCall(name, _keywords(name, pieces)))
        position = _after_space(text, position)
        if text.startswith(",", position):
            position = _after_space(text, position + 1)
        elif not text.startswith("]", position):
            raise ValueError(f"neither , nor ] stands after the call of {name!r}: was the text cut off?")
    if position + 1 != len(text):
        raise ValueError(f"text stands after the calls: {text[position + 1 :][:60]!r}")
    return calls


class _JSONWords(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_WORDS[node.id]) if node.id in _JSON_WORDS else node


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _name(text: str, position: int, known: Collection[str]) -> tuple[str, int]:
    """The name at `position`, and the position after its opening parenthesis."""
    for name in known:  # longest first
        end = _after_space(text, position + len(name))
        if text.startswith(name, position) and text.startswith("(", end):
            return name, end + 1
    end = text.find("(", position)
    name = text[position:end].strip()
    if end < 0 or not name or name[0] in ",=)]}":
        raise ValueError(f"no call begins at {text[position:][:60]!r}")
    return name, end + 1


def _arguments(text: str, start: int) -> tuple[list[str], int]:
    """The texts between the commas of an argument list, and the position after its closing parenthesis."""
    pieces: list[str] = []
    depth, begun = 0, start
    for match in _STRING_OR_MARK.finditer(text, start):
        mark = match.group()
        if mark in (",", ")") and depth == 0:
            pieces.append(text[begun : match.start()])
            begun = match.end()
            if mark == ")":
                # Python allows a comma before the end.
                return pieces[:-1] if not pieces[-1].strip() else pieces, begun
        elif mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
    raise ValueError(f"the argument list {text[start:][:60]!r} has no end")


def _keywords(name: str, pieces: list[str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for piece in pieces:
        key, equals, literal = piece.partition("=")
        key = key.strip()
        if not equals or not key or key[0] in "\"'[{(":
            raise ValueError(f"call of {name!r}: {piece.strip()[:60]!r} is not of the form key=value")
        if key in arguments:
            raise ValueError(f"call of {name!r}: {key!r} is given twice")
        try:
            arguments[key] = python_value(_STRINGS.sub(_one_line, literal))
        except ValueError as error:
            raise ValueError(f"call of {name!r}: {key}: {error}") from error
    return arguments


def _one_line(string: re.Match[str]) -> str:
    breaks = {"\n": "\\n", "\r": "\\r"}
    return _ESCAPE_OR_BREAK.sub(lambda match: breaks.get(match.group(), match.group()), string.group())
