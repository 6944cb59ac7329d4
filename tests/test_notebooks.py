"""The notebooks: they define nothing, show what they show without a machine's paths, and run; published tables are what
their cells say. One kernel runs them all on small inputs, each from a clean slate."""

import ast
import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from needle import cells, config, notebooks
from needle.corpus import own
from needle.errors import ConfigError, DataError
from needle.metrics import matching
from needle.reporting import answers, collect, notebook, portrait, published, tables
from needle.reporting.compare import compare
from needle.runs import EXECUTION
from needle.schema import Tool, ToolCall
from needle.scores import TrainingRun, answers_path, score_path

FOLDER = config.CONF.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
EXP = "999_of_tests"
ARMS = {"hard_label": (9, 11), "forward_kl": (13, 12), "taid": (9, 14)}
SMALL_CORPUS = ("timers_alarms", "pets_baby")
TIMER = Tool("timer", "", {"type": "object", "properties": {"minutes": {"type": "integer"}}})
PNG = b"\x89PNG\r\n"


def code_cells(name: str) -> list[Any]:
    return [cell for cell in notebooks.read(FOLDER / f"{name}.ipynb").cells if cell.cell_type == "code"]


def test_there_are_five():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_defines_nothing(name: str):
    defining = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in code_cells(name):
        found = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, defining)]
        assert not found, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept_whole_and_say_nothing_of_a_machine(name: str):
    made = notebooks.read(FOLDER / f"{name}.ipynb")
    some = [cell for cell in made.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in some] == list(range(1, len(some) + 1))
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in some) == 1
    outputs = [output for cell in some for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert all(base64.b64decode(picture).startswith(PNG) for picture in pictures)
    for text in notebooks.output_texts(made):
        assert not re.search(r"(?<![\w.])/(tmp|work|home|root|Users|opt)/|[Ww]arning:|Traceback", text), text[:300]


def record_of(index: int, right: bool) -> dict[str, Any]:
    gold = [] if index % 3 == 2 else [ToolCall("timer", {"minutes": 5})]
    calls = gold if right else [ToolCall("timer", {"minutes": 6})]
    counts = matching.judge(calls, gold, [TIMER])
    dumped = [[{"name": one.name, "arguments": dict(one.arguments)} for one in some] for some in (gold, calls)]
    about = {"id": f"e{index}", "kind": ("single", "multi", "none")[index % 3], "n_tools": 1 + index % 7}
    about |= {"query": f"{index} minutes", "domain": "timers", "split": "test", "confidence": (index % 5) / 5}
    return {**about, "gold": dumped[0], "calls": dumped[1], "text": "", "error": None, "counts": counts}


def write_run(root: Path, arm: str, seed: int, right: int) -> Path:
    """A scored run without weights: `right` of 21 answers are right."""
    folder = root / "train" / f"{arm}-{seed}"
    (folder / "scores").mkdir(parents=True)
    cfg = {"loss": {"_target_": arm}, "arm": None, "name": EXP, "seed": seed, "student": {"width": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    facts = {"parameters": 1_000_000 * (2 if arm == "taid" else 1), "tokens": 90_000 + seed, "steps": 40}
    record = {"stage": "train", "status": "finished", "commit": f"{seed}123456789abcdef", "dirty": False, "seed": seed}
    record |= {"identity": f"{arm}-{seed}", "choices": {"loss": arm}, "inputs": {"shards": "s"}, "facts": facts}
    (folder / "run.json").write_text(json.dumps({**record, "started_utc": "2026-01-01T00:00:00Z"}))
    (folder / "history.jsonl").write_text(
        json.dumps({"step": 40, "tokens": 90_000, "train/loss_value_nats": 0.5}) + "\n"
    )
    records = [record_of(index, (index * 8) % 21 < right) for index in range(21)]
    path = score_path(folder, checkpoint="final", name="test")
    counts = [one["counts"] for one in records]
    by_kind = {
        kind: {"n": 7, **matching.fractions(counts[at::3])} for at, kind in enumerate(("single", "multi", "none"))
    }
    score = {"schema_version": 1, "suite": "test", "n": 21, "metrics": matching.fractions(counts), "by_kind": by_kind}
    path.write_text(json.dumps({**score, "inputs": {"student": "s", "suite": "u", "settings": "d"}}))
    answers_path(path).write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with six scored runs, experiments/ with the table that a sweep would have published of them."""
    root = tmp_path_factory.mktemp("laboratory")
    made = [
        (arm, seed, write_run(root / "runs", arm, seed, n)) for arm, r in ARMS.items() for seed, n in enumerate(r, 1)
    ]
    runs = [TrainingRun.open(folder) for _, _, folder in made]
    for run, (arm, _, _) in zip(runs, made, strict=True):
        run.config["arm"] = arm
    some = {"suite": "test", "checkpoint": "final"}
    found = collect.collect(runs, **some, where=[], ignored=["seed", *EXECUTION], allow_dirty=False)
    bootstrap = config.build(config.compose("report", [])[0].bootstrap)
    metrics = ["call_exact_frac", "abstain_recall_frac", "value_frac"]
    rows = compare(found.settings, metrics=metrics, baseline=["arm:hard_label"], bootstrap=bootstrap)
    (root / "experiments" / EXP).mkdir(parents=True)
    (root / "experiments" / EXP / "results.csv").write_text(tables.results_csv(rows, **some))
    lines = [(arm, {"seed": seed}, folder) for arm, seed, folder in made]
    cells.write_cells_csv(root / "experiments" / EXP / "cells.csv", lines, suites=["test"])
    return root


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    with notebooks.kernel() as found:
        yield found


@pytest.fixture(scope="module")
def small_corpus(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for domain in SMALL_CORPUS:
        for path in (repository / "data/teacher_corpus").glob(f"{domain}.*"):
            shutil.copy(path, folder)
    return folder


def executed(kernel: Any, name: str, **parameters: Any) -> tuple[Any, str]:
    """The executed notebook and what its outputs say; a cell that fails raises."""
    (path,) = FOLDER.glob(f"{name}_*.ipynb")
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in parameters.items()}
    made = notebooks.execute(notebooks.read(path), parameters=plain, timeout_s=120, name=path.stem, kernel=kernel)
    return made, "\n".join(notebooks.output_texts(made))


def pictures_in(made: Any) -> int:
    return sum("image/png" in one.get("data", {}) for cell in made.cells for one in cell.get("outputs", ()))


def test_01_runs(kernel: Any, small_corpus: Path):
    made, told = executed(kernel, "01", DATA=["data=demo", f"data.corpus={small_corpus}"], REQUESTS=6)
    assert pictures_in(made) == 3
    assert "in 2 domains with 30 tools" in told
    assert "of 12 answers" in told
    assert notebooks.foreign_paths(made) == []


def test_02_runs_on_cells_and_on_runs(kernel: Any, laboratory: Path):
    where = {"EXPERIMENT": EXP, "EXPERIMENTS": laboratory / "experiments"}
    made, told = executed(kernel, "02", **where, RUNS=[str(laboratory / "runs")])
    assert "6 of 6 published runs lie here" in told
    assert pictures_in(made) == 5  # the comparison, and the report's four
    made, told = executed(kernel, "02", **where, RUNS=[str(laboratory / "none")])
    assert "0 of 6 published runs lie here" in told
    assert pictures_in(made) == 1


def test_04_runs(kernel: Any, laboratory: Path):
    made, told = executed(kernel, "04", EXPERIMENTS=laboratory / "experiments")
    assert pictures_in(made) == 2
    assert "1 tables agree with their cells" in told
    assert "001_losses" in told
    assert "missing" in told


def test_05_runs_and_03_looks_at_its_run(kernel: Any, small_corpus: Path, tmp_path: Path):
    work = {"WORK": tmp_path / "runs", "ARTIFACTS": tmp_path / "artifacts", "CORPUS": small_corpus}
    small = ["data=demo", "data.train_requests=20", "data.copies_per_request=1", "data.given_copies=1"]
    made, told = executed(kernel, "05", **work, STEPS=4, SHOWN=[3], OVERRIDES=small)
    assert pictures_in(made) == 2
    assert "Whole answers right on 45 held-out requests" in told
    answered = [json.loads(line) for line in (tmp_path / "runs/after.jsonl").read_text().splitlines()]
    assert len(answered) == 45
    assert all("calls" in line for line in answered)
    where = {"EXPERIMENT": "own_tools", "RUNS": [str(tmp_path / "runs")], "SUITE": "own_held_out"}
    made, told = executed(kernel, "03", **where, SETTINGS=[])
    assert "1 runs of own_tools, all their answers to own_held_out" in told
    assert pictures_in(made) == 7


def test_03_asks_published_students_where_there_is_no_run(kernel: Any, small_corpus: Path):
    students = {"initial": "experiments/000_first_distillation/nano_initial"}
    small = {"DATA": ["data=demo", f"data.corpus={small_corpus}"], "STUDENTS": students, "SAMPLE": 4}
    made, told = executed(kernel, "03", EXPERIMENT="000_of_nobody", RUNS=["nowhere"], SUITE="test", **small)
    assert "asked 4 requests of test just now: initial" in told
    assert pictures_in(made) == 7


@pytest.mark.parametrize("name", published.names())
def test_a_published_table_is_what_its_cells_say(name: str):
    table = published.read(name)
    found = published.require_agreement(table, published.rebuild(table), source="cells.csv")
    assert len(found) == len(table.results) * len(published.FROM_CELLS)


@pytest.fixture
def copied(laboratory: Path, tmp_path: Path) -> Path:
    shutil.copytree(laboratory / "experiments", tmp_path / "experiments")
    return tmp_path / "experiments"


def change(path: Path, row: int, **values: Any) -> None:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column, value in values.items():
        table.loc[row, column] = value
    table.to_csv(path, index=False)


def test_a_rebuilt_table_agrees_by_hand(copied: Path):
    rebuilt = published.rebuild(published.read(EXP, copied))
    row = rebuilt[(rebuilt["setting"] == "forward_kl") & (rebuilt["metric"] == "call_exact_frac")].iloc[0]
    assert float(row["mean"]) == pytest.approx(12.5 / 21, abs=1e-6)
    assert float(row["sd"]) == pytest.approx(0.5**0.5 / 21, abs=2e-6)
    assert float(row["difference"]) == pytest.approx((4 + 1) / 2 / 21, abs=1e-6)


@pytest.mark.parametrize(("column", "value"), [("mean", "0.6"), ("seeds", "1 3"), ("commits", "x"), ("difference", "")])
def test_a_falsified_number_is_named(copied: Path, column: str, value: str):
    change(copied / EXP / "results.csv", 0, **{column: value})
    table = published.read(EXP, copied)
    setting = table.results["setting"][0]
    with pytest.raises(DataError, match=rf"{setting}, test, call_exact_frac: {column} is {value or 'empty'} there"):
        published.require_agreement(table, published.rebuild(table), source="cells.csv")


def test_a_falsified_interval_is_named(copied: Path, laboratory: Path):
    table = published.read(EXP, copied)
    row = table.results.index[table.results["difference"] != ""][0]
    change(copied / EXP / "results.csv", row, ci_low="-0.9")
    table = published.read(EXP, copied)
    runs, missing = published.raw_runs(table, [laboratory / "runs"])
    assert (len(runs), missing) == (6, [])
    raw = published.rebuild_from_runs(table, runs)
    with pytest.raises(DataError, match=r"ci_low is -0\.9 there"):
        published.require_agreement(table, raw.table, source="run folders")


def test_cells_and_results_must_hold_the_same(copied: Path):
    path = copied / EXP / "cells.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("taid")))
    with pytest.raises(DataError, match="no cell of taid on test"):
        published.rebuild(published.read(EXP, copied))
    path.write_text("".join(lines) + lines[-1].replace("taid", "other"))
    with pytest.raises(DataError, match=r"no setting of results\.csv holds, such as other"):
        published.rebuild(published.read(EXP, copied))
    path.unlink()
    with pytest.raises(DataError, match=r"has no cells\.csv; experiments that can be rebuilt: none yet"):
        published.read(EXP, copied)


@pytest.mark.parametrize(
    ("names", "ladders"),
    [
        (["san_nano", "san_micro", "t5_style_nano"], ["san", "san", "t5_style"]),
        (
            ["forward_kl_nano", "nano_forward_kl", "forward_kl, student=san_small"],
            ["forward_kl"] * 2 + ["forward_kl, student=san"],
        ),
        (["nano", "base"], ["students"] * 2),
    ],
)
def test_settings_of_one_ladder_share_a_name(names: list[str], ladders: list[str]):
    table = published.Published("x", Path("x"), pd.DataFrame({"setting": names}), pd.DataFrame())
    assert published.series(table) == dict(zip(names, ladders, strict=True))


def test_a_setting_finds_its_cells_by_arm_and_grid():
    lines = [("kl", "nano", 10), ("kl", "nano", 9), ("kl", "micro", 9), ("kl, pure", "nano", 9)]
    about = {"suite": "test", "n": "1", "parameters": "1", "tokens": "1", "identity": "i", "commit": "c"}
    made = [{"arm": arm, "student": size, "seed": str(seed), **about} for arm, size, seed in lines]
    table = published.Published("x", Path("x"), pd.DataFrame(), pd.DataFrame(made))
    assert table.grid == ["student", "seed"]
    assert list(table.cells_of("kl, student=nano", "test").index) == [1, 0]
    assert list(table.cells_of("kl, student=micro", "test").index) == [2]
    assert list(table.cells_of("kl, pure", "test").index) == [3]
    with pytest.raises(DataError, match="two cells of one seed"):
        table.cells_of("kl", "test")
    with pytest.raises(DataError, match="no cell of other on test"):
        table.cells_of("other", "test")


@pytest.mark.parametrize(
    ("wanted", "given", "fault"),
    [
        ("Oslo", "oslo.", "case or punctuation"),
        ("Oslo", "Oslo tomorrow", "too long"),
        ("New York", "York", "too short"),
        ("Oslo", "tomorrow", "other words"),
        ("Oslo", "Bergen", "not in the request"),
        ("Oslo", "", "not in the request"),
        (5, 6, "other number"),
        (True, False, "true or false"),
        (1, True, "other type"),
        (["a"], "a", "other type"),
    ],
)
def test_what_is_wrong_with_a_value(wanted: Any, given: Any, fault: str):
    assert answers.value_fault(wanted, given, "New York or Oslo tomorrow") == fault
    assert fault in answers.VALUE_FAULTS


def test_changed_counts_pairs_and_refuses_other_requests():
    before = pd.DataFrame({"id": ["a", "b", "c"], "exact": [True, False, False]})
    after = pd.DataFrame({"id": ["c", "b", "a"], "exact": [True, False, True]})
    assert answers.changed(before, after).to_numpy().tolist() == [[1, 1], [0, 1]]
    with pytest.raises(DataError, match="different requests"):
        answers.changed(before, after.iloc[:2])
    assert "33.3 % before, 66.7 % after; +33.3 points" in notebook.before_and_after(before, after)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot read tools"),
        ("[]", "a list of tools belongs there"),
        ('[{"name": "a"}, {"type": "function", "function": {}}]', "tool 2: a tool needs a non-empty name"),
        ('{"tools": [{"name": "a"}, {"name": "a"}]}', "two tools are named 'a'"),
    ],
)
def test_own_tools_that_cannot_be_used_are_told(tmp_path: Path, text: str, told: str):
    (tmp_path / "tools.json").write_text(text)
    with pytest.raises(DataError, match=told):
        own.read_tools(tmp_path / "tools.json")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"query": "five", "calls": [{"name": "clock"}]}', "line 1: call of unknown tool 'clock'; there are timer"),
        (
            '{"query": "five", "calls": [{"name": "timer", "arguments": {"minutes": "x"}}]}',
            "line 1: timer.minutes: 'x'",
        ),
        ('{"query": "five"}', "line 1: 'calls' is missing"),
        ("five", "line 1: not JSON"),
        ('{"query": "a", "calls": []}\n{"query": "a", "calls": []}', "twice"),
    ],
)
def test_own_requests_that_cannot_be_used_are_told(tmp_path: Path, line: str, told: str):
    (tmp_path / "own.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=told):
        own.read_requests(tmp_path / "own.jsonl", [TIMER])


def test_own_requests_are_split_whole_and_show_their_tools():
    tools = own.read_tools(FOLDER / "own_tools.json")
    requests = own.read_requests(FOLDER / "own_requests.jsonl", tools)
    learnt, kept = own.held_out(requests, every=2, seed=0)
    assert sorted(one.id for one in (*learnt, *kept)) == sorted(one.id for one in requests)
    assert len(kept) == len(requests) // 2
    assert {call.name for one in kept for call in one.calls} == {tool.name for tool in tools}
    for shown in own.with_tools(requests, tools, shown=4, seed=1):
        assert len(shown.tools) == 4
        assert shown.problems() == []


def test_a_request_varies_as_in_training(small_corpus: Path):
    data = notebook.settings("prepare", "data=demo", f"data.corpus={small_corpus}")["data"]
    found = portrait.load(data)
    table = portrait.table(found, data)
    assert set(table["split"][table["domain"] == "pets_baby"]) == {"unseen"}
    request = table["id"][table["split"] == "train"].iloc[0]
    copies = portrait.variations(found, data, request=request, count=5)
    assert copies == portrait.variations(found, data, request=request, count=5)
    assert len({len(copy.tools) for copy in copies}) > 1
    with pytest.raises(DataError, match="no training request"):
        portrait.variations(found, data, request="none", count=1)


def run_stage(*overrides: str) -> None:
    cfg, runtime = config.compose("notebooks", overrides)
    function = notebooks.main.stage_function
    whole, built = config.prepared(cfg, function, runtime=runtime)
    function(whole, **built)


def test_the_stage_runs_a_notebook_and_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import nbformat

    cell = nbformat.v4.new_code_cell("N = 2", metadata={"tags": ["parameters"]})
    made = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("print(6 // N)")])
    nbformat.write(made, tmp_path / "small.ipynb")
    run_stage(f"folder={tmp_path}", "+parameters.N=3", f"output={tmp_path / 'out'}")
    told = notebooks.read(tmp_path / "out" / "small.ipynb")
    assert notebooks.output_texts(told) == ["2\n"]
    assert told.cells[1].source == "N = 3"
    assert notebooks.output_texts(notebooks.read(tmp_path / "small.ipynb")) == []
    with pytest.raises(ConfigError, match="set output=FOLDER"):
        run_stage(f"folder={tmp_path}", "+parameters.N=3")
    with pytest.raises(ConfigError, match=r"parameters.M: notebook small has N"):
        run_stage(f"folder={tmp_path}", "+parameters.M=3", f"output={tmp_path}")
    with pytest.raises(ConfigError, match="holds small"):
        run_stage(f"folder={tmp_path}", "notebooks=[large]")
    with pytest.raises(DataError, match=r"the cell `print\(6 // N\)` \.\.\.: ZeroDivisionError"):
        run_stage(f"folder={tmp_path}", "+parameters.N=0", f"output={tmp_path / 'out'}")
