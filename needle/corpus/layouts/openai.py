"""OpenAI's chat format, as used for fine-tuning."""

from collections.abc import Mapping
from typing import Any

from needle.corpus.layouts import hermes
from needle.corpus.layouts.literals import listed
from needle.corpus.layouts.schemas import tool
from needle.corpus.layouts.turns import Turn, call, drafted, first_exchange, turns
from needle.schema import Example, ToolCall


def convert(record: Mapping[str, Any]) -> Example:
    """OpenAI's fine-tuning examples (https://platform.openai.com/docs/guides/fine-tuning), and the older functions.

        {"messages": [{"role": "user", "content": "wake me at 7"},
                      {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function":
                          {"name": "alarm", "arguments": "{\\"hour\\": 7}"}}]}],
         "tools": [{"type": "function", "function": {"name": "alarm", "description": "...", "parameters": {...}}}]}

    Older: `functions` beside the messages, `function_call` in them. `messages` and `tools` may be JSON texts. Only the
    first request and its answer are taken. System messages are left away: an Example has no place for them. An answer
    of `weight` 0, which is not to be learnt, is refused.
    """
    query, answer = first_exchange(turns(record.get("messages")))
    shown = record.get("tools")
    if shown is None:
        shown = record.get("functions")
    tools = [tool(one) for one in ([] if shown is None else listed(shown, "tools"))]
    return drafted(query, tools, _calls(answer))


def fits(record: Mapping[str, Any]) -> bool:
    return "messages" in record and not hermes.fits(record)


def _calls(answer: Turn) -> list[ToolCall]:
    if answer.record.get("weight") == 0:
        raise ValueError("the answer has weight 0: it is not to be learnt")
    written = [
        one.get("function") if isinstance(one, Mapping) else one for one in answer.record.get("tool_calls") or ()
    ]
    if answer.record.get("function_call"):
        written.append(answer.record["function_call"])
    if not written and not answer.text.strip():
        raise ValueError("the answer is empty")
    return [call(one) for one in written]
