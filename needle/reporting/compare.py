"""Settings -> numbers: means over seeds, paired differences with bootstrap intervals, and whether they compare fairly.

The interval of a difference is a percentile bootstrap. A resample draws examples with replacement and, when there are
two seeds or more, seeds with replacement as well, independently; both settings get the same draws. The statistic is the
mean over drawn seeds of (setting - baseline), each a ratio of counts summed over the drawn examples. With one seed the
interval speaks of other examples only, not of other seeds; with fewer than five the setting is preliminary.
"""

# K resamples, S paired seeds, N paired examples, M metrics

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from needle.metrics.matching import METRICS
from needle.reporting.collect import ScoredRun, Setting, meets

ENOUGH_SEEDS = 5
_CHUNK = 500  # resamples at a time: bounds the memory at 500 x N weights


@dataclass(frozen=True)
class Bootstrap:
    """conf/report.yaml, `bootstrap`."""

    resamples: int
    confidence_frac: float
    seed: int


@dataclass(frozen=True)
class Difference:
    """Setting minus baseline on paired seeds and examples."""

    baseline: str
    value: float
    low: float
    high: float
    seeds: tuple[int, ...]
    examples: int


@dataclass(frozen=True)
class Row:
    """One setting and metric. None: there is nothing to count, or (`sd`) only one seed."""

    setting: Setting
    metric: str
    mean: float | None
    sd: float | None
    initial_mean: float | None
    difference: Difference | None

    @property
    def preliminary(self) -> bool:
        return len(self.setting.runs) < ENOUGH_SEEDS


def compare(
    settings: Sequence[Setting], *, metrics: Sequence[str], baseline: Sequence[str], bootstrap: Bootstrap
) -> list[Row]:
    """A row for every setting and metric, settings in the given order."""
    rows = []
    for setting in settings:
        reference = baseline_of(setting, settings, baseline=baseline)
        differences = paired_differences(setting, reference, metrics=metrics, bootstrap=bootstrap) if reference else {}
        for metric in metrics:
            values = _present(run.score["metrics"].get(metric) for run in setting.runs)
            before = _present((run.initial or {}).get("metrics", {}).get(metric) for run in setting.runs)
            rows.append(
                Row(
                    setting,
                    metric,
                    mean=float(np.mean(values)) if values else None,
                    sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
                    initial_mean=float(np.mean(before)) if before else None,
                    difference=differences.get(metric),
                )
            )
    return rows


def is_baseline(setting: Setting, baseline: Sequence[str]) -> bool:
    return all(meets(setting.runs[0].run, condition) for condition in baseline)


def baseline_of(setting: Setting, settings: Sequence[Setting], *, baseline: Sequence[str]) -> Setting | None:
    """The baseline to hold a setting against: of those that meet the conditions, the one that agrees with the setting
    in the most other factors (the same student size before all). None for a baseline itself, and when two fit equally.
    """
    if is_baseline(setting, baseline):
        return None
    candidates = [other for other in settings if is_baseline(other, baseline)]
    # A result is held against results only; a try-out against either, rather a result.
    candidates = [other for other in candidates if other.is_clean or not setting.is_clean]

    def agreement(other: Setting) -> tuple[bool, int, bool]:
        shared = sum(other.factors[name] == value for name, value in setting.factors.items())
        return other.parameters == setting.parameters, shared, other.is_clean

    best = max((agreement(other) for other in candidates), default=None)
    fitting = [other for other in candidates if agreement(other) == best]
    return fitting[0] if len(fitting) == 1 else None


def paired_differences(
    setting: Setting, reference: Setting, *, metrics: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Difference]:
    """Metric -> difference; empty when the two share no seed or no example."""
    ours, theirs = setting.by_seed(), reference.by_seed()
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    ids = sorted(set.intersection(*(set(run.answers) for pair in pairs for run in pair))) if pairs else []
    if not ids:
        return {}
    counts_SN = [tuple(_counts(run, ids, metrics) for run in pair) for pair in pairs]
    above = np.array([[side[0] for side in pair] for pair in counts_SN])  # S, 2, M, N
    below = np.array([[side[1] for side in pair] for pair in counts_SN])
    drawn_KM = bootstrap_differences(above, below, resamples=bootstrap.resamples, seed=bootstrap.seed)
    point_M = _differences(above.sum(axis=-1), below.sum(axis=-1)).mean(axis=0)
    tail = (1 - bootstrap.confidence_frac) / 2
    found = {}
    for index, metric in enumerate(metrics):
        drawn = drawn_KM[:, index][np.isfinite(drawn_KM[:, index])]
        if np.isfinite(point_M[index]) and len(drawn):
            low, high = np.quantile(drawn, [tail, 1 - tail])
            numbers = (float(point_M[index]), float(low), float(high))
            found[metric] = Difference(reference.label, *numbers, tuple(seeds), len(ids))
    return found


def bootstrap_differences(above: np.ndarray, below: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Resampled differences [K, M]; NaN where a resample has nothing to count.

    Args:
        above: numerators of every seed, side (setting, baseline), metric and example: [S, 2, M, N].
        below: denominators, the same shape.
    """
    S, _, M, N = above.shape
    generator = np.random.default_rng(seed)
    flat_above, flat_below = (counts.reshape(-1, N).T.astype(np.float64) for counts in (above, below))
    parts = []
    for start in range(0, resamples, _CHUNK):
        K = min(_CHUNK, resamples - start)
        drawn_KN = generator.integers(N, size=(K, N)) + N * np.arange(K)[:, None]
        weights_KN = np.bincount(drawn_KN.ravel(), minlength=K * N).reshape(K, N).astype(np.float64)
        shape = (K, S, 2, M)
        differences_KSM = _differences(
            (weights_KN @ flat_above).reshape(shape), (weights_KN @ flat_below).reshape(shape)
        )
        seeds_KS = generator.integers(S, size=(K, S)) if S > 1 else np.zeros((K, 1), dtype=np.int64)
        parts.append(np.take_along_axis(differences_KSM, seeds_KS[:, :, None], axis=1).mean(axis=1))
    return np.concatenate(parts)


def _differences(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """[..., S, 2, M] sums -> [..., S, M] setting minus baseline."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = above / below
    return ratios[..., 0, :] - ratios[..., 1, :]


def _counts(run: ScoredRun, ids: Sequence[str], metrics: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators, [M, N] each."""
    counts = [run.answers[one]["counts"] for one in ids]
    above, below = (np.array([[one[METRICS[name][side]] for one in counts] for name in metrics]) for side in (0, 1))
    return above, below


def _present(values) -> list[float]:
    return [value for value in values if value is not None]


def notices(
    settings: Sequence[Setting], rows: Sequence[Row], *, baseline: Sequence[str], tokens_tolerance_frac: float
) -> list[str]:
    """Why the comparison may not be what it looks like, the gravest first; each a sentence or two."""
    found = []
    if not any(setting.is_clean for setting in settings):
        found.append("No run comes from a clean tree, so there are no results: every number here is a try-out.")
    found += _unfair(settings, baseline=baseline, tokens_tolerance_frac=tokens_tolerance_frac)
    wanted = ", ".join(baseline)
    unpaired = [row.setting for row in rows if row.difference is None and row.metric == rows[0].metric]
    lonely = [setting.label for setting in unpaired if not is_baseline(setting, baseline)]
    if not any(is_baseline(setting, baseline) for setting in settings):
        found.append(f"No run is the baseline ({wanted}), so there are no differences.")
    elif lonely:
        found.append(f"No difference for {_names(lonely)}: no single baseline ({wanted}) shares seeds and examples.")
    few = [setting.label for setting in settings if len(setting.runs) < ENOUGH_SEEDS]
    if few:
        which = "every setting" if len(few) == len(settings) else _names(few)
        found.append(f"Preliminary: fewer than {ENOUGH_SEEDS} seeds for {which}.")
    commits = sorted({run.commit for setting in settings for run in setting.runs})
    if len(commits) > 1:
        found.append(f"The runs come from {len(commits)} commits ({', '.join(commits)}); the code may differ.")
    return found


def _unfair(settings: Sequence[Setting], *, baseline: Sequence[str], tokens_tolerance_frac: float) -> list[str]:
    """Unequal data, first between settings and their own baselines, then between the others."""
    found: list[str] = []
    for setting in settings:
        reference = baseline_of(setting, settings, baseline=baseline)
        if reference is not None:
            unequal = unequal_data((*setting.runs, *reference.runs), tokens_tolerance_frac)
            found += [f"{setting.label} and its baseline: {one}" for one in unequal]
    if not found:
        every = unequal_data([run for setting in settings for run in setting.runs], tokens_tolerance_frac)
        found += [f"Between settings that no difference is given for: {one}" for one in every]
    return found


def unequal_data(runs: Sequence[ScoredRun], tokens_tolerance_frac: float) -> list[str]:
    """In what the runs' training and evaluation data differ; empty when it is equal."""
    found = []
    tokens = [int(run.run.facts.get("tokens") or 0) for run in runs]
    steps = sorted({run.run.facts.get("steps") for run in runs}, key=str)
    shards = sorted({str(run.run.record.get("inputs", {}).get("shards")) for run in runs})
    if max(tokens) - min(tokens) > tokens_tolerance_frac * max(tokens):
        found.append(f"not equal tokens, from {min(tokens):,} to {max(tokens):,} in training.")
    if len(steps) > 1:
        found.append(f"not equal steps, {' and '.join(map(str, steps))}.")
    if len(shards) > 1:
        found.append(f"not equal data, trained on {' and '.join(shards)}.")
    for part, meaning in (("suite", "evaluation examples"), ("settings", "decoding settings")):
        if len({run.score["inputs"][part] for run in runs}) > 1:
            found.append(f"not equal {meaning}; score the runs again.")
    return found


def equality(settings: Sequence[Setting], *, tokens_tolerance_frac: float) -> str:
    """The sentence that says in which respect the comparison is equal; empty when it is not."""
    runs = [run for setting in settings for run in setting.runs]
    if unequal_data(runs, tokens_tolerance_frac):
        return ""
    tokens = [int(run.run.facts.get("tokens") or 0) for run in runs]
    spread = f"{max(tokens):,}" if min(tokens) == max(tokens) else f"{min(tokens):,} to {max(tokens):,}"
    shards, steps = runs[0].run.record.get("inputs", {}).get("shards"), runs[0].run.facts.get("steps")
    sizes = {setting.parameters for setting in settings}
    flops = " Student sizes differ, so this is equal tokens and not equal FLOPs." if len(sizes) > 1 else ""
    return f"Equal data and tokens: every run saw {spread} tokens of {shards} in {steps} steps.{flops}"


def _names(labels: Sequence[str]) -> str:
    return "; ".join(sorted(set(labels)))
