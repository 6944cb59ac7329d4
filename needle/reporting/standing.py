"""Which runs belong to an experiment and how they stand: finished, running, stopped, failed, or not begun."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from needle import artifacts, cells
from needle.cells import FAILED, FINISHED, NEW, RUNNING, STOPPED
from needle.errors import DataError
from needle.experiment import Cell
from needle.reporting.collect import meets
from needle.runs import existing
from needle.scores import TrainingRun

ORDER = (FAILED, RUNNING, STOPPED, NEW, FINISHED)


@dataclass(frozen=True)
class Line:
    """One run, or one planned cell without any. `told` is why it failed, or where a run that goes on is."""

    name: str
    setting: str
    seed: str
    kind: str  # one of needle.cells.KINDS
    told: str
    steps: str
    hours: float | None
    suites: str


def runs_of(experiment: str, runs: Sequence[TrainingRun], *, root: Path) -> list[TrainingRun]:
    """The runs that `experiment=NAME` or `name=NAME` started, whatever became of them, and those of other experiments
    that its last sweep took for its cells, under its own arms' names.

    Raises:
        DataError: there is none.
    """
    found = [run for run in runs if experiment in names_of(run)]
    own = {run.record.get("identity") for run in found}
    arms = cells.arms_by_identity(Path(root) / "sweeps" / experiment / "cells.csv")
    lent = {run.record["identity"]: run for run in runs if run.finished and run.record.get("identity") in arms}
    found += [
        replace(run, config={**run.config, "arm": arms[known_as]})
        for known_as, run in lent.items()
        if known_as not in own
    ]
    if not found:
        there: dict[str, int] = {}
        for run in runs:
            for name in names_of(run)[:1]:
                there[name] = there.get(name, 0) + 1
        others = ", ".join(f"{name} ({count})" for name, count in sorted(there.items()))
        told = f"; there are runs of {others}" if others else ""
        raise DataError(
            f"exp={experiment}: no run belongs to it{told}; start it: python -m needle.sweep exp={experiment}"
        )
    return found


def names_of(run: TrainingRun) -> list[str]:
    """What a run's experiment may be called: the file that was chosen, else the run's name."""
    names = (run.record.get("choices", {}).get("experiment"), run.config.get("name"))
    return list(dict.fromkeys(str(name) for name in names if name))


def kind_of(run: TrainingRun, *, root: Path) -> str:
    """`running` is taken back where the cell's lock is free: a killed process writes no last word."""
    status = run.record.get("status")
    if status == "interrupted":
        return STOPPED
    if status != RUNNING:
        return str(status)
    lock = cells.lock_path(root, run.record.get("identity", ""))
    if lock.is_file():
        with artifacts.locked(lock, wait=False) as free:
            return STOPPED if free else RUNNING
    return RUNNING


def lines(runs: Sequence[TrainingRun], planned: Sequence[Cell], *, root: Path) -> list[Line]:
    """Every run, what is wrong or unfinished first, and the planned cells that no run is of."""
    found = [_line(run, root=root) for run in runs]
    found += [
        Line("", cell.arm, _point(cell.point), NEW, "", "", None, "")
        for cell in planned
        if not any(is_of(run, cell) for run in runs)
    ]
    return sorted(found, key=lambda one: (ORDER.index(one.kind) if one.kind in ORDER else -1, one.setting, one.seed))


def is_of(run: TrainingRun, cell: Cell) -> bool:
    """Whether a run is one of the cell: its arm, at its point of the grid."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in cell.point.items()}
    return run.config.get("arm") == cell.arm and all(meets(run, f"{key}:{text}") for key, text in texts.items())


def _point(point: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if key == "seed" else f"{key}={value}" for key, value in point.items())


def _line(run: TrainingRun, *, root: Path) -> Line:
    kind = kind_of(run, root=root)
    history = existing(run.folder).history()
    last = history[-1] if history else {}
    planned = run.config.get("trainer", {}).get("steps")
    seconds = run.facts.get("train_seconds") or last.get("time_s")
    return Line(
        name=run.folder.name,
        setting=str(run.config.get("arm") or run.record.get("choices", {}).get("loss", "")),
        seed=str(run.record.get("seed")),
        kind=kind,
        told=_told(run, kind, history, root=root),
        steps=f"{last.get('step', 0):,} of {planned:,}" if planned else "",
        hours=None if seconds is None else seconds / 3600,
        suites=", ".join(sorted(path.stem.removeprefix("final_") for path in run.folder.glob("scores/final_*.json"))),
    )


def _told(run: TrainingRun, kind: str, history: Sequence[Mapping[str, Any]], *, root: Path) -> str:
    if kind == FAILED:
        path = cells.failure_path(root, run.record.get("identity", ""))
        error = json.loads(path.read_text("utf-8"))["error"].strip() if path.is_file() else ""
        return error.splitlines()[-1] if error else "its process told no reason; see its output"
    if kind == STOPPED:
        return f"goes on with: python -m needle.train resume={run.folder}"
    if kind == RUNNING:
        losses = [line["train/loss_nats"] for line in history if "train/loss_nats" in line]
        return f"training loss {losses[-1]:.3f} nats" if losses else "no step logged yet"
    return ""
