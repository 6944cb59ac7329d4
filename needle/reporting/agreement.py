"""Whether cells that were run again agree with the published ones, setting by setting and suite by suite.

A cell is identical when all its counts are the published ones; another machine's floating-point numbers, or another
version's, may move some answers. A cell agrees when its headline metric is within the half-width of the published
interval of its setting's difference (for a baseline, which has none: of the narrowest that is measured against it). A
setting agrees when it and its baseline are identical; or when its cells agree, and its rebuilt difference from the
baseline lies within the published interval. Two answers more or less always agree: the interval of two settings that
gave the same answers has no width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from needle.errors import DataError
from needle.metrics.matching import METRICS
from needle.reporting.published import ROUNDING, Published

IDENTICAL, WITHIN = "identical", "within the interval"
ANSWERS_MOVED = 2  # that never are a disagreement
Cells = dict[str, Mapping[str, str]]  # seed -> line of cells.csv


@dataclass(frozen=True)
class Line:
    """A setting on a suite. Fractions from 0 to 1; None where there is no baseline, or it is not among what was
    rebuilt. `published_*` is over all published seeds, `same_seeds_*` over those of them that were rebuilt."""

    suite: str
    setting: str
    metric: str
    cells: int
    identical: int
    published_mean: float | None
    same_seeds_mean: float | None
    rebuilt_mean: float | None
    published_difference: float | None
    ci_low: float | None
    ci_high: float | None
    same_seeds_difference: float | None
    rebuilt_difference: float | None
    agrees: bool
    verdict: str


def agreement(published: Published, rebuilt: Published) -> list[Line]:
    """A line for each suite and published setting of which cells were rebuilt, in the headline: the first metric.

    Raises:
        DataError: nothing that is published was rebuilt.
    """
    lines = [
        _line(published, rebuilt, setting=setting, suite=suite, metric=published.metrics[0])
        for suite in published.suites
        for setting in published.settings
        if _cells(rebuilt, setting, suite)
    ]
    if not lines:
        raise DataError(f"{rebuilt.folder} holds no cell of a setting that {published.folder} has")
    return lines


def _line(published: Published, rebuilt: Published, *, setting: str, suite: str, metric: str) -> Line:
    row = published.row(setting, suite, metric)
    before, now = (_cells(one, setting, suite) for one in (published, rebuilt))
    base_before, base_now = (_cells(one, row["baseline"], suite) for one in (published, rebuilt))
    before_here = {seed: cell for seed, cell in before.items() if seed in now}
    base_before_here = {seed: cell for seed, cell in base_before.items() if seed in base_now}
    same = [seed for seed, cell in now.items() if _counts(cell) == _counts(before[seed])]
    again = _difference(now, base_now, metric)
    low, high = _number(row["ci_low"]), _number(row["ci_high"])
    agrees, verdict = True, IDENTICAL
    if len(same) < len(now) or any(_counts(base_now[seed]) != _counts(base_before[seed]) for seed in base_now):
        moved = {seed: _off(now[seed], before[seed], metric) for seed in now if seed not in same}
        least = max(ANSWERS_MOVED / int(cell["n"]) for cell in before.values())
        half_width = _half_width(published, setting, suite, metric)
        problem = _far(moved, None if half_width is None else max(half_width, least))
        problem = problem or _outside(again, low, high, spare=least)
        agrees, verdict = not problem, problem or WITHIN
    return Line(
        suite=suite,
        setting=setting,
        metric=metric,
        cells=len(now),
        identical=len(same),
        published_mean=_mean(before, metric),
        same_seeds_mean=_mean(before_here, metric),
        rebuilt_mean=_mean(now, metric),
        published_difference=_number(row["difference"]),
        ci_low=low,
        ci_high=high,
        same_seeds_difference=_difference(before_here, base_before_here, metric),
        rebuilt_difference=again,
        agrees=agrees,
        verdict=verdict,
    )


def _far(moved: Mapping[str, float | None], half_width: float | None) -> str:
    """What is wrong with cells that are not identical, given how far each is off; empty when nothing is."""
    for seed, off in moved.items():
        if half_width is None or off is None:
            return f"differs: seed {seed} is not identical, and there is no interval to hold it against"
        if off > half_width + ROUNDING:
            return (
                f"differs: seed {seed} is {100 * off:.1f} points off, more than the half-width {100 * half_width:.1f}"
            )
    return ""


def _outside(difference: float | None, low: float | None, high: float | None, *, spare: float) -> str:
    """`spare`: how wide the interval is at least, to either side of its middle."""
    if difference is None or low is None or high is None:
        return ""
    middle, half_width = (low + high) / 2, max((high - low) / 2, spare)
    if abs(difference - middle) <= half_width + ROUNDING:
        return ""
    return f"differs: {100 * difference:+.1f} is outside of {100 * low:+.1f} to {100 * high:+.1f}"


def _cells(table: Published, setting: str, suite: str) -> Cells:
    """Empty where the table has none of this setting."""
    try:
        return {str(row["seed"]): row for row in table.cells_of(setting, suite).to_dict("records")}
    except DataError:
        return {}


def _counts(cell: Mapping[str, str]) -> tuple[str, ...]:
    """What was counted: every metric is a ratio of two counts, and empty where there was nothing to count."""
    return tuple(cell[name] for name in ("n", *METRICS))


def _off(one: Mapping[str, str], other: Mapping[str, str], metric: str) -> float | None:
    values = [_number(cell[metric]) for cell in (one, other)]
    if values[0] is None or values[1] is None:
        return 0.0 if values[0] == values[1] else None
    return abs(values[0] - values[1])


def _difference(ours: Cells, theirs: Cells, metric: str) -> float | None:
    """Mean over the seeds that both have."""
    pairs = [(_number(ours[seed][metric]), _number(theirs[seed][metric])) for seed in ours if seed in theirs]
    return _mean_of([one - other for one, other in pairs if one is not None and other is not None])


def _mean(cells: Cells, metric: str) -> float | None:
    return _mean_of([value for cell in cells.values() if (value := _number(cell[metric])) is not None])


def _mean_of(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _half_width(published: Published, setting: str, suite: str, metric: str) -> float | None:
    rows = [published.row(one, suite, metric) for one in published.settings]
    own = [row for row in rows if row["setting"] == setting and row["baseline"]]
    used = own or [row for row in rows if row["baseline"] == setting]
    return min(((float(row["ci_high"]) - float(row["ci_low"])) / 2 for row in used if row["ci_low"]), default=None)


def _number(text: str) -> float | None:
    return float(text) if text else None
