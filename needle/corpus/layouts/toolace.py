"""ToolACE: functions in the system text, pythonic calls."""

import json
import re
from collections.abc import Mapping
from typing import Any

from needle.corpus.layouts.literals import pythonic_calls
from needle.corpus.layouts.schemas import tool
from needle.corpus.layouts.turns import drafted, first_exchange, turns
from needle.schema import Example, Tool, ToolCall, strict_json

_LIST_OF_OBJECTS = re.compile(r"\[\s*(?=\{)")
_EMPTY_LIST = re.compile(r"\[\s*\]")


def convert(record: Mapping[str, Any]) -> Example:
    """Team-ACE/ToolACE (Liu et al. 2024, https://arxiv.org/abs/2409.00920).

        {"system": "... a list of functions in JSON format that you can invoke:\\n[{\\"name\\": \\"Book Table\\",
                    \\"description\\": \\"...\\", \\"parameters\\": {\\"type\\": \\"dict\\", \\"properties\\":
                    {\\"guests\\": {\\"type\\": \\"int\\"}}, \\"required\\": [\\"guests\\"]}}] ...",
         "conversations": [{"from": "user", "value": "a table for two"},
                           {"from": "assistant", "value": "[Book Table(guests=2)]"}]}

    Only the first request and its answer are taken. An answer that opens with [ must be calls; any other text is an
    answer without calls, unless it holds one of the tools' names with a parenthesis after [, which is refused.
    """
    system = record.get("system")
    if not isinstance(system, str):
        raise ValueError("system must be the text that lists the functions")
    tools = [tool(one) for one in _functions(system)]
    query, answer = first_exchange(turns(record.get("conversations")))
    return drafted(query, tools, _calls(answer.text, tools))


def fits(record: Mapping[str, Any]) -> bool:
    system = record.get("system")
    return isinstance(system, str) and "<tools>" not in system and "conversations" in record


def _functions(system: str) -> list[Any]:
    """The first JSON list of objects in the text."""
    for match in _LIST_OF_OBJECTS.finditer(system):
        try:
            _, end = json.JSONDecoder().raw_decode(system, match.start())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the functions in the system text are not JSON: {error}") from error
        return strict_json(system[match.start() : end])
    if _EMPTY_LIST.search(system):
        return []
    raise ValueError("the system text holds no list of functions")


def _calls(text: str, tools: list[Tool]) -> list[ToolCall]:
    names = [tool.name for tool in tools]
    if text.lstrip().startswith("["):
        return pythonic_calls(text, names)
    if not text.strip():
        raise ValueError("the answer is empty")
    for name in names:
        if re.search(rf"\[\s*{re.escape(name)}\s*\(", text):
            raise ValueError(f"the answer mixes text with a call of {name!r}")
    return []
