"""hydra/launcher=slurm on a real Slurm: `make prove-slurm` starts one; elsewhere only what needs none is tested."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def slurm_is_up() -> bool:
    if shutil.which("sinfo") is None:
        return False
    done = subprocess.run(["timeout", "5", "sinfo", "--noheader", "--format=%T"], capture_output=True, text=True)
    return done.returncode == 0 and any(word in done.stdout for word in ("idle", "mixed", "allocated", "completing"))


needs_slurm = pytest.mark.skipif(not slurm_is_up(), reason="no Slurm takes jobs here; make prove-slurm starts one")


@needs_slurm
def test_every_end_of_a_run_is_told_and_none_keeps_the_others(application):
    started = application.start("slurm", "well,error,exit,killed")
    _, err = started.communicate(timeout=300)
    assert started.returncode == 1, err
    assert application.files() == {"well.started", "well.done", "error.started", "exit.started", "killed.started"}
    assert application.told("well.started")["cwd"] == str(application.folder)
    assert "3 of 4 runs did not end well" in err
    for word in ("ValueError: seventeen", "exit status 2", "left no result: FAILED", "Killed"):
        assert word in err, word
    (submission,) = application.folder.glob("sweep/slurm/*/*_submission.sh")
    text = submission.read_text()
    assert "#SBATCH --cpus-per-task=1" in text
    assert "#SBATCH --array=0-3%4" in text


@needs_slurm
@pytest.mark.parametrize("how", ["ctrl-c", "scancel", "time is up"])
def test_a_run_that_is_stopped_may_finish_its_step(application, how: str):
    started = application.start("slurm", "long")
    wait_for(lambda: "long.started" in application.files(), started)
    job = the_job(application.folder)
    if how == "ctrl-c":
        started.send_signal(signal.SIGINT)
    else:
        signal_name = "TERM" if how == "scancel" else "USR2"
        subprocess.run(["scancel", f"--signal={signal_name}", job], check=True)
    _, err = started.communicate(timeout=120)
    wait_for(lambda: not in_queue(job))
    assert application.files() == {"long.started", "long.stopped"}
    if how == "ctrl-c":
        assert "stopping the runs" in err
    else:
        assert "exit status 130" in err


@needs_slurm
def test_training_through_slurm_gives_the_run_that_training_here_gives(repository: Path, tmp_path: Path):
    settings = [
        "data.split.domains=[timers_alarms,weather_environment,notes,calendar]",
        "data.copies_per_request=1",
        "data.text.vocab_size=600",
        f"paths.artifacts={tmp_path / 'artifacts'}",
        f"paths.runs={tmp_path / 'runs'}",
    ]
    tiny = ["student=san_nano", "student.width=32", "student.heads=2", "student.kv_heads=1", "trainer=fast"]
    tiny += ["student.encoder_layers=1", "student.decoder_layers=1", "student.copy_width=8", "samples=0", "logger=none"]
    where = [f"hydra.sweep.dir={tmp_path / 'sweep'}", f"hydra.run.dir={tmp_path}"]
    for stage, words in (
        ("generate", settings),
        ("prepare", settings),
        ("train", [*settings, *tiny, "seed=1"]),
        ("train", ["--multirun", "hydra/launcher=slurm", *settings, *tiny, "seed=1,2"]),
    ):
        command = [sys.executable, "-m", f"needle.{stage}", *words, *where]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs/train").glob("*/run.json")]
    assert sorted((run["seed"], run["status"]) for run in runs) == [(1, "finished"), (1, "finished"), (2, "finished")]
    weights = {path.read_bytes() for path in (tmp_path / "runs/train").glob("*/model/model.safetensors")}
    assert len(weights) == 2  # of two seeds; here and there the same bits


def test_without_slurm_the_way_out_is_told(application, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(application.folder))
    started = application.start("slurm", "well")
    _, err = started.communicate(timeout=60)
    assert started.returncode == 1
    assert "hydra/launcher=joblib" in err
    assert "Traceback" not in err


def test_the_node_script_refuses_what_it_does_not_know(repository: Path):
    script = repository / "tests/servers/slurm_node.sh"
    done = subprocess.run([str(script), "begin"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'begin' is not start, stop or status" in done.stderr


@pytest.fixture(autouse=True)
def nothing_stays_in_the_queue(tmp_path: Path) -> Iterator[None]:
    yield
    for folder in tmp_path.glob("sweep/slurm/[0-9]*"):
        subprocess.run(["scancel", folder.name], check=False)


def the_job(folder: Path) -> str:
    (found,) = folder.glob("sweep/slurm/[0-9]*")
    return found.name


def in_queue(job: str) -> bool:
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True)
    return bool(done.stdout.strip())


def wait_for(happened, process: subprocess.Popen | None = None, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
