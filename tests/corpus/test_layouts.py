"""Public tool-calling layouts: hand-made records of each become exactly these examples; what is wrong is quarantined
with its reason and never stops the rest."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from needle.corpus.layouts import AUTO, LAYOUTS, Reading, read
from needle.corpus.layouts.files import from_arrow
from needle.corpus.layouts.literals import any_value, json_value, python_value, pythonic_calls
from needle.corpus.layouts.schemas import flat_parameters, json_schema, python_type, tidy
from needle.errors import ConfigError, DataError
from needle.schema import KINDS, Example, Tool, ToolCall

FOLDER = Path(__file__).parent / "layouts"
FILES = {name: next(FOLDER.glob(f"{name}.*")) for name in LAYOUTS}
QUICK = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
STRING, INTEGER, NUMBER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))


def whole(path: Path | str, layout: str = AUTO, *, split: str | None = None, limit: int | None = None) -> Reading:
    return read(str(path), layout, split=split, limit=limit)


def object_of(required: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def described(schema: dict[str, Any], description: str, **more: Any) -> dict[str, Any]:
    return {**schema, "description": description, **more}


def example(query: str, tools: list[Tool], kind: str, *calls: tuple[str, dict[str, Any]]) -> Example:
    called = tuple(ToolCall(name, arguments) for name, arguments in calls)
    return Example("", query, tuple(tools), called, kind, teacher="recorded")


# Hand-made records of every layout

STOP = Tool("stop", "Stop the music.", object_of())
SAY = Tool("say", "Say something.", object_of(("text",), text=STRING))
LAMP = Tool(
    "lamp",
    "Switch a lamp.",
    object_of(
        ("room", "on"),
        room=described(STRING, "Which room."),
        on=described(BOOLEAN, "On or off."),
        dim=described(NUMBER, "Brightness, 0 to 1."),
    ),
)
BOLT = Tool("bolt_door", "Bolt a door.", object_of(door=STRING))
NOTE = Tool("note_book", "Note a book.", object_of(("title",), title=STRING, year=INTEGER))
FLOATS = {"type": "array", "items": NUMBER}
GRILL = Tool(
    "grill",
    "Grill food.",
    object_of(
        ("type", "minutes"),
        type=described(STRING, "What to grill."),
        minutes=described(INTEGER, "How long."),
        temps=described(FLOATS, "Target temperatures."),
        side=described(STRING, "Which side.", default="both"),
    ),
)
ROUTE = Tool(
    "route",
    "Plan a route.",
    object_of(
        ("stops",),
        stops=described({"type": "array", "items": FLOATS | {"minItems": 2, "maxItems": 2}}, "Coordinates."),
        limits=described(
            {"type": "object", "additionalProperties": {"anyOf": [INTEGER, STRING]}},
            "Limits by name.",
        ),
        via=described({"anyOf": [STRING, {"type": "null"}]}, "A road."),
    ),
)
TABLE = Tool(
    "Book Table",
    "Book a table.",
    object_of(
        ("guests",),
        guests=described(INTEGER, "How many."),
        at=described(STRING, "When."),
        wishes={"type": "array", "items": STRING},
        **{"from": object_of(("km",), km=NUMBER, road=STRING)},
    ),
)
MENU = Tool("Menu.show", "Show the menu.", object_of(vegan=BOOLEAN))
DIM = Tool("dim", "Dim a lamp's light.", object_of(("room",), room=STRING, level=INTEGER | {"minimum": 0}))
WAKE = Tool("wake", "Wake someone.", object_of(("who",), who=STRING, gently=BOOLEAN))
LABEL = {"anyOf": [STRING, {"type": "null"}]}
ALARM = Tool(
    "alarm", "Set an alarm.", object_of(("hour",), hour=INTEGER, label=LABEL) | {"additionalProperties": False}
)
ORDER = Tool(
    "shop.order",
    "Order food.",
    object_of(
        ("dish", "memo"),
        dish=STRING,
        count=INTEGER,
        price=NUMBER,
        size=STRING | {"default": "M"},
        extra=object_of(salt=BOOLEAN, sauce=STRING),
        at={"type": "array", "items": NUMBER},
        lines={"type": "array", "items": object_of(item=STRING, note=STRING)},
        tag={},
        memo=STRING,
    ),
)

EXPECTED = {
    "examples": [
        example("quiet please", [STOP, SAY], "implicit", ("stop", {})).replace(
            id="own-1", source="recorded", teacher="gemini", split="validation"
        ),
        example(
            "say good night and good luck",
            [SAY],
            "repeat",
            ("say", {"text": "good night"}),
            ("say", {"text": "good luck"}),
        ),
        example("how tall is Everest?", [], "no_tools"),
    ],
    "needle_v1": [
        example(
            "attic light on, and bolt the cellar",
            [LAMP, BOLT],
            "multi",
            ("lamp", {"room": "attic", "on": True}),
            ("bolt_door", {"door": "cellar"}),
        ),
        example("freeze!", [Tool("halt", "Stop everything.", object_of())], "single", ("halt", {})),
        example("who wrote Emma?", [], "no_tools"),
        example("Emma, 1815", [NOTE], "single", ("note_book", {"title": "Emma", "year": 1815})),
    ],
    "xlam": [
        example(
            "grill two steaks for 7 minutes, 52.5 then 54 degrees",
            [GRILL, ROUTE],
            "single",
            ("grill", {"type": "steak", "minutes": 7, "temps": [52.5, 54]}),
        ),
        example(
            "from 1.5,2 to 3,4 by the “old road”,\nat most 80",
            [ROUTE],
            "single",
            ("route", {"stops": [[1.5, 2], [3, 4]], "limits": {"speed": 80, "toll": "none"}, "via": "“old road”"}),
        ),
        example(
            "grill fish 3 min then corn 9 min",
            [GRILL],
            "repeat",
            ("grill", {"type": "fish", "minutes": 3}),
            ("grill", {"type": "corn", "minutes": 9}),
        ),
        example("sing me a song", [GRILL], "none"),
    ],
    "toolace": [
        example("a table for 2 at eight", [TABLE, MENU], "single", ("Book Table", {"guests": 2, "at": "eight"})),
        example(
            'we are 4, near Joe\'s ("the" bar), 3 km out; then the vegan menu',
            [TABLE, MENU],
            "multi",
            (
                "Book Table",
                {"guests": 4, "wishes": ['Joe\'s ("the" bar)', "quiet, dark"], "from": {"km": 3, "road": "A=1]"}},
            ),
            ("Menu.show", {"vegan": True}),
        ),
        example(
            "zwei Plätze, bitte\nam Fenster",
            [TABLE, MENU],
            "single",
            ("Book Table", {"guests": 2, "at": "früh\nabends", "wishes": []}),
        ),
        example("what is love?", [TABLE, MENU], "none"),
        example("hi", [], "no_tools"),
        example("a table", [TABLE, MENU], "none"),
    ],
    "hermes": [
        example("dim the hall to 3", [DIM, WAKE], "single", ("dim", {"room": "hall", "level": 3})),
        example(
            'wake Ann\'s dad gently, and dim the "den"',
            [DIM, WAKE],
            "multi",
            ("wake", {"who": "Ann's dad", "gently": True}),
            ("dim", {"room": '"den"'}),
        ),
        example("why is the sky blue?", [DIM, WAKE], "none"),
        example("weck Zoë", [WAKE], "single", ("wake", {"who": "Zoë"})),
    ],
    "openai": [
        example("wake me at 7 for “yoga”\nplease", [ALARM], "single", ("alarm", {"hour": 7, "label": "“yoga”\n"})),
        example("alarms at 6 and 8", [ALARM], "repeat", ("alarm", {"hour": 6, "label": None}), ("alarm", {"hour": 8})),
        example("what time is it?", [Tool("now", "Tell the time.", object_of())], "single", ("now", {})),
        example("hello", [], "no_tools"),
        example("thanks", [ALARM], "none"),
        example("wake me", [ALARM], "none"),
    ],
    "bfcl": [
        example(
            "two soups, 3.5 each, no memo",
            [ORDER],
            "single",
            ("shop.order", {"dish": "soup", "count": 2, "price": 3.5, "size": "M", "memo": ""}),
        ).replace(split="test"),
        example(
            "a pie with salt, and a bun (note: hot) at 1,2",
            [ORDER],
            "repeat",
            ("shop.order", {"dish": "pie", "extra": {"salt": True}, "memo": "none"}),
            (
                "shop.order",
                {"dish": "bun", "lines": [{"item": "bun", "note": "hot"}], "at": [1, 2], "tag": 7, "memo": "none"},
            ),
        ).replace(split="test"),
        example("what is the capital of Peru?", [ORDER], "none").replace(split="test"),
    ],
}  # fmt: skip
REFUSED = {
    "examples": {4: "id own-1", 5: "'text' is a required property", 6: "kind 'odd'"},
    "needle_v1": {5: "'on' is a required property", 6: "tools: neither JSON"},
    "xlam": {
        5: "'5' is not of type 'integer'",
        6: "unknown tool 'boil'",
        7: "two tools are named 'grill'",
        8: "type 'datetime' is not known",
        9: "tools must be a list",
        10: "repeats an earlier record",
    },
    "toolace": {
        7: "has no end",
        8: "not of the form key=value",
        9: "'8' is not of type 'integer'",
        10: "mixes text with a call",
        11: "is not a literal",
        12: "later turns are not single-shot",
        13: "no list of functions",
        14: "later turns are not single-shot",
    },
    "hermes": {
        5: "has no end",
        6: "is not a literal",
        7: "less than the minimum",
        8: "no system turn shows <tools>",
        9: "no assistant turn",
    },
    "openai": {
        7: "'ten' is not of type 'integer'",
        8: "arguments: neither JSON",
        9: "weight 0",
        10: "more than text",
        11: "'loud' was unexpected",
        12: "role 'narrator'",
        13: "the answer is empty",
    },
    "bfcl": {
        4: "no possible answer",
        5: "later turns are not single-shot",
        6: "simulated tools",
        7: "'many' is not of type 'integer'",
        8: "no list of acceptable values",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_of_a_layout_become_exactly_these_examples(layout: str):
    reading = whole(FILES[layout], layout)
    kept = [one if one.id == "own-1" else one.replace(id="", source="") for one in reading.examples]
    assert kept == EXPECTED[layout]
    assert all(one.problems() == [] for one in reading.examples)
    assert reading.tools == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_other_record_is_quarantined_with_its_reason(layout: str):
    reading = whole(FILES[layout], layout)
    bad = {line.line_number: line.reason for line in reading.quarantine if line.path == str(FILES[layout])}
    assert bad.keys() == REFUSED[layout].keys()
    for number, reason in REFUSED[layout].items():
        assert reason in bad[number]
    assert all(" at 0x" not in reason for reason in bad.values())


def test_bad_answers_of_the_second_file_are_told():
    told = [line for line in whole(FILES["bfcl"], "bfcl").quarantine if "possible_answer" in line.path]
    assert [line.line_number for line in told] == [6, 7]
    assert "a second answer to 'simple_2'" in told[0].reason
    assert "needs id and ground_truth" in told[1].reason


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_guessed(layout: str):
    assert whole(FILES[layout]).examples == whole(FILES[layout], layout).examples
    assert whole(FILES[layout]).layout == layout


def test_every_layout_tells_what_it_is():
    for convert in LAYOUTS.values():
        assert convert.__doc__ is not None
        assert '{"' in convert.__doc__
    for layout in set(LAYOUTS) - {"examples"}:
        assert "https://" in (LAYOUTS[layout].__doc__ or "")


# Identity, provenance, kinds


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_depend_on_content_only(layout: str, tmp_path: Path):
    before = whole(FILES[layout], layout).examples
    records = [json.loads(one.to_json()) for one in before]
    for record in records:
        del record["source"], record["id"]
    random.Random(7).shuffle(records)
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    after = whole(tmp_path / "other.jsonl", "examples").examples
    digest = {one.query: one.id.rpartition("-")[2] for one in after}
    assert all(one.id == "own-1" or one.id == f"{layout}-{digest[one.query]}" for one in before)
    assert len({one.id for one in before}) == len(before)


def test_the_source_names_layout_and_file():
    assert {one.source for one in whole(FILES["xlam"]).examples} == {"xlam:xlam.jsonl"}
    assert [one.source for one in whole(FILES["examples"]).examples] == ["recorded", *["examples:examples.jsonl"] * 2]


def test_examples_of_bfcl_stay_marked_for_evaluation(tmp_path: Path):
    """Also after they were written as Needle's own examples and read again."""
    marked = whole(FILES["bfcl"]).examples
    (tmp_path / "again.jsonl").write_text("".join(one.to_json() + "\n" for one in marked))
    again = whole(tmp_path / "again.jsonl").examples
    assert again == marked
    assert all(one.source.startswith("bfcl") and one.split == "test" for one in again)


def test_kinds_follow_from_tools_and_calls(tmp_path: Path):
    a, b = ({"name": name, "parameters": {}} for name in "ab")
    asked = {"a": "single", "aa": "repeat", "ab": "multi", "aba": "multi", "": "none"}
    lines = [{"query": f"q{calls}", "tools": [a, b], "answers": [{"name": name} for name in calls]} for calls in asked]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {one.query[1:]: one.kind for one in whole(tmp_path / "x.jsonl", "xlam").examples} == asked
    assert set(asked.values()) <= set(KINDS)


def test_3_0_for_an_integer_is_the_one_change_and_it_is_counted():
    assert [whole(FILES[layout], layout).coerced for layout in LAYOUTS] == [0, 1, 1, 0, 0, 0, 0]
    nested = object_of(
        a={"type": "array", "items": object_of(n=INTEGER)}, m={"type": "object", "additionalProperties": INTEGER}
    )
    assert tidy({"a": [{"n": 2.0}, {"n": 2.5}], "m": {"k": -0.0}}, nested) == (
        {"a": [{"n": 2}, {"n": 2.5}], "m": {"k": 0}},
        2,
    )
    for value in ("5", 1e300, True, None):
        assert tidy({"n": value}, object_of(n=INTEGER)) == ({"n": value}, 0)
    assert type(tidy(3.0, NUMBER)[0]) is float


# Guessing


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([{"query": "stop", "tools": "[]", "answers": "[]"}], "needle_v1 or xlam"),
        ([{"instruction": "stop", "output": "ok"}], r"no known layout.*instruction, output"),
        ([], "no records"),
        ([["stop"]], "no records"),
    ],
)
def test_what_cannot_be_guessed_is_told(tmp_path: Path, records: list[Any], reason: str):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=reason):
        whole(tmp_path / "x.jsonl")


def test_one_telling_record_among_the_first_decides(tmp_path: Path):
    plain = {"query": "hi", "tools": "[]", "answers": "[]"}
    told = {"query": "a", "tools": json.dumps([{"name": "f", "parameters": {"n": {"type": "int"}}}]), "answers": "[]"}
    for order in ([plain, told], [told, plain]):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in order))
        assert whole(tmp_path / "x.jsonl").layout == "xlam"


# Files and folders


def as_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def bare(reading: Reading) -> list[Example]:
    return [one.replace(id="", source="") for one in reading.examples]


@pytest.mark.parametrize("layout", ["xlam", "toolace", "hermes"])
def test_parquet_holds_the_same_examples(layout: str, tmp_path: Path):
    rows = as_rows(FILES[layout])
    columns = dict.fromkeys(key for row in rows for key in row)
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    reading = whole(tmp_path / "x.parquet")
    assert bare(reading) == EXPECTED[layout]
    assert [one.id for one in reading.examples] == [one.id for one in whole(FILES[layout]).examples]
    assert [line.line_number for line in reading.quarantine] == list(REFUSED[layout])


def test_fields_that_parquet_fills_with_null_are_left_out(tmp_path: Path):
    """Arrow gives every object the fields of all others, here of the other tool's schema and arguments."""

    def record(name: str, key: str, value: Any, kind: str) -> dict[str, Any]:
        function = {"name": name, "parameters": {"type": "object", "properties": {key: {"type": kind}}}}
        call = {"type": "function", "function": {"name": name, "arguments": {key: value}}}
        turns = [{"role": "user", "content": f"do {name}"}, {"role": "assistant", "tool_calls": [call]}]
        return {"messages": turns, "tools": [{"type": "function", "function": function}]}

    rows = [record("f", "a", 1, "integer"), record("g", "b", "x", "string")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert bare(whole(tmp_path / "x.parquet")) == [
        example("do f", [Tool("f", "", object_of(a=INTEGER))], "single", ("f", {"a": 1})),
        example("do g", [Tool("g", "", object_of(b=STRING))], "single", ("g", {"b": "x"})),
    ]
    assert from_arrow({"a": None, "b": {"c": None, "d": [None, 1]}}) == {"b": {"d": [None, 1]}}


def test_a_folder_is_read_in_order_of_names(tmp_path: Path):
    rows = as_rows(FILES["toolace"])
    (tmp_path / "test.json").write_text(json.dumps(rows[2:3]))
    (tmp_path / "train-00001-of-00002.jsonl").write_text(json.dumps(rows[1]) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "train-00000-of-00002.parquet")
    (tmp_path / "training_notes.txt").write_text("not data")
    (tmp_path / "trainer.json").write_text(json.dumps(rows[3:4]))
    queries = [one.query for one in EXPECTED["toolace"]]
    assert [one.query for one in whole(tmp_path, split="train").examples] == queries[:2]
    assert [one.source for one in whole(tmp_path, split="test").examples] == ["toolace:test.json"]
    assert [one.query for one in whole(tmp_path).examples] == [queries[i] for i in (2, 0, 1, 3)]
    with pytest.raises(DataError, match=r"no file named validation; it holds test\.json"):
        whole(tmp_path, split="validation")


def test_limit_counts_examples_and_reading_stops_there():
    assert len(whole(FILES["toolace"], limit=2).examples) == 2
    reading = whole(FILES["xlam"], limit=4)
    assert len(reading.examples) == 4
    assert reading.quarantine == []
    with pytest.raises(ConfigError, match="limit=0"):
        whole(FILES["xlam"], limit=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [".jsonl", ".json"])
def test_a_file_cut_in_half_keeps_what_stands_before_the_cut(layout: str, form: str, tmp_path: Path):
    texts = [json.dumps(row, ensure_ascii=False) for row in as_rows(FILES[layout])]
    text = "[" + ",\n".join(texts) + "]" if form == ".json" else "\n".join(texts) + "\n"
    path = tmp_path / f"{layout}{form}"
    answers = tmp_path / "possible_answer" / path.name
    answers.parent.mkdir()
    answers.write_bytes((FOLDER / "possible_answer" / "bfcl.json").read_bytes())
    path.write_bytes(text.encode()[: len(text.encode()) // 2])
    reading = whole(path, layout)
    assert "cut off?" in [line for line in reading.quarantine if line.path == str(path)][-1].reason
    expected = [one.replace(id="", source="") for one in EXPECTED[layout]]
    assert 0 < len(reading.examples) <= len(expected)
    assert bare(reading) == expected[: len(reading.examples)]


@pytest.mark.parametrize("keep", [1, 2, 5, 11, 12])
def test_a_json_list_may_end_anywhere(tmp_path: Path, keep: int):
    first = '{"query": "hi", "tools": [], "answers": []}'
    (tmp_path / "x.json").write_text(f"[{first}, {first}]"[: len(first) + keep])
    reading = whole(tmp_path / "x.json", "xlam")
    assert len(reading.examples) == 1
    assert "cut off?" in reading.quarantine[-1].reason


def test_a_bad_item_of_a_json_list_does_not_hide_the_next(tmp_path: Path):
    sound = '{"query": "%s", "tools": [], "answers": []}'
    items = [sound % "one", '{"query": NaN}', '{"query": "\\ud800"}', "7", sound % "two"]
    (tmp_path / "x.json").write_text(" [ " + " , ".join(items) + " ] ")
    reading = whole(tmp_path / "x.json", "xlam")
    assert [one.query for one in reading.examples] == ["one", "two"]
    reasons = [line.reason for line in reading.quarantine]
    assert [line.line_number for line in reading.quarantine] == [2, 3, 4]
    assert "NaN" in reasons[0]
    assert "surrogate" in reasons[1]
    assert "must be an object, not int" in reasons[2]


def test_deep_nesting_is_a_reason_and_not_a_crash(tmp_path: Path):
    schema = '{"items":' * 900 + "{}" + "}" * 900  # json reads it; what walks it in Python may not
    tools = '[{"name": "f", "parameters": {"type": "object", "properties": {"a": ' + schema + "}}}]"
    flat = '{"query": "hi", "tools": [], "answers": []}'
    (tmp_path / "x.jsonl").write_text(f'{{"query": "a", "tools": {tools}, "answers": []}}\n{flat}\n')
    (tmp_path / "y.json").write_text(f'[{flat}, {{"query": {"[" * 100_000}}}]')
    assert whole(tmp_path / "x.jsonl", "xlam").quarantine[0].reason == "nested too deep"
    assert "nested too deep" in whole(tmp_path / "y.json", "xlam").quarantine[0].reason


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl", b"", "no records"),
        ("x.json", b"[]", "no records"),
        ("x.json", b'{\n "data": []\n}', "neither a list of records nor a record a line"),
        ("x.json", b'[{"query": "caf\xe9"}]', "not UTF-8: byte 0xe9"),
        ("x.parquet", b"PAR1 and no more", "as parquet"),
        ("x.csv", b"query,tools\n", "is not one of .jsonl"),
        ("x.jsonl", b"{}\n", "first reason: record 1: tools must be a list"),
    ],
)
def test_a_file_of_no_use_stops_with_a_message(tmp_path: Path, name: str, content: bytes, reason: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        whole(tmp_path / name, "xlam")


def test_a_path_that_is_not_there_and_a_layout_that_is_none(tmp_path: Path):
    with pytest.raises(DataError, match="neither a file nor a folder"):
        whole(tmp_path / "none.jsonl", "xlam")
    with pytest.raises(DataError, match=r"it holds no .jsonl, .json, .parquet file"):
        whole(tmp_path, "xlam")
    with pytest.raises(ConfigError, match=r"layout=alpaca.*needle_v1"):
        whole(FILES["xlam"], "alpaca")


# The hub


def test_without_a_network_the_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"cannot load hub:nobody/nothing@v1, split=train: .*download its files"):
        whole("hub:nobody/nothing@v1", "xlam", split="train")
    with pytest.raises(ConfigError, match=r"hub:OWNER/NAME"):
        whole("hub:nothing", "xlam")


def test_a_hub_data_set_is_read_by_name_revision_and_split(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    table = datasets.Dataset.from_list(as_rows(FILES["xlam"])[:3])

    def load_dataset(name: str, config: str | None, *, revision: str | None, split: str | None) -> Any:
        asked.append((name, config, revision, split))
        return table if split else datasets.DatasetDict(dict.fromkeys(name.split("/")[1].split("-"), table))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    path = "hub:a/train:small@refs/pr/1"
    reading = whole(path, split="train")
    assert asked == [("a/train", "small", "refs/pr/1", "train")]
    assert [one.query for one in reading.examples] == [one.query for one in EXPECTED["xlam"][:3]]
    assert {one.source for one in reading.examples} == {f"xlam:{path}"}
    assert whole("hub:a/train").examples[0].query == reading.examples[0].query
    with pytest.raises(DataError, match="splits train, test: choose one with split="):
        whole("hub:a/train-test")


# Texts of values and calls

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
# "=" ends a key; quotes and brackets, white space around it and a line break never stand in one.
keys = st.text(st.characters(exclude_characters="=\"'[]{}(),\\", exclude_categories=["C", "Z"]), min_size=1)
names = st.text(min_size=1).map(str.strip).filter(lambda name: name and name[0] not in "[],")
calls = st.lists(st.tuples(names, st.dictionaries(keys, json_values, max_size=4)), max_size=4)


def pythonic(rendered: list[tuple[str, dict[str, Any]]], write: Any) -> str:
    inside = (f"{name}({', '.join(f'{k}={write(v)}' for k, v in arguments.items())})" for name, arguments in rendered)
    return f"[{', '.join(inside)}]"


@QUICK
@given(calls)
def test_pythonic_calls_read_back(rendered: list[tuple[str, dict[str, Any]]]):
    known = {name for name, _ in rendered}
    for write in (repr, json.dumps, lambda value: json.dumps(value, ensure_ascii=False)):
        if write is not repr and "\\u" in json.dumps(rendered):
            continue  # JSON writes a character beyond U+FFFF as a pair, which is none in Python
        read_back = pythonic_calls(pythonic(rendered, write), known)
        assert [(call.name, dict(call.arguments)) for call in read_back] == rendered


@QUICK
@given(calls, st.data())
def test_a_cut_or_changed_text_of_calls_gives_calls_or_a_reason(rendered: list[Any], data: st.DataObject):
    text = pythonic(rendered, repr)
    cut = data.draw(st.integers(0, len(text)))
    for broken in (text[:cut], text[:cut] + data.draw(st.sampled_from("\"'()[]{},=\\\n")) + text[cut:]):
        try:
            found = pythonic_calls(broken, [name for name, _ in rendered])
        except ValueError:
            continue
        json.dumps([dict(call.arguments) for call in found], allow_nan=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", []),
        ("  [ f ( ) ]\n", [("f", {})]),
        ("[f(a=1,), g(b=(1, 2.5))]", [("f", {"a": 1}), ("g", {"b": [1, 2.5]})]),
        ("[f(a=true, b=[null, False])]", [("f", {"a": True, "b": [None, False]})]),
        ("[f(a='x' 'y', b=-1e3, from='there', x-id=\"\\\"q\\\"\")]", [
            ("f", {"a": "xy", "b": -1000.0, "from": "there", "x-id": '"q"'}),
        ]),
        ("[f(a='''it's''')]", [("f", {"a": "it's"})]),
        ("[Get (v2) Data(n=1)]", [("Get (v2) Data", {"n": 1})]),
        ("[unknown tool(n=1)]", [("unknown tool", {"n": 1})]),
        (r"[f(p='C:\data\new')]", [("f", {"p": "C:\\data\new"})]),
    ],
)  # fmt: skip
def test_pythonic_calls_by_hand(text: str, expected: list[tuple[str, dict[str, Any]]]):
    found = pythonic_calls(text, ["f", "Get", "Get (v2) Data"])
    assert [(call.name, dict(call.arguments)) for call in found] == expected


@pytest.mark.parametrize(
    "text",
    ["", "f(a=1)", "[f(a=1)", "[f(a=1) g()]", "[f(a=1)] ok", "[f(1)]", "[f(a=1, a=2)]", "[f(**{'a': 1})]", "[f(a=)]",
     "[f(a=b)]", "[f(a={1})]", "[f(a=b'x')]", "[f(a=1j)]", "[f(a=1e999)]", "[f(a={1: 2})]", "[f(a='\\ud800')]",
     "[f(a=open('x'))]", "[f(a=[x for x in y])]", "[f(a=1 if 2 else 3)]", "[f(a=f'{1}')]", "[(a=1)]", "[f(a=1),, g()]",
     "[f(a=" + "(" * 5000 + ")]", "[f(a=" + "-" * 200_000 + "1)]"],
)  # fmt: skip
def test_what_is_no_call_is_refused(text: str):
    with pytest.raises(ValueError, match=r"\w"):
        pythonic_calls(text, ["f", "g"])


@QUICK
@given(json_values)
def test_values_read_back_from_json_and_from_python(value: Any):
    assert any_value(json.dumps(value)) == value
    assert python_value(repr(value)) == value
    assert json_value(value) == value


# Schemas

WORDS = """str int float bool list dict tuple set Any None List typing.Dict string integer number HashMap ArrayList
    Boolean Literal['a',2]"""
words = st.sampled_from(WORDS.split())
types = st.recursive(
    words,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["List", "list", "Set", "Optional", "typing.Sequence"]), inner).map(
            lambda p: f"{p[0]}[{p[1]}]"
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda p: f"Union[{', '.join(p)}]"),
        st.lists(inner, min_size=1, max_size=3).map(lambda p: f"Tuple[{', '.join(p)}]"),
        st.lists(inner, min_size=2, max_size=3).map(" | ".join),
        inner.map(lambda p: f"Dict[str, {p}]"),
        inner.map(lambda p: f"Tuple[{p}, ...]"),
    ),
    max_leaves=8,
)
specs = st.fixed_dictionaries(
    {"type": st.tuples(types, st.sampled_from(["", ", optional", " (optional)", ", default 3"])).map("".join)},
    optional={"description": st.text(), "default": json_values, "required": st.booleans()},
)


@QUICK
@given(st.dictionaries(st.text(), specs, max_size=4), st.booleans())
def test_flat_parameters_always_give_a_tool(flat: dict[str, Any], required_unless_said: bool):
    schema = flat_parameters(flat, required_unless_said=required_unless_said)
    tool = Tool.from_dict({"name": "t", "parameters": schema})
    assert list(tool.properties) == list(flat)
    for name, spec in flat.items():
        if "required" in spec:
            assert (name in tool.required) is spec["required"]
        elif "default" in spec or "optional" in spec["type"] or not required_unless_said:
            assert name not in tool.required


schemas = st.recursive(
    st.fixed_dictionaries({}, optional={"type": types, "default": json_values, "description": st.text() | st.none()}),
    lambda inner: (
        st.fixed_dictionaries(
            {"type": st.sampled_from(["dict", "object", "HashMap"])},
            optional={
                "properties": st.dictionaries(st.text(), inner, max_size=3),
                "required": st.none(),
                "additionalProperties": inner | st.booleans(),
            },
        )
        | st.fixed_dictionaries(
            {"type": st.sampled_from(["list", "array"]), "items": inner | st.lists(inner, min_size=1)}
        )
        | st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1)})
    ),
    max_leaves=10,
)


@QUICK
@given(st.dictionaries(st.text(), schemas, max_size=4))
def test_loose_schemas_always_give_a_tool(properties: dict[str, Any]):
    schema = json_schema({"type": "dict", "properties": properties, "required": list(properties)[:1]})
    tool = Tool.from_dict({"name": "t", "parameters": schema})
    assert tool.parameters["properties"].keys() == properties.keys()
    assert json_schema(tool.parameters) == tool.parameters


@pytest.mark.parametrize(
    ("text", "schema", "may_be_left_out"),
    [
        ("str", STRING, False),
        ("str, optional", STRING, True),
        ("int, default 3", INTEGER, True),
        ("List[Union[int, float]]", {"type": "array", "items": {"anyOf": [INTEGER, NUMBER]}}, False),
        ("Optional[List[str]]", {"anyOf": [{"type": "array", "items": STRING}, {"type": "null"}]}, True),
        ("Union[str, Optional[int]]", {"anyOf": [STRING, INTEGER, {"type": "null"}]}, True),
        ("dict[str, Any]", {"type": "object"}, False),
        ("Tuple[str, str]", {"type": "array", "items": STRING, "minItems": 2, "maxItems": 2}, False),
        ("Union[int, Any]", {}, False),
        ("Literal['a', 'optional']", {"enum": ["a", "optional"]}, False),
    ],
)  # fmt: skip
def test_python_types_by_hand(text: str, schema: dict[str, Any], may_be_left_out: bool):
    assert python_type(text) == (schema, may_be_left_out)


@pytest.mark.parametrize(
    "text", ["", "datetime", "Callable[[int], int]", "List[", "List[int, str]", "Dict[str]", "a b", "List[x]"]
)
def test_a_type_that_is_not_known_is_told(text: str):
    with pytest.raises(ValueError, match="is not known"):
        python_type(text)


def test_loose_schemas_by_hand():
    loose = {
        "type": "dict",
        "properties": {
            "type": {"type": "float", "required": True, "default": None},
            "pair": {"type": "array", "items": [{"type": "int"}, {"type": "any"}]},
            "either": {"type": ["string", "int"]},
            "properties": {"type": "dict", "properties": {"required": {"type": "bool", "required": False}}},
        },
        "required": ["pair"],
    }
    assert json_schema(loose) == object_of(
        ("pair", "type"),
        type=NUMBER,
        pair={"type": "array", "prefixItems": [INTEGER, {}]},
        either={"anyOf": [STRING, INTEGER]},
        properties=object_of(required=BOOLEAN),
    )


# Junk

JUNK_KEYS = """id query tools answers calls kind system conversations messages from value role content question function
    ground_truth name parameters type properties required arguments tool_calls items"""
JUNK_WORDS = """user assistant system hi [f(a=1)] [] [{}] <tools>[]</tools> dict f [{"name":"f"}]
    <tool_call>{}</tool_call>"""
junk_keys = st.sampled_from(JUNK_KEYS.split())
junk_words = st.sampled_from(["", *JUNK_WORDS.split()])
junk = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | junk_words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(junk_keys, inner, max_size=5),
    max_leaves=25,
)


@st.composite
def damaged(draw: st.DrawFn, layout: str) -> Any:
    """A record of the layout with one part, at any depth, replaced by junk or taken away."""
    record = json.loads(json.dumps(draw(st.sampled_from(as_rows(FILES[layout])))))
    part: Any = record
    while True:
        key = draw(st.sampled_from(sorted(part))) if isinstance(part, dict) else draw(st.integers(0, len(part) - 1))
        child = part[key]
        if isinstance(child, (dict, list)) and child and draw(st.booleans()):
            part = child
            continue
        if draw(st.booleans()):
            part[key] = draw(junk)
        else:
            del part[key]
        return record


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_a_damaged_record_is_an_example_or_a_reason(layout: str, data: st.DataObject):
    record = data.draw(damaged(layout) | st.dictionaries(junk_keys, junk))
    try:
        converted = LAYOUTS[layout](record)
    except ValueError:
        return
    assert Example.from_dict(json.loads(converted.to_json())).problems() == converted.problems()
