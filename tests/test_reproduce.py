"""A published experiment run again: the verdict on true, false and outdated numbers, and what it costs to know."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from small_sweep import ARMS, EXPERIMENT, another, inside, listed, overrides, words
from small_sweep import laboratory as new_laboratory

from needle import config, reproduce, sweep
from needle.errors import DataError
from needle.experiment import Sweep, cells_of, chosen
from needle.metrics.matching import METRICS
from needle.reporting import tables
from needle.reporting.agreement import IDENTICAL, WITHIN, agreement
from needle.reporting.published import read

SHORT = ["trainer.steps=3"]
HEADLINE = next(iter(METRICS))


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a published experiment of two cells, and the same cells run again."""
    folder = new_laboratory(tmp_path_factory, "laboratory")
    assert inside(sweep.main, *words(folder, "publish=true", seeds=[1], more=SHORT)) == 0
    assert again(folder) == 0
    return folder


def again(folder: Path, *own: str, arms: dict[str, list[str]] = ARMS, seeds: tuple[int, ...] = (1,), **more) -> int:
    given = listed(overrides(folder, arms, seeds, *more.get("more", SHORT)))
    places = [f"paths.artifacts={folder / 'artifacts'}", f"paths.experiments={folder / 'experiments'}"]
    places.append(f"paths.runs={folder / 'runs' / 'reproduce'}")
    words = [f"exp={EXPERIMENT}", f"overrides={given}", "allow_dirty=true", f"known=[{folder / 'runs'}]"]
    return inside(reproduce.main, *words, *places, *own)


@pytest.fixture
def copied(laboratory: Path, tmp_path: Path) -> Path:
    """The laboratory, whose published numbers may be changed."""
    shutil.copytree(laboratory / "experiments", tmp_path / "experiments")
    (tmp_path / "runs").symlink_to(laboratory / "runs")
    return another(laboratory, tmp_path)


def rewrite(folder: Path, name: str, **values: str) -> None:
    """Changes every line of a published table."""
    path = folder / "experiments" / EXPERIMENT / name
    with path.open(newline="") as stream:
        rows = [{**row, **values} for row in csv.DictReader(stream)]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_cells_run_again_are_the_published_ones(laboratory: Path):
    runs = laboratory / "runs" / "reproduce"
    assert len(list((runs / "train").glob("*/run.json"))) == 2
    with (runs / EXPERIMENT / "agreement.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["setting"], line["verdict"], line["identical"]) for line in lines] == [
        ("plain", IDENTICAL, "1"),
        ("smooth", IDENTICAL, "1"),
    ]
    assert lines[1]["rebuilt_difference"] == lines[1]["published_difference"] != ""
    text = (runs / EXPERIMENT / "agreement.md").read_text()
    assert "every count is the published one" in text
    assert "| validation | smooth |" in text


def test_the_plan_says_what_a_part_and_the_whole_will_take(
    laboratory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert again(laboratory, "dry_run=true", "fast=true", more=[*SHORT, "sweep.fast=['arm:smooth']"]) == 0
    out = capsys.readouterr().out
    assert f"{EXPERIMENT}, fast, again: 1 cells" in out
    assert f"all 2 cells: python -m needle.reproduce exp={EXPERIMENT}" in out
    assert out.count("where they were published, these cells took") == 2
    shutil.copytree(laboratory / "experiments", tmp_path / "experiments")
    elsewhere = another(laboratory, tmp_path)
    assert again(elsewhere, "dry_run=true", f"known=[{laboratory / 'runs'}]") == 0
    assert "to run: 2 cells; " in (out := capsys.readouterr().out)
    assert "of one worker; no teacher is asked" in out


def test_a_number_that_is_not_so_is_found(copied: Path, capsys: pytest.CaptureFixture[str]):
    rewrite(copied, "cells.csv", **{HEADLINE: "0.900000"})
    assert again(copied) == 1
    out = capsys.readouterr().out
    assert "2 of 2 lines differ from what is published" in out
    assert "0 of 1" in out
    assert "started" not in out  # what has been rebuilt already is not run again


def test_numbers_of_other_settings_are_not_compared(copied: Path, capsys: pytest.CaptureFixture[str]):
    changed = {**ARMS, "smooth": [*ARMS["smooth"], "optim.muon_lr=0.5"]}
    assert again(copied, arms=changed) == 2
    error = capsys.readouterr().err
    assert "smooth seed=1 (published as " in error
    assert "plain" not in error
    assert "like for like" in error
    assert again(copied, seeds=(1, 2)) == 2
    assert "does not hold plain seed=2, smooth seed=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fast", "told"),
    [("[]", "names no cells for it"), ("['arm:nobody']", "sweep.fast=arm:nobody: arm is one of plain")],
)
def test_a_part_that_is_none_is_told(laboratory: Path, fast: str, told: str, capsys: pytest.CaptureFixture[str]):
    assert again(laboratory, "fast=true", more=[*SHORT, f"sweep.fast={fast}"]) == 2
    assert told in capsys.readouterr().err


def test_what_was_never_published_is_told(laboratory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert again(another(laboratory, tmp_path)) == 2
    assert "has no results.csv" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((config.CONF / "experiment").glob("[0-9]*.yaml")), ids=lambda path: path.stem)
def test_every_experiments_fast_part_is_a_part(path: Path):
    cfg, _ = config.compose("train", [f"experiment={path.stem}"])
    built: Sweep = config.build(cfg.sweep)
    every = cells_of(built)
    part = chosen(every, built.fast, key_name="sweep.fast")
    assert len(part) < len(every) if built.fast else part == every


# Agreement, by hand: plain is the baseline; smooth is 10 points ahead, 95% from 6 to 14.


def write(folder: Path, values: dict[tuple[str, int], float], *, interval: tuple[float, float] = (0.06, 0.14)) -> None:
    """results.csv and cells.csv of these cells, of 100 examples."""
    folder.mkdir(parents=True)
    with (folder / "cells.csv").open("w", newline="") as stream:
        columns = ["arm", "seed", "suite", "n", "parameters", "tokens", "identity", "commit", *METRICS]
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        for (arm, seed), value in values.items():
            line = {"arm": arm, "seed": seed, "suite": "unseen", "n": 100, "parameters": 9, "tokens": 9}
            writer.writerow({**line, "identity": f"{arm}{seed}", "commit": "abc", HEADLINE: f"{value:.6f}"})
    low, high = (f"{end:.6f}" for end in interval)
    ahead = {"baseline": "plain", "difference": "0.100000", "ci_low": low, "ci_high": high}
    with (folder / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(tables.COLUMNS), restval="")
        writer.writeheader()
        writer.writerow({"setting": "plain", "suite": "unseen", "metric": HEADLINE})
        writer.writerow({"setting": "smooth", "suite": "unseen", "metric": HEADLINE, **ahead})


PUBLISHED = {("plain", 1): 0.20, ("smooth", 1): 0.28, ("plain", 2): 0.20, ("smooth", 2): 0.32}


@pytest.mark.parametrize(
    ("rebuilt", "verdicts"),
    [
        ({}, (IDENTICAL, IDENTICAL)),
        ({("smooth", 1): 0.29}, (IDENTICAL, WITHIN)),
        # The baseline moved: no cell of smooth did, and its difference is another all the same.
        ({("plain", 1): 0.22}, (WITHIN, WITHIN)),
        ({("smooth", 2): 0.36}, (IDENTICAL, WITHIN)),
        ({("smooth", 2): 0.37}, (IDENTICAL, "differs: seed 2 is 5.0 points off, more than the half-width 4.0")),
        ({("smooth", 1): 0.32, ("smooth", 2): 0.36, ("plain", 1): 0.19}, (WITHIN, "differs: +14.5 is outside of")),
        ({("plain", 1): 0.25}, ("differs: seed 1 is 5.0 points off", WITHIN)),
    ],
)
def test_agreement(tmp_path: Path, rebuilt: dict, verdicts: tuple[str, str]):
    write(tmp_path / "published" / "e", PUBLISHED)
    write(tmp_path / "rebuilt" / "e", {**PUBLISHED, **rebuilt})
    plain, smooth = agreement(read("e", tmp_path / "published"), read("e", tmp_path / "rebuilt"))
    assert plain.verdict.startswith(verdicts[0])
    assert smooth.verdict.startswith(verdicts[1])
    assert (plain.agrees, smooth.agrees) == tuple(not one.startswith("differs") for one in verdicts)
    both = {**PUBLISHED, **rebuilt}
    expected = (both["smooth", 1] + both["smooth", 2] - both["plain", 1] - both["plain", 2]) / 2
    assert smooth.rebuilt_difference == pytest.approx(expected)


@pytest.mark.parametrize(("moved", "agrees"), [(0.02, True), (0.03, False)])
def test_two_answers_may_move_where_the_published_interval_has_no_width(tmp_path: Path, moved: float, agrees: bool):
    same = {("plain", 1): 0.20, ("smooth", 1): 0.30}
    write(tmp_path / "published" / "e", same, interval=(0.1, 0.1))
    write(tmp_path / "rebuilt" / "e", {**same, ("smooth", 1): 0.30 + moved}, interval=(0.1, 0.1))
    plain, smooth = agreement(read("e", tmp_path / "published"), read("e", tmp_path / "rebuilt"))
    assert (plain.agrees, smooth.agrees) == (True, agrees)


def test_a_part_is_held_against_the_same_seeds_too(tmp_path: Path):
    write(tmp_path / "published" / "e", PUBLISHED)
    write(tmp_path / "rebuilt" / "e", {key: value for key, value in PUBLISHED.items() if key[1] == 2})
    _, smooth = agreement(read("e", tmp_path / "published"), read("e", tmp_path / "rebuilt"))
    # One seed's difference is not the mean of all, and may be outside of the interval: it is identical.
    assert (smooth.cells, smooth.identical, smooth.verdict) == (1, 1, IDENTICAL)
    assert smooth.same_seeds_difference == smooth.rebuilt_difference == pytest.approx(0.12)
    assert smooth.published_difference == pytest.approx(0.10)


def test_a_part_without_its_baseline_is_judged_by_its_cells(tmp_path: Path):
    write(tmp_path / "published" / "e", PUBLISHED)
    write(tmp_path / "rebuilt" / "e", {("smooth", 1): 0.30})
    (smooth,) = agreement(read("e", tmp_path / "published"), read("e", tmp_path / "rebuilt"))
    assert (smooth.rebuilt_difference, smooth.verdict) == (None, WITHIN)


def test_nothing_in_common_is_an_error(tmp_path: Path):
    write(tmp_path / "published" / "e", PUBLISHED)
    write(tmp_path / "rebuilt" / "e", {("other", 1): 0.30})
    with pytest.raises(DataError, match="holds no cell"):
        agreement(read("e", tmp_path / "published"), read("e", tmp_path / "rebuilt"))


def test_times_are_published(laboratory: Path):
    told = json.loads((laboratory / "experiments" / EXPERIMENT / "times.json").read_text())
    assert sorted(told["seconds_per_cell"]) == ["plain", "smooth"]
    assert all(one["cores"] >= 1 for one in told["hardware"])
