"""Hand-computed cases of every metric, and what must not change when calls are reordered or rewritten."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from needle.metrics.matching import COUNTS, METRICS, fractions, group_of, judge, parse, value_key, values_equal
from needle.schema import Tool, ToolCall


def tool(name: str, **properties: str) -> Tool:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return Tool(name, "", schema)


TIMER = tool("set_timer", duration="string", count="integer")
LIGHT = tool("set_light", room="string", level="number", on="boolean")
TOOLS = (TIMER, LIGHT)


def call(name: str, **arguments: object) -> ToolCall:
    return ToolCall(name, arguments)


@pytest.mark.parametrize(
    ("left", "right", "exact", "lenient"),
    [
        (1, 1.0, True, True),
        (1, True, False, False),
        (0, False, False, False),
        (1, "1", False, False),
        (None, None, True, True),
        (None, False, False, False),
        (" ten minutes ", "ten minutes", True, True),
        ("Ten minutes", "ten minutes", False, True),
        ("ten minutes.", "«ten minutes»", False, True),
        ("ten-minutes", "ten minutes", False, False),
        ("caf\u00e9", "cafe\u0301", True, True),
        ("STRASSE", "straße", False, True),
        ("!", "?", False, False),  # punctuation alone is a value
        ([1, 2], [2, 1], False, False),
        ([1, "a"], [1.0, "a "], True, True),
        ({"a": 1, "b": [True]}, {"b": [True], "a": 1.0}, True, True),
        ({"a": 1}, {"a": 1, "b": None}, False, False),
        ({"a": "X"}, {"a": "x"}, False, True),
        (0.1 + 0.2, 0.3, False, False),
    ],
)
def test_equality_of_values(left, right, exact, lenient):
    assert values_equal(left, right) is exact
    assert values_equal(right, left) is exact
    assert values_equal(left, right, lenient=True) is lenient


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "{}", '[{"arguments":{}}]', '[{"name":"a","arguments":[1]}]', "[NaN]", '["a"]', "[" * 100_000],
)
def test_what_is_no_list_of_calls(text):
    assert parse(text) is None


def test_a_call_may_leave_its_arguments_out():
    assert parse('[{"name":"a"}]') == [call("a")]
    assert parse('[{"name":"a","arguments":{"x":NaN}}]') is None


def test_a_hand_computed_set():
    """Five answers, every metric by hand."""
    judged = [
        # right
        judge([call("set_timer", duration="5 min")], [call("set_timer", duration="5 min ")], TOOLS),
        # right calls in the wrong order
        judge(
            [call("set_light", on=True), call("set_timer", count=2.0)],
            [call("set_timer", count=2), call("set_light", on=True)],
            TOOLS,
        ),
        # one call too few; a value right only leniently, one argument missing, one invented (and outside the schema)
        judge(
            [call("set_light", room="Kitchen", colour="red")],
            [call("set_light", room="kitchen", level=3), call("set_timer", count=1)],
            TOOLS,
        ),
        # no call is wanted, and one is made of a tool that is not there
        judge([call("play")], [], TOOLS),
        # no JSON
        judge(None, [call("set_timer", duration="1 h")], TOOLS),
    ]
    expected = {
        "call_exact_frac": 1 / 5,
        "call_exact_unordered_frac": 2 / 5,
        "name_frac": 1 / 5,
        "call_precision_frac": 3 / 5,  # predicted 1 + 2 + 1 + 1 + 0
        "call_recall_frac": 3 / 6,  # gold 1 + 2 + 2 + 0 + 1
        "call_f1_frac": 6 / 11,
        "value_frac": 3 / 5,  # gold arguments of name-matched calls 1 + 2 + 2
        "value_lenient_frac": 4 / 5,
        "missing_parameter_frac": 1 / 5,
        "invented_parameter_frac": 1 / 5,
        "invented_tool_frac": 1 / 5,
        "json_valid_frac": 4 / 5,
        "schema_valid_frac": 2 / 5,
        "abstain_precision_frac": None,  # nothing was answered with []
        "abstain_recall_frac": 0.0,
        "false_call_frac": 1.0,
        "false_abstain_frac": 0.0,
    }
    assert fractions(judged) == pytest.approx(expected)


def test_abstention():
    judged = [judge([], [], TOOLS), judge([], [call("set_timer")], TOOLS), judge(None, [], TOOLS)]
    found = fractions(judged)
    assert found["abstain_precision_frac"] == 1 / 2
    assert found["abstain_recall_frac"] == 1 / 2  # text that is no JSON is no empty answer
    assert found["false_call_frac"] == 0.0
    assert found["false_abstain_frac"] == 1.0
    assert found["call_exact_frac"] == 1 / 3
    assert found["call_precision_frac"] is None


def test_repeated_calls_are_matched_as_a_multiset():
    """Three predicted timers of which two are the same, two gold ones: one is right, and pairs follow the values."""
    predicted = [call("set_timer", count=9), call("set_timer", count=9), call("set_timer", count=1)]
    gold = [call("set_timer", count=1), call("set_timer", count=2)]
    counts = judge(predicted, gold, TOOLS)
    assert (counts["calls_right"], counts["calls_predicted"], counts["calls_gold"]) == (1, 3, 2)
    assert (counts["values_right"], counts["arguments_gold"]) == (1, 2)
    assert counts["exact_unordered"] == 0


def test_repeats_in_another_order_keep_their_arguments():
    gold = [call("set_timer", count=1), call("set_timer", count=2), call("set_timer", count=3)]
    counts = judge(gold[::-1], gold, TOOLS)
    assert counts["values_right"] == counts["arguments_gold"] == 3
    assert (counts["exact"], counts["exact_unordered"], counts["name"]) == (0, 1, 1)


def test_every_metric_is_a_ratio_of_counted_things():
    assert set(judge([], [], ())) == set(COUNTS)
    assert all(name.endswith("_frac") for name in METRICS)
    assert fractions([]) == dict.fromkeys(METRICS)


@pytest.mark.parametrize(
    ("n_tools", "bucket"), [(0, "0"), (1, "1"), (2, "2-4"), (4, "2-4"), (5, "5-8"), (16, "9-16"), (17, "17+")]
)
def test_groups(n_tools, bucket):
    fields = {"kind": "multi", "n_tools": n_tools, "domain": "", "split": "unseen"}
    assert group_of("tools", **fields) == bucket
    assert (group_of("kind", **fields), group_of("domain", **fields)) == ("multi", "unknown")
    assert group_of("seen", **fields) == "unseen"
    assert group_of("seen", **{**fields, "split": "validation"}) == "seen"
    assert group_of("seen", **{**fields, "split": ""}) == "unknown"
    with pytest.raises(ValueError, match="colour"):
        group_of("colour", **fields)


PROPERTY = settings(deadline=None, max_examples=60)

TEXTS = st.text(alphabet="aAe\u00e9\u0301ßs .!\u00bf1\ud800", max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.builds(
        ToolCall,
        st.sampled_from(("set_timer", "set_light", "other")),
        st.dictionaries(st.sampled_from(("count", "room", "level")), VALUES, max_size=3),
    ),
    max_size=4,
)


@PROPERTY
@given(CALLS)
def test_the_right_answer_scores_one_wherever_something_is_counted(calls):
    found = fractions([judge(calls, calls, TOOLS)])
    bad = {"missing_parameter_frac", "invented_parameter_frac", "false_call_frac", "false_abstain_frac"}
    depends_on_gold = {"schema_valid_frac", "invented_tool_frac"}
    for name in METRICS.keys() - depends_on_gold:
        assert found[name] in (None, 0.0 if name in bad else 1.0), name
    assert found["call_exact_frac"] == 1.0


@PROPERTY
@given(CALLS, CALLS, st.randoms(use_true_random=False))
def test_the_order_of_calls_changes_only_the_ordered_metrics(predicted, gold, random):
    shuffled = random.sample(predicted, len(predicted))
    before, after = judge(predicted, gold, TOOLS), judge(shuffled, gold, TOOLS)
    ordered = {"exact", "name"}
    assert {k: v for k, v in before.items() if k not in ordered} == {k: v for k, v in after.items() if k not in ordered}
    assert before["exact"] <= before["exact_unordered"]
    assert before["exact"] <= before["name"]


@PROPERTY
@given(CALLS, CALLS)
def test_counts_are_consistent(predicted, gold):
    counts = judge(predicted, gold, TOOLS)
    assert counts["calls_right"] <= min(len(predicted), len(gold))
    assert counts["values_right"] <= counts["values_right_lenient"]
    assert counts["values_right_lenient"] + counts["arguments_missing"] <= counts["arguments_gold"]
    assert all(value is None or 0 <= value <= 1 for value in fractions([counts]).values())


@PROPERTY
@given(CALLS, CALLS)
def test_writing_an_answer_as_json_and_reading_it_changes_no_count(predicted, gold):
    text = json.dumps([{"name": one.name, "arguments": dict(one.arguments)} for one in predicted])
    if "Infinity" not in text:
        assert judge(parse(text), gold, TOOLS) == judge(predicted, gold, TOOLS)


@PROPERTY
@given(VALUES)
def test_equality_is_reflexive_and_survives_json(value):
    assert values_equal(value, value)
    assert hash(value_key(value)) == hash(value_key(value, lenient=False))
    text = json.dumps(value)
    if "Infinity" not in text:
        assert values_equal(json.loads(text), value)


def test_not_a_number_equals_nothing():
    assert not values_equal(math.nan, float("nan"))
