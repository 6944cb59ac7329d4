"""What is wrong first with an answer: every answer gets exactly one word, so that the shares add up to one.

Metrics such as `missing_parameter_frac` speak of calls whose name is right and may all be bad at once; here an answer
counts under the first of `FAULTS` that holds of it, in the order in which a reader would stop.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from needle.metrics.matching import group_of
from needle.reporting.collect import Setting
from needle.schema import KINDS

RIGHT = "right"
# name -> meaning
FAULTS = {
    "invalid JSON": "the answer is no JSON list of calls, or was cut off",
    "abstained wrongly": "calls were wanted, none was made",
    "called wrongly": "no call was wanted, one was made",
    "number of calls": "more or fewer calls than wanted",
    "wrong name": "as many calls as wanted, not to the wanted tools in their order",
    "missing parameter": "the names are right, an argument is not there",
    "invented parameter": "the names are right, an argument is there that is not wanted",
    "wrong value": "names and arguments are right, a value is not",
}
OUTCOMES = (RIGHT, *FAULTS)
GROUPINGS = ("kind", "tools", "domain")


def outcome_of(counts: Mapping[str, int]) -> str:
    """One of `OUTCOMES`, from an example's counts (needle.metrics.matching.judge)."""
    if counts["exact"]:
        return RIGHT
    if not counts["json_valid"]:
        return "invalid JSON"
    if counts["abstained_wrongly"]:
        return "abstained wrongly"
    if counts["called_falsely"]:
        return "called wrongly"
    if counts["calls_predicted"] != counts["calls_gold"]:
        return "number of calls"
    if not counts["name"]:
        return "wrong name"
    if counts["arguments_missing"]:
        return "missing parameter"
    if counts["arguments_invented"]:
        return "invented parameter"
    return "wrong value"


def outcomes(setting: Setting) -> Counter[str]:
    """Outcome -> answers, over all seeds of a setting."""
    return Counter(outcome_of(record["counts"]) for run in setting.runs for record in run.answers.values())


def outcomes_by(setting: Setting, grouping: str) -> dict[str, Counter[str]]:
    """Group -> outcome -> answers, over all seeds. `grouping` is one of `GROUPINGS`."""
    found: dict[str, Counter[str]] = {}
    for run in setting.runs:
        for record in run.answers.values():
            found.setdefault(_group(record, grouping), Counter())[outcome_of(record["counts"])] += 1
    return found


def groups_of(settings: Sequence[Setting], grouping: str) -> list[str]:
    """The groups that occur, kinds and numbers of tools in the order in which reports give them, domains by name."""
    records = [record for setting in settings for run in setting.runs for record in run.answers.values()]
    present = {_group(record, grouping) for record in records}
    if grouping == "tools":
        return sorted(present, key=lambda name: int(name.split("-")[0].rstrip("+")))
    if grouping == "kind":
        return [kind for kind in (*KINDS, "unknown") if kind in present]
    return sorted(present)


def _group(record: Mapping[str, Any], grouping: str) -> str:
    told = {name: record.get(name) or "" for name in ("kind", "domain", "split")}
    return group_of(grouping, n_tools=record["n_tools"], **told)
