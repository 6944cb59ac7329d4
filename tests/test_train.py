"""Training as a user runs it: real processes on a tiny slice, killed, interrupted, continued."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from running import running

from needle import artifacts, cells, config
from needle.data.shards import Shard
from needle.errors import ConfigError
from needle.text.render import Span
from needle.train import main

CANARY = "canary-51be07-key"
SLICE = [
    "data.split.domains=[timers_alarms,weather_environment,notes,calendar]",
    "data.copies_per_request=1",
    "data.text.vocab_size=600",
]
STUDENT = ["student=san_nano", "student.width=32", "student.heads=2", "student.kv_heads=1", "student.encoder_layers=1"]
STUDENT += ["student.decoder_layers=1", "student.copy_width=8"]
SMALL = ["trainer=fast", "trainer.steps=24", "trainer.checkpoint_every_steps=8", "trainer.validate_every_steps=8"]
SMALL += ["trainer.log_every_steps=1", "samples=2", "weighting=spans"]


def needle(stage: str, *overrides: str, folder: Path, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        _command(stage, *overrides, folder=folder), capture_output=True, text=True, check=False, **kwargs
    )


def _command(stage: str, *overrides: str, folder: Path) -> list[str]:
    paths = [f"paths.artifacts={folder / 'artifacts'}", f"paths.runs={folder / 'runs'}"]
    return [sys.executable, "-m", f"needle.{stage}", *overrides, *paths]


def composed(overrides: list[str]) -> None:
    """What needle.train does before any work."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("train", overrides)
    config.check(cfg, main.stage_function)
    config.build_settings(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)), main.stage_function)


def the_run(folder: Path) -> Path:
    (found,) = (folder / "runs" / "train").iterdir()
    return found


def trace(run: Path, key: str = "train/loss_nats") -> list[tuple[int, float]]:
    lines = (run / "history.jsonl").read_text().splitlines()
    return [(r["step"], r[key]) for r in map(json.loads, lines) if key in r]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for stage in ("generate", "prepare"):
        done = needle(stage, *SLICE, folder=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path) -> Path:
    """A folder of its own for runs, sharing the prepared shards."""
    (tmp_path / "artifacts").symlink_to(prepared / "artifacts")
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path) -> Path:
    """On hard labels, for which a hosted teacher will do; its key is in the environment."""
    keyed = {**os.environ, "GEMINI_API_KEY": CANARY}
    done = needle("train", *SLICE, *STUDENT, *SMALL, "logger=wandb", "teacher=gemini", folder=prepared, env=keyed)
    assert done.returncode == 0, done.stderr
    assert CANARY not in done.stdout + done.stderr
    return the_run(prepared)


def test_no_key_is_in_a_run_folder(uninterrupted: Path):
    files = [path for path in uninterrupted.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert "GEMINI_API_KEY" in (uninterrupted / "config.yaml").read_text()
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_a_run_folder_holds_what_was_done(uninterrupted: Path):
    record = json.loads((uninterrupted / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["facts"]["steps"] == 24
    assert record["facts"]["tokens"] > 0
    assert record["choices"]["loss"] == "hard_label"
    for name in ("config.yaml", "model/model.safetensors", "initial/model.safetensors", "samples.json"):
        assert (uninterrupted / name).is_file(), name
    steps = [step for step, _ in trace(uninterrupted)]
    assert steps == list(range(1, 25))
    last = json.loads((uninterrupted / "history.jsonl").read_text().splitlines()[-1])
    assert {"val/loss_nats", "val/call_forced_exact_frac"} <= set(last)


def test_the_labels_nats_carry_no_weights_and_the_loss_does(uninterrupted: Path, prepared: Path):
    last = json.loads((uninterrupted / "history.jsonl").read_text().splitlines()[-1])
    (folder,) = (prepared / "artifacts").glob("shards-*")
    spans = Shard.open(folder / "validation").spans
    tokens = {span: int((spans == span).sum()) for span in Span}
    summed = sum(count * last[f"val/loss_{span.name.lower()}_nats"] for span, count in tokens.items() if count)
    assert last["val/label_nats"] == pytest.approx(summed / len(spans), rel=1e-5)
    assert last["val/loss_nats"] != pytest.approx(last["val/label_nats"], rel=1e-3)


def test_wandb_offline_run_holds_the_whole_configuration(uninterrupted: Path):
    (stored,) = uninterrupted.glob("wandb/offline-run-*/run-*.wandb")
    text = stored.read_bytes()
    for key in (b"copies_per_request", b"muon_lr", b"decoder_layers", b"train/loss_value_nats"):
        assert key in text, key


def test_an_offline_run_is_sent_with_its_losses_and_its_lineage(prepared: Path, uninterrupted: Path, tmp_path: Path):
    with running("wandb_server.py", "--folder", str(tmp_path)) as server:
        own = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "HOME": str(tmp_path)}
        command = [sys.executable, "-m", "needle.tracking", str(prepared / "runs")]
        done = subprocess.run(command, env=os.environ | own, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sent = json.loads((tmp_path / "runs" / f"{uninterrupted.name}.json").read_text())
    kept = [json.loads(line) for line in (uninterrupted / "history.jsonl").read_text().splitlines()]
    assert any("train/loss_value_nats" in line for line in kept)
    shown = [{key: value for key, value in line.items() if key[0] != "_"} for line in sent["history"]]
    for line, own in zip(shown, kept, strict=False):  # the last lines hold tables
        step = {"trainer/global_step": own.pop("step")}
        assert line == pytest.approx({key: value for key, value in own.items() if key != "time_s"} | step, abs=1e-6)
    assert len(shown) >= len(kept)
    (shards,) = (prepared / "artifacts").glob("shards-*")
    assert sent["used"] == [shards.name]
    assert f"{uninterrupted.name}.model" in sent["logged"]


def test_kill_and_resume_gives_the_uninterrupted_trace(workplace: Path, uninterrupted: Path):
    started = subprocess.Popen(
        _command("train", *SLICE, *STUDENT, *SMALL, "logger=none", folder=workplace),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(lambda: any(workplace.glob("runs/train/*/checkpoints/step=8.ckpt")), started)
    started.kill()
    started.communicate()
    run = the_run(workplace)
    # Twice, so that a continued run can itself be continued.
    resumed = needle("train", f"resume={run}", folder=workplace)
    assert resumed.returncode == 0, resumed.stderr
    assert trace(run) == trace(uninterrupted)
    # A validation follows the step of the checkpoint: it is in there, and told once.
    assert trace(run, "val/loss_nats") == trace(uninterrupted, "val/loss_nats")
    assert [step for step, _ in trace(run, "val/loss_nats")] == [8, 16, 24]
    ours, theirs = ((r / "model" / "model.safetensors").read_bytes() for r in (run, uninterrupted))
    assert ours == theirs
    again = needle("train", f"resume={run}", folder=workplace)
    assert again.returncode == 2
    assert "finished" in again.stderr
    assert "Traceback" not in again.stderr


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(workplace: Path, uninterrupted: Path):
    started = subprocess.Popen(
        _command("train", *SLICE, *STUDENT, *SMALL, "logger=none", folder=workplace),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(lambda: any(workplace.glob("runs/train/*/history.jsonl")), started)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=120)
    run = the_run(workplace)
    if started.returncode == 0:
        pytest.skip("the run was over before the signal reached it")
    assert started.returncode == 130, err
    assert f"resume={run}" in out
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert needle("train", f"resume={run}", folder=workplace).returncode == 0
    assert trace(run) == trace(uninterrupted)


def test_a_stopped_run_continues_to_another_length(workplace: Path):
    level = ["logger=none", "optim.decay_frac=0"]
    whole = needle("train", *SLICE, *STUDENT, *SMALL, *level, "trainer.steps=12", folder=workplace)
    assert whole.returncode == 0, whole.stderr
    uninterrupted = the_run(workplace).rename(workplace / "uninterrupted")
    shorter = needle("train", *SLICE, *STUDENT, *SMALL, *level, "trainer.steps=8", folder=workplace)
    assert shorter.returncode == 0, shorter.stderr
    run = the_run(workplace)
    record = json.loads((run / "run.json").read_text())
    known_as = record["identity"]
    (run / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    for overrides, word in (
        ([f"resume={run}", "trainer.steps=5"], "fall already"),
        ([f"resume={run}", "trainer.steps=12", "seed=3"], "seed=3"),
        (["resume=/nowhere"], "/nowhere is not a run's folder"),
    ):
        refused = needle("train", *overrides, folder=workplace)
        assert refused.returncode == 2
        assert word in refused.stderr
        assert "Traceback" not in refused.stderr
    stored = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(stored.replace("given_copies:", "copies_that_were_given:"))
    older = needle("train", f"resume={run}", folder=workplace)
    assert older.returncode == 2
    assert all(word in older.stderr for word in (record["commit"][:12], "copies_that_were_given"))
    assert "Traceback" not in older.stderr
    (run / "config.yaml").write_text(stored)
    done = needle("train", f"resume={run}", "trainer.steps=12", folder=workplace)
    assert done.returncode == 0, done.stderr
    assert trace(run) == trace(uninterrupted)
    record = json.loads((run / "run.json").read_text())
    assert [resumed["steps_before"] for resumed in record["resumed"]] == [8]
    assert record["facts"]["steps"] == 12
    # It is neither the shorter run nor the longer one: a schedule would have been laid out for another length.
    assert len({known_as, record["identity"], json.loads((uninterrupted / "run.json").read_text())["identity"]}) == 3


def test_two_processes_do_not_train_one_run(workplace: Path, uninterrupted: Path):
    known_as = json.loads((uninterrupted / "run.json").read_text())["identity"]
    same = [*SLICE, *STUDENT, *SMALL, "logger=none", "teacher=gemini"]
    keyed = {**os.environ, "GEMINI_API_KEY": CANARY}
    stopped = workplace / "runs" / "train" / "stopped"
    shutil.copytree(uninterrupted, stopped)
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    with artifacts.locked(cells.lock_path(workplace / "runs", known_as), wait=False) as mine:
        assert mine
        for words in (same, [f"resume={stopped}"], [f"resume={stopped}", "trainer.steps=48"]):
            refused = needle("train", *words, folder=workplace, env=keyed)
            assert refused.returncode == 2
            assert "another process trains just this" in refused.stderr
            assert "Traceback" not in refused.stderr
    assert the_run(workplace) == stopped


def test_two_devices_are_one_run(workplace: Path):
    two = ["trainer=ddp_cpu", *[word for word in SMALL if word != "trainer=fast"], "suites=[validation]"]
    level = ["logger=none", "optim.decay_frac=0", "trainer.rows_per_micro_batch=2"]
    done = needle("train", *SLICE, *STUDENT, *two, *level, "trainer.steps=8", folder=workplace)
    assert done.returncode == 0, done.stderr
    run = the_run(workplace)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert [step for step, _ in trace(run)] == list(range(1, 9))
    assert [step for step, _ in trace(run, "val/loss_nats")] == [8]
    assert (run / "scores" / "final_validation.json").is_file()
    (run / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    longer = needle("train", f"resume={run}", "trainer.steps=12", folder=workplace)
    assert longer.returncode == 0, longer.stderr
    assert the_run(workplace) == run
    assert [step for step, _ in trace(run)] == list(range(1, 13))
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], len(record["resumed"])) == ("finished", 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss=forward_kl", "teacher=recorded"], ["needs top_k", "teacher=checkpoint"]),
        (["+trainer.stepz=3"], ["stepz", "steps"]),
        (["trainer.steps=0"], ["trainer.steps", "0"]),
        (["rollouts=on_policy", "teacher=checkpoint"], ["HardLabel", "loss=reverse_kl"]),
        (["loss=expected_cross_entropy", "teacher=gemini"], ["data.answers=all", "needle.prepare"]),
        (["auxiliary=[contrastive]"], ["student.retrieval_width=128"]),
        (["auxiliary=[hidden_states]"], ["features", "teacher=checkpoint"]),
        (["curriculum=induction"], ["data.symbolic_examples"]),
    ],
)
def test_what_cannot_work_is_refused_while_the_configuration_is_composed(overrides: list[str], words: list[str]):
    with pytest.raises(ConfigError) as refused:
        composed(overrides)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.stepz=3"], ["stepz"]),
        (["data.copies_per_request=2"], ["needle.prepare"]),
        (["loss=forward_kl", "teacher=checkpoint", "teacher.checkpoint=/nowhere"], ["/nowhere"]),
    ],
)
def test_a_users_mistake_is_told_in_one_message(workplace: Path, overrides: list[str], words: list[str]):
    done = needle("train", *SLICE, *STUDENT, *SMALL, "logger=none", *overrides, folder=workplace)
    assert done.returncode not in (0, 130), done.stdout
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (workplace / "runs" / "train").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_loses_no_checkpoint(workplace: Path, tmp_path_factory: pytest.TempPathFactory):
    small = tmp_path_factory.mktemp("small_disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        # Weights twice and one checkpoint fit; the second checkpoint does not.
        command = _command("train", *SLICE, *STUDENT, *SMALL, "logger=none", folder=workplace)
        done = subprocess.run([*command[:-1], f"paths.runs={small}"], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "disk is full" in done.stderr
        assert "resume=" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(small.glob("train/*/checkpoints/*.part"))
        assert list(small.glob("train/*/checkpoints/*.ckpt"))
        assert not list(small.glob("train/*/model"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _wait_for(happened, process: subprocess.Popen, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def test_given_examples_join_the_training_data_and_bad_or_evaluated_ones_are_set_aside(prepared: Path, tmp_path: Path):
    (tmp_path / "artifacts").mkdir()
    (corpus,) = (prepared / "artifacts").glob("corpus-*")
    (tmp_path / "artifacts" / corpus.name).symlink_to(corpus)
    tools = [{"name": "open_door", "description": "Open a door.", "parameters": {"type": "object", "properties": {}}}]
    good = {"id": "g1", "query": "open it up", "tools": tools, "calls": [{"name": "open_door"}], "kind": "single"}
    evaluated = json.loads((corpus / "test.jsonl").read_text().splitlines()[0])
    lines = [
        good,
        {**good, "id": "g2", "calls": [{"name": "shut"}]},
        {**evaluated, "query": evaluated["query"].upper()},
        {**good, "query": "open the other one"},
    ]
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [f"data.given=[{given}]", "data.given_copies=2", *SLICE]
    done = needle("prepare", *settings, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (shards,) = (tmp_path / "artifacts").glob("shards-*")
    assert json.loads((shards / "manifest.json").read_text())["counts"]["given"] == {"examples": 1, "refused": 3}
    reasons = [json.loads(line)["reason"] for line in (shards / "quarantine.jsonl").read_text().splitlines()]
    assert any("unknown tool 'shut'" in reason for reason in reasons)
    assert "is an evaluated request" in reasons
    assert "its id g1 is another training example's" in reasons
    missing = needle("prepare", f"data.given=[{tmp_path / 'absent.jsonl'}]", *SLICE, folder=tmp_path)
    assert missing.returncode == 2
    assert "absent.jsonl" in missing.stderr
    assert "Traceback" not in missing.stderr
