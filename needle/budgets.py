"""What a training run spent, under the names that tables, dashboards and W&B use."""

from collections.abc import Mapping
from typing import Any

TRAINING_FLOPS = 6  # per parameter and token: 2 forward, 4 backward (Kaplan et al. 2020)


def budgets(facts: Mapping[str, Any]) -> dict[str, float]:
    """From the facts of run.json, those that are known:

    `parameters` of the student; `tokens` seen in training, source and target; `train_hours` of wall clock;
    `train_flops`, an estimate of the student's own training: 6 * parameters * tokens. A teacher's work is in none.
    """
    found = {key: float(facts[key]) for key in ("parameters", "tokens") if facts.get(key)}
    if facts.get("train_seconds"):
        found["train_hours"] = facts["train_seconds"] / 3600
    if len(found.keys() & {"parameters", "tokens"}) == 2:
        found["train_flops"] = TRAINING_FLOPS * found["parameters"] * found["tokens"]
    return found
