"""What it means for calls to be right: plain functions that turn one answer into counts, and counts into fractions.

Every metric is a ratio of two counts summed over examples (`METRICS`), so a report can resample examples and compute it
again. A ratio whose denominator is 0 is None: undefined, neither 0 nor 1.

Equality of values. Numbers are equal when they are numerically (1 and 1.0); true and false are no numbers. Strings are
equal when they are after Unicode NFC and without surrounding whitespace, case-sensitive; leniently, also without regard
to case and to punctuation at either end. Lists are ordered, objects are not. null equals null only. A call is right
when its name and all its arguments are: an argument more or less makes it wrong.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from needle.schema import Tool, ToolCall, call_problems

MATCHING_VERSION = 1

# name -> (numerator, denominator), both sums over examples of what `judge` counts
METRICS: dict[str, tuple[str, str]] = {
    # Whole answers. An answer that is no JSON is wrong in each; an empty answer is right where no call is wanted.
    "call_exact_frac": ("exact", "examples"),  # the right calls in the right order
    "call_exact_unordered_frac": ("exact_unordered", "examples"),  # the right calls in any order
    "name_frac": ("name", "examples"),  # the right names in the right order, whatever the arguments
    # Whole calls, matched as multisets within an example and summed over examples (micro average).
    "call_precision_frac": ("calls_right", "calls_predicted"),
    "call_recall_frac": ("calls_right", "calls_gold"),
    "call_f1_frac": ("calls_right_twice", "calls_both"),
    # Arguments of name-matched calls: see `_pairs`. wrong values = 1 - value_frac - missing_parameter_frac.
    "value_frac": ("values_right", "arguments_gold"),  # gold arguments that are there with an equal value
    "value_lenient_frac": ("values_right_lenient", "arguments_gold"),
    "missing_parameter_frac": ("arguments_missing", "arguments_gold"),  # gold arguments that are not there
    "invented_parameter_frac": ("arguments_invented", "arguments_predicted"),  # arguments that gold does not have
    # Form.
    "invented_tool_frac": ("calls_of_unknown_tools", "calls_predicted"),  # names that are not among the example's tools
    "json_valid_frac": ("json_valid", "examples"),  # a JSON list of {"name", "arguments"}
    "schema_valid_frac": ("schema_valid", "examples"),  # and every call satisfies its tool's JSON Schema
    # Empty answers. An answer that is no JSON is not empty.
    "abstain_precision_frac": ("abstained_rightly", "abstained"),  # of the empty answers, those where no call is wanted
    "abstain_recall_frac": ("abstained_rightly", "gold_empty"),  # of the requests for no call, those answered so
    "false_call_frac": ("called_falsely", "gold_empty"),  # of the requests for no call, those answered with one
    "false_abstain_frac": ("abstained_wrongly", "gold_calls"),  # of the requests for calls, those answered with none
}
COUNTS = tuple(sorted({count for pair in METRICS.values() for count in pair}))
GROUPS = ("kind", "tools", "domain", "seen")
_TOOL_BUCKETS = ((0, "0"), (1, "1"), (4, "2-4"), (8, "5-8"), (16, "9-16"))


def parse(text: str) -> list[ToolCall] | None:
    """The calls of a JSON text, or None when it is not a list of `{"name", "arguments"?}` in strict JSON (no NaN)."""
    try:
        records = json.loads(text, parse_constant=_refuse)
        return [ToolCall.from_dict(record) for record in records] if isinstance(records, list) else None
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def value_key(value: Any, *, lenient: bool = False) -> Hashable:
    """Two JSON values are equal, as this module means it, exactly when their keys are."""
    if isinstance(value, bool) or value is None:
        return ("constant", value)
    if isinstance(value, int | float):
        return ("number", value)
    if isinstance(value, str):
        return ("string", _plain(value, lenient=lenient))
    if isinstance(value, Mapping):
        return ("object", frozenset((key, value_key(child, lenient=lenient)) for key, child in value.items()))
    if isinstance(value, list | tuple):
        return ("list", tuple(value_key(child, lenient=lenient) for child in value))
    raise TypeError(f"not a JSON value: {type(value).__name__}")


def values_equal(left: Any, right: Any, *, lenient: bool = False) -> bool:
    return value_key(left, lenient=lenient) == value_key(right, lenient=lenient)


def _plain(text: str, *, lenient: bool) -> str:
    text = unicodedata.normalize("NFC", text).strip()
    if not lenient:
        return text
    text = unicodedata.normalize("NFC", text.casefold())
    start, end = 0, len(text)
    while start < end and _is_edge(text[start]):
        start += 1
    while end > start and _is_edge(text[end - 1]):
        end -= 1
    return text[start:end] or text  # punctuation alone stays what it is


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def call_key(call: ToolCall) -> Hashable:
    return (call.name, value_key(call.arguments))


def judge(predicted: Sequence[ToolCall] | None, gold: Sequence[ToolCall], tools: Sequence[Tool]) -> dict[str, int]:
    """The counts of one example, one for each of `COUNTS`.

    Args:
        predicted: the answer's calls in order; None when the answer was no list of calls.
        gold: the right calls in order, possibly none.
        tools: the tools that the request showed.
    """
    counts = dict.fromkeys(COUNTS, 0)
    counts["examples"] = 1
    counts["calls_gold"] = counts["calls_both"] = len(gold)
    counts["gold_calls" if gold else "gold_empty"] = 1
    if predicted is None:
        return counts
    by_name = {tool.name: tool for tool in tools}
    predicted_keys, gold_keys = [call_key(call) for call in predicted], [call_key(call) for call in gold]
    right = (Counter(predicted_keys) & Counter(gold_keys)).total()
    counts["json_valid"] = 1
    counts["schema_valid"] = int(not any(call_problems(call, by_name) for call in predicted))
    counts["exact"] = int(predicted_keys == gold_keys)
    counts["exact_unordered"] = int(right == len(gold) == len(predicted))
    counts["name"] = int([call.name for call in predicted] == [call.name for call in gold])
    counts["calls_right"], counts["calls_right_twice"] = right, 2 * right
    counts["calls_predicted"] = len(predicted)
    counts["calls_both"] += len(predicted)
    counts["calls_of_unknown_tools"] = sum(call.name not in by_name for call in predicted)
    if not predicted:
        counts["abstained"] = 1
        counts["abstained_wrongly" if gold else "abstained_rightly"] = 1
    elif not gold:
        counts["called_falsely"] = 1
    for ours, theirs in _pairs(predicted, gold):
        shared = ours.arguments.keys() & theirs.arguments.keys()
        counts["arguments_gold"] += len(theirs.arguments)
        counts["arguments_predicted"] += len(ours.arguments)
        counts["arguments_missing"] += len(theirs.arguments) - len(shared)
        counts["arguments_invented"] += len(ours.arguments) - len(shared)
        counts["values_right"] += _equal_values(ours, theirs)
        counts["values_right_lenient"] += _equal_values(ours, theirs, lenient=True)
    return counts


def _equal_values(ours: ToolCall, theirs: ToolCall, *, lenient: bool = False) -> int:
    return sum(
        key in ours.arguments and values_equal(ours.arguments[key], value, lenient=lenient)
        for key, value in theirs.arguments.items()
    )


def _pairs(predicted: Sequence[ToolCall], gold: Sequence[ToolCall]) -> list[tuple[ToolCall, ToolCall]]:
    """(predicted, gold) pairs of calls of one name, each call in one pair at most, whatever the order of the calls.

    Of a name's possible pairings the one is taken with the most equal values, then the most shared parameters, then the
    fewest others. Calls left over when one side has more of a name are in no pair: precision and recall count them.
    """
    pairs = []
    for name in dict.fromkeys(call.name for call in gold):
        ours = [call for call in predicted if call.name == name]
        theirs = [call for call in gold if call.name == name]
        if len(ours) == len(theirs) == 1:
            pairs.append((ours[0], theirs[0]))
        elif ours:
            worth = np.array([[_worth(one, other, scale=_scale(ours, theirs)) for other in theirs] for one in ours])
            rows, columns = linear_sum_assignment(worth, maximize=True)
            pairs += [(ours[row], theirs[column]) for row, column in zip(rows, columns, strict=True)]
    return pairs


def _scale(ours: Sequence[ToolCall], theirs: Sequence[ToolCall]) -> int:
    """More than all arguments together, so that a sum of worths compares like a tuple of sums."""
    return 1 + sum(len(call.arguments) for call in (*ours, *theirs))


def _worth(ours: ToolCall, theirs: ToolCall, *, scale: int) -> int:
    shared = len(ours.arguments.keys() & theirs.arguments.keys())
    other = len(ours.arguments) + len(theirs.arguments) - 2 * shared
    return (_equal_values(ours, theirs) * scale + shared) * scale - other


def fractions(counts: Iterable[Mapping[str, int]]) -> dict[str, float | None]:
    """Every metric of `METRICS` over examples judged one by one."""
    totals: Counter[str] = Counter()
    for one in counts:
        totals.update(one)
    return {name: totals[above] / totals[below] if totals[below] else None for name, (above, below) in METRICS.items()}


def group_of(group: str, *, kind: str, n_tools: int, domain: str, split: str) -> str:
    """Where an example belongs in one of `GROUPS`: its kind, a range of tools shown, its domain, or whether training
    saw that domain (`unseen` when its split is the unseen one, `seen` for other splits, `unknown` without a split)."""
    if group == "kind":
        return kind or "unknown"
    if group == "tools":
        return next((label for most, label in _TOOL_BUCKETS if n_tools <= most), "17+")
    if group == "domain":
        return domain or "unknown"
    if group == "seen":
        return "unknown" if not split else "unseen" if split == "unseen" else "seen"
    raise ValueError(f"group {group!r} is not one of {', '.join(GROUPS)}")
