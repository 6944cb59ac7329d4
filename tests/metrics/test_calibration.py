"""Figures of confidences by hand, and that nothing hangs on the order of equal ones."""

import numpy as np
import pytest

from needle.metrics import calibration


def test_auroc_counts_ties_half():
    confidence, right = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True])
    assert calibration.auroc(confidence, right) == 3.5 / 4
    assert calibration.auroc(-confidence, right) == 0.5 / 4
    assert calibration.auroc(np.full(4, 0.3), right) == 0.5
    assert calibration.auroc(confidence, np.ones(4, dtype=bool)) is None


def test_brier_and_log_loss_by_hand():
    confidence, right = np.array([0.25, 0.5, 1.0]), np.array([False, True, True])
    assert calibration.brier(confidence, right) == pytest.approx((0.0625 + 0.25 + 0) / 3)
    expected = -(np.log(0.75) + np.log(0.5) + np.log(1 - calibration.CERTAINTY)) / 3
    assert calibration.log_loss_nats(confidence, right) == pytest.approx(expected)
    # A certain mistake is finite: the confidence counts as 1 - CERTAINTY.
    assert calibration.log_loss_nats(np.array([1.0]), np.array([False])) == pytest.approx(
        -np.log(calibration.CERTAINTY)
    )


def test_calibration_error_by_hand():
    confidence, right = np.array([0.8, 0.1, 0.6, 0.3, 0.9]), np.array([1, 0, 1, 1, 0])
    # Bins of 3 and 2: means 1/3 and 0.85, right 2/3 and 1/2.
    assert calibration.reliability(confidence, right, bins=2) == pytest.approx(
        np.array([[1 / 3, 2 / 3, 3], [0.85, 0.5, 2]])
    )
    assert calibration.ece_frac(confidence, right, bins=2) == pytest.approx((3 * (1 / 3) + 2 * 0.35) / 5)
    # A constant confidence that is the base rate has no error, however its one tie is cut into bins.
    assert calibration.ece_frac(np.full(5, 0.6), right, bins=3) == pytest.approx(0, abs=1e-12)


def test_accuracy_by_coverage_by_hand():
    confidence, right = np.array([0.2, 0.9, 0.5, 0.5]), np.array([0, 1, 1, 0])
    assert calibration.accuracy_by_coverage(confidence, right) == pytest.approx([1, 1.5 / 2, 2 / 3, 2 / 4])
    assert calibration.accuracy_at(confidence, right, 0.5) == 0.75
    assert calibration.accuracy_at(confidence, right, 0.01) == 1.0  # at least one request


@pytest.mark.parametrize("seed", range(5))
def test_figures_know_no_order_and_ranks_no_scale(seed: int):
    generator = np.random.default_rng(seed)
    confidence, right = generator.integers(1, 6, 40) / 6, generator.random(40) < 0.5
    figures = calibration.summary(confidence, right, bins=7)
    order = generator.permutation(40)
    assert calibration.summary(confidence[order], right[order], bins=7) == pytest.approx(figures)
    squeezed = calibration.summary(confidence**3, right, bins=7)
    for ranking in ("auroc", "risk_area_frac"):
        assert squeezed[ranking] == pytest.approx(figures[ranking])
    assert set(figures) == set(calibration.METRICS)


def test_groups_are_resampled_whole():
    values = np.array([0.0, 1.0, 10.0, 11.0])
    draws = {"resamples": 200, "confidence_frac": 0.9, "seed": 0}

    def mean(index):
        return {"mean": float(values[index].mean()), "never": None}

    one = calibration.resampled(mean, ["a"] * 4, **draws)
    assert one == {"mean": (5.5, 5.5), "never": None}
    # Two pairs: a resample is a pair twice, or both pairs.
    low, high = calibration.resampled(mean, ["a", "a", "b", "b"], **draws)["mean"]
    assert (low, high) == (0.5, 10.5)
    assert calibration.resampled(mean, ["a", "a", "b", "b"], **draws)["mean"] == (low, high)
