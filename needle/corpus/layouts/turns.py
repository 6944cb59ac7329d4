"""Conversations cut to one request and its answer, and what every converter returns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from needle.corpus.layouts.literals import any_value
from needle.schema import Example, Tool, ToolCall, kind_of_calls

NOT_SINGLE_SHOT = "later turns are not single-shot"
_ROLES = {
    "user": "user human",
    "assistant": "assistant gpt model",
    "system": "system developer",
    "tool": "tool function observation function_response tool_response ipython",
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words.split()}


@dataclass(frozen=True, slots=True)
class Turn:
    """`role`: user, assistant, system or tool. `record`: the turn as recorded."""

    role: str
    text: str
    record: Mapping[str, Any]


def turns(conversation: Any) -> list[Turn]:
    """Turns of `{"from", "value"}` or `{"role", "content"}`, where content may be a list of texts as OpenAI's.

    Raises:
        ValueError: not a list of turns, an unknown role, or content that is not text.
    """
    if isinstance(conversation, str):
        conversation = any_value(conversation)
    if not isinstance(conversation, list) or not all(isinstance(turn, Mapping) for turn in conversation):
        raise ValueError("a conversation must be a list of objects")
    return [_turn(record) for record in conversation]


def first_exchange(conversation: Sequence[Turn]) -> tuple[str, Turn]:
    """The first request and the assistant's turn that answers it, if nothing came before. Whatever comes later, calls
    with their results included, is left away.

    Raises:
        ValueError: the conversation does not begin so.
    """
    spoken = [turn for turn in conversation if turn.role != "system"]
    if not spoken or [turn.role for turn in spoken] == ["user"]:
        raise ValueError("no assistant turn answers a request")
    if spoken[0].role != "user":
        raise ValueError(f"begins with a turn of the {spoken[0].role}: {NOT_SINGLE_SHOT}")
    if spoken[1].role != "assistant":
        raise ValueError(f"the first request is followed by a turn of the {spoken[1].role}: {NOT_SINGLE_SHOT}")
    return spoken[0].text, spoken[1]


def drafted(query: Any, tools: Iterable[Tool], calls: Iterable[ToolCall]) -> Example:
    """An example with its kind inferred; identity and source are given by `read`.

    Raises:
        ValueError: the query is missing or empty.
    """
    if not isinstance(query, str) or not query.strip():
        raise ValueError("query is missing or empty")
    tools, calls = tuple(tools), tuple(calls)
    return Example("", query, tools, calls, inferred_kind(tools, calls), teacher="recorded")


def inferred_kind(tools: Sequence[Tool], calls: Sequence[ToolCall]) -> str:
    """none and no_tools: no call, with and without tools; repeat: several calls of one tool; multi: of several."""
    return "no_tools" if not calls and not tools else kind_of_calls(calls)


def call(record: Any) -> ToolCall:
    """`{"name", "arguments"}` with arguments as an object or its JSON; an empty text means none.

    Raises:
        ValueError: not a call.
    """
    if isinstance(record, Mapping) and isinstance(record.get("arguments"), str):
        text = record["arguments"].strip()
        try:
            record = {**record, "arguments": any_value(text) if text else {}}
        except ValueError as error:
            raise ValueError(f"call of {record.get('name')!r}: arguments: {error}") from error
    return ToolCall.from_dict(record)


def _turn(record: Mapping[str, Any]) -> Turn:
    word = record.get("from", record.get("role"))
    role = _ROLE_OF.get(word) if isinstance(word, str) else None
    if role is None:
        raise ValueError(f"the role {word!r} of a turn is not known")
    content = record.get("value", record.get("content"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"a turn of the {role} holds more than text")
        content = "".join(parts)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"a turn of the {role} must be text, not {type(content).__name__}")
    return Turn(role, content or "", record)
