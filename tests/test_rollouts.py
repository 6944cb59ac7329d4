"""On-policy steps: the student's own answers take the place of the data's, are scored by the teacher alone, and a
resumed run makes the same ones."""

# R rows, T target tokens, V vocabulary, K teacher tokens

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from needle import config
from needle.data.packing import PackedBatches, collate
from needle.data.shards import ABOUT_TYPES, Shard
from needle.distil import Distillation, TrainerSettings
from needle.errors import ConfigError
from needle.loss import Fixed, Mixing, Schedule
from needle.loss.base import IGNORE
from needle.loss.objective import TOKENS, Objective
from needle.rollouts import (
    Buffer,
    Request,
    Rollout,
    Rollouts,
    RolloutSettings,
    Scorer,
    check_legal,
    lay_out,
    refit,
    rows_of,
    spans_of,
    unpack,
    with_rows,
)
from needle.runs import Run
from needle.schema import Tool, ToolCall
from needle.student import SANConfig, SANForConditionalGeneration
from needle.teacher.checkpoint import CheckpointTeacher
from needle.teacher.recorded import RecordedTeacher
from needle.teacher.transformers_local import TransformersTeacher
from needle.text.render import Span
from needle.text.tokenizer import BOS, EOS, TextCodec, train_tokenizer

ROW = {"source_row_tokens": 64, "target_row_tokens": 48}
WORDS = ["ten", "five", "two", "nine"]
TIMER = Tool("timer", "Set it.", {"type": "object", "properties": {"minutes": {"type": "string", "maxLength": 4}}})
LAMP = Tool("lamp", "Switch.", {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]})


def schedule(value: float) -> Schedule:
    return Schedule(shape="constant", start=value, end=value, begin_frac=0.0, end_frac=1.0)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(train_tokenizer([f"set the timer to {w} minutes" for w in WORDS] * 4, vocab_size=310), "signature")


def network(codec: TextCodec, seed: int, dropout_frac: float = 0.0) -> SANForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"width": 16, "heads": 2, "kv_heads": 1, "encoder_layers": 1, "decoder_layers": 1, "copy_width": 8}
    return SANForConditionalGeneration(SANConfig(vocab_size=codec.vocab_size, dropout_frac=dropout_frac, **sizes))


@pytest.fixture(scope="module")
def shard(codec: TextCodec) -> Shard:
    fields: dict[str, list] = {"source": [], "target": [], "spans": []}
    for i in range(24):
        tools = [[TIMER], [TIMER, LAMP], [LAMP]][i % 3]
        call = ToolCall("lamp", {"on": i % 2 == 0}) if i % 3 else ToolCall("timer", {"minutes": WORDS[i % 4]})
        target, spans = codec.encode_target([call], tools)
        source = codec.encode_prompt(f"{WORDS[i % 4]} minutes", tools)
        for name, part in (("source", source), ("target", target), ("spans", spans)):
            fields[name].append(np.array(part))
    lengths = {name: np.cumsum([0, *map(len, fields[name])]) for name in ("source", "target")}
    about = {name: (1 + np.arange(24) % 7).astype(kind) for name, kind in ABOUT_TYPES.items()}
    about |= {name: (about[name] / 8).astype(np.float32) for name in ("answer_weight", "confidence")}
    return Shard(
        **{name: np.concatenate(parts) for name, parts in fields.items()},
        source_offsets=lengths["source"],
        target_offsets=lengths["target"],
        **about,
    )


def batch_of(shard: Shard) -> dict[str, Tensor]:
    return next(iter(PackedBatches(shard, rows_per_batch=3, window_examples=24, seed=0, **ROW)))


def settings_of(option: str = "on_policy", **changes) -> RolloutSettings:
    cfg = OmegaConf.create({"data": {"packing": {"target_row_tokens": ROW["target_row_tokens"]}}})
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        node = compose(overrides=[f"+rollouts={option}"]).rollouts
    return replace(config.build(OmegaConf.merge(cfg, {"rollouts": node}).rollouts), **changes)


ON = settings_of()


def rollouts_of(student: nn.Module, codec: TextCodec, *, scorer: Scorer | None = None, seed=0, **changes) -> Rollouts:
    changes = {"frac": schedule(1.0), **changes}
    return Rollouts(
        replace(ON, **changes), student=student, codec=codec, scorer=scorer, rows_multiple=1, seed=seed, **ROW
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def known(request) -> tuple:
    fields = {**request._asdict(), "source": request.source.tolist(), "target": request.target.tolist()}
    return tuple((name, str(fields[name])) for name in Request._fields)


# Layout.


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 48)), min_size=1, max_size=12), st.integers(1, 3))
def test_unpacking_what_was_laid_out_gives_it_back(lengths: list[tuple[int, int]], multiple: int):
    """Examples have tokens of their own, so a misplaced one shows."""
    rollouts = [
        Rollout(
            100 * i + np.arange(s), 5000 + 100 * i + np.arange(t), np.full(t, i % 5), i % 9, 2**i, 1 / 2**i, i / 16,
            made_step=3, valid=True, exact=False,
        )
        for i, (s, t) in enumerate(lengths)
    ]  # fmt: skip
    batch = lay_out(rollouts, rows=None, **ROW, rows_multiple=multiple)
    assert len(batch["labels_RT"]) % multiple == 0
    assert sorted(map(known, unpack(batch))) == sorted(map(known, rollouts))
    assert sorted(map(known, unpack(with_rows(batch, 20)))) == sorted(map(known, rollouts))


def test_laying_out_a_batch_again_is_collating_it(shard: Shard):
    """Every field of a batch is there, with the same types."""
    rows = [[0], [5], []]
    batch = collate(shard, rows, **ROW)
    requests = unpack(batch)
    again = [
        Rollout(**r._asdict(), spans=np.zeros(len(r.target)), made_step=0, valid=True, exact=True) for r in requests
    ]
    laid = lay_out(again, rows=rows_of(batch), **ROW, rows_multiple=3)
    assert {name: (x.dtype, x.shape) for name, x in laid.items()} == {
        name: (x.dtype, x.shape) for name, x in batch.items()
    }
    assert all(torch.equal(laid[name], batch[name]) for name in batch if name != "spans_RT")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 48)), max_size=3), min_size=1, max_size=4))
def test_answers_stay_in_their_rows_as_long_as_they_fit(lengths: list[list[tuple[int, int]]]):
    flat = [length for row in lengths for length in row]
    source_N, target_N = (np.array([length[i] for length in flat], int) for i in (0, 1))
    ends = np.cumsum([0, *map(len, lengths)])
    rows = [list(range(*pair)) for pair in pairwise(ends)]
    found = refit(rows, target_N, source_N, **ROW)
    assert sorted(i for row in found for i in row) == list(range(len(flat)))
    for row in found:
        assert source_N[row].sum() <= ROW["source_row_tokens"]
        assert target_N[row].sum() <= ROW["target_row_tokens"]
    for own, row in zip(found, rows, strict=False):
        assert own[: len(row[:1])] == row[:1]
        if target_N[row].sum() <= ROW["target_row_tokens"]:
            assert own[: len(row)] == row


def test_an_on_policy_batch_asks_the_same_requests_and_learns_from_what_was_fed(shard: Shard, codec: TextCodec):
    batch = batch_of(shard)
    rollouts = rollouts_of(network(codec, 1), codec)
    laid, on_policy = rollouts.replace(batch, step=4, progress=0.1, rank=0)
    assert on_policy
    asked, answered = unpack(batch), unpack(laid)
    without_answers = [sorted(known(r._replace(target=np.zeros(0))) for r in some) for some in (asked, answered)]
    assert without_answers[0] == without_answers[1]
    assert rollouts.read_tokens == sum(len(r.source) for r in asked)
    assert rollouts.generated_tokens == sum(len(r.target) for r in answered)
    real = laid["target_segments_RT"] > 0
    first = real & (laid["target_segments_RT"] != nn.functional.pad(laid["target_segments_RT"], (1, 0))[:, :-1])
    assert (laid["decoder_ids_RT"][first] == BOS).all()
    later = real & ~first
    shifted = nn.functional.pad(laid["labels_RT"], (1, 0))[:, :-1]
    assert torch.equal(laid["decoder_ids_RT"][later], shifted[later])
    assert torch.equal(laid["labels_RT"] == IGNORE, ~real)
    # What was cut off at the limit is as long as it, and its stop is no label.
    for request in answered:
        assert (request.target[-1] == EOS) or (len(request.target) == ROW["target_row_tokens"])
        assert (request.target[:-1] != EOS).all()
    assert rollouts.record()["rollout_truncated_count"] == sum(r.target[-1] != EOS for r in answered) > 0


@pytest.mark.parametrize(
    ("ids", "valid"),
    [(lambda ids: ids, True), (lambda ids: ids[:-1], False), (lambda ids: ids[1:], False)],
    ids=["whole", "cut", "broken"],
)
def test_spans_are_the_codecs_where_the_answer_is_one(codec: TextCodec, ids, valid: bool):
    calls = [ToolCall("timer", {"b": 3, "a": ["ten", True], "c": {"x": "y"}}), ToolCall("lamp", {})]
    target, spans = codec.encode_target(calls, [])
    found, is_valid = spans_of(ids(target), codec)
    assert is_valid == valid
    plain = [int(Span.STRUCTURE)] * len(found)
    if ids(target)[-1] == EOS:
        plain[-1] = int(Span.STOP)
    assert found.tolist() == (spans if valid else plain)
    assert set(spans) == set(map(int, Span))


def test_an_answer_whose_tokens_are_cut_elsewhere_is_structure(codec: TextCodec):
    target, _ = codec.encode_target([ToolCall("lamp", {})], [])
    letters = [codec.tokenizer.token_to_id(letter) for letter in codec.decode(target)]
    found, valid = spans_of([*letters, EOS], codec)
    assert valid
    assert found.tolist() == [int(Span.STRUCTURE)] * len(letters) + [int(Span.STOP)]


# Which steps.


def test_off_is_off_and_a_frac_of_zero_changes_no_batch(shard: Shard, codec: TextCodec):
    assert not settings_of("off").on
    assert settings_of("on_policy").on
    assert settings_of("replay").on
    rollouts, batch = rollouts_of(network(codec, 1), codec, frac=schedule(0.0)), batch_of(shard)
    for step in range(50):
        assert rollouts.replace(batch, step=step, progress=step / 50, rank=0) == (batch, False)
    assert "decoder" not in vars(rollouts)


def test_frac_is_the_share_of_steps_and_every_step_decides_for_itself(shard: Shard, codec: TextCodec, monkeypatch):
    for reading in ("unpack", "rows_of"):
        monkeypatch.setattr(f"needle.rollouts.{reading}", lambda batch: [])
    monkeypatch.setattr("needle.rollouts.lay_out", lambda rollouts, **_: {"labels_RT": torch.zeros(1)})

    def chosen(steps, seed=0, rank=0) -> list[bool]:
        rollouts = rollouts_of(nn.Identity(), codec, frac=schedule(0.3), seed=seed)
        batch = {"labels_RT": torch.zeros(1)}
        return [rollouts.replace(batch, step=step, progress=0.5, rank=rank)[1] for step in steps]

    whole = chosen(range(2000))
    # Five standard deviations.
    assert abs(np.mean(whole) - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5
    assert chosen(range(1500, 2000)) == whole[1500:]
    assert chosen(range(2000), rank=1) == whole
    assert chosen(range(2000), seed=1) != whole


def test_frac_grows_when_validation_worsens_and_only_then(codec: TextCodec):
    rollouts = rollouts_of(nn.Identity(), codec, frac=schedule(0.5), raise_frac=0.3, raise_above_nats=0.1)
    fracs = []
    for loss in (3.0, 2.0, 2.05, 2.2, 2.0, 2.5, 3.0):
        rollouts.validated(loss)
        fracs.append(rollouts.frac(0.0))
    assert fracs == pytest.approx([0.5, 0.5, 0.5, 0.8, 0.8, 1.0, 1.0])


def test_sampling_leaves_no_trace_but_the_batch(shard: Shard, codec: TextCodec):
    student, batch = network(codec, 1, dropout_frac=0.5), batch_of(shard)
    before = torch.get_rng_state()
    twice = [rollouts_of(student, codec).replace(batch, step=7, progress=0.0, rank=0)[0] for _ in range(2)]
    assert same(*twice)  # no dropout while sampling
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in student.modules())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not same(twice[0], rollouts_of(student, codec).replace(batch, step=8, progress=0.0, rank=0)[0])
    assert not same(twice[0], rollouts_of(student, codec).replace(batch, step=7, progress=0.0, rank=1)[0])
    assert not same(twice[0], rollouts_of(student, codec, seed=1).replace(batch, step=7, progress=0.0, rank=0)[0])


def test_weights_are_trained_though_autocast_saw_them_while_sampling(shard: Shard, codec: TextCodec):
    student, batch = network(codec, 1), batch_of(shard)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        laid, _ = rollouts_of(student, codec).replace(batch, step=0, progress=0.0, rank=0)
        outputs = student(input_ids=laid["source_ids_RS"], decoder_input_ids=laid["decoder_ids_RT"])
        outputs.logits.square().mean().backward()
    assert all(p.grad is not None for name, p in student.named_parameters() if p.ndim == 2)


def test_constrained_rollouts_are_calls_of_the_tools_in_the_prompt(shard: Shard, codec: TextCodec):
    rollouts = rollouts_of(network(codec, 1), codec, constrained=True, max_calls=2)
    laid, _ = rollouts.replace(batch_of(shard), step=0, progress=0.0, rank=0)
    answers = [codec.decode(request.target) for request in unpack(laid)]
    called = {call["name"] for text in answers for call in json.loads(text)}
    assert called == {"timer", "lamp"}
    record = rollouts.record()
    assert (record["rollout_valid_frac"], record["rollout_unread_count"]) == (1.0, 0)


# The buffer.


def made(step: int, number: int = 0) -> Rollout:
    target = np.array([7 + number, 9, EOS])
    return Rollout(np.arange(5 + number), target, np.array([0, 3, 4]), 2, 2**60 + 1, 0.3, 0.1, step, True, False)


def test_the_buffer_keeps_the_newest_and_gives_none_that_is_too_old():
    buffer, rng = Buffer(examples=5, max_age_steps=3), np.random.default_rng(0)
    for step in range(10):
        buffer.add([made(step), made(step)])
        drawn = buffer.draw(100, step=step, rng=rng)
        assert len(drawn) == len(buffer) == min(5, 2 * (step + 1))
        assert {rollout.made_step for rollout in drawn} == set(range(max(0, step - 2), step + 1))
    assert {rollout.made_step for rollout in buffer.draw(100, step=11, rng=rng)} == {8, 9}
    assert {rollout.made_step for rollout in buffer.draw(100, step=12, rng=rng)} == {9}
    assert buffer.draw(100, step=13, rng=rng) == []
    assert len(buffer) == 0


def test_the_buffer_draws_uniformly_without_repeating():
    buffer, rng = Buffer(examples=10, max_age_steps=1), np.random.default_rng(0)
    buffer.add(made(0, number) for number in range(10))
    counts = np.zeros(10)
    for _ in range(2000):
        drawn = [len(rollout.source) - 5 for rollout in buffer.draw(3, step=0, rng=rng)]
        assert len(set(drawn)) == 3
        counts[drawn] += 1
    # 600 each, standard deviation 20.5.
    assert np.abs(counts - 600).max() < 5 * 20.5


def test_the_state_survives_a_checkpoint_on_disk(codec: TextCodec, tmp_path: Path):
    one, other = (rollouts_of(nn.Identity(), codec, buffer_examples=9) for _ in range(2))
    one.buffer.add(made(step, step) for step in range(4))
    one.validated(2.5)
    one.generated_tokens, one.raised_frac = 123, 0.25
    torch.save(one.state(), tmp_path / "state")
    other.load(torch.load(tmp_path / "state", weights_only=True))
    drawn = [rollouts.buffer.draw(9, step=4, rng=np.random.default_rng(1)) for rollouts in (one, other)]
    for a, b in zip(*drawn, strict=True):
        assert known(a) == known(b)
        assert (a.made_step, a.spans.tolist(), a.valid, a.exact) == (b.made_step, b.spans.tolist(), b.valid, b.exact)
    assert (other.validation_nats, other.generated_tokens, other.raised_frac) == (2.5, 123, 0.25)
    other.load(rollouts_of(nn.Identity(), codec).state())
    assert len(other.buffer) == 0


def test_a_replayed_step_reuses_young_answers_and_fills_up_with_fresh_ones(shard: Shard, codec: TextCodec):
    student, batch = network(codec, 1), batch_of(shard)
    rollouts = rollouts_of(student, codec, source="replay", refresh_frac=schedule(0.0), max_age_steps=3)
    count = len(unpack(batch))
    first, _ = rollouts.replace(batch, step=0, progress=0.0, rank=0)
    generated = rollouts.generated_tokens
    assert len(rollouts.buffer) == count
    second, _ = rollouts.replace(batch, step=3, progress=0.0, rank=0)
    assert sorted(map(known, unpack(second))) == sorted(map(known, unpack(first)))
    assert rollouts.generated_tokens == generated
    assert rollouts.record()["rollout_age_steps"] == pytest.approx(1.5)
    rollouts.replace(batch, step=4, progress=0.0, rank=0)
    assert rollouts.generated_tokens > generated
    # Half of them are missing: fresh answers to this step's requests take their place.
    rollouts.buffer.load(rollouts_of(student, codec).state()["buffer"])
    rollouts.buffer.add([made(4)] * (count // 2))
    mixed, _ = rollouts.replace(batch, step=5, progress=0.0, rank=0)
    sources = [request.source.tolist() for request in unpack(mixed)]
    assert len(sources) == count
    assert sum(source == made(4).source.tolist() for source in sources) == count // 2


# What is learnt.


def objective_of(loss_name: str, teacher: nn.Module | None, *, share: float, **changes) -> Objective:
    node = OmegaConf.load(config.CONF / f"loss/{loss_name}.yaml")
    mixing = Mixing(shape="constant", start=share, end=share, begin_frac=0.0, end_frac=1.0)
    weighting = config.build(OmegaConf.load(config.CONF / "weighting/uniform.yaml"))
    return Objective(
        loss=config.build(OmegaConf.merge(node, changes)),
        mixing=mixing,
        weighting=weighting,
        balance=Fixed(),
        auxiliaries={},
        student=nn.Identity(),
        teacher=teacher,
    )


@pytest.mark.parametrize("distribution", ["top_k", "full"])
@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_teacher_that_is_the_student_has_nothing_to_say_of_its_answers(
    shard: Shard, codec: TextCodec, loss: str, distribution: str
):
    student = network(codec, 1)
    teacher = copy.deepcopy(student).eval()
    scorer = Scorer(teacher, top_k=8, temperature=2.0) if distribution == "top_k" else None
    objective = objective_of(loss, None if scorer else teacher, share=0.5, distribution=distribution, temperature=2.0)
    laid, _ = rollouts_of(student, codec, scorer=scorer).replace(batch_of(shard), step=0, progress=0.0, rank=0)
    measured = objective.measure(laid, student=student, progress=torch.tensor(0.0), share=1.0)
    assert measured.nats_RT.abs().max() < 1e-5
    assert measured.label_nats_RT.max() > 1


@pytest.mark.parametrize("distribution", ["top_k", "full"])
def test_what_the_labels_are_does_not_reach_the_gradient(shard: Shard, codec: TextCodec, distribution: str):
    student, teacher = network(codec, 1), network(codec, 2).eval()
    scorer = Scorer(teacher, top_k=8, temperature=1.0) if distribution == "top_k" else None
    objective = objective_of("reverse_kl", None if scorer else teacher, share=0.5, distribution=distribution)
    laid, _ = rollouts_of(student, codec, scorer=scorer).replace(batch_of(shard), step=0, progress=0.0, rank=0)
    gradients = []
    for shift in (0, 17):
        labels = laid["labels_RT"]
        changed = {**laid, "labels_RT": torch.where(labels == IGNORE, IGNORE, (labels + shift) % codec.vocab_size)}
        sums = objective.measure(changed, student=student, progress=torch.tensor(0.0), share=1.0).sums
        gradients.append(torch.autograd.grad(sums[TOKENS], list(student.parameters()), allow_unused=True))
    assert any(g is not None and g.abs().max() > 0 for g in gradients[0])
    assert all(a is b or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_where_a_scoring_teacher_is_silent_no_label_speaks(shard: Shard, codec: TextCodec):
    student, teacher = network(codec, 1), network(codec, 2).eval()

    class HalfSilent(nn.Module):
        def forward(self, **inputs: Tensor) -> SimpleNamespace:
            logits = teacher(**inputs).logits.clone()
            logits[:, ::2] = torch.nan
            return SimpleNamespace(logits=logits)

    scorer = Scorer(HalfSilent(), top_k=8, temperature=1.0)
    laid, _ = rollouts_of(student, codec, scorer=scorer).replace(batch_of(shard), step=0, progress=0.0, rank=0)
    assert (laid["labels_RT"][:, ::2] == IGNORE).all()
    assert (laid["labels_RT"][:, 1::2] != IGNORE).any()
    assert (objective_of("forward_kl", None, share=1.0).weighting(**laid)[:, ::2] == 0).all()


def test_the_scorer_stores_the_teachers_tempered_distribution(shard: Shard, codec: TextCodec):
    teacher, batch = network(codec, 2).eval(), batch_of(shard)
    scored = Scorer(teacher, top_k=5, temperature=3.0)(batch)
    first = unpack(batch)[0]
    fed = torch.tensor([[BOS, *first.target[:-1]]])
    with torch.no_grad():
        logits = teacher(input_ids=torch.tensor(first.source)[None], decoder_input_ids=fed).logits[0]
    expected = (logits / 3.0).log_softmax(-1).topk(5)
    length = len(first.target)
    assert torch.allclose(scored["teacher_log_probs_RTK"][0, :length], expected.values, atol=1e-5)
    assert torch.allclose(logits.gather(1, scored["teacher_ids_RTK"][0, :length]), logits.gather(1, expected.indices))
    assert torch.equal(scored["labels_RT"], batch["labels_RT"])


# A training.

TRAINER = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true", "threads": None}
TRAINER |= {"compile": False, "steps": 8, "rows_per_batch": 3, "rows_per_micro_batch": 1, "grad_clip_norm": 1.0}
TRAINER |= {"validate_every_steps": 100, "checkpoint_every_steps": 100, "log_every_steps": 1}


class Training:
    """Eight steps of a run, or a part of them."""

    def __init__(self, shard: Shard, codec: TextCodec, folder: Path, *, share: float = 0.5, teacher_seed: int = 2):
        self.shard, self.codec, self.run = shard, codec, Run(folder)
        self.share, self.teacher_seed = share, teacher_seed
        folder.mkdir()

    def fit(self, *, steps: int, begin: int = 0, save: Path | None = None, checkpoint: Path | None = None, **changes):
        student = network(self.codec, 1, dropout_frac=0.2 if self.teacher_seed != 1 else 0.0)
        teacher = network(self.codec, self.teacher_seed).eval()
        objective = objective_of("reverse_kl", teacher, share=self.share, distribution="full")
        rollouts = rollouts_of(student, self.codec, **changes) if changes else None
        optim = config.build(OmegaConf.load(config.CONF / "optim/muon_adamw.yaml"))
        module = Distillation(
            student=student.train(),
            objective=objective,
            optim=replace(optim, muon_lr=None, warmup_steps=0),
            settings=TrainerSettings(**TRAINER),
            run=self.run,
            rollouts=rollouts,
        )
        stream = PackedBatches(self.shard, rows_per_batch=3, window_examples=24, seed=0, **ROW)
        stream.start_at(begin)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(**quiet, accelerator="cpu", max_steps=steps, max_epochs=-1, enable_model_summary=False)
        torch.manual_seed(3)
        trainer.fit(module, stream, ckpt_path=checkpoint, weights_only=True)
        if save is not None:
            trainer.save_checkpoint(save)
        return self.run.history()


def values(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "time_s"} for record in history]


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_makes_the_same_answers_and_learns_the_same(shard: Shard, codec: TextCodec, tmp_path: Path):
    # This seed: two off-policy steps, fresh answers, four replays over which the run is cut, fresh ones.
    changes = {"seed": 7, "frac": schedule(0.7), "source": "replay", "refresh_frac": schedule(0.4)}
    whole = values(Training(shard, codec, tmp_path / "whole").fit(steps=8, **changes))
    parts = Training(shard, codec, tmp_path / "parts")
    parts.fit(steps=5, save=tmp_path / "at5", **changes)
    resumed = values(parts.fit(steps=8, begin=5, checkpoint=tmp_path / "at5", **changes))
    assert [record["step"] for record in whole] == list(range(1, 9))
    assert resumed == whole
    kinds = {record["train/rollout"] for record in whole}
    assert kinds == {0.0, 1.0}
    assert any(record.get("train/rollout_age_steps", 0) > 0 for record in whole[5:])
    assert all(("train/label_nats" in record) == (record["train/rollout"] == 0) for record in whole)


@pytest.mark.filterwarnings("ignore")
def test_a_frac_of_zero_trains_bit_for_bit_as_without(shard: Shard, codec: TextCodec, tmp_path: Path):
    plain = values(Training(shard, codec, tmp_path / "plain").fit(steps=3))
    zero = values(Training(shard, codec, tmp_path / "zero").fit(steps=3, frac=schedule(0.0)))
    told = {"train/rollout", "train/rollout_frac", "train/rollout_generated_tokens", "train/rollout_read_tokens"}
    assert all(record[name] == 0 for record in zero for name in told)
    assert [{k: v for k, v in record.items() if k not in told} for record in zero] == plain


@pytest.mark.filterwarnings("ignore")
def test_on_policy_steps_force_the_share_of_labels_to_none(shard: Shard, codec: TextCodec, tmp_path: Path):
    """Everything is left to labels off-policy; a teacher that is the student then has nothing to teach on-policy."""
    training = Training(shard, codec, tmp_path / "own", share=0.0, teacher_seed=1)
    (record,) = training.fit(steps=1, frac=schedule(1.0))
    assert record["train/mixing_share"] == 1.0
    assert abs(record["train/loss_nats"]) < 1e-5
    assert record["train/grad_norm"] < 1e-3
    (labels,) = Training(shard, codec, tmp_path / "labels", share=0.0, teacher_seed=1).fit(steps=1)
    assert labels["train/mixing_share"] == 0.0
    assert labels["train/grad_norm"] > 0.1


# What is refused.


@pytest.mark.parametrize(
    ("teacher", "loss", "changes", "words"),
    [
        (RecordedTeacher, "reverse_kl", {}, ["RecordedTeacher", "live", "teacher=checkpoint", "rollouts=off"]),
        (TransformersTeacher, "uld", {}, ["TransformersTeacher", "live", "teacher=checkpoint"]),
        (CheckpointTeacher, "hard_label", {}, ["HardLabel", "loss=reverse_kl", "rollouts=off"]),
        (CheckpointTeacher, "expected_cross_entropy", {}, ["ExpectedCrossEntropy", "samples", "reverse_kl"]),
        (CheckpointTeacher, "reverse_kl", {"max_new_tokens": 49}, ["max_new_tokens=49", "48"]),
    ],
)
def test_what_cannot_be_scored_is_refused_with_legal_routes(teacher, loss: str, changes: dict, words: list[str]):
    asked = {
        "teacher": object.__new__(teacher),
        "loss": config.build(OmegaConf.load(config.CONF / f"loss/{loss}.yaml")),
        "target_row_tokens": 48,
    }
    with pytest.raises(ConfigError) as told:
        check_legal(settings=replace(ON, **changes), **asked)
    for word in words:
        assert word in str(told.value)
    check_legal(settings=settings_of("off", **changes), **asked)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jensen_shannon", "taid"])
@pytest.mark.parametrize("distribution", ["top_k", "full"])
def test_losses_over_distributions_are_legal(loss: str, distribution: str):
    built = objective_of(loss, None, share=1.0, distribution=distribution).loss
    check_legal(settings=ON, teacher=object.__new__(CheckpointTeacher), loss=built, target_row_tokens=48)


def test_train_checks_the_rule_while_it_is_composed():
    from needle import train

    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("train", ["rollouts=on_policy", "teacher=checkpoint"])
    with pytest.raises(ConfigError, match="HardLabel learns from answers"):
        config.build_settings(OmegaConf.to_container(cfg, resolve=True), train.main.stage_function)


@pytest.mark.parametrize("name", ["frac", "refresh_frac"])
def test_a_probability_above_one_is_refused(name: str):
    with pytest.raises(ValueError, match=rf"{name}\.start=1\.5"):
        replace(ON, **{name: schedule(1.5)})
