"""What render writes, parse reads back; every target character belongs to the right span."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from needle.schema import Tool, ToolCall
from needle.text.render import STYLES, Segment, Span, parse_calls, render_calls, render_query, render_tools

# Text that has hurt JSON writers before, beside what hypothesis finds.
texts = st.text(max_size=8) | st.sampled_from(["", " ", "  two", '"', "\\", '\\"', "\u2028", "é", "🎈", "null", '","'])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(
    scalars,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=6,
)
calls = st.lists(st.builds(ToolCall, texts, st.dictionaries(texts, values, max_size=4)), max_size=3)


def tool(name: str, properties: dict, *, required: tuple = (), description: str = "") -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return Tool.from_dict({"name": name, "description": description, "parameters": parameters})


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def order_of(value) -> list:
    """Keys in the order they stand, all the way down."""
    if isinstance(value, dict):
        return [[key, order_of(child)] for key, child in value.items()]
    return [order_of(item) for item in value] if isinstance(value, list) else []


@given(calls)
def test_calls_come_back_as_they_were_written(calls: list[ToolCall]):
    read = parse_calls(text_of(render_calls(calls, [])))
    assert read == calls
    assert [order_of(call.arguments) for call in read] == [order_of(call.arguments) for call in calls]


@given(calls)
def test_a_target_is_json_without_spaces_outside_its_strings(calls: list[ToolCall]):
    text = text_of(render_calls(calls, []))
    assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


@given(calls)
def test_only_values_and_names_and_keys_differ_between_targets(calls: list[ToolCall]):
    """Structure is punctuation and the two fixed words; letters of names, keys and values never leak into it."""
    for text, span in render_calls(calls, []):
        assert text
        if span == Span.STRUCTURE:
            assert not text.replace('"name":', "").replace('"arguments":', "").strip('[]{}",:')


@given(calls)
def test_neighbouring_segments_have_different_spans(calls: list[ToolCall]):
    spans = [span for _, span in render_calls(calls, [])]
    assert all(a != b for a, b in pairwise(spans))


@given(st.data())
def test_arguments_stand_in_the_order_of_the_schema(data: st.DataObject):
    inner = {"low": {"type": "integer"}, "high": {"type": "integer"}}
    properties = {"b": {}, "a": {"type": "object", "properties": inner}, "c": {"type": "array", "items": {}}}
    properties["c"]["items"] = properties["a"]
    nested = {"high": 2, "low": 1, "extra": 3}
    arguments = {"a": nested, "b": "x", "c": [nested], "z": 0}
    shuffled = dict(data.draw(st.permutations(list(arguments.items()))))
    (read,) = parse_calls(text_of(render_calls([ToolCall("f", shuffled)], [tool("f", properties)])))
    assert read == ToolCall("f", arguments)
    assert list(read.arguments) == ["b", "a", "c", "z"]
    assert list(read.arguments["a"]) == list(read.arguments["c"][0]) == ["low", "high", "extra"]


def test_every_character_belongs_to_its_span():
    timer = tool("set_timer", {"duration": {}, "counts": {}, "loud": {}})
    arguments = {"duration": 'ten "min"', "counts": [1, "x"], "loud": True}
    written = render_calls([ToolCall("set_timer", arguments), ToolCall("stop", {})], [timer])
    assert written == [
        Segment('[{"name":"', Span.STRUCTURE),
        Segment("set_timer", Span.NAME),
        Segment('","arguments":{"', Span.STRUCTURE),
        Segment("duration", Span.KEY),
        Segment('":"', Span.STRUCTURE),
        Segment(' ten \\"min\\"', Span.VALUE),
        Segment('","', Span.STRUCTURE),
        Segment("counts", Span.KEY),
        Segment('":[', Span.STRUCTURE),
        Segment("1", Span.VALUE),
        Segment(',"', Span.STRUCTURE),
        Segment(" x", Span.VALUE),
        Segment('"],"', Span.STRUCTURE),
        Segment("loud", Span.KEY),
        Segment('":', Span.STRUCTURE),
        Segment("true", Span.VALUE),
        Segment('}},{"name":"', Span.STRUCTURE),
        Segment("stop", Span.NAME),
        Segment('","arguments":{}}]', Span.STRUCTURE),
    ]


def test_no_call_is_an_empty_list():
    assert render_calls([], []) == [Segment("[]", Span.STRUCTURE)]
    assert parse_calls("[]") == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "JSON"),
        ('[{"name":"a","arguments":{"x":', "JSON"),
        ("{}", "list"),
        ("[1]", "call"),
        ('[{"arguments":{}}]', "name"),
        ('[{"name":"a","arguments":3}]', "arguments"),
        ('[{"name":"a","arguments":{"x":NaN}}]', "NaN"),
        ("[" * 100_000, "deep"),
    ],
)
def test_text_that_is_no_list_of_calls_is_a_value_error(text: str, word: str):
    with pytest.raises(ValueError, match=word):
        parse_calls(text)


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({"type": "string"}, "str"),
        ({"type": "string", "format": "date"}, "str:date"),
        ({"enum": ["am", "pm", 3, None]}, " am| pm|3|null"),
        ({"const": "x"}, " x"),
        ({"type": "array", "items": {"type": "integer"}}, "[int]"),
        ({"type": "array"}, "[any]"),
        ({"type": ["number", "null"]}, "num/null"),
        ({"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "string"}}]}, "bool/[str]"),
        ({"type": "object", "properties": {"a": {"type": "object"}}, "required": ["a"]}, "{a:obj}"),
        (True, "any"),
        ({}, "any"),
    ],
)
def test_a_signature_states_the_type(schema, written: str):
    shown = tool("f", {"x": schema, "y": {"type": "integer"}}, required=("y",), description="Does  it.\nNow.")
    assert render_tools([shown], style="signature") == f"f(x?:{written},y:int) Does it. Now."


def test_the_json_style_is_strict_json_a_line_a_tool():
    shown = [tool('quo"te', {"é": {"enum": ["a\nb", 'c"']}}, required=("é",), description="line\nbreak"), tool("g", {})]
    read = [Tool.from_dict(json.loads(line)) for line in render_tools(shown, style="json").split("\n")]
    assert read == shown


@pytest.mark.parametrize("style", STYLES)
def test_a_line_break_stands_between_two_tools_and_nowhere_else(style: str):
    odd = "a\nb"
    nested = {"type": "object", "properties": {odd: {"const": odd}}}
    shown = tool(odd, {odd: {"enum": [odd]}, "n": nested, "f": {"type": "string", "format": odd}}, description=odd)
    assert render_tools([shown, shown, shown], style=style).count("\n") == 2
    assert render_tools([], style=style).count("\n") == 0


def test_a_signature_writes_names_keys_and_members_as_a_target_does():
    odd = 'a"\\\n'
    shown = tool(odd, {odd: {"enum": [odd]}})
    written = [s.text for s in render_calls([ToolCall(odd, {odd: odd})], [shown]) if s.span != Span.STRUCTURE]
    assert render_tools([shown], style="signature") == "{}({}?:{})".format(*written)


def test_an_unknown_style_names_the_known_ones():
    with pytest.raises(ValueError, match="signature, json"):
        render_tools([], style="yaml")


@given(st.text())
def test_a_request_is_one_line_of_words_each_with_the_space_before_it(query: str):
    written = render_query(query)
    assert written == "".join(" " + word for word in query.split()) or (not query.split() and written == " ")
