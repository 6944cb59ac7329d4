"""Dashboards of run folders written by hand: what stands on the page, what W&B is told, and that both speak of keys
that runs really log."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from running import running

from needle import cells, config, dashboard
from needle.budgets import budgets
from needle.errors import ConfigError, DataError, UserError
from needle.experiment import Sweep, cells_of
from needle.metrics import matching
from needle.reporting import board, board_figures, standing, workspace
from needle.reporting.faults import OUTCOMES, outcome_of
from needle.reporting.views import BUDGETS, views
from needle.reporting.workspace import Place
from needle.schema import Tool, ToolCall
from needle.scores import TrainingRun, answers_path, score_path

EXP = "901_of_tests"
TAG = "<script>alert(1)</script>"
PROPERTIES = {"minutes": {"type": "integer"}, "label": {"type": "string"}}
TIMER, LAMP = (Tool(name, "", {"type": "object", "properties": PROPERTIES}) for name in ("timer", "lamp"))
GOLD = [ToolCall("timer", {"minutes": 5})]
VIEWS = views(suite="test", metrics=["call_exact_frac", "name_frac"], faults=["false_call_frac"])


def record_of(index: int, right: bool) -> dict[str, Any]:
    kind = ("single", "multi", "none")[index % 3]
    gold = [] if kind == "none" else GOLD
    calls = gold if right else [ToolCall("timer", {"minutes": 6})]
    counts = matching.judge(calls, gold, [TIMER])
    dumped = [[{"name": one.name, "arguments": dict(one.arguments)} for one in some] for some in (gold, calls)]
    texts = {"query": f"{TAG} {index}", "text": "", "error": None, "domain": "timers & <i>", "split": "test"}
    verdicts = {name: bool(counts[name]) for name in ("exact", "exact_unordered", "name")}
    about = {"id": f"e{index}", "kind": kind, "n_tools": 1 + index % 7, "confidence": 0.5, "gold": dumped[0]}
    return {**about, **texts, **verdicts, "calls": dumped[1], "counts": counts}


def write_score(folder: Path, right: int, suite: str = "test") -> None:
    records = [record_of(index, index < right) for index in range(21)]
    path = score_path(folder, checkpoint="final", name=suite)
    path.parent.mkdir(exist_ok=True)
    by_kind: dict[str, list[dict]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record["counts"])
    score = {
        "schema_version": 1,
        "suite": suite,
        "n": len(records),
        "metrics": matching.fractions(record["counts"] for record in records),
        "by_kind": {kind: {"n": len(some), **matching.fractions(some)} for kind, some in by_kind.items()},
        "inputs": {"student": "s", "suite": "u", "settings": "d"},
    }
    path.write_text(json.dumps(score))
    answers_path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(
    root: Path,
    arm: str,
    seed: int,
    *,
    right: int | None,
    status: str = "finished",
    facts: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A run as needle.sweep leaves it, without weights. `changes` are to its configuration."""
    folder = root / "train" / f"{EXP}-{len(list(root.glob('train/*')))}"
    folder.mkdir(parents=True)
    settings = {"loss": {"alpha": sum(map(ord, arm))}, "trainer": {"steps": 40}, "student": {"width": 8}}
    cfg = {**settings, "arm": arm, "name": EXP, "seed": seed, "sweep": {"question": "Which?"}, **changes}
    usual = {"parameters": 1_000_000, "tokens": 90_000, "steps": 40, "train_seconds": 36.0 * (1 + seed)}
    record = {
        "stage": "train",
        "status": status,
        "commit": "0123456789abcdef",
        "dirty": False,
        "started_utc": "2026-01-01T00:00:00Z",
        "seed": seed,
        "identity": f"{arm}-{seed}".encode().hex(),
        "choices": {"loss": arm, "experiment": EXP},
        "overrides": [],
        "environment": {},
        "hardware": {},
        "inputs": {"shards": "shards-0123"},
        "facts": usual | (facts or {}),
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    spans = ("structure", "name", "key", "value", "stop")
    with (folder / "history.jsonl").open("w") as history:
        for step in range(10, 41, 10):
            for split in ("train", "val"):
                losses = {f"{split}/loss_{span}_nats": 3 / step for span in spans}
                more = {"train": {"train/loss_nats": 2.5 / step}, "val": {"val/call_forced_exact_frac": step / 99}}
                line = {"step": step, "tokens": 2250 * step, "time_s": step, **losses, **more[split]}
                history.write(json.dumps(line) + "\n")
    if right is not None:
        write_score(folder, right)
    return folder


def dashboards(root: Path, *overrides: str) -> str:
    """The stage in this process; returns the page."""
    words = [f"paths.runs={root}", "report=['bootstrap.resamples=200','baseline=[arm:hard_label]']", *overrides]
    cfg, runtime = config.compose("dashboard", words)
    function = dashboard.main.stage_function
    whole, built = config.prepared(cfg, function, runtime=runtime)
    function(whole, **built)
    pages = list((root / "dashboard").glob("*.html"))
    return pages[0].read_text("utf-8") if pages else ""


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms on two seeds each, one named to break pages; of the third seed one run runs, one failed, one stopped."""
    root = tmp_path_factory.mktemp("unfinished")
    for seed in (1, 2):
        write_run(root, "hard_label", seed, right=9 + seed)
        bigger = {"student": {"width": 16}, "facts": {"parameters": 3_000_000, "tokens": 90_000}}
        write_run(root, f'{TAG} $x_1$ "q"', seed, right=12 + 2 * seed, **bigger)
    write_run(root, "hard_label", 3, right=None, status="running")
    failed = write_run(root, "taid", 3, right=None, status="failed")
    write_run(root, "taid", 4, right=None, status="interrupted")
    known_as = json.loads((failed / "run.json").read_text())["identity"]
    cells.record_failure(root, known_as, arm="taid", seed=3, error=f"Traceback\nValueError: {TAG} is no loss")
    return root


@pytest.fixture(scope="module")
def page(unfinished: Path) -> str:
    return dashboards(unfinished, f"exp={EXP}")


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of a page's time."""
    monkeypatch.setattr(board, "draw", lambda _: dict.fromkeys(("curves", "size", "budget", "faults"), "<svg/>"))


class Elements(HTMLParser):
    """Every element in order, with its attributes; `texts` by the element that they stand in."""

    VOID = ("meta", "input", "br", "img")

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def classes(self) -> set[str]:
        return {name for _, attrs in self.found for name in (attrs.get("class") or "").split()}


# What is wrong first.


@pytest.mark.parametrize(
    ("calls", "gold", "outcome"),
    [
        (GOLD, GOLD, "right"),
        ([], [], "right"),
        (None, GOLD, "invalid JSON"),
        (None, [], "invalid JSON"),
        ([], GOLD, "abstained wrongly"),
        (GOLD, [], "called wrongly"),
        (GOLD * 2, GOLD, "number of calls"),
        ([ToolCall("lamp", {"minutes": 5})], GOLD, "wrong name"),
        ([ToolCall("lamp", {}), *GOLD], [*GOLD, ToolCall("lamp", {})], "wrong name"),
        ([ToolCall("timer", {"label": "a"})], GOLD, "missing parameter"),
        ([ToolCall("timer", {"minutes": 6, "label": "a"})], GOLD, "invented parameter"),
        ([ToolCall("timer", {"minutes": 6})], GOLD, "wrong value"),
    ],
)
def test_every_answer_has_one_outcome(calls, gold, outcome):
    assert outcome_of(matching.judge(calls, gold, [TIMER, LAMP])) == outcome
    assert outcome in OUTCOMES


# The keys.


@pytest.fixture(scope="module")
def real_history(repository: Path) -> list[dict]:
    """Of a training of two steps with one validation, in this process."""
    import pytorch_lightning as pl
    import torch

    from needle.distil import Distillation, TrainerSettings
    from needle.loss.objective import Objective
    from needle.student import SANConfig, SANForConditionalGeneration

    def built(option: str) -> Any:
        return config.build(yaml.safe_load((repository / "conf" / f"{option}.yaml").read_text()))

    def batch(seed: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 40, (2, 10), generator=torch.Generator().manual_seed(seed))
        ones = torch.ones_like(ids)
        tokens = dict.fromkeys(("source_ids_RS", "decoder_ids_RT", "labels_RT"), ids)
        weights = dict.fromkeys(("answer_weights_RT", "confidences_RT"), ones.float())
        segments = dict.fromkeys(("source_segments_RS", "target_segments_RT"), ones)
        return {**tokens, **weights, **segments, "spans_RT": ids % 5, "kinds_RT": ids % 9}

    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "kv_heads": 1, "encoder_layers": 1, "decoder_layers": 1, "copy_width": 8}
    student = SANForConditionalGeneration(SANConfig(vocab_size=40, **sizes))
    parts = {"loss": "loss/hard_label", "mixing": "mixing/constant", "weighting": "weighting/uniform"}
    terms = {name: built(option) for name, option in {**parts, "balance": "balance/fixed"}.items()}
    objective = Objective(**terms, auxiliaries={}, student=student, teacher=None)
    trainer = yaml.safe_load((repository / "conf/trainer/cpu.yaml").read_text()) | {"steps": 2}
    trainer |= {"rows_per_batch": 2, "rows_per_micro_batch": 2, "threads": 1}
    settings = TrainerSettings(**{key: value for key, value in trainer.items() if key != "_target_"})
    history: list[dict] = []
    run: Any = SimpleNamespace(history_append=history.append)
    parts = {"student": student, "objective": objective, "optim": built("optim/muon_adamw"), "settings": settings}
    loaders = [torch.utils.data.DataLoader([batch(n) for n in seeds], batch_size=None) for seeds in ((0, 1), (2,))]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    steps = {"max_steps": 2, "max_epochs": -1, "num_sanity_val_steps": 0, "val_check_interval": 2}
    pl.Trainer(**quiet, **steps, enable_checkpointing=False).fit(Distillation(**parts, run=run), *loaders)
    return history


@pytest.fixture(scope="module")
def known_keys(real_history) -> set[str]:
    logged = {key for line in real_history for key in line}
    scored = {f"test/{metric}" for metric in matching.METRICS}
    return logged | scored | set(budgets({"parameters": 1, "tokens": 1, "train_seconds": 1.0}))


@pytest.mark.filterwarnings("ignore")
def test_every_key_of_the_views_is_logged_scored_or_a_budget(known_keys):
    assert set(BUDGETS) <= known_keys
    asked = {key for view in VIEWS for panel in view.panels for key in (*panel.y, *filter(None, [panel.x]))}
    assert {"train/loss_value_nats", "val/loss_stop_nats", "val/call_forced_exact_frac", "tokens"} <= asked
    assert asked - known_keys == set()


PLACE = Place("team", "needle", EXP, EXP)


def keys_in(spec: Any) -> set[str]:
    """Every metric, axis, column and sort key of a specification as W&B is sent it, without the section's name."""
    found: set[str] = set()
    if isinstance(spec, list):
        return found.union(*map(keys_in, spec))
    if not isinstance(spec, dict):
        return found
    for name, value in spec.items():
        if name in ("metrics", "columnOrder"):
            found |= set(value)
        elif name in ("xAxis", "yAxis") and isinstance(value, str):
            found.add(value)
        elif name == "keys":
            found |= {f"{one['key']['section']}:{one['key']['name']}" for one in value}
        else:
            found |= keys_in(value)
    return {re.sub(r"^(summary_metrics\.|summary:)", "", key) for key in found}


@pytest.mark.filterwarnings("ignore")
def test_workspace_and_report_hold_the_views_and_ask_for_nothing_else(known_keys):
    space = workspace.workspace_of(VIEWS, PLACE)._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    report = workspace.report_of(VIEWS, PLACE, question="Which?", is_local=True)._to_model()
    blocks = report.spec.model_dump(by_alias=True, exclude_none=True)["blocks"]
    sections = space["section"]["panelBankConfig"]["sections"]
    headings = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    assert [section["name"] for section in sections] == headings == [view.title for view in VIEWS]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert [len(one["panels"]) for one in sections] == [len(g["panelBankSectionConfig"]["panels"]) for g in grids]
    for spec in ([space["section"]["panelBankConfig"], space["section"]["runSets"]], grids):
        assert keys_in(spec) - known_keys - {"_step"} == {"run:displayName", "config:arm.value"}
        assert {key for view in VIEWS for panel in view.panels for key in panel.y} <= keys_in(spec)


def test_runs_are_filtered_by_their_group_and_grouped_by_arm():
    space = workspace.workspace_of(VIEWS, PLACE)._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    report = workspace.report_of(VIEWS, PLACE, question="", is_local=True)._to_model()
    grids = [block.metadata.model_dump(by_alias=True) for block in report.spec.blocks if hasattr(block, "metadata")]
    for runset in [*space["section"]["runSets"], *(one for grid in grids for one in grid["runSets"])]:
        (wanted,) = runset["filters"]["filters"]
        assert (wanted["key"], wanted["op"], wanted["value"]) == ({"section": "run", "name": "group"}, "=", EXP)
        assert runset["grouping"] == [{"section": "config", "name": "arm.value"}]
        first = runset["sort"]["keys"][0]
        assert (first["key"]["name"], first["ascending"]) == ("test/call_exact_frac", False)
    lines = [panel for one in space["section"]["panelBankConfig"]["sections"] for panel in one["panels"]]
    assert {panel["config"]["groupBy"] for panel in lines if "groupBy" in panel["config"]} == {"arm.value"}


# The page.


def test_the_page_is_whole_and_needs_nothing_else(page: str):
    found = Elements(page)
    assert found.open == []
    assert not [attrs for _, attrs in found.found if {"src", "href"} & attrs.keys()]
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert "default-src 'none'" in page
    ids = Counter(attrs["id"] for _, attrs in found.found if "id" in attrs)
    assert set(ids.values()) == {1}
    referred = {
        value.removeprefix("#")
        for _, attrs in found.found
        for name, value in attrs.items()
        if value and (name == "xlink:href" or value.startswith("url("))
        for value in [value.removeprefix("url(").removesuffix(")")]
    }
    assert referred
    assert referred <= set(ids)


def test_what_comes_from_data_is_text(page: str):
    found = Elements(page)
    assert [attrs.get("type") for tag, attrs in found.found if tag == "script"] == ["application/json", None]
    assert TAG not in page
    assert any(text.strip().startswith(f"{TAG} ") for tag, text in found.texts if tag == "b")
    # A setting's name in a figure: neither markup nor a formula.
    assert any(f'{TAG} $x_1$ "q"' in text for tag, text in found.texts if tag == "text")
    (embedded,) = re.findall(r'<script type="application/json" id="breakdown">(.*?)</script>', page)
    assert TAG in json.loads(embedded)["settings"][1]


def test_the_leaderboard_has_the_best_first_and_is_sortable(page: str):
    rows = re.findall(r'<tr class="[^"]*" data-setting="(\d)">(.*?)</tr>', page, re.DOTALL)
    assert [number for number, _ in rows] == ["1", "0"]
    values = [re.findall(r'data-value="([^"]*)"', row) for _, row in rows]
    exact = [float(one[2]) for one in values]
    assert exact == pytest.approx([(14 + 16) / 2 / 21, (10 + 11) / 2 / 21], abs=1e-6)
    assert float(values[0][4]) == pytest.approx(exact[0] - exact[1], abs=1e-6)
    assert values[1][4] == ""
    assert "baseline</td>" in rows[1][1]
    assert len(set(map(len, values))) == 1


def test_marks_of_each_setting_can_be_hidden_in_every_figure(page: str):
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert {"s", "s-0", "s-1"} <= Elements(figure).classes()
        assert "#000000" not in figure


def test_the_tables_of_errors_count_every_answer_once(page: str):
    data = json.loads(re.findall(r'id="breakdown">(.*?)</script>', page)[0])
    assert data["groups"]["kind"] == ["single", "multi", "none"]
    assert data["groups"]["tools"] == ["1", "2-4", "5-8"]
    for grouping, counts in data["counts"].items():
        assert [len(one) for one in counts] == [len(data["groups"][grouping])] * 2
        assert [sum(map(sum, one)) for one in counts] == [2 * 21] * 2
    right = data["outcomes"].index("right")
    assert [sum(group[right] for group in one) for one in data["counts"]["kind"]] == [21, 30]


def test_an_unfinished_experiment_is_shown_as_it_is(page: str, unfinished: Path, capsys):
    text = "\n".join(text for _, text in Elements(page).texts)
    assert "Preliminary: the experiment is not finished (4 finished, 1 running, 1 failed, 1 stopped)" in text
    assert f"ValueError: {TAG} is no loss" in text
    assert re.search(r"goes on with: python -m needle.train resume=\S+", text)
    assert "training loss 0.062 nats" in text
    assert page == dashboards(unfinished, f"exp={EXP}")
    assert "not finished (4 finished" in capsys.readouterr().out


def test_cells_that_nobody_began_are_told(unfinished: Path):
    sweep = Sweep(question=None, arms={"hard_label": ("loss=hard_label",), "new": ()}, grid={"seed": (1, 9)}, report=())
    runs = [TrainingRun.open(path) for path in sorted((unfinished / "train").iterdir())]
    lines = standing.lines(runs, cells_of(sweep), root=unfinished)
    assert [(line.setting, line.seed) for line in lines if line.kind == "new"] == [
        ("hard_label", "9"),
        ("new", "1"),
        ("new", "9"),
    ]
    assert [line.kind for line in lines[:3]] == ["failed", "running", "stopped"]


def test_a_cell_that_another_experiment_ran_is_shown_under_this_ones_arm(tmp_path: Path):
    own = write_run(tmp_path, "taid", 1, right=12)
    other = write_run(tmp_path, "plain", 1, right=9)
    record = json.loads((other / "run.json").read_text()) | {"choices": {"experiment": "other"}}
    (other / "run.json").write_text(json.dumps(record))
    cfg = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**cfg, "name": "other"}))
    runs = [TrainingRun.open(path) for path in (own, other)]
    assert [run.folder for run in standing.runs_of(EXP, runs, root=tmp_path)] == [own]
    table = tmp_path / "sweeps" / EXP / "cells.csv"
    table.parent.mkdir(parents=True)
    known_as = [run.record["identity"] for run in runs]
    table.write_text(f"arm,seed,identity\ntaid,1,{known_as[0]}\nhard_label,1,{known_as[1]}\n")
    found = standing.runs_of(EXP, runs, root=tmp_path)
    assert [(run.folder, run.config["arm"]) for run in found] == [(own, "taid"), (other, "hard_label")]


def test_a_killed_run_is_not_running(tmp_path: Path):
    run = TrainingRun.open(write_run(tmp_path, "taid", 1, right=None, status="running"))
    assert standing.kind_of(run, root=tmp_path) == "running"
    lock = cells.lock_path(tmp_path, run.record["identity"])
    lock.parent.mkdir()
    lock.touch()
    assert standing.kind_of(run, root=tmp_path) == "stopped"


def test_arms_on_two_students_are_told_apart_by_size(tmp_path: Path):
    for width, parameters in ((8, 10**6), (16, 4 * 10**6)):
        for arm in ("hard_label", "taid"):
            write_run(tmp_path, arm, 1, right=9, student={"width": width}, facts={"parameters": parameters})
    text = dashboards(tmp_path, f"exp={EXP}")
    labels = json.loads(re.findall(r'id="breakdown">(.*?)</script>', text)[0])["settings"]
    assert labels == [f"{arm}, student.width={width}" for width in (8, 16) for arm in ("hard_label", "taid")]
    assert "call exact against parameters of the student" in text
    assert "Tokens seen in training: about 90.0k in every run, so there is nothing to plot." in text


def test_runs_without_history_have_no_curves_and_the_page_says_so(tmp_path: Path):
    (write_run(tmp_path, "hard_label", 1, right=9) / "history.jsonl").unlink()
    text = dashboards(tmp_path, f"exp={EXP}", "examples=0", "where=[seed:1]")
    assert "No run kept a history.jsonl" in text
    assert "Sample answers" not in text
    assert text.count("<figure>") == 1


def test_another_suite_is_named_and_can_be_asked_for(tmp_path: Path, without_figures: None):
    for seed in (1, 2):
        write_run(tmp_path, "hard_label", seed, right=9)
    write_score(sorted((tmp_path / "train").iterdir())[0], 21, suite="unseen")
    assert "Suite: test; also scored: unseen (suite=NAME)" in dashboards(tmp_path, f"exp={EXP}")
    assert "Suite: unseen; also scored: test" in dashboards(tmp_path, f"exp={EXP}", "suite=unseen")


def test_whiskers_stand_on_one_axis():
    def row(low: float, value: float, high: float) -> Any:
        return SimpleNamespace(difference=SimpleNamespace(low=low, value=value, high=high))

    found = board.whiskers([row(-0.1, 0.0, 0.1), SimpleNamespace(difference=None), row(0.0, 0.2, 0.3)])
    assert found[1] is None
    assert found[0] == {"low": 4, "high": 50, "at": 27, "zero": 27}
    assert found[2] == {"low": 27, "high": 96, "at": 73, "zero": 27}


def test_a_setting_has_one_look_in_the_leaderboard_and_in_figures():
    looks = [(board_figures.swatch(n)["colour"], board_figures.swatch(n)["line"]) for n in range(24)]
    assert len(set(looks)) == 24
    assert looks[6][0] == "var(--ink)"  # black would vanish on a dark page


# Mistakes.


def test_mistakes_are_told_with_the_way_out(tmp_path: Path, unfinished: Path):
    with pytest.raises(DataError, match=r"no training run under .*start some: python -m needle.sweep exp=NAME"):
        dashboards(tmp_path, f"exp={EXP}")
    with pytest.raises(ConfigError, match=f"exp is not set: give exp=NAME; there are runs of {EXP}"):
        dashboards(unfinished)
    with pytest.raises(
        DataError, match=rf"exp=902_other: no run belongs to it; there are runs of {EXP} \(7\); start it"
    ):
        dashboards(unfinished, "exp=902_other")
    with pytest.raises(ConfigError, match="'call_exact' is not one of call_exact_frac"):
        dashboards(unfinished, f"exp={EXP}", "metrics=[call_exact]")
    with pytest.raises(DataError, match=r"not scored on nowhere; run: python -m needle.score"):
        dashboards(unfinished, f"exp={EXP}", "suite=nowhere")
    write_run(tmp_path, "hard_label", 1, right=None)
    with pytest.raises(DataError, match=r"no run of it is scored yet \(1 finished\); score the finished ones: python"):
        dashboards(tmp_path, f"exp={EXP}")


def test_offline_runs_are_named_with_their_viewer(tmp_path: Path, capsys, without_figures: None):
    folder = write_run(tmp_path, "hard_label", 1, right=9)
    stored = folder / "wandb" / "offline-run-20260101_000000-x"
    stored.mkdir(parents=True)
    text = dashboards(tmp_path, f"exp={EXP}")
    assert f"wandb leet {stored}" in text
    assert f"wandb sync {tmp_path}/train/*/wandb/offline-run-*" in capsys.readouterr().out


def test_a_browser_is_opened_where_there_is_a_display(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch, without_figures: None
):
    opened: list[str] = []
    monkeypatch.setattr(dashboard.webbrowser, "open", opened.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dashboard.sys, "platform", "linux")
    dashboards(unfinished, f"exp={EXP}", "show=true")
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    dashboards(unfinished, f"exp={EXP}", "show=true")
    assert opened == [(unfinished / "dashboard" / f"{EXP}.html").resolve().as_uri()]


# Online.


def tracked(root: Path, **changes: Any) -> Path:
    where = {"id": "x", "project": "needle", "entity": None}
    return write_run(root, "hard_label", 1, right=9, facts={"wandb": where | changes})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with running("wandb_server.py", "--folder", str(tmp_path / "server")) as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        yield found


def test_saving_twice_leaves_one_workspace_and_one_report(server, tmp_path: Path, capsys):
    tracked(tmp_path / "runs")
    words = (f"exp={EXP}", "mode=online", "metrics=[call_exact_frac]")
    for faults in ("faults=[false_call_frac]", "faults=[false_call_frac,false_abstain_frac]"):
        dashboards(tmp_path / "runs", *words, faults)
    stored = [json.loads(path.read_text()) for path in (tmp_path / "server" / "views").glob("*.json")]
    assert sorted(view["type"] for view in stored) == ["project-view", "runs"]
    assert {view["display_name"] for view in stored} == {f"Needle: {EXP}"}
    assert all("test/false_abstain_frac" in json.dumps(view["spec"]) for view in stored)
    assert server.stats()["unknown"] == {}
    out = capsys.readouterr().out
    assert len(set(re.findall(r"workspace: (http\S+)", out))) == len(set(re.findall(r"report: (http\S+)", out))) == 1


def test_a_server_that_refuses_is_told_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tracked(tmp_path, entity="team")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with running("wandb_server.py", "--folder", str(tmp_path / "server"), "--key-required", "x" * 40) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with pytest.raises(UserError, match=r"W&B does not take the dashboard: .*mode=offline"):
            dashboards(tmp_path, f"exp={EXP}", "mode=online")
    assert not (tmp_path / "server" / "views").exists()


def test_where_runs_are_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def place(*folders: Path, **changes: Any) -> Place:
        runs = [TrainingRun.open(folder) for folder in folders]
        return workspace.place_of(runs, **{"exp": EXP, "project": None, "entity": None, **changes})

    one, two = tracked(tmp_path, entity="team"), tracked(tmp_path, entity="team", project="other")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="no WANDB_API_KEY; export it"):
        place(one)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert place(one) == Place("team", "needle", EXP, EXP)
    assert place(one, two, project="mine", entity="me") == Place("me", "mine", EXP, EXP)
    with pytest.raises(DataError, match="projects needle, other; choose one: project=NAME"):
        place(one, two)
    with pytest.raises(DataError, match="none of its 1 runs was tracked in W&B; run them with logger=wandb"):
        place(write_run(tmp_path, "hard_label", 2, right=9))
    quoted = write_run(tmp_path, "a", 1, right=9, logger={"group": "it's"}, facts={"wandb": {"project": "needle"}})
    with pytest.raises(DataError, match="its runs are in the W&B groups it's"):
        place(quoted)
