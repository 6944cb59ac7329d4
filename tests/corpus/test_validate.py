"""Each check fails what it is for and nothing else, is counted, and can be switched; sifting is stable in order."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from needle import config
from needle.corpus import catalogue
from needle.corpus.validate import CHECKS, CORPUS, FORM, Validation, agreement_frac
from needle.schema import Example, Tool, ToolCall

RECORDED = catalogue.load(Path(__file__).resolve().parents[2] / "data" / "teacher_corpus")
SLICE = RECORDED.examples[::40]


def validation(name: str, *overrides: str) -> Validation:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config.build(compose(f"validation/{name}", [f"validation.{o}" for o in overrides]).validation)


DEFAULT, STRICT = validation("default"), validation("strict")


def tool(name: str, **properties: dict[str, Any]) -> Tool:
    return Tool.from_dict({"name": name, "parameters": {"type": "object", "properties": properties}})


TIMER = tool("set_timer", minutes={"type": "integer"}, label={"type": "string"})
MODE = tool("setMode", mode={"enum": ["none", "eco"]}, note={"type": "string", "default": ""})
PLAIN = tool("stop")
GOOD = Example(
    id="good",
    query="set a timer for ten minutes for the rice",
    tools=(TIMER, MODE, PLAIN),
    calls=(ToolCall("set_timer", {"minutes": 10, "label": "rice"}),),
    kind="single",
)


def calling(*calls: tuple[str, dict[str, Any]], **changes: Any) -> Example:
    return GOOD.replace(calls=tuple(ToolCall(name, arguments) for name, arguments in calls), **changes)


def failed(example: Example, settings: Validation = DEFAULT, **judged: Any) -> list[str]:
    return [failure.check for failure in settings.check(example, **judged)]


# The files


def test_the_files_say_what_their_comments_say():
    switches = {field.name for field in fields(Validation)} & set(CHECKS)
    assert switches == set(CHECKS)
    assert {check for check in CHECKS if DEFAULT.action(check) == "quarantine"} == set(FORM)
    assert all(DEFAULT.action(check) in ("count", "quarantine") for check in CHECKS)
    assert all(STRICT.action(check) == "quarantine" for check in CHECKS)
    unchanged = {field.name for field in fields(Validation)} - set(CHECKS)
    assert all(getattr(STRICT, name) == getattr(DEFAULT, name) for name in unchanged)


def test_limits_that_exclude_each_other_are_told():
    with pytest.raises(config.ConfigError, match="query_words_min=9 is above query_words_max=3"):
        validation("default", "query_words_min=9", "query_words_max=3")


# Single checks


def test_a_good_example_fails_nothing():
    assert failed(GOOD) == []
    assert failed(calling(query="what a day", kind="none")) == []
    assert failed(calling(("setMode", {"mode": "none", "note": ""}), query="no special mode please")) == []
    assert failed(calling(("set_timer", {"label": "test"}), query="set a timer called test")) == []
    assert failed(calling(("stop", {}), query="stop")) == []  # a tool's name that is a word of everyday


@pytest.mark.parametrize(
    ("check", "example"),
    [
        ("query_length", GOOD.replace(query="very " * 150 + GOOD.query)),
        ("query_natural", GOOD.replace(query='{"timer": "ten minutes", "label": "rice"}')),
        ("query_natural", calling(("stop", {}), query="stop(now)")),
        ("query_natural", GOOD.replace(query="set a timer for ten minutes for the rice in {city}")),
        ("query_natural", GOOD.replace(query="set a timer for ten minutes for the rice at <place name>")),
        ("query_natural", GOOD.replace(query="User: set a timer for ten minutes for the rice")),
        ("query_natural", GOOD.replace(query="set a timer for ten minutes for the rice\ufffd")),
        ("query_natural", calling(query="?!", kind="none")),
        ("query_tool_name", GOOD.replace(query="use set_timer for ten minutes for the rice")),
        ("tools_sound", GOOD.replace(tools=(*GOOD.tools, TIMER))),
        ("tools_sound", GOOD.replace(tools=(*GOOD.tools, Tool("odd", "", {"type": "object", "properties": 3})))),
        ("tool_known", calling(("fly", {}))),
        ("arguments_valid", calling(("set_timer", {"minutes": "ten"}))),
        ("arguments_valid", calling(("set_timer", {"minutes": 10, "colour": "rice"}))),
        ("kind_agrees", GOOD.replace(kind="multi")),
        ("kind_agrees", GOOD.replace(kind="repeat")),
        ("kind_agrees", GOOD.replace(kind="none")),
        ("kind_agrees", calling(kind="implicit")),
        ("kind_agrees", calling(kind="no_tools")),
        ("kind_agrees", calling(("stop", {}), ("set_timer", {"minutes": 10}))),
        ("repeated_call", calling(("set_timer", {"minutes": 10}), ("set_timer", {"minutes": 10.0}), kind="repeat")),
        ("grounded_number", calling(("set_timer", {"minutes": 12}))),
        ("grounded_text", calling(("set_timer", {"minutes": 10, "label": "pasta"}))),
    ],
)
def test_each_check_fails_what_it_is_for_and_nothing_else(check: str, example: Example):
    (failure,) = [one for one in DEFAULT.check(example) if one.check in (*FORM, check)]
    assert failure.check == check
    assert failure.reason
    assert check not in failed(example, replace(DEFAULT, **{check: "off"}))


@pytest.mark.parametrize(
    "filler", ["", "  ", "string", "N/A", "<city>", "{{label}}", "your_label_here", "a@example.com"]
)
def test_placeholders_are_no_values(filler: str):
    found = failed(calling(("set_timer", {"minutes": 10, "label": filler})))
    assert found[0] == "placeholder_value"
    if filler.strip():
        said = calling(("set_timer", {"minutes": 10, "label": filler}), query=f"ten minutes, call it {filler}")
        assert "placeholder_value" not in failed(said)


# Agreement


def samples(*answers: Sequence[tuple[str, dict[str, Any]]]) -> list[list[ToolCall]]:
    return [[ToolCall(name, arguments) for name, arguments in answer] for answer in answers]


def test_agreement_is_the_share_of_equal_answers():
    both = calling(("set_timer", {"minutes": 10, "label": "rice"}), ("setMode", {"mode": "eco"}), kind="multi")
    timer, mode = ("set_timer", {"minutes": 10.0, "label": "Rice."}), ("setMode", {"mode": "eco"})
    judged = samples(
        [timer, mode],
        [mode, timer],  # in another order
        [timer, ("setMode", {"mode": "eco", "note": ""})],  # says the default
        [timer],
        [timer, mode, mode],
        [("set_timer", {"minutes": 11, "label": "rice"}), mode],
        [],
    )
    assert agreement_frac(both, judged) == 3 / 7
    assert failed(both, judged=judged) == ["agreement"]
    assert failed(both, replace(DEFAULT, agreement_min_frac=3 / 7), judged=judged) == []
    assert agreement_frac(calling(kind="none"), samples([], [timer])) == 0.5


def test_agreement_can_weigh_instead_of_judge():
    agreed, doubted, unasked = (GOOD.replace(id=name, query=f"{name} {GOOD.query}") for name in "abc")
    right = [("set_timer", {"minutes": 10, "label": "rice"})]
    judged = {"a": samples(right), "b": samples(right, [], [], []), "z": samples([])}

    def sifted(action: str):
        return replace(DEFAULT, agreement=action).sift([agreed, doubted, unasked], judged=judged, evaluation={})

    assert sifted("weight").weights == [1.0, 0.25, 1.0]
    assert sifted("count").weights == [1.0, 1.0, 1.0]
    assert [example.id for example in sifted("quarantine").kept] == ["a", "c"]
    assert sifted("weight").counts["agreement"] == {"passed": 1, "failed": 1, "not_applicable": 1}
    assert "agreement" not in sifted("off").counts


# Sifting


def test_a_check_counts_quarantines_or_is_off():
    wrong = calling(("set_timer", {"minutes": 12}), id="wrong")
    for action, kept, counted in (("quarantine", 1, 1), ("count", 2, 1), ("off", 2, None)):
        sifted = replace(DEFAULT, grounded_number=action).sift([GOOD, wrong], evaluation={})
        assert len(sifted.kept) == kept
        assert sifted.counts.get("grounded_number", {}).get("failed") == counted
    ((example, failures),) = STRICT.sift([GOOD, wrong], evaluation={}).quarantined
    assert example is wrong
    assert "grounded_number" in [failure.check for failure in failures]


def test_of_two_duplicates_the_first_good_one_stays():
    broken = GOOD.replace(id="broken", kind="multi")
    again = GOOD.replace(id="again", query=GOOD.query.upper())
    sifted = STRICT.sift([broken, GOOD, again], evaluation={})
    assert [example.id for example in sifted.kept] == ["good"]
    assert [failure.check for failure in sifted.verdicts[1].failures] == []
    (failure,) = sifted.verdicts[2].failures
    assert failure.check == "near_duplicate"
    assert "good" in failure.reason


def test_contamination_names_the_set_and_what_is_shared():
    evaluation = {
        "test": ["Set a timer for 20 minutes for the rice!"],
        "given": ["now kindly set a timer for ten minutes for the rice and the beans"],
        "clean": ["what a day"],
    }
    sifted = STRICT.sift([GOOD], evaluation=evaluation)
    reasons = {failure.check: failure.reason for failure in sifted.verdicts[0].failures}
    assert reasons["contaminated_whole"].startswith("test has")
    assert "set a timer for # minutes for the" in reasons["contaminated_ngram"]
    assert sifted.contaminated["test"]["contaminated_whole"] == 1
    assert sifted.contaminated["given"] == {"contaminated_whole": 0, "contaminated_ngram": 1, "contaminated_near": 0}
    assert set(sifted.contaminated["clean"].values()) == {0}
    assert sifted.kept == []
    unasked = DEFAULT.sift([GOOD], evaluation={})
    assert all(unasked.counts[check]["not_applicable"] == 1 for check in CORPUS[1:])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(SLICE) - 1), min_size=2, max_size=30), st.data())
def test_verdicts_never_depend_on_later_examples(chosen: list[int], data: st.DataObject):
    examples = [SLICE[i] for i in chosen]
    cut = data.draw(st.integers(1, len(examples)))
    evaluation = {"test": [SLICE[0].query, SLICE[1].query]}
    whole, part = (STRICT.sift(some, evaluation=evaluation) for some in (examples, examples[:cut]))
    assert whole.verdicts[:cut] == part.verdicts
    assert STRICT.sift(examples, evaluation=evaluation) == whole
    assert len(whole.kept) <= len({example.id for example in examples})  # the same example is kept once


def test_every_example_has_one_outcome_of_every_check():
    sifted = STRICT.sift(SLICE, evaluation={"test": [example.query for example in SLICE[::9]]})
    assert set(sifted.counts) == set(CHECKS)
    for check, tally in sifted.counts.items():
        assert sum(tally.values()) == len(SLICE), check
        failures = sum(failure.check == check for verdict in sifted.verdicts for failure in verdict.failures)
        assert tally["failed"] == failures, check
    assert len(sifted.kept) + len(sifted.quarantined) == len(SLICE)
    assert all(bool(verdict.failures) != verdict.kept for verdict in sifted.verdicts)
    assert sifted.counts["contaminated_whole"]["failed"] >= len(SLICE[::9])


def test_the_recorded_corpus_passes():
    sifted = DEFAULT.sift(RECORDED.examples[::3], evaluation={})
    assert sifted.quarantined == []
    assert all(sifted.counts[check]["failed"] == 0 for check in FORM)
    assert sifted.counts["near_duplicate"]["failed"] < 0.02 * len(sifted.verdicts)
