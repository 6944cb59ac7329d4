"""How good confidences are: whether they rank right answers above wrong ones, and whether they mean what they say.

Every figure treats equal confidences alike, whatever the order of the answers: what depends on how a tie is broken is
averaged over all ways to break it.
"""

# N answers, B bins, K resamples

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

CERTAINTY = 1e-6  # confidences are kept this far from 0 and 1, where the log loss would be infinite
COVERAGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# name -> whether more is better. risk_area_frac: the share of wrong answers among those given, averaged over every
# coverage (AURC, Geifman & El-Yaniv 2017).
METRICS = {
    "auroc": True,
    "brier": False,
    "ece_frac": False,
    "log_loss_nats": False,
    "risk_area_frac": False,
}


def auroc(confidence_N: np.ndarray, right_N: np.ndarray) -> float | None:
    """The probability that a right answer has a higher confidence than a wrong one, ties counting half (Mann & Whitney
    1947); None when all answers are right, or all wrong."""
    right_N = right_N.astype(bool)
    right, wrong = int(right_N.sum()), int((~right_N).sum())
    if not right or not wrong:
        return None
    return float((rankdata(confidence_N)[right_N].sum() - right * (right + 1) / 2) / (right * wrong))


def brier(confidence_N: np.ndarray, right_N: np.ndarray) -> float:
    """Mean of (confidence - right)^2 (Brier 1950)."""
    return float(np.mean((confidence_N - right_N) ** 2))


def log_loss_nats(confidence_N: np.ndarray, right_N: np.ndarray) -> float:
    """Mean of -log of the probability given to what was the case."""
    kept_N = np.clip(confidence_N, CERTAINTY, 1 - CERTAINTY)
    return float(-np.mean(np.where(right_N, np.log(kept_N), np.log1p(-kept_N))))


def reliability(confidence_N: np.ndarray, right_N: np.ndarray, *, bins: int) -> np.ndarray:
    """Bins of equally many answers, by rising confidence: mean confidence, share of right answers, answers; [B, 3]."""
    order = np.argsort(confidence_N, kind="stable")
    confidence_N, right_N = confidence_N[order], _shared_by_ties(confidence_N[order], right_N[order])
    parts = np.array_split(np.arange(len(order)), min(bins, len(order)))
    return np.array([[confidence_N[part].mean(), right_N[part].mean(), len(part)] for part in parts])


def ece_frac(confidence_N: np.ndarray, right_N: np.ndarray, *, bins: int) -> float:
    """Expected calibration error: mean distance between confidence and share of right answers over bins of equally many
    answers (Nguyen & O'Connor 2015). It is never negative, so few answers give even perfect confidences some."""
    bins_B3 = reliability(confidence_N, right_N, bins=bins)
    return float(np.average(np.abs(bins_B3[:, 0] - bins_B3[:, 1]), weights=bins_B3[:, 2]))


def accuracy_by_coverage(confidence_N: np.ndarray, right_N: np.ndarray) -> np.ndarray:
    """[N]: the share of right answers among the 1, 2, ... N most confident."""
    order = np.argsort(-confidence_N, kind="stable")
    shared_N = _shared_by_ties(confidence_N[order], right_N[order])
    return np.cumsum(shared_N) / np.arange(1, len(order) + 1)


def accuracy_at(confidence_N: np.ndarray, right_N: np.ndarray, coverage_frac: float) -> float:
    """When only the most confident share of the requests is answered (at least one)."""
    count = max(1, round(coverage_frac * len(confidence_N)))
    return float(accuracy_by_coverage(confidence_N, right_N)[count - 1])


def _shared_by_ties(confidence_N: np.ndarray, right_N: np.ndarray) -> np.ndarray:
    """Each answer's expected correctness when those of equal confidence come in random order."""
    _, tie_N = np.unique(confidence_N, return_inverse=True)
    return (np.bincount(tie_N, weights=right_N) / np.bincount(tie_N))[tie_N]


def summary(confidence_N: np.ndarray, right_N: np.ndarray, *, bins: int) -> dict[str, float | None]:
    """Every figure of METRICS."""
    return {
        "auroc": auroc(confidence_N, right_N),
        "brier": brier(confidence_N, right_N),
        "ece_frac": ece_frac(confidence_N, right_N, bins=bins),
        "log_loss_nats": log_loss_nats(confidence_N, right_N),
        "risk_area_frac": float(1 - accuracy_by_coverage(confidence_N, right_N).mean()),
    }


def resampled(
    figures: Callable[[np.ndarray], dict[str, float | None]],
    groups_N: Sequence[str],
    *,
    resamples: int,
    confidence_frac: float,
    seed: int,
) -> dict[str, tuple[float, float] | None]:
    """Percentile bootstrap intervals of what `figures` computes of an index of answers (Efron 1979). Groups are drawn
    whole, since variants of one request are no independent answers; None where no resample had the figure."""
    generator = np.random.default_rng(seed)
    _, group_N = np.unique(np.asarray(groups_N), return_inverse=True)
    by_group = np.split(np.argsort(group_N, kind="stable"), np.cumsum(np.bincount(group_N))[:-1])
    drawn = [
        figures(np.concatenate([by_group[group] for group in generator.integers(len(by_group), size=len(by_group))]))
        for _ in range(resamples)
    ]
    tail = (1 - confidence_frac) / 2
    intervals: dict[str, tuple[float, float] | None] = {}
    for name in drawn[0]:
        values = [one[name] for one in drawn if one[name] is not None]
        low, high = np.quantile(values, [tail, 1 - tail]) if values else (None, None)
        intervals[name] = None if low is None else (float(low), float(high))
    return intervals
