"""An experiment as a sweep of W&B's own: the same cells, and words that needle.sweep understands."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from needle import config
from needle.errors import ConfigError
from needle.experiment import Sweep, cells_of, chosen
from needle.wandb_sweep import PARAMETERS, as_needle_sweep, as_yaml, main

VALUES = st.one_of(
    st.integers(-9, 9), st.floats(-10, 10), st.booleans(), st.none(), st.text("ab 'é\",:[]{}=", min_size=1)
)


def generated(**changed: Any) -> None:
    cfg, _ = config.compose("wandb_sweep", [])
    given = {key: cfg[key] for key in ("exp", "sweep", "python", "output")} | changed
    main.stage_function({}, **given)


def test_the_file_holds_the_experiments_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generated(exp="001_losses", sweep=["allow_dirty=true"], output=tmp_path / "sweep.yaml")
    assert f"wandb sweep {tmp_path / 'sweep.yaml'}" in capsys.readouterr().out
    told = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    experiment, _ = config.compose("train", ["experiment=001_losses"])
    sweep: Sweep = config.build(experiment.sweep)
    assert (told["method"], told["project"], told["name"]) == ("grid", experiment.logger.project, "001_losses")
    assert told["description"] == sweep.question
    assert told["parameters"]["arm"]["values"] == list(sweep.arms)
    assert {key: one["values"] for key, one in told["parameters"].items() if key != "arm"} == {
        key: list(values) for key, values in sweep.grid.items()
    }
    assert told["command"] == [
        *(sys.executable, "-m", "needle.wandb_sweep", "cell", "exp=001_losses", "allow_dirty=true", "at"),
        "${args_json}",
    ]


@given(values=st.lists(VALUES, min_size=1, max_size=3, unique_by=json.dumps))
def test_an_agents_words_choose_exactly_its_cell(values: list[Any]):
    sweep = Sweep(question=None, arms={"a": (), "b": ()}, grid={"optim.muon_lr": tuple(values)}, report=())
    # What is written, read by W&B and put in the command again.
    told = yaml.safe_load(as_yaml("e", sweep, where={}, suites=[], command=[PARAMETERS]))["parameters"]
    for arm in told["arm"]["values"]:
        for value in told["optim.muon_lr"]["values"]:
            point = json.dumps({"arm": arm, "optim.muon_lr": value})
            exp, only = as_needle_sweep(["cell", "exp=e", "at", point])
            assert exp == "exp=e"
            (override,) = OverridesParser.create().parse_overrides([only])
            conditions = cast(list, override.value())
            (cell,) = chosen(cells_of(sweep), [str(one) for one in conditions])
            assert (cell.arm, json.dumps(cell.point["optim.muon_lr"])) == (arm, json.dumps(value))


@pytest.mark.parametrize("words", [[], ["cell"], ["cell", "exp=e", "at", "seed=1"], ["cell", "exp=e", "{}"]])
def test_other_words_are_refused(words: list[str]):
    with pytest.raises(ConfigError, match="is not what an agent gives"):
        as_needle_sweep(words)


@pytest.mark.parametrize(("exp", "word"), [(None, "exp=null"), ("001_loses", "001_losses")])
def test_an_experiment_that_is_not_there_is_told(exp: str | None, word: str):
    with pytest.raises(ConfigError, match=word):
        generated(exp=exp)
