"""What W&B is told: offline in the run's own folder, sent by the real `wandb sync`; and online, to a local server."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import indent
from typing import Any, cast

import pytest
import wandb
import yaml
from omegaconf import OmegaConf
from running import running
from wandb.util import get_core_path

from needle import artifacts, config
from needle.errors import ConfigError, UserError
from needle.experiment import Sweep
from needle.runs import Run, claim, find
from needle.tracking import NoTracking, WandbTracking, identity_of, lineage
from needle.wandb_sweep import PARAMETERS, as_yaml

KEY = "canary0key0" * 4
SECRET = "wake me when the canary sings"
QUESTION = "Does a teacher's distribution teach more than its answers?"
SPANS = ("structure", "name", "key", "value", "stop")

# A job of a multirun and what an agent starts: a run without its training.
PROGRAM = """
import json, sys
from pathlib import Path
from omegaconf import OmegaConf
import hydra
from needle import config
from needle.runs import claim

def job(cfg):
    plain = OmegaConf.to_container(cfg, resolve=True)
    tracking = config.build(plain["logger"])
    plain |= {"_choices_": {"experiment": "001_losses"}, "_overrides_": []}
    run = claim(Path(plain["paths"]["runs"]), stage="train", name=plain["name"], cfg=plain, inputs={})
    tracking.begin(run, plain).log({"val/loss_nats": 1.0 / plain["seed"], "tokens": 7})
    tracking.summary({"unseen/call_exact_frac": 0.25})
    (run.folder / "model").mkdir()
    (run.folder / "model" / "model.safetensors").write_bytes(str(plain["seed"]).encode())
    tracking.close(0)

if sys.argv[1] == "cell":
    point = json.loads(sys.argv[-1])
    job(config.compose("train", [*sys.argv[2:-1], *(f"{key}={value}" for key, value in point.items())])[0])
else:
    hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="train")(job)()
"""


@pytest.fixture(autouse=True)
def environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_DATA_DIR", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {key: value for name, child in node.items() for key, value in leaves(child, f"{prefix}.{name}").items()}


def configuration(*overrides: str) -> dict[str, Any]:
    """A training run's, whole and resolved, as needle.train would have it."""
    cfg, runtime = config.compose("train", overrides)
    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    return {**plain, "_choices_": {"loss": runtime.runtime.choices["loss"]}, "_overrides_": list(overrides)}


def transaction_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run's file, read back by W&B's own reader."""
    (log,) = run.glob("wandb/offline-run-*/run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(log), str(log.parent.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def told_config(records: list[dict[str, Any]]) -> dict[str, Any]:
    return next(record["run"] for record in records if record["type"] == "run")["config"]["update"]


# W&B's own command line; agents ask more often than every five seconds.
COMMAND_LINE = "import wandb.wandb_agent as a; a.Agent.POLL_INTERVAL = 0.1; from wandb.cli.cli import cli; cli()"


def with_wandb(program: str, *words: str, url: str, folder: Path, **variables: str) -> str:
    """What the program writes to stderr, where W&B's messages go."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(folder), **variables}
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=kept | own, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def files_with(text: str, *folders: Path) -> list[Path]:
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert paths
    return [path for path in paths if text.encode() in path.read_bytes()]


def received(store: Path, kind: str) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (store / kind).glob("*.json")]
    return {one["name"] if kind == "artifacts" else one["id"]: one for one in found}


def student(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    return folder


def write_score(folder: Path) -> Path:
    score = folder / "scores" / "final_unseen.json"
    totals = {"suite": "unseen", "checkpoint": "final", "n": 1, "metrics": {"call_exact_frac": 1.0}, "inputs": {}}
    artifacts.write_json_atomic(score, totals)
    line = {"id": "one", "query": SECRET, "text": SECRET, "gold": [SECRET], "exact": True, "confidence": 0.5}
    score.with_name("final_unseen.examples.jsonl").write_text(json.dumps(line) + "\n")
    return score


@dataclass(frozen=True)
class Laboratory:
    """What lies on disk after a tracked run on a user's own corpus, and its report."""

    root: Path
    cfg: dict[str, Any]
    run: Run
    teacher: Path


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    root = tmp_path_factory.mktemp("laboratory")
    teacher = student(root / "published" / "teacher", b"teacher")
    derived = {
        "corpus": {"teacher": "RecordedTeacher", "path": "here"},
        "shards": {"corpus": "corpus-1", "tokenizer": "None"},
        "signals": {"shards": "shards-1", "teacher": str(teacher)},
    }
    for kind, inputs in derived.items():
        folder = root / "artifacts" / f"{kind}-1"
        with artifacts.publish(folder, kind=kind, inputs=inputs, counts={"examples": 3}) as temporary:
            (temporary / "train.jsonl").write_text(SECRET)
    cfg = configuration(
        *("loss=forward_kl", "teacher=checkpoint", f"teacher.checkpoint={teacher}", f"initial={teacher}"),
        *(f"data.corpus={root / 'artifacts' / 'corpus-1'}", "name=001_losses", "arm=forward_kl", "seed=3"),
        *(
            f"sweep.question={json.dumps(QUESTION)}",
            f"paths.artifacts={root / 'artifacts'}",
            f"paths.runs={root / 'runs'}",
        ),
    )
    tracking: WandbTracking = config.build(cfg["logger"])
    inputs = {"shards": "shards-1", "signals": "signals-1", "initial": "0" * 64}
    run = claim(root / "runs", stage="train", name="001_losses", cfg=cfg, inputs=inputs)
    tracked = tracking.begin(run, cfg)
    for step in (1, 2, 3):
        losses = {f"train/loss_{span}_nats": 1 / step for span in SPANS} | {"val/loss_nats": abs(step - 2.5)}
        tracked.log({**losses, "tokens": 100 * step, "trainer/global_step": step})
    student(run.folder / "model", b"student")
    run.note(parameters=10, tokens=300, train_seconds=36.0)
    score = write_score(run.folder)
    tracking.table("samples", ("request", "answer"), [(SECRET, "none")])
    tracking.summary({"unseen/call_exact_frac": 1.0})
    tracking.close(0)
    report = root / "001_losses"
    report.mkdir()
    (report / "results.csv").write_text("setting,mean\nforward_kl,1.0\n")
    tracking.report(report, [(run.folder, cfg, score)], root=root / "runs")
    return Laboratory(root, cfg, run, teacher)


@pytest.fixture(scope="module")
def store(laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a server has received once every offline run is sent."""
    folder = tmp_path_factory.mktemp("server")
    with running("wandb_server.py", "--folder", str(folder), "--key-required", KEY) as server:
        program = "from needle.tracking.__main__ import main; import sys; main(sys.argv[1:])"
        told = with_wandb(program, str(laboratory.root / "runs"), url=server.url, folder=folder)
        # Corpus, shards, signals, the training and its report.
        assert told.count("Finished syncing") == 5, told
        assert server.stats()["unknown"] == {}
        yield folder


@pytest.mark.parametrize(
    ("cfg", "changed", "expected"),
    [
        ({"name": "san_nano"}, {}, (None, "train", (), None)),
        ({"name": "001_a", "arm": "x", "sweep": {"question": "q?"}}, {}, ("001_a", "train", ("x",), "q?")),
        ({"name": "n", "arm": "x", "_choices_": {"experiment": "001_a"}}, {}, ("001_a", "train", ("x",), None)),
        (
            {"name": "001_a", "arm": "x", "sweep": {"question": "q?"}},
            {"group": "g", "job_type": "j", "tags": ("t", "x"), "notes": ""},
            ("g", "j", ("t", "x"), ""),
        ),
    ],
)
def test_an_experiment_names_its_runs_unless_the_logger_does(cfg: dict, changed: dict, expected: tuple):
    logger = replace(config.build(configuration()["logger"]), **changed)
    shown = identity_of(cfg, logger, stage="train")
    assert (shown.group, shown.job_type, shown.tags, shown.notes) == expected


def test_the_run_file_holds_the_whole_configuration_and_system_metrics(laboratory: Laboratory):
    records = transaction_log(laboratory.run.folder)
    told, expected = leaves(told_config(records)), leaves({k: v for k, v in laboratory.cfg.items() if k[0] != "_"})
    assert len(expected) > 150
    assert {key: told.get(key, "absent") for key in expected} == expected
    assert told[".choices.loss"] == "forward_kl"
    assert told[".identity"] == laboratory.run.record["identity"]
    stats = [record["stats"]["item"] for record in records if record["type"] == "stats"]
    assert "proc.memory.rssMB" in stats[0]


def test_synced_runs_arrive_whole(laboratory: Laboratory, store: Path):
    run = received(store, "runs")[laboratory.run.folder.name]
    shown = {name: run[name] for name in ("project", "group", "job_type", "tags", "notes", "state", "exit_code")}
    assert shown == {
        "project": "needle",
        "group": "001_losses",
        "job_type": "train",
        "tags": ["forward_kl"],
        "notes": QUESTION,
        "state": "finished",
        "exit_code": 0,
    }
    assert run["config"]["optim"] == laboratory.cfg["optim"]
    assert [line["train/loss_value_nats"] for line in run["history"]] == pytest.approx([1, 1 / 2, 1 / 3])
    assert [line["tokens"] for line in run["history"]] == [100, 200, 300]
    assert run["summary"]["unseen/call_exact_frac"] == 1.0
    assert run["summary"]["val/loss_nats"] == {"min": 0.5, "last": 0.5}
    assert run["summary"]["train/loss_stop_nats"] == pytest.approx(1 / 3)
    assert {"parameters": 10, "tokens": 300, "train_hours": 0.01}.items() <= run["summary"].items()
    assert any("system.proc.memory.rssMB" in event for event in run["events"])


def test_lineage_leads_from_the_corpus_to_the_table(laboratory: Laboratory, store: Path):
    things, name = received(store, "artifacts"), laboratory.run.folder.name
    edges = {}
    for run in received(store, "runs").values():
        made = [one for one in run["logged"] if not one.startswith("run-")]
        edges[run["job_type"]] = ({*run["used"]}, {*made})
    assert edges == {
        "generate": (set(), {"corpus-1"}),
        "prepare": ({"corpus-1"}, {"shards-1"}),
        "signals": ({"shards-1", "teacher"}, {"signals-1"}),
        "train": ({"shards-1", "signals-1", "teacher"}, {f"{name}.model", f"{name}.final_unseen"}),
        "report": ({f"{name}.final_unseen"}, {"table-001_losses"}),
    }
    kinds = {one["name"]: one["type"] for one in things.values()}
    assert kinds == {
        **{f"{kind}-1": kind for kind in ("corpus", "shards", "signals")},
        **dict.fromkeys(("teacher", f"{name}.model"), "checkpoint"),
        f"{name}.final_unseen": "predictions",
        "table-001_losses": "table",
        **{one: "run_table" for one in kinds if one.startswith("run-")},
    }
    # One version of each, whoever named it.
    assert {one["version"] for one in things.values()} == {0}
    assert {one["state"] for one in things.values()} == {"COMMITTED"}
    assert things["shards-1"]["metadata"]["counts"] == {"examples": 3}
    weights = store / "artifacts" / things[f"{name}.model"]["id"] / "model.safetensors"
    assert weights.read_bytes() == b"student"


def test_neither_key_nor_corpus_leaves_the_machine(laboratory: Laboratory, store: Path):
    tracked = [laboratory.run.folder / "wandb", laboratory.root / "runs" / "lineage"]
    assert files_with(SECRET, store, *tracked) == []
    assert files_with(KEY, store, laboratory.root) == []
    # The verdicts are there all the same.
    thing = received(store, "artifacts")[f"{laboratory.run.folder.name}.final_unseen"]
    answers = (store / "artifacts" / thing["id"] / "final_unseen.examples.jsonl").read_text()
    assert json.loads(answers) == {"id": "one", "exact": True, "confidence": 0.5}


def test_what_may_be_sent_is_sent_whole(laboratory: Laboratory):
    own = laboratory.cfg
    public = {**own, "data": {**own["data"], "corpus": "data/teacher_corpus"}}
    asked = {**own, "logger": {**own["logger"], "upload_data": True}}
    given = {**public, "data": {**public["data"], "given": ["mine.jsonl"]}}
    assert [lineage.shares_texts(cfg) for cfg in (own, public, asked, given)] == [False, True, True, False]
    score = laboratory.run.folder / "scores" / "final_unseen.json"
    whole = lineage.predictions(laboratory.run.folder, score, with_texts=True)
    assert files_with(SECRET, *[path.parent for path in whole.files.values() if isinstance(path, Path)])
    corpus = lineage.derived(laboratory.root / "artifacts" / "corpus-1", with_data=True)
    assert sorted(corpus.files) == ["manifest.json", "train.jsonl"]
    hashed = lineage.checkpoint(laboratory.teacher, with_weights=False)
    assert sorted(hashed.files) == ["config.json"]
    assert len(hashed.metadata["sha256"]) == 64


def test_answers_to_a_suite_of_the_users_own_stay_though_the_corpus_is_public(laboratory: Laboratory, tmp_path: Path):
    own = laboratory.cfg
    public = {**own, "data": {**own["data"], "corpus": "data/teacher_corpus"}}
    shards, run = tmp_path / "shards", tmp_path / "run"
    for folder in (shards, run):
        folder.mkdir()
    (shards / "unseen.jsonl").write_text("of the corpus")
    (run / "run.json").write_text(json.dumps({"facts": {"shards": str(shards)}}))
    scores = {}
    for name, text in {"unseen": "of the corpus", "unseen_free": "of the user"}.items():
        scores[name] = run / f"final_{name}.json"
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        scores[name].write_text(json.dumps({"suite": name, "inputs": {"suite": sha256}}))
    shared = {name: lineage.shares_answers(public, run, score) for name, score in scores.items()}
    assert shared == {"unseen": True, "unseen_free": False}
    asked = {**public, "logger": {**own["logger"], "upload_data": True}}
    assert lineage.shares_answers(asked, run, scores["unseen_free"])
    assert not lineage.shares_answers(own, run, scores["unseen"])


def _diverges(tracking: WandbTracking, run: Run, cfg: dict[str, Any]) -> None:
    with tracking:
        tracking.begin(run, cfg).log({"val/loss_nats": 5.0, "tokens": 1})
        raise FloatingPointError


def test_makers_are_recorded_once(laboratory: Laboratory):
    again = Run(laboratory.run.folder.parent / "again")
    again.folder.mkdir()
    for name in ("run.json", "config.yaml"):
        (again.folder / name).write_bytes((laboratory.run.folder / name).read_bytes())
    facts = laboratory.run.record["facts"]
    tracking: WandbTracking = config.build(laboratory.cfg["logger"])
    # It is continued: it has the id that it had.
    assert tracking.begin(again, laboratory.cfg).id == facts["wandb"]["id"] == laboratory.run.folder.name
    # What an error left open does not take the next run's metrics in, and has failed.
    fresh = claim(laboratory.root / "runs", stage="train", name="next", cfg=laboratory.cfg, inputs={})
    with pytest.raises(FloatingPointError):
        _diverges(tracking, fresh, laboratory.cfg)
    for folder, lines in ((again.folder, 0), (fresh.folder, 1)):
        records = transaction_log(folder)
        assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [1]
        assert [record["type"] for record in records].count("history") == lines
    assert len(list((laboratory.root / "runs" / "lineage").rglob("offline-run-*"))) == 4
    # A run that failed has used what it read, and leaves no student.
    said = [record["artifact"] for record in transaction_log(fresh.folder) if record["type"] == "artifact"]
    assert [(one["name"], one.get("use_after_commit")) for one in said] == [("teacher", True)]


def test_parallel_jobs_hold_each_its_own_whole_configuration(tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    words = [f"paths.runs={tmp_path / 'runs'}", "seed=1,2", "name=parallel"]
    command = [sys.executable, str(tmp_path / "program.py"), "--multirun", *launcher, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs, seen = find(tmp_path / "runs", stage="train"), []
    for run in runs:
        told, expected = leaves(told_config(transaction_log(run.folder))), leaves(run.config)
        own = {key: value for key, value in expected.items() if not key.startswith("._")}
        assert {key: told.get(key, "absent") for key in own} == own
        seen.append(told[".seed"])
    assert sorted(seen) == [1, 2]


def test_a_run_of_many_leaves_the_telling_to_whoever_runs_them(tmp_path: Path):
    words = ["cell", "logger=wandb", f"paths.runs={tmp_path / 'runs'}", '{"seed": 1}']
    where = {"url": "http://127.0.0.1:9", "folder": tmp_path}
    assert "Run history" in with_wandb(PROGRAM, *words, **where)
    of_many = f"from needle.console import quiet\nwith quiet():\n{indent(PROGRAM, '    ')}"
    assert with_wandb(of_many, *words, **where) == ""


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A server's folder and address."""
    folder = tmp_path_factory.mktemp("online")
    (folder / "program.py").write_text(PROGRAM)
    with running("wandb_server.py", "--folder", str(folder / "store"), "--key-required", KEY) as server:
        yield folder, server.url


def test_online_runs_arrive_while_they_run(online: tuple[Path, str], monkeypatch: pytest.MonkeyPatch):
    folder, url = online
    cfg = configuration(f"paths.runs={folder / 'runs'}", "logger.mode=online", "arm=here")
    run = claim(folder / "runs", stage="train", name="here", cfg=cfg, inputs={})
    wandb.teardown()  # it has read the environment already; the setting outweighs WANDB_MODE
    for name, value in {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    try:
        tracking: WandbTracking = config.build(cfg["logger"])
        tracking.begin(run, cfg).log({"val/loss_nats": 0.25, "tokens": 9})
        assert received(folder / "store", "runs")[run.folder.name]["config"]["optim"] == cfg["optim"]
        student(run.folder / "model", b"online")
        tracking.close(0)
    finally:
        wandb.teardown()
    told = received(folder / "store", "runs")[run.folder.name]
    assert (told["state"], told["history"][0]["val/loss_nats"], told["tags"]) == ("finished", 0.25, ["here"])
    assert told["logged"] == [f"{run.folder.name}.model"]
    assert files_with(KEY, run.folder, folder / "store") == []


def test_an_agents_run_keeps_its_id_and_is_online(online: tuple[Path, str]):
    folder, url = online
    sweep = Sweep(question=QUESTION, arms={"hard_label": ("loss=hard_label",)}, grid={"seed": (5,)}, report=())
    program = [sys.executable, str(folder / "program.py"), "cell", f"paths.runs={folder / 'agent_runs'}"]
    text = as_yaml("001_losses", sweep, where={"project": "needle"}, suites=["unseen"], command=[*program, PARAMETERS])
    (folder / "sweep.yaml").write_text(text)
    told = with_wandb(COMMAND_LINE, "sweep", "sweep.yaml", url=url, folder=folder)
    (path,) = (word for word in told.split() if word.startswith("local/needle/"))
    with_wandb(COMMAND_LINE, "agent", path, url=url, folder=folder, WANDB_MODE="offline")
    (asked,) = received(folder / "store", "sweeps").values()
    assert asked["state"] == "FINISHED"
    assert asked["config"] == yaml.safe_load(text)
    ((run_id, point),) = asked["runs"].items()
    assert point == {"arm": "hard_label", "seed": 5}
    run = received(folder / "store", "runs")[run_id]
    assert (run["sweep"], run["state"], run["group"], run["tags"]) == (
        asked["id"],
        "finished",
        "001_losses",
        ["hard_label"],
    )
    assert (run["config"]["seed"], run["config"]["name"]) == (5, "san_base")
    (own,) = find(folder / "agent_runs", stage="train")
    assert own.record["facts"]["wandb"]["id"] == run_id


def test_a_missing_key_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"mode=online: .* no WANDB_API_KEY; .*logger\.mode=offline"):
        config.build(configuration("logger.mode=online")["logger"])


def test_a_server_that_refuses_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("permission denied")

    monkeypatch.setattr(wandb, "init", refuse)
    cfg = configuration(f"paths.runs={tmp_path}")
    run = claim(tmp_path, stage="train", name="x", cfg=cfg, inputs={})
    with pytest.raises(UserError, match=r"permission denied.*WANDB_BASE_URL.*logger\.mode=offline"):
        config.build(cfg["logger"]).begin(run, cfg)


def test_no_tracking_takes_all_that_tracking_takes(tmp_path: Path):
    silent = NoTracking()
    assert silent.open(Run(tmp_path), {}) == []
    public = {name for name in vars(WandbTracking) if not name.startswith("_")} - set(WandbTracking.__annotations__)
    assert public - {"begin"} <= set(vars(NoTracking))
