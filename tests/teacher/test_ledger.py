"""The ledger: what goes in comes out, claims and budgets hold between processes, and export brings it all back."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from needle.errors import DataError
from needle.teacher.base import TeacherCall, TeacherReply, TokenLogProb
from needle.teacher.ledger import Budget, Entry, Ledger, Owner, Spending

NO_LIMIT = Budget(None, None)
text = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(text, json_values, max_size=3)
tokens = st.builds(
    TokenLogProb,
    st.binary(max_size=4),
    st.floats(-50, 0),
    st.lists(st.tuples(st.binary(max_size=4), st.floats(-50, 0)), max_size=3).map(tuple),
)
questions = st.builds(
    TeacherCall, text, text, st.sampled_from(["label", "author"]), text, text, text, objects, st.integers(0, 9)
)
replies = st.builds(
    TeacherReply,
    status=st.sampled_from(["ok", "empty", "malformed", "truncated", "blocked"]),
    reason=text,
    text=text,
    calls=st.none() | st.lists(st.fixed_dictionaries({"name": text, "arguments": objects}), max_size=2).map(tuple),
    log_probs=st.none() | st.lists(tokens, max_size=3).map(tuple),
    model_version=text,
    prompt_tokens=st.integers(0, 10**9),
    thinking_tokens=st.integers(0, 10**9),
    cost_usd=st.floats(0, 100),
    latency_s=st.floats(0, 1000),
    attempts=st.integers(1, 9),
    raw=objects,
)


def question(prompt: str = "q", sample: int = 0) -> TeacherCall:
    return TeacherCall("p", "m", "label", "i", prompt, "[]", {"temperature": 0.5}, sample)


def entry(call: TeacherCall, reply: TeacherReply) -> Entry:
    return Entry(call.key(), call, reply, "a", "2026-01-01T00:00:00.000+00:00")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def begin(ledger: Ledger, call: TeacherCall, *, owner: Owner, budget: Budget = NO_LIMIT, most_usd: float = 1.0) -> str:
    with ledger.transaction():
        return ledger.begin(call.key(), owner=owner.name, account="a", budget=budget, most_usd=most_usd)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(questions, replies), max_size=5, unique_by=lambda pair: pair[0].key()))
def test_what_is_stored_comes_back(tmp_path_factory: pytest.TempPathFactory, pairs):
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "l.sqlite")
    with ledger.transaction():
        for call, reply in pairs:
            assert ledger.store(entry(call, reply))
    for call, reply in pairs:
        found = ledger.get(call.key())
        assert found is not None
        log_probs, raw = ledger.payload(call.key())
        assert (found.status, found.text, found.calls, found.cost_usd) == (
            reply.status,
            reply.text,
            reply.calls,
            reply.cost_usd,
        )
        assert (log_probs, raw) == (reply.log_probs, reply.raw)
    assert list(ledger.entries()) == sorted((entry(*pair) for pair in pairs), key=lambda entry: entry.key)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(questions)
def test_equal_questions_have_equal_keys_and_any_difference_another(call):
    fields = vars(call)
    reordered = {**fields, "settings": dict(reversed(list(call.settings.items())))}
    assert TeacherCall(**reordered).key() == call.key()
    for name in ("provider", "model", "role", "instruction", "prompt", "tools"):
        assert TeacherCall(**{**fields, name: fields[name] + "x"}).key() != call.key()
    assert TeacherCall(**{**fields, "sample": call.sample + 1}).key() != call.key()
    assert TeacherCall(**{**fields, "settings": {**call.settings, "new": 1}}).key() != call.key()


def test_a_stored_answer_is_never_replaced(ledger: Ledger):
    call = question()
    with ledger.transaction():
        assert ledger.store(entry(call, TeacherReply("ok", text="first")))
        assert not ledger.store(entry(call, TeacherReply("ok", text="second")))
    assert ledger.get(call.key()) == TeacherReply("ok", text="first")
    assert ledger.get(question("other").key()) is None
    with pytest.raises(KeyError):
        ledger.payload(question("other").key())


def test_a_question_belongs_to_one_owner_until_that_one_is_gone(ledger: Ledger):
    first, second, call = Owner(ledger.path), Owner(ledger.path), question()
    assert begin(ledger, call, owner=first) == "go"
    assert begin(ledger, call, owner=second) == "busy"
    first.close()
    assert begin(ledger, call, owner=second) == "go"
    # The first attempt may have been charged: it stays counted, and is told.
    assert ledger.spending("a") == Spending(2, 2.0)
    assert [maybe for (maybe,) in ledger.rows("SELECT maybe_usd FROM failures")] == [1.0]
    with ledger.transaction():
        ledger.settle(call.key(), call, TeacherReply("ok", cost_usd=0.25), account="a", most_usd=1.0)
    assert ledger.spending("a") == Spending(2, 1.25)
    assert begin(ledger, call, owner=second) == "known"
    assert ledger.rows("SELECT count(*) FROM claims") == [(0,)]


def test_claims_of_the_dead_end_together(ledger: Ledger):
    dead, living = Owner(ledger.path), Owner(ledger.path)
    for i in range(3):
        assert begin(ledger, question(f"{i}"), owner=dead) == "go"
    assert begin(ledger, question("mine"), owner=living) == "go"
    dead.close()
    with ledger.transaction():
        assert ledger.release_dead() == 3
        assert ledger.release_dead() == 0
    assert begin(ledger, question("mine"), owner=dead) == "busy"


def test_a_budget_of_calls_counts_attempts(ledger: Ledger):
    owner, budget = Owner(ledger.path), Budget(calls=2, usd=None)
    assert begin(ledger, question("1"), owner=owner, budget=budget) == "go"
    again = {"account": "a", "budget": budget, "most_usd": 1.0, "billed": False, "reason": "status 500"}
    with ledger.transaction():
        assert ledger.again(question("1").key(), **again) is None
    assert begin(ledger, question("2"), owner=owner, budget=budget) == "budget_calls"
    with ledger.transaction():
        assert ledger.again(question("1").key(), **again) == "budget_calls"
    assert ledger.spending("a") == Spending(2, 0.0)
    assert ledger.rows("SELECT count(*) FROM claims") == [(0,)]


def test_a_budget_of_dollars_waits_for_reservations_and_then_ends(ledger: Ledger):
    owner, budget = Owner(ledger.path), Budget(calls=None, usd=2.5)
    calls = [question(str(i)) for i in range(4)]
    assert [begin(ledger, call, owner=owner, budget=budget) for call in calls[:3]] == ["go", "go", "wait"]
    with ledger.transaction():
        ledger.settle(calls[0].key(), calls[0], TeacherReply("ok", cost_usd=0.1), account="a", most_usd=1.0)
    assert begin(ledger, calls[2], owner=owner, budget=budget) == "go"
    with ledger.transaction():
        for call in calls[1:3]:
            ledger.settle(call.key(), call, TeacherReply("ok", cost_usd=0.9), account="a", most_usd=1.0)
    assert begin(ledger, calls[3], owner=owner, budget=budget) == "budget_usd"
    spent = ledger.spending("a")
    assert (spent.calls, spent.usd) == (3, pytest.approx(1.9))


@pytest.mark.parametrize(
    ("asked", "billed", "left"),
    [(False, False, Spending(0, 0.0)), (True, False, Spending(1, 0.0)), (True, True, Spending(1, 1.0))],
)
def test_giving_up_costs_what_the_provider_may_have_charged(ledger: Ledger, asked: bool, billed: bool, left: Spending):
    owner, call = Owner(ledger.path), question()
    begin(ledger, call, owner=owner)
    with ledger.transaction():
        ledger.release(call.key(), account="a", most_usd=1.0, asked=asked, billed=billed, reason="no")
    assert ledger.spending("a") == left
    assert begin(ledger, call, owner=owner) == "go"


def test_a_failed_transaction_leaves_nothing(ledger: Ledger):
    call = question()

    def store_and_fail() -> None:
        with ledger.transaction():
            ledger.store(entry(call, TeacherReply("ok")))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store_and_fail()
    assert ledger.get(call.key()) is None
    assert ledger.rows("SELECT count(*) FROM texts") == [(0,)]


def test_what_is_no_ledger_is_refused(tmp_path: Path):
    (tmp_path / "text").write_text("not a database, and longer than a header would be" * 10)
    with pytest.raises(DataError, match="cannot open the ledger"):
        Ledger(tmp_path / "text")
    Ledger(tmp_path / "other").close()
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(DataError, match="version 99; this code reads version 1"):
        Ledger(tmp_path / "other")


def test_texts_that_many_questions_share_are_stored_once(ledger: Ledger):
    with ledger.transaction():
        for i in range(5):
            ledger.store(entry(question(f"{i}"), TeacherReply("ok")))
    assert ledger.rows("SELECT count(*) FROM texts") == [(2,)]
