"""Plan and corpus side by side, as PNG bytes: a panel an axis, a bar for each value's realised share, a tick for its
planned one."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from needle.corpus.plan import AXES, Row

# Okabe & Ito 2008, told apart without colour vision.
REALISED_COLOUR, UNPLANNED_COLOUR = "#56B4E9", "#CC79A7"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "savefig.dpi": 140,
}
_PANEL_FRAME = 2.6  # title, ticks and gap, in bars
_BAR_INCHES = 0.24
_LABEL_LETTERS = 44


def draw(rows: Sequence[Row], distances: Mapping[str, float | None], *, requests: int) -> bytes | None:
    """Of `Realised.table` and `.distances`; axes that the corpus says nothing about are left out. None: all are."""
    panels = {axis: [row for row in rows if row.axis == axis and row.difference is not None] for axis in AXES}
    panels = {axis: of_axis for axis, of_axis in panels.items() if of_axis}
    if not panels:
        return None
    columns: tuple[list[str], list[str]] = ([], [])
    for axis in panels:  # each to the shorter column
        min(columns, key=lambda column: _height(column, panels)).append(axis)
    drawn = [column for column in columns if column]
    tallest = max(_height(column, panels) for column in drawn)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5 * len(drawn), 0.9 + _BAR_INCHES * tallest), layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(1, len(drawn), squeeze=False)[0]
        for part, column in zip(parts, drawn, strict=True):
            room = tallest - _height(column, panels)
            heights = [len(panels[axis]) + _PANEL_FRAME for axis in column]
            grid = part.add_gridspec(len(column) + 1, 1, height_ratios=[*heights, max(room, 0.01)])
            for index, axis in enumerate(column):
                _panel(part.add_subplot(grid[index]), panels[axis], distances[axis])
        title = f"Planned (ticks) and realised shares of {requests:,} accepted requests, %"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _height(column: Sequence[str], panels: Mapping[str, Sequence[Row]]) -> float:
    """In bars."""
    return sum(len(panels[axis]) + _PANEL_FRAME for axis in column)


def _panel(axes: Any, rows: Sequence[Row], distance: float | None) -> None:
    at = range(len(rows))
    colours = [REALISED_COLOUR if row.planned_frac else UNPLANNED_COLOUR for row in rows]
    axes.barh(at, [100 * row.realised_frac for row in rows], height=0.72, color=colours, zorder=2)
    for i, row in enumerate(rows):
        if row.planned_frac:
            axes.vlines(100 * row.planned_frac, i - 0.42, i + 0.42, color="black", linewidth=1.8, zorder=3)
    axes.set_yticks(at, [_short(row.value) for row in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, None))
    axes.set_title(f"{rows[0].axis.replace('_', ' ')}: distance {distance:.3f}")


def _short(text: str) -> str:
    return text if len(text) <= _LABEL_LETTERS else text[: _LABEL_LETTERS - 1] + "…"
