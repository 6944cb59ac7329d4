"""A sweep as a user runs it: real processes, killed in the middle, continued, its table compared with a calm one's.

NEEDLE_SWEEP_SEEDS and NEEDLE_SWEEP_KILLS make it larger: `make prove-sweep` runs twelve cells and kills twice.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import small_sweep
from small_sweep import ARMS, another, command, finished, inside, laboratory, runs, swept, tables, words

from needle import artifacts, cells, sweep
from needle.cells import FAILED, FINISHED, RUNNING, STOPPED, Cost, Told
from needle.runs import Run
from needle.watch import Watch, Watched, left_s

SEEDS = list(range(1, 1 + int(os.environ.get("NEEDLE_SWEEP_SEEDS", "2"))))
KILLS = int(os.environ.get("NEEDLE_SWEEP_KILLS", "1"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = laboratory(tmp_path_factory, "calm")
    done = swept(folder, seeds=SEEDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(finished(folder)) == len(runs(folder)) == 2 * len(SEEDS)
    (folder / "out.txt").write_text(done.stdout)
    (folder / "err.txt").write_text(done.stderr)
    return folder


def test_its_cells_are_told_of_and_nothing_else(calm: Path):
    total = 2 * len(SEEDS)
    lines = (calm / "out.txt").read_text().splitlines()
    assert all(len(line) <= 140 for line in lines if str(calm) not in line)
    assert not any(line != line.rstrip() for line in lines)
    ends = [line for line in lines if ": finished, " in line]
    assert len(ends) == total
    assert ends[0].startswith(f"cell 1/{total} plain seed=1: finished, ")
    assert f"; 1 of {total} done, about " in ends[0]
    assert ends[-1].endswith(f"; {total} of {total} done")
    for noise in ("Launching", "trains:", "\nrun: ", "Whole answers right before"):
        assert noise not in (calm / "out.txt").read_text()
    assert (calm / "err.txt").read_text() == ""


def test_hours_are_estimated_from_what_is_finished(calm: Path):
    # A run holds its resolved settings; the shards are the ones it notes.
    of_each = [(Run(run["path"].parent).config, Path(run["facts"]["shards"])) for run in finished(calm)]
    cost = Cost.of(of_each, runs=[calm / "runs"])
    assert (cost.cells, cost.unknown) == (2 * len(SEEDS), 0)
    assert cost.tokens == pytest.approx(sum(run["facts"]["tokens"] for run in finished(calm)), rel=0.02)
    assert cost.seconds > sum(run["facts"]["train_seconds"] for run in finished(calm))  # scoring takes its part
    assert f"{cost.seconds / 3600 * 1000:.2f} USD of machine time at 1000 an hour" in cost.told(usd_per_hour=1000)
    nothing = Cost.of(of_each, runs=[calm / "nowhere"])
    assert nothing.unknown == len(of_each)
    assert "hours not known until" in nothing.told(usd_per_hour=1)


def stop_in_the_middle(folder: Path, number: signal.Signals, *, after: int) -> tuple[int, str]:
    """Sends the sweep a signal once `after` cells are finished and the next has a checkpoint; status and stderr."""
    process = small_sweep.start(command(folder, seeds=SEEDS))
    small_sweep.wait_for_a_checkpoint(folder, process, after=after)
    os.killpg(process.pid, number)  # as a terminal sends Ctrl-C: to all processes
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in out + err
    return process.returncode, err


def test_a_stopped_sweep_goes_on_to_the_same_table(calm: Path, tmp_path: Path):
    another(calm, tmp_path)
    status, err = stop_in_the_middle(tmp_path, signal.SIGINT, after=1)
    assert status == 130
    told = f"{len(finished(tmp_path))} of {2 * len(SEEDS)} cells are finished; the same command goes on"
    assert f"needle.sweep: interrupted: {told}" in err
    standing = cells.Standing(tmp_path / "runs", allow_dirty=True)
    assert {standing.of(run["identity"]).kind for run in runs(tmp_path)} == {FINISHED, STOPPED}
    for kill in range(1, KILLS + 1):
        status, _ = stop_in_the_middle(tmp_path, signal.SIGKILL, after=len(finished(tmp_path)) + 1)
        assert status == -signal.SIGKILL
        assert len(finished(tmp_path)) >= kill + 1
    before = {run["path"]: run["path"].stat().st_mtime_ns for run in finished(tmp_path)}
    done = swept(tmp_path, seeds=SEEDS)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    identities = [run["identity"] for run in finished(tmp_path)]
    assert len(identities) == len(set(identities)) == 2 * len(SEEDS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # A run that was stopped after a checkpoint is the run that goes on.
    assert any(run.get("resumed") for run in finished(tmp_path))
    assert tables(tmp_path) == tables(calm)


def test_a_run_that_was_killed_after_its_last_step_loses_nothing(calm: Path, tmp_path: Path):
    another(calm, tmp_path)
    shutil.copytree(calm / "runs", tmp_path / "runs")
    killed = Run(finished(tmp_path)[0]["path"].parent)
    shutil.rmtree(killed.folder / "model")
    shutil.rmtree(killed.folder / "scores")
    before = killed.record
    kept = [line for line in killed.history() if "val/loss_nats" not in line]
    (killed.folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    artifacts.write_json_atomic(killed.folder / "run.json", {**before, "status": "running", "facts": {}})
    facts = {key: before["facts"][key] for key in ("shards", "steps", "tokens", "parameters")}
    assert inside(sweep.main, *words(tmp_path, seeds=SEEDS)) == 0
    assert tables(tmp_path) == tables(calm)
    assert facts.items() <= killed.record["facts"].items()
    assert 0 < killed.record["facts"]["train_seconds"] <= before["facts"]["train_seconds"]
    assert len([line for line in killed.history() if "val/loss_nats" in line]) == 1


def test_nothing_is_run_again(calm: Path, capfd: pytest.CaptureFixture[str]):
    before = {run["path"]: run["path"].stat().st_mtime_ns for run in runs(calm)}
    assert inside(sweep.main, *words(calm, seeds=SEEDS)) == 0
    out = capfd.readouterr().out
    assert f"cells: {len(before)} finished" in out
    assert "to run: nothing" in out
    assert {run["path"]: run["path"].stat().st_mtime_ns for run in runs(calm)} == before
    with (calm / "runs/sweeps/001_losses/cells.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, str(s)) for s in SEEDS for arm in ("plain", "smooth")]
    assert all(0 <= float(row["call_exact_frac"]) <= 1 and int(row["tokens"]) > 0 for row in rows)


def test_a_trained_cell_is_scored_where_scores_are_missing(
    calm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """As after a search, or an experiment with other suites, which ran the same cell."""
    another(calm, tmp_path)
    shutil.copytree(calm / "runs", tmp_path / "runs")
    folder = finished(tmp_path)[0]["path"].parent
    trained = (folder / "run.json").read_bytes()
    (missing,) = folder.glob("scores/final_*.json")
    missing.unlink()
    assert inside(sweep.main, *words(tmp_path, "dry_run=true", seeds=SEEDS)) == 0
    assert "to run: 1 cells" in capfd.readouterr().out
    assert inside(sweep.main, *words(tmp_path, seeds=SEEDS)) == 0
    assert tables(tmp_path) == tables(calm)
    assert (folder / "run.json").read_bytes() == trained


def test_a_cell_that_fails_stops_no_other_and_runs_again_on_request(
    calm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    another(calm, tmp_path)
    suite = tmp_path / "later.jsonl"
    suite.write_text("not yet\n")
    chosen = {"arms": {**ARMS, "smooth": [*ARMS["smooth"], f"suites=[{suite}]"]}, "seeds": [1]}
    assert inside(sweep.main, *words(tmp_path, **chosen)) == 2
    out, err = capfd.readouterr()
    assert "1 cells failed; retry=true runs them again" in err
    assert f"{suite} holds no usable example" in err
    assert "cell 2/2 smooth seed=1: failed after" in out
    assert "Traceback" not in err
    assert len(finished(tmp_path)) == 1

    assert inside(sweep.main, *words(tmp_path, "dry_run=true", **chosen)) == 0
    told = capfd.readouterr().out
    assert "failed: smooth seed=1" in told
    assert "to run: nothing; 1 failed before" in told
    assert inside(sweep.main, *words(tmp_path, "dry_run=true", "retry=true", **chosen)) == 0
    assert "to run: 1 cells" in capfd.readouterr().out
    (shards,) = (tmp_path / "artifacts").glob("shards-*")
    suite.write_text((shards / "validation.jsonl").read_text())
    assert inside(sweep.main, *words(tmp_path, "retry=true", **chosen)) == 0
    assert len(finished(tmp_path)) == 2


@pytest.mark.parametrize(
    ("arms", "more", "told"),
    [
        ({"smooth": ["loss=label_smoothing", "optim.moun_lr=1"]}, [], "arm smooth: Could not override 'optim.moun_lr'"),
        ({"smooth": ["loss=label_smoothing", "optim.muon_lr=fast"]}, [], 'arm smooth: optim.muon_lr="fast"'),
        ({"smooth": ["loss=label_smoothing", "suites=[valdation]"]}, [], "arm smooth: suites: valdation is none of"),
        ({"smooth": ["loss=label_smoothing", "trainer.devices=2"]}, [], "arm smooth: trainer.devices=2"),
        ({}, ["optim.muon_lr=fast"], 'needle.sweep: optim.muon_lr="fast"'),
        (
            {"bought": ["loss=hard_label", "data.corpus=artifacts/corpus-0"]},
            [],
            "corpus=artifacts/corpus-0 is not there",
        ),
        ({"smooth": ["loss=hard_label"]}, [], "cells plain seed=1 and smooth seed=1 have the same settings"),
    ],
)
def test_a_mistake_is_told_once_with_its_arm(
    calm: Path, tmp_path: Path, arms: dict, more: list[str], told: str, capfd: pytest.CaptureFixture[str]
):
    chosen = {"arms": {**ARMS, **arms}, "seeds": [1, 2], "more": more}
    assert inside(sweep.main, *words(another(calm, tmp_path), **chosen)) == 2
    err = capfd.readouterr().err
    assert err.count(told) == 1, err
    assert "Traceback" not in err
    assert not runs(tmp_path)


def test_half_a_sweep_is_not_published(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert inside(sweep.main, *words(tmp_path, "publish=true", "only=[seed:1]", seeds=SEEDS)) == 2
    assert "publish=true: only=[seed:1] leaves cells out" in capfd.readouterr().err


def test_what_is_published_is_not_replaced_by_another_experiment(
    calm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    another(calm, tmp_path)
    shutil.copytree(calm / "runs", tmp_path / "runs")
    there = [f"paths.experiments={tmp_path / 'experiments'}", "publish=true"]
    assert inside(sweep.main, *words(tmp_path, *there, seeds=SEEDS)) == 0
    published = tmp_path / "experiments" / small_sweep.EXPERIMENT / "cells.csv"
    before = published.read_bytes()
    assert inside(sweep.main, *words(tmp_path, *there, seeds=SEEDS)) == 0  # the same once more
    assert inside(sweep.main, *words(tmp_path, *there, seeds=SEEDS, more=["optim.muon_lr=0.02"])) == 2
    assert "makes another experiment" in capfd.readouterr().err
    assert inside(sweep.main, *words(tmp_path, *there, seeds=SEEDS, more=["suites=[]"])) == 2
    assert "suites=[], so there is nothing to publish" in capfd.readouterr().err
    assert published.read_bytes() == before


def test_settings_of_cells_among_those_of_the_sweep_are_told_where_they_belong(tmp_path: Path):
    command = [sys.executable, "-m", "needle.sweep", "exp=001_losses", "dry_run=true"]
    for wrong in ("trainer.steps=4", "loss=taid", "overrides=trainer.steps=4"):
        done = subprocess.run([*command, wrong], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        word = wrong.removeprefix("overrides=")
        assert f"""the cells' settings are one list of this stage: 'overrides=["{word}"]'""" in done.stderr


@pytest.mark.parametrize(
    ("left", "took", "at_once", "seconds"),
    [
        ([("a", 0), ("a", 0)], {"a": [10]}, 1, 20),
        ([("a", 0), ("a", 0)], {"a": [10]}, 2, 10),
        ([("a", 4), ("b", 0)], {"a": [10], "b": [30]}, 1, 36),
        ([("b", 0)], {"a": [10, 20]}, 1, 15),  # no b is through yet
        ([("a", 99)], {"a": [10]}, 1, 0),  # later than usual
        ([("a", 0), ("b", 0)], {"a": [2], "b": [30]}, 2, 30),  # no shorter than the longest
        ([], {"a": [10]}, 2, 0),
    ],
)
def test_the_time_left(left: Sequence[tuple[str, float]], took: dict[str, list[float]], at_once: int, seconds: float):
    assert left_s(left, took, at_once=at_once) == pytest.approx(seconds)


def test_a_watch_tells_what_is_new_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def tell(identity: str, *told) -> None:
        cells.tell(tmp_path, identity, Told(*told))

    tell("one", FINISHED, "of an earlier sweep", 5.0)
    watched = [
        Watched(2 + place, name, name, cells.told_path(tmp_path, name)) for place, name in enumerate(("one", "two"))
    ]
    watch = Watch(watched, total=3, finished=1)
    watch.poll()
    assert capsys.readouterr().out == ""
    tell("one", RUNNING)
    tell("two", RUNNING)
    watch.poll()
    watch.poll()
    assert capsys.readouterr().out == "cell 2/3 one: started\ncell 3/3 two: started\n"
    tell("one", FINISHED, "24.1% unseen", 192.0)
    watch.poll()
    assert capsys.readouterr().out == "cell 2/3 one: finished, 24.1% unseen, 3.2 min; 2 of 3 done, about 3.2 min left\n"
    tell("two", FAILED, "", 12.0, "there is no file x")
    watch.poll()
    assert capsys.readouterr().out == "cell 3/3 two: failed after 12 s: there is no file x\n"
