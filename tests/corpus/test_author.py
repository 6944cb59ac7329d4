"""The author's questions hold what is wanted and nothing of the evaluation; of its answers nothing is lost."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from needle import config
from needle.corpus import catalogue
from needle.corpus.author import (
    ToolQuestion,
    questions,
    read,
    read_tools,
    requests_prompt,
    requests_schema,
    tool_questions,
    tools_schema,
)
from needle.corpus.plan import AUTHOR_KINDS, LONG_VALUES, Brief, Plan, Pools, Realised
from needle.corpus.split import SplitRule
from needle.schema import EMPTY_KINDS, KINDS, Example, Tool, ToolCall, canonical_json

FOLDER = Path(__file__).resolve().parents[2] / "data" / "teacher_corpus"
RECORDED = catalogue.load(FOLDER)
PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
BOUNDS = {"minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum", "pattern", "format"}


@cache
def composed(group: str) -> Any:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config.build(compose(f"{group}/default")[group])


PLAN: Plan = composed("plan")
INVENTION = PLAN.invention
RULE: SplitRule = composed("data").split
SEEN = {domain: tools for domain, tools in RECORDED.tools.items() if domain not in RULE.unseen_domains}
POOLS = Pools(catalogue=SEEN, invented={})


def tool(name: str, required: tuple[str, ...] = (), description: str = "", **properties: Mapping[str, Any]) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return Tool(name, description or f"Does {name}.", parameters)


KILN = tool("set_kiln", ("temperature_c",), temperature_c={"type": "integer"}, hold_minutes={"type": "integer"})
WHEEL = tool("book_wheel", ("person", "day"), person={"type": "string"}, day={"type": "string"})
HIDDEN = tool("order_clay", description="Order more clay.")


def brief_of(kind: str, **changes: Any) -> Brief:
    shown = () if kind == "no_tools" else (KILN, WHEEL)
    return Brief(
        **{
            "id": "round-0-brief-7",
            "number": 7,
            "count": 3,
            "domain": "pottery_studio",
            "tools": shown,
            "hidden": (HIDDEN,) if shown else (KILN, WHEEL, HIDDEN),
            "focus": "book_wheel" if shown else "",
            "kind": kind,
            "tools_shown": "2-3" if shown else "",
            "near_frac": "1" if shown else "",
            "tool_source": "invented",
            "words": "5-8",
            "persona": "a potter",
            "scenario": "before a course",
            "register": "plain",
            "language": "English",
            **changes,
        }
    )


def item(query: str, *calls: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A request as an author writes it: arguments are JSON text."""
    written = [{"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)} for name, arguments in calls]
    return {"query": query, "calls": written}


def answer(*items: Any) -> str:
    return json.dumps({"requests": items}, ensure_ascii=False)


# --- prompts and schemas


@pytest.mark.parametrize("kind", AUTHOR_KINDS)
def test_a_prompt_says_all_that_the_brief_wants(kind: str):
    brief = brief_of(kind)
    prompt = requests_prompt(PLAN, brief, Realised())
    for wanted in (
        "pottery studio",
        "Write 3 requests",
        "5 to 8 words",
        "English",
        "a potter",
        "before a course",
        "plain",
    ):
        assert wanted in prompt
    assert f"Kind: {kind}. {PLAN.wording.kinds[kind].strip()}" in prompt
    assert "order_clay: Order more clay." in prompt
    assert "used up" not in prompt
    if kind == "no_tools":
        assert "Tools shown: none." in prompt
        assert "set_kiln: Does set_kiln." in prompt
    else:
        assert '"temperature_c":{"type":"integer"}' in prompt
    assert ("About half of the requests call book_wheel" in prompt) == (kind not in EMPTY_KINDS)
    assert ("arguments is a JSON object written as a string" in prompt) == (kind not in EMPTY_KINDS)


def test_a_tool_shown_alone_needs_no_focus():
    prompt = requests_prompt(PLAN, brief_of("single", tools=(KILN,), focus="set_kiln"), Realised())
    assert "About half" not in prompt


def test_openings_that_are_used_up_are_named_up_to_a_bound():
    realised, brief = Realised(), brief_of("single")
    for i in range(40):
        query = f"opening{i} goes on here"
        call = ToolCall("set_kiln", {"temperature_c": 900})
        realised.add(PLAN, brief, [Example(str(i), query, brief.tools, (call,), "single", brief.domain)])
    prompt = requests_prompt(PLAN, brief, realised)
    assert len(re.findall(r'"opening\d+ goes on"', prompt)) == PLAN.openings_max
    assert "here" not in prompt.split("used up: ")[1].splitlines()[0]
    assert "used up" not in requests_prompt(PLAN, replace(brief, domain="elsewhere"), realised)
    assert "used up" not in requests_prompt(replace(PLAN, openings_max=0), brief, realised)


def objects(schema: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(schema, Mapping):
        if schema.get("type") == "object":
            yield schema
        for child in schema.values():
            yield from objects(child)


@pytest.mark.parametrize("schema", [tools_schema(), *(requests_schema(brief_of(kind)) for kind in AUTHOR_KINDS)])
def test_schemas_keep_to_what_constrained_modes_take(schema: dict[str, Any]):
    jsonschema.Draft202012Validator.check_schema(schema)
    found = list(objects(schema))
    assert len(found) >= 2
    for one in found:
        assert one["properties"]
        assert one["required"] == list(one["properties"])
        assert one["additionalProperties"] is False
    assert not BOUNDS & set(re.findall(r'"(\w+)":', json.dumps(schema)))


def test_a_schema_holds_names_to_the_tools_shown():
    validator = jsonschema.Draft202012Validator(requests_schema(brief_of("single")))
    validator.validate(json.loads(answer(item("kiln to 900", ("set_kiln", {"temperature_c": 900})))))
    assert not validator.is_valid(json.loads(answer(item("more clay", ("order_clay", {})))))
    empty = jsonschema.Draft202012Validator(requests_schema(brief_of("near_miss")))
    empty.validate({"requests": [{"query": "sell my old kiln"}]})
    assert not empty.is_valid(json.loads(answer(item("kiln to 900", ("set_kiln", {})))))


def test_the_instructions_own_examples_follow_its_rules():
    text = PLAN.wording.instruction
    written = text[text.index('{"requests"') : text.index("Answer with the JSON")]
    examples, bad = read(written, brief_of("repeat"))
    assert bad == []
    assert [example.kind for example in examples] == ["single", "repeat"]
    for example in examples:
        values = [v for call in example.calls for v in call.arguments.values() if isinstance(v, str)]
        assert all(value in example.query for value in values)
    for name in (*SEEN, *(t.name for tools in RECORDED.tools.values() for t in tools)):
        assert not re.search(rf"\b{re.escape(name)}\(", text)


# --- nothing of the evaluation in a question


@pytest.fixture(scope="module")
def evaluation() -> list[Example]:
    held_out = [example for example in RECORDED.examples if RULE.assign(example) != "train"]
    assert len(held_out) > 1500
    return held_out


def leaks(texts: list[str], held_out: list[Example]) -> set[str]:
    """Held-out requests of four words or more, and their answers, that stand in one of the texts."""
    whole = "\n".join(texts).lower()
    found = {e.query for e in held_out if len(e.query.split()) > 3 and e.query.lower() in whole}
    for example in held_out:
        written = {canonical_json(dict(call.arguments)).lower() for call in example.calls if len(call.arguments) > 1}
        found |= {text for text in written if text in whole}
    return found


def test_questions_hold_no_request_or_answer_of_the_evaluation(evaluation: list[Example]):
    plan = replace(PLAN, requests=1200, rounds=1)
    asked = questions(plan, round=0, realised=Realised(), pools=POOLS)
    texts = [PLAN.wording.instruction, PLAN.wording.tools_instruction, *(question.prompt for question in asked)]
    assert not leaks(texts, evaluation)
    assert not {question.brief.domain for question in asked} & set(RULE.unseen_domains)
    assert leaks([*texts, f"such as {evaluation[0].query}"], evaluation[:1])  # the check can fail


def test_even_what_was_accepted_stands_in_no_question_as_a_whole(evaluation: list[Example]):
    """The worst case: an author that wrote the very requests of the evaluation."""
    realised = Realised()
    at_home = [example for example in evaluation if example.domain in SEEN]
    for example in at_home:
        realised.add(PLAN, brief_of(example.kind, domain=example.domain, count=1), [example])
    asked = questions(replace(PLAN, rounds=1), round=0, realised=realised, pools=POOLS)
    texts = [question.prompt for question in asked]
    assert sum("used up" in text for text in texts) > len(texts) / 2
    assert not leaks(texts, at_home)


# --- answers


def test_a_sound_answer_is_read_whole():
    text = answer(
        item(" kiln to 900 please ", ("set_kiln", {"temperature_c": 900})),
        item(
            "wheels for Ana and Bo on Monday", *(("book_wheel", {"person": p, "day": "Monday"}) for p in ("Ana", "Bo"))
        ),
        item(
            "wheel for Ana today and kiln to 5",
            ("book_wheel", {"person": "Ana", "day": "today"}),
            ("set_kiln", {"temperature_c": 5}),
        ),
    )
    examples, bad = read(text, brief_of("multi"))
    assert bad == []
    # Calls decide between single, multi and repeat.
    assert [example.kind for example in examples] == ["single", "repeat", "multi"]
    assert examples[0].query == "kiln to 900 please"
    for example in examples:
        assert (example.domain, example.source, example.tools) == ("pottery_studio", "authored", (KILN, WHEEL))
    assert all(example.problems() == [] for example in examples)


@PROPERTY
@given(st.sampled_from(list(RECORDED.tools)), st.data())
def test_recorded_requests_come_back_as_they_were(domain: str, data: st.DataObject):
    """What an author would have written for the recorded examples gives their calls and their very ids."""
    of_domain = [example for example in RECORDED.examples if example.domain == domain]
    chosen = data.draw(st.lists(st.sampled_from(of_domain), min_size=1, max_size=8, unique_by=lambda e: e.id))
    empty = chosen[0].kind in EMPTY_KINDS
    chosen = [example for example in chosen if (example.kind in EMPTY_KINDS) == empty]
    brief = brief_of(chosen[0].kind, domain=domain, tools=RECORDED.tools[domain], hidden=())
    items = [item(e.query, *((call.name, call.arguments) for call in e.calls)) for e in chosen]
    written = [{"query": one["query"]} if empty else one for one in items]
    jsonschema.validate({"requests": written}, requests_schema(brief))
    examples, bad = read(answer(*written), brief)
    assert bad == []
    assert [(e.id, e.query, e.calls) for e in examples] == [(e.id, e.query, e.calls) for e in chosen]


GOOD = item("kiln to 900 please", ("set_kiln", {"temperature_c": 900}))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("kiln to 900", "a request must be an object, not str"),
        (None, "not NoneType"),
        ({"calls": []}, "query is missing"),
        ({"query": " \n", "calls": []}, "query is missing or empty"),
        ({"query": 7, "calls": []}, "query is missing"),
        ({"query": "kiln up"}, "calls must be a list"),
        ({"query": "kiln up", "calls": {"name": "set_kiln"}}, "calls must be a list"),
        (item("kiln up"), "kind single has no call"),
        ({"query": "kiln up", "calls": ["set_kiln"]}, "a call must be an object with a name"),
        ({"query": "kiln up", "calls": [{"arguments": "{}"}]}, "a call must be an object with a name"),
        (
            {"query": "kiln up", "calls": [{"name": "set_kiln", "arguments": '{"temp'}]},
            "'set_kiln': arguments are not JSON",
        ),
        ({"query": "kiln up", "calls": [{"name": "set_kiln", "arguments": ""}]}, "arguments are not JSON"),
        ({"query": "kiln up", "calls": [{"name": "set_kiln", "arguments": "[900]"}]}, "must be an object, not list"),
        ({"query": "kiln up", "calls": [{"name": "set_kiln", "arguments": '{"temperature_c": NaN}'}]}, "NaN"),
        ({"query": "kiln up", "calls": [{"name": "set_kiln", "arguments": '{"temperature_c": 1e999}'}]}, "too large"),
        ({"query": "kiln up", "calls": [{"name": "set_kiln", "arguments": "[" * 9999}]}, "nested too deep"),
        (item("more clay", ("order_clay", {})), "unknown tool 'order_clay'"),
        (item("kiln up", ("set_kiln", {})), "'temperature_c' is a required property"),
        (item("kiln up", ("set_kiln", {"temperature_c": "900"})), "not of type 'integer'"),
        (item("kiln up", ("set_kiln", {"temperature_c": 900, "fast": True})), "'fast' was unexpected"),
        (GOOD, "repeats an earlier request"),
    ],
)
def test_a_broken_item_is_kept_with_its_reason_and_the_others_are_read(broken: Any, reason: str):
    other = item("kiln to 1000", ("set_kiln", {"temperature_c": 1000}))
    examples, bad = read(answer(GOOD, broken, other), brief_of("single"))
    assert [example.query for example in examples] == ["kiln to 900 please", "kiln to 1000"]
    (line,) = bad
    assert reason in line.reason
    assert (line.path, line.line_number) == ("round-0-brief-7", 2)
    assert json.loads(line.text) == broken


@pytest.mark.parametrize("kind", sorted(EMPTY_KINDS))
def test_requests_without_calls(kind: str):
    text = answer({"query": "sell my old kiln"}, {"query": "what is clay made of", "calls": []})
    examples, bad = read(text, brief_of(kind))
    assert bad == []
    assert [(example.kind, example.calls) for example in examples] == [(kind, ())] * 2
    called = answer(item("kiln up", ("set_kiln", {"temperature_c": 900})))
    assert "must have no call" in read(called, brief_of(kind))[1][0].reason


@pytest.mark.parametrize("kind", [k for k in AUTHOR_KINDS if k not in EMPTY_KINDS])
def test_the_kind_is_one_of_the_schemas(kind: str):
    (example,), bad = read(answer(GOOD), brief_of(kind))
    assert bad == []
    assert example.kind in KINDS
    assert example.kind == ("single" if kind in ("single", "multi", "repeat", LONG_VALUES) else kind)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("I am sorry, I cannot help with that.", "not JSON"),
        ("[]", "no list 'requests'"),
        ('{"requests": {"query": "a"}}', "no list 'requests'"),
        ("null", "no list 'requests'"),
        ('{"req', "not JSON"),
        ("[" * 100_000, "not JSON: nested too deep"),
    ],
)
def test_an_answer_without_items_is_kept_whole(text: str, reason: str):
    examples, (line,) = read(text, brief_of("single"))
    assert examples == []
    assert reason in line.reason
    assert line.text == text


def test_an_item_that_json_forbids_spoils_no_other():
    spoilt = '{"query": "half \\ud800", "calls": []}', '{"query": NaN, "calls": []}'
    other = json.dumps(item("kiln to 1000", ("set_kiln", {"temperature_c": 1000})))
    text = f'{{"requests": [{json.dumps(GOOD)}, {spoilt[0]}, {spoilt[1]}, {other}]}}'
    examples, bad = read(text, brief_of("single"))
    assert [example.query for example in examples] == ["kiln to 900 please", "kiln to 1000"]
    assert [(line.line_number, line.text) for line in bad] == [(2, spoilt[0]), (3, spoilt[1])]
    assert "surrogate" in bad[0].reason
    assert "NaN" in bad[1].reason


def test_a_fence_around_an_answer_is_no_loss():
    examples, bad = read(f"```json\n{answer(GOOD)}\n```", brief_of("single"))
    assert len(examples) == 1
    assert bad == []
    assert read(answer(GOOD) + " Glad to help!", brief_of("single"))[1][0].text == "]} Glad to help!"


WRITTEN = answer(
    GOOD,
    item('wheel for Zoë "Z" O\'Hara, Monday [9am]', ("book_wheel", {"person": 'Zoë "Z" O\'Hara', "day": "Monday"})),
    {"query": "broken {one}", "calls": "none"},
    item("kiln, 1000 degrees", ("set_kiln", {"temperature_c": 1000})),
)


@given(st.integers(0, len(WRITTEN)), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_of_an_answer_cut_anywhere_whole_items_are_read_and_the_rest_is_kept(cut: int, indented: bool):
    text = json.dumps(json.loads(WRITTEN), indent=1, ensure_ascii=False)[:cut] if indented else WRITTEN[:cut]
    examples, bad = read(text, brief_of("single"))
    whole, _ = read(WRITTEN, brief_of("single"))
    assert examples == whole[: len(examples)]
    kept = "".join(line.text for line in bad)
    ends = [match.end() for match in re.finditer(r'"calls": ("none"|\[[^\]]*\])\s*\}', text.replace("[9am]", "(9am)"))]
    assert len(examples) == len(ends) - (len(ends) >= 3)  # the third one is broken
    tail = text[ends[-1] :].strip(" \n,") if ends else text
    if tail not in ("]}", "]\n}"):
        assert tail.removeprefix('{"requests": [').removeprefix('{\n "requests": [').strip() in kept
        assert any("cut off" in line.reason or "not JSON" in line.reason for line in bad)


@given(
    st.lists(st.recursive(st.none() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_item_of_any_answer_ends_somewhere(items: list[Any]):
    examples, bad = read(json.dumps({"requests": items}), brief_of("single"))
    assert len(examples) + len(bad) == len(items)
    assert [json.loads(line.text) for line in bad] == items


@PROPERTY
@given(st.text())
def test_no_text_raises(text: str):
    examples, bad = read(text, brief_of("single"))
    assert examples == []
    assert bad[0].text == text


@pytest.mark.parametrize(
    ("language", "query", "person", "day"),
    [
        ("Japanese", "月曜日に田中さんのろくろを予約して", "田中", "月曜日"),
        ("Arabic", "احجز عجلة لليلى يوم الاثنين", "ليلى", "الاثنين"),
        ("Hindi", "सोमवार को आशा के लिए चाक बुक करो", "आशा", "सोमवार"),
        ("Russian", "забронируй круг для Юрия на понедельник", "Юрия", "понедельник"),
    ],
)
def test_languages_beyond_latin_letters(language: str, query: str, person: str, day: str):
    brief = brief_of("single", language=language)
    prompt = requests_prompt(PLAN, brief, Realised())
    assert f"Language: {language}." in prompt
    for ensure_ascii in (True, False):
        text = json.dumps(
            {"requests": [item(query, ("book_wheel", {"person": person, "day": day}))]}, ensure_ascii=ensure_ascii
        )
        (example,), bad = read(text, brief)
        assert bad == []
        assert example.query == query
        assert example.calls[0].arguments == {"person": person, "day": day}
        assert Example.from_dict(json.loads(example.to_json())) == example
    realised = Realised()
    realised.add(PLAN, brief, [example])
    assert realised.accepted["language"] == {language: 1}
    assert Realised.from_dict(json.loads(json.dumps(realised.to_dict()))) == realised


# --- a whole round


def test_a_round_is_asked_read_and_counted():
    plan = replace(PLAN, requests=400, rounds=2)
    realised, every = Realised(), []
    for round in range(plan.rounds):
        asked = questions(plan, round=round, realised=realised, pools=POOLS)
        assert asked == questions(plan, round=round, realised=realised, pools=POOLS)
        for question in asked:
            text = recorded_author(question.brief)
            jsonschema.validate(json.loads(text), question.schema)
            examples, bad = read(text, question.brief)
            assert len(examples) + len(bad) == len(json.loads(text)["requests"])
            realised.add(plan, question.brief, examples)
            every.append((question, examples))
    samples = [question.sample for question, _ in every]
    assert len(set(samples)) == len(samples)
    assert realised.requests == sum(len(examples) for _, examples in every) > 200
    assert realised.asked_requests == sum(question.brief.count for question, _ in every)
    kinds = Counter(example.kind for _, examples in every for example in examples)
    assert set(kinds) >= {"single", "multi", "none", "near_miss", "implicit"}


BY_KIND: dict[tuple[str, str], list[Example]] = {}
for one in RECORDED.examples:
    BY_KIND.setdefault((one.domain, one.kind), []).append(one)


def recorded_author(brief: Brief) -> str:
    """An author that answers with recorded requests of the domain which the shown tools can serve."""
    names = {shown.name for shown in brief.tools}
    known = BY_KIND.get((brief.domain, "single" if brief.kind == LONG_VALUES else brief.kind), [])
    fit = [example for example in known if {call.name for call in example.calls} <= names][: brief.count]
    if brief.is_empty:
        return answer(*({"query": example.query} for example in fit))
    return answer(*(item(e.query, *((call.name, call.arguments) for call in e.calls)) for e in fit))


# --- invented tools


def bee_tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    parameters = json.dumps({"type": "object", "properties": properties, "required": list(properties)[:1]})
    return {"name": name, "description": description, "parameters": parameters}


HIVE = {"type": "string", "description": "Which hive."}
BEES = [
    bee_tool(
        "inspect_hive", "Record what was seen at an inspection of a hive.", hive=HIVE, queen_seen={"type": "boolean"}
    ),
    bee_tool("feed_syrup", "Note that bees were fed sugar syrup.", hive=HIVE, litres={"type": "number"}),
    bee_tool("mark_queen", "Note the colour that a queen bee was marked with.", hive=HIVE, colour={"type": "string"}),
    bee_tool("add_super", "Put another honey super on a hive.", hive=HIVE),
    bee_tool("extract_honey", "Record an extraction of honey.", kilograms={"type": "number"}),
    bee_tool(
        "treat_varroa",
        "Record a treatment against varroa mites.",
        hive=HIVE,
        agent={"enum": ["oxalic", "formic"], "type": "string"},
    ),
    bee_tool("list_swarms", "List the swarms caught.", places={"type": "array", "items": {"type": "string"}}),
    bee_tool("weigh_hive", "Record a hive's weight in kilograms.", hive=HIVE, kilograms={"type": "number"}),
    bee_tool("split_colony", "Make a new colony out of one.", hive=HIVE),
]
QUESTION = ToolQuestion("keeping bees", "", tools_schema(), 0)


def tools_answer(*tools: Any, domain: Any = "Bee keeping") -> str:
    return json.dumps({"domain": domain, "tools": tools})


def test_tool_questions_are_asked_for_each_area():
    asked = tool_questions(PLAN, taken=list(RECORDED.tools), sample=3)
    assert [question.area for question in asked] == list(INVENTION.areas)
    for question in asked:
        assert f"Area: {question.area}" in question.prompt
        assert "8 to 15 tools" in question.prompt
        assert "astronomy_space" in question.prompt
        assert question.sample == 3
    assert len({question.prompt for question in asked}) == len(asked)


def test_an_invented_domain_is_read():
    text = tools_answer(*BEES)
    jsonschema.validate(json.loads(text), tools_schema())
    domain, bad = read_tools(text, QUESTION, invention=INVENTION, taken=RECORDED.tools)
    assert bad == []
    assert domain.name == "bee_keeping"
    assert [t.name for t in domain.tools] == [record["name"] for record in BEES]
    assert domain.tools[1].properties["litres"] == {"type": "number"}
    assert domain.tools[0].required == ["hive"]
    pools = Pools(catalogue=SEEN, invented={domain.name: domain.tools})
    asked = questions(replace(PLAN, requests=400, rounds=1), round=0, realised=Realised(), pools=pools)
    share = sum(question.brief.tool_source == "invented" for question in asked) / len(asked)
    assert share == pytest.approx(PLAN.tool_source["invented"], abs=0.5 / len(asked) + 1e-9)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("a tool", "a tool must be an object, not str"),
        ({**BEES[0], "name": "in spect"}, "a name has Latin letters"),
        ({**BEES[0], "name": "überprüfen"}, "a name has Latin letters"),
        ({**BEES[0], "name": ""}, "non-empty name"),
        ({**BEES[0], "name": "feed_syrup"}, "two tools are named 'feed_syrup'"),
        ({**BEES[0], "name": "look", "description": " "}, "no description"),
        ({**BEES[0], "name": "look", "parameters": "{"}, "parameters are not JSON"),
        ({**BEES[0], "name": "look", "parameters": '{"type": "string"}'}, "type object"),
        ({**BEES[0], "name": "look", "parameters": '{"properties": {"a": {"type": "txt"}}}'}, "not a JSON Schema"),
        ({**BEES[0], "name": "look", "parameters": '{"properties": {"a": {"type": "object"}}}'}, "'a' is neither"),
        ({**BEES[0], "name": "look", "parameters": '{"properties": {"a": {"type": "array"}}}'}, "'a' is neither"),
        ({**BEES[0], "name": "look", "parameters": '{"properties": {}, "required": ["b"]}'}, "'b' is not among"),
    ],
)
def test_a_broken_tool_is_kept_with_its_reason(broken: Any, reason: str):
    text = tools_answer(*BEES[1:], broken)
    domain, (line,) = read_tools(text, QUESTION, invention=INVENTION, taken=RECORDED.tools)
    assert [t.name for t in domain.tools] == [record["name"] for record in BEES[1:]]
    assert reason in line.reason
    assert (line.path, line.line_number) == ("tools-keeping-bees", len(BEES))
    assert json.loads(line.text) == broken


def test_a_tool_that_another_domain_has_is_refused():
    copied = RECORDED.tools["timers_alarms"][0]
    record = {"name": copied.name, "description": copied.description, "parameters": canonical_json(copied.parameters)}
    domain, (line,) = read_tools(tools_answer(*BEES, record), QUESTION, invention=INVENTION, taken=RECORDED.tools)
    assert len(domain.tools) == len(BEES)
    assert f"does what timers_alarms/{copied.name} does" in line.reason
    again, bad = read_tools(
        tools_answer(*BEES, domain="apiary"),
        QUESTION,
        invention=INVENTION,
        taken={**RECORDED.tools, "bee_keeping": domain.tools},
    )
    assert again is None
    assert len(bad) == len(BEES) + 1
    assert "0 usable tools, fewer than tools_min=8" in bad[0].reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (tools_answer(*BEES[:5]), "5 usable tools, fewer than tools_min=8"),
        (tools_answer(*BEES, domain="calendar"), "there is a domain 'calendar' already"),
        (tools_answer(*BEES, domain="養蜂"), "makes no name"),
        (tools_answer(*BEES, domain=None), "makes no name"),
        ("no", "not JSON"),
        ("[]", "no list 'tools'"),
        (tools_answer(*BEES)[:900], "fewer than tools_min=8"),
    ],
)
def test_a_domain_that_cannot_be_used_is_kept_whole(text: str, reason: str):
    domain, bad = read_tools(text, QUESTION, invention=INVENTION, taken=RECORDED.tools)
    assert domain is None
    assert reason in bad[0].reason
    assert (bad[0].line_number, bad[0].text) == (0, text)


def test_an_answer_that_was_cut_off_late_still_gives_a_domain():
    text = tools_answer(*BEES)[:-40]
    domain, (line,) = read_tools(text, QUESTION, invention=INVENTION, taken=RECORDED.tools)
    assert (domain.name, len(domain.tools)) == ("bee_keeping", len(BEES) - 1)
    assert "cut off" in line.reason
    assert line.text.startswith('{"name": "split_colony"')


def test_more_tools_than_asked_for_are_refused():
    few = replace(INVENTION, tools_min=2, tools_max=3)
    domain, bad = read_tools(tools_answer(*BEES), QUESTION, invention=few, taken=RECORDED.tools)
    assert len(domain.tools) == 3
    assert [line.reason for line in bad] == ["more than tools_max=3 tools"] * (len(BEES) - 3)
