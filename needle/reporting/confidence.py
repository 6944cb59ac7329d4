"""The report of needle.calibrate: how good confidences are before and after, as Markdown and as a PNG."""

# N answers, B bins

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest

from needle.metrics.calibration import METRICS, accuracy_by_coverage, reliability
from needle.reporting.figures import _HEADING, _STYLE, COLOURS, LINES, MARKERS, _figure, _legend, _png

MEANINGS = {
    "auroc": "a right answer is more confident than a wrong one, ties half; 0.5 is chance",
    "brier": "mean squared distance between confidence and correctness",
    "ece_frac": "expected calibration error over bins of equally many answers; resampling raises it, so its interval "
    "may lie above it",
    "log_loss_nats": "mean log loss",
    "risk_area_frac": "share of wrong answers among those given, averaged over every coverage",
}


def markdown(report: Mapping[str, Any]) -> str:
    """Of the dictionary that needle.calibrate writes as JSON."""
    columns = list(report["confidences"])
    level = f"{100 * report['interval_frac']:g} %"
    counts = f"{report['answers']} answers to {report['suite']}, {report['right']} right"
    unanswered = f"; {report['unusable']} requests without a usable answer are left out" if report["unusable"] else ""
    lines = [
        f"# Confidence: {report['student']}",
        "",
        report["verdict"],
        "",
        f"{counts}{unanswered}. {report['method']}",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for metric in METRICS:
        cells = [_cell(report["confidences"][column], metric) for column in columns]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    lines += ["", f"In brackets: {level} percentile bootstrap over requests. Lower is better but for auroc.", ""]
    lines += [f"- {metric}: {MEANINGS[metric]}" for metric in METRICS]
    lines += ["", "## When only the most confident share of the requests is answered", ""]
    lines += ["Share of right answers.", "", f"| answered | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for coverage in report["confidences"][columns[0]]["accuracy_at_coverage"]:
        cells = [f"{report['confidences'][column]['accuracy_at_coverage'][coverage]:.3f}" for column in columns]
        lines.append(f"| {100 * float(coverage):.0f} % | {' | '.join(cells)} |")
    if report.get("candidates"):
        lines += ["", "## Heads tried", "", "| form | l2 | log loss out of fold, nats |", "|---|---|---|"]
        lines += [f"| {one['form']} | {one['l2']:g} | {one['log_loss_nats']:.4f} |" for one in report["candidates"]]
    return "\n".join([*lines, "", f"Command: `{report['command']}`", ""])


def _cell(figures: Mapping[str, Any], metric: str) -> str:
    value, interval = figures["metrics"][metric], figures["intervals"][metric]
    if value is None:
        return "undefined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def draw(confidences: Mapping[str, np.ndarray], right_N: np.ndarray, *, bins: int, title: str) -> bytes:
    """Reliability diagram and risk-coverage curves, a colour a kind of confidence."""
    with mpl.rc_context(_STYLE):
        figure = _figure(10.5, 5.0)
        handles = _reliability(figure, confidences, right_N, bins=bins)
        _risk(figure, confidences, right_N)
        figure.suptitle(title, **_HEADING)
        _legend(figure, handles, list(confidences))
        return _png(figure)


def _reliability(
    figure: Figure, confidences: Mapping[str, np.ndarray], right_N: np.ndarray, *, bins: int
) -> Sequence[Any]:
    axes = figure.add_subplot(1, 2, 1)
    axes.plot([0, 100], [0, 100], color="#888888", linewidth=1, zorder=1)
    handles = []
    for number, confidence_N in enumerate(confidences.values()):
        bins_B3 = reliability(confidence_N, right_N, bins=bins)
        ends = [
            binomtest(round(share * count), int(count)).proportion_ci(method="wilson") for _, share, count in bins_B3
        ]
        low, high = (np.array([getattr(one, side) for one in ends]) for side in ("low", "high"))
        distances = np.maximum([bins_B3[:, 1] - low, high - bins_B3[:, 1]], 0)
        style = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": LINES[number % len(LINES)]}
        handles.append(
            axes.errorbar(100 * bins_B3[:, 0], 100 * bins_B3[:, 1], yerr=100 * distances, **style, elinewidth=0.7)
        )
    axes.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="mean confidence of the bin, %", ylabel="right, %")
    axes.set_title("Reliability (bars: 95 % Wilson intervals)")
    return handles


def _risk(figure: Figure, confidences: Mapping[str, np.ndarray], right_N: np.ndarray) -> None:
    axes = figure.add_subplot(1, 2, 2)
    coverage_N = 100 * np.arange(1, len(right_N) + 1) / len(right_N)
    for number, confidence_N in enumerate(confidences.values()):
        style = {"color": COLOURS[number], "linestyle": LINES[number % len(LINES)]}
        axes.plot(coverage_N, 100 * (1 - accuracy_by_coverage(confidence_N, right_N)), linewidth=2, **style)
    axes.set(xlim=(0, 100), ylim=(0, None), xlabel="requests answered, the most confident first, %")
    axes.set(ylabel="wrong among those answered, %")
    axes.set_title("Risk and coverage")
