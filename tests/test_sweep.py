"""A sweep as a user runs it: real processes, killed in the middle, continued, its table compared with a calm one's.

NEEDLE_SWEEP_SEEDS and NEEDLE_SWEEP_KILLS make it larger: `make prove-sweep` runs twelve cells and kills twice.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SEEDS = list(range(1, 1 + int(os.environ.get("NEEDLE_SWEEP_SEEDS", "2"))))
KILLS = int(os.environ.get("NEEDLE_SWEEP_KILLS", "1"))
ARMS = "{plain:['loss=hard_label'],smooth:['loss=label_smoothing']}"
TINY = [
    "data=default",
    "initial=null",
    "data.split.domains=[timers_alarms,weather_environment,notes,calendar]",
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
    "logger=none",
    "suites=[validation]",
    "teacher.checkpoint=unused",
    "~sweep.arms",
]


def command(folder: Path, *words: str, arms: str = ARMS) -> list[str]:
    overrides = [*TINY, f"+sweep.arms={arms}", f"sweep.grid.seed={SEEDS}", "sweep.report=['baseline=[arm:plain]']"]
    listed = ",".join(json.dumps(one) for one in overrides)
    paths = [f"paths.artifacts={folder / 'artifacts'}", f"paths.runs={folder / 'runs'}"]
    own = [f"overrides=[{listed}]", "allow_dirty=true", *paths, *words]
    return [sys.executable, "-m", "needle.sweep", "exp=001_losses", *own]


def sweep(folder: Path, *words: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, *words, **kwargs), capture_output=True, text=True, check=False)


def runs(folder: Path) -> list[dict]:
    found = []
    for path in sorted((folder / "runs" / "train").glob("*/run.json")):
        try:
            found.append({"path": path, **json.loads(path.read_text())})
        except ValueError:
            continue  # being written
    return found


def finished(folder: Path) -> list[dict]:
    return [run for run in runs(folder) if run["status"] == "finished"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    done = sweep(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(finished(folder)) == len(runs(folder)) == 2 * len(SEEDS)
    return folder


def kill_in_the_middle(folder: Path, *, after: int) -> None:
    """Kills the sweep once `after` cells are finished and the next has a checkpoint."""
    process = subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None:
        current = [run for run in runs(folder) if run["status"] == "running"]
        if len(finished(folder)) >= after and any(
            any((run["path"].parent / "checkpoints").glob("*.ckpt")) for run in current
        ):
            break
        time.sleep(0.02)
    assert process.returncode is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_sweep_goes_on_to_the_same_table(calm: Path, tmp_path: Path):
    (tmp_path / "artifacts").symlink_to(calm / "artifacts")
    for kill in range(1, KILLS + 1):
        kill_in_the_middle(tmp_path, after=len(finished(tmp_path)) + 1)
        assert len(finished(tmp_path)) >= kill
    before = {run["path"]: run["path"].stat().st_mtime_ns for run in finished(tmp_path)}
    done = sweep(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    identities = [run["identity"] for run in finished(tmp_path)]
    assert len(identities) == len(set(identities)) == 2 * len(SEEDS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # A run that was killed after a checkpoint is the run that goes on.
    assert any(run.get("resumed") for run in finished(tmp_path))
    for name in ("results.csv", "cells.csv"):
        ours, theirs = (folder / "runs/sweeps/001_losses" / name for folder in (tmp_path, calm))
        assert ours.read_bytes() == theirs.read_bytes()


def test_nothing_is_run_again(calm: Path):
    before = {run["path"]: run["path"].stat().st_mtime_ns for run in runs(calm)}
    done = sweep(calm)
    assert done.returncode == 0
    assert f"cells: {len(before)} finished" in done.stdout
    assert "Launching" not in done.stdout
    assert {run["path"]: run["path"].stat().st_mtime_ns for run in runs(calm)} == before
    with (calm / "runs/sweeps/001_losses/cells.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, str(s)) for s in SEEDS for arm in ("plain", "smooth")]
    assert all(0 <= float(row["call_exact_frac"]) <= 1 and int(row["tokens"]) > 0 for row in rows)


def test_a_cell_that_fails_stops_no_other_and_runs_again_on_request(calm: Path, tmp_path: Path):
    (tmp_path / "artifacts").symlink_to(calm / "artifacts")
    suite = tmp_path / "later.jsonl"
    arms = f"{{plain:['loss=hard_label'],broken:['loss=label_smoothing','suites=[{suite}]']}}"
    only = "only=[seed:1]"
    done = sweep(tmp_path, only, arms=arms)
    assert done.returncode == 2
    assert "1 cells failed; retry=true runs them again" in done.stderr
    assert f"there is no file {suite}" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(finished(tmp_path)) == 1

    done = sweep(tmp_path, only, "dry_run=true", arms=arms)
    assert done.returncode == 0
    assert "failed: broken seed=1" in done.stdout
    (shards,) = (tmp_path / "artifacts").glob("shards-*")
    suite.write_text((shards / "validation.jsonl").read_text())
    done = sweep(tmp_path, only, "retry=true", arms=arms)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(finished(tmp_path)) == 2
