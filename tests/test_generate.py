"""The generate stage as a user runs it: real clients, servers of their own, kills, budgets, and what lands where."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from running import RunningServer, running

from needle import config
from needle.corpus.catalogue import load
from needle.errors import ConfigError
from needle.generate import corpus_folder, main
from needle.schema import SPLITS
from needle.teacher.ledger import Ledger

CANARY = "canary-8d41f7-key"
# `make prove` raises it.
KILLS = int(os.environ.get("NEEDLE_KILLS", "2"))
RECORDED = Path(__file__).resolve().parent.parent / "data" / "teacher_corpus"
DOMAINS = ("calendar", "email", "timers_alarms", "vehicle")


@pytest.fixture(scope="module")
def gemini() -> Iterator[RunningServer]:
    with running("gemini_server.py", "--latency-ms", "60", "--key", CANARY) as server:
        yield server


@pytest.fixture(scope="module")
def openai() -> Iterator[RunningServer]:
    with running("openai_server.py", "--latency-ms", "5") as server:
        yield server


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few domains of the recorded corpus."""
    folder = tmp_path_factory.mktemp("recorded")
    for domain in DOMAINS:
        for name in (f"{domain}.jsonl", f"{domain}.tools.json"):
            (folder / name).write_bytes((RECORDED / name).read_bytes())
    return folder


class Project:
    """A place for a ledger and artifacts, and the command line that uses it."""

    def __init__(self, folder: Path, corpus: Path):
        self.folder, self.corpus = folder, corpus

    def arguments(self, *overrides: str) -> list[str]:
        places = [f"paths.artifacts={self.folder}/artifacts", f"paths.ledger={self.folder}/ledger.sqlite"]
        return [sys.executable, "-m", "needle.generate", f"data.corpus={self.corpus}", *places, *overrides]

    def run(self, *overrides: str, key: str | None = CANARY) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(*overrides), env=environment(key), capture_output=True, text=True, timeout=900, check=False
        )

    def start(self, *overrides: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.arguments(*overrides), env=environment(CANARY), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def corpora(self) -> list[Path]:
        return sorted((self.folder / "artifacts").glob("corpus-*"))

    def files(self) -> dict[str, bytes]:
        """The one corpus there is, without its manifest, which tells the time."""
        (folder,) = self.corpora()
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}

    def examples(self, split: str) -> list[dict]:
        (folder,) = self.corpora()
        return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]

    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger.sqlite")

    def answers(self) -> int:
        return self.ledger().rows("SELECT count(*) FROM replies")[0][0]


def environment(key: str | None) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if name != "GEMINI_API_KEY"}
    return rest | ({"GEMINI_API_KEY": key} if key else {})


@pytest.fixture
def project(tmp_path: Path, corpus: Path) -> Project:
    return Project(tmp_path, corpus)


def label(server: RunningServer, *overrides: str) -> list[str]:
    return [
        "teacher=gemini",
        "role=label",
        f"teacher.base_url={server.url}",
        "teacher.traffic.wait_first_s=0.01",
        *overrides,
    ]


def author(server: RunningServer, *overrides: str) -> list[str]:
    plan = ["plan@role.plan=small", "validation=strict", "judge_samples=1"]
    return ["teacher=gemini", "role=author", *plan, f"teacher.base_url={server.url}", *overrides]


def composed(*overrides: str):
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("generate", list(overrides))
    config.check(cfg, main.stage_function)
    plain = {key: value for key, value in cfg.items() if not key.startswith("_")}
    from omegaconf import OmegaConf

    return config.build_settings(OmegaConf.to_container(OmegaConf.create(plain), resolve=True), main.stage_function)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher=gemini"], "choose role=label .* or role=author"),
        (["teacher=checkpoint"], "choose role=label"),
        (["role=label"], "need a teacher that can be asked"),
        (["role=author"], "need a teacher that can be asked"),
        (["teacher=checkpoint", "role=author"], "cannot write them: choose role=label"),
        (["teacher=gemini", "role=label", "judge_samples=1"], "only role=author"),
        (["teacher=gemini", "role=author", "teacher@judge=gemini"], "judge_samples=1 or more"),
        (["teacher=gemini", "role=author", "teacher@judge=recorded", "judge_samples=1"], "cannot be asked"),
        (["teacher.layout=xlan"], "layout=xlan: choose one of needle, ledger, auto"),
        (["teacher=gemini", "role=label", "teacher.model=gemini-0.1-none"], "no price"),
        (["teacher=gemini", "role=label", "budget_usd=-1"], "budget_usd=-1"),
        (["teacher=gemini", "role=author", "role.plan.kind.single=0.9"], "kind"),
    ],
)
def test_what_does_not_go_together_is_refused_while_composing(overrides: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        composed(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["teacher=gemini", "role=label"],
        ["teacher=gemini", "role=author", "teacher@judge=checkpoint", "judge_samples=2"],
        ["teacher=checkpoint", "role=label"],
        ["teacher=transformers_local", "role=author"],
    ],
)
def test_what_goes_together_composes(overrides: list[str]):
    assert composed(*overrides)["role"] is not None


def test_labels_replace_training_answers_and_leave_evaluation_alone(project: Project, gemini: RunningServer):
    gemini.reset(jobs=True)
    done = project.run(*label(gemini, "role.samples=3"))
    assert done.returncode == 0, done.stderr
    recorded = load(project.corpus)
    counts = {split: len(project.examples(split)) for split in SPLITS}
    assert sum(counts.values()) == len(recorded.examples)
    assert all(counts.values())
    answers = {example.id: [call.name for call in example.calls] for example in recorded.examples}
    for split in SPLITS[1:]:
        assert all([c["name"] for c in e["calls"]] == answers[e["id"]] for e in project.examples(split))
        assert {example["teacher"] for example in project.examples(split)} == {"recorded"}
    assert {e["teacher"].partition(":")[0] for e in project.examples("train")} == {"gemini_base_url"}
    stats = gemini.stats()
    assert (stats["received"], stats["unique"]) == (3 * counts["train"], 3 * counts["train"])
    (folder,) = project.corpora()
    weighted = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(weighted) == counts["train"]
    assert all(sum(answer["weight"] for answer in line["answers"]) == pytest.approx(1) for line in weighted)
    assert max(len(line["answers"]) for line in weighted) == 3
    # Again, without key or server: the same corpus, and nothing is asked.
    before, (folder,) = project.files(), project.corpora()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    again = project.run(*label(gemini, "role.samples=3", "buy=false"), key=None)
    assert again.returncode == 0, again.stderr
    assert project.files() == before
    assert gemini.stats()["received"] == stats["received"]


def test_a_bought_corpus_is_prepared_like_the_recorded_one(project: Project, gemini: RunningServer):
    assert project.run(*label(gemini, "role.limit=60")).returncode == 0
    (folder,) = project.corpora()
    command = [sys.executable, "-m", "needle.prepare", f"data.corpus={folder}", "data.copies_per_request=1"]
    small = ["data.text.vocab_size=600", "workers=1", f"paths.artifacts={project.folder}/artifacts"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (shards,) = (project.folder / "artifacts").glob("shards-*")
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["inputs"]["corpus"] == folder.name
    assert manifest["counts"]["train"]["examples"] == 60


def test_an_authored_corpus_is_checked_and_held_against_its_plan(project: Project, gemini: RunningServer):
    done = project.run(*author(gemini))
    assert done.returncode == 0, done.stderr
    (folder,) = project.corpora()
    report = json.loads((folder / "report.json").read_text())
    train = project.examples("train")
    assert {example["source"] for example in train} == {"authored"}
    assert "vehicle" not in {example["domain"] for example in train}  # it is held out
    assert report["checks"]["agreement"]["passed"] >= len(train)
    rows = [row for row in report["plan"]["rows"] if row["axis"] == "kind"]
    assert sum(row["accepted"] for row in rows) == len(train)
    assert report["plan"]["distances"]["kind"] < 0.2
    refused = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert all(line["reason"] for line in refused)
    assert (folder / "plan.png").stat().st_size > 10_000
    assert (folder / "acceptance.png").stat().st_size > 10_000
    stored = project.ledger().rows("SELECT name, passed FROM acceptance")
    assert dict(stored)["agreement"] == report["checks"]["agreement"]["passed"]


def test_another_judge_beside_the_author(project: Project, gemini: RunningServer, openai: RunningServer):
    judge = [
        "teacher@judge=openai_compatible",
        "judge.provider=local",
        "judge.model=m",
        f"judge.base_url={openai.url}/v1",
    ]
    done = project.run(*author(gemini), *judge)
    assert done.returncode == 0, done.stderr
    by = dict(project.ledger().rows("SELECT provider || '/' || role, count(*) FROM replies GROUP BY 1"))
    assert set(by) == {"gemini_base_url/author", "local/label"}


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_the_corpus_is_that_of_an_uninterrupted_run(
    tmp_path: Path, corpus: Path, gemini: RunningServer, processes: int
):
    gemini.faults(
        {"fault": "error", "probability": 0.05, "attempts": 2},
        {"fault": "rate_limit", "probability": 0.03, "attempts": 1, "retry_after": "0.05"},
    )
    try:
        settings = label(gemini, f"role.samples={2 + KILLS // 10}", "teacher.traffic.concurrency=8")
        whole, killed = (Project(tmp_path / name, corpus) for name in ("whole", "killed"))
        for project in (whole, killed):
            project.folder.mkdir()
        assert whole.run(*settings).returncode == 0
        gemini.reset(jobs=True)
        moments, at_work, total = random.Random(processes), 0, whole.answers()
        for _ in range(KILLS):
            running_ = [killed.start(*settings) for _ in range(processes)]
            # Some time after a number of questions that is as random to the processes as a time would be, and that
            # does not depend on how fast they start.
            moment = gemini.stats()["received"] + moments.randint(1, max(2, 2 * total // KILLS))
            while gemini.stats()["received"] < moment and any(process.poll() is None for process in running_):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.1))
            for process in running_:
                process.send_signal(signal.SIGKILL)
                process.wait()
            at_work += gemini.stats()["answered"] < total
        assert at_work >= KILLS // 2
        print(f"{at_work} of {KILLS} kills found it buying")
        finishing = [killed.start(*settings) for _ in range(processes)]
        assert [process.wait() for process in finishing] == [0] * processes
        while any((killed.folder / "ledger.sqlite-owners").iterdir()):
            time.sleep(0.05)
        stats = gemini.stats()
        assert stats["answered_more_than_once"] == 0
        assert stats["answered"] == stats["unique_answered"] == killed.answers() == whole.answers()
        assert killed.files() == whole.files()
    finally:
        gemini.faults()


@pytest.mark.parametrize("limit", [1, 25])
def test_a_budget_of_calls_ends_cleanly_with_what_was_bought(project: Project, gemini: RunningServer, limit: int):
    gemini.faults({"fault": "error", "probability": 0.3, "attempts": 2})
    gemini.reset(jobs=True)
    try:
        done = project.run(*label(gemini, f"budget_calls={limit}"))
        assert gemini.stats()["received"] == limit
        assert "Traceback" not in done.stderr
        if project.answers():
            assert done.returncode == 0, done.stderr
            assert len(project.examples("train")) == project.answers()
            assert f"budget_calls={limit} is reached" in done.stderr
        else:
            assert done.returncode == 2
            assert "no example came of it" in done.stderr
        project.run(*label(gemini, f"budget_calls={limit}"))
        assert gemini.stats()["received"] == limit
    finally:
        gemini.faults()


def test_a_dry_run_says_what_it_would_cost_and_buys_its_sample_only(project: Project, gemini: RunningServer):
    gemini.reset(jobs=True)
    free = project.run(*label(gemini, "dry_run=true"), key=None)
    assert free.returncode == 0, free.stderr
    assert "no answer of this teacher is known: dry_run_calls=10" in free.stdout
    assert gemini.stats()["received"] == 0
    done = project.run(*label(gemini, "dry_run=true", "dry_run_calls=12"))
    assert done.returncode == 0, done.stderr
    assert gemini.stats()["received"] == 12
    assert "sample: 12 answers with" in done.stdout
    assert "expected: " in done.stdout
    assert project.corpora() == []
    assert project.run(*label(gemini)).returncode == 0
    told = re.search(r"tokens, \$([\d.,]+) \(95% interval \$([\d.,]+) to \$([\d.,]+)\)", done.stdout)
    assert told is not None, done.stdout
    expected, low, high = (float(figure.replace(",", "")) for figure in told.groups())
    manifest = json.loads((project.corpora()[0] / "manifest.json").read_text())
    assert low <= expected <= high
    assert manifest["counts"]["cost_usd"] == pytest.approx(expected, rel=0.5)


def test_no_key_is_written_anywhere(project: Project, gemini: RunningServer):
    gemini.faults({"fault": "echo_key", "probability": 0.2, "attempts": 9})
    try:
        done = project.run(*label(gemini, "role.limit=80"))
        assert done.returncode == 0, done.stderr
        wrong = project.run(*label(gemini, "role.limit=90"), key="another-" + CANARY)
        assert wrong.returncode == 2
        assert "GEMINI_API_KEY" in wrong.stderr
        shown = done.stdout + done.stderr + wrong.stdout + wrong.stderr
        assert CANARY not in shown
        assert "Traceback" not in shown
        files = [path for path in project.folder.rglob("*") if path.is_file()]
        assert len(files) > 10
        assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
        failures = project.ledger().rows("SELECT reason FROM failures")
        assert any("***" in reason for (reason,) in failures)
    finally:
        gemini.faults()


def test_a_missing_key_is_told_with_the_way_out(project: Project, gemini: RunningServer):
    done = project.run(*label(gemini), key=None)
    assert done.returncode == 2
    assert "GEMINI_API_KEY is not set" in done.stderr
    assert "buy=false" in done.stderr
    assert "Traceback" not in done.stderr


def test_public_data_becomes_a_corpus_and_a_ledger_its_own(project: Project, gemini: RunningServer):
    samples = Path(__file__).parent / "corpus" / "layouts"
    xlam = next(path for path in sorted(samples.iterdir()) if "xlam" in path.name)
    done = project.run(f"teacher.path={xlam}", "teacher.layout=xlam")
    assert done.returncode == 0, done.stderr
    examples = [example for split in SPLITS for example in project.examples(split)]
    assert all(example["tools"] for example in examples if example["calls"])
    assert {example["source"].partition(":")[0] for example in examples} == {"xlam"}
    other = Project(project.folder / "other", project.corpus)
    other.folder.mkdir()
    assert other.run(*label(gemini, "role.limit=20", "role.samples=2")).returncode == 0
    again = Project(project.folder / "again", project.corpus)
    done = again.run(f"teacher.path={other.folder}/ledger.sqlite", "teacher.layout=ledger", key=None)
    assert done.returncode == 0, done.stderr
    assert sum(len(again.examples(split)) for split in SPLITS) == 20


def test_the_recorded_corpus_lies_where_the_next_stage_looks_for_it(project: Project):
    assert project.run().returncode == 0
    settings = composed(f"data.corpus={project.corpus}", f"paths.artifacts={project.folder}/artifacts")
    assert project.corpora() == [corpus_folder(settings["paths"], settings["data"])]
    assert project.run().stdout.startswith("corpus is there already")
    # Held against a plan it is another corpus, with the same examples.
    before = project.examples("train")
    for path in project.corpora():
        shutil.rmtree(path)
    assert project.run("plan@role.plan=default").returncode == 0
    assert project.examples("train") == before
    report = json.loads((project.corpora()[0] / "report.json").read_text())
    assert sum(row["accepted"] for row in report["plan"]["rows"] if row["axis"] == "kind") == len(before)


def test_what_the_budget_left_unjudged_is_not_taken_on_trust(project: Project, gemini: RunningServer):
    gemini.reset(jobs=True)
    done = project.run(*author(gemini, "role.plan.rounds=1", "role.plan.tool_source={catalogue: 1.0, invented: 0.0}"))
    assert done.returncode == 0, done.stderr
    authored = project.ledger().rows("SELECT count(*) FROM replies WHERE role='author'")[0][0]
    cut = Project(project.folder / "cut", project.corpus)
    plan = ["role.plan.rounds=1", "role.plan.tool_source={catalogue: 1.0, invented: 0.0}"]
    done = cut.run(*author(gemini, *plan, f"budget_calls={authored + 10}"))
    assert done.returncode == 0, done.stderr
    assert len(cut.examples("train")) <= 10
    (folder,) = cut.corpora()
    refused = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert any("budget_calls" in line["reason"] for line in refused)
    assert json.loads((folder / "report.json").read_text())["cut_short"]
