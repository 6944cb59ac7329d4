"""The views of needle.reporting.views as one HTML page that needs nothing but itself: figures, styles and the few lines
of script for sorting and hiding are in it, and everything that comes from data is escaped."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from needle.budgets import budgets
from needle.cells import FINISHED, KINDS
from needle.reporting import board_figures, page, tables
from needle.reporting.board_figures import against, curves, faults, render, swatch, worth_drawing
from needle.reporting.collect import Collection, Setting
from needle.reporting.compare import Row
from needle.reporting.faults import FAULTS, GROUPINGS, OUTCOMES, RIGHT, groups_of, outcomes_by
from needle.reporting.standing import Line
from needle.reporting.views import BUDGETS, View


@dataclass(frozen=True)
class Board:
    """What the page is made of.

    `rows`: of every setting and metric, the headline metric first. `standing`: the experiment's runs and planned cells.
    """

    experiment: str
    question: str
    suite: str
    other_suites: tuple[str, ...]
    collection: Collection
    rows: tuple[Row, ...]
    views: tuple[View, ...]
    standing: tuple[Line, ...]
    notices: tuple[str, ...]
    equality: str
    method: str

    @property
    def settings(self) -> tuple[Setting, ...]:
        return self.collection.settings

    @property
    def headline(self) -> list[Row]:
        return [row for row in self.rows if row.metric == self.rows[0].metric]

    @property
    def by_metric(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.metric, []).append(row)
        return found


def write(board: Board, *, examples: int, command: str, raw: Sequence[str]) -> str:
    """The page as text.

    Args:
        examples: how many sample answers to show.
        command: the shell command that makes this page.
        raw: shell commands that open the raw W&B runs in a terminal.
    """
    views = {view.name: view for view in board.views}
    return page.template("board.html").render(
        board=board,
        t=tables,
        views=views,
        told=told(board.standing),
        best=page.best_of(board.headline),
        verdict=page.verdict(board.headline),
        baselines={row.difference.baseline for row in board.headline if row.difference},
        columns=_columns(views["leaderboard"].panels[-1].y),
        faults=_columns(views["faults"].panels[-1].y),
        leaders=leaders(board),
        counted=counted(board.standing),
        preliminary_differs=len({row.preliminary for row in board.headline}) > 1,
        any_initial=any(row.initial_mean is not None for row in board.headline),
        figures=draw(board),
        same=same_budgets(board),
        meanings=FAULTS,
        breakdown=breakdown(board.settings),
        samples=page.samples(board.settings, examples),
        examples_rule=page.examples_rule(examples),
        command=command,
        raw=raw,
    )


@dataclass(frozen=True)
class Leader:
    """A line of the leaderboard. `number`: the setting's place, which its marks in figures carry; `width`: of its bar,
    in percent of the best; `values` and `faults`: means of the leaderboard's and the faults' metrics, or ""."""

    number: int
    name: str
    row: Row
    swatch: Mapping[str, str]
    whisker: Mapping[str, float] | None
    width: float
    values: tuple[float | str, ...]
    faults: tuple[float | str, ...]


def leaders(board: Board) -> list[Leader]:
    """The best first; settings without a value last."""
    views = {view.name: view for view in board.views}
    means = {metric: [_or_empty(row.mean) for row in rows] for metric, rows in board.by_metric.items()}
    shown, wrong = (_columns(views[name].panels[-1].y) for name in ("leaderboard", "faults"))
    top = max((row.mean or 0.0 for row in board.headline), default=0.0) or 1.0
    found = [
        Leader(
            number,
            board_figures.name_of(row.setting),
            row,
            swatch(number),
            whisker,
            round(100 * (row.mean or 0.0) / top, 1),
            tuple(means[name][number] for name in shown),
            tuple(means[name][number] for name in wrong),
        )
        for number, (row, whisker) in enumerate(zip(board.headline, whiskers(board.headline), strict=True))
    ]
    return sorted(found, key=lambda one: (one.row.mean is None, -(one.row.mean or 0.0), one.name))


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else round(value, 6)


def _columns(keys: Sequence[str]) -> list[str]:
    return [key.rpartition("/")[2] for key in keys]


def draw(board: Board) -> dict[str, str]:
    """View -> SVG; empty where there is nothing to draw."""
    views = {view.name: view for view in board.views}
    settings, rows = board.settings, board.headline

    def budgets(name: str) -> Any:
        return lambda: against(settings, rows, views[name].panels)

    order = [one.number for one in leaders(board)]
    return {
        "curves": render("curves", lambda: curves(settings, views["curves"].panels)),
        "size": render("size", budgets("size")),
        "budget": render("budget", budgets("budget")),
        "faults": render("faults", lambda: faults(settings, order=order, suite=board.suite)),
    }


def same_budgets(board: Board) -> dict[str, str]:
    """Budget -> a sentence on those that no panel shows, because every setting has the same."""
    found = {}
    for view in board.views:
        for panel in view.panels:
            if panel.kind == "points" and not worth_drawing(board.settings, panel):
                name = BUDGETS[panel.x]
                values = [budgets(run.run.facts).get(panel.x) for one in board.settings for run in one.runs]
                same = next((value for value in values if value is not None), None)
                amount = "not recorded" if same is None else f"about {_amount(same)} in every run"
                found[panel.x] = f"{name[0].upper()}{name[1:]}: {amount}, so there is nothing to plot."
    return found


def _amount(value: float) -> str:
    return f"{value:.2e}" if value >= 1e12 else tables.short(value) if value >= 100 else f"{value:.2g}"


def told(standing: Sequence[Line]) -> str:
    """How far the experiment is, in a sentence; empty when everything is finished."""
    if all(line.kind == FINISHED for line in standing):
        return ""
    return f"Preliminary: the experiment is not finished ({counted(standing)}), so what stands here may change."


def counted(standing: Sequence[Line]) -> str:
    kinds = Counter(line.kind for line in standing)
    return ", ".join(f"{kinds[kind]} {kind}" for kind in (*KINDS, *sorted(set(kinds) - set(KINDS))) if kinds[kind])


def whiskers(headline: Sequence[Row]) -> list[Mapping[str, float] | None]:
    """For each row the places of its difference, its interval and zero on a common axis, 0 to 100."""
    found = [row.difference for row in headline if row.difference]
    if not found:
        return [None] * len(headline)
    low, high = min(0.0, *(one.low for one in found)), max(0.0, *(one.high for one in found))
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * (value - low) / span, 2)

    return [
        row.difference
        and {
            "low": place(row.difference.low),
            "high": place(row.difference.high),
            "at": place(row.difference.value),
            "zero": place(0.0),
        }
        for row in headline
    ]


def breakdown(settings: Sequence[Setting]) -> dict[str, Any]:
    """What the page's script builds its tables of errors from: counts by grouping, setting, group and outcome."""
    groups = {grouping: groups_of(settings, grouping) for grouping in GROUPINGS}
    counts: dict[str, list[list[list[int]]]] = {}
    for grouping in GROUPINGS:
        found = [outcomes_by(setting, grouping) for setting in settings]
        counts[grouping] = [
            [[one.get(group, Counter())[name] for name in OUTCOMES] for group in groups[grouping]] for one in found
        ]
    return {
        "settings": [board_figures.name_of(setting) for setting in settings],
        "outcomes": list(OUTCOMES),
        "right": RIGHT,
        "groups": groups,
        "counts": counts,
    }
