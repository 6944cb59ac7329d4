"""Students' answers as one table, a line an answer: from run folders that are scored, or from students asked here.

Columns: setting, seed, id, kind, domain, n_tools, tools and words (ranges), query, gold, calls, confidence (0 to 1),
outcome (needle.reporting.faults), exact, wanted and called (whether calls were wanted and made; an answer that is no
list of calls counts as made).
Cost: reading is instant; a nano student answers five to ten requests a second on one core.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from needle.errors import DataError
from needle.metrics.matching import _pairs, group_of, judge, values_equal
from needle.reporting.faults import FAULTS, OUTCOMES, outcome_of
from needle.schema import KINDS, Example, ToolCall
from needle.scores import TrainingRun, read_answers, read_score, score_path

# Ranges of a request's length in words: the longest of each, and its name.
WORD_RANGES = ((5, "1-5"), (10, "6-10"), (20, "11-20"), (40, "21-40"))
LONGER = "41+"
ORDERS = {
    "kind": (*KINDS, "unknown"),
    "tools": ("0", "1", "2-4", "5-8", "9-16", "17+"),
    "words": (*(name for _, name in WORD_RANGES), LONGER),
}
# What may be wrong with a value whose parameter is right: name -> meaning. The first that holds.
VALUE_FAULTS = {
    "case or punctuation": "right but for case, or punctuation at its ends",
    "too long": "the wanted words and more around them",
    "too short": "only some of the wanted words",
    "other words": "other words of the request",
    "not in the request": "a text that the request does not hold, or another choice of a closed list",
    "other number": "another number",
    "true or false": "true in place of false, or the other way round",
    "other type": "a list, an object, or a value of another type",
}


def of_runs(runs: Sequence[TrainingRun], *, suite: str, checkpoint: str) -> pd.DataFrame:
    """The answers of scored runs; a run's setting is its arm, or its loss where it has none.

    Raises:
        DataError: no run is scored on the suite.
    """
    lines = []
    for run in runs:
        path = score_path(run.folder, checkpoint=checkpoint, name=suite)
        if read_score(path) is None:
            continue
        setting = str(run.config.get("arm") or run.record.get("choices", {}).get("loss", run.folder.name))
        lines += [_line(record, setting, int(run.record.get("seed") or 0)) for record in read_answers(path)]
    if not lines:
        raise DataError(f"none of {len(runs)} runs is scored on {suite}; run: python -m needle.score suites=[{suite}]")
    return pd.DataFrame(lines)


def live(
    students: Mapping[str, Path],
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_calls: int,
) -> pd.DataFrame:
    """The answers of students' folders, asked here under the grammar, by name of setting.

    Raises:
        DataError: a folder holds no student.
    """
    from needle.decode import Decoder
    from needle.student import load

    lines = []
    for setting, folder in students.items():
        model, codec = load(Path(folder))
        decoder = Decoder(model, codec, constrained=True, max_new_tokens=max_new_tokens, max_calls=max_calls)
        order = sorted(examples, key=lambda one: len(str(one.tools)))  # like lengths together: less padding
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers = decoder.decode([(one.query, one.tools) for one in batch])
            lines += [
                _line(_record(one, answer.calls, answer.confidence), setting, 0)
                for one, answer in zip(batch, answers, strict=True)
            ]
    return pd.DataFrame(lines)


def _record(example: Example, calls: Sequence[ToolCall] | None, confidence: float | None) -> dict[str, Any]:
    """As a line of a score's examples file has it."""
    return {
        **{name: getattr(example, name) for name in ("id", "kind", "domain", "split", "query")},
        "n_tools": len(example.tools),
        "gold": [asdict(call) for call in example.calls],
        "calls": None if calls is None else [asdict(call) for call in calls],
        "confidence": confidence,
        "counts": judge(calls, example.calls, example.tools),
    }


def _line(record: Mapping[str, Any], setting: str, seed: int) -> dict[str, Any]:
    told = {name: record.get(name) or "" for name in ("kind", "domain", "split")}
    groups = {group: group_of(group, n_tools=record["n_tools"], **told) for group in ("kind", "domain", "tools")}
    length = len(record["query"].split())
    return {
        "setting": setting,
        "seed": seed,
        "id": record["id"],
        **groups,
        "n_tools": record["n_tools"],
        "words": next((name for most, name in WORD_RANGES if length <= most), LONGER),
        "query": record["query"],
        "gold": record["gold"],
        "calls": record["calls"],
        "confidence": float(record.get("confidence") or 0.0),
        "outcome": outcome_of(record["counts"]),
        "exact": bool(record["counts"]["exact"]),
        "wanted": bool(record["gold"]),
        "called": record["calls"] is None or bool(record["calls"]),
    }


def shares(answers: pd.DataFrame, group: str) -> pd.DataFrame:
    """Percent of each outcome for every setting and value of `group` (a column), all seeds together, with `n`."""
    counts = answers.groupby(["setting", group, "outcome"], sort=False).size().unstack(fill_value=0)
    counts = counts.reindex(columns=list(OUTCOMES), fill_value=0)
    found = (100 * counts.div(counts.sum(axis=1), axis=0)).assign(n=counts.sum(axis=1))
    order = [name for name in ORDERS.get(group, sorted(answers[group].unique())) if name in set(answers[group])]
    settings = list(dict.fromkeys(answers["setting"]))
    return found.reindex([(one, name) for one in settings for name in order if (one, name) in found.index])


def abstention(answers: pd.DataFrame) -> pd.DataFrame:
    """For every setting how often it called where calls were wanted and where none was, in percent of such requests."""
    lines = {}
    for setting, some in answers.groupby("setting", sort=False):
        wanted, empty = some[some["wanted"]], some[~some["wanted"]]
        lines[setting] = {
            "calls wanted": len(wanted),
            "of them called": 100 * wanted["called"].mean(),
            "none wanted": len(empty),
            "of them left alone": 100 * (1 - empty["called"].mean()) if len(empty) else float("nan"),
        }
    return pd.DataFrame(lines).T


def wrong_values(answers: pd.DataFrame) -> pd.DataFrame:
    """A line for each wrong value of a call and parameter that are right: setting, parameter, wanted, given, fault (of
    VALUE_FAULTS), query."""
    lines = []
    columns = answers[["setting", "query", "gold", "calls"]]
    for setting, query, gold, calls in columns.itertuples(index=False, name=None):
        for parameter, wanted, given in _wrong(gold, calls or []):
            fault = value_fault(wanted, given, query)
            lines.append((setting, parameter, json.dumps(wanted), json.dumps(given), fault, query))
    return pd.DataFrame(lines, columns=["setting", "parameter", "wanted", "given", "fault", "query"])


def _wrong(gold: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any, Any]]:
    ours, theirs = ([ToolCall.from_dict(call) for call in some] for some in (calls, gold))
    for one, other in _pairs(ours, theirs):
        for key, wanted in other.arguments.items():
            if key in one.arguments and not values_equal(one.arguments[key], wanted):
                yield key, wanted, one.arguments[key]


def value_fault(wanted: Any, given: Any, query: str) -> str:
    """One of VALUE_FAULTS, of a value that is not the wanted one."""
    if isinstance(wanted, bool) and isinstance(given, bool):
        return "true or false"
    if isinstance(wanted, str) and isinstance(given, str):
        if values_equal(wanted, given, lenient=True):
            return "case or punctuation"
        theirs, ours, request = (f" {' '.join(text.casefold().split())} " for text in (wanted, given, query))
        if theirs.strip() in ours:
            return "too long"
        if ours.strip() and ours.strip() in theirs:
            return "too short"
        return "other words" if ours.strip() and ours.strip() in request else "not in the request"
    if any(isinstance(one, bool) for one in (wanted, given)):
        return "other type"
    return "other number" if all(isinstance(one, int | float) for one in (wanted, given)) else "other type"


def value_fault_shares(wrong: pd.DataFrame) -> pd.DataFrame:
    """Percent of each fault of a setting's wrong values, with `n`."""
    found = {name: Counter(some["fault"]) for name, some in wrong.groupby("setting", sort=False)}
    lines = [[count[fault] for fault in VALUE_FAULTS] for count in found.values()]
    counts = pd.DataFrame(lines, index=list(found), columns=list(VALUE_FAULTS))
    return (100 * counts.div(counts.sum(axis=1), axis=0)).assign(n=counts.sum(axis=1))


def sure_and_wrong(answers: pd.DataFrame, *, count: int) -> pd.DataFrame:
    """The wrong answers that a student was surest of, the surest first, an example once."""
    wrong = answers[~answers["exact"]].sort_values(["confidence", "id"], ascending=[False, True], kind="stable")
    shown = wrong.drop_duplicates("id").head(count)
    texts = {name: [json.dumps(value, ensure_ascii=False) for value in shown[name]] for name in ("gold", "calls")}
    columns = ["confidence", "outcome", "query", "gold", "calls"]
    return pd.DataFrame(shown.assign(**texts), columns=columns).reset_index(drop=True)


def changed(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Examples counted by whether they were right before and after, both answered once.

    Raises:
        DataError: the two are not of the same examples.
    """
    pairs = pd.concat([one.set_index("id")["exact"] for one in (before, after)], axis=1, keys=["before", "after"])
    if len(pairs) != len(before) or len(pairs) != len(after) or pairs.isna().any(axis=None):
        raise DataError("before and after are answers to different requests, or to one several times")
    table = pd.crosstab(pairs["before"].astype(bool), pairs["after"].astype(bool))
    table = table.reindex(index=[False, True], columns=[False, True], fill_value=0)
    return table.rename_axis(index="right before", columns="right after")


def meanings() -> pd.DataFrame:
    """What the words of `outcome` and `fault` mean."""
    told = [("outcome", *item) for item in FAULTS.items()] + [("value", *item) for item in VALUE_FAULTS.items()]
    return pd.DataFrame(told, columns=["of", "word", "meaning"]).set_index(["of", "word"])
