"""The notebooks' pictures, in the report's style, from the tables of the modules beside this one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from needle.metrics.calibration import accuracy_by_coverage, reliability
from needle.reporting.answers import VALUE_FAULTS
from needle.reporting.board_figures import OUTCOME_COLOURS, SHARE_WRITTEN
from needle.reporting.faults import OUTCOMES
from needle.reporting.figures import _HEADING, _STYLE, COLOURS, LINES, MARKERS, _figure, _in_lines, _legend, _png
from needle.reporting.published import Published, paired
from needle.reporting.tables import title
from needle.schema import SPLITS

DPI = int(_STYLE["savefig.dpi"])
SHOWN_DPI = 84  # of a screen: the pictures are stored sharper than they are shown
DOMAIN_COLUMNS = 3
RELIABILITY_BINS = 8
MUTED = "#9aa4ae"
SPLIT_COLOURS = dict(zip(SPLITS, (MUTED, COLOURS[5], COLOURS[0], COLOURS[1]), strict=True))


@dataclass(frozen=True)
class Picture:
    """A PNG that a notebook shows where it stands last in a cell."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = (int.from_bytes(self.png[at : at + 4], "big") for at in (16, 20))  # of the header
        scale = SHOWN_DPI / DPI
        return self.png, {"width": round(width * scale), "height": round(height * scale)}


def drawn(build: Callable[..., Figure]) -> Callable[..., Picture]:
    """A function that builds a figure, as one that gives a picture in the report's style."""

    @wraps(build)
    def picture(*args: Any, **kwargs: Any) -> Picture:
        with mpl.rc_context(_STYLE):
            return Picture(_png(build(*args, **kwargs)))

    return picture


@drawn
def corpus(table: pd.DataFrame) -> Figure:
    """Requests by kind and split, by length and by number of calls. `table`: portrait.table."""
    figure = _figure(11.5, 3.9)
    kinds, lengths, calls = figure.subplots(1, 3, width_ratios=(1.5, 1.2, 0.8))
    counts = pd.crosstab(table["kind"], table["split"]).reindex(columns=list(SPLITS), fill_value=0)
    counts = counts.loc[counts.sum(axis=1).sort_values().index]
    left = np.zeros(len(counts))
    for split in SPLITS:
        kinds.barh(counts.index, counts[split], left=left, color=SPLIT_COLOURS[split], label=split, edgecolor="white")
        left += counts[split].to_numpy()
    kinds.set(title="Requests by kind", xlabel="requests")
    kinds.grid(False, axis="y")
    most = int(table["words"].quantile(0.99))
    lengths.hist(table["words"].clip(upper=most), bins=np.arange(0.5, most + 1.5), color=COLOURS[0])
    median = table["words"].median()
    lengths.axvline(median, color="black", linewidth=1)
    lengths.annotate(
        f"median {median:g}",
        (median, 1),
        (4, -10),
        xycoords=("data", "axes fraction"),
        fontsize=9,
        textcoords="offset points",
    )
    lengths.set(title="Length", xlabel=f"words (longest 1 % at {most})", ylabel="requests")
    several = table["calls"].value_counts().sort_index()
    bars = calls.bar(several.index.astype(str), several, color=COLOURS[0])
    calls.bar_label(bars, fontsize=8)
    calls.set(title="Calls in the answer", xlabel="calls", ylabel="requests")
    calls.grid(False, axis="x")
    _legend(figure, *kinds.get_legend_handles_labels())
    return figure


@drawn
def domains(table: pd.DataFrame) -> Figure:
    """Requests of each domain; those held out whole stand apart in colour."""
    counts = table.groupby(["domain", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=list(SPLITS), fill_value=0).sort_index()
    parts = np.array_split(np.arange(len(counts)), min(DOMAIN_COLUMNS, len(counts)))
    figure = _figure(11.5, 0.9 + 0.19 * len(parts[0]))
    for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts), sharex=True)), parts, strict=True):
        some, left = counts.iloc[part], np.zeros(len(part))
        for split in SPLITS:
            axes.barh(some.index, some[split], left=left, color=SPLIT_COLOURS[split], label=split, height=0.75)
            left += some[split].to_numpy()
        axes.tick_params(axis="y", labelsize=8)
        axes.set_ylim(len(parts[0]) - 0.5, -0.5)
        axes.grid(False, axis="y")
    figure.suptitle("Requests by domain", **_HEADING)
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


@drawn
def sureness(tokens: pd.DataFrame) -> Figure:
    """How sure the teacher is and how often it agrees with the label, by span. `tokens`: sureness.tokens."""
    figure = _figure(11.5, 4.3)
    calibrated, left = figure.subplots(1, 2)
    calibrated.plot([0, 100], [0, 100], color="#888888", linewidth=1, zorder=1)
    handles, spans = [], list(dict.fromkeys(tokens["span"]))
    for number, span in enumerate(spans):
        some = tokens[tokens["span"] == span]
        bins_B3 = reliability(some["top_prob"].to_numpy(), some["agrees"].to_numpy(float), bins=RELIABILITY_BINS)
        style = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": LINES[number % len(LINES)]}
        handles += calibrated.plot(100 * bins_B3[:, 0], 100 * bins_B3[:, 1], **style)
        doubt = np.sort(1 - some["label_prob"].to_numpy())[::-1]
        share = 100 * np.arange(1, len(doubt) + 1) / len(doubt)
        left.plot(share, 100 * doubt, linewidth=2, color=COLOURS[number], linestyle=style["linestyle"])
    calibrated.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="probability of the likeliest token, mean of a bin, %")
    calibrated.set(ylabel="it is the label, %", title=f"Calibration ({RELIABILITY_BINS} bins of equally many tokens)")
    left.set(xlim=(0, 60), ylim=(0, 101), xlabel="tokens, the most doubtful first, %")
    left.set(ylabel="probability not on the label, %", title="What the distribution adds to the label")
    _legend(figure, handles, [f"{span} ({(tokens['span'] == span).sum():,} tokens)" for span in spans])
    return figure


@drawn
def comparison(published: Published, *, metric: str) -> Figure:
    """A line a setting, two panels a suite: every seed's value with the mean, and the difference from the baseline with
    its published interval, or seed by seed for a column of cells.csv that is no metric of the table."""
    settings, suites = published.settings, _suites(published, metric)
    scale, unit, of_difference = _units(metric)
    figure = _figure(11.5, 1.3 + len(suites) * (0.75 + 0.36 * len(settings)))
    panels = figure.subplots(len(suites), 2, squeeze=False, sharey=True)
    for (levels, differences), suite in zip(panels, suites, strict=True):
        for place, setting in enumerate(settings):
            look = {"color": "black" if setting in published.baselines else COLOURS[0]}
            values = [scale * value for value in _values(published, setting, suite, metric)]
            _draw_seeds(levels, values, place, **look)
            if metric in published.metrics:
                _draw_difference(differences, published.row(setting, suite, metric), place)
            else:
                seeds = paired(published, setting, suite, metric)
                _draw_seeds(differences, [scale * value for value in seeds.values()], place, **look)
        levels.set_yticks(range(len(settings)), [_in_lines(name) for name in settings])
        levels.set_ylim(len(settings) - 0.5, -0.5)
        levels.set(title=_title(metric, suite), xlabel=unit)
        differences.axvline(0, color="black", linewidth=1)
        differences.set(title=f"Difference from the baseline, {_certainty(published, metric)}", xlabel=of_difference)
    return figure


def _units(metric: str) -> tuple[float, str, str]:
    """Factor, unit of values and unit of differences."""
    return (100, "%", "percentage points") if metric.endswith("_frac") else (1, "nats a token", "nats a token")


def _title(metric: str, suite: str) -> str:
    """Columns of the validation at the end of training say nothing of the suite."""
    return f"{title(metric.removeprefix('val/')).capitalize()} on {'validation' if '/' in metric else suite}"


def _suites(published: Published, metric: str) -> list[str]:
    return published.suites if metric in published.metrics else published.suites[:1]


def _certainty(published: Published, metric: str) -> str:
    return "95 % interval" if metric in published.metrics else "each seed"


def _draw_seeds(axes, values: Sequence[float], place: float, *, color: str) -> None:
    """A ring a seed, a bar at their mean."""
    if values:
        axes.plot(values, [place] * len(values), "o", color="white", markeredgecolor=color, markersize=5)
        axes.plot(np.mean(values), place, "|", color=color, markersize=16, markeredgewidth=2.5)


def _draw_difference(axes, row: Mapping[str, str], place: float, *, color: str = COLOURS[0], upright: bool = False):
    """Filled where the interval excludes zero."""
    if not row["difference"]:
        return
    value, low, high = (100 * float(row[name]) for name in ("difference", "ci_low", "ci_high"))
    filled = color if low > 0 or high < 0 else "white"
    style = {"fmt": "o", "capsize": 4, "color": color, "markerfacecolor": filled}
    ends = [[value - low], [high - value]]
    if upright:
        axes.errorbar(place, value, yerr=ends, **style)
    else:
        axes.errorbar(value, place, xerr=ends, **style)


@drawn
def sizes(published: Published, *, metric: str, series: Mapping[str, str]) -> Figure:
    """Quality, and the difference from the baseline (its interval; each seed for a column that is no metric of the
    table), against the student's parameters.

    Args:
        series: setting -> name of the line that it belongs to.
    """
    suites, (scale, unit, of_difference) = _suites(published, metric), _units(metric)
    figure = _figure(11.5, 0.7 + 3.6 * len(suites))
    handles = {}
    for panels, suite in zip(figure.subplots(len(suites), 2, squeeze=False), suites, strict=True):
        levels, differences = panels
        for number, name in enumerate(dict.fromkeys(series.values())):
            color, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            sized = {one: published.cells_of(one, suite) for one, ladder in series.items() if ladder == name}
            at = {one: int(cells["parameters"].iloc[0]) for one, cells in sized.items()}
            points = {one: scale * cells[metric][cells[metric] != ""].astype(float) for one, cells in sized.items()}
            order = sorted((one for one in sized if len(points[one])), key=lambda one: at[one])
            means = [points[one].mean() for one in order]
            handles[name] = levels.plot([at[one] for one in order], means, marker=marker, color=color, linewidth=2)[0]
            for one in order:
                levels.plot([at[one]] * len(points[one]), points[one], "_", color=color, markersize=10, alpha=0.7)
                if metric in published.metrics:
                    row, place = published.row(one, suite, metric), at[one] * (1 + 0.03 * number)
                    _draw_difference(differences, row, place, color=color, upright=True)
                else:
                    seeds = paired(published, one, suite, metric)
                    values = [scale * value for value in seeds.values()]
                    differences.plot([at[one]] * len(values), values, "o", markeredgecolor=color, color="white")
        differences.axhline(0, color="black", linewidth=1)
        levels.set(title=_title(metric, suite), ylabel=unit, ylim=(0, None))
        told = f"Difference from the baseline, {_certainty(published, metric)}"
        differences.set(title=told, ylabel=of_difference)
        for axes in panels:
            _size_axis(axes, sorted({int(text) for text in published.results["parameters"]}))
    _legend(figure, list(handles.values()), list(handles))
    return figure


@drawn
def learning_curve(
    published: Published, *, metric: str, lines: Mapping[str, Mapping[int, str]], usd_per_answer: float
) -> Figure:
    """Quality against how many of the teacher's answers the students learnt from: every seed, and a line through their
    means. Above, what so many answers cost.

    Args:
        lines: name of a line -> number of answers -> setting.
    """
    suites, (scale, unit, _) = _suites(published, metric), _units(metric)
    figure = _figure(5.75 * len(suites), 3.9)
    ticks = sorted({count for steps in lines.values() for count in steps})
    for axes, suite in zip(np.atleast_1d(figure.subplots(1, len(suites))), suites, strict=True):
        for number, (name, steps) in enumerate(lines.items()):
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            values = {count: _values(published, steps[count], suite, metric) for count in sorted(steps)}
            axes.plot(
                list(values), [scale * np.mean(some) for some in values.values()], label=name, linewidth=2, **look
            )
            for count, some in values.items():
                axes.plot([count] * len(some), [scale * value for value in some], "_", color=look["color"], alpha=0.7)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set(title=_title(metric, suite), xlabel="answers of the teacher", ylabel=unit)
        dollars = axes.secondary_xaxis("top")
        dollars.xaxis.set_minor_locator(NullLocator())
        dollars.set_xticks(ticks, [f"${tick * usd_per_answer:,.2f}" for tick in ticks])
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def _values(published: Published, setting: str, suite: str, metric: str) -> list[float]:
    """Of each seed."""
    return [float(value) for value in published.cells_of(setting, suite)[metric] if value]


def _size_axis(axes, sizes: Sequence[int]) -> None:
    ticks = _apart(sizes)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [EngFormatter(places=1, sep="")(tick) for tick in ticks])
    axes.set(xlabel="parameters of the student", xlim=(0.85 * sizes[0], 1.18 * sizes[-1]))


def _apart(ticks: Sequence[int]) -> list[int]:
    """Without those too near their left neighbour to be written beside it."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick > 1.15 * kept[-1]:
            kept.append(tick)
    return kept


@drawn
def outcomes(shares: pd.DataFrame, *, group: str) -> Figure:
    """A bar for every setting and group, cut into outcomes. `shares`: answers.shares."""
    settings, groups = (list(dict.fromkeys(shares.index.get_level_values(level))) for level in (0, 1))
    shown = [name for name in OUTCOMES if shares[name].to_numpy().any()]
    figure = _figure(min(11.5, 5.5 + 3.0 * len(settings)), 1.3 + 0.3 * len(groups))
    panels = np.atleast_1d(figure.subplots(1, len(settings), sharey=True))
    for axes, setting in zip(panels, settings, strict=True):
        some = shares.loc[setting].reindex(groups)
        left = np.zeros(len(groups))
        for name in shown:
            values = some[name].fillna(0).to_numpy()
            bars = axes.barh(range(len(groups)), values, left=left, color=OUTCOME_COLOURS[name], label=name)
            axes.bar_label(
                bars, [f"{v:.0f}" if v > SHARE_WRITTEN else "" for v in values], label_type="center", fontsize=8
            )
            left += values
        axes.set(title=_in_lines(setting), xlim=(0, 100), xlabel="% of answers", ylim=(len(groups) - 0.5, -0.5))
        axes.grid(False, axis="y")
    counts = shares["n"].groupby(level=1).max()
    panels[0].set_yticks(range(len(groups)), [f"{name.replace('_', ' ')}  n={counts[name]:,}" for name in groups])
    figure.suptitle(f"What becomes of a request, by {group}", **_HEADING)
    _legend(figure, *panels[0].get_legend_handles_labels())
    return figure


@drawn
def value_faults(shares: pd.DataFrame) -> Figure:
    """What is wrong with wrong values. `shares`: answers.value_fault_shares."""
    figure = _figure(9.5, 1.4 + 0.4 * len(VALUE_FAULTS))
    axes = figure.add_subplot()
    height = 0.8 / len(shares)
    for number, (setting, row) in enumerate(shares.iterrows()):
        at = np.arange(len(VALUE_FAULTS)) + (number - (len(shares) - 1) / 2) * height
        label = f"{setting} ({row['n']:.0f} wrong values)"
        bars = axes.barh(at, row[list(VALUE_FAULTS)], height * 0.92, color=COLOURS[number % len(COLOURS)], label=label)
        axes.bar_label(bars, [f"{value:.0f}" for value in row[list(VALUE_FAULTS)]], fontsize=8, padding=2)
    axes.set_yticks(range(len(VALUE_FAULTS)), list(VALUE_FAULTS))
    axes.set(ylim=(len(VALUE_FAULTS) - 0.5, -0.5), xlabel="% of the setting's wrong values")
    axes.grid(False, axis="y")
    figure.suptitle("What is wrong with a wrong value", **_HEADING)
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


@drawn
def abstention(table: pd.DataFrame) -> Figure:
    """`table`: answers.abstention."""
    figure = _figure(9.5, 1.5 + 0.35 * len(table))
    panels = figure.subplots(1, 2, sharey=True)
    columns = (("of them called", "calls wanted"), ("of them left alone", "none wanted"))
    for axes, (column, of), colour in zip(panels, columns, (COLOURS[0], COLOURS[2]), strict=True):
        bars = axes.barh(range(len(table)), table[column].fillna(0), color=colour)
        axes.bar_label(bars, [f"{value:.0f} %" for value in table[column]], fontsize=9, padding=2)
        axes.set(title=f"{of}: {column.removeprefix('of them ')}", xlim=(0, 112), xlabel="%")
        axes.grid(False, axis="y")
    panels[0].set_yticks(range(len(table)), [_in_lines(name) for name in table.index])
    panels[0].set_ylim(len(table) - 0.5, -0.5)
    return figure


@drawn
def confidence(answers: pd.DataFrame) -> Figure:
    """Reliability, and how wrong the answers are when only the surest are given. A line a setting."""
    figure = _figure(11.0, 4.6)
    calibrated, risk = figure.subplots(1, 2)
    calibrated.plot([0, 100], [0, 100], color="#888888", linewidth=1, zorder=1)
    handles = []
    settings = list(dict.fromkeys(answers["setting"]))
    for number, setting in enumerate(settings):
        some = answers[answers["setting"] == setting]
        sure_N, right_N = some["confidence"].to_numpy(float), some["exact"].to_numpy(float)
        bins_B3 = reliability(sure_N, right_N, bins=RELIABILITY_BINS)
        line = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}
        marker = MARKERS[number % len(MARKERS)]
        handles += calibrated.plot(100 * bins_B3[:, 0], 100 * bins_B3[:, 1], marker=marker, **line)
        coverage_N = 100 * np.arange(1, len(some) + 1) / len(some)
        risk.plot(coverage_N, 100 * (1 - accuracy_by_coverage(sure_N, right_N)), linewidth=2, **line)
    calibrated.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="mean confidence of the bin, %", ylabel="right, %")
    calibrated.set_title("Reliability")
    risk.set(xlim=(0, 100), ylim=(0, None), xlabel="requests answered, the surest first, %")
    risk.set(ylabel="wrong among those answered, %", title="Risk and coverage")
    _legend(figure, handles, settings)
    return figure


@drawn
def training(history: Sequence[Mapping[str, Any]]) -> Figure:
    """A run's losses on training and validation rows against its steps."""
    figure = _figure(8.5, 3.2)
    axes = figure.add_subplot()
    for number, (key, name) in enumerate((("train/loss_nats", "training"), ("val/loss_nats", "validation"))):
        points = [(line["step"], line[key]) for line in history if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, color=COLOURS[number], marker="o" if number else None)
    axes.set(xlabel="step", ylabel="nats a token", ylim=(0, None), title="Losses while training")
    _legend(figure, *axes.get_legend_handles_labels())
    return figure
