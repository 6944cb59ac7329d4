"""The dashboard's figures as SVG for an HTML page: their inks follow the page's theme, and every mark of a setting
carries the class `s-NUMBER`, so that the page can hide it. The same for the same inputs."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from needle.budgets import budgets
from needle.reporting.collect import ScoredRun, Setting
from needle.reporting.compare import Row
from needle.reporting.faults import FAULTS, RIGHT, outcomes
from needle.reporting.figures import (
    _CLEAR_SETTINGS,
    _STYLE,
    COLOURS,
    FORCED,
    LINES,
    MARKERS,
    _draw_curves,
    _figure,
    _in_lines,
    _legend,
    _plain_number,
    look_of,
    name_of,
)
from needle.reporting.views import BUDGETS, Panel

CURVE_COLUMNS = 5
DECADES_WRITTEN = 100  # wider logarithmic axes have powers of ten as their only ticks
SHARE_WRITTEN = 4  # percent: narrower parts of a bar have no room for their number
SPREAD_FOR_LOG = 4  # budgets that differ by more are on a logarithmic axis
SAME_FRAC = 0.01  # budgets that differ by less are one budget
# RIGHT recedes; the faults differ in lightness as well as in hue.
_FILLS = ("#b9c2cc", "#8c564b", "#E69F00", "#F0E442", "#CC79A7", "#3d8fc6", "#009E73", "#7FD1B9", "#D55E00")
OUTCOME_COLOURS = dict(zip((RIGHT, *FAULTS), _FILLS, strict=True))
_SVG_STYLE = {
    **_STYLE,
    "font.family": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "text.parse_math": False,  # a setting's name may hold a dollar sign
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
# What matplotlib writes -> what the page's theme sets.
_INKS = {"#000000": "var(--ink)", "#e3e3e3": "var(--grid)", "#ffffff": "var(--card)"}


def render(name: str, build: Callable[[], Figure | None]) -> str:
    """The figure as an <svg> element, or an empty text where there is nothing to draw. `name` keeps its ids apart from
    those of the page's other figures."""
    with mpl.rc_context({**_SVG_STYLE, "svg.hashsalt": name}):
        figure = build()
        if figure is None:
            return ""
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(stream.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="setting-(\d+)"', r'<g class="s s-\1"', svg)
    used = set(re.findall(r"(?:url\(#|xlink:href=\"#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"(url\(#|xlink:href=\"#)", rf"\g<1>{name}-", svg)
    for written, wanted in _INKS.items():
        svg = re.sub(rf"(fill|stroke): {written}", rf"\1: {wanted}", svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None, "matplotlib gives every figure a viewBox"
    head = f'<svg role="img" viewBox="{size[0].split(chr(34))[1]}" style="max-width:{float(size[1]) * 1.2:.0f}px">'
    return re.sub(r"<svg[^>]*>", head, svg, count=1)


def curves(settings: Sequence[Setting], panels: Sequence[Panel]) -> Figure | None:
    """A panel a key: the mean over each setting's seeds, and the seeds themselves where settings are few."""
    drawn = [panel for panel in panels if any(_has(run, panel) for one in settings for run in one.runs)]
    if not drawn:
        return None
    columns = min(CURVE_COLUMNS, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = _figure(2.6 * columns, 0.4 + 2.3 * lines)
    for index, panel in enumerate(drawn):
        axes = figure.add_subplot(lines, columns, index + 1)
        draw_lines(axes, settings, panel)
        axes.set_title(panel.title, fontsize=10)
        axes.set(ylabel=panel.unit if index % columns == 0 else "")
        axes.set(xlabel=BUDGETS[panel.x] if index // columns == lines - 1 and index % columns == 0 else "")
    return figure


def _has(run: ScoredRun, panel: Panel) -> bool:
    return any(line.get(panel.y[0]) is not None for line in run.history)


def draw_lines(axes: Any, settings: Sequence[Setting], panel: Panel) -> None:
    for number, setting in enumerate(settings):
        _draw_curves(axes, setting, panel.y[0], number, seeds=len(settings) <= _CLEAR_SETTINGS, x=panel.x)
    axes.set_xlim(0, axes.dataLim.x1 * 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.log and axes.dataLim.minposy < np.inf and axes.dataLim.y0 > 0:
        axes.set_yscale("log")
        wide = axes.dataLim.y1 > DECADES_WRITTEN * axes.dataLim.y0
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=6))
        axes.yaxis.set_major_formatter(_plain_number)
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.y[0] == FORCED:
        axes.set_ylim(0, None)


def against(settings: Sequence[Setting], rows: Sequence[Row], panels: Sequence[Panel]) -> Figure | None:
    """`points` panels: a setting's mean (large) and seeds (small) over a budget; `lines` panels as in `curves`. Budgets
    in which the settings do not differ are left out.

    Args:
        rows: of the headline metric, one a setting, in the order of the settings.
    """
    drawn = [panel for panel in panels if worth_drawing(settings, panel)]
    if not drawn:
        return None
    figure = _figure(4.6 * len(drawn), 3.7)
    for index, panel in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), index + 1)
        if panel.kind == "lines":
            draw_lines(axes, settings, panel)
        else:
            _draw_points(axes, settings, rows, panel)
        axes.set_title(panel.title, fontsize=10)
        axes.set(xlabel=BUDGETS[panel.x], ylabel=panel.unit)
    return figure


def worth_drawing(settings: Sequence[Setting], panel: Panel) -> bool:
    if panel.kind == "lines":
        return any(sum(panel.y[0] in line for line in run.history) > 1 for one in settings for run in one.runs)
    values = [value for one in settings for value in _budgets(one, panel.x)]
    return bool(values) and max(values) > (1 + SAME_FRAC) * min(values)


def _budgets(setting: Setting, key: str) -> list[float]:
    return [found[key] for run in setting.runs if key in (found := budgets(run.run.facts))]


def _draw_points(axes: Any, settings: Sequence[Setting], rows: Sequence[Row], panel: Panel) -> None:
    metric = panel.y[0].rpartition("/")[2]
    places = []
    for number, (setting, row) in enumerate(zip(settings, rows, strict=True)):
        pairs = [(budgets(run.run.facts).get(panel.x), run.score["metrics"].get(metric)) for run in setting.runs]
        points = np.array([pair for pair in pairs if None not in pair], dtype=float)
        if row.mean is None or not len(points):
            continue
        look = {"color": look_of(number)["color"], "gid": look_of(number)["gid"], "linestyle": "none"}
        if len(points) > 1:
            axes.plot(points[:, 0], 100 * points[:, 1], marker=".", markersize=5, alpha=0.6, zorder=2, **look)
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        axes.plot(points[:, 0].mean(), 100 * row.mean, marker=marker, markersize=8, zorder=3, **look)
        places += list(points[:, 0])
    if max(places) > SPREAD_FOR_LOG * min(places):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    # A prefix for thousands would be read as one of time: 0.5 hours is no 500m.
    axes.xaxis.set_major_formatter(_plain_number if panel.x in ("train_hours", "train_flops") else EngFormatter(sep=""))


def faults(settings: Sequence[Setting], *, order: Sequence[int], suite: str) -> Figure:
    """A bar a setting: shares of answers by what is wrong first, over all seeds. `order`: of settings, from the top."""
    labels = [_in_lines(name_of(settings[number])) for number in order]
    heights = np.array([max(1.0, 0.62 * (1 + label.count("\n"))) for label in labels])
    places = np.cumsum(heights) - heights / 2
    figure = _figure(11, 1.3 + 0.27 * heights.sum())
    axes = figure.add_subplot()
    for number, place in zip(order, places, strict=True):
        counts, start = outcomes(settings[number]), 0.0
        for name, colour in OUTCOME_COLOURS.items():
            share = 100 * counts[name] / max(counts.total(), 1)
            axes.barh(place, share, left=start, height=0.78, color=colour, gid=f"setting-{number}")
            if share >= SHARE_WRITTEN:
                middle = {"ha": "center", "va": "center", "fontsize": 8, "color": "#101418"}
                axes.text(start + share / 2, place, f"{share:.0f}", gid=f"setting-{number}", **middle)
            start += share
    axes.set_yticks(places, labels)
    axes.set(xlim=(0, 100), ylim=(heights.sum(), 0), xlabel=f"% of the answers to {suite}")
    axes.grid(False, axis="y")
    _legend(figure, [Patch(color=colour) for colour in OUTCOME_COLOURS.values()], list(OUTCOME_COLOURS))
    return figure


def swatch(number: int) -> Mapping[str, str]:
    """How the page shows a setting's colour and line beside its name: CSS values."""
    colour = COLOURS[number % len(COLOURS)]
    line = {"-": "solid", "--": "dashed", ":": "dotted"}[LINES[number // len(COLOURS) % len(LINES)]]
    return {"colour": _INKS.get(colour, colour), "line": line}
