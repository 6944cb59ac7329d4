"""The table of what losses cost: ratios are to the same round's hard labels, and every loss of conf/ is in it."""

import pytest

from needle import config
from needle.bench_losses import BASELINE, all_settings, as_text, table


def test_every_loss_in_each_form_and_every_auxiliary_is_timed():
    settings = all_settings()
    assert settings[0] == BASELINE
    names = {setting.split()[0] for setting in settings}
    assert {f"loss={path.stem}" for path in (config.CONF / "loss").glob("*.yaml")} <= names
    assert {f"auxiliary=[{path.stem}]" for path in (config.CONF / "auxiliary").glob("*.yaml")} <= names
    assert "loss=reverse_kl loss.distribution=full" in settings
    assert "loss=uld loss.distribution=full" not in settings


def test_a_slow_round_changes_no_ratio():
    def figures(step_s: float, memory_mib: float) -> dict[str, float]:
        return {"whole_step_s": step_s, "peak_memory_mib": memory_mib}

    rounds = [
        {BASELINE: figures(1.0, 500.0), "loss=taid": figures(1.5, 530.0)},
        {BASELINE: figures(4.0, 500.0), "loss=taid": figures(6.0, 530.0)},
        {BASELINE: figures(1.0, 510.0), "loss=taid": figures(2.0, 530.0)},
    ]
    (_, row) = table(rounds)
    assert (row["time_ratio"], row["time_ratio_min"], row["time_ratio_max"]) == (1.5, 1.5, 2.0)
    assert row["more_memory_mib"] == pytest.approx(30.0)
    assert "loss=taid" in as_text(table(rounds))
