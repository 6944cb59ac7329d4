"""Reports of run folders written by hand, whose means, deviations, differences and intervals are known."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from needle.errors import ConfigError, DataError
from needle.metrics import matching
from needle.reporting import compare, figures, page, tables
from needle.reporting.collect import Setting, _telling, collect
from needle.reporting.compare import Bootstrap
from needle.schema import Tool, ToolCall
from needle.scores import TrainingRun, answers_path, score_path, select_runs

TOOL = Tool("set_timer", "", {"type": "object", "properties": {"minutes": {"type": "integer"}}})
GOLD = [ToolCall("set_timer", {"minutes": 5})]
WRONG = [ToolCall("set_timer", {"minutes": 6})]
KINDS = ("single", "multi", "none")
IGNORED = ["seed", "name", "student.name", "trainer.threads"]
FEW = Bootstrap(resamples=400, confidence_frac=0.95, seed=0)
METRICS = ["call_exact_frac", "value_frac"]


def record_of(index: int, right: bool) -> dict:
    kind = KINDS[index % len(KINDS)]
    gold = [] if kind == "none" else GOLD
    calls = gold if right else WRONG
    counts = matching.judge(calls, gold, [TOOL])
    dump = [[{"name": one.name, "arguments": dict(one.arguments)} for one in some] for some in (gold, calls)]
    return {
        "id": f"example-{index}",
        "kind": kind,
        "domain": "timers",
        "split": "validation",
        "n_tools": 1,
        "query": f"request <{index}>",
        "gold": dump[0],
        "calls": dump[1],
        "text": "",
        "error": None,
        "confidence": 0.5,
        **{name: bool(counts[name]) for name in ("exact", "exact_unordered", "name")},
        "counts": counts,
    }


def write_score(folder: Path, checkpoint: str, right: list[bool], *, suite_hash: str) -> None:
    records = [record_of(index, one) for index, one in enumerate(right)]
    path = score_path(folder, checkpoint=checkpoint, name="validation")
    path.parent.mkdir(exist_ok=True)
    counts = [one["counts"] for one in records]
    by_kind = {
        kind: {"n": len(some), **matching.fractions(some)}
        for kind in KINDS
        if (some := [one["counts"] for one in records if one["kind"] == kind])
    }
    score = {
        "schema_version": 1,
        "suite": "validation",
        "checkpoint": checkpoint,
        "n": len(records),
        "errors": 0,
        "metrics": matching.fractions(counts),
        "by_kind": by_kind,
        "inputs": {"student": "s", "suite": suite_hash, "settings": "d"},
    }
    path.write_text(json.dumps(score))
    answers_path(path).write_text("".join(json.dumps(one) + "\n" for one in records))


def write_run(
    root: Path,
    *,
    loss: str = "hard_label",
    student: str = "san_nano",
    seed: int = 0,
    right: list[bool],
    before: list[bool] | None = None,
    dirty: bool = False,
    status: str = "finished",
    tokens: int = 100_000,
    parameters: int = 1_000_000,
    suite_hash: str = "u",
    settings: dict | None = None,
    started: str = "2026-01-01T00:00:00Z",
) -> Path:
    """A run folder as training and scoring leave it, without weights."""
    folder = root / "train" / f"{student}-{loss}-{seed}-{len(list(root.glob('train/*')))}"
    folder.mkdir(parents=True)
    config = {
        "loss": {"_target_": f"needle.loss.{loss}"},
        "student": {"name": student, "width": parameters // 1000},
        "trainer": {"steps": 100, "threads": seed + 1},
        "name": student,
        "seed": seed,
        **(settings or {}),
        "_choices_": {"loss": loss},
    }
    record = {
        "schema_version": 1,
        "stage": "train",
        "status": status,
        "commit": "0123456789abcdef",
        "dirty": dirty,
        "started_utc": started,
        "seed": seed,
        "choices": {"loss": loss, "student": student, "experiment": "demo"},
        "overrides": [f"loss={loss}", f"student={student}", f"seed={seed}"],
        "environment": {"python": "3.11", "torch": "2.13"},
        "hardware": {"cpu": "a CPU", "cores": 2},
        "inputs": {"shards": "shards-0123"},
        "facts": {"parameters": parameters, "tokens": tokens, "steps": 100, "train_seconds": 36.0},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    spans = ("structure", "name", "key", "value", "stop")
    lines = [
        {"step": step, "tokens": 1000 * step, **{f"train/loss_{span}_nats": 3 / step for span in spans}}
        for step in range(1, 101)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_score(folder, "final", right, suite_hash=suite_hash)
    if before is not None:
        write_score(folder, "initial", before, suite_hash=suite_hash)
    return folder


def first_right(count: int, of: int = 12) -> list[bool]:
    return [index < count for index in range(of)]


def gather(root: Path, **changes):
    options = {"suite": "validation", "checkpoint": "final", "where": [], "ignored": IGNORED, "allow_dirty": False}
    return collect(select_runs(None, root=root), **(options | changes))


def rows_of(settings, baseline=("loss:hard_label",), bootstrap=FEW):
    return compare.compare(settings, metrics=METRICS, baseline=baseline, bootstrap=bootstrap)


def headline(rows, label: str):
    (row,) = [row for row in rows if row.setting.label == label and row.metric == "call_exact_frac"]
    return row


@pytest.fixture
def two_losses(tmp_path):
    """hard_label right on 3, 5, 7 of 12 for seeds 0, 1, 2; forward_kl on 6, 6, 9; nothing right before training."""
    for seed, (base, ours) in enumerate(((3, 6), (5, 6), (7, 9))):
        write_run(tmp_path, loss="hard_label", seed=seed, right=first_right(base), before=first_right(0))
        write_run(tmp_path, loss="forward_kl", seed=seed, right=first_right(ours), before=first_right(0))
    return tmp_path


def test_mean_deviation_and_difference_by_hand(two_losses):
    rows = rows_of(gather(two_losses).settings)
    base, ours = headline(rows, "loss=hard_label"), headline(rows, "loss=forward_kl")
    assert base.mean == pytest.approx(5 / 12)
    assert base.sd == pytest.approx(2 / 12)  # 3, 5, 7: variance (4 + 0 + 4) / 2
    assert base.difference is None
    assert ours.mean == pytest.approx(7 / 12)
    assert ours.sd == pytest.approx(3**0.5 / 12)  # 6, 6, 9: variance (1 + 1 + 4) / 2
    assert ours.difference.value == pytest.approx((3 + 1 + 2) / 3 / 12)
    assert ours.difference.low < ours.difference.value < ours.difference.high
    assert (ours.difference.seeds, ours.difference.examples) == ((0, 1, 2), 12)
    assert ours.initial_mean == 0.0
    assert ours.preliminary


def test_only_shared_seeds_and_examples_are_paired(tmp_path):
    write_run(tmp_path, loss="hard_label", seed=0, right=first_right(2, of=12))
    write_run(tmp_path, loss="hard_label", seed=9, right=first_right(12, of=12))
    write_run(tmp_path, loss="forward_kl", seed=0, right=first_right(4, of=8))
    write_run(tmp_path, loss="forward_kl", seed=5, right=first_right(0, of=8))
    found = headline(rows_of(gather(tmp_path).settings), "loss=forward_kl").difference
    assert (found.seeds, found.examples) == ((0,), 8)
    assert found.value == pytest.approx((4 - 2) / 8)


def test_settings_without_a_shared_seed_have_no_difference_and_the_report_says_so(tmp_path):
    write_run(tmp_path, loss="hard_label", seed=0, right=first_right(2))
    write_run(tmp_path, loss="forward_kl", seed=1, right=first_right(4))
    settings = gather(tmp_path).settings
    rows = rows_of(settings)
    assert headline(rows, "loss=forward_kl").difference is None
    told = compare.notices(settings, rows, baseline=["loss:hard_label"], tokens_tolerance_frac=0.01)
    assert any("No difference for loss=forward_kl" in one for one in told)


def test_the_interval_of_one_seed_matches_the_exact_bootstrap():
    """One seed: the difference is the mean of -1, 0, 1 per example; its bootstrap is normal with a known deviation."""
    generator = np.random.default_rng(1)
    above = np.stack([generator.random(800) < 0.6, generator.random(800) < 0.5])[None, :, None, :]
    drawn = compare.bootstrap_differences(above, np.ones_like(above), resamples=4000, seed=3)[:, 0]
    per_example = above[0, 0, 0].astype(float) - above[0, 1, 0]
    assert drawn.mean() == pytest.approx(per_example.mean(), abs=0.002)
    assert drawn.std() == pytest.approx(per_example.std() / 800**0.5, rel=0.05)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """200 simulated pairs of students on 150 examples, true difference 0.1: nine in ten 90 % intervals hold it."""
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        shared = generator.random(150)  # how hard each example is, for both students
        above = np.stack([shared < 0.6, shared * 0.5 + generator.random(150) * 0.5 < 0.5])[None, :, None, :]
        drawn = compare.bootstrap_differences(above, np.ones_like(above), resamples=300, seed=trial)[:, 0]
        low, high = np.quantile(drawn, [0.05, 0.95])
        covered += low <= 0.1 <= high
    assert 0.84 <= covered / 200 <= 0.95


def test_the_interval_widens_with_the_spread_between_seeds():
    """The same mean difference, once from seeds that agree and once from seeds that do not."""
    ones = np.ones((4, 2, 1, 50))
    agree, disagree = np.zeros((4, 2, 1, 50)), np.zeros((4, 2, 1, 50))
    agree[:, 0, :, :25] = 1
    disagree[:2, 0] = 1
    spreads = [compare.bootstrap_differences(one, ones, resamples=500, seed=0).std() for one in (agree, disagree)]
    assert spreads[1] > 2 * spreads[0]


def test_the_same_students_differ_by_nothing():
    above = (np.arange(40) % 3 == 0).astype(float)
    both = np.tile(above, (3, 2, 1, 1))
    drawn = compare.bootstrap_differences(both, np.ones_like(both), resamples=100, seed=0)
    assert np.all(drawn == 0)


def test_a_setting_is_held_against_the_baseline_of_its_own_size(tmp_path):
    for student, parameters in (("san_nano", 10**6), ("san_micro", 3 * 10**6)):
        for loss in ("hard_label", "forward_kl", "reverse_kl"):
            write_run(tmp_path, loss=loss, student=student, parameters=parameters, right=first_right(5))
    settings = gather(tmp_path).settings
    found = {
        (row.setting.factors["loss"], row.setting.factors["student"]): row.difference and row.difference.baseline
        for row in rows_of(settings)
    }
    assert found["reverse_kl", "san_micro"] == "loss=hard_label, student=san_micro"
    assert found["forward_kl", "san_nano"] == "loss=hard_label, student=san_nano"
    assert found["hard_label", "san_nano"] is None


def test_a_single_value_that_differs_within_a_choice_is_named(tmp_path):
    for index, rate in enumerate((0.02, 0.01)):
        write_run(tmp_path, right=first_right(index), settings={"optim": {"muon_lr": rate}})
    assert [setting.label for setting in gather(tmp_path).settings] == ["optim.muon_lr=0.01", "optim.muon_lr=0.02"]


def test_seed_and_execution_make_no_setting(two_losses):
    settings = gather(two_losses).settings
    assert [setting.label for setting in settings] == ["loss=forward_kl", "loss=hard_label"]
    assert [run.seed for run in settings[0].runs] == [0, 1, 2]
    assert (
        gather(two_losses, where=["loss:hard_label", "seed:1"]).settings[0].label == "loss=hard_label, student=san_nano"
    )


def test_a_dirty_run_is_shown_and_is_no_result(two_losses):
    write_run(two_losses, loss="reverse_kl", right=first_right(12), dirty=True)
    write_run(two_losses, loss="forward_kl", seed=7, right=first_right(12), dirty=True)
    settings = gather(two_losses).settings
    assert [(one.label, one.is_clean, len(one.runs)) for one in settings] == [
        ("loss=forward_kl", True, 3),
        ("loss=forward_kl", False, 1),
        ("loss=hard_label", True, 3),
        ("loss=reverse_kl", False, 1),
    ]
    pooled = gather(two_losses, allow_dirty=True).settings
    assert [(one.is_clean, len(one.runs)) for one in pooled] == [(False, 4), (True, 3), (False, 1)]
    markdown = markdown_of(rows_of(settings))
    assert "dirty, not a result" in markdown
    assert page.verdict([row for row in rows_of(settings) if row.metric == "call_exact_frac"]).startswith(
        "Highest: loss=forward_kl, 58.3 %"
    )


def test_a_newer_run_of_the_same_seed_replaces_the_older(tmp_path):
    write_run(tmp_path, right=first_right(1), started="2026-01-02T00:00:00Z")
    older = write_run(tmp_path, right=first_right(2), started="2026-01-01T00:00:00Z")
    found = gather(tmp_path)
    assert headline(rows_of(found.settings), found.settings[0].label).mean == pytest.approx(1 / 12)
    assert found.left_out == ((older.name, "a newer run has the same setting and seed"),)


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        ({"tokens": 150_000}, "not equal tokens, from 100,000 to 150,000"),
        ({"suite_hash": "other"}, "not equal evaluation examples"),
        ({}, None),
    ],
)
def test_unequal_data_is_said(tmp_path, change, notice):
    write_run(tmp_path, loss="hard_label", right=first_right(3))
    write_run(tmp_path, loss="forward_kl", right=first_right(4), **change)
    settings = gather(tmp_path).settings
    told = compare.notices(settings, rows_of(settings), baseline=["loss:hard_label"], tokens_tolerance_frac=0.01)
    equal = compare.equality(settings, tokens_tolerance_frac=0.01)
    if notice:
        assert any(one.startswith("loss=forward_kl and its baseline") and notice in one for one in told)
        assert not equal
    else:
        assert not any("equal" in one for one in told)
        assert equal.startswith("Equal data and tokens: every run saw 100,000 tokens of shards-0123 in 100 steps.")


def test_runs_that_cannot_be_reported_are_named(tmp_path):
    with pytest.raises(DataError, match="no finished training run"):
        gather(tmp_path)
    write_run(tmp_path, right=first_right(3))
    failed = write_run(tmp_path, right=first_right(3), status="failed")
    unscored = write_run(tmp_path, right=first_right(3), loss="forward_kl")
    score_path(unscored, checkpoint="final", name="validation").unlink()
    runs = [TrainingRun.open(path) for path in sorted((tmp_path / "train").iterdir())]
    options = {"checkpoint": "final", "where": [], "ignored": IGNORED, "allow_dirty": False}
    left_out = dict(collect(runs, suite="validation", **options).left_out)
    assert left_out[failed.name] == "the run is failed"
    assert f"python -m needle.score run={unscored}" in left_out[unscored.name]
    with pytest.raises(DataError, match="not scored on unseen"):
        collect(runs, suite="unseen", **options)
    with pytest.raises(ConfigError, match="group:choice"):
        collect(runs, suite="validation", **{**options, "where": ["loss"]})


def markdown_of(rows):
    return tables.results_markdown(
        rows, suite="validation", checkpoint="final", notices=["Mind this."], equality="", method="Method."
    )


def test_the_tables(two_losses):
    rows = rows_of(gather(two_losses).settings)
    text = tables.results_csv(rows, suite="validation", checkpoint="final")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert list(lines[0]) == list(tables.COLUMNS)
    assert len(lines) == 2 * len(METRICS)
    (ours,) = [one for one in lines if one["setting"] == "loss=forward_kl" and one["metric"] == "call_exact_frac"]
    assert (ours["mean"], ours["difference"], ours["initial_mean"]) == ("0.583333", "0.166667", "0.000000")
    assert (ours["seeds"], ours["baseline"], ours["dirty"]) == ("0 1 2", "loss=hard_label", "false")
    assert (ours["preliminary"], ours["commits"], ours["tokens"]) == ("true", "0123456789", "100000")
    markdown = markdown_of(rows)
    assert "> Mind this." in markdown
    assert "| loss=forward_kl | 3 | 58.3 | 14.4 | 0.0 | +16.7 [" in markdown
    assert text == tables.results_csv(rows_of(gather(two_losses).settings), suite="validation", checkpoint="final")


def page_of(found, rows, drawn, examples=12):
    return page.render(
        found,
        rows,
        drawn,
        suite="validation",
        checkpoint="final",
        notices=["Mind <this>."],
        equality="",
        method="Method.",
        examples=examples,
        command="python -m needle.report",
    )


def test_figures_and_page(two_losses):
    write_run(two_losses, loss="forward_kl", student="san_micro", parameters=3 * 10**6, right=first_right(8))
    found = gather(two_losses)
    rows = rows_of(found.settings)
    shown = [row for row in rows if row.metric == "call_exact_frac"]
    drawn = figures.draw(found.settings, shown, suite="validation", confidence_frac=0.95)
    assert set(drawn) == {"differences.png", "learning_curves.png", "by_kind.png", "size.png"}
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    assert drawn == figures.draw(found.settings, shown, suite="validation", confidence_frac=0.95)
    text = page_of(found, rows, drawn)
    assert text == page_of(gather(two_losses), rows_of(gather(two_losses).settings), drawn)
    assert 'src="data:image/png;base64,' in text
    assert "http://" not in text
    assert "https://" not in text
    assert "Mind &lt;this&gt;." in text
    assert "request &lt;0&gt;" in text
    assert "python -m needle.train loss=forward_kl student=san_nano seed=2" in text
    assert text.count("✓ right") + text.count("✗ wrong") == 12 * (1 + len(found.settings))


def test_sample_answers_go_through_the_kinds_in_turn(two_losses):
    chosen = page.samples(gather(two_losses).settings, 5)
    assert [one["kind"] for one in chosen] == ["single", "multi", "none", "single", "multi"]
    labels = [label for label, _, _ in chosen[0]["answers"]]
    assert labels == ["before training", "loss=forward_kl", "loss=hard_label"]
    assert chosen[0]["gold"] == "set_timer(minutes: 5)"
    assert [one["gold"] for one in chosen if one["kind"] == "none"] == ["no call"]


def test_a_run_without_history_or_initial_score_is_reported(tmp_path):
    folder = write_run(tmp_path, right=first_right(3))
    (folder / "history.jsonl").unlink()
    found = gather(tmp_path)
    rows = rows_of(found.settings)
    drawn = figures.draw(found.settings, rows[:1], suite="validation", confidence_frac=0.95)
    assert set(drawn) == {"by_kind.png"}
    assert "The runs differ in nothing but their seeds." in page_of(found, rows, drawn, examples=0)
    assert isinstance(found.settings[0], Setting)


def test_the_command_gives_the_same_files_for_the_same_runs(two_losses, tmp_path, repository):
    write_run(two_losses, loss="reverse_kl", right=first_right(12), dirty=True)
    output = tmp_path / "report"
    settings = [f"paths.runs={two_losses}", f"output={output}", "bootstrap.resamples=200", "metrics=[call_exact_frac]"]
    command = [sys.executable, "-m", "needle.report", *settings]
    written = []
    for _ in range(2):
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {
        *("results.csv", "results.md", "report.html"),
        *("differences.png", "learning_curves.png", "by_kind.png"),
    }
    assert done.stdout.startswith("Highest: loss=forward_kl")
    assert b"reverse_kl" not in written[0]["results.csv"]
    assert b"reverse_kl" in written[0]["results.md"]
    refused = subprocess.run([*command, "metrics=[call_exact]"], cwd=repository, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "'call_exact' is not one of call_exact_frac" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_label_of_many_factors_tells_the_loss_and_what_is_unusual():
    usual = {"loss": "hard_label", "weighting": "uniform", "rollouts": "off", "quantisation": "none"}
    factors = [usual, {**usual, "loss": "taid"}, {**usual, "quantisation": "int4"}, {**usual, "weighting": "focal"}]
    assert [_telling(one, factors) for one in factors] == [
        {"loss": "hard_label"},
        {"loss": "taid"},
        {"loss": "hard_label", "quantisation": "int4"},
        {"loss": "hard_label", "weighting": "focal"},
    ]
    few = {name: usual[name] for name in ("loss", "weighting", "rollouts")}
    assert _telling(few, [few, few]) == few
