"""The corpus stage: bad records are quarantined, splits are stable, and every variation stays a right answer."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from needle import config
from needle.corpus import catalogue
from needle.corpus.augment import Augment
from needle.corpus.distractors import ToolPool
from needle.corpus.mix import Mixer, evaluation, generator
from needle.corpus.noise import disturb
from needle.corpus.split import SplitRule
from needle.corpus.values import ValuePool, swap_values
from needle.data.settings import DataSettings
from needle.errors import DataError

FOLDER = Path(__file__).resolve().parents[2] / "data" / "teacher_corpus"
RECORDED = catalogue.load(FOLDER)
POOL = ToolPool(RECORDED.tools)
VALUES = ValuePool(RECORDED.examples)
SLOW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
examples = st.sampled_from(RECORDED.examples)
seeds = st.integers(0, 2**32)
OFF = Augment(**{field.name: 1 if field.name == "tools_max" else 0.0 for field in fields(Augment)})
SWITCHES = [field.name for field in fields(Augment) if field.name not in ("tools_max", "few_tools_bias", "hard_frac")]


def data(name: str = "default", *overrides: str) -> DataSettings:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config.build(compose("prepare", [f"data={name}", *overrides]).data)


def vary(augment: Augment, example, seed: int):
    return augment(example, rng=generator(seed), tools=POOL, values=VALUES)


def copied(example) -> list[str]:
    """String values of the answer that stand in the request."""
    values = [v for call in example.calls for v in call.arguments.values() if isinstance(v, str)]
    return [v for v in values if re.search(rf"(?<!\w){re.escape(v)}(?!\w)", example.query)]


def test_the_shipped_corpus_is_sound():
    assert len(RECORDED.examples) == 10117
    assert RECORDED.quarantine == []
    assert len(RECORDED.tools) == 72


@SLOW
@given(examples, seeds, st.sampled_from(SWITCHES))
def test_each_variation_alone_stays_valid_and_grounded(example, seed, switch):
    varied = vary(replace(OFF, **{switch: 1.0, "tools_max": 5}), example, seed)
    assert varied.problems() == []
    if varied.calls:
        assert len(varied.calls) == len(example.calls)
        assert len(copied(varied)) >= len(copied(example))


@SLOW
@given(examples, seeds)
def test_all_variations_together_stay_valid(example, seed):
    augment = replace(OFF, **dict.fromkeys(SWITCHES, 0.5), tools_max=10, hard_frac=0.5)
    varied = vary(augment, example, seed)
    assert varied.problems() == []
    assert vary(augment, example, seed) == varied


@SLOW
@given(examples, seeds)
def test_switched_off_nothing_changes(example, seed):
    varied = vary(OFF, example, seed)
    assert (varied.query, varied.calls, varied.kind) == (example.query, example.calls, example.kind)
    shown = {tool.name: tool for tool in varied.tools}
    assert all(shown[tool.name] == tool for tool in example.tools)


@SLOW
@given(examples, seeds)
def test_swapped_values_are_exchanged_on_both_sides(example, seed):
    swapped = swap_values(example, rng=generator(seed), pool=VALUES, probability=1.0)
    for before, after in zip(example.calls, swapped.calls, strict=True):
        for key, value in after.arguments.items():
            if value != before.arguments[key]:
                assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", swapped.query)
                assert example.query.count(str(before.arguments[key])) > 0


@SLOW
@given(examples, seeds)
def test_noise_leaves_values_alone(example, seed):
    assert set(copied(example)) <= set(copied(disturb(example, rng=generator(seed), probability=1.0)))


def test_distractors_cannot_serve_the_request():
    song = next(e for e in RECORDED.examples if e.calls and e.calls[0].name == "play_song")
    gold = [POOL.index[song.domain, tool.name] for tool in song.tools]
    hard, easy = POOL.candidates(song, gold, limit=0.3)
    assert {POOL.domains[i] for i in hard} == {song.domain}
    assert song.domain not in {POOL.domains[i] for i in easy}
    assert max(POOL.similarity[gold][:, easy].max(axis=0)) <= 0.3
    none = next(e for e in RECORDED.examples if e.kind == "near_miss")
    assert len(POOL.candidates(none, [], limit=0.3)[1]) == 0


def test_splits_are_stable_and_unseen_domains_apart():
    rule = data().split
    assert len(rule.unseen_domains) >= 6
    assert set(rule.unseen_domains) <= set(RECORDED.tools)
    before = {e.id: rule.assign(e) for e in RECORDED.examples}
    less = replace(rule, domains=("calendar", "email"))
    assert all(less.assign(e) == before[e.id] for e in RECORDED.examples)
    assert all((split == "unseen") == (name.rsplit("-", 1)[0] in rule.unseen_domains) for name, split in before.items())
    shares = {split: list(before.values()).count(split) / len(before) for split in ("validation", "test")}
    assert 0.03 < shares["validation"] < 0.08
    assert 0.03 < shares["test"] < 0.08
    twin = RECORDED.examples[0].replace(query=RECORDED.examples[0].query.upper() + " 42!")
    assert rule.assign(twin) == rule.assign(RECORDED.examples[0])


def test_training_never_shows_unseen_tools_and_copies_are_independent():
    plan = data("default", "data.copies_per_request=2")
    train = [e for e in RECORDED.examples[::40] if plan.split.assign(e) == "train"]
    mixer = Mixer(plan, train=train, tools=RECORDED.tools)
    unseen = {t.description for d in plan.split.unseen_domains for t in RECORDED.tools[d]}
    drawn = list(mixer.training())
    assert len(drawn) == 2 * len(train)
    assert not unseen & {tool.description for e in drawn for tool in e.tools}
    halves = [e for part in (0, 1) for e in mixer.training(range(part, mixer.count, 2))]
    assert sorted(halves, key=lambda e: e.id) == sorted(drawn, key=lambda e: e.id)
    fewer = Mixer(plan, train=train[5:], tools=RECORDED.tools)
    values_alike = {e.id: e.tools for e in drawn}
    assert all(tuple(values_alike[e.id]) == e.tools for e in fewer.training() if not e.calls)


def test_given_examples_join_with_the_tools_they_show():
    plan = data("default", "data.copies_per_request=1", "data.given_copies=3", "data.augment.swap_value=1")
    own = [
        e.replace(id=f"given-{e.id}", domain="") for e in evaluation(RECORDED.examples[5:400:40], RECORDED.tools, plan)
    ]
    kept = replace(plan, augment=replace(OFF, swap_value=1.0))
    drawn = list(Mixer(kept, train=RECORDED.examples[:3], tools=RECORDED.tools, given=own).training())
    assert len(drawn) == 3 + 3 * len(own)
    by_id = {e.id: e for e in own}
    for varied in drawn[3:]:
        assert varied.tools == by_id[varied.id.rpartition("-")[0]].tools
        assert varied.problems() == []


def test_evaluation_adds_distractors_only():
    plan = data()
    chosen = RECORDED.examples[::200]
    shown = evaluation(chosen, RECORDED.tools, plan)
    for before, after in zip(chosen, shown, strict=True):
        assert (after.query, after.calls, after.kind) == (before.query, before.calls, before.kind)
        assert after.problems() == []
        assert len(after.tools) >= min(plan.evaluation.tools_min, 2)


# Bad input


def corpus(folder: Path, records: bytes, tools: str | None = None) -> Path:
    plain = [
        {"name": "stop", "description": "Stop."},
        {"name": "go", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
    ]
    (folder / "d.tools.json").write_text(tools if tools is not None else json.dumps(plain))
    (folder / "d.jsonl").write_bytes(records)
    return folder


GOOD = b'{"k": "single", "q": "stop it", "c": [["stop", {}]]}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"k": "single", "q": "go to x", "c": [["go", {"x', "cut off"),
        (b'{"k": "single", "q": "fly", "c": [["fly", {}]]}\n', "unknown tool 'fly'"),
        (b'{"k": "single", "q": "caf\xe9", "c": [["stop", {}]]}\n', "0xe9"),
        (b'{"k": "single", "q": "go 3", "c": [["go", {"x": 3}]]}\n', "not of type 'string'"),
        (b'{"k": "single", "q": "go", "c": [["go", {"y": "a"}]]}\n', "'y' was unexpected"),
        (b'{"k": "odd", "q": "stop now", "c": []}\n', "kind 'odd'"),
        (b'{"k": "none", "q": "stop now", "c": [["stop", {}]]}\n', "must have no call"),
        (b'{"k": "single", "q": "stop it", "c": [["stop", {}]]}\n', "repeats"),
        (b'["not", "a", "record"]\n', "not a record"),
    ],
)
def test_a_bad_record_is_quarantined_with_its_reason(tmp_path: Path, line: bytes, reason: str):
    loaded = catalogue.load(corpus(tmp_path, GOOD + line))
    assert len(loaded.examples) == 1
    (bad,) = loaded.quarantine
    assert reason in bad.reason
    assert bad.line_number == 2


@pytest.mark.parametrize(
    ("records", "tools", "reason"),
    [
        (b"", None, "empty"),
        (b"{}\n", None, "no usable record"),
        (GOOD, "[{", "cannot read"),
        (GOOD, '[{"name": ""}]', "name"),
    ],
)
def test_an_unusable_domain_stops_with_a_message(tmp_path: Path, records: bytes, tools: str | None, reason: str):
    with pytest.raises(DataError, match=reason):
        catalogue.load(corpus(tmp_path, records, tools))


def test_a_missing_tools_file_is_told(tmp_path: Path):
    corpus(tmp_path, GOOD)
    (tmp_path / "other.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"other\.tools\.json"):
        catalogue.load(tmp_path)


def test_a_slice_is_named_by_its_rule():
    rule = SplitRule(0.1, 0.1, "s", (), ("a",))
    assert rule.uses("a")
    assert not rule.uses("b")
