"""Records survive the disk unchanged; whatever is wrong with one is said, never raised past a reader."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from needle.errors import DataError
from needle.schema import (
    EMPTY_KINDS,
    KINDS,
    BadLine,
    Example,
    Tool,
    ToolCall,
    call_problems,
    canonical_json,
    read_examples,
    read_lines,
    strict_json,
)

TIMER = {
    "name": "set_timer",
    "description": "Start a timer.",
    "parameters": {
        "type": "object",
        "properties": {"duration": {"type": "string"}, "count": {"type": "integer", "minimum": 1}},
        "required": ["duration"],
    },
}
RECORD = {
    "id": "a1",
    "query": "two timers of ten minutes",
    "tools": [TIMER],
    "calls": [{"name": "set_timer", "arguments": {"duration": "ten minutes", "count": 2}}],
    "kind": "single",
    "domain": "timers",
    "source": "test",
    "teacher": "recorded",
    "split": "train",
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


def test_an_example_comes_back_as_it_was_written():
    example = Example.from_dict(RECORD)
    assert Example.from_dict(json.loads(example.to_json())) == example
    assert json.loads(example.to_json()) == RECORD
    assert example.problems() == []


@given(arguments=st.dictionaries(st.text(), json_values, max_size=4), query=st.text(min_size=1).filter(str.strip))
def test_any_arguments_survive_the_disk(arguments: dict, query: str):
    record = {**RECORD, "query": query, "calls": [{"name": "set_timer", "arguments": arguments}]}
    example = Example.from_dict(record)
    assert Example.from_dict(strict_json(example.to_json())) == example


def test_a_tool_may_be_bare_or_wrapped():
    bare = Tool.from_dict(TIMER)
    assert Tool.from_dict({"type": "function", "function": TIMER}) == bare
    assert list(bare.properties) == ["duration", "count"]
    assert list(bare.required) == ["duration"]


def test_a_tool_without_description_or_parameters_takes_no_arguments():
    tool = Tool.from_dict({"name": "refresh"})
    assert (tool.description, dict(tool.properties), list(tool.required)) == ("", {}, [])
    assert call_problems(ToolCall("refresh"), {"refresh": tool}) == []
    assert call_problems(ToolCall("refresh", {"x": 1}), {"refresh": tool}) != []


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ("set_timer", "object"),
        ({"type": "function", "function": None}, "object"),
        ({"description": "nameless"}, "name"),
        ({"name": "  "}, "name"),
        ({"name": 3}, "name"),
        ({"name": "a", "description": ["x"]}, "description"),
        ({"name": "a", "parameters": [1]}, "parameters"),
        ({"name": "a", "parameters": {"type": "string"}}, "type object"),
        ({"name": "a", "parameters": {"properties": None}}, "JSON Schema"),
        ({"name": "a", "parameters": {"properties": {"x": {"type": "strnig"}}}}, "JSON Schema"),
        ({"name": "a", "parameters": {"properties": {}, "required": ["x"]}}, "'x'"),
        ({"name": "a", "parameters": {"properties": {"x": {"$ref": "http://127.0.0.1:9/x.json"}}}}, "$ref"),
    ],
)
def test_an_unusable_tool_is_refused_by_name_of_what_is_wrong(record, word: str):
    with pytest.raises(ValueError, match=word.replace("$", r"\$")):
        Tool.from_dict(record)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"query": None}, "query"),
        ({"query": " \n"}, "query"),
        ({"tools": {}}, "tools"),
        ({"calls": None}, "calls"),
        ({"kind": "sinlge"}, "sinlge"),
        ({"kind": []}, "kind"),
        ({"calls": ["set_timer"]}, "call"),
        ({"calls": [{"name": "set_timer", "arguments": [1]}]}, "arguments"),
    ],
)
def test_an_unusable_example_is_refused_by_name_of_what_is_wrong(change: dict, word: str):
    with pytest.raises(ValueError, match=word):
        Example.from_dict({**RECORD, **change})


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({}, "duration"),
        ({"duration": 10}, "set_timer.duration"),
        ({"duration": "x", "count": 0}, "set_timer.count"),
        ({"duration": "x", "colour": "red"}, "colour"),
    ],
)
def test_arguments_against_the_schema_are_a_problem_that_names_the_place(arguments: dict, place: str):
    (problem,) = call_problems(ToolCall("set_timer", arguments), {"set_timer": Tool.from_dict(TIMER)})
    assert place in problem


def test_additional_arguments_are_fine_where_the_tool_allows_them():
    tool = Tool.from_dict({"name": "a", "parameters": {"type": "object", "additionalProperties": {"type": "integer"}}})
    assert call_problems(ToolCall("a", {"x": 1}), {"a": tool}) == []
    assert call_problems(ToolCall("a", {"x": "one"}), {"a": tool}) != []


def test_a_reference_inside_the_schema_is_followed():
    parameters = {"$defs": {"n": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/n"}}}
    tool = Tool.from_dict({"name": "a", "parameters": parameters})
    assert call_problems(ToolCall("a", {"x": 1}), {"a": tool}) == []
    assert call_problems(ToolCall("a", {"x": "one"}), {"a": tool}) != []


@pytest.mark.parametrize("target", ["#/$defs/nowhere", "#/properties/x"])
def test_a_reference_to_nowhere_or_to_itself_is_a_problem_not_a_crash(target: str):
    tool = Tool.from_dict({"name": "a", "parameters": {"properties": {"x": {"$ref": target}}}})
    (problem,) = call_problems(ToolCall("a", {"x": 1}), {"a": tool})
    assert problem.startswith("a: ")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_without_a_call_have_none_and_the_others_have_one(kind: str):
    with_call, without = Example.from_dict({**RECORD, "kind": kind}), Example.from_dict({**RECORD, "kind": kind})
    without = without.replace(calls=())
    assert bool(with_call.problems()) == (kind in EMPTY_KINDS)
    assert bool(without.problems()) == (kind not in EMPTY_KINDS)


def test_two_tools_of_one_name_and_unknown_tools_are_problems():
    example = Example.from_dict({**RECORD, "tools": [TIMER, TIMER]})
    assert example.problems() == ["two tools are named 'set_timer'"]
    assert Example.from_dict({**RECORD, "tools": []}).problems() == ["call of unknown tool 'set_timer'"]


@given(json_values)
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    def backwards(value):
        if isinstance(value, dict):
            return {key: backwards(value[key]) for key in reversed(value)}
        return [backwards(item) for item in value] if isinstance(value, list) else value

    assert canonical_json(backwards(value)) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value


BAD_LINES = {
    b"{": "JSON",
    b"\xff\xfe{}": "UTF-8",
    b'{"x": NaN}': "NaN",
    b'{"x": -Infinity}': "Infinity",
    b'{"x": 1e999}': "1e999",
    b'{"x": "\\ud800"}': "surrogate",
    b"[" * 200_000: "deep",
    b"1" * 10_000: "digits",
}


@pytest.mark.parametrize(("line", "word"), BAD_LINES.items(), ids=list(BAD_LINES.values()))
def test_a_bad_line_is_handed_on_with_its_number_and_reason(tmp_path: Path, line: bytes, word: str):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n[2]\n")
    first, bad, last = read_lines(path)
    assert (first, last) == ((1, {"a": 1}), (4, [2]))
    assert bad[0] == 3
    assert isinstance(bad[1], BadLine)
    assert word in bad[1].reason
    bad[1].text.encode()


def test_a_whole_surrogate_pair_and_escaped_text_are_fine():
    assert strict_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert strict_json('"\\\\ud800"') == "\\ud800"


def test_a_file_that_was_cut_off_says_so(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    path.write_text(Example.from_dict(RECORD).to_json() + "\n" + '{"id": "a2", "que')
    examples, (bad,) = read_examples(path)
    assert [example.id for example in examples] == ["a1"]
    assert bad.line_number == 2
    assert "cut off" in bad.reason


def test_every_line_is_an_example_or_a_bad_line_with_its_reason(tmp_path: Path):
    records = [RECORD, {**RECORD, "kind": "none"}, {**RECORD, "query": ""}, {**RECORD, "id": "a2"}, [1]]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    examples, bad = read_examples(path)
    assert [example.id for example in examples] == ["a1", "a2"]
    assert [line.line_number for line in bad] == [2, 3, 5]
    assert all(line.path == str(path) and line.reason for line in bad)


@pytest.mark.parametrize(("content", "word"), [("", "empty"), ("{}\n", "line 1"), (None, "cannot read")])
def test_a_file_without_an_example_is_the_users_to_mend(tmp_path: Path, content: str | None, word: str):
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=word):
        read_examples(path)
