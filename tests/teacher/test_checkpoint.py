"""A checkpoint as teacher: what it stores is what it would say of each example alone, what it answers is what the
decoder gives."""

# T target tokens, V vocabulary, K stored tokens

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from needle import config
from needle.data.packing import collate
from needle.data.shards import About, Shard, ShardWriter
from needle.decode import Decoder
from needle.errors import ConfigError, DataError
from needle.loss import ForwardKL
from needle.schema import Tool
from needle.student import SANConfig, SANForConditionalGeneration, load, save
from needle.teacher.base import FatalError, TeacherCall, TeacherReply
from needle.teacher.checkpoint import CheckpointTeacher
from needle.text.tokenizer import EOS, QUERY, TOOLS, TextCodec, train_tokenizer

PIECES = 310
K = 5
ROWS = {"rows_per_batch": 2, "source_row_tokens": 60, "target_row_tokens": 30}


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(
        train_tokenizer(["set a timer for ten minutes and another for five minutes"] * 9, vocab_size=310), "signature"
    )


@pytest.fixture(scope="module")
def model(codec: TextCodec) -> SANForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"width": 32, "heads": 4, "kv_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "copy_width": 8}
    return SANForConditionalGeneration(SANConfig(vocab_size=codec.vocab_size, **sizes)).eval()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    rng = np.random.default_rng(0)
    writer = ShardWriter()
    for i in range(13):
        tools, query, target = (rng.integers(5, PIECES, size=rng.integers(2, 25)).tolist() for _ in range(3))
        about = About(kind=0, gold_tools=1, tools=1)
        writer.add(str(i), [TOOLS, *tools, QUERY, *query], [*target, EOS], [0] * (len(target) + 1), about)
    folder = tmp_path_factory.mktemp("shard") / "train"
    writer.save(folder)
    return Shard.open(folder)


@pytest.fixture
def folder(model: SANForConditionalGeneration, codec: TextCodec, tmp_path: Path) -> Path:
    """A training run's folder, as far as a teacher reads it."""
    save(model, codec, tmp_path / "run" / "model")
    return tmp_path / "run"


def teacher_of(folder: Path, **changes) -> CheckpointTeacher:
    node = OmegaConf.load(config.CONF / "teacher/checkpoint.yaml")
    return config.build(OmegaConf.merge(node, {"checkpoint": str(folder), "top_k": K, **changes}))


def alone(model: torch.nn.Module, shard: Shard, index: int, temperature: float) -> Tensor:
    """The tempered log-probabilities [T, V] of one example without packing or padding."""
    lengths = (int(shard.source_lengths_N[index]), int(shard.target_lengths_N[index]))
    batch = collate(shard, [[index]], source_row_tokens=lengths[0], target_row_tokens=lengths[1])
    with torch.no_grad():
        logits = model(input_ids=batch["source_ids_RS"], decoder_input_ids=batch["decoder_ids_RT"]).logits[0]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_stored_tokens_are_those_of_a_pass_over_each_example_alone(
    model: SANForConditionalGeneration, shard: Shard, tmp_path: Path, temperature: float
):
    teacher = teacher_of(tmp_path, temperature=temperature)
    reported: list[tuple[int, int]] = []
    ids_XK, log_probs_XK = teacher.top_log_probs(
        model, shard, **ROWS, progress=lambda done, total: reported.append((done, total))
    )
    assert (ids_XK.dtype, log_probs_XK.dtype) == (np.uint16, np.float32)
    assert ids_XK.shape == log_probs_XK.shape == (len(shard.target), K)
    assert (np.diff(log_probs_XK, axis=1) <= 0).all()
    masses = np.exp(log_probs_XK.astype(np.float64)).sum(axis=1)
    assert masses.max() <= 1 + 1e-6
    assert masses.min() > 0
    for index in range(len(shard)):
        place = slice(*shard.target_offsets[index : index + 2])
        expected_TV = alone(model, shard, index, temperature)
        ids_TK = torch.from_numpy(ids_XK[place].astype(np.int64))
        stored_TK = torch.from_numpy(log_probs_XK[place])
        assert torch.allclose(stored_TK, expected_TV.gather(-1, ids_TK), atol=1e-4)
        assert torch.allclose(stored_TK, expected_TV.topk(K).values, atol=1e-4)
        assert all(len(set(row)) == K for row in ids_TK.tolist())
    assert [done for done, _ in reported] == sorted({done for done, _ in reported})
    assert reported[-1][0] == reported[-1][1] > ROWS["rows_per_batch"]


def test_the_teacher_as_student_of_its_own_signals_has_no_divergence(
    model: SANForConditionalGeneration, shard: Shard, tmp_path: Path
):
    """Teacher, file layout, packing and loss fit together."""
    ids_XK, log_probs_XK = teacher_of(tmp_path).top_log_probs(model, shard, **ROWS, progress=lambda *_: None)
    loss = ForwardKL(temperature=1.0, distribution="top_k", chunk_tokens=None)
    for index in range(len(shard)):
        place = slice(*shard.target_offsets[index : index + 2])
        student = alone(model, shard, index, 1.0).unsqueeze(0)
        nats = loss(
            student_logits_RTV=student,
            labels_RT=student.argmax(dim=-1),
            teacher_ids_RTK=torch.from_numpy(ids_XK[place].astype(np.int64)).unsqueeze(0),
            teacher_log_probs_RTK=torch.from_numpy(log_probs_XK[place].copy()).unsqueeze(0),
        )
        assert nats.abs().max() < 1e-5


@pytest.mark.parametrize("top_k", [PIECES + 1, 65536])
def test_more_tokens_than_the_tokenizer_has_are_refused(
    model: SANForConditionalGeneration, shard: Shard, tmp_path: Path, top_k: int
):
    with pytest.raises(ConfigError, match=rf"teacher\.top_k={top_k}: .*{PIECES} pieces"):
        teacher_of(tmp_path, top_k=top_k).top_log_probs(model, shard, **ROWS, progress=lambda *_: None)


def test_a_teacher_is_a_run_or_a_students_folder(folder: Path):
    assert teacher_of(folder).model_folder() == teacher_of(folder / "model").model_folder() == folder / "model"
    assert teacher_of(folder).identity() == teacher_of(folder / "model").identity()


def test_signals_are_named_after_all_that_they_depend_on(
    folder: Path, model: SANForConditionalGeneration, codec: TextCodec
):
    artifacts, shards = Path("artifacts"), Path("artifacts/shards-1")

    def name(teacher: CheckpointTeacher, shards: Path = shards) -> str:
        return teacher.signals_folder(artifacts, shards).name

    names = [
        name(teacher_of(folder)),
        name(teacher_of(folder, top_k=K + 1)),
        name(teacher_of(folder, temperature=2.0)),
        name(teacher_of(folder), Path("artifacts/shards-2")),
    ]
    assert name(teacher_of(folder)) == names[0]
    with torch.no_grad():
        weight = model.norm.weight.clone()
        model.norm.weight += 0.01
        save(model, codec, folder / "model")
        model.norm.weight.copy_(weight)
    names.append(name(teacher_of(folder)))
    assert len(set(names)) == len(names)


def test_a_folder_without_weights_is_refused_with_what_to_do(tmp_path: Path):
    with pytest.raises(DataError, match=r"no model\.safetensors .*make teacher"):
        teacher_of(tmp_path / "nowhere").identity()


def test_shards_of_another_tokenizer_are_refused_with_what_to_do(folder: Path, codec: TextCodec, tmp_path: Path):
    same, other, none = (tmp_path / name for name in ("same", "other", "none"))
    for place in (same, other, none):
        place.mkdir()
    codec.save(same)
    TextCodec(train_tokenizer(["other words altogether"] * 9, vocab_size=300), "signature").save(other)
    teacher_of(folder).check_tokenizer(same)
    with pytest.raises(DataError, match=rf"another tokenizer.*data\.text\.tokenizer={folder / 'model'}"):
        teacher_of(folder).check_tokenizer(other)
    with pytest.raises(DataError, match=r"none/tokenizer\.json"):
        teacher_of(folder).check_tokenizer(none)


TIMER = Tool("timer", "Set a timer.", {"type": "object", "properties": {"minutes": {"type": "integer"}}})
LAMP = Tool("lamp", "Switch.", {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]})
REQUESTS = [
    ("set a timer for ten minutes", (TIMER,)),
    ("light", (LAMP, TIMER)),
    ("another for five minutes please", (TIMER, LAMP)),
    ("nothing at all", ()),
    ("ten", (LAMP,)),
]


def label(teacher: CheckpointTeacher, query: str, tools: Sequence[Tool], instruction: str = "") -> TeacherCall:
    return teacher.label_call(instruction=instruction, query=query, tools=tools, sample=0)


def ask(teacher: CheckpointTeacher, calls: Sequence[TeacherCall]) -> list[Any]:
    async def all_at_once() -> list[Any]:
        connection = teacher.connect()
        replies = await asyncio.gather(*map(connection.ask, calls), return_exceptions=True)
        await connection.close()
        return replies

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_it_answers_what_its_decoder_answers(folder: Path, batch_size: int):
    teacher = teacher_of(folder, batch_size=batch_size, max_new_tokens=60, max_calls=2)
    replies = ask(teacher, [label(teacher, *request) for request in REQUESTS])
    model, codec = load(folder / "model")
    decoded = Decoder(model, codec, constrained=True, max_new_tokens=60, max_calls=2).decode(REQUESTS)
    for request, reply, answer in zip(REQUESTS, replies, decoded, strict=True):
        assert isinstance(reply, TeacherReply), reply
        assert answer.calls is not None
        assert (reply.status, reply.text) == ("ok", answer.text)
        assert json.loads(json.dumps(reply.calls)) == [
            {"name": call.name, "arguments": call.arguments} for call in answer.calls
        ]
        assert (reply.prompt_tokens, reply.output_tokens) == (len(codec.encode_prompt(*request)), len(answer.token_ids))
        assert reply.raw["token_ids"] == answer.token_ids
        assert reply.raw["confidence"] == pytest.approx(answer.confidence, rel=1e-3)
        assert (reply.cost_usd, reply.model_version) == (0, teacher.student_identity())
    assert len({reply.text for reply in replies}) > 1


def test_samples_differ_and_do_not_depend_on_their_batch(folder: Path):
    def sampled(batch_size: int) -> list[Any]:
        teacher = teacher_of(folder, answer_temperature=1.0, batch_size=batch_size, max_new_tokens=60, max_calls=2)
        drawn = {"instruction": "", "query": REQUESTS[0][0], "tools": REQUESTS[0][1]}
        return ask(teacher, [teacher.label_call(**drawn, sample=number) for number in range(8)])

    replies = sampled(8)
    assert [reply.text for reply in replies] == [reply.text for reply in sampled(3)]
    assert len({reply.text for reply in replies}) > 1
    assert all(reply.status == "ok" for reply in replies)


def test_an_answer_without_end_is_truncated(folder: Path):
    teacher = teacher_of(folder, max_new_tokens=1)
    (reply,) = ask(teacher, [label(teacher, *REQUESTS[0])])
    assert (reply.status, reply.calls, reply.output_tokens) == ("truncated", None, 1)
    assert "max_new_tokens=1" in reply.reason


def test_what_cannot_be_asked_fails_alone(folder: Path):
    teacher = teacher_of(folder, max_source_tokens=60)
    too_long, answered = ask(teacher, [label(teacher, "ten minutes " * 30, ()), label(teacher, "ten", ())])
    assert isinstance(too_long, FatalError)
    assert "at most 60" in str(too_long)
    assert not too_long.every_call
    assert isinstance(answered, TeacherReply)


def test_a_call_to_other_weights_is_not_answered(folder: Path):
    """As when a run goes on between the question and the answer."""
    teacher = teacher_of(folder)
    (error,) = ask(teacher, [replace(label(teacher, *REQUESTS[0]), model="needle_san@000000000000")])
    assert isinstance(error, FatalError)
    assert error.every_call


def test_a_call_is_named_after_all_that_its_answer_depends_on(
    folder: Path, model: SANForConditionalGeneration, codec: TextCodec
):
    key = label(teacher_of(folder), *REQUESTS[0]).key()
    assert label(teacher_of(folder / "model"), *REQUESTS[0]).key() == key
    assert label(teacher_of(folder), *REQUESTS[0], instruction="A student reads none.").key() == key
    for same in ({"batch_size": 3}, {"top_k": 2}, {"temperature": 2.0}, {"traffic": {"concurrency": 1}}):
        assert label(teacher_of(folder, **same), *REQUESTS[0]).key() == key
    keys = [key, label(teacher_of(folder), *REQUESTS[1]).key()]
    own = ("max_new_tokens", "max_calls", "answer_temperature")
    keys += [label(teacher_of(folder, **{name: 7}), *REQUESTS[0]).key() for name in own]
    save(model, TextCodec(codec.tokenizer, "json"), folder / "model")
    keys.append(label(teacher_of(folder), *REQUESTS[0]).key())
    assert len(set(keys)) == len(keys)


def test_signals_do_not_depend_on_how_it_is_asked(folder: Path):
    asked = {"answer_temperature": 1.0, "max_new_tokens": 7, "max_calls": 1, "max_source_tokens": 9, "batch_size": 1}
    assert teacher_of(folder, **asked).identity() == teacher_of(folder).identity()


def test_what_a_student_cannot_do_is_refused_with_the_way_out(folder: Path, tmp_path: Path):
    teacher = teacher_of(folder)
    with pytest.raises(ConfigError, match=r"sample=1: .*teacher\.answer_temperature above 0"):
        teacher.label_call(instruction="", query="ten", tools=(), sample=1)
    with pytest.raises(ConfigError, match=r"cannot author.*teacher=transformers_local"):
        teacher.author_call(instruction="", prompt="Write.", answer_schema={}, sample=0)
    with pytest.raises(ConfigError, match=r"teacher\.device=warp cannot be used"):
        replace(teacher, device="warp").connect()
    with pytest.raises(DataError, match=r"no model\.safetensors .*make teacher"):
        label(teacher_of(tmp_path / "nowhere"), "ten", ())
