"""Text survives its tokens; structure, digits and spans are where the rest of the code expects them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from needle.corpus.catalogue import load
from needle.errors import DataError
from needle.schema import Example, Tool, ToolCall
from needle.text.render import Span, render_calls, render_query, render_tools
from needle.text.tokenizer import BOS, EOS, PAD, QUERY, SPECIALS, STRUCTURES, TOOLS, TextCodec, train_tokenizer

SIZE = 2048


def training_texts(examples: list[Example]) -> list[str]:
    return [text for e in examples for text in (render_query(e.query), render_tools(e.tools, style="signature"))]


def ids_of(codec: TextCodec, text: str) -> list[int]:
    return codec.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def examples(repository: Path) -> list[Example]:
    return load(repository / "data" / "teacher_corpus").examples[::4]


@pytest.fixture(scope="module")
def codec(examples: list[Example]) -> TextCodec:
    return TextCodec(train_tokenizer(training_texts(examples), vocab_size=SIZE), "signature")


@given(text=st.text())
def test_any_text_survives_its_tokens(codec: TextCodec, text: str):
    assert codec.decode(ids_of(codec, text)) == text


@given(
    text=st.lists(st.sampled_from([*SPECIALS, *STRUCTURES, " ", "a", "7", "é", "\n", "🎈"]), max_size=8).map("".join)
)
def test_text_made_of_control_and_structure_strings_survives_and_stays_text(codec: TextCodec, text: str):
    ids = ids_of(codec, text)
    assert codec.decode(ids) == text
    assert all(token >= len(SPECIALS) for token in ids)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_structure_string_is_one_token(codec: TextCodec, structure: str):
    assert len(ids_of(codec, structure)) == 1


def test_nearly_every_structure_of_the_recorded_answers_is_one_token(codec: TextCodec, examples: list[Example]):
    """The rest closes objects nested in objects, which few answers do."""
    written = [s.text for e in examples for s in render_calls(e.calls, e.tools) if s.span == Span.STRUCTURE]
    single = sum(len(ids_of(codec, text)) == 1 for text in written)
    assert single >= 0.995 * len(written)


@given(number=st.integers(min_value=0))
def test_every_digit_is_one_token(codec: TextCodec, number: int):
    ids = ids_of(codec, str(number))
    assert [codec.decode([token]) for token in ids] == list(str(number))


@pytest.mark.parametrize("size", [300, 700])
def test_the_vocabulary_has_exactly_the_size_asked_for(examples: list[Example], size: int):
    tokenizer = train_tokenizer(training_texts(examples[:300]), vocab_size=size)
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))
    codec = TextCodec(tokenizer, "signature")
    assert codec.vocab_size == size
    # Whatever was left out of so small a vocabulary, every byte must still have its token.
    text = "any text at all: 🎈 é \x00 ￿"
    assert codec.decode(ids_of(codec, text)) == text


def test_training_is_deterministic(examples: list[Example]):
    first, second = (train_tokenizer(training_texts(examples[:300]), vocab_size=700).to_str() for _ in range(2))
    assert first == second


def test_a_prompt_is_tools_then_query_each_behind_its_control_token(codec: TextCodec, examples: list[Example]):
    for example in examples[:50]:
        ids = codec.encode_prompt(example.query, example.tools)
        assert ids[0] == TOOLS
        assert [token for token in ids if token < len(SPECIALS)] == [TOOLS, QUERY]
        middle = ids.index(QUERY)
        assert codec.decode(ids[1:middle]) == render_tools(example.tools, style="signature")
        assert codec.decode(ids[middle:]) == render_query(example.query)


def test_the_separator_stands_between_two_tools_and_nowhere_else(codec: TextCodec, examples: list[Example]):
    assert ids_of(codec, "\n") == [codec.separator_id]
    tools = [*examples[0].tools, *examples[100].tools, Tool.from_dict({"name": "a\nb", "description": "c\nd"})]
    prompt = codec.encode_prompt("one\ntwo\n", tools)
    assert prompt.count(codec.separator_id) == len(tools) - 1


def test_texts_are_those_of_the_tokens_with_their_leading_space(codec: TextCodec):
    texts = codec.texts()
    assert len(texts) == codec.vocab_size
    for words in (" set a timer", "getWeather", "naming_style"):
        assert "".join(texts[number] for number in ids_of(codec, words)) == words


def test_control_tokens_typed_by_a_user_are_text(codec: TextCodec, tmp_path: Path):
    typed = " ".join(SPECIALS)
    tool = Tool.from_dict({"name": "<query>", "description": typed})
    codec.save(tmp_path)
    for one in (codec, TextCodec.load(tmp_path)):
        prompt = one.encode_prompt(typed, [tool])
        assert [token for token in prompt if token < len(SPECIALS)] == [TOOLS, QUERY]
        ids, _ = one.encode_target([ToolCall("<eos>", {"<pad>": typed})], [tool])
        assert [token for token in ids if token < len(SPECIALS)] == [EOS]


def test_spans_belong_to_the_tokens_beside_them(codec: TextCodec, examples: list[Example]):
    for example in examples[:200]:
        ids, spans = codec.encode_target(example.calls, example.tools)
        assert len(ids) == len(spans)
        assert (ids[-1], spans[-1]) == (EOS, Span.STOP)
        segments = render_calls(example.calls, example.tools)
        assert codec.decode(ids) == "".join(text for text, _ in segments)
        for span in (Span.STRUCTURE, Span.NAME, Span.KEY, Span.VALUE):
            tokens = [token for token, its in zip(ids, spans, strict=True) if its == span]
            assert codec.decode(tokens) == "".join(text for text, its in segments if its == span)


def test_decoding_stops_at_the_end_and_skips_control_tokens(codec: TextCodec):
    word = ids_of(codec, " timer")
    assert codec.decode([BOS, *word, PAD, TOOLS, EOS, *word]) == " timer"
    assert codec.decode([]) == ""


def test_a_value_that_stands_in_the_request_is_made_of_the_requests_own_tokens(
    codec: TextCodec, examples: list[Example]
):
    """What makes copying possible: see the leading space in render."""
    inside = whole = 0
    for example in examples:
        query = render_query(example.query)
        query_ids = ids_of(codec, query)
        for call in example.calls:
            for value in call.arguments.values():
                place = query.find(" " + value) if isinstance(value, str) and value else -1
                after = query[place + 1 + len(value) :][:1] if place >= 0 else ""
                if place < 0 or after.isalnum():
                    continue
                ids = ids_of(codec, " " + value)
                whole += 1
                inside += any(query_ids[i : i + len(ids)] == ids for i in range(len(query_ids)))
    assert whole > 1000
    assert inside >= 0.95 * whole


def test_a_saved_tokenizer_is_the_same_tokenizer(codec: TextCodec, examples: list[Example], tmp_path: Path):
    codec.save(tmp_path)
    loaded = TextCodec.load(tmp_path)
    assert (loaded.vocab_size, loaded.style) == (codec.vocab_size, codec.style)
    for example in examples[:20]:
        assert loaded.encode_prompt(example.query, example.tools) == codec.encode_prompt(example.query, example.tools)
        assert loaded.encode_target(example.calls, example.tools) == codec.encode_target(example.calls, example.tools)


@pytest.mark.parametrize("name", ["tokenizer.json", "needle_text.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_tokenizer_is_the_users_to_mend(codec: TextCodec, tmp_path: Path, name: str, damage: str):
    codec.save(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[: len(whole) // 2 if damage == "cut" else 0])
    with pytest.raises(DataError, match=name):
        TextCodec.load(tmp_path)
