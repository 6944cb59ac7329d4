"""A search for settings: killed and continued it is the uninterrupted one; what it stops early, and what it refuses."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from needle import config, train
from needle.errors import ConfigError, DataError, UserError
from needle.generate import main as generate
from needle.prepare import main as prepare
from needle.tune import main as tune
from needle.tuning import Choice, Pruning, Range, Watch, draw, overrides_of

DATA = ["data.copies_per_request=1", "data.text.vocab_size=400"]
TINY = [
    *DATA,
    "student=san_nano",
    *(f"student.{key}" for key in ("width=16", "heads=2", "kv_heads=1", "encoder_layers=1", "decoder_layers=1")),
    "student.copy_width=8",
    "trainer=fast",
    "trainer.steps=6",
    "trainer.rows_per_batch=1",
    "trainer.rows_per_micro_batch=1",
    "trainer.checkpoint_every_steps=1",
    "trainer.validate_every_steps=3",
    "logger=none",
]


def stage(main: Any, name: str, overrides: Sequence[str]) -> None:
    """What `python -m needle.NAME OVERRIDES` does, in this process and with its errors."""
    cfg, runtime = config.compose(name, overrides)
    whole, built = config.prepared(cfg, main.stage_function, runtime=runtime)
    main.stage_function(whole, **built)


@pytest.fixture(scope="module")
def places(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that lead to the shards of a corpus of one domain."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "corpus").mkdir()
    for file in (repository / "data" / "teacher_corpus").glob("timers_alarms.*"):
        shutil.copy(file, folder / "corpus")
    found = [f"data.corpus={folder / 'corpus'}", f"paths.artifacts={folder / 'artifacts'}"]
    stage(generate, "generate", [*DATA, *found])
    stage(prepare, "prepare", [*DATA, *found, "workers=1"])
    return found


@pytest.fixture
def search(places: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Runs a search of three trials, of which the last two are not random; returns the folder of its runs."""

    def run(*overrides: str, runs: str = "runs") -> Path:
        folder = tmp_path / runs
        words = ["study=s", "trials=3", "startup_trials=1", "pruning.keep_frac=1", "allow_dirty=true"]
        corpus, artifacts = places
        words += [f"overrides={json.dumps([*TINY, corpus])}", artifacts, f"paths.runs={folder}"]
        stage(tune, "tune", [*words, *overrides])
        return folder

    return run


def table(folder: Path) -> list[dict[str, str]]:
    """trials.csv without where the runs lie."""
    with (folder / "tuning" / "s" / "trials.csv").open() as stream:
        return [{key: value for key, value in row.items() if key != "run"} for row in csv.DictReader(stream)]


def test_a_search_that_is_killed_and_interrupted_is_the_uninterrupted_one(search, capsys):
    whole = search(runs="whole")
    rows = table(whole)
    told = capsys.readouterr().out
    assert [row["state"] for row in rows] == ["complete"] * 3
    assert len({row["matrices"] for row in rows}) == 3
    best = min(rows, key=lambda row: float(row["val/label_nats"]))
    assert f"optim.muon_lr={float(best['matrices']):.4g}" in told.splitlines()[-1]
    assert (float(rows[0]["matrices"]), float(rows[0]["rest"])) == (0.02, 0.003)  # the settings as they are

    child = multiprocessing.get_context("fork").Process(target=search, kwargs={"runs": "broken"})
    child.start()
    broken = whole.with_name("broken")
    wait_for(lambda: len(checkpointed(broken)) == 1)
    child.kill()
    child.join()
    interrupter = threading.Thread(target=interrupt_when, args=(lambda: len(checkpointed(broken)) == 2,))
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        search(runs="broken")
    interrupter.join()
    search(runs="broken")
    assert table(broken) == rows
    records = [json.loads(path.read_text()) for path in broken.glob("train/*/run.json")]
    assert [record["status"] for record in records] == ["finished"] * 3  # none was run twice
    assert sum(len(record.get("resumed", [])) for record in records) == 2


def checkpointed(runs: Path) -> set[Path]:
    return {path.parent.parent for path in runs.glob("train/*/checkpoints/*.ckpt")}


def interrupt_when(happened: Callable[[], bool]) -> None:
    wait_for(happened)
    os.kill(os.getpid(), signal.SIGINT)


def wait_for(happened: Callable[[], bool], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_settings_that_were_run_already_are_not_run_again(search):
    two = ["space=one_rate", "~space.rate"]
    two += ["+space.one={_target_: needle.tuning.Choice, keys: [optim.muon_lr], values: [0.02, 0.01]}"]
    runs = search(*two)
    rows = table(runs)
    assert len(rows) == 3
    assert len(list(runs.glob("train/*"))) == len({row["one"] for row in rows}) <= 2
    assert len({(row["one"], row["val/label_nats"]) for row in rows}) == len({row["one"] for row in rows})
    with pytest.raises(ConfigError, match=r"begun with seed=0, this is 1.*study=NAME"):
        search(*two, "seed=1")


def test_a_search_stops_when_trials_fail_in_a_row_and_tells_why(search, monkeypatch: pytest.MonkeyPatch, capsys):
    ends = [FloatingPointError("the loss is not finite at step 3"), *[DataError("the shards are damaged")] * 3]

    def start(*_: Any) -> Path:
        raise ends.pop(0)

    monkeypatch.setattr(train, "start", start)
    with pytest.raises(UserError, match=r"3 trials in a row failed.*the shards are damaged"):
        search("trials=9")
    told = capsys.readouterr().out
    assert "trial 0: diverged: the loss is not finite at step 3" in told
    assert told.count("failed: the shards are damaged") == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["exp=001_losses", "arm=backward_kl"], ["backward_kl", "forward_kl"]),
        (["arm=forward_kl"], ["exp="]),
        (["exp=001_loses"], ["exp=001_loses", "did you mean 001_losses?"]),
        (["space.rest.keys=[optim.adam_lr]"], ["adam_lr"]),
        (["space.rest.scale=linear", "space.rest.low=0"], ["optim.adamw_lr", "greater than 0"]),
        (["overrides=['data.copies_per_request=3']"], ["needle.prepare"]),
        (["objective=train/loss_nats"], ["objective", "pattern"]),
    ],
)
def test_what_cannot_work_is_refused_before_any_trial(search, tmp_path: Path, overrides: list[str], words: list[str]):
    with pytest.raises(UserError) as refused:
        search(*overrides)
    for word in words:
        assert word in str(refused.value)
    assert not (tmp_path / "runs").exists()


def finished_trials(values: Sequence[float]) -> optuna.Study:
    """A study to be minimised whose trials told these values at step 10."""
    study = optuna.create_study(pruner=Pruning(keep_frac=0.75, after_trials=4, after_step=0).pruner())
    for value in values:
        trial = study.ask()
        trial.report(value, 10)
        study.tell(trial, value)
    return study


def a_run(folder: Path, *values: float) -> Path:
    lines = [{"step": 5, "train/loss_nats": 9.0}]
    lines += [{"step": 10 * place, "val/label_nats": value} for place, value in enumerate(values, start=1)]
    folder.mkdir()
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(("value", "pruned"), [(1.5, False), (3.5, False), (4.5, True)])
def test_a_trial_stops_when_it_is_not_among_the_share_that_is_kept(tmp_path: Path, value: float, pruned: bool):
    trial = finished_trials([1, 2, 3, 5]).ask()
    folder = a_run(tmp_path / "run", value, 0.5)
    stopped = True
    with Watch(trial, objective="val/label_nats", find=lambda: folder, poll_s=0.01) as watch:
        until = time.monotonic() + (30 if pruned else 0.2)
        while time.monotonic() < until:
            time.sleep(0.01)
        stopped = False
    assert (stopped, watch.pruned) == (pruned, pruned)
    # Nor does it hang on the watch's having looked in time.
    other = finished_trials([1, 2, 3, 5]).ask()
    assert Watch(other, objective="val/label_nats", find=lambda: None).told_through(folder) is pruned


def test_a_users_interruption_goes_through_a_watch(tmp_path: Path):
    trial = finished_trials([1]).ask()
    with pytest.raises(KeyboardInterrupt), Watch(trial, objective="val/x", find=lambda: None):
        raise KeyboardInterrupt


def test_a_metric_that_is_not_measured_is_named_with_those_that_are(tmp_path: Path):
    trial = finished_trials([1]).ask()
    with pytest.raises(ConfigError, match=r"objective=val/f1: a validation measures val/label_nats"):
        Watch(trial, objective="val/f1", find=lambda: None).told_through(a_run(tmp_path / "run", 1.0))


def test_axes_draw_within_their_ends_and_write_overrides():
    space = {
        "rate": Range(keys=("a.x", "b.y"), low=1e-4, high=1e-1, scale="log"),
        "loss": Choice(keys=("loss",), values=("forward_kl", "reverse_kl")),
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    drawn = [draw(space, study.ask()) for _ in range(200)]
    rates = sorted(values["rate"] for values in drawn)
    assert 1e-4 <= rates[0] < 3e-4
    assert 3e-2 < rates[-1] <= 1e-1
    assert 1e-3 < rates[100] < 1e-2  # the middle of a logarithmic scale
    assert {values["loss"] for values in drawn} == {"forward_kl", "reverse_kl"}
    assert overrides_of(space["rate"], 0.02) == ["a.x=0.02", "b.y=0.02"]
    assert overrides_of(space["loss"], "forward_kl") == ["loss=forward_kl"]
    for wrong in ({"low": 2.0, "high": 1.0}, {"low": 0.0, "high": 1.0}):
        with pytest.raises(ValueError, match="low="):
            Range(keys=("a",), scale="log", **wrong)
