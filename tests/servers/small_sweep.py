"""An experiment small enough for tests: its words for needle.sweep and needle.reproduce, and what its runs leave.

Two arms of a student of 31,000 parameters, on four domains, for a dozen steps: two seconds a cell, half of them spent
on scoring. It stands on conf/experiment/001_losses.yaml, whose name it keeps.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
EXPERIMENT = "001_losses"
TREE = ("commit", "commits", "dirty")  # columns
DOMAINS = ("timers_alarms", "weather_environment", "notes", "calendar")
ARMS = {"plain": ["loss=hard_label"], "smooth": ["loss=label_smoothing"]}
TINY = [
    "data=default",
    "initial=null",
    f"data.split.domains=[{','.join(DOMAINS)}]",
    "data.copies_per_request=1",
    "data.text.vocab_size=600",
    "student.width=32",
    "student.heads=2",
    "student.kv_heads=1",
    "student.encoder_layers=1",
    "student.decoder_layers=1",
    "student.copy_width=8",
    "trainer=fast",
    "trainer.steps=12",
    "trainer.checkpoint_every_steps=3",
    "trainer.validate_every_steps=12",
    "trainer.log_every_steps=1",
    "samples=0",
    "suites=[validation]",
    "teacher.checkpoint=unused",
]


def laboratory(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder for sweeps. Corpus and artifacts in it are those of all test workers: their makers lock, and name what
    they make by its content."""
    own = factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "small_sweep"
    for domain in DOMAINS:
        for path in (REPOSITORY / "data" / "teacher_corpus").glob(f"{domain}.*"):
            (shared / "corpus").mkdir(parents=True, exist_ok=True)
            if not (shared / "corpus" / path.name).exists():
                shutil.copy(path, shared / "corpus" / f".{os.getpid()}.{path.name}")
                (shared / "corpus" / f".{os.getpid()}.{path.name}").rename(shared / "corpus" / path.name)
    (shared / "artifacts").mkdir(exist_ok=True)
    return another(shared, factory.mktemp(name))


def another(folder: Path, empty: Path) -> Path:
    """An empty folder as one for sweeps, on the corpus and the artifacts of `folder`."""
    for name in ("corpus", "artifacts"):
        (empty / name).symlink_to((folder / name).resolve())
    return empty


def overrides(folder: Path, arms: dict[str, list[str]], seeds: Sequence[int], *more: str) -> list[str]:
    """The words of every cell, the experiment's arms and grid replaced by these."""
    told = ",".join(f"{name}:{json.dumps(words)}" for name, words in arms.items())
    own = ["~sweep.arms", f"+sweep.arms={{{told}}}", f"sweep.grid.seed={json.dumps(list(seeds))}"]
    # A run is known by its settings, of which this path is one: the same for every folder.
    corpus = f"data.corpus={(folder / 'corpus').resolve()}"
    return [*TINY, corpus, "logger=none", *own, "sweep.report=['baseline=[arm:plain]']", "sweep.fast=['seed:1']", *more]


def listed(words: Sequence[str]) -> str:
    """A list of overrides as one override's value."""
    return f"[{','.join(json.dumps(one) for one in words)}]"


def words(
    folder: Path, *own: str, arms: dict[str, list[str]] = ARMS, seeds: Sequence[int], more: Sequence[str] = ()
) -> list[str]:
    """What follows `python -m needle.sweep`; everything is written under `folder`."""
    places = [f"paths.{name}={folder / name}" for name in ("artifacts", "runs", "experiments")]
    given = [f"exp={EXPERIMENT}", f"overrides={listed(overrides(folder, arms, seeds, *more))}", "allow_dirty=true"]
    return [*given, *places, *own]


def command(folder: Path, *own: str, **chosen: Any) -> list[str]:
    return [sys.executable, "-m", "needle.sweep", *words(folder, *own, **chosen)]


def swept(folder: Path, *own: str, **chosen: Any) -> subprocess.CompletedProcess:
    """A sweep as a user starts it, in a process of its own."""
    return subprocess.run(command(folder, *own, **chosen), capture_output=True, text=True, check=False)


def start(command: Sequence[str]) -> subprocess.Popen:
    """A process group of its own, as a terminal's foreground job is one."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_a_checkpoint(folder: Path, process: subprocess.Popen, *, after: int) -> None:
    """Until `after` cells are finished and another has a checkpoint."""
    while process.poll() is None:
        current = [run for run in runs(folder) if run["status"] == "running"]
        checkpoints = [path for run in current for path in (run["path"].parent / "checkpoints").glob("*.ckpt")]
        if len(finished(folder)) >= after and checkpoints:
            return
        time.sleep(0.02)
    raise AssertionError(f"it ended before it could be stopped: {process.communicate()}")


def inside(stage: Callable[[], None], *given: str) -> int:
    """Runs a stage in this process, as its command would; returns the exit status."""
    before, sys.argv = sys.argv, ["needle", *given]
    try:
        stage()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def runs(folder: Path) -> list[dict[str, Any]]:
    """Every run.json under FOLDER/runs, with its `path`."""
    found = []
    for path in sorted((folder / "runs" / "train").glob("*/run.json")):
        try:
            found.append({"path": path, **json.loads(path.read_text())})
        except ValueError:
            continue  # being written
    return found


def finished(folder: Path) -> list[dict[str, Any]]:
    return [run for run in runs(folder) if run["status"] == "finished"]


def tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    """results.csv and cells.csv of a sweep, every value as its text; without what tells of the source tree, to which
    somebody may commit while the tests run."""
    found = {}
    for name in ("results.csv", "cells.csv"):
        with (folder / "runs" / "sweeps" / EXPERIMENT / name).open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        found[name] = [{key: value for key, value in row.items() if key not in TREE} for row in rows]
        assert rows
    return found
