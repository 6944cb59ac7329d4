"""The report's figures as PNG bytes, the same for the same inputs. Colours after Okabe & Ito 2008, told apart without
colour vision; beyond eight settings line styles and hatches tell them apart."""

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from needle.reporting.collect import ScoredRun, Setting
from needle.reporting.compare import Row
from needle.reporting.tables import title
from needle.schema import KINDS

LABEL_LETTERS = 44  # of a line beside an axis
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
LINES = ("-", "--", ":")
HATCHES = ("", "//", "..")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SPANS = ("structure", "name", "key", "value", "stop")
FORCED = "val/call_forced_exact_frac"
_BARS_A_LINE = 30
_CLEAR_SETTINGS = 4  # with more, the curves of single seeds hide one another and only means are drawn
_HEADING = {"x": 0.01, "ha": "left", "weight": "bold", "fontsize": 13}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "savefig.dpi": 140,
}


def draw(settings: Sequence[Setting], rows: Sequence[Row], *, suite: str, confidence_frac: float) -> dict[str, bytes]:
    """File name -> PNG. A figure with nothing to show is left out.

    Args:
        rows: of the headline metric, one a setting.
    """
    figures: dict[str, Callable[[], Figure | None]] = {
        "differences.png": lambda: differences(rows, confidence_frac=confidence_frac),
        "learning_curves.png": lambda: learning_curves(settings),
        "by_kind.png": lambda: by_kind(settings, metric=rows[0].metric, suite=suite),
        "size.png": lambda: size_and_quality(rows, suite=suite),
    }
    drawn = {}
    with mpl.rc_context(_STYLE):
        for name, build in figures.items():
            figure = build()
            if figure is not None:
                drawn[name] = _png(figure)
    return drawn


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the axes, in as many columns as its longest label allows."""
    longest = max(map(len, labels)) + 6
    columns = int(np.clip(figure.get_figwidth() * 12 // longest, 1, len(labels)))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def _legend_height(settings: Sequence[Setting]) -> float:
    """Inches to leave for it at most."""
    return 0.3 + 0.1 * len(settings)


def _sentence(metric: str) -> str:
    return title(metric).capitalize()


def _in_lines(label: str) -> str:
    """Broken where it would leave no room for the axes."""
    return "\n".join(textwrap.wrap(label, LABEL_LETTERS, break_long_words=True, break_on_hyphens=False))


def name_of(setting: Setting) -> str:
    return setting.label if setting.is_clean else f"{setting.label} (dirty)"


def learning_curves(settings: Sequence[Setting]) -> Figure | None:
    """A panel a span: the training loss of each setting's seeds (thin) and their mean (bold) against tokens seen."""
    panels = [(f"train/loss_{span}_nats", f"{span} tokens", "nats a token") for span in SPANS]
    panels.append((FORCED, "validation, teacher-forced", "whole answers right, %"))
    panels = [panel for panel in panels if any(_curve(run, panel[0])[0].size for s in settings for run in s.runs)]
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(3.7 * columns, 0.5 + 2.9 * lines + _legend_height(settings))
    handles: dict[str, Any] = {}
    for index, (key, name, unit) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        for number, setting in enumerate(settings):
            handle = _draw_curves(axes, setting, key, number, seeds=len(settings) <= _CLEAR_SETTINGS)
            if handle is not None:
                handles[name_of(setting)] = handle
        axes.set(title=name, ylabel=unit, xlabel="tokens seen in training", xlim=(0, None))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if key == FORCED:
            axes.set_ylim(0, None)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.yaxis.set_major_formatter(_plain_number)
            axes.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle("Learning curves by span", **_HEADING)
    _legend(figure, list(handles.values()), list(handles))
    return figure


def _plain_number(value: float, _: Any) -> str:
    return f"{value:g}"


def look_of(number: int) -> dict[str, Any]:
    """Colour, line style and group id of the setting that stands at this place among the settings."""
    line = LINES[number // len(COLOURS) % len(LINES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": line, "gid": f"setting-{number}"}


def _draw_curves(axes: Any, setting: Setting, key: str, number: int, *, seeds: bool, x: str = "tokens") -> Any:
    style = look_of(number)
    scale = 100.0 if key == FORCED else 1.0
    found = (_curve(run, key, x=x) for run in setting.runs)
    curves = [(tokens, scale * values) for tokens, values in found if tokens.size]
    if not curves:
        return None
    for tokens, values in curves if seeds and len(curves) > 1 else []:
        axes.plot(tokens, values, linewidth=0.8, alpha=0.45, **style)
    start, end = max(tokens[0] for tokens, _ in curves), min(tokens[-1] for tokens, _ in curves)
    grid = np.array([at for at in curves[0][0] if start <= at <= end])
    if not grid.size:  # seeds that share no stretch have no mean
        return None
    mean = np.mean([np.interp(grid, tokens, values) for tokens, values in curves], axis=0)
    marker = "o" if grid.size == 1 else None
    return axes.plot(grid, mean, linewidth=2.0, marker=marker, **style)[0]


def _curve(run: ScoredRun, key: str, *, x: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
    """Tokens seen (or another value `x` of the history) and the value there, training losses as a running mean over a
    twentieth of the points."""
    points = [(line[x], line[key]) for line in run.history if line.get(key) is not None and x in line]
    tokens, values = (np.array([point[side] for point in points], dtype=float) for side in (0, 1))
    half = len(values) // 40 if key.startswith("train/") else 0
    if half:
        total = np.concatenate([[0.0], np.cumsum(values)])
        low = np.maximum(np.arange(len(values)) - half, 0)
        high = np.minimum(np.arange(len(values)) + half + 1, len(values))
        values = (total[high] - total[low]) / (high - low)
    return tokens, values


def by_kind(settings: Sequence[Setting], *, metric: str, suite: str) -> Figure | None:
    """A group a kind of request: a bar a setting (mean), a dot a seed, a black line at the score before training."""
    groups = [kind for kind in KINDS if _of_kind(settings[0].runs[0].score, kind, metric) is not None]
    if not groups:
        return None
    groups = ["all", *groups]
    per_line = max(3, _BARS_A_LINE // len(settings))
    lines = [groups[start : start + per_line] for start in range(0, len(groups), per_line)]
    figure = _figure(11, 0.6 + 3.0 * len(lines) + _legend_height(settings))
    for index, some in enumerate(lines):
        axes = figure.add_subplot(len(lines), 1, index + 1)
        _draw_bars(axes, settings, some, metric)
        # Groups keep their width on a shorter last line.
        axes.set(xlim=(-0.5, max(map(len, lines)) - 0.5), ylim=(0, 102), ylabel=f"{title(metric)}, %")
    figure.suptitle(f"{_sentence(metric)} by kind of request ({suite})", **_HEADING)
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def _draw_bars(axes: Any, settings: Sequence[Setting], groups: Sequence[str], metric: str) -> None:
    width = 0.84 / len(settings)
    marked = False
    for number, setting in enumerate(settings):
        at = np.arange(len(groups)) + (number - (len(settings) - 1) / 2) * width
        values_SG = np.array([[_percent(run.score, kind, metric) for kind in groups] for run in setting.runs])
        colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number // len(COLOURS) % len(HATCHES)]
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
        axes.bar(at, _mean(values_SG), width * 0.92, label=name_of(setting), zorder=2, **look)
        if len(setting.runs) > 1:
            for values in values_SG:
                axes.plot(at, values, "o", color="white", markeredgecolor="#333333", markersize=3, zorder=3)
        before = [run.initial for run in setting.runs if run.initial is not None]
        if before:
            initial = _mean(np.array([[_percent(score, kind, metric) for kind in groups] for score in before]))
            span = {"xmin": at - width * 0.46, "xmax": at + width * 0.46}
            # White under black: visible on every bar.
            axes.hlines(initial, **span, color="white", linewidth=4, zorder=4)
            label = None if marked else "before training"
            axes.hlines(initial, **span, color="black", linewidth=2, label=label, zorder=5)
            marked = True
    score = settings[0].runs[0].score
    counts = [score["n"] if kind == "all" else score["by_kind"][kind]["n"] for kind in groups]
    names = [f"{kind.replace('_', ' ')}\nn={n}" for kind, n in zip(groups, counts, strict=True)]
    axes.set_xticks(range(len(groups)), names)
    axes.grid(False, axis="x")


def _of_kind(score: dict[str, Any], kind: str, metric: str) -> float | None:
    return score["metrics"][metric] if kind == "all" else score["by_kind"].get(kind, {}).get(metric)


def _percent(score: dict[str, Any], kind: str, metric: str) -> float:
    value = _of_kind(score, kind, metric)
    return np.nan if value is None else 100 * value


def _mean(values_SG: np.ndarray) -> np.ndarray:
    """Mean over seeds that have a value; 0 where none has, which draws no bar."""
    present = np.isfinite(values_SG)
    return np.where(present, values_SG, 0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)


def differences(rows: Sequence[Row], *, confidence_frac: float) -> Figure | None:
    """A line a setting: its difference from the baseline with the interval, in percentage points."""
    kept = [row for row in rows if row.difference is not None]
    if not kept:
        return None
    figure = _figure(8.5, 1.5 + 0.45 * len(kept))
    axes = figure.add_subplot()
    for index, row in enumerate(kept):
        one = row.difference
        bars = [[100 * (one.value - one.low)], [100 * (one.high - one.value)]]
        axes.errorbar(
            100 * one.value,
            index,
            xerr=bars,
            fmt="o",
            capsize=4,
            color=COLOURS[0] if row.setting.is_clean else "#888888",
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(kept)), [_in_lines(name_of(row.setting)) for row in kept])
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.set_xlabel(f"percentage points of {title(rows[0].metric)}, with {100 * confidence_frac:g} % interval")
    figure.suptitle("Difference from the baseline", **_HEADING)
    return figure


def size_and_quality(rows: Sequence[Row], *, suite: str) -> Figure | None:
    """The headline metric against the student's parameters, a line for each setting apart from size."""
    if len({row.setting.parameters for row in rows if row.setting.parameters}) < 2:
        return None
    series: dict[str, list[Row]] = {}
    for row in rows:
        others = {key: value for key, value in row.setting.factors.items() if key.split(".")[0] != "student"}
        name = ", ".join(f"{key}={value}" for key, value in others.items()) or "students"
        if row.setting.parameters and row.mean is not None:
            series.setdefault(name + ("" if row.setting.is_clean else " (dirty)"), []).append(row)
    figure = _figure(8.5, 4.5 + 0.1 * len(series))
    axes = figure.add_subplot()
    for number, (name, members) in enumerate(series.items()):
        members = sorted(members, key=lambda row: row.setting.parameters)
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        sizes = [row.setting.parameters for row in members]
        axes.plot(sizes, [100 * row.mean for row in members], label=name, linewidth=2, markersize=7, **style)
        for row in members:
            values = [100 * _of_kind(run.score, "all", row.metric) for run in row.setting.runs]
            if len(values) > 1:
                where = [row.setting.parameters] * len(values)
                axes.plot(where, values, "_", color=style["color"], markersize=12, alpha=0.7)
    axes.set_xscale("log")
    sizes = sorted({row.setting.parameters for row in rows if row.setting.parameters})
    axes.set_xticks(sizes, [EngFormatter(places=1, sep="")(size) for size in sizes])
    axes.minorticks_off()
    axes.set(ylim=(0, None), xlabel="parameters of the student", ylabel=f"{title(rows[0].metric)}, %")
    figure.suptitle(f"Size against quality ({suite})", **_HEADING)
    _legend(figure, *axes.get_legend_handles_labels())
    return figure
