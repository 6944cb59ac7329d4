"""Writes an experiment as a sweep of W&B's own, whose agents ask W&B for cells and run each with needle.sweep.

    python -m needle.wandb_sweep exp=001_losses output=sweep.yaml
    wandb sweep sweep.yaml                       # says the command for agents, on as many machines as wanted:
    wandb agent ENTITY/PROJECT/SWEEP

The parameters are `arm` and the keys of the experiment's grid, so both ways run the same cells, under the same names.
An agent starts

    python -m needle.wandb_sweep cell exp=001_losses at '{"arm": "forward_kl", "seed": 1}'

which becomes `python -m needle.sweep exp=001_losses only=["arm:forward_kl","seed:1"]` in the same process: its signals
reach the training. A cell that is finished already is not run again: its run in the sweep has the numbers of the first.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from needle import config
from needle.artifacts import write_text_atomic
from needle.errors import ConfigError
from needle.experiment import HEADLINE, ONLY_ARM, Sweep, known_experiment
from needle.scores import suite_name

# W&B puts a run's parameters in this word's place, as one JSON object: numbers stay numbers, whatever their form.
PARAMETERS = "${args_json}"
CELL, AT = "cell", "at"


@config.stage("wandb_sweep")
def main(cfg: dict[str, Any], *, exp: str | None, sweep: list[str], python: str | None, output: Path | None) -> None:
    exp = known_experiment(exp)
    experiment, _ = config.compose("train", [f"experiment={exp}"])
    built: Sweep = config.build(experiment.sweep)
    if experiment.logger.get("project") is None:
        raise ConfigError(
            f"exp={exp}: its runs have logger={experiment.logger['_target_'].rsplit('.', 1)[1]} and would never begin "
            "in W&B; set logger=wandb in the experiment"
        )
    where = {key: experiment.logger[key] for key in ("project", "entity") if experiment.logger[key] is not None}
    command = [python or sys.executable, "-m", "needle.wandb_sweep", CELL, f"exp={exp}", *sweep, AT, PARAMETERS]
    text = as_yaml(exp, built, where=where, suites=list(experiment.suites), command=command)
    if output is None:
        print(text, end="")
        return
    write_text_atomic(output, text)
    print(f"next: wandb sweep {output}")


def as_yaml(name: str, sweep: Sweep, *, where: Mapping[str, str], suites: Sequence[str], command: Sequence[str]) -> str:
    """The file that `wandb sweep` reads: https://docs.wandb.ai/models/sweeps/sweep-config-keys."""
    grid = {"arm": list(sweep.arms) or [ONLY_ARM], **{key: list(values) for key, values in sweep.grid.items()}}
    config: dict[str, Any] = {"name": name, **where, "method": "grid"}
    if sweep.question:
        config["description"] = sweep.question
    if suites:
        config["metric"] = {"name": f"{suite_name(suites[0])}/{HEADLINE}", "goal": "maximize"}
    config["parameters"] = {key: {"values": values} for key, values in grid.items()}
    config["command"] = list(command)
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)


def as_needle_sweep(words: Sequence[str]) -> list[str]:
    """The words for needle.sweep of those that an agent gives: `cell exp=NAME ... at JSON`.

    Raises:
        ConfigError: they are not of that form.
    """
    try:
        first, *own, at, parameters = words
        point = json.loads(parameters)
        if first != CELL or at != AT or not isinstance(point, dict):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{' '.join(words)!r} is not what an agent gives: {CELL} exp=NAME {AT} '{{\"arm\": NAME, KEY: VALUE}}'"
        ) from None
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in point.items()}
    only = json.dumps([f"{key}:{value}" for key, value in plain.items()], ensure_ascii=False)
    return [*own, f"only={only}"]


def _run_cell(words: Sequence[str]) -> None:
    try:
        command = [sys.executable, "-m", "needle.sweep", *as_needle_sweep(words)]
    except ConfigError as error:
        sys.exit(f"needle.wandb_sweep: {error}")
    os.execv(sys.executable, command)


if __name__ == "__main__":
    if sys.argv[1:2] == [CELL]:
        _run_cell(sys.argv[1:])
    main()
