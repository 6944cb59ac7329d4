"""Scoring: which runs and suites are taken, what is written, what is kept, and what an unanswerable request counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from needle import score as stage
from needle.decode import Decoded
from needle.errors import ConfigError, DataError
from needle.metrics import matching
from needle.schema import Example, Tool, ToolCall
from needle.score import Settings, Suite
from needle.scores import TrainingRun, answers_path, read_answers, read_score, score_name, score_path, select_runs
from needle.student import SimpleAttentionNetwork, load, save
from needle.student.confidence import remove_head, save_head, unchanged
from needle.text.tokenizer import TextCodec, train_tokenizer

TIMER = Tool("set_timer", "Start a timer.", {"type": "object", "properties": {"minutes": {"type": "integer"}}})
SETTINGS = Settings(
    constrained=True, limit=None, max_new_tokens=24, max_calls=2, matching_version=matching.MATCHING_VERSION
)


def example(index: int, *, empty: bool = False) -> Example:
    return Example(
        id=f"e{index}",
        query=f"set a timer for {index} minutes" + " please" * index,
        tools=(TIMER,),
        calls=() if empty else (ToolCall("set_timer", {"minutes": index}),),
        kind="none" if empty else "single",
        domain="timers",
        split="validation",
    )


EXAMPLES = [example(1), example(2), example(3), example(4, empty=True), example(5)]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A folder with a tiny untrained student."""
    folder = tmp_path_factory.mktemp("student")
    texts = [one.query for one in EXAMPLES] + ["set_timer", "minutes"]
    codec = TextCodec(train_tokenizer(texts, vocab_size=400), "signature")
    network = SimpleAttentionNetwork(
        name="tiny",
        width=32,
        heads=2,
        kv_heads=1,
        encoder_layers=1,
        decoder_layers=1,
        ffn_width=0,
        rope_theta=10000.0,
        gated=True,
        qk_norm=True,
        sandwich_norm=False,
        copy=True,
        copy_width=8,
        lexical_match=True,
        selective_read=True,
        retrieval_width=0,
        dropout_frac=0.1,
    )
    save(network.build(codec), codec, folder)
    return folder


def write_run(root: Path, name: str, student: Path, *, status: str = "finished", kind: str = "train") -> Path:
    folder = root / kind / name
    folder.mkdir(parents=True)
    for checkpoint in ("model", "initial"):
        (folder / checkpoint).symlink_to(student)
    shards = root / "shards"
    shards.mkdir(exist_ok=True)
    (shards / "validation.jsonl").write_text("".join(one.to_json() + "\n" for one in EXAMPLES))
    record = {"stage": kind, "status": status, "seed": 0, "facts": {"shards": str(shards)}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    return folder


@pytest.fixture
def run(tmp_path, student) -> TrainingRun:
    return TrainingRun.open(write_run(tmp_path, "one", student))


class Answers:
    """Stands for a decoder: answers the request of example n with `planned[n]`, and notes the batches."""

    def __init__(self, planned: dict[int, Decoded]):
        self.planned = planned
        self.batches: list[int] = []

    def decode(self, requests):
        self.batches.append(len(requests))
        return [self.planned[int(query.split()[4])] for query, _ in requests]


def decoded(calls: list[ToolCall] | None, *, text: str = "", error: str | None = None) -> Decoded:
    return Decoded(calls=calls, text=text, token_ids=[], confidence=0.25, error=error)


PLANNED = {
    1: decoded([ToolCall("set_timer", {"minutes": 1})]),
    2: decoded(None, error="the prompt has 2000 tokens, the limit is 1024"),
    3: decoded([]),
    4: decoded([]),
    5: decoded(None, text='[{"name":"set_timer","argum\ud800', error="not JSON"),
}


def score_with(monkeypatch, decoder, run, **changes):
    """Scores the validation suite of the run's final student with a stand-in for the decoder."""
    monkeypatch.setattr(stage, "Decoder", lambda *_, **__: decoder)
    suites = stage._suites(run, ["validation"])
    options = {"batch_size": 2, "device": "cpu", "again": False} | changes
    settings = options.pop("settings", SETTINGS)
    stage._score_checkpoint(run, "final", suites, settings, **options)
    name = score_name("validation", constrained=settings.constrained, limit=settings.limit)
    return score_path(run.folder, checkpoint="final", name=name)


def test_a_score_by_hand(monkeypatch, run):
    decoder = Answers(PLANNED)
    path = score_with(monkeypatch, decoder, run)
    score = read_score(path)
    assert decoder.batches == [2, 2, 1]
    assert (score["n"], score["errors"], score["skipped_lines"]) == (5, 2, 0)
    assert score["error_reasons"]["not JSON"] == 1
    assert score["metrics"]["call_exact_frac"] == 2 / 5
    assert score["metrics"]["json_valid_frac"] == 3 / 5  # what cannot be answered is wrong in every way
    assert score["metrics"]["abstain_precision_frac"] == 1 / 2
    assert score["metrics"]["abstain_recall_frac"] == 1.0
    assert score["by_kind"]["single"]["call_exact_frac"] == 1 / 4
    assert score["by_seen"] == {"seen": {"n": 5, **score["metrics"]}}
    assert score["by_tools"]["1"]["n"] == 5
    records = read_answers(path)
    assert [one["id"] for one in records] == ["e1", "e2", "e3", "e4", "e5"]
    assert [one["exact"] for one in records] == [True, False, False, True, False]
    assert records[4]["text"].endswith("\ud800")
    assert (records[0]["n_tools"], records[0]["confidence"], records[1]["calls"]) == (1, 0.25, None)
    assert matching.fractions(one["counts"] for one in records) == score["metrics"]


def test_the_same_score_is_kept_and_another_is_not(monkeypatch, run, capsys):
    path = score_with(monkeypatch, Answers(PLANNED), run)
    written = path.stat().st_mtime_ns
    score_with(monkeypatch, None, run)  # no decoder: an answer would fail
    assert "already scored" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == written
    score_with(monkeypatch, Answers(PLANNED), run, again=True)
    assert path.stat().st_mtime_ns > written
    free = score_with(monkeypatch, Answers(PLANNED), run, settings=Settings(False, 3, 24, 2, 1))
    assert free.name == "final_validation_free_limit3.json"
    assert read_score(path)["n"] == 5
    assert [one["id"] for one in read_answers(free)] == ["e1", "e2", "e4"]  # spread over the suite


def test_an_answer_is_as_sure_as_the_confidence_head_says(monkeypatch, run, student):
    score_with(monkeypatch, Answers(PLANNED), run)
    save_head(unchanged(width=load(student)[0].config.width), student)
    try:
        later = Answers(PLANNED)
        score_with(monkeypatch, later, run)
        assert later.batches
        score_with(monkeypatch, None, run)  # no decoder: an answer would fail
    finally:
        remove_head(student)


def test_changed_examples_and_damaged_files_are_scored_anew(monkeypatch, run, capsys):
    path = score_with(monkeypatch, Answers(PLANNED), run)
    suite = Path(run.facts["shards"]) / "validation.jsonl"
    suite.write_text("".join(one.to_json() + "\n" for one in EXAMPLES[:2]) + "broken\n")
    score_with(monkeypatch, Answers(PLANNED), run)
    assert (read_score(path)["n"], read_score(path)["skipped_lines"]) == (2, 1)
    assert "1 unusable lines are not scored; the first is line 3: not JSON" in capsys.readouterr().out
    path.write_text(path.read_text()[:40])
    score_with(monkeypatch, Answers(PLANNED), run)
    assert read_score(path)["n"] == 2
    answers_path(path).unlink()
    score_with(monkeypatch, Answers(PLANNED), run)
    assert len(read_answers(path)) == 2


def test_suites(run, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(EXAMPLES[0].to_json())
    shards = Path(run.facts["shards"])
    assert stage._suites(run, ["validation", str(mine)]) == [
        Suite("validation", shards / "validation.jsonl"),
        Suite("mine", mine),
    ]
    named_alike = str(shards / "validation.jsonl")
    assert [suite.name for suite in stage._suites(run, ["validation", named_alike])] == [
        "validation",
        "shards_validation",
    ]
    with pytest.raises(DataError, match="validation, test, unseen, or a path"):
        stage._suites(run, ["valdation"])
    with pytest.raises(DataError, match=r"no file .*unseen.jsonl; run needle.prepare"):
        stage._suites(run, ["unseen"])
    with pytest.raises(ConfigError, match="'mine'"):
        stage._suites(run, [str(mine), str(mine)])


def test_runs_are_found_by_folder_pattern_or_all(tmp_path, student):
    root = tmp_path / "runs"
    with pytest.raises(DataError, match=r"no finished training run .* python -m needle.train"):
        select_runs(None, root=root)
    one, two = (write_run(root, name, student) for name in ("a-1", "a-2"))
    failed = write_run(root, "b-1", student, status="failed")
    assert [found.folder for found in select_runs(None, root=root)] == [one, two]
    assert [found.folder for found in select_runs(str(root / "train" / "a-*"), root=root)] == [one, two]
    assert [found.folder for found in select_runs([str(failed), str(one), str(one)], root=root)] == [failed, one]
    with pytest.raises(DataError, match="matches"):
        select_runs(str(root / "train" / "z-*"), root=root)
    with pytest.raises(DataError, match="does not exist"):
        select_runs(str(root / "train" / "z"), root=root)
    with pytest.raises(DataError, match=r"holds no run.json"):
        select_runs(str(root), root=root)
    other = write_run(root, "c", student, kind="predict")
    with pytest.raises(DataError, match="stage 'predict'"):
        select_runs(str(other), root=root)


def test_a_run_without_the_wanted_student_is_refused(monkeypatch, run):
    (run.folder / "model").unlink()
    with pytest.raises(DataError, match="has no final student"):
        score_with(monkeypatch, None, run)


@pytest.mark.parametrize(
    ("constrained", "limit", "name"), [(True, None, "unseen"), (False, None, "unseen_free"), (True, 9, "unseen_limit9")]
)
def test_names(constrained, limit, name):
    assert score_name("unseen", constrained=constrained, limit=limit) == name


def test_the_command_scores_a_real_student(tmp_path, student, repository):
    """An untrained student under the grammar: its scores are complete, and a second call keeps them."""
    folder = write_run(tmp_path / "runs", "one", student)
    settings = ["suites=[validation]", "max_new_tokens=24", "checkpoints=[final]", f"paths.runs={tmp_path / 'runs'}"]
    command = [sys.executable, "-m", "needle.score", *settings]
    first, second = (
        subprocess.run(command, cwd=repository, capture_output=True, text=True, env={**os.environ, "COLUMNS": "150"})
        for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    score = read_score(score_path(folder, checkpoint="final", name="validation"))
    assert score["n"] == 5
    assert score["examples_per_s"] > 0
    for record in read_answers(score_path(folder, checkpoint="final", name="validation")):
        assert record["calls"] is not None or record["error"]
    assert "already scored" not in first.stdout
    assert "already scored" in second.stdout
    assert "validation" in second.stdout
