"""Cells of an experiment, and what makes two runs the same."""

import pytest

from needle.errors import ConfigError
from needle.experiment import Sweep, cells_of, chosen
from needle.runs import identity
from needle.scores import suite_name

SWEEP = Sweep(
    question=None,
    arms={"plain": ("loss=hard_label",), "soft": ("loss=forward_kl", "optim.muon_lr=0.01")},
    grid={"seed": (1, 2, 3), "student": ("san_nano", "san_micro")},
    report=(),
)


def test_cells_are_arms_times_grid_with_whole_points_first():
    cells = cells_of(SWEEP)
    assert len(cells) == 12
    assert len({cell.name for cell in cells}) == 12
    assert [cell.arm for cell in cells[:4]] == ["plain", "soft", "plain", "soft"]
    assert cells[3].overrides == ("loss=forward_kl", "optim.muon_lr=0.01", "seed=1", 'student="san_micro"', "arm=soft")


def test_an_experiment_without_arms_is_its_grid():
    (cell,) = cells_of(Sweep(None, {}, {}, ()))
    assert (cell.arm, cell.overrides) == ("all", ("arm=all",))


def test_conditions_of_one_key_are_alternatives():
    some = chosen(cells_of(SWEEP), ["arm:soft", "seed:1", "seed:3", "student:san_nano"])
    assert [cell.name for cell in some] == ["soft seed=1 student=san_nano", "soft seed=3 student=san_nano"]


@pytest.mark.parametrize("condition", ["arm:sof", "seed:4", "loss:forward_kl", "seed=1"])
def test_a_condition_that_no_cell_can_meet_is_told(condition: str):
    with pytest.raises(ConfigError, match="only="):
        chosen(cells_of(SWEEP), [condition])


@pytest.mark.parametrize("wrong", [{"arms": {"a": "loss=hard_label"}, "grid": {}}, {"arms": {}, "grid": {"seed": ()}}])
def test_arms_and_grids_are_lists(wrong: dict):
    with pytest.raises(ValueError, match="is no list"):
        Sweep(question=None, report=(), **wrong)


CFG = {"seed": 1, "arm": "a", "name": "x", "trainer": {"steps": 5, "threads": 1}, "_overrides_": ["seed=1"]}


@pytest.mark.parametrize(
    "change", [{"arm": "b"}, {"name": "y"}, {"trainer": {"steps": 5, "threads": 2}}, {"_overrides_": []}]
)
def test_names_and_execution_make_no_other_run(change: dict):
    assert identity({**CFG, **change}, {"shards": "s"}) == identity(CFG, {"shards": "s"})


@pytest.mark.parametrize("change", [{"seed": 2}, {"trainer": {"steps": 6, "threads": 1}}])
def test_settings_make_another_run(change: dict):
    assert identity({**CFG, **change}, {"shards": "s"}) != identity(CFG, {"shards": "s"})


@pytest.mark.parametrize(
    ("key", "shaped_by"),
    [
        ("rows_per_micro_batch", {"auxiliaries": {"contrastive": {"_target_": "needle.loss.Contrastive"}}}),
        ("validate_every_steps", {"rollouts": {"raise_frac": 0.1}}),
        ("devices", {"trainer": {"devices": 2}}),
    ],
)
def test_execution_that_shapes_a_run_makes_another(key: str, shaped_by: dict):
    def known_as(value: int, more: dict) -> str:
        return identity({**CFG, **more, "trainer": {**CFG["trainer"], **more.get("trainer", {}), key: value}}, {})

    assert known_as(4, shaped_by) != known_as(2, shaped_by)
    assert key == "devices" or known_as(4, {}) == known_as(2, {})


def test_inputs_make_another_run():
    assert identity(CFG, {"shards": "s"}) != identity(CFG, {"shards": "t"})


@pytest.mark.parametrize(
    ("wanted", "name"), [("unseen", "unseen"), ("own/validation.jsonl", "own_validation"), ("own/hard.jsonl", "hard")]
)
def test_a_file_that_is_named_like_a_split_is_no_split(wanted: str, name: str):
    assert suite_name(wanted) == name
