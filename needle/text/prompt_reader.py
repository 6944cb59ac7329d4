"""Prompt -> tools: what `render_tools` wrote, read back, for whoever holds a prompt's tokens and no longer its example.

A prompt in style `json` gives its tools exactly. A signature names keys, types and enum members and no bounds, so the
schemas are as loose as what the student sees. A member with a bracket that it does not close, or with words that look
like the next parameter, may be read as something else; what is read is always written the same again.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from needle.errors import DataError
from needle.schema import Tool
from needle.text.render import render_tools
from needle.text.tokenizer import QUERY, TextCodec

_TYPES = {"str": "string", "int": "integer", "num": "number", "bool": "boolean", "obj": "object", "null": "null"}
_WORD = re.compile(r"(str|int|num|bool|obj|null|any)(?::([\w-]+))?(?=[/,)\]}]|$)")
_KEY = re.compile(r"((?:\\.|[^\\:])*?)(\??):")
_NAME = re.compile(r"((?:\\.|[^\\(])*)\(")
_NEXT_KEY = re.compile(r",(?:\\.|[^\\\s,:|(){}\[\]])(?:\\.|[^\\,:|(){}\[\]])*:")
_NEXT_TYPE = re.compile(r"/(?:\[|\{|" + _WORD.pattern + ")")
_PAIRS = {")": "(", "]": "[", "}": "{"}


def tools_of_prompt(prompt: Sequence[int], codec: TextCodec) -> list[Tool]:
    """The tools that an encoded prompt shows.

    Raises:
        DataError: they cannot be read, or what is read would be shown in other words.
    """
    # The first token opens the tools; the request's marker stands nowhere else.
    text = codec.decode(prompt[1 : list(prompt).index(QUERY)])
    return read_tools(text, style=codec.style)


def read_tools(text: str, *, style: str) -> list[Tool]:
    """The inverse of `render_tools`. Raises DataError as `tools_of_prompt`."""
    lines = text.split("\n") if text else []
    try:
        tools = [_read_json(line) if style == "json" else _Signature(line).tool() for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"these tools cannot be read back: {error}") from error
    if render_tools(tools, style=style) != text:
        raise DataError("these tools read back differ from what the prompt shows")
    return tools


def _read_json(line: str) -> Tool:
    record = json.loads(line)
    return Tool(record["name"], record["description"], record["parameters"])


class _Signature:
    """Reads one line from left to right; `at` is the next character."""

    def __init__(self, line: str):
        self.line, self.at = line, 0

    def tool(self) -> Tool:
        name = _unescaped(self._match(_NAME, "a name and its parameters")[1])
        parameters = self._object(")")
        description = self.line[self.at :]
        if description and not description.startswith(" "):
            raise ValueError(f"{description[:20]!r} follows the parameters")
        return Tool(name, description[1:], parameters)

    def _object(self, closer: str) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        required = []
        while not self.line.startswith(closer, self.at):
            if properties:
                self._expect(",")
            found = self._match(_KEY, "a key")
            key = _unescaped(found[1])
            properties[key] = self._type()
            if not found[2]:
                required.append(key)
        self._expect(closer)
        return {"type": "object", "properties": properties, "required": required}

    def _type(self) -> dict[str, Any]:
        options = [self._one_type()]
        while self.line.startswith("/", self.at):
            self.at += 1
            options.append(self._one_type())
        return options[0] if len(options) == 1 else {"anyOf": options}

    def _one_type(self) -> dict[str, Any]:
        if self.line.startswith("[", self.at):
            self.at += 1
            items = self._type()
            self._expect("]")
            return {"type": "array", "items": items}
        if self.line.startswith("{", self.at):
            self.at += 1
            return self._object("}")
        word = _WORD.match(self.line, self.at)
        if word is None:
            return {"enum": self._members()}
        self.at = word.end()
        form = {"format": word[2]} if word[2] else {}
        return form if word[1] == "any" else {"type": _TYPES[word[1]], **form}

    def _members(self) -> list[Any]:
        members = [self._member()]
        while self.line.startswith("|", self.at):
            self.at += 1
            members.append(self._member())
        return members

    def _member(self) -> Any:
        """A string opens with a space; anything else is JSON."""
        start, opened = self.at, []
        while self.at < len(self.line) and not self._ends_member(opened):
            self.at += 2 if self.line[self.at] == "\\" else 1
        text = self.line[start : self.at]
        return _unescaped(text[1:]) if text.startswith(" ") else json.loads(text)

    def _ends_member(self, opened: list[str]) -> bool:
        letter = self.line[self.at]
        if letter in _PAIRS.values():
            opened.append(letter)
        elif letter in _PAIRS:
            if not opened or opened.pop() != _PAIRS[letter]:
                return True
        elif letter == "|":
            return True
        elif letter == ",":
            return not opened and _NEXT_KEY.match(self.line, self.at) is not None
        elif letter == "/":
            return not opened and _NEXT_TYPE.match(self.line, self.at) is not None
        return False

    def _match(self, pattern: re.Pattern[str], wanted: str) -> re.Match[str]:
        found = pattern.match(self.line, self.at)
        if found is None:
            raise ValueError(f"{wanted} should stand at {self.line[self.at : self.at + 20]!r}")
        self.at = found.end()
        return found

    def _expect(self, text: str) -> None:
        if not self.line.startswith(text, self.at):
            raise ValueError(f"{text!r} should stand at {self.line[self.at : self.at + 20]!r}")
        self.at += len(text)


def _unescaped(text: str) -> str:
    return json.loads(f'"{text}"')
