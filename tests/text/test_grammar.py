"""The grammar lets every right answer through and nothing that does not fit the tools."""

import json
import random
from pathlib import Path

import llguidance.numpy as lln
import numpy as np
import pytest

from needle.corpus import catalogue
from needle.schema import Example, Tool, ToolCall, call_problems
from needle.text.grammar import AnswerGrammar, allowed_tokens
from needle.text.render import parse_calls, render_calls, render_tools
from needle.text.tokenizer import EOS, TextCodec, train_tokenizer


@pytest.fixture(scope="module")
def recorded(repository: Path) -> catalogue.Catalogue:
    return catalogue.load(repository / "data" / "teacher_corpus")


@pytest.fixture(scope="module")
def codec(recorded: catalogue.Catalogue) -> TextCodec:
    examples = recorded.examples[::20]
    texts = [text for e in examples for text in (e.query, render_tools(e.tools, style="signature"))]
    return TextCodec(train_tokenizer(texts, vocab_size=1200), "signature")


@pytest.fixture(scope="module")
def grammar(codec: TextCodec) -> AnswerGrammar:
    return AnswerGrammar(codec.tokenizer, max_calls=6)


def accepts(grammar: AnswerGrammar, codec: TextCodec, calls, tools) -> bool:
    """Whether the tokens that a student is taught pass one by one, by the masks that decoding sees."""
    ids, _ = codec.encode_target(calls, tools)
    matcher, mask = grammar.matcher(tools), lln.allocate_token_bitmask(1, codec.vocab_size)
    for token in ids:
        lln.fill_next_token_bitmask(matcher, mask, 0)
        if not allowed_tokens(mask, codec.vocab_size)[0][token]:
            return False
        matcher.consume_token(token)
    return True


def test_every_recorded_answer_is_let_through(recorded, codec: TextCodec, grammar: AnswerGrammar):
    refused = [e.id for e in recorded.examples[::17] if not accepts(grammar, codec, e.calls, recorded.tools[e.domain])]
    assert refused == []


def tool(**properties) -> Tool:
    required = [name for name in properties if not name.startswith("maybe")]
    return Tool("f", "", {"type": "object", "properties": properties, "required": required})


NESTED = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
CASES = [
    (tool(x={"type": "string"}), {"x": 'quote " backslash \\ line\nbreak é😀'}, {"x": 3}),
    (tool(x={"type": "string"}), {"x": ""}, {}),
    (tool(x={"type": "string", "enum": ["left", "right"]}), {"x": "left"}, {"x": "up"}),
    (tool(x={"type": "integer", "minimum": 0, "maximum": 9}), {"x": 7}, {"x": 12}),
    (tool(x={"type": "number"}), {"x": -2.5}, {"x": "2"}),
    (tool(x={"type": "boolean"}), {"x": False}, {"x": 0}),
    (tool(x={"type": "array", "items": {"type": "string"}}), {"x": ["a", "b"]}, {"x": [1]}),
    (tool(x={"type": "array", "items": NESTED}), {"x": [{"a": 1, "b": "c"}, {"a": 2}]}, {"x": [{"b": "c"}]}),
    (tool(x={"anyOf": [{"type": "integer"}, {"type": "string"}]}), {"x": "a"}, {"x": None}),
    (tool(x={"type": ["string", "null"]}), {"x": None}, {"x": 1}),
    (tool(x={"const": "on"}), {"x": "on"}, {"x": "off"}),
    (tool(x={"type": "string", "format": "date"}), {"x": "2026-02-28"}, {"x": "28 February"}),
    (tool(x={"type": "string", "pattern": "^[A-Z]{3}$"}), {"x": "EUR"}, {"x": "euro"}),
    (tool(x={"type": "string", "minLength": 2, "maxLength": 3}), {"x": "abc"}, {"x": "abcd"}),
    (tool(maybe={"type": "string"}), {}, {"other": "a"}),
    (tool(x={"type": "object", "additionalProperties": {"type": "string"}}), {"x": {"Accept": "*"}}, {"x": {"n": 1}}),
    (tool(x={"type": "object"}), {"x": {"anything": [1, "a"]}}, {"x": "a"}),
]


@pytest.mark.parametrize(("shown", "right", "wrong"), CASES, ids=lambda value: json.dumps(value, default=str)[:40])
def test_schema_features(codec, grammar, shown: Tool, right: dict, wrong: dict):
    assert accepts(grammar, codec, [ToolCall("f", right)], [shown])
    assert not accepts(grammar, codec, [ToolCall("f", wrong)], [shown])


def test_references_within_a_tool_are_followed(codec, grammar):
    parameters = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/point"}},
        "required": ["x"],
        "$defs": {"point": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
    }
    shown = Tool("f", "", parameters)
    assert accepts(grammar, codec, [ToolCall("f", {"x": {"n": 1}})], [shown])
    assert not accepts(grammar, codec, [ToolCall("f", {"x": {"n": "one"}})], [shown])


def test_names_and_counts_are_held(codec, grammar):
    shown = [tool(maybe={"type": "string"})]
    assert not accepts(grammar, codec, [ToolCall("g", {})], shown)
    assert accepts(grammar, codec, [ToolCall("f", {})] * 6, shown)
    assert not accepts(grammar, codec, [ToolCall("f", {})] * 7, shown)
    assert accepts(grammar, codec, [], shown)
    assert accepts(grammar, codec, [], [])
    assert not accepts(grammar, codec, [ToolCall("f", {})], [])


def test_random_walks_are_valid_calls(recorded, codec: TextCodec, grammar: AnswerGrammar):
    """Whatever a student prefers, what comes out parses and fits the schemas."""
    chooser = random.Random(0)
    finished = 0
    for domain in sorted(recorded.tools)[::6]:
        tools = recorded.tools[domain]
        matcher, mask = grammar.matcher(tools), lln.allocate_token_bitmask(1, codec.vocab_size)
        ids: list[int] = []
        while len(ids) < 400:
            lln.fill_next_token_bitmask(matcher, mask, 0)
            choices = np.flatnonzero(allowed_tokens(mask, codec.vocab_size)[0])
            assert len(choices)
            # Closing tokens are preferred after a while, or most walks would never leave a string.
            closing = [t for t in choices if t == EOS or codec.tokenizer.id_to_token(int(t))[0] in '"}]']
            token = int(chooser.choice(closing if closing and len(ids) > 15 else list(choices)))
            ids.append(token)
            if token == EOS:
                break
            matcher.consume_token(token)
        if ids[-1] != EOS:
            continue
        finished += 1
        by_name = {t.name: t for t in tools}
        for call in parse_calls(codec.decode(ids)):
            assert call_problems(call, by_name) == []
    assert finished >= 6


def test_three_hundred_tools(codec, grammar, recorded):
    tools = [t for domain in recorded.tools.values() for t in domain][:300]
    unique = list({t.name: t for t in tools}.values())
    called = unique[-1]
    example = next(e for e in recorded.examples if e.calls and e.calls[0].name == called.name)
    assert accepts(grammar, codec, example.calls[:1], unique)


def test_spans_of_the_rendered_answer_cover_it(recorded):
    example: Example = recorded.examples[0]
    pieces = render_calls(example.calls, example.tools)
    assert [c.name for c in parse_calls("".join(p.text for p in pieces))] == [c.name for c in example.calls]
