"""Prompts read back: what stands in a prompt is enough to hold an answer to its tools."""

import json
from typing import Any

import pytest

from needle.errors import DataError
from needle.schema import Tool
from needle.text.grammar import canonical_schema
from needle.text.prompt_reader import read_tools, tools_of_prompt
from needle.text.render import render_tools
from needle.text.tokenizer import TextCodec, train_tokenizer

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
UNSAID = {"minimum", "maximum", "multipleOf", "minItems", "maxItems", "pattern", "minLength", "maxLength"}


def tool(properties: dict[str, Any], required: tuple[str, ...] = (), **about: str) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return Tool(about.get("name", "do"), about.get("description", "Does it."), parameters)


HARD = [
    tool({}, description=""),
    tool({"a": TEXT, "b": WHOLE}, ("b",), name="play.song-now"),
    tool({"speed": {"enum": ["km/h", "mi/h", "a, b", "c (d, e)", 'say "x"']}, "then": {"type": "boolean"}}),
    tool({"n": {"enum": [1, 2.5, True, None, "int"]}, "day": {"type": "string", "format": "date"}}),
    tool({"list": {"type": "array", "items": {"enum": ["x", "y"]}}, "deep": {"type": "array", "items": TEXT}}),
    tool({"place": {"type": "object", "properties": {"city": TEXT, "km": WHOLE}, "required": ["city"]}, "z": TEXT}),
    tool({"either": {"anyOf": [WHOLE, {"type": "null"}, {"enum": ["all"]}]}, "both": {"type": ["string", "integer"]}}),
    tool({"any": {}, "free": {"type": "object"}, "ключ": TEXT, "odd_key?": TEXT}, description="Größe (cm): a|b, c/d"),
]


def said(schema: Any) -> Any:
    """Without what a signature does not tell."""
    if isinstance(schema, dict):
        return {key: said(value) for key, value in schema.items() if key not in UNSAID}
    return [said(item) for item in schema] if isinstance(schema, list) else schema


def grammar(tools: list[Tool]) -> Any:
    return said(canonical_schema(tools, 8, loose=False))


@pytest.mark.parametrize("style", ["signature", "json"])
@pytest.mark.parametrize("one", HARD[:-1], ids=range(len(HARD) - 1))
def test_tools_read_back_allow_the_same_answers(one: Tool, style: str):
    (read,) = read_tools(render_tools([one], style=style), style=style)
    assert (read.name, read.description) == (one.name, one.description)
    assert grammar([read]) == grammar([one])


@pytest.mark.parametrize("style", ["signature", "json"])
def test_every_recorded_tool_can_be_read(repository, style: str):
    paths = sorted((repository / "data/teacher_corpus").glob("*.tools.json"))[::4]
    tools = [Tool.from_dict(record) for path in paths for record in json.loads(path.read_text("utf-8"))]
    assert len(tools) > 100
    assert read_tools(render_tools(tools, style=style), style=style)
    unlike = [
        one.name
        for one in tools
        if grammar(read_tools(render_tools([one], style=style), style=style)) != grammar([one])
    ]
    assert len(unlike) <= len(tools) // 200, unlike


def test_a_key_that_looks_like_an_optional_one_is_read_as_one_and_written_the_same():
    text = render_tools(HARD[-1:], style="signature")
    (read,) = read_tools(text, style="signature")
    assert render_tools([read], style="signature") == text


@pytest.mark.parametrize("text", ["no parameters", "f(a)", "f(a:str", "f(a:strange)", "f(a:str)x", "f(a:[int)"])
def test_what_is_no_signature_is_refused(text: str):
    with pytest.raises(DataError, match="read back"):
        read_tools(text, style="signature")


@pytest.mark.parametrize("style", ["signature", "json"])
def test_encoded_prompts_tell_their_tools(style: str):
    codec = TextCodec(train_tokenizer(["play a song for ten minutes"] * 5, vocab_size=300), style)
    shown = HARD[:3]
    for tools in (shown, []):
        prompt = codec.encode_prompt("play <query> a song\nnow", tools)
        assert [one.name for one in tools_of_prompt(prompt, codec)] == [one.name for one in tools]
