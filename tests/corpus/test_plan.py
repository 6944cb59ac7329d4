"""The plan: shares are checked, quotas are exact, briefs repeat, and steering brings what an author gets accepted close
to what was planned."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colors, image
from omegaconf import OmegaConf

from needle import config
from needle.corpus import catalogue
from needle.corpus.mix import generator
from needle.corpus.plan import (
    AXES,
    BELIEVED,
    COUNTED_KINDS,
    LONG_VALUES,
    Brief,
    Plan,
    Pools,
    Realised,
    apportion,
    band_of,
    count_words,
    show_near,
    tools_floor,
)
from needle.corpus.plan_figures import REALISED_COLOUR, draw
from needle.errors import ConfigError, DataError
from needle.schema import EMPTY_KINDS, KINDS, Example, Tool, ToolCall

FOLDER = Path(__file__).resolve().parents[2] / "data" / "teacher_corpus"
TOOLS = {
    path.name.removesuffix(".tools.json"): tuple(map(Tool.from_dict, json.loads(path.read_text("utf-8"))))
    for path in sorted(FOLDER.glob("*.tools.json"))
}
NAMES = list(TOOLS)
POOLS = Pools(
    catalogue={name: TOOLS[name] for name in NAMES[:20]},
    # Stand-ins for lists that an author invents: what counts here is that they are another source.
    invented={name: TOOLS[name] for name in NAMES[20:28]},
)
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def node(option: str = "default", *overrides: str) -> Any:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose(f"plan/{option}", list(overrides)).plan


PLAN: Plan = config.build(node())


def plan_of(**changes: Any) -> Plan:
    return replace(PLAN, **changes)


# --- settings


@pytest.mark.parametrize("option", ["default", "small"])
def test_the_shipped_plans_bind_and_build(option: str):
    def stage(*, plan: Plan) -> None: ...

    config.check(OmegaConf.create({"plan": node(option)}), stage)
    assert isinstance(config.build(node(option)), Plan)


def test_the_small_plan_is_the_default_one_on_a_small_scale():
    small: Plan = config.build(node("small"))
    assert small.kind == PLAN.kind
    assert small.requests < 100 < PLAN.requests
    assert len(small.invention.areas) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": {"English": 0.7, "Welsh": 0.2}}, "shares of language sum to 0.9;.*1e-06"),
        ({"language": {"English": 1.00001}}, r"language\.English=1\.00001 is not a share"),
        ({"language": {"English": 1.2, "Welsh": -0.2}}, "is not a share"),
        ({"language": {"English": float("nan"), "Welsh": 1.0}}, "nan is not a share"),
        ({"language": {"English": True}}, "True is not a share"),
        ({"language": {}}, "language is empty"),
        ({"language": {"unknown": 1.0}}, "cannot be planned"),
        ({"kind": {"single": 0.5, "singel": 0.5}}, "kind 'singel' is unknown; there are single, multi"),
        ({"tool_source": {"catalog": 1.0}}, "tool_source 'catalog' is unknown; there are catalogue, invented"),
        ({"words": {"1-8": 0.5, "8-20": 0.5}}, "words: bands 1-8 and 8-20 overlap"),
        ({"words": {"20-9": 1.0}}, "words: '20-9' is not a band"),
        ({"words": {"0-9": 1.0}}, "words: '0-9' is not a band"),
        ({"tools_shown": {3: 1.0}}, 'tools_shown: 3 is not text; put it in quotes, "3"'),
        ({"near_frac": {"half": 1.0}}, "near_frac: 'half' is not a fraction"),
        ({"near_frac": {"nan": 1.0}}, "near_frac: 'nan' is not a fraction"),
        ({"tools_shown": {"1": 0.9, "2-5": 0.1}}, "tools_shown: multi need 2 or more, 0.163 .* only 0.1 of them"),
        ({"words": {"1-4": 0.6, "5-30": 0.4}}, "words: multi, repeat, long_values, implicit, disfluent need 5"),
        ({"wording": replace(PLAN.wording, kinds={"single": "One call."})}, "does not say what 'multi' means"),
        ({"invention": replace(PLAN.invention, areas=())}, "areas is empty"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan_of(**changes)


def test_shares_may_be_off_by_rounding():
    assert plan_of(language={"English": 0.5, "Welsh": 0.5 - 9e-7}).language["Welsh"] < 0.5


def test_a_wrong_share_in_yaml_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"kind sum to 1\.24"):
        config.build(node("default", "plan.kind.single=0.5"))


def test_an_area_is_named_once_and_tool_limits_are_in_order():
    with pytest.raises(ValueError, match="'a' twice"):
        replace(PLAN.invention, areas=("a", "b", "a"))
    with pytest.raises(ValueError, match="tools_min=20 is more than tools_max=15"):
        replace(PLAN.invention, tools_min=20)


def test_pools_name_what_is_wrong_with_them():
    some = {"a": TOOLS[NAMES[0]]}
    with pytest.raises(DataError, match="'a' is in the catalogue and among the invented"):
        Pools(catalogue=some, invented=some)
    with pytest.raises(DataError, match="'b' has no tool"):
        Pools(catalogue=some, invented={"b": ()})
    with pytest.raises(DataError, match="no domain"):
        Pools(catalogue={}, invented={})


# --- quotas


@PROPERTY
@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 1e6), min_size=1, max_size=8),
    st.integers(0, 500),
)
def test_apportioned_seats_are_all_given_and_within_one_of_the_exact_quota(wanted: dict[str, float], seats: int):
    counts = apportion(wanted, seats)
    assert sum(counts.values()) == seats
    total = sum(wanted.values())
    for value, amount in wanted.items():
        exact = seats * (amount / total if total else 1 / len(wanted))
        assert abs(counts[value] - exact) < 1 + 1e-6


def test_the_largest_remainders_get_the_seats_that_are_left():
    # Exact quotas 4.7, 3.1, 2.2: floors leave one seat, which goes to .7.
    assert apportion({"a": 47, "b": 31, "c": 22}, 10) == {"a": 5, "b": 3, "c": 2}
    assert apportion({"a": 1, "b": 1, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}


def test_quotas_of_one_round_are_exact():
    """200 briefs: every share of the plan is a multiple of 1/200 there, or goes to the largest remainders."""
    plan = plan_of(requests=1600, rounds=1, requests_per_call=8)
    briefs = plan.briefs(0, Realised(), POOLS)
    assert len(briefs) == 200
    for axis in ("kind", "words", "persona", "scenario", "register", "language", "tool_source"):
        shares = getattr(plan, axis)
        counted = Counter(getattr(brief, axis) for brief in briefs)
        assert {value: counted[value] for value in shares} == apportion(shares, 200), axis
    shown = [brief for brief in briefs if brief.kind != "no_tools"]
    assert Counter(brief.tools_shown for brief in shown) == Counter(apportion(plan.tools_shown, len(shown)))


def test_a_brief_is_possible():
    for brief in plan_of(requests=4000, rounds=1).briefs(0, Realised(), POOLS):
        assert len(brief.tools) >= tools_floor(brief.kind)
        assert band_of(brief.words)[1] >= PLAN.words_floor(brief.kind)
        home = {tool.name for tool in POOLS.of(brief.domain)}
        shown, hidden = ({tool.name for tool in tools} for tools in (brief.tools, brief.hidden))
        assert shown | hidden == home
        assert not shown & hidden
        assert brief.domain in POOLS.by_source[brief.tool_source]
        if brief.kind == "no_tools":
            assert (brief.tools, brief.focus, brief.tools_shown) == ((), "", "")
        else:
            low, high = band_of(brief.tools_shown)
            assert low <= len(brief.tools) == len(shown) <= high
            assert brief.focus in shown
        assert bool(brief.near_frac) == (len(brief.tools) > 1)


def test_tight_plans_still_find_a_deal():
    """Exactly as many large bands as the kinds that need them: each must get one."""
    plan = plan_of(
        requests=400,
        rounds=1,
        requests_per_call=2,
        kind={"single": 0.5, "multi": 0.3, LONG_VALUES: 0.2},
        tools_shown={"1": 0.7, "2-4": 0.3},
        words={"1-4": 0.5, "5-8": 0.3, "9-20": 0.2},
    )
    briefs = plan.briefs(0, Realised(), POOLS)
    assert {brief.kind for brief in briefs if brief.tools_shown == "2-4"} == {"multi"}
    assert {brief.kind for brief in briefs if brief.words == "9-20"} == {LONG_VALUES}
    assert {brief.kind for brief in briefs if brief.words == "5-8"} == {"multi"}


def test_briefs_follow_from_plan_round_and_what_was_accepted():
    briefs = PLAN.briefs(0, Realised(), POOLS)
    assert PLAN.briefs(0, Realised(), POOLS) == briefs
    assert plan_of(seed=1).briefs(0, Realised(), POOLS) != briefs
    realised = Realised()
    for brief in briefs:
        realised.add(PLAN, brief, answered(brief, generator("fixed", brief.id), brief.count))
    following = PLAN.briefs(1, realised, POOLS)
    read_back = Realised.from_dict(json.loads(json.dumps(realised.to_dict())))
    assert read_back == realised
    assert PLAN.briefs(1, read_back, POOLS) == following
    numbers = [brief.number for brief in (*briefs, *following)]
    assert len(set(numbers)) == len(numbers)
    assert len({brief.id for brief in (*briefs, *following)}) == len(numbers)


def test_a_round_asks_for_what_is_lacking_only():
    plan = plan_of(requests=100, rounds=2, requests_per_call=5)
    realised = Realised()
    first = plan.briefs(0, realised, POOLS)
    assert len(first) == 10
    for brief in first:
        realised.add(plan, brief, answered(brief, generator(brief.id), 5))
    assert plan.briefs(0, realised, POOLS) == []
    assert len(plan.briefs(1, realised, POOLS)) == 10


def test_refusals_make_more_be_asked_for_but_never_without_bound():
    plan = plan_of(requests=400, rounds=2, requests_per_call=5, overask_max=4.0)
    realised = Realised()
    for brief in plan.briefs(0, realised, POOLS):
        realised.add(plan, brief, [])
    assert realised.requests == 0
    assert realised.rejected["language"]["English"] == 200
    assert len(plan.briefs(1, realised, POOLS)) == 4 * 400 / 5


def test_every_domain_and_tool_gets_its_turn():
    briefs = plan_of(requests=4000, rounds=1, requests_per_call=4).briefs(0, Realised(), POOLS)
    for source, domains in POOLS.by_source.items():
        served = Counter(brief.domain for brief in briefs if brief.tool_source == source)
        assert set(served) == set(domains)
        assert max(served.values()) - min(served.values()) <= 1
    focused = {(brief.domain, brief.focus) for brief in briefs if brief.focus}
    every = {(domain, tool.name) for domain in NAMES[:28] for tool in TOOLS[domain]}
    assert len(focused) > 0.95 * len(every)


def test_a_kind_is_about_a_tool_that_allows_it():
    briefs = plan_of(requests=4000, rounds=1, requests_per_call=4).briefs(0, Realised(), POOLS)
    focused = {
        kind: [next(t for t in brief.tools if t.name == brief.focus) for brief in briefs if brief.kind == kind]
        for kind in ("repeat", LONG_VALUES)
    }
    assert focused["repeat"]
    assert focused[LONG_VALUES]
    assert all(tool.properties for tool in focused["repeat"])
    for tool in focused[LONG_VALUES]:
        assert any(schema["type"] == "string" and "enum" not in schema for schema in tool.properties.values())


def test_without_invented_tools_the_catalogue_serves():
    pools = Pools(catalogue=POOLS.by_source["catalogue"], invented={})
    assert {brief.tool_source for brief in PLAN.briefs(0, Realised(), pools)} == {"catalogue"}


# --- near-neighbour tools


@PROPERTY
@given(
    st.integers(0, len(POOLS.tools.tools) - 1), st.integers(2, 12), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99)
)
def test_near_tools_are_the_nearest_ones(at: int, count: int, near_frac: float, seed: int):
    pool = POOLS.tools
    domain, focus = pool.domains[at], pool.tools[at]
    count = min(count, len(pool.of_domain[domain]))
    tools, frac = show_near(
        pool, domain=domain, focus=focus.name, count=count, near_frac=near_frac, rng=generator(seed)
    )
    shown = [pool.index[domain, tool.name] for tool in tools]
    assert len(set(shown)) == count
    assert at in shown
    like = {i: pool.similarity[at, i] for i in pool.of_domain[domain] if i != at}
    others = [i for i in shown if i != at]
    wanted = int(near_frac * (count - 1) + 0.5)
    # So many of them are as similar as the most similar ones of the whole domain.
    best = sorted(like.values(), reverse=True)
    assert sorted((like[i] for i in others), reverse=True)[:wanted] == best[:wanted]
    assert frac >= wanted / (count - 1)
    if len(like) >= 2 * (count - 1):  # enough others: not one near tool too many
        assert frac == wanted / (count - 1)
        assert all(like[i] <= best[count - 2] for i in sorted(others, key=lambda i: -like[i])[wanted:])


def test_a_tool_alone_has_no_near_ones():
    tools, frac = show_near(
        POOLS.tools, domain=NAMES[0], focus=TOOLS[NAMES[0]][0].name, count=1, near_frac=1.0, rng=generator(0)
    )
    assert (tools, frac) == ((TOOLS[NAMES[0]][0],), None)


# --- steering: a simulated author

ACCEPTED_FRAC = {"garbled": 0.35, "long_values": 0.4, "multi": 0.6, "repeat": 0.6, "implicit": 0.7}
REFUSED_PERSONA = next(iter(PLAN.persona))


def answered(brief: Brief, rng: np.random.Generator, most: int, *, drift: float = 1.0) -> list[Example]:
    """Up to `most` examples as the brief wants them; with `drift`, so many times as long."""
    low, high = band_of(brief.words)
    calls = {"multi": [t.name for t in brief.tools[:2]], "repeat": [brief.focus] * 2}.get(brief.kind, [brief.focus])
    arguments = {"x": " ".join(["long"] * PLAN.long_value_words)} if brief.kind == LONG_VALUES else {}
    examples = []
    for i in range(most):
        words = max(1, round(int(rng.integers(low, high + 1)) * drift))
        examples.append(
            Example(
                id=f"{brief.id}-{i}",
                query=" ".join(f"word{int(k)}" for k in rng.integers(0, 1000, words)),
                tools=brief.tools,
                calls=() if brief.is_empty else tuple(ToolCall(name, arguments) for name in calls),
                kind="single" if brief.kind in COUNTED_KINDS else brief.kind,
                domain=brief.domain,
            )
        )
    return examples


def simulate(plan: Plan, seed: int) -> Realised:
    """An author who fails some kinds and one persona more often, and writes a fifth more words than asked."""
    realised = Realised()
    for round in range(plan.rounds):
        for brief in plan.briefs(round, realised, POOLS):
            rng = generator("simulated author", seed, brief.id)
            kept = rng.random(brief.count) < ACCEPTED_FRAC.get(brief.kind, 0.95) * (
                0.5 if brief.persona == REFUSED_PERSONA else 1
            )
            realised.add(plan, brief, answered(brief, rng, int(kept.sum()), drift=1.2))
    return realised


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steering_brings_the_corpus_to_the_plan(seed: int):
    """Bounds on the total variation distance: 0.02 where values keep to their brief, 0.05 for words, whose drift makes
    every band spill into the next (and the last one out of the plan)."""
    blind = simulate(plan_of(requests=3000, rounds=1), seed)
    steered = simulate(plan_of(requests=3000, rounds=6), seed)
    before, after = blind.distances(PLAN), steered.distances(PLAN)
    assert before["kind"] > 0.08
    assert before["words"] > 0.07
    assert before["persona"] > 0.03
    for axis in ("kind", "persona", "tools_shown", "scenario", "register", "language", "tool_source"):
        assert after[axis] < 0.02, axis
    assert after["near_frac"] < 0.03
    assert after["words"] < 0.05
    for axis in ("kind", "persona", "words"):
        assert after[axis] < before[axis] / 2, axis
    assert blind.requests < 0.8 * 3000
    assert steered.requests == pytest.approx(3000, rel=0.03)


# --- what a corpus is


@pytest.fixture(scope="module")
def recorded() -> list[Example]:
    return catalogue.load(FOLDER).examples


def test_an_arbitrary_corpus_is_measured_and_the_rest_is_unknown(recorded: list[Example]):
    realised = Realised.of(PLAN, recorded)
    assert realised.requests == len(recorded)
    for axis in set(BELIEVED) - {"near_frac"}:
        assert realised.accepted[axis] == {"unknown": len(recorded)}
        assert realised.distances(PLAN)[axis] is None
    kinds = Counter(example.kind for example in recorded)
    # Long values are counted apart from the kinds that their calls make them.
    assert realised.accepted["kind"][LONG_VALUES] > 0
    counted = {"single", "multi", "repeat"}
    assert sum(realised.accepted["kind"][kind] for kind in COUNTED_KINDS) == sum(kinds[kind] for kind in counted)
    for kind in set(KINDS) - counted:
        assert realised.accepted["kind"][kind] == kinds[kind]
    short = sum(len(example.query.split()) <= 4 for example in recorded)
    assert realised.accepted["words"]["1-4"] == pytest.approx(short, rel=0.02)
    assert sum(realised.domains.values()) == len(recorded)
    assert sum(realised.calls.values()) == sum(len(example.calls) for example in recorded)


def test_the_table_holds_every_planned_value_and_adds_up(recorded: list[Example]):
    realised = simulate(plan_of(requests=300, rounds=2), 0)
    rows = realised.table(PLAN)
    for axis in AXES:
        of_axis = [row for row in rows if row.axis == axis]
        assert {row.value for row in of_axis} >= set(getattr(PLAN, axis))
        assert sum(row.realised_frac for row in of_axis) == pytest.approx(1)
        assert sum(row.planned_frac for row in of_axis) == pytest.approx(1)
        assert all(row.difference == pytest.approx(row.realised_frac - row.planned_frac) for row in of_axis)
    assert sum(row.accepted for row in rows if row.axis == "kind") == realised.requests
    assert sum(row.rejected for row in rows if row.axis == "persona") == realised.asked_requests - realised.requests
    unknown = [row for row in Realised.of(PLAN, recorded[:5]).table(PLAN) if row.axis == "persona"]
    assert unknown[-1] == ("persona", "unknown", None, None, None, 5, 0)
    assert json.loads(json.dumps(rows)) == [list(row) for row in rows]


def test_the_distance_of_a_hand_case():
    plan = plan_of(language={"English": 0.5, "Welsh": 0.5})
    brief = replace(PLAN.briefs(0, Realised(), POOLS)[0], kind="single", count=4)
    realised = Realised()
    for language, count in {"English": 2, "Welsh": 1, "Breton": 1}.items():
        realised.add(plan, replace(brief, language=language), answered(brief, generator(0), count))
    # Half of |1/2 - 1/2| + |1/4 - 1/2| + |1/4 - 0|.
    assert realised.distances(plan)["language"] == pytest.approx(0.25)
    assert realised.rejected["language"] == {"English": 2, "Welsh": 3, "Breton": 3}


def test_an_example_counts_as_what_it_is_and_not_as_what_was_asked():
    brief = next(b for b in PLAN.briefs(0, Realised(), POOLS) if b.kind == "multi")
    name, other = (tool.name for tool in brief.tools[:2])
    example = Example("i", "one two three", brief.tools, (ToolCall(name, {}),), "single", brief.domain)
    assert PLAN.measure(example, brief)["kind"] == "single"
    assert PLAN.measure(example, brief)["words"] == "1-4"
    assert PLAN.measure(example, brief)["persona"] == brief.persona
    both = example.replace(calls=(ToolCall(name, {}), ToolCall(other, {})))
    assert PLAN.measure(both)["kind"] == "multi"
    assert PLAN.measure(both)["persona"] == "unknown"
    assert PLAN.measure(example.replace(calls=(ToolCall(name, {}),) * 2))["kind"] == "repeat"
    long = ToolCall(name, {"x": "w " * PLAN.long_value_words})
    assert PLAN.measure(example.replace(calls=(long,)))["kind"] == LONG_VALUES
    assert PLAN.measure(example.replace(calls=(long,), kind="garbled"))["kind"] == "garbled"
    for kind in EMPTY_KINDS:
        assert PLAN.measure(example.replace(calls=(), kind=kind))["kind"] == kind
    assert PLAN.measure(example.replace(query="w " * 500))["words"] == "other"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("set a timer", 3),
        ("wait - what?", 2),
        ("it's 7:30pm, naïve!", 3),
        ("Поставь будильник на семь", 4),
        ("اضبط المنبه على السابعة", 4),
        ("设置十分钟的计时器", 5),  # 9 characters
        ("ตั้งเวลา", 4),  # 8 code points
        ("帮我 play 周杰伦 now", 5),  # 2 spaced words, 5 characters
        ("   ", 0),
    ],
)
def test_words_are_counted_in_any_script(text: str, words: int):
    assert count_words(text) == words


def test_openings_are_bounded_and_never_a_whole_request():
    plan = plan_of(requests=300, rounds=1)
    realised = Realised()
    brief = replace(plan.briefs(0, realised, POOLS)[0], domain="d")
    queries = ["call mum now", "Set an alarm for six", "set an alarm for ten", "book a table tonight"]
    example = answered(brief, generator(0), 1)[0].replace(domain="d")
    realised.add(plan, brief, [example.replace(query=query) for query in queries])
    assert realised.openings_of("d", 9) == ["set an alarm", "book a table"]
    assert realised.openings_of("d", 1) == ["set an alarm"]
    assert realised.openings_of("elsewhere", 9) == []


# --- the figure


def test_the_figure_shows_bars_for_every_known_axis(recorded: list[Example]):
    realised = simulate(plan_of(requests=300, rounds=1), 0)
    rows, distances = realised.table(PLAN), realised.distances(PLAN)
    png = draw(rows, distances, requests=realised.requests)
    assert png == draw(rows, distances, requests=realised.requests)
    pixels = image.imread(io.BytesIO(png), format="png")[..., :3]
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000

    def inked(pixels: np.ndarray) -> float:
        return float(np.isclose(pixels, colors.to_rgb(REALISED_COLOUR), atol=0.02).all(axis=-1).mean())

    assert inked(pixels) > 0.05
    known = Realised.of(PLAN, recorded[:50])
    fewer = image.imread(
        io.BytesIO(draw(known.table(PLAN), known.distances(PLAN), requests=known.requests)), format="png"
    )
    assert fewer.shape[0] < pixels.shape[0]  # personas and the like are unknown there
    assert inked(fewer[..., :3]) > 0.05


def test_no_figure_is_drawn_of_nothing():
    empty = Realised()
    assert draw(empty.table(PLAN), empty.distances(PLAN), requests=0) is None
