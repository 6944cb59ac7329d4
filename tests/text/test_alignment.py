"""Alignment against brute force: a source of texts that is small enough to be enumerated, cut by two tokenizers."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from needle.schema import Tool, ToolCall
from needle.teacher.base import TokenLogProb
from needle.text.alignment import Aligner, Pieces, Row, Stretch, StudentTokens
from needle.text.locating import Part, locate, parts
from needle.text.render import Span, render_calls
from needle.text.tokenizer import train_tokenizer

WORDS = ("ten", "tent", "two", "minute", "minutes", "3", "r\u00e9glage")
END = b'"'
Distribution = Mapping[bytes, float]


@cache
def merged() -> StudentTokens:
    """Every word is one token, with the space before it."""
    return StudentTokens(train_tokenizer([" " + " ".join(WORDS)] * 5, vocab_size=400))


@cache
def by_bytes() -> StudentTokens:
    return StudentTokens(train_tokenizer(["a"], vocab_size=298))


@cache
def texts() -> dict[bytes, float]:
    """A Markov source over words: one or two of them, the second depending on the first; each ends with a quote."""
    found: dict[bytes, float] = {}
    first = {word: weight / 28 for weight, word in enumerate(WORDS, 1)}
    for word, mass in first.items():
        found[word.encode() + END] = mass * 0.4
        second = {other: 1 + (3 * WORDS.index(word) + WORDS.index(other)) % 5 for other in WORDS}
        for other, weight in second.items():
            found[f"{word} {other}".encode() + END] = mass * 0.6 * weight / sum(second.values())
    return found


def byte_pieces(text: bytes) -> list[bytes]:
    return [text[i : i + 1] for i in range(len(text))]


def word_pieces(text: bytes) -> list[bytes]:
    """Words with the space before them, and the quote."""
    first, *rest = text.removesuffix(END).split(b" ")
    return [first, *(b" " + word for word in rest), END]


def teacher_of(cut: Callable[[bytes], list[bytes]], text: bytes) -> Pieces:
    """What a teacher with these pieces, and the source as its knowledge, tells of a text: all pieces, everywhere."""
    log_probs = []
    pieces = cut(text)
    for number, piece in enumerate(pieces):
        masses: defaultdict[bytes, float] = defaultdict(float)
        for other, mass in texts().items():
            if (others := cut(other))[:number] == pieces[:number]:
                masses[others[number]] += mass
        total = sum(masses.values())
        told = tuple((one, math.log(mass / total)) for one, mass in masses.items())
        log_probs.append(TokenLogProb(piece, math.log(masses[piece] / total), told))
    return Pieces.of(log_probs)


def truth(student: StudentTokens, history: Sequence[int]) -> dict[int, float]:
    """The next token's distribution given the tokens before it, over all texts; -1: the text has ended."""
    masses: defaultdict[int, float] = defaultdict(float)
    for text, mass in texts().items():
        ids = [*student.tokenizer.encode(" " + text.removesuffix(END).decode()).ids, -1]
        if ids[: len(history)] == list(history):
            masses[ids[len(history)]] += mass
    total = sum(masses.values())
    return {token: mass / total for token, mass in masses.items()}


def ids_of_space(student: StudentTokens) -> int:
    return student.tokenizer.encode(" ").ids[0]


def aligned(student: StudentTokens, pieces: Pieces, *, known: frozenset[bytes], lead: bytes = b" ") -> list[Row]:
    body = pieces.text.removesuffix(END)
    ids = student.tokenizer.encode((lead + body).decode()).ids
    aligner = Aligner(student, known=known, piece_ends="known")
    return aligner.rows(pieces, Stretch(0, body, lead, END), ids)


@pytest.mark.parametrize(("cut", "student"), [(byte_pieces, merged), (word_pieces, by_bytes), (byte_pieces, by_bytes)])
def test_rows_are_the_true_distributions_where_the_teacher_tells_all(
    cut: Callable[[bytes], list[bytes]], student: Callable[[], StudentTokens]
):
    """Every stored probability is the true one, the label's always among them; the rest is the true rest."""
    for text in [*texts()][::3]:
        ids = student().tokenizer.encode(" " + text.removesuffix(END).decode()).ids
        rows = aligned(student(), teacher_of(cut, text), known=frozenset({piece for t in texts() for piece in cut(t)}))
        for place, row in enumerate(rows):
            expected = truth(student(), ids[:place])
            if cut == byte_pieces and student == merged and student().bytes_of[ids[place]] == b"3":
                # " t" could go on to a text in which the space is a token of its own, as it is before a digit.
                assert row.masses[ids[place]] <= expected[ids[place]] == 1.0
                continue
            assert row.masses[ids[place]] == pytest.approx(expected[ids[place]], abs=1e-9)
            for token, mass in row.masses.items():
                assert mass == pytest.approx(expected.get(token, 0.0), abs=1e-9)
            rest = sum(mass for token, mass in expected.items() if token not in row.masses)
            if cut == word_pieces:  # a piece tells all its bytes, only not what comes behind its end
                assert rest <= expected.get(-1, 0.0) + expected.get(ids_of_space(student()), 0.0) + 1e-9
            assert row.unaligned == pytest.approx(rest, abs=1e-9)
            assert row.untold < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equal_tokenizers_give_equal_distributions(data: st.DataObject):
    student = merged()
    ids = student.tokenizer.encode(data.draw(st.sampled_from([f" {a} {b}" for a, b in product(WORDS, WORDS)]))).ids
    # Structure stands in segments of its own, and no student's text has it behind a word.
    plain = [piece for piece in student.bytes_of if piece and piece.isascii() and not set(piece) & set(b'"[]{}:,')]
    log_probs = []
    for token in ids:
        pieces = {student.bytes_of[token], *data.draw(st.lists(st.sampled_from(plain), max_size=6))}
        weights = {piece: data.draw(st.floats(0.01, 1)) for piece in sorted(pieces)}
        total = sum(weights.values()) / data.draw(st.floats(0.5, 1))
        told = tuple((piece, math.log(weight / total)) for piece, weight in weights.items())
        log_probs.append(TokenLogProb(student.bytes_of[token], dict(told)[student.bytes_of[token]], told))
    known = frozenset(piece for piece in student.bytes_of if piece)
    pieces = Pieces.of(log_probs)
    rows = Aligner(student, known=known, piece_ends="known").rows(pieces, Stretch(0, pieces.text, b"", b""), ids)
    by_piece = {piece: token for token, piece in enumerate(student.bytes_of) if piece}
    for row, told in zip(rows, log_probs, strict=True):
        expected = {by_piece[piece]: math.exp(nats) for piece, nats in told.top}
        assert row.masses == pytest.approx(expected, abs=1e-12)
        assert (row.unaligned, row.dropped) == (0.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_teacher_gives_proper_rows_that_agree_with_the_bytes(data: st.DataObject):
    """Random cuts, random and truncated alternatives: never more than 1, and no token that the bytes rule out."""
    student = data.draw(st.sampled_from([merged(), by_bytes()]))
    text = data.draw(st.sampled_from(sorted(texts())))
    places = sorted({0, len(text), *data.draw(st.lists(st.integers(1, len(text) - 1), max_size=6))})
    others = st.binary(min_size=1, max_size=3) | st.sampled_from([word.encode() for word in (*WORDS, '"', " ", "x")])
    log_probs = []
    for start, end in pairwise(places):
        alternatives = data.draw(st.lists(others, max_size=4))
        share = data.draw(st.floats(0.1, 1))
        told = {text[start:end]: share} | {piece: (1 - share) / 5 for piece in alternatives if piece != text[start:end]}
        log_probs.append(
            TokenLogProb(text[start:end], math.log(share), tuple((p, math.log(m)) for p, m in told.items() if m))
        )
    pieces = Pieces.of(log_probs)
    ids = student.tokenizer.encode(" " + text.removesuffix(END).decode()).ids
    for token, row in zip(ids, aligned(student, pieces, known=frozenset()), strict=True):
        assert sum(row.masses.values()) + row.unaligned + row.untold == pytest.approx(1.0, abs=1e-9)
        assert all(mass >= 0 for mass in row.masses.values())
        assert row.masses[token] > 0
        # A token with mass is the label, or some alternative on the way begins as it does.
        told = {piece for masses in pieces.told for piece in masses}
        first = {(" " + "x").encode()[:1]} | {piece[i : i + 1] for piece in told for i in range(len(piece))}
        assert all(student.bytes_of[other][:1] in first for other in row.masses)


def told(piece: str, masses: Mapping[str, float]) -> TokenLogProb:
    top = tuple((text.encode(), math.log(mass)) for text, mass in masses.items())
    return TokenLogProb(piece.encode(), math.log(masses[piece]), top)


def test_by_hand():
    """The module's own example: a token of two pieces, and a cut in the middle of one."""
    student = StudentTokens(train_tokenizer([" minutes minute", " min hours"] * 4, vocab_size=420))
    pieces = Pieces.of(
        [told("min", {"min": 0.8, "hours": 0.15}), told("utes", {"utes": 0.9, "ute": 0.1}), told('"', {'"': 1})]
    )
    (row,) = aligned(student, pieces, known=frozenset(pieces.vocabulary()))
    masses = {student.bytes_of[token]: mass for token, mass in row.masses.items()}
    assert masses == pytest.approx({b" minutes": 0.8 * 0.9, b" minute": 0.8 * 0.1, b" hours": 0.15})
    assert row.untold == pytest.approx(0.05)

    one = Pieces.of([told("3x", {"3x": 0.6, "3y": 0.2, "4": 0.1}), told('"', {'"': 1})])
    rows = aligned(by_bytes(), one, known=frozenset())
    assert [round(sum(row.masses.values()), 6) for row in rows] == [0.9, 0.9, round(0.8 / 0.9, 6)]
    by_byte = {by_bytes().bytes_of[token]: mass for token, mass in rows[2].masses.items()}
    # Of the cut piece those that begin with 3, and the 0.1 that was not told, which may.
    assert by_byte == pytest.approx({b"x": 0.6 / 0.9, b"y": 0.2 / 0.9})


def test_rounded_probabilities_are_scaled_to_one():
    pieces = Pieces.of([told("a", {"a": 0.9, "b": 0.3})])
    assert sum(pieces.told[0].values()) == pytest.approx(1.0)
    assert pieces.untold == (0.0,)


def test_a_piece_of_which_a_server_tells_no_probability_has_one():
    """OpenAI's servers say -9999 of a piece that was written and is not among the likeliest."""
    unlikely = TokenLogProb(b"min", -9999.0, ((b"hours", -0.1),))
    student = StudentTokens(train_tokenizer([" minutes minute", " min hours"] * 4, vocab_size=420))
    pieces = Pieces.of([unlikely, told("utes", {"utes": 0.9, "ute": 0.1}), told('"', {'"': 1})])
    for row in aligned(student, pieces, known=frozenset(pieces.vocabulary())) + aligned(
        by_bytes(), pieces, known=frozenset()
    ):
        assert all(0 < mass <= 1 for mass in row.masses.values())
        assert sum(row.masses.values()) + row.unaligned + row.untold == pytest.approx(1)


def test_tokens_of_other_bytes_are_refused():
    pieces = Pieces.of([told("ten", {"ten": 1.0})])
    aligner = Aligner(merged(), known=frozenset(), piece_ends="known")
    with pytest.raises(ValueError, match="are not the bytes"):
        aligner.rows(pieces, Stretch(0, b"ten", b"", END), [5])
    ids = merged().tokenizer.encode("two").ids
    with pytest.raises(ValueError, match="does not stand at byte 0"):
        aligner.rows(pieces, Stretch(0, b"two", b"", END), ids)


# ---- where the calls stand

SET, ASK = (
    Tool("timer.set", "", {"properties": {"label": {"type": "string"}, "minutes": {"type": "integer"}, "tags": {}}}),
    Tool("ask", "", {"properties": {"text": {"type": "string"}}}),
)
CALLS = (
    ToolCall("timer.set", {"minutes": 3, "label": "minutes 3", "tags": ["a", {"deep": True}]}),
    ToolCall("ask", {"text": 'say "hi"'}),
    ToolCall("timer.set", {"label": "", "minutes": -1.5}),
)
ANSWERS = {
    "hermes": '<tool_call>\n{"name": "timer.set", "arguments": {"minutes": 3, "label": "minutes 3", "tags": ["a", '
    '{"deep": true}]}}\n</tool_call>\n<tool_call>\n{"name": "ask", "arguments": {"text": "say \\"hi\\""}}\n</tool_call>'
    '\n<tool_call>\n{"name": "timer.set", "arguments": {"label": "", "minutes": -1.5}}\n</tool_call>',
    "pythonic": '[timer.set(minutes=3, label="minutes 3", tags=["a", {"deep": true}]), ask(text="say \\"hi\\""), '
    'timer.set(label="", minutes=-1.5)]',
    "no spaces": '[{"name":"timer.set","arguments":{"minutes":3,"label":"minutes 3","tags":["a",{"deep":true}]}},'
    '{"name":"ask","arguments":{"text":"say \\"hi\\""}},{"name":"timer.set","arguments":{"label":"","minutes":-1.5}}]',
}


@pytest.mark.parametrize("form", ANSWERS)
def test_every_part_is_found_in_every_form(form: str):
    """Name, key and value each once, where the text says; arguments stand in the teacher's order, not the schema's."""
    segments = render_calls(CALLS, (SET, ASK))
    wanted = parts(CALLS, segments)
    found = locate(CALLS, ANSWERS[form].encode())
    assert found.keys() == wanted.keys()
    starts = []
    for part, place in found.items():
        text = segments[wanted[part]].text.encode()
        assert text in (place.body, b" " + place.body)
        assert ANSWERS[form].encode()[place.start :].startswith(place.body)
        starts.append((part.call, place.start))
    assert starts == sorted(starts)
    assert segments[wanted[Part(0, Span.VALUE, (0,))]].text == "3"


def test_what_is_spelled_otherwise_is_not_found_and_hides_nothing_else():
    calls = (ToolCall("ask", {"text": "caf\u00e9", "loud": True}),)
    found = locate(calls, b'ask(text="caf\\u00e9", loud=True)')
    assert {(part.span, part.steps) for part in found} == {(Span.NAME, ()), (Span.KEY, (0,)), (Span.KEY, (1,))}
    assert locate(calls, b"no call at all") == {}
