"""An experiment's leaderboard, learning curves, budgets and errors, as one local page or in W&B.

    python -m needle.dashboard exp=001_losses               from run folders: runs/dashboard/001_losses.html
    python -m needle.dashboard exp=001_losses mode=online   a workspace and a report over the runs of its W&B group
    python -m needle.dashboard exp=001_losses suite=unseen where=[seed:1]

The page needs no network and nothing beside itself. An experiment that is half finished is shown as it is. What was
saved online is remembered in runs/dashboard/EXP.wandb.json, so that saving again replaces it.
Cost: seconds, and half a second for each setting's bootstrap intervals.
"""

import os
import shlex
import sys
import webbrowser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from needle import artifacts, config
from needle.errors import ConfigError, DataError
from needle.experiment import Cell, Sweep, cells_of
from needle.report import main as report_stage
from needle.report import method
from needle.reporting import board, page, standing, workspace
from needle.reporting.board import Board
from needle.reporting.collect import check_metrics, collect, meets
from needle.reporting.compare import compare, equality, notices
from needle.reporting.views import View, views
from needle.runs import EXECUTION, Paths
from needle.scores import TrainingRun, select_runs, suite_name


@config.stage("dashboard")
def main(
    cfg: dict[str, Any],
    *,
    exp: str | None,
    mode: Literal["offline", "online"],
    show: bool,
    runs: str | list[str] | None,
    where: list[str],
    suite: str | None,
    metrics: Annotated[list[str], Field(min_length=1)],
    faults: Annotated[list[str], Field(min_length=1)],
    report: list[str],
    examples: Annotated[int, Field(ge=0)],
    output: Path,
    project: str | None,
    entity: str | None,
    paths: Paths,
) -> None:
    check_metrics([*metrics, *faults])
    sweep = _sweep(exp)
    there = _training_runs(runs, paths.runs)
    if exp is None:
        names = sorted({name for run in there for name in standing.names_of(run)[:1]})
        raise ConfigError(f"exp is not set: give exp=NAME; there are runs of {', '.join(names) or 'nothing yet'}")
    mine = [
        run
        for run in standing.runs_of(exp, there, root=paths.runs)
        if all(meets(run, condition) for condition in where)
    ]
    suite = suite or _usual_suite(mine)
    shown = views(suite=suite, metrics=metrics, faults=faults)
    if mode == "online":
        place = workspace.place_of(mine, exp=exp, project=project, entity=entity)
        question = (sweep.question or "") if sweep else ""
        saved = workspace.save(shown, place, question=question, remembered=Path(output) / f"{exp}.wandb.json")
        for name, url in saved.items():
            print(f"{name}: {url}")
        return
    lines = standing.lines(mine, [] if where or runs else _planned(sweep), root=paths.runs)
    made = _board(exp, sweep, mine, shown, lines, suite=suite, metrics=[*metrics, *faults], report_overrides=report)
    command = shlex.join(["python", "-m", "needle.dashboard", *cfg["_overrides_"]])
    raw = terminal_commands(mine)
    target = Path(output) / f"{exp}.html"
    artifacts.write_text_atomic(target, board.write(made, examples=examples, command=command, raw=raw))
    print(page.verdict(made.headline))
    for notice in (board.told(lines), *made.notices):
        if notice:
            print(f"  {notice}")
    print(f"dashboard: {target}")
    for line in raw:
        print(f"  {line}")
    if show and has_display():
        webbrowser.open(target.resolve().as_uri())


def _sweep(exp: str | None) -> Sweep | None:
    """What the experiment's file says now; None where there is none."""
    if exp is None or not (config.CONF / "experiment" / f"{exp}.yaml").is_file():
        return None
    cfg, _ = config.compose("train", [f"experiment={exp}"])
    return config.build(cfg.sweep)


def _planned(sweep: Sweep | None) -> list[Cell]:
    return cells_of(sweep) if sweep is not None and sweep.arms else []


def _training_runs(wanted: str | list[str] | None, root: Path) -> list[TrainingRun]:
    """Every run, finished or not.

    Raises:
        DataError: there is none.
    """
    if wanted is None and not any(Path(root).glob("train/*/run.json")):
        raise DataError(f"no training run under {Path(root) / 'train'}; start some: python -m needle.sweep exp=NAME")
    return select_runs(wanted if wanted is not None else str(Path(root) / "train" / "*"), root=root)


def _usual_suite(runs: Sequence[TrainingRun]) -> str:
    """The suite that most runs are scored on; of several the one that the runs name first, which is an experiment's
    headline.

    Raises:
        DataError: no run is scored.
    """
    counts = Counter(name for run in runs for name in _suites(run))
    if not counts:
        finished = [run.folder for run in runs if run.finished]
        states = Counter(str(run.record.get("status")) for run in runs)
        told = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none that meet `where`"
        way_out = (
            f"score the finished ones: python -m needle.score 'run={finished[0].parent}/*'"
            if finished
            else ("wait for the first to finish; `wandb leet RUN/wandb` shows curves meanwhile")
        )
        raise DataError(f"no run of it is scored yet ({told}); {way_out}")
    named = [suite_name(name) for run in runs for name in run.config.get("suites") or ()]
    return min(counts, key=lambda name: (-counts[name], named.index(name) if name in named else len(named), name))


def _suites(run: TrainingRun) -> list[str]:
    return sorted(path.stem.removeprefix("final_") for path in run.folder.glob("scores/final_*.json"))


def _board(
    exp: str,
    sweep: Sweep | None,
    runs: Sequence[TrainingRun],
    shown: tuple[View, ...],
    lines: Sequence[standing.Line],
    *,
    suite: str,
    metrics: Sequence[str],
    report_overrides: Sequence[str],
) -> Board:
    cfg, runtime = config.compose("report", [*(sweep.report if sweep else ()), *report_overrides])
    _, same = config.prepared(cfg, report_stage.stage_function, runtime=runtime)  # type: ignore[attr-defined]
    collection = collect(
        runs,
        suite=suite,
        checkpoint="final",
        where=[],
        ignored=[*same["ignored"], *EXECUTION],
        allow_dirty=same["allow_dirty"],
    )
    rows = compare(collection.settings, metrics=metrics, baseline=same["baseline"], bootstrap=same["bootstrap"])
    tolerance = {"tokens_tolerance_frac": same["tokens_tolerance_frac"]}
    return Board(
        experiment=exp,
        question=(sweep.question or "").strip() if sweep else "",
        suite=suite,
        other_suites=tuple(sorted({name for run in runs for name in _suites(run)} - {suite})),
        collection=collection,
        rows=tuple(rows),
        views=shown,
        standing=tuple(lines),
        notices=tuple(dict.fromkeys(notices(collection.settings, rows, baseline=same["baseline"], **tolerance))),
        equality=equality(collection.settings, **tolerance),
        method=method(same["bootstrap"]),
    )


def terminal_commands(runs: Sequence[TrainingRun]) -> list[str]:
    """What opens the newest run that W&B keeps offline in a terminal, and what sends all of them."""
    folders = sorted(path for run in runs for path in run.folder.glob("wandb/offline-run-*") if path.is_dir())
    if not folders:
        return []
    newest = max(folders, key=lambda path: path.name)
    parents = sorted({str(path.parent.parent.parent) for path in folders})
    everything = " ".join(f"{shlex.quote(parent)}/*/wandb/offline-run-*" for parent in parents)
    return [f"wandb leet {shlex.quote(str(newest))}", f"wandb sync {everything}"]


def has_display() -> bool:
    """Whether a browser would be seen: on X11 and Wayland a variable says so, elsewhere there is a desktop."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


if __name__ == "__main__":
    main()
