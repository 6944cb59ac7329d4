"""Labels: which tools are shown, how samples are weighed, and what kind of request an answer makes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from needle.corpus.labelling import kind_of_answer, labelled, read_calls, same_answer, weigh
from needle.schema import EMPTY_KINDS, KINDS, Example, Tool, ToolCall
from needle.teacher.base import TeacherCall, TeacherReply
from needle.teacher.purchase import Answer

TOOLS = tuple(Tool.from_dict({"name": name}) for name in ("on", "off", "dim"))
CALL = TeacherCall("p", "m", "label", "", "q", "[]", {})
names = st.sampled_from(["on", "off", "dim"])
calls = st.builds(ToolCall, names, st.dictionaries(st.sampled_from("ab"), st.integers(0, 2), max_size=2))
answers = st.lists(calls, max_size=3).map(tuple)


def example(kind: str = "single", domain: str = "home") -> Example:
    return Example("e", "lights on", TOOLS[:1], (ToolCall("on"),), kind, domain=domain)


def reply(*called: str, status: str = "ok") -> Answer:
    return Answer(CALL, TeacherReply(status, calls=tuple({"name": name, "arguments": {}} for name in called)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(answers, min_size=1, max_size=8))
def test_weights_are_shares_of_distinct_answers(samples):
    weighted = weigh(samples)
    assert sum(answer.weight for answer in weighted) == pytest.approx(1)
    keys = [same_answer(answer.calls) for answer in weighted]
    assert len(set(keys)) == len(keys)
    for answer, key in zip(weighted, keys, strict=True):
        assert answer.weight == pytest.approx(sum(same_answer(s) == key for s in samples) / len(samples))
    assert [a.weight for a in weighted] == sorted((a.weight for a in weighted), reverse=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(answers, st.randoms(use_true_random=False))
def test_the_order_of_calls_makes_no_other_answer(answer, random):
    shuffled = list(answer)
    random.shuffle(shuffled)
    assert same_answer(shuffled) == same_answer(answer)
    assert same_answer([*answer, ToolCall("on")]) != same_answer(answer)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), answers)
def test_the_kind_fits_the_answer(kind, answer):
    assert (kind_of_answer(kind, answer) in EMPTY_KINDS) == (not answer)
    if answer and kind in ("implicit", "disfluent", "garbled"):
        assert kind_of_answer(kind, answer) == kind
    counted = {1: "single"}.get(len(answer), "multi" if len({call.name for call in answer}) > 1 else "repeat")
    if answer:
        assert kind_of_answer("none", answer) == counted


def test_the_commonest_answer_is_taken_and_keeps_the_tools_it_calls():
    answers = [reply("off"), reply("dim", "off"), reply("off", "dim"), reply(status="blocked")]
    found, weighted, refused = labelled(example(), {"home": TOOLS}, answers, teacher="p:m")
    assert found is not None
    assert [call.name for call in found.calls] == ["dim", "off"]
    assert {tool.name for tool in found.tools} == {"dim", "off"}
    assert (found.kind, found.teacher) == ("multi", "p:m")
    assert [answer.weight for answer in weighted] == pytest.approx([2 / 3, 1 / 3])
    assert [(bad.line_number, bad.reason.partition(":")[0]) for bad in refused] == [(4, "blocked")]


def test_a_request_that_brought_its_tools_keeps_them():
    found, _, _ = labelled(example(domain=""), {}, [reply("on")], teacher="p:m")
    assert found is not None
    assert found.tools == TOOLS[:1]


def test_without_a_usable_answer_there_is_no_example():
    found, weighted, refused = labelled(
        example(), {}, [reply(status="empty"), Answer(CALL, None, "failed: 3")], teacher=""
    )
    assert (found, weighted, len(refused)) == (None, [], 2)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(CALL, None, "budget: reached"), "budget: reached"),
        (Answer(CALL, TeacherReply("truncated", reason="the limit")), "truncated: the limit"),
        (Answer(CALL, TeacherReply("ok")), "ok: no calls can be read"),
        (Answer(CALL, TeacherReply("ok", calls=({"arguments": {}},))), "malformed: "),
    ],
)
def test_what_cannot_be_used_says_why(answer: Answer, reason: str):
    found = read_calls(answer)
    assert isinstance(found, str)
    assert found.startswith(reason)
