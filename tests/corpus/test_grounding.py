"""Values traced to requests: every way of saying a number, a time or a date; and what a changed value looks like."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from needle import config
from needle.corpus import catalogue
from needle.corpus.grounding import HOW, Grounding
from needle.corpus.number_words import Said, listed
from needle.schema import Example, Tool, ToolCall

RECORDED = catalogue.load(Path(__file__).resolve().parents[2] / "data" / "teacher_corpus")
MANY = settings(max_examples=200, deadline=None, derandomize=True)
TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
MINUTES = {"type": "integer", "description": "Length in minutes."}
CLOCK = {"type": "string", "description": "24-hour HH:MM"}
DATE = {"type": "string", "format": "date"}
PERCENT = {"type": "integer", "description": "Brightness in percent."}


@pytest.fixture(scope="module")
def grounding() -> Grounding:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config.build(compose("validation/default").validation.grounding)


def asking(query: str, value: Any, schema: dict[str, Any], *, key: str = "x", kind: str = "single") -> Example:
    tool = Tool.from_dict({"name": "act", "parameters": {"type": "object", "properties": {key: schema}}})
    return Example("id", query, (tool,), (ToolCall("act", {key: value}),), kind)


@pytest.mark.parametrize(
    ("query", "value", "schema", "how"),
    [
        ("play Bohemian Rhapsody", "Bohemian Rhapsody", TEXT, "verbatim"),
        ("close the TAB, please", "tab", TEXT, "verbatim"),
        ("lock Samir's phone", "Samir", TEXT, "verbatim"),
        ("read me The Hobbit", "Hobbit", TEXT, "verbatim"),
        ("turn the wifi off", "wi-fi", TEXT, "verbatim"),
        ("un café au lait", "cafe au lait", TEXT, "verbatim"),
        ("明日の天気を東京で", "東京", TEXT, "verbatim"),
        ("say hi 👋", "👋", TEXT, "verbatim"),
        ("write to ana dot silva at mail dot test", "ana.silva@mail.test", TEXT, "format"),
        ("book it for the third of March", "3 of March", TEXT, "number word"),
        ("say we meet at the, um, no, at the north gate", "we meet at the north gate", TEXT, "partial"),
        ("list the orders that were cancelled", "cancelled order", TEXT, "partial"),
        ("put it on my list", "me", TEXT, "partial"),
        ("make it brighter", "up", {"enum": ["up", "down"]}, "enum"),
        ("convert it", 10, {"type": "integer", "default": 10}, "enum"),
        ("open it", True, {"type": "boolean"}, "boolean"),
        ("whatever", None, {"type": ["string", "null"]}, "null"),
        ("add 1,250.50 to it", 1250.5, NUMBER, "verbatim"),
        ("add twelve hundred", 1200, WHOLE, "number word"),
        ("the twenty-first one", 21, WHOLE, "number word"),
        ("half a dozen eggs", 6, WHOLE, "number word"),
        ("two and a half million", 2_500_000, WHOLE, "number word"),
        ("a 31k loan", 31_000, WHOLE, "verbatim"),
        ("sixty lakh at most", 6_000_000, WHOLE, "number word"),
        ("three point one four", 3.14, NUMBER, "number word"),
        ("minus five degrees", -5, WHOLE, "number word"),
        ("built in nineteen eighty four", 1984, WHOLE, "number word"),
        ("films of the 1980s", 1989, WHOLE, "number word"),
        ("two thirds of it", 0.67, NUMBER, "number word"),
        ("wait two hours", 120, MINUTES, "converted"),
        ("wait an hour and a half", 90, MINUTES, "converted"),
        ("wait 1h20", 80, MINUTES, "converted"),
        ("a quarter of an hour", 15, MINUTES, "converted"),
        ("check it hourly", 60, MINUTES, "converted"),
        ("five foot eleven", 180, {"type": "integer", "description": "Height in centimetres."}, "converted"),
        ("below fifty cents", 0.5, {"type": "number", "description": "Price."}, "converted"),
        ("half brightness", 50, PERCENT, "converted"),
        ("keep 20% back", 0.2, {"type": "number", "description": "Share held out."}, "converted"),
        ("the next match", 1, WHOLE, "implied"),
        ("full brightness", 100, {"type": "integer", "maximum": 100}, "documented"),
        ("up at half past seven in the evening", "19:30", CLOCK, "format"),
        ("at quarter to nine", "08:45", CLOCK, "format"),
        ("at 6:05 pm", "18:05", CLOCK, "format"),
        ("at midnight", "00:00", CLOCK, "format"),
        ("on the 7th of May 2018", "2018-05-07", DATE, "format"),
        ("on 7/5/2018", "2018-05-07", DATE, "format"),
        ("see you next Friday", "2025-03-07", DATE, "relative date"),
    ],
)
def test_how_a_value_is_said(grounding: Grounding, query: str, value: Any, schema: dict[str, Any], how: str):
    (traced,) = grounding.trace(asking(query, value, schema))
    assert (traced.how, traced.reason) == (how, "")
    assert how in HOW


@pytest.mark.parametrize(
    ("query", "value", "schema"),
    [
        ("play Bohemian Rhapsody", "Yesterday", TEXT),
        ("cancel order 4411", "order 4410", TEXT),
        ("open report", "port", TEXT),
        ("wait two hours", 2, MINUTES),  # in another unit
        ("wait two hours", 12, MINUTES),
        ("add twelve hundred", 1300, WHOLE),
        ("a loan of 31", 31_000, WHOLE),
        ("fifteen to twenty-five", -5, WHOLE),  # a hyphen is no minus
        ("the next 3 matches", 1, WHOLE),  # it says another number
        ("set it to 30", 100, {"type": "integer", "maximum": 100}),
        ("at 6:05 pm", "06:05", CLOCK),
        ("at 6:05 pm", "18:15", CLOCK),
        ("on the 7th of May 2018", "2018-05-08", DATE),
        ("on the 7th of May 2018", "2019-05-07", DATE),
        ("on the 7th of May", "2018-04-07", DATE),
        ("see you next Friday", "2025-03-07", TEXT),  # nothing asks for a form
        ("see you", "2025-13-77", DATE),
        ("make it brighter", "sideways", {"enum": ["up", "down"]}),
        ("Micheal called", "Michael", TEXT),  # only garbled requests are misspelt
        ("how large", 10**400, WHOLE),
    ],
)
def test_a_value_that_is_not_said_has_a_reason(grounding: Grounding, query: str, value: Any, schema: dict[str, Any]):
    (traced,) = grounding.trace(asking(query, value, schema))
    assert traced.how == ""
    assert traced.reason


def test_one_number_cannot_be_two_values_while_another_is_left(grounding: Grounding):
    parameters = {"type": "object", "properties": {"coupon": NUMBER, "yield": NUMBER}}
    tool = Tool.from_dict({"name": "price", "parameters": parameters})

    def grounded(query: str, coupon: int, rate: int) -> bool:
        call = ToolCall("price", {"coupon": coupon, "yield": rate})
        return all(one.how for one in grounding.trace(Example("id", query, (tool,), (call,), "single")))

    assert grounded("coupon 5 and yield 6", 5, 6)
    assert not grounded("coupon 5 and yield 6", 6, 6)
    assert grounded("coupon and yield both 6", 6, 6)


def test_garbled_requests_may_be_misspelt(grounding: Grounding):
    for query, value in (("cal the plumer", "plumber"), ("explane foto synthesis", "photosynthesis")):
        assert grounding.trace(asking(query, value, TEXT, kind="garbled"))[0].how == "partial"
        assert grounding.trace(asking(query, value, TEXT))[0].how == ""
    assert grounding.trace(asking("pront too copys", 2, WHOLE, kind="garbled"))[0].how == "number word"


def test_lists_and_objects_are_taken_apart(grounding: Grounding):
    item = {"type": "object", "properties": {"name": TEXT, "count": WHOLE}}
    schema = {"type": "array", "items": {"$ref": "#/$defs/item"}}
    parameters = {"type": "object", "properties": {"cart": schema}, "$defs": {"item": item}}
    value = [{"name": "apples", "count": 2}, {"name": "pears", "count": 4}]
    tool = Tool.from_dict({"name": "buy", "parameters": parameters})
    example = Example("id", "two apples and three pears", (tool,), (ToolCall("buy", {"cart": value}),), "single")
    traced = grounding.trace(example)
    assert [one.path for one in traced] == [f"buy.cart.{i}.{key}" for i in (0, 1) for key in ("name", "count")]
    assert [bool(one.how) for one in traced] == [True, True, True, False]


# Numbers and times, against an independent speller

ONES = listed("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
ONES += listed("seventeen eighteen nineteen")
TENS = listed("- - twenty thirty forty fifty sixty seventy eighty ninety")


def spelled(n: int) -> str:
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    for size, name in ((1_000_000, "million"), (1_000, "thousand"), (100, "hundred")):
        if n >= size:
            joint = " and " if n % size < 100 else " "
            return f"{spelled(n // size)} {name}" + (joint + spelled(n % size) if n % size else "")
    raise AssertionError(n)


@MANY
@given(st.integers(0, 999_999_999))
def test_number_words_are_read(n: int):
    for text in (spelled(n), spelled(n).replace("-", " "), f"{n}", f"{n:,}"):
        assert n in {number.value for number in Said(f"give me {text} of those").numbers}


@MANY
@given(st.integers(0, 99), st.integers(0, 999))
def test_decimals_are_read(whole: int, behind: int):
    digits = f"{behind:03}"
    words = f"{spelled(whole)} point {' '.join(ONES[int(digit)] for digit in digits)}"
    assert float(f"{whole}.{digits}") in {number.value for number in Said(words).numbers}


@MANY
@given(st.integers(0, 23), st.integers(0, 59))
def test_clock_times_are_read_to_the_minute(hour: int, minute: int):
    mark, twelve = "am" if hour < 12 else "pm", hour % 12 or 12
    said = [f"{hour:02}:{minute:02}", f"{twelve}:{minute:02} {mark}", f"{twelve}.{minute:02}{mark}"]
    if 1 <= minute <= 30:
        said.append(f"{spelled(minute)} minutes past {spelled(twelve)} {mark}")
    if minute > 30 and twelve != 11:
        said.append(f"{spelled(60 - minute)} to {spelled(twelve % 12 + 1)} {mark}")
    if minute >= 10:
        said.append(f"{spelled(twelve)} {spelled(minute)} {mark}")
    for text in said:
        times = Said(f"wake me at {text}").times
        assert (hour, minute) in times, text
        # Besides the time itself only readings of its parts are possible: the hours alone, "half eight" as 7:30.
        assert {m for _, m in times} <= {0, minute, 30}, text


@MANY
@given(
    st.text(max_size=60),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from([{}, TEXT, MINUTES, CLOCK, DATE, PERCENT, {"type": "array", "prefixItems": [True]}]),
    st.sampled_from(["single", "garbled"]),
)
def test_nothing_breaks_it(query: str, value: Any, schema: dict[str, Any], kind: str):
    for traced in Grounding(words_min_frac=0.6, garbled_min_frac=0.66).trace(asking(query, value, schema, kind=kind)):
        assert bool(traced.how) != bool(traced.reason)


# The recorded corpus, every answer of which was read twice, and its mutants


def test_the_recorded_corpus_is_grounded(grounding: Grounding):
    """Every second request. Those left are values that only knowledge gives: the coefficient 1 of x², the moon of
    moonrise, a standstill as speed 0."""
    examples = RECORDED.examples[::2]
    flagged = [e.query for e in examples if not all(one.how for one in grounding.trace(e))]
    assert len(flagged) < 0.004 * len(examples), flagged


@MANY
@given(st.sampled_from([e for e in RECORDED.examples if e.kind != "garbled"]), st.data())
def test_any_run_of_the_requests_words_is_verbatim(example: Example, data: st.DataObject):
    words = example.query.split()
    first = data.draw(st.integers(0, len(words) - 1))
    run = " ".join(words[first : data.draw(st.integers(first + 1, len(words)))])
    (traced,) = Grounding(words_min_frac=1.0, garbled_min_frac=1.0).trace(asking(example.query, run.upper(), TEXT))
    assert traced.how == "verbatim" or not any(character.isalnum() for character in run)


def mutants(rng: np.random.Generator) -> dict[str, list[tuple[Example, str]]]:
    """One mutant of every free value of every third request: (example, path of the value). A string becomes another
    request's value of the same parameter; an integer another of as many digits, or the next one; a float up to twice
    as much."""
    examples = RECORDED.examples[::3]
    free = [
        (example, i, key, value)
        for example in examples
        for i, call in enumerate(example.calls)
        for key, value in call.arguments.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
        if not any("enum" in t.properties.get(key, {}) for t in example.tools if t.name == call.name)
    ]
    pool: dict[str, list[str]] = {}
    for _, _, key, value in free:
        if isinstance(value, str):
            pool.setdefault(key, []).append(value)
    made: dict[str, list[tuple[Example, str]]] = {"text": [], "number": [], "next number": []}
    for example, i, key, value in free:
        changed: list[tuple[str, Any]] = []
        if isinstance(value, str):
            others = [other for other in pool[key] if other.casefold() != value.casefold()]
            changed += [("text", others[int(rng.integers(len(others)))])] if others else []
        elif isinstance(value, int):
            digits = len(str(abs(value)))
            other = int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
            changed += [("number", other)] if other != value else []
            changed.append(("next number", value + 1))
        else:
            changed.append(("number", round(value * (1.05 + float(rng.random())), 2)))
        for kind, new in changed:
            calls = list(example.calls)
            calls[i] = ToolCall(calls[i].name, {**calls[i].arguments, key: new})
            made[kind].append((example.replace(calls=tuple(calls)), f"{calls[i].name}.{key}={new!r}"))
    return made


def test_changed_values_are_caught(grounding: Grounding):
    """What is missed is what the request says elsewhere: the other call's number, a word of the other value."""
    for kind, made in mutants(np.random.default_rng(0)).items():
        caught = [
            any(not one.how and f"{one.path}={one.value!r}" == mutated for one in grounding.trace(example))
            for example, mutated in made
        ]
        assert len(caught) > 1000, kind
        assert np.mean(caught) >= 0.95, (kind, np.mean(caught))
