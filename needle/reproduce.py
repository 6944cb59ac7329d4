"""Runs a published experiment's cells again and says whether they agree with the published numbers.

    python -m needle.reproduce exp=001_losses dry_run=true
    python -m needle.reproduce exp=001_losses fast=true         the cells that the experiment's sweep.fast names
    python -m needle.reproduce exp=001_losses hydra/launcher=joblib hydra.launcher.n_jobs=2

What agrees is said in needle.reporting.agreement. The table is runs/reproduce/EXP/agreement.csv and .md; the exit
status is 0 when every setting agrees and 1 when one does not. Stopped, the same command goes on; cells that it has
finished are not run again. Cost: what the plan says first.
"""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.box import SIMPLE
from rich.table import Table

from needle import artifacts, config
from needle.cells import FINISHED
from needle.console import duration, show
from needle.errors import ConfigError, UserError
from needle.experiment import known_experiment
from needle.reporting.agreement import IDENTICAL, Line, agreement
from needle.reporting.published import Published, read
from needle.runs import Paths, Run
from needle.sweep import (
    Plan,
    close,
    cost_of,
    planned,
    run,
    show_cost,
    show_plan,
    write_report,
)

DISAGREES = 1
SHOWN = 6  # cells that a message names


@config.stage("reproduce")
def main(
    cfg: dict[str, Any],
    *,
    exp: str | None,
    fast: bool,
    overrides: list[str],
    retry: bool,
    dry_run: bool,
    allow_dirty: bool,
    known: list[Path],
    usd_per_hour: Annotated[float, Field(ge=0)],
    workers: Annotated[int, Field(ge=1)],
    paths: Paths,
) -> None:
    published = read(known_experiment(exp), paths.experiments)
    own = [
        f"paths.runs={json.dumps(str(paths.runs), ensure_ascii=False)}"
    ]  # this stage's file sets it, train's does not
    words = [*own, *config.path_words(cfg["_overrides_"]), *overrides]
    whole = planned(exp, words, paths=paths, allow_dirty=allow_dirty)
    plan = _fast_part(whole) if fast else whole
    check_same_settings(plan, published)
    estimate = {"known": [paths.runs, *known], "usd_per_hour": usd_per_hour, "retry": retry, "published": published}
    show_plan(plan, title=f"{plan.experiment}{', fast' if fast else ''}, again")
    _show_estimate(plan, **estimate)
    if fast:
        print(f"all {len(whole.cells)} cells: python -m needle.reproduce exp={plan.experiment}")
        _show_estimate(whole, **estimate)
    if dry_run:
        return
    plan = run(plan, retry=retry, workers=workers)
    if len(plan.of(FINISHED)) < len(plan.cells):
        close(plan)
        raise UserError("not every cell is finished, so there is nothing to compare yet; the same command goes on")
    write_report(plan)
    lines = agreement(published, read(plan.experiment, paths.runs / "sweeps"))
    _tell(lines, published, plan)
    if not all(line.agrees for line in lines):
        sys.exit(DISAGREES)


def _fast_part(plan: Plan) -> Plan:
    if not plan.sweep.fast:
        raise ConfigError(
            f"fast=true: experiment {plan.experiment} names no cells for it; add sweep.fast: ['seed:1'] to its file, "
            "or leave fast out"
        )
    return plan.only(plan.sweep.fast, key_name="sweep.fast")


def check_same_settings(plan: Plan, published: Published) -> None:
    """Raises ConfigError where cells were published with other settings than they have now, or not at all."""
    changed, absent = [], []
    for one in plan.cells:
        rows = published.cells[published.cells["arm"] == one.cell.arm]
        for key, value in one.cell.point.items():
            rows = rows[rows[key] == str(value)] if key in rows.columns else rows.iloc[:0]
        if rows.empty:
            absent.append(one.cell.name)
        elif set(rows["identity"]) != {one.identity}:
            changed.append(f"{one.cell.name} (published as {rows['identity'].iloc[0]}, now {one.identity})")
    where = published.folder / "cells.csv"
    way_out = (
        f"Go to the commit that published them ({', '.join(_commits(published))}), or publish the experiment again: "
        f"python -m needle.sweep exp={plan.experiment} publish=true"
    )
    if absent:
        raise ConfigError(f"{where} does not hold {_some(absent)}: the experiment has changed since. {way_out}")
    if changed:
        raise ConfigError(
            f"{where}: the settings or inputs of {_some(changed)} have changed since, so the numbers cannot be "
            f"compared like for like. {way_out}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more cells" if len(names) > SHOWN else "")


def _commits(published: Published) -> list[str]:
    return sorted(set(published.cells["commit"]))


def _show_estimate(
    plan: Plan, *, known: Sequence[Path], usd_per_hour: float, retry: bool, published: Published
) -> None:
    """What the cells will take by runs of this machine, and what they took where they were published."""
    show_cost(plan, cost_of(plan, known=known, retry=retry), usd_per_hour=usd_per_hour, retry=retry)
    path = published.folder / "times.json"
    if not path.is_file():
        return
    times = json.loads(path.read_text("utf-8"))
    seconds = [times["seconds_per_cell"].get(one.cell.arm) for one in plan.cells]
    if all(one is not None for one in seconds):
        processors = ", ".join(sorted({str(one["cpu"]) for one in times["hardware"]}))
        print(f"where they were published, these cells took {duration(sum(seconds))} of one worker ({processors})")


def _tell(lines: Sequence[Line], published: Published, plan: Plan) -> None:
    """The table on the screen, and as agreement.csv and agreement.md."""
    verdict = f"{plan.experiment}, run again: {_verdict(lines)}"
    folder = plan.paths.runs / plan.experiment
    artifacts.write_text_atomic(folder / "agreement.csv", _csv(lines))
    rows = [_shown(line) for line in lines]
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    table = "\n".join("| " + " | ".join(one) + " |" for one in cells)
    artifacts.write_text_atomic(folder / "agreement.md", f"# {verdict}\n\n{_provenance(published, plan)}\n\n{table}\n")
    screen = Table(box=SIMPLE)
    for name in rows[0]:
        screen.add_column(name, justify="left" if name in ("suite", "setting", "verdict") else "right")
    for row in rows:
        screen.add_row(*row.values())
    show(screen)
    print(f"{verdict}\nagreement: {folder / 'agreement.md'}")


def _verdict(lines: Sequence[Line]) -> str:
    wrong = [line for line in lines if not line.agrees]
    if wrong:
        return f"{len(wrong)} of {len(lines)} lines differ from what is published"
    if all(line.verdict == IDENTICAL for line in lines):
        return "every count is the published one"
    return "it agrees, not count for count but within the published intervals"


def _provenance(published: Published, plan: Plan) -> str:
    records = [Run(one.state.run).record for one in plan.cells if one.state.run is not None]
    commits = sorted({str(record["commit"])[:10] for record in records})
    machines = sorted({str(record["hardware"]["cpu"]) for record in records})
    return (
        f"Published from commit {', '.join(_commits(published))}; run again from commit {', '.join(commits)} on "
        f"{', '.join(machines)}, {len(plan.cells)} cells. Means and differences in {published.metrics[0]}; differences "
        "in percentage points, with the published interval."
    )


def _csv(lines: Sequence[Line]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Line)], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        values = asdict(line).items()
        writer.writerow({key: f"{value:.6f}" if isinstance(value, float) else value for key, value in values})
    return stream.getvalue()


def _shown(line: Line) -> Mapping[str, str]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}%"

    def points(value: float | None) -> str:
        return "" if value is None else f"{100 * value:+.1f}"

    interval = "" if line.ci_low is None else f" ({points(line.ci_low)} to {points(line.ci_high)})"
    return {
        "suite": line.suite,
        "setting": line.setting,
        "published": percent(line.published_mean),
        "same seeds": percent(line.same_seeds_mean),
        "rebuilt": percent(line.rebuilt_mean),
        "difference": points(line.published_difference) + interval,
        "its same seeds": points(line.same_seeds_difference),
        "its rebuilt": points(line.rebuilt_difference),
        "identical": f"{line.identical} of {line.cells}",
        "verdict": line.verdict,
    }


if __name__ == "__main__":
    main()
