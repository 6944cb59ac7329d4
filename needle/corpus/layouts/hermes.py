"""Hermes: <tools> in the system turn, <tool_call> in the answer."""

import re
from collections.abc import Mapping
from typing import Any

from needle.corpus.layouts.literals import any_value, listed
from needle.corpus.layouts.schemas import tool
from needle.corpus.layouts.turns import Turn, call, drafted, first_exchange, turns
from needle.schema import Example, ToolCall

_TOOLS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TAG = re.compile(r"</?tool_call>")


def convert(record: Mapping[str, Any]) -> Example:
    """NousResearch/hermes-function-calling-v1 (https://github.com/NousResearch/Hermes-Function-Calling).

        {"conversations": [
            {"from": "system", "value": "... within <tools></tools> XML tags ... <tools> [{\\"type\\": \\"function\\",
                \\"function\\": {\\"name\\": \\"dim\\", ...}}] </tools> ..."},
            {"from": "human", "value": "dim the lights"},
            {"from": "gpt", "value": "<tool_call>\\n{\\"name\\": \\"dim\\", \\"arguments\\": {}}\\n</tool_call>"}]}

    Tools and calls are JSON or Python literals ({'name': ...}); tools are a list, or objects one after another; where
    the system turn has none, a `tools` column is read. Turns may also be `messages` of role and content. Only the first
    request and its answer are taken; text around calls is left away. A record that shows no tools is not of this
    layout (the data set's JSON mode) and is refused.
    """
    conversation = turns(record["conversations"] if "conversations" in record else record.get("messages"))
    tools = [tool(one) for one in _tools(conversation, record.get("tools"))]
    query, answer = first_exchange(conversation)
    return drafted(query, tools, _calls(answer.text))


def fits(record: Mapping[str, Any]) -> bool:
    try:
        conversation = turns(record["conversations"] if "conversations" in record else record.get("messages"))
    except ValueError:
        return False
    return any(turn.role == "system" and "<tools>" in turn.text for turn in conversation)


def _tools(conversation: list[Turn], column: Any) -> list[Any]:
    # Instructions name the tags, as an empty <tools></tools>, before they use them.
    shown = [m.strip() for turn in conversation if turn.role == "system" for m in _TOOLS.findall(turn.text)]
    shown = [text for text in shown if text]
    if len(shown) > 1:
        raise ValueError("the system turn holds two lists of <tools>")
    if not shown:
        if column is None:
            raise ValueError("no system turn shows <tools>")
        return listed(column, "tools")
    try:
        value = any_value(shown[0])
    except ValueError as error:
        # Objects one after another, a line each.
        try:
            return [any_value(line) for line in shown[0].splitlines() if line.strip()]
        except ValueError:
            raise ValueError(f"<tools>: {error}") from error
    return value if isinstance(value, list) else [value]


def _calls(text: str) -> list[ToolCall]:
    written = _CALL.findall(text)
    if len(_TAG.findall(text)) != 2 * len(written):
        raise ValueError("a <tool_call> has no end, or its text holds a tag")
    if not written and not text.strip():
        raise ValueError("the answer is empty")
    try:
        return [call(any_value(one.strip())) for one in written]
    except ValueError as error:
        raise ValueError(f"<tool_call>: {error}") from error
