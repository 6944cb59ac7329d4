"""A teacher's several answers reach training: the valid ones, for the same words and tools, weighed by their share."""

# R rows, T target tokens

import json
import re
from dataclasses import fields
from inspect import signature
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from needle import config, prepare
from needle.corpus import catalogue
from needle.corpus.answers import Told, Weighed, read_answers, recorded, usable, vary_together
from needle.corpus.augment import Augment
from needle.corpus.distractors import ToolPool
from needle.corpus.labelling import WeightedAnswer, kind_of_answer
from needle.corpus.mix import generator
from needle.corpus.values import ValuePool, swap_values
from needle.data.packing import PackedBatches
from needle.data.shards import Shard
from needle.errors import ConfigError, DataError
from needle.loss.base import reduce
from needle.runs import Paths
from needle.schema import Example, Tool, ToolCall
from needle.train import legal

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDED = catalogue.load(REPOSITORY / "data" / "teacher_corpus")
POOL, VALUES = ToolPool(RECORDED.tools), ValuePool(RECORDED.examples)
CALLING = [example for example in RECORDED.examples if example.calls]
OFF = Augment(**{field.name: 1 if field.name == "tools_max" else 0.0 for field in fields(Augment)})
SWITCHES = [field.name for field in fields(Augment) if field.name not in ("tools_max", "few_tools_bias", "hard_frac")]


def told_of(example: Example) -> Told:
    """What a teacher that wavers might say: the recorded answer, no call, one call less, another tool, and a call that
    no schema allows."""
    others = [tool for tool in RECORDED.tools[example.domain] if not tool.required and tool not in example.tools]
    answers = [example.calls, (), *([example.calls[:-1]] if len(example.calls) > 1 else [])]
    answers += [(ToolCall(others[0].name, {}),)] if others else []
    return Told(0.5, tuple(WeightedAnswer(calls, 0.2) for calls in (*answers, (ToolCall("no_such_tool", {}),))))


def quoted(example: Example) -> set[str]:
    """String values of the answer that stand in the request."""
    values = {v for call in example.calls for v in call.arguments.values() if isinstance(v, str)}
    return {v for v in values if re.search(rf"(?<!\w){re.escape(v)}(?!\w)", example.query)}


def test_only_valid_answers_count_and_their_weights_are_shared_out():
    example = next(e for e in CALLING if len(told_of(e).answers) == 4)
    found = usable(example, told_of(example), RECORDED.tools)
    assert len(found) == 3
    assert [one.answer_weight for one in found] == pytest.approx([1 / 3] * 3)
    assert {one.confidence for one in found} == {0.5}
    assert [one.example.kind for one in found] == [kind_of_answer(example.kind, one.example.calls) for one in found]
    shown = {tool.name for tool in found[0].example.tools}
    assert shown == {call.name for one in found for call in one.example.calls}
    assert all(one.example.tools == found[0].example.tools for one in found)
    # Nothing to choose from: the recorded answer, whole.
    nothing = Told(0.25, (WeightedAnswer((ToolCall("no_such_tool", {}),), 1.0),))
    assert usable(example, nothing, RECORDED.tools) == [Weighed(example, 1.0, 0.25)]
    assert usable(example, None, RECORDED.tools) == [Weighed(example, 1.0, 1.0)]


def test_the_recorded_answer_is_trusted_by_its_share_and_by_the_judge():
    example = CALLING[0]
    other = (ToolCall("no_such_tool", {}),)
    samples = (WeightedAnswer(other, 0.75), WeightedAnswer(tuple(reversed(example.calls)), 0.25))
    assert recorded(example, Told(0.5, samples)) == Weighed(example, 1.0, 0.125)
    assert recorded(example, Told(1.0, samples)) == Weighed(example, 1.0, 0.25)
    assert recorded(example, Told(1.0, samples[:1])).confidence == 0
    assert recorded(example, Told(0.5, ())) == Weighed(example, 1.0, 0.5)
    assert recorded(example, None) == Weighed(example, 1.0, 1.0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(CALLING), st.integers(0, 2**32), st.sampled_from([0.5, 1.0]))
def test_the_answers_of_a_copy_are_for_the_same_words_and_tools(example: Example, seed: int, strength: float):
    augment = Augment(**{**vars(OFF), **dict.fromkeys(SWITCHES, strength), "tools_max": 6, "hard_frac": 0.5})
    if strength == 1.0:  # else nothing but the removal would be seen
        augment = Augment(**{**vars(augment), "remove_gold": 0.0, "no_tools": 0.0})
    answers = usable(example, told_of(example), RECORDED.tools)
    assert len(answers) >= 2
    varied = vary_together(answers, augment=augment, rng=generator(seed), tools=POOL, values=VALUES)
    again = vary_together(answers, augment=augment, rng=generator(seed), tools=POOL, values=VALUES)
    assert varied == again
    assert len({one.example.query for one in varied}) == 1
    assert all(one.example.tools == varied[0].example.tools for one in varied)
    assert [problem for one in varied for problem in one.example.problems()] == []
    assert sum(one.answer_weight for one in varied) == pytest.approx(1)
    assert len(varied) in (1, len(answers))
    if len(varied) > 1:
        for before, after in zip(answers, varied, strict=True):
            assert after.answer_weight == before.answer_weight
            assert len(after.example.calls) == len(before.example.calls)
            assert len(quoted(after.example)) >= len(quoted(before.example))
    else:
        assert varied[0].example.calls == ()


def test_a_value_is_exchanged_in_every_answer_that_holds_it_and_not_inside_another():
    """Three cases: both hold the value whole; a value of the other lies across it; its new value is not allowed."""
    text = {"type": "string"}
    timer = Tool("timer", "", {"type": "object", "properties": {"label": text, "note": text}})
    alarm = Tool("alarm", "", {"type": "object", "properties": {"label": text}})
    one = Example(
        "a", "start a timer for pasta please", (timer, alarm), (ToolCall("timer", {"label": "pasta"}),), "single"
    )
    values = ValuePool([one, one.replace(query="a timer for quiche", calls=(ToolCall("timer", {"label": "quiche"}),))])

    def swapped(*others: tuple[ToolCall, ...]) -> list[Example]:
        answers = [Weighed(e, 0.5, 1.0) for e in (one, *(one.replace(calls=calls) for calls in others))]
        augment = Augment(**{**vars(OFF), "swap_value": 1.0})
        found = vary_together(answers, augment=augment, rng=generator(2), tools=None, values=values)
        return [weighed.example for weighed in found]

    first, second = swapped((ToolCall("alarm", {"label": "pasta"}), ToolCall("timer", {"note": "pasta"})))
    assert first.query == second.query == "start a timer for quiche please"
    assert first.calls == (ToolCall("timer", {"label": "quiche"}),)
    assert second.calls == (ToolCall("alarm", {"label": "quiche"}), ToolCall("timer", {"note": "quiche"}))
    first, second = swapped((ToolCall("timer", {"label": "pasta please"}),))
    assert first.query == second.query == one.query
    assert (first.calls, second.calls) == (one.calls, (ToolCall("timer", {"label": "pasta please"}),))
    # Where the new value would break an answer's schema, the request stays as it was.
    only_pasta = Tool("menu", "", {"type": "object", "properties": {"dish": {"type": "string", "enum": ["pasta"]}}})
    one = one.replace(tools=(timer, alarm, only_pasta))
    first, second = swapped((ToolCall("menu", {"dish": "pasta"}),))
    assert first.query == second.query == one.query


def test_values_are_swapped_about_as_often_as_in_single_answers():
    augment = Augment(**{**vars(OFF), "swap_value": 1.0})
    chosen = CALLING[::25]
    alone = sum(swap_values(e, rng=generator(e.id), pool=VALUES, probability=1.0).query != e.query for e in chosen)
    together = sum(
        vary_together(
            usable(e, told_of(e), RECORDED.tools), augment=augment, rng=generator(e.id), tools=None, values=VALUES
        )[0].example.query
        != e.query
        for e in chosen
    )
    assert alone > len(chosen) / 5
    assert together > 0.8 * alone


@pytest.mark.parametrize(
    "line",
    ["{", '{"id": "a"}', '{"id": "a", "weight": 1.5, "answers": []}', '{"id": "a", "weight": null, "answers": []}',
     '{"id": "a", "weight": 1, "answers": [{"calls": [], "weight": 0}]}', "[]"],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: str):
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"id": "b", "weight": 0.5, "answers": []}}\n{line}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl, line 2"):
        read_answers(path)
    assert read_answers(tmp_path / "none") == {}


# From here: a labelled corpus of three requests, prepared and packed.

DOMAIN = "timers_alarms"
SAID = {"a": (0.75, [0.5, 0.3, 0.2]), "b": (0.4, [1.0]), "c": (1.0, [0.6, 0.4])}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Request a has three answers, the last of them to no tool; of c's two answers one is too long for the shards."""
    folder = tmp_path_factory.mktemp("labelled") / "corpus-1"
    folder.mkdir()
    text, number = {"type": "string"}, {"type": "integer"}
    set_timer = Tool("set_timer", "Starts a timer.", {"properties": {"minutes": number, "label": text}})
    set_alarm = Tool("set_alarm", "Sets an alarm.", {"properties": {"time": text}})
    tools = [set_timer, set_alarm]
    first = {
        "a": [ToolCall("set_timer", {"minutes": 20})],
        "b": [ToolCall("set_alarm", {"time": "noon"})],
        "c": [ToolCall("set_timer", {"minutes": 5, "label": "tea"})],
    }
    others = {
        "a": [[ToolCall("set_alarm", {"time": "20 past"})], [ToolCall("set_kettle", {})]],
        "b": [],
        "c": [[ToolCall("set_timer", {"label": "tea " * 100})]],
    }
    queries = {"a": "twenty minutes or 20 past", "b": "wake me at noon", "c": "tea in 5"}
    examples = [
        Example(i, queries[i], tuple(t for t in tools if t.name == calls[0].name), tuple(calls), "single", DOMAIN)
        for i, calls in first.items()
    ]
    for split in ("train", "validation", "test", "unseen"):
        lines = [e.replace(split=split) for e in examples if split == "train"] or [examples[0].replace(id="v")]
        (folder / f"{split}.jsonl").write_text("".join(e.to_json() + "\n" for e in lines))
    records = {DOMAIN: [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in tools]}
    (folder / "tools.json").write_text(json.dumps(records))
    (folder / "manifest.json").write_text(json.dumps({"kind": "corpus"}))
    answers = []
    for i, (weight, shares) in SAID.items():
        calls = [[vars_of(call) for call in one] for one in (first[i], *others[i])]
        of_request = [{"calls": c, "weight": share} for c, share in zip(calls, shares, strict=True)]
        answers.append({"id": i, "weight": weight, "answers": of_request})
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    return folder


def vars_of(call: ToolCall) -> dict:
    return {"name": call.name, "arguments": call.arguments}


def shards_of(labelled: Path, folder: Path, *overrides: str) -> Path:
    own = [f"data.corpus={labelled}", "data.text.tokenizer=experiments/000_first_distillation/nano_initial"]
    own += ["data.copies_per_request=3", f"paths.artifacts={folder}", "workers=1", "data.augment.remove_gold=0"]
    own += ["data.augment.no_tools=0", *overrides]
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        built = config.build_settings(
            config.OmegaConf.to_container(compose("prepare", own), resolve=True), prepare.main.stage_function
        )
    prepare.main.stage_function({"_choices_": {}, "_overrides_": []}, **built)
    paths = built["paths"]
    assert isinstance(paths, Paths)
    return prepare.shards_folder(paths, built["data"])


@pytest.fixture(scope="module")
def shards(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(labelled, tmp_path_factory.mktemp("all"), "data.answers=all", "data.symbolic_examples=40")


def test_answers_become_examples_with_the_same_source(shards: Path):
    train = Shard.open(shards / "train")
    # a: 0.5 and 0.3 of the usable 0.8; b: one; c: the long answer is left out, the other takes its share.
    expected = sorted([*[(0.625, 0.75), (0.375, 0.75), (1.0, 0.4), (1.0, 1.0)] * 3])
    found = sorted(zip(train.answer_weight.tolist(), train.confidence.tolist(), strict=True))
    assert np.array(found) == pytest.approx(np.array(expected))
    keys = np.load(shards / "train" / "keys.npy")
    assert len(set(keys.tolist())) == len(train)
    sources = [train.source[slice(*train.source_offsets[i : i + 2])].tobytes() for i in range(len(train))]
    of_a = [sources[i] for i in range(len(train)) if train.answer_weight[i] < 1]
    assert [of_a.count(source) for source in of_a] == [2] * 6
    targets = {train.target[slice(*train.target_offsets[i : i + 2])].tobytes() for i in range(len(train))}
    assert len(targets) >= 4  # no two answers are one
    counts = json.loads((shards / "manifest.json").read_text())["counts"]
    assert counts["answers"] == {
        "requests_with_several": 2, "used": 5, "left_out": 1, "confidence_mean": pytest.approx(0.716667)
    }  # fmt: skip
    assert counts["train"]["too_long"] == 3
    assert counts["symbolic"]["examples"] == len(Shard.open(shards / "symbolic")) == 40
    validation = Shard.open(shards / "validation")
    assert (validation.answer_weight.tolist(), validation.confidence.tolist()) == ([1.0], [1.0])
    assert set(train.tools.tolist()) <= {1, 2}


def test_the_order_of_examples_does_not_depend_on_how_many_processes_prepare_them(labelled: Path, tmp_path: Path):
    written = []
    for workers in (1, 2, 5):
        words = ["data.answers=all", "data.symbolic_examples=7", f"workers={workers}"]
        folder = shards_of(labelled, tmp_path / str(workers), *words)
        written.append([(folder / split / "keys.npy").read_bytes() for split in ("train", "symbolic")])
    assert written[0] == written[1] == written[2]


def test_a_batchs_mean_is_the_expectation_over_answers_trusted_as_stated(shards: Path):
    """sum over answers of weight * confidence * tokens * nats / sum of weight * confidence * tokens, by hand."""
    train = Shard.open(shards / "train")
    shape = {"source_row_tokens": 512, "target_row_tokens": 84}
    stream = PackedBatches(train, rows_per_batch=1, window_examples=64, seed=0, **shape)
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        weighting = config.build(compose("train", ["weighting=confidence"]).weighting)
    seen = 0
    for batch in islice(stream, 3):
        nats_RT = 1.0 + batch["labels_RT"].remainder(7).to(torch.float64)
        terms = reduce(nats_RT=nats_RT, weights_RT=weighting(**batch))
        above = below = 0.0
        segments = batch["target_segments_RT"][0]
        for segment in range(1, int(segments.max()) + 1):
            of_segment = batch["labels_RT"][0][segments == segment].numpy()
            (i,) = [i for i in range(len(train)) if is_example(batch, train, i, segment)][:1]
            share = float(train.answer_weight[i]) * float(train.confidence[i])
            above += share * sum(1.0 + label % 7 for label in of_segment)
            below += share * len(of_segment)
            seen += 1
        assert float(terms.sum_nats / terms.weight) == pytest.approx(above / below, rel=1e-6)
    assert seen >= 6


def is_example(batch: dict[str, torch.Tensor], train: Shard, i: int, segment: int) -> bool:
    """Whether the segment holds example i: its source and its target."""
    target = batch["labels_RT"][0][batch["target_segments_RT"][0] == segment].tolist()
    source = batch["source_ids_RS"][0][batch["source_segments_RS"][0] == segment].tolist()
    its_target = train.target[slice(*train.target_offsets[i : i + 2])].tolist()
    return target == its_target and source == train.source[slice(*train.source_offsets[i : i + 2])].tolist()


def test_the_first_answer_counts_as_often_as_it_was_given_and_has_shards_of_its_own(
    labelled: Path, shards: Path, tmp_path: Path
):
    first = shards_of(labelled, tmp_path, "data.answers=first")
    train = Shard.open(first / "train")
    assert set(train.answer_weight.tolist()) == {1.0}
    assert np.sort(train.confidence) == pytest.approx([0.75 * 0.5] * 3 + [0.4] * 3 + [0.6] * 3)
    assert first.name != shards.name
    assert not (first / "symbolic").exists()
    # Other weights for the same examples: other shards.
    text = (labelled / "answers.jsonl").read_text()
    try:
        (labelled / "answers.jsonl").write_text(text.replace("0.75", "0.5"))
        assert shards_of(labelled, tmp_path, "data.answers=first").name != first.name
        (labelled / "answers.jsonl").write_text("")
        with pytest.raises(ConfigError, match=r"answers=all.*role\.samples=8"):
            shards_of(labelled, tmp_path, "data.answers=all")
    finally:
        (labelled / "answers.jsonl").write_text(text)


def test_every_copy_is_traced_to_the_answer_that_it_varies(labelled: Path, shards: Path):
    own = [f"data.corpus={labelled}", "data.text.tokenizer=experiments/000_first_distillation/nano_initial"]
    own += ["data.copies_per_request=3", "data.answers=all", "data.symbolic_examples=40"]
    own += ["data.augment.remove_gold=0", "data.augment.no_tools=0"]
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        data = config.build(compose("prepare", own).data)
    paths = SimpleNamespace(artifacts=shards.parent)
    pairs = list(prepare.origins("train", shards=shards, paths=paths, data=data))  # type: ignore[arg-type]
    assert len(pairs) == 3 * 5
    for copy, answered in pairs:
        assert len(copy.calls) == len(answered.calls)
        assert [len(call.arguments) for call in copy.calls] == [len(call.arguments) for call in answered.calls]


def test_a_loss_over_samples_needs_all_answers():
    def compose_with(answers: str, needs: frozenset[str]) -> None:
        gives = SimpleNamespace(capabilities=frozenset({"text", "samples"}), tokenizer="own", temperature=None)
        with initialize_config_dir(str(config.CONF), version_base="1.3"):
            cfg = compose("train", [f"data.answers={answers}"])
            asked = set(signature(legal).parameters) & set(cfg) - {"teacher", "loss", "auxiliaries"}
            built = {str(name): config.build(cfg[name]) for name in asked}
        legal(teacher=gives, loss=SimpleNamespace(needs=needs), auxiliaries={}, **built)  # type: ignore[arg-type]

    samples = frozenset({"samples"})
    with pytest.raises(ConfigError, match=r"data\.answers=first.*data\.answers=all"):
        compose_with("first", samples)
    compose_with("all", samples)
    compose_with("first", frozenset({"text"}))
