"""Buying: in order, once, within the budget, and nothing is lost whatever ends the process that asks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from counting_teacher import MOST_USD, PRICE_USD, attempts, node

from needle import config
from needle.errors import ConfigError, UserError
from needle.teacher.base import TeacherCall
from needle.teacher.ledger import Budget, Ledger
from needle.teacher.purchase import Answer, Purchases

NO_LIMIT = Budget(None, None)
CANARY = "canary-3f1c9a-key"
# What another process runs: buys answers and writes them down in order.
ASKING = """
import json, sys
from pathlib import Path
from needle import config
from needle.teacher.ledger import Budget
from needle.teacher.purchase import Purchases
node, folder, count, out = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
teacher = config.build(node)
calls = [teacher.label_call(instruction="i", query=f"q{i}", tools=[], sample=0) for i in range(count)]
how = {"account": "a", "budget": Budget(None, None), "buy": True}
with Purchases(folder / "ledger.sqlite", teacher=teacher, node=node, **how) as purchases:
    lines = [f"{answer.call.prompt} {answer.reply.text}" for answer in purchases.answers(calls)]
out.write_text("\\n".join(lines))
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEEDLE_TARGETS", "counting_teacher")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "servers"))


def questions(plain: dict, count: int) -> list[TeacherCall]:
    teacher = config.build(plain)
    return [teacher.label_call(instruction="i", query=f"q{i}", tools=[], sample=0) for i in range(count)]


def buy(plain: dict, folder: Path, calls, *, budget: Budget = NO_LIMIT, buying: bool = True) -> list[Answer]:
    teacher = config.build(plain)
    how = {"account": "a", "budget": budget, "buy": buying}
    with Purchases(folder / "ledger.sqlite", teacher=teacher, node=plain, **how) as purchases:
        return list(purchases.answers(calls))


def start(plain: dict, folder: Path, count: int, out: str) -> subprocess.Popen:
    arguments = [json.dumps(plain), str(folder), str(count), str(folder / out)]
    return subprocess.Popen([sys.executable, "-c", ASKING, *arguments], start_new_session=True)


def test_answers_come_in_order_and_are_bought_once(tmp_path: Path):
    plain = node(tmp_path / "bill", latency_s=0.02)
    calls = questions(plain, 300)
    answers = buy(plain, tmp_path, [*calls, *calls[:50]])
    assert [answer.call.prompt for answer in answers] == [call.prompt for call in (*calls, *calls[:50])]
    assert all(answer.reply and answer.reply.text == f"answer to {answer.call.prompt}" for answer in answers)
    assert Counter(attempts(tmp_path / "bill")) == Counter(call.prompt for call in calls)
    again = buy(plain, tmp_path, calls, buying=False)
    assert [a.reply.text for a in again if a.reply] == [a.reply.text for a in answers[:300] if a.reply]
    assert len(attempts(tmp_path / "bill")) == 300


def test_only_stored_answers_without_buying(tmp_path: Path):
    plain = node(tmp_path / "bill")
    buy(plain, tmp_path, questions(plain, 3))
    answers = buy(plain, tmp_path, questions(plain, 5), buying=False)
    assert [answer.reply is not None for answer in answers] == [True] * 3 + [False] * 2
    assert answers[3].reason == "not bought: it is not in the ledger"
    assert len(attempts(tmp_path / "bill")) == 3


def test_what_fails_is_asked_again_or_told(tmp_path: Path):
    faults = {"q1": ["transient", "wait"], "q2": ["billed"], "q3": ["transient"] * 4, "q4": ["fatal"]}
    plain = node(tmp_path / "bill", faults=faults)
    answers = buy(plain, tmp_path, questions(plain, 6))
    assert [answer.reply.attempts if answer.reply else 0 for answer in answers] == [1, 3, 2, 0, 0, 1]
    assert answers[3].reason == "failed: 4 attempts, the last: status 500"
    assert answers[4].reason.startswith("failed: the provider refuses 'q4'")
    assert Counter(attempts(tmp_path / "bill")) == {"q0": 1, "q1": 3, "q2": 2, "q3": 4, "q4": 1, "q5": 1}
    spent = Ledger(tmp_path / "ledger.sqlite").spending("a")
    assert (spent.calls, spent.usd) == (12, pytest.approx(4 * PRICE_USD + MOST_USD))
    # What failed is not in the ledger: it is asked for again.
    buy(plain, tmp_path, questions(plain, 6)[4:5])
    assert Counter(attempts(tmp_path / "bill"))["q4"] == 2


@pytest.mark.parametrize("limit", [0, 1, 7, 40])
def test_a_budget_of_calls_is_never_passed(tmp_path: Path, limit: int):
    generator = random.Random(limit)
    faults = {f"q{i}": generator.choices(["transient", "billed", "wait"], k=generator.randint(0, 3)) for i in range(60)}
    plain = node(tmp_path / "bill", latency_s=0.01, faults=faults)
    answers = buy(plain, tmp_path, questions(plain, 60), budget=Budget(calls=limit, usd=None))
    billed = attempts(tmp_path / "bill")
    assert len(billed) == limit
    refused = [answer.reason for answer in answers if answer.reply is None]
    assert set(refused) == {f"budget: budget_calls={limit} is reached"}
    # Nor by a second run, which finds what the first one bought.
    before = {answer.call.prompt for answer in answers if answer.reply}
    answers = buy(plain, tmp_path, questions(plain, 60), budget=Budget(calls=limit, usd=None))
    assert {answer.call.prompt for answer in answers if answer.reply} == before
    assert len(attempts(tmp_path / "bill")) == limit


def test_a_budget_of_dollars_is_used_up_and_never_passed(tmp_path: Path):
    plain = node(tmp_path / "bill", latency_s=0.01)
    budget = Budget(calls=None, usd=0.05)
    answers = buy(plain, tmp_path, questions(plain, 100), budget=budget)
    bought = sum(answer.reply is not None for answer in answers)
    spent = Ledger(tmp_path / "ledger.sqlite").spending("a").usd
    assert spent == pytest.approx(bought * PRICE_USD)
    # The next call might have cost MOST_USD: the budget ends where that no longer fits, and not earlier.
    assert budget.usd - MOST_USD - 1e-9 < spent <= budget.usd
    assert "budget_usd=0.05" in next(answer.reason for answer in answers if answer.reply is None)


def test_a_key_that_no_call_succeeds_with_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setenv("COUNTING_KEY", CANARY)
    faults = {f"q{i}": ["ends"] for i in range(40, 400)}
    few = node(tmp_path / "other", faults={"q0": ["ends"]}, key_variable="COUNTING_KEY")
    (tmp_path / "few").mkdir()
    with pytest.raises(UserError, match=r"the key \[key\] is not valid"):
        buy(few, tmp_path / "few", questions(few, 1))
    plain = node(tmp_path / "bill", faults=faults, key_variable="COUNTING_KEY")
    with pytest.raises(UserError, match=r"the key \[key\] is not valid"):
        buy(plain, tmp_path, questions(plain, 400))
    assert len(attempts(tmp_path / "bill")) < 400
    stored = Ledger(tmp_path / "ledger.sqlite").rows("SELECT count(*) FROM replies")
    assert stored == [(40,)]
    printed = "".join(capfd.readouterr())
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert CANARY not in printed
    assert CANARY.encode() not in files


def test_a_missing_key_is_told_before_anything_starts_and_only_where_it_is_needed(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COUNTING_KEY", CANARY)
    plain = node(tmp_path / "bill", key_variable="COUNTING_KEY")
    buy(plain, tmp_path, questions(plain, 3))
    monkeypatch.delenv("COUNTING_KEY")
    assert all(answer.reply for answer in buy(plain, tmp_path, questions(plain, 3)))
    with pytest.raises(ConfigError, match=r"COUNTING_KEY is not set: .*export COUNTING_KEY=.*buy=false"):
        buy(plain, tmp_path, questions(plain, 4))


def test_no_more_than_allowed_start_in_a_minute(tmp_path: Path):
    plain = node(tmp_path / "bill", traffic={"requests_per_minute": 1200.0})
    start_s = time.monotonic()
    buy(plain, tmp_path, questions(plain, 30))
    # 29 intervals of 50 ms: it cannot be faster, however fast the machine is.
    assert time.monotonic() - start_s >= 29 * 0.05


def wait_for_buyers(ledger: Path) -> None:
    """Until every buying process that a killed one left has stored what it asked for."""
    while any((ledger.parent / f"{ledger.name}-owners").iterdir()):
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_nothing_is_lost_or_bought_twice(tmp_path: Path, processes: int):
    count, moments = 600, random.Random(processes)
    plain = node(tmp_path / "bill", latency_s=0.1)
    kills = 0
    while kills < 6 or not attempts(tmp_path / "bill"):
        running = [start(plain, tmp_path, count, f"out{i}") for i in range(processes)]
        time.sleep(moments.uniform(0.3, 2.5))
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
    finishing = [start(plain, tmp_path, count, f"out{i}") for i in range(processes)]
    assert [process.wait() for process in finishing] == [0] * processes
    wait_for_buyers(tmp_path / "ledger.sqlite")
    assert Counter(attempts(tmp_path / "bill")) == Counter(f"q{i}" for i in range(count))
    expected = "\n".join(f"q{i} answer to q{i}" for i in range(count))
    assert [(tmp_path / f"out{i}").read_text() for i in range(processes)] == [expected] * processes
    assert Ledger(tmp_path / "ledger.sqlite").spending("a").calls == count


def test_an_interrupted_process_waits_for_what_is_under_way(tmp_path: Path):
    plain = node(tmp_path / "bill", latency_s=0.2, traffic={"concurrency": 4})
    process = start(plain, tmp_path, 500, "out")
    while len(attempts(tmp_path / "bill")) < 10:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() != 0
    asked = attempts(tmp_path / "bill")
    assert len(asked) < 500
    assert Ledger(tmp_path / "ledger.sqlite").rows("SELECT count(*) FROM replies") == [(len(asked),)]
    assert len(attempts(tmp_path / "bill")) == len(asked)
