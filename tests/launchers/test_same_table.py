"""One sweep through every launcher and through the agent of W&B: the tables are the same to the digit.

`make prove-launchers` starts a Slurm of one node and runs all of it, twelve cells each (NEEDLE_SWEEP_SEEDS=6). Without
it, joblib is always here, Slurm and Ray where they are installed; the agent, which starts a process for each cell, is
not.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_sweep
import yaml
from running import running
from small_sweep import ARMS, another, command, finished, inside, laboratory, swept, tables, words

from needle import sweep
from needle.experiment import Sweep
from needle.wandb_sweep import PARAMETERS, as_yaml

PROVE = "NEEDLE_SWEEP_SEEDS" in os.environ
SEEDS = list(range(1, 1 + int(os.environ.get("NEEDLE_SWEEP_SEEDS", "1"))))
KEY = "0123456789abcdef0123456789abcdef01234567"
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def slurm_is_up() -> bool:
    if shutil.which("sinfo") is None:
        return False
    done = subprocess.run(["timeout", "5", "sinfo", "--noheader", "--format=%T"], capture_output=True, text=True)
    return done.returncode == 0 and any(word in done.stdout for word in ("idle", "mixed", "allocated", "completing"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep in this process, one cell after the other."""
    folder = laboratory(tmp_path_factory, "calm")
    assert inside(sweep.main, *words(folder, seeds=SEEDS)) == 0
    return folder


@pytest.fixture
def timed(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Says how long a way took, where many cells are to prove something."""
    started = time.monotonic()
    yield
    if PROVE:
        with capsys.disabled():
            print(f"\n{request.node.name}: {2 * len(SEEDS)} cells, {time.monotonic() - started:.0f} s", flush=True)


def assert_same(folder: Path, calm: Path) -> None:
    ours, theirs = finished(folder), finished(calm)
    assert sorted(run["identity"] for run in ours) == sorted(run["identity"] for run in theirs)
    assert len(ours) == 2 * len(SEEDS)
    assert not {run["path"].parent.name for run in ours} & {run["path"].parent.name for run in theirs}
    assert tables(folder) == tables(calm)


@pytest.mark.usefixtures("timed")
def test_joblib_stopped_and_continued(calm: Path, tmp_path: Path):
    another(calm, tmp_path)
    process = small_sweep.start(command(tmp_path, *JOBLIB, seeds=SEEDS))
    small_sweep.wait_for_a_checkpoint(tmp_path, process, after=0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends Ctrl-C: to all processes
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert f"interrupted: {len(finished(tmp_path))} of {2 * len(SEEDS)} cells are finished" in err
    assert "Traceback" not in out + err
    done = swept(tmp_path, *JOBLIB, seeds=SEEDS)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    total = 2 * len(SEEDS)
    assert f"; {total} of {total} done" in done.stdout
    assert "Launching" not in done.stdout
    assert_same(tmp_path, calm)


@pytest.mark.usefixtures("timed")
@pytest.mark.skipif(not slurm_is_up(), reason="no Slurm takes jobs here; make prove-launchers starts one")
def test_slurm(calm: Path, tmp_path: Path):
    own = f"hydra.sweep.dir={tmp_path / 'jobs'}"
    done = swept(another(calm, tmp_path), "hydra/launcher=slurm", own, seeds=SEEDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Slurm jobs " in done.stdout
    assert "seed=1: started" in done.stdout
    assert_same(tmp_path, calm)


@pytest.mark.usefixtures("timed")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: needle[ray]")
def test_ray(calm: Path, tmp_path: Path):
    done = swept(another(calm, tmp_path), "hydra/launcher=ray", "hydra.launcher.runs_at_a_time=2", seeds=SEEDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(tmp_path, calm)


@pytest.mark.usefixtures("timed")
@pytest.mark.skipif(not PROVE, reason="a process for each cell; make prove-launchers runs it")
def test_wandb_agent(calm: Path, tmp_path: Path):
    another(calm, tmp_path)
    grid = Sweep(question=None, arms={name: tuple(one) for name, one in ARMS.items()}, grid={"seed": SEEDS}, report=())
    cell = words(tmp_path, seeds=SEEDS, more=["logger=wandb"])
    given = [sys.executable, "-m", "needle.wandb_sweep", "cell", *cell, "at", PARAMETERS]
    text = as_yaml("001_losses", grid, where={"project": "needle"}, suites=["validation"], command=given)
    (tmp_path / "sweep.yaml").write_text(text)
    with running("wandb_server.py", "--folder", str(tmp_path / "store"), "--key-required", KEY) as server:

        def wandb(*arguments: str) -> str:
            own = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "WANDB_SILENT": "false"}
            started = [sys.executable, "-m", "wandb", *arguments]
            done = subprocess.run(
                started, cwd=small_sweep.REPOSITORY, env=os.environ | own, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        for _ in range(2):  # the second sweep finds every cell finished
            told = wandb("sweep", str(tmp_path / "sweep.yaml"))
            (path,) = (word for word in told.split() if word.startswith("local/needle/"))
            wandb("agent", path)
    both = [json.loads(one.read_text()) for one in (tmp_path / "store" / "sweeps").glob("*.json")]
    assert len(both) == 2
    for asked in both:
        assert asked["config"] == yaml.safe_load(text)
        assert len(asked["runs"]) == 2 * len(SEEDS)
        sent = [json.loads((tmp_path / "store" / "runs" / f"{name}.json").read_text()) for name in asked["runs"]]
        assert {run["state"] for run in sent} == {"finished"}
        assert all("validation/call_exact_frac" in run["summary"] for run in sent)
    assert len(finished(tmp_path)) == 2 * len(SEEDS)
    # The agent's cells are this sweep's cells: nothing is left to run, and the table is of all of them.
    assert inside(sweep.main, *words(tmp_path, seeds=SEEDS)) == 0
    assert_same(tmp_path, calm)
