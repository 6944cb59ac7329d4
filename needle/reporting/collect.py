"""Run folders -> settings: which choices differ between the runs, and which runs are seeds of the same choices."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from needle.config import LISTED
from needle.errors import ConfigError, DataError
from needle.metrics.matching import METRICS
from needle.scores import TrainingRun, read_answers, read_score, score_path

ABSENT = "-"  # the value of a setting that a run does not have
FACTORS_SHOWN = 3  # in a setting's label, unless they are unusual
GROUP_OF = {node: group for group, node in LISTED.items()}  # where the two names differ


@dataclass(frozen=True)
class ScoredRun:
    """One finished run with its score on the report's suite."""

    run: TrainingRun
    score: dict[str, Any]
    initial: dict[str, Any] | None  # the same suite before training, when it was scored
    score_file: Path

    @property
    def seed(self) -> int:
        return int(self.run.record.get("seed") or 0)

    @property
    def dirty(self) -> bool:
        return bool(self.run.record.get("dirty"))

    @property
    def commit(self) -> str:
        return str(self.run.record.get("commit") or "unknown")[:10]

    @cached_property
    def answers(self) -> dict[str, dict[str, Any]]:
        """Example id -> record of the examples file."""
        records = read_answers(self.score_file)
        by_id = {record["id"]: record for record in records}
        if len(by_id) != len(records):
            raise DataError(
                f"{self.score_file}: example ids repeat, so examples cannot be paired; give each its own id"
            )
        return by_id

    @cached_property
    def initial_answers(self) -> dict[str, dict[str, Any]]:
        if self.initial is None:
            return {}
        path = score_path(self.run.folder, checkpoint="initial", name=self.initial["suite"])
        return {record["id"]: record for record in read_answers(path)}

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl; empty when the run kept none."""
        path = self.run.folder / "history.jsonl"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed, in the order of their seeds."""

    label: str
    factors: Mapping[str, str]
    runs: tuple[ScoredRun, ...]
    is_clean: bool  # False: some run came from a dirty tree

    @property
    def parameters(self) -> int:
        return int(self.runs[0].run.facts.get("parameters") or 0)

    def by_seed(self) -> dict[int, ScoredRun]:
        return {run.seed: run for run in self.runs}


@dataclass(frozen=True)
class Collection:
    """`settings` with something to compare; `left_out` names every other run with its reason."""

    settings: tuple[Setting, ...]
    left_out: tuple[tuple[str, str], ...]


def collect(
    runs: Sequence[TrainingRun],
    *,
    suite: str,
    checkpoint: str,
    where: Sequence[str],
    ignored: Sequence[str],
    allow_dirty: bool,
) -> Collection:
    """Sorts runs into settings.

    Args:
        suite: the name of the score files to compare.
        where: conditions `group:choice` or `key:value` that a run must meet.
        ignored: keys, or beginnings of dotted keys, that make no setting of their own.
        allow_dirty: whether runs from dirty trees count with the others. Otherwise they are settings of their own.

    Raises:
        DataError: no run is left.
    """
    scored: list[ScoredRun] = []
    left_out: list[tuple[str, str]] = []
    for run in runs:
        if not all(meets(run, condition) for condition in where):
            continue
        path = score_path(run.folder, checkpoint=checkpoint, name=suite)
        score = read_score(path)
        if not run.finished:
            left_out.append((run.folder.name, f"the run is {run.record.get('status', 'not finished')}"))
        elif score is None:
            left_out.append((run.folder.name, f"not scored on {suite}; run: python -m needle.score run={run.folder}"))
        else:
            initial = read_score(score_path(run.folder, checkpoint="initial", name=suite))
            scored.append(ScoredRun(run, score, initial, path))
    if not scored:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left_out)
        raise DataError(f"there is no scored run to report on (suite={suite}, where={list(where)}){reasons}")
    factors = _factors([one.run for one in scored], ignored=ignored)
    groups: dict[tuple[Any, ...], list[ScoredRun]] = {}
    for one, values in zip(scored, factors, strict=True):
        groups.setdefault((tuple(values.items()), one.dirty and not allow_dirty), []).append(one)
    settings = []
    for (values, _), members in groups.items():
        chosen, older = _newest_of_each_seed(members)
        left_out += [(one.run.folder.name, "a newer run has the same setting and seed") for one in older]
        label = _arm(chosen) or _label(_telling(dict(values), factors), chosen[0].run)
        settings.append(Setting(label, dict(values), tuple(chosen), is_clean=not any(one.dirty for one in chosen)))
    settings = _distinct(settings)
    settings.sort(key=lambda setting: (setting.parameters, setting.label, not setting.is_clean))
    return Collection(tuple(settings), tuple(sorted(left_out)))


def meets(run: TrainingRun, condition: str) -> bool:
    """Whether a run has `group:choice`, or a configuration value `dotted.key:value`.

    Raises:
        ConfigError: the condition has no colon.
    """
    key, colon, value = condition.partition(":")
    if not colon:
        raise ConfigError(f"{condition!r} is no condition; write group:choice or key:value, such as loss:hard_label")
    if run.record.get("choices", {}).get(key) == value:
        return True
    return _leaves(run.config).get(key) == value


def _newest_of_each_seed(runs: Sequence[ScoredRun]) -> tuple[list[ScoredRun], list[ScoredRun]]:
    ordered = sorted(runs, key=lambda one: (one.run.record.get("started_utc") or "", one.run.folder.name))
    newest = {one.seed: one for one in ordered}
    return [newest[seed] for seed in sorted(newest)], [one for one in ordered if newest[one.seed] is not one]


def _factors(runs: Sequence[TrainingRun], *, ignored: Sequence[str]) -> list[dict[str, str]]:
    """For every run the values that tell it from the others: a group's choice where choices differ, and single values
    where they differ among runs of one choice."""
    leaves = [_without(_leaves(run.config), ignored) for run in runs]
    keys = sorted({key for one in leaves for key in one})
    differing = [key for key in keys if len({one.get(key, ABSENT) for one in leaves}) > 1]
    choices = [run.record.get("choices", {}) for run in runs]
    names: list[str] = []
    for key in differing:
        group = GROUP_OF.get(key.split(".")[0], key.split(".")[0])
        chosen = [one.get(group, ABSENT) for one in choices]
        if len(set(chosen)) > 1 and group not in names:
            names.append(group)
        within: dict[str, set[str]] = {}
        for choice, one in zip(chosen, leaves, strict=True):
            within.setdefault(choice, set()).add(one.get(key, ABSENT))
        if any(len(values) > 1 for values in within.values()):
            names.append(key)
    return [
        {name: choice[name] if name in choice else one.get(name, ABSENT) for name in names}
        for choice, one in zip(choices, leaves, strict=True)
    ]


def _arm(runs: Sequence[ScoredRun]) -> str | None:
    """The name that an experiment gave to the setting, where all of its runs carry one."""
    names = {one.run.config.get("arm") for one in runs}
    return names.pop() if len(names) == 1 else None


def _distinct(settings: Sequence[Setting]) -> list[Setting]:
    """Settings of one label, such as an arm that a grid runs with two students, get what tells them apart beside it."""
    found = []
    for setting in settings:
        same = [other for other in settings if (other.label, other.is_clean) == (setting.label, setting.is_clean)]
        telling = [name for name in setting.factors if len({other.factors[name] for other in same}) > 1]
        label = ", ".join([setting.label, *(f"{name}={setting.factors[name]}" for name in telling)])
        found.append(replace(setting, label=label))
    return found


def _telling(values: Mapping[str, str], factors: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What a label says of a setting's values: all of a few; of many the loss and those that are not the usual ones."""
    if len(values) <= FACTORS_SHOWN:
        return dict(values)
    usual = {name: Counter(one[name] for one in factors).most_common(1)[0][0] for name in values}
    return {name: value for name, value in values.items() if name == "loss" or value not in (usual[name], ABSENT)}


def _label(factors: Mapping[str, str], run: TrainingRun) -> str:
    if not factors:
        factors = {key: run.record.get("choices", {}).get(key, ABSENT) for key in ("loss", "student")}
    return ", ".join(f"{name}={value}" for name, value in factors.items())


def _leaves(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text; lists are one value."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if not prefix and str(key).startswith("_"):
            continue
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{name}.")
        else:
            found[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def _without(leaves: Mapping[str, str], ignored: Sequence[str]) -> dict[str, str]:
    return {
        key: value
        for key, value in leaves.items()
        if not any(key == name or key.startswith(f"{name}.") for name in ignored)
    }


def check_metrics(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ConfigError(f"metrics: {unknown[0]!r} is not one of {', '.join(METRICS)}")
