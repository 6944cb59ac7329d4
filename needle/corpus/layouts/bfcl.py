"""The Berkeley Function-Calling Leaderboard: cases and, in a second file, their answers. For evaluation only."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from needle.corpus.layouts.files import file_records
from needle.corpus.layouts.literals import json_value
from needle.corpus.layouts.schemas import tool
from needle.corpus.layouts.turns import NOT_SINGLE_SHOT, drafted, turns
from needle.schema import BadLine, Example, Tool, ToolCall, canonical_json

ANSWERS_FOLDER = "possible_answer"
MAY_BE_LEFT_OUT = ""


def convert(record: Mapping[str, Any]) -> Example:
    """BFCL (Patil et al. 2025, https://gorilla.cs.berkeley.edu/leaderboard.html), as in the wheel bfcl-eval.

        FOLDER/NAME.json                  {"id": "case_1", "question": [[{"role": "user", "content": "2 pizzas"}]],
                                           "function": [{"name": "order", "parameters": {"type": "dict", ...}}]}
        FOLDER/possible_answer/NAME.json  {"id": "case_1", "ground_truth": [{"order": {"count": [2], "size": [""]}}]}

    `read` pairs the two by id; `ground_truth` may also stand in the case itself. Of the acceptable values of an
    argument the first that is not "" is taken; "" says that it may be left out, and where nothing else, or only null,
    is acceptable it is left out (or empty, where it is required). So an answer with another acceptable value is right
    for BFCL and not for an exact match. A case without answers is one of no call if its id says irrelevance, and
    refused otherwise.
    Examples are of split "test" and their source begins with "bfcl": they are not to be trained on. System messages
    are left away.
    """
    question = record.get("question")
    if not isinstance(question, list) or not question:
        raise ValueError("question must be a list of turns")
    if len(question) > 1:
        raise ValueError(NOT_SINGLE_SHOT)
    spoken = [turn for turn in turns(question[0]) if turn.role != "system"]
    if [turn.role for turn in spoken] != ["user"]:
        raise ValueError(f"the question is not one request: {NOT_SINGLE_SHOT}")
    if not isinstance(record.get("function"), list):
        raise ValueError("function is missing: this case is played with BFCL's own simulated tools")
    tools = [tool(one) for one in record["function"]]
    return drafted(spoken[0].text, tools, _calls(record, {one.name: one for one in tools})).replace(split="test")


def fits(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("question"), list) and ("function" in record or "involved_classes" in record)


def answers(path: Path) -> tuple[Callable[[Any], Any], list[BadLine]]:
    """What puts the possible answers of the file of cases `path` into its records, and the answers that are bad."""
    beside = path.parent / ANSWERS_FOLDER / path.name
    truths: dict[str, Any] = {}
    bad: list[BadLine] = []
    for number, value in file_records(beside) if beside.is_file() else _nothing():
        if isinstance(value, BadLine):
            bad.append(value)
        elif not isinstance(value, Mapping) or not isinstance(value.get("id"), str) or "ground_truth" not in value:
            bad.append(
                BadLine(str(beside), number, "not an answer: it needs id and ground_truth", canonical_json(value))
            )
        elif value["id"] in truths:
            bad.append(BadLine(str(beside), number, f"a second answer to {value['id']!r}", canonical_json(value)))
        else:
            truths[value["id"]] = value["ground_truth"]

    def joined(record: Any) -> Any:
        known = isinstance(record, Mapping) and isinstance(record.get("id"), str) and record["id"] in truths
        return {**record, "ground_truth": truths[record["id"]]} if known else record

    return joined, bad


def _nothing() -> Iterator[tuple[int, Any]]:
    return iter(())


def _calls(record: Mapping[str, Any], tools: Mapping[str, Tool]) -> list[ToolCall]:
    truth = record.get("ground_truth")
    if truth is None:
        if "irrelevance" in str(record.get("id", "")):
            return []
        raise ValueError(f"no possible answer is given, neither here nor in {ANSWERS_FOLDER}/")
    if not isinstance(truth, list):
        raise ValueError("ground_truth must be a list of calls")
    calls = []
    for entry in truth:
        if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(next(iter(entry.values())), Mapping):
            raise ValueError(f"{str(entry)[:80]!r} is not a call with acceptable values")
        ((name, acceptable),) = entry.items()
        schema = tools[name].parameters if name in tools else {}
        calls.append(ToolCall(name, _chosen(acceptable, schema)))
    return calls


def _chosen(acceptable: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """One value for every key that is not left out. Inside an argument that is an object, or a list of objects, keys
    have lists of acceptable values once more (BFCL's dict_checker and list_dict_checker)."""
    chosen: dict[str, Any] = {}
    for key, values in acceptable.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key!r} has no list of acceptable values")
        wanted = [value for value in values if value != MAY_BE_LEFT_OUT]
        if len(wanted) < len(values):
            wanted = [value for value in wanted if value is not None]  # null is but another way of leaving it out
        child = schema.get("properties", {}).get(key, {})
        if wanted:
            chosen[key] = json_value(_inner(wanted[0], child))
        elif key in schema.get("required", ()):
            chosen[key] = ""
    return chosen


def _inner(value: Any, schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return value
    if schema.get("type") == "object" and isinstance(value, Mapping) and _lists(value):
        return _chosen(value, schema)
    items = schema.get("items")
    if schema.get("type") == "array" and isinstance(items, Mapping) and items.get("type") == "object":
        return [_chosen(one, items) if isinstance(one, Mapping) and _lists(one) else one for one in value or ()]
    return value


def _lists(value: Mapping[str, Any]) -> bool:
    return all(isinstance(child, list) for child in value.values())
