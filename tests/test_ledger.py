"""The ledger's command: figures by hand, export and import as a user would, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from needle.ledger import EXPORT, import_, stats
from needle.teacher.base import TeacherCall, TeacherReply, TokenLogProb
from needle.teacher.ledger import Budget, Entry, Ledger, Owner


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "needle.ledger", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def entry(prompt: str, **reply) -> Entry:
    call = TeacherCall("google", "flash", "label", "i", prompt, "[]", {"temperature": 1.0, "nested": {"a": [1, None]}})
    return Entry(call.key(), call, TeacherReply("ok", **reply), "mine", "2026-01-02T03:04:05.000+00:00")


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = tmp_path / "one.sqlite"
    ledger = Ledger(path)
    log_probs = (TokenLogProb(b"\xf0\x9f", -0.25, ((b"\xf0\x9f", -0.25),)),)
    with ledger.transaction():
        for i in range(10):
            more = {"log_probs": log_probs, "calls": ({"name": "f", "arguments": {"x": i}},), "raw": {"i": i}}
            tokens = {"prompt_tokens": 100, "output_tokens": i, "thinking_tokens": 2}
            ledger.store(entry(f"größe {i}", cost_usd=0.5, latency_s=float(i), attempts=2, **tokens, **more))
        owner = Owner(path)
        ledger.begin("ab" * 32, owner=owner.name, account="mine", budget=Budget(None, None), most_usd=3.0)
        how = {"asked": True, "billed": True, "reason": "the connection was cut"}
        ledger.release("ab" * 32, account="mine", most_usd=3.0, **how)
    ledger.record_acceptance("mine", {"schema": (9, 1, 1), "grounding": (8, 2, 0)})
    ledger.close()
    return path


def test_figures_by_hand(filled: Path):
    figures = stats(Ledger(filled))
    (teacher,) = figures["teachers"]
    assert (teacher["answers"], teacher["attempts"], teacher["statuses"]) == (10, 20, {"ok": 10})
    assert (teacher["prompt_tokens"], teacher["output_tokens"], teacher["thinking_tokens"]) == (1000, 45, 20)
    assert (teacher["cost_usd"], teacher["latency_p50_s"], teacher["latency_max_s"]) == (5.0, 4.5, 9.0)
    assert figures["accounts"] == [{"account": "mine", "attempts": 1, "usd": 3.0, "answers": 10}]
    assert figures["failures"] == [
        {"account": "mine", "reason": "the connection was cut", "attempts": 1, "maybe_usd": 3.0}
    ]
    schema = {"account": "mine", "check": "schema", "passed": 9, "failed": 1, "quarantined": 1}
    assert schema in figures["acceptance"]
    printed = command("--ledger", filled, "stats", "--json")
    assert json.loads(printed.stdout) == figures
    table = command("--ledger", filled, "stats").stdout
    assert "$5.0000" in table
    assert "the connection was" in table


def test_export_and_import_bring_every_answer_back(filled: Path, tmp_path: Path):
    assert command("--ledger", filled, "export", tmp_path / "out").returncode == 0
    assert "google | flash | label | 10 | 1,000 | 45 | 20 | $5.0000" in (tmp_path / "out" / "README.md").read_text()
    other = tmp_path / "other.sqlite"
    done = command("--ledger", other, "import", tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "10 answers added, 0 were there already\n")
    assert list(Ledger(other).entries()) == list(Ledger(filled).entries())
    assert command("--ledger", other, "import", tmp_path / "out").stdout.startswith("0 answers added, 10 were there")
    refused = command("--ledger", filled, "export", tmp_path / "out")
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert "is there already; name a new folder" in refused.stderr


def test_a_changed_row_is_refused_with_its_reason(filled: Path, tmp_path: Path):
    command("--ledger", filled, "export", tmp_path / "out")
    file = tmp_path / "out" / EXPORT
    table = pq.read_table(file)
    prompts = table.column("prompt").to_pylist()
    prompts[3] = "another question"
    index = table.schema.get_field_index("prompt")
    pq.write_table(table.set_column(index, table.schema.field(index), [prompts]), file)
    ledger = Ledger(tmp_path / "other.sqlite")
    new, known, refused = import_(ledger, tmp_path / "out")
    assert (new, known, [bad.line_number for bad in refused]) == (9, 0, [4])
    assert "it was changed" in refused[0].reason
    done = command("--ledger", tmp_path / "third.sqlite", "import", tmp_path / "out")
    assert done.returncode == 1
    assert "1 rows were refused" in done.stderr
    assert json.loads((tmp_path / "third.sqlite-quarantine.jsonl").read_text())["line_number"] == 4


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot read"), (b"PAR1 cut", "cannot read"), ("other", "is no exported ledger")]
)
def test_what_is_no_export_is_refused(tmp_path: Path, content, words: str):
    import pyarrow as pa

    folder = tmp_path / "out"
    folder.mkdir()
    if content == "other":
        pq.write_table(pa.table({"a": [1]}), folder / EXPORT)
    elif content is not None:
        (folder / EXPORT).write_bytes(content)
    done = command("--ledger", tmp_path / "l.sqlite", "import", folder)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_ledger_that_is_not_there_is_not_made(tmp_path: Path):
    done = command("--ledger", tmp_path / "no.sqlite", "stats")
    assert done.returncode == 2
    assert "nothing has been bought yet" in done.stderr
    assert not (tmp_path / "no.sqlite").exists()
