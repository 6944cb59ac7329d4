"""Estimates by hand: from these questions' own answers, from the same teacher's others, and from none."""

from pathlib import Path

import pytest

from needle import config
from needle.teacher.base import TeacherCall, TeacherReply
from needle.teacher.estimate import estimate
from needle.teacher.ledger import Entry, Ledger


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from counting_teacher import node

    monkeypatch.setenv("NEEDLE_TARGETS", "counting_teacher")
    return config.build(node(tmp_path / "bill"))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def questions(teacher, count: int, prefix: str = "q") -> list[TeacherCall]:
    return [teacher.label_call(instruction="i", query=f"{prefix}{i}", tools=[], sample=0) for i in range(count)]


def store(ledger: Ledger, calls: list[TeacherCall], costs: list[float]) -> None:
    with ledger.transaction():
        for call, cost in zip(calls, costs, strict=True):
            tokens = {"prompt_tokens": 100, "output_tokens": 20, "thinking_tokens": 5}
            ledger.store(Entry(call.key(), call, TeacherReply("ok", cost_usd=cost, **tokens), "a", "t"))


def test_answers_to_these_questions_are_the_sample(teacher, ledger: Ledger):
    calls = questions(teacher, 10)
    store(ledger, calls[:4], [0.1, 0.2, 0.3, 0.4])
    found = estimate(calls, teacher=teacher, ledger=ledger, expected_calls=None)
    assert (found.calls, found.known, found.to_buy, found.sample) == (10, 4, 6, 4)
    assert found.mean_usd == pytest.approx(0.25)
    # Sample variance 0.05/3; six questions to buy: 1.96 * 6 * sqrt(0.05/3/4).
    assert found.high_usd - 6 * 0.25 == pytest.approx(1.96 * 6 * (0.05 / 3 / 4) ** 0.5)
    assert found.low_usd == pytest.approx(6 * 0.25 - 1.96 * 6 * (0.05 / 3 / 4) ** 0.5)
    assert found.most_usd == pytest.approx(6 * 0.01)
    assert "6 calls, 600 prompt, 120 output and 30 thinking tokens, $1.5000" in found.text()


def test_else_other_answers_of_the_same_teacher(teacher, ledger: Ledger):
    store(ledger, questions(teacher, 3, "other"), [0.2, 0.2, 0.2])
    found = estimate(questions(teacher, 5), teacher=teacher, ledger=ledger, expected_calls=50)
    assert (found.calls, found.known, found.sample) == (50, 0, 3)
    assert (found.mean_usd, found.low_usd, found.high_usd) == pytest.approx((0.2, 10.0, 10.0))
    assert found.most_usd == pytest.approx(0.5)


def test_without_any_answer_only_the_bound_is_told(teacher, ledger: Ledger):
    found = estimate(questions(teacher, 5), teacher=teacher, ledger=ledger, expected_calls=None)
    assert found.sample == 0
    assert "at most $0.0500" in found.text()
    assert "dry_run_calls=10" in found.text()
    assert "expected" not in found.text()
