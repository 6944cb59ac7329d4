"""A teacher with its own tokens teaches token by token: from the purchase over the real client to the student."""

# R rows, T target tokens, V vocabulary, K stored tokens

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from running import running
from torch import Tensor

from needle import config, generate, prepare, signals, train
from needle.corpus import catalogue
from needle.corpus.labelling import label_calls
from needle.data.packing import collate, network_inputs, pack
from needle.data.shards import Shard
from needle.errors import ConfigError, DataError
from needle.loss import ULD, ForwardKL
from needle.loss.objective import covered
from needle.schema import Example, Tool, ToolCall
from needle.student import SANConfig, SANForConditionalGeneration
from needle.teacher.aligned import Alignment, Rows, ScoredAnswers, Told, Varied, answer_text, check_alignment
from needle.teacher.answer_formats import read_calls
from needle.teacher.base import TeacherReply
from needle.teacher.gemini import GeminiTeacher
from needle.teacher.ledger import Entry, Ledger
from needle.text.render import Span
from needle.text.tokenizer import TextCodec, train_tokenizer

REQUESTS, TOP = 40, 3
RECORDED = Path(__file__).resolve().parents[2] / "data" / "teacher_corpus"
BYTES = Alignment(method="bytes", top_k=8, alternatives=4, piece_ends="known")


def run_stage(stage: Any, name: str, *overrides: str) -> None:
    """As `python -m needle.STAGE` does, in this process."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose(name, list(overrides)), resolve=True)
    built = config.build_settings(plain, stage.main.stage_function)
    stage.main.stage_function({**plain, "_choices_": {}, "_overrides_": []}, **built)


def built_teacher(*overrides: str) -> Any:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config.build(compose("generate", list(overrides)).teacher)


def buy(teacher: GeminiTeacher, ledger: Path, corpus: Path) -> list[TeacherReply]:
    """Labels of training requests, asked over the real client and stored as the buyer stores them."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("generate")
    rule, found = config.build(cfg.data.split), catalogue.load(corpus)
    asked = [example for example in found.examples if rule.assign(example) == "train"][:REQUESTS]
    calls = list(label_calls(teacher, asked, found.tools, samples=1, instruction=cfg.label_instruction))

    async def ask() -> list[TeacherReply]:
        connection = teacher.connect()
        try:
            return await asyncio.gather(*map(connection.ask, calls))
        finally:
            await connection.close()

    replies, stored = asyncio.run(ask()), Ledger(ledger)
    with stored.transaction():
        for call, reply in zip(calls, replies, strict=True):
            stored.store(Entry(call.key(), call, reply, "test", "2026-01-01T00:00:00Z"))
    stored.close()
    return replies


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Bought, prepared and aligned: generate, prepare, signals."""
    folder = tmp_path_factory.mktemp("aligned")
    (folder / "recorded").mkdir()
    for name in ("timers_alarms.jsonl", "timers_alarms.tools.json"):
        (folder / "recorded" / name).write_bytes((RECORDED / name).read_bytes())
    paths = [f"paths.{name}={folder / name}" for name in ("artifacts", "runs")] + [f"paths.ledger={folder / 'ledger'}"]
    asked = ["teacher=gemini", "teacher.model=gemini-2.5-flash", f"teacher.response_logprobs={TOP}"]
    data = ["data=aligned", "data.text.vocab_size=420", "data.copies_per_request=2", "data.augment.tools_max=2"]
    data += [
        "data.augment.drop_description=1.0",
        "data.text.max_target_tokens=160",
        "data.packing.target_row_tokens=160",
    ]
    with pytest.MonkeyPatch.context() as patch, running("gemini_server.py") as server:
        patch.setenv("GEMINI_API_KEY", "any")
        asked.append(f"teacher.base_url={server.url}")
        replies = buy(built_teacher(*asked), folder / "ledger", folder / "recorded")
    corpus = f"data.corpus={folder / 'recorded'}"
    run_stage(generate, "generate", *asked, *paths, corpus, "role=label", f"role.limit={REQUESTS}", "buy=false")
    (bought,) = (folder / "artifacts").glob("corpus-*")
    data.append(f"data.corpus={bought}")
    run_stage(prepare, "prepare", *data, *paths, "workers=1")
    run_stage(signals, "signals", *asked, *data, *paths, "alignment.top_k=8")
    (shards,), (stored,) = (folder / "artifacts").glob("shards-*"), (folder / "artifacts").glob("signals-*")
    given = {"asked": asked, "data": data, "paths": paths, "replies": replies}
    return SimpleNamespace(shards=shards, signals=stored, folder=folder, **given)


def test_the_stored_distributions_are_the_servers(chain: SimpleNamespace):
    """At every tool name: its first token has the probability that the server gave the name as one piece; the further
    ones that of the name among what the server may have meant that begins so."""
    shard, codec = Shard.open(chain.shards / "train", chain.signals / "train"), TextCodec.load(chain.shards)
    assert shard.signals is not None
    expected: dict[bytes, set[tuple[float, float]]] = {}
    for reply in chain.replies:
        result = reply.raw["candidates"][0]["logprobsResult"]
        for one, top in zip(result["chosenCandidates"], result["topCandidates"], strict=True):
            own = math.exp(one["logProbability"])
            untold = 1 - sum(math.exp(other["logProbability"]) for other in top["candidates"])
            expected.setdefault(one["token"].encode(), set()).add((own, own / (own + untold)))
    names = 0
    for index in range(len(shard)):
        place = slice(*shard.target_offsets[index : index + 2])
        ids, spans = shard.target[place], shard.spans[place]
        if (spans == Span.NAME).sum() < 2 or (np.diff(np.flatnonzero(spans == Span.NAME)) > 1).any():
            continue  # one call is enough to be sure where its name begins
        stored, log_probs = shard.signals.ids_XK[place], shard.signals.log_probs_XK[place]
        own = np.where(stored == ids[:, None], np.exp(log_probs.astype(np.float64)), 0).sum(axis=1)[spans == Span.NAME]
        name = codec.tokenizer.decode(ids[spans == Span.NAME].tolist()).encode()
        assert any(
            np.allclose(own, [first, *[further] * (len(own) - 1)], atol=1e-6) for first, further in expected[name]
        )
        names += 1
    assert names >= 20
    masses = np.exp(shard.signals.log_probs_XK.astype(np.float64)).sum(axis=1)
    assert masses.max() <= 1 + 1e-6


def test_every_span_but_structure_is_covered_and_told_of(chain: SimpleNamespace):
    counts = prepare.artifacts.require(chain.signals, kind="signals", command="")["counts"]
    told = counts["train"]
    assert told["structure"]["covered_frac"] == told["stop"]["covered_frac"] == 0.0
    assert all(told[span]["covered_frac"] == 1.0 for span in ("name", "key"))
    assert told["value"]["covered_frac"] > 0.9
    for span in ("name", "key", "value"):
        of_span = told[span]
        total = of_span["aligned_mass"] + of_span["unaligned_mass"] + of_span["untold_mass"]
        assert total == pytest.approx(1.0, abs=1e-5)
        assert 0.5 < of_span["label_prob"] <= of_span["aligned_mass"]
    # The recorded answers that evaluate were not bought.
    assert counts["validation"]["all"]["covered_frac"] == 0.0


def test_a_student_learns_from_them(chain: SimpleNamespace):
    torch.manual_seed(0)
    shard, codec = Shard.open(chain.shards / "train", chain.signals / "train"), TextCodec.load(chain.shards)
    shape = {"source_row_tokens": 512, "target_row_tokens": 160}
    batch = collate(shard, pack(shard.source_lengths_N[:8], shard.target_lengths_N[:8], **shape), **shape)
    sizes = {"width": 32, "heads": 4, "kv_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "copy_width": 8}
    student = SANForConditionalGeneration(SANConfig(vocab_size=codec.vocab_size, **sizes))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    told_RT, loss = covered(batch["teacher_log_probs_RTK"]), ForwardKL(temperature=1.0, **_plain(ForwardKL))
    nats = []
    for _ in range(12):
        optimizer.zero_grad()
        logits = student(**network_inputs(batch)).logits
        mean = loss(student_logits_RTV=logits, progress=torch.tensor(0.0), **batch)[told_RT].mean()
        mean.backward()
        optimizer.step()
        nats.append(mean.item())
    assert told_RT.any()
    assert nats[-1] < 0.6 * nats[0]
    assert nats[0] < 10


def _plain(loss: type) -> dict[str, Any]:
    """What else conf/loss states of a loss, as it is there."""
    node = OmegaConf.to_container(OmegaConf.load(config.CONF / "loss/forward_kl.yaml"))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items() if key not in ("_target_", "temperature")}


def test_signals_by_index_are_for_uld_alone(chain: SimpleNamespace):
    run_stage(
        signals, "signals", *chain.asked, *chain.data, *chain.paths, "alignment=index", "alignment.top_k=8"
    )  # beside the others: another folder
    (folder,) = set((chain.folder / "artifacts").glob("signals-*")) - {chain.signals}
    shard = Shard.open(chain.shards / "train", folder / "train")
    assert shard.signals is not None
    probs = np.exp(shard.signals.log_probs_XK.astype(np.float64))
    assert (np.diff(probs, axis=1) <= 0).all()
    assert (probs[shard.target_offsets[:-1]].sum(axis=1) > 0.5).any()
    index = replace(BYTES, method="index")
    teacher = built_teacher(*chain.asked)
    check_alignment(loss=ULD(temperature=1.0), teacher=teacher, alignment=index)
    check_alignment(loss=ULD(temperature=1.0), teacher=teacher, alignment=BYTES)
    kl = ForwardKL(temperature=1.0, **_plain(ForwardKL))
    check_alignment(loss=kl, teacher=teacher, alignment=BYTES)
    with pytest.raises(ConfigError, match="only loss=uld can read; use alignment=bytes"):
        check_alignment(loss=kl, teacher=teacher, alignment=index)


def test_log_probabilities_that_were_not_bought_are_told_with_the_way_out(chain: SimpleNamespace):
    asked = [*chain.asked, "teacher.response_logprobs=0"]
    with pytest.raises(DataError, match=r"no answer of gemini.*teacher\.response_logprobs=5"):
        run_stage(signals, "signals", *asked, *chain.data, *chain.paths)
    with pytest.raises(ConfigError, match="no probabilities of tokens; use teacher=checkpoint"):
        run_stage(signals, "signals", "teacher=recorded", *chain.data, *chain.paths)


def test_train_asks_for_the_folder_that_signals_wrote(chain: SimpleNamespace):
    """The stages name it alike; a temperature that was not stored is refused."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        overrides = [*chain.asked, *chain.data, *chain.paths, "loss=forward_kl", "alignment.top_k=8"]
        plain: Any = OmegaConf.to_container(compose("train", overrides), resolve=True)
    built = config.build_settings(plain, train.main.stage_function)
    where = {"artifacts": built["paths"].artifacts, "shards": chain.shards}
    assert train.signals_folder(built["teacher"], alignment=built["alignment"], **where) == chain.signals
    plain["loss"]["temperature"] = 2.0
    with pytest.raises(ConfigError, match=r"stored at temperature 1\.0; set loss\.temperature=1\.0"):
        config.build_settings(plain, train.main.stage_function)


# ---- a model that is run here

TOOL = Tool("set_timer", "", {"properties": {"label": {"type": "string"}, "minutes": {"type": "integer"}}})
CALLS = (ToolCall("set_timer", {"minutes": 10, "label": "green tea"}), ToolCall("set_timer", {"label": 'a "b" \u00e9'}))


@pytest.mark.parametrize("answer_format", ["hermes", "json_list", "llama", "pythonic"])
def test_answers_are_written_as_they_are_read(answer_format: Any):
    text = answer_text(CALLS, answer_format)
    read = read_calls(text, answer_format=answer_format, tool_names=["set_timer"])
    assert tuple(map(ToolCall.from_dict, read)) == CALLS


class ByteModel:
    """A model over bytes that knows the answer with certainty `sure`, as LocalModel tells it."""

    name, sure = "bytes@1", 0.9
    tokenizer = range(256)
    bytes_of = SimpleNamespace(decode_bytes=lambda ids: bytes(ids))

    def log_probs(self, answers: list[tuple[Any, str]], *, top_k: int, with_stop: bool) -> list[Any]:
        scored = []
        for _, text in answers:
            ids = np.array([*text.encode()])
            others = (ids[:, None] + np.arange(1, top_k)) % 128
            rest = np.full(others.shape, math.log((1 - self.sure) / 127))
            own = np.full(len(ids), math.log(self.sure))
            alike = {"ids_TK": np.c_[ids, others], "log_probs_TK": np.c_[own, rest]}
            scored.append(
                SimpleNamespace(tokens=tuple(bytes([i]) for i in ids), token_ids_T=ids, log_probs_T=own, **alike)
            )
        return scored


def test_a_model_scores_every_varied_example_itself():
    """Over bytes, a token's label probability is the product over its bytes, but for what is known to go on."""
    codec = TextCodec(train_tokenizer([" green tea set_timer label minutes"] * 4, vocab_size=380), "signature")
    settings = {"load": ByteModel, "answer_format": "hermes", "label_call": lambda **question: question}
    answers = ScoredAnswers(SimpleNamespace(**settings), alternatives=4)
    example = Example("a-0", "tea for ten", (TOOL,), CALLS[:1], "single")
    ((varied, told),) = answers.of(iter([Varied(example, replace(example, id="a"))]))
    assert told is not None
    ids, rows = Rows(codec, BYTES, known=answers.vocabulary()).of(varied, told)
    target, spans = codec.encode_target(example.calls, example.tools)
    assert ids == target
    texts = [codec.tokenizer.decode([token]) for token in ids]
    for token, text, span, row in zip(ids, texts, spans, rows, strict=True):
        assert (row is None) == (span in (Span.STRUCTURE, Span.STOP))
        if row is not None:
            length = len(text.encode()) - (text == " green")  # whose space the teacher does not write
            assert ByteModel.sure**length * 0.9 < row.masses[token] <= ByteModel.sure**length + 1e-9
    changed = replace(example, calls=(ToolCall("set_timer", {"minutes": 10, "label": "black tea"}),))
    _, rows = Rows(codec, BYTES, known=frozenset()).of(Varied(changed, example), Told(example.calls, told.log_probs))
    spelled = [(row is not None) for row in rows]
    values = [place for place, span in enumerate(codec.encode_target(changed.calls, changed.tools)[1]) if span == 3]
    # The number is as it was, the exchanged text is not.
    assert [spelled[place] for place in values].count(True) == 2
    assert not spelled[values[0]]


# ---- ULD


def distributions(*shape: int, seed: int) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)


def uld(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, labels: Tensor | None = None) -> Tensor:
    given = torch.zeros(student.shape[:2], dtype=torch.long) if labels is None else labels
    return ULD(temperature=temperature)(
        student_logits_RTV=student.log() * temperature, labels_RT=given, teacher_log_probs_RTK=teacher.log()
    )


def test_uld_by_hand():
    student = torch.tensor([[[0.1, 0.6, 0.3]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.5, 0.25, 0.15, 0.1]]], dtype=torch.float64)
    # Sorted: (0.6, 0.3, 0.1, 0) against (0.5, 0.25, 0.15, 0.1).
    assert uld(student, teacher).item() == pytest.approx(0.1 + 0.05 + 0.05 + 0.1)
    # Two stored: (0.6, 0.3 | 0.1) against (0.5, 0.25 | 0.25).
    assert uld(student, teacher[..., :2]).item() == pytest.approx(0.1 + 0.05 + 0.15)
    assert uld(student, teacher, labels=torch.tensor([[-100]])).item() == 0.0


def test_uld_looks_at_ranks_alone_and_rises_to_the_full_distance():
    student, teacher = distributions(2, 5, 11, seed=0), distributions(2, 5, 11, seed=1).sort(descending=True).values
    shuffled = student[..., torch.randperm(11, generator=torch.Generator().manual_seed(3))]
    assert torch.allclose(uld(shuffled, teacher), uld(student, teacher), atol=1e-12)
    assert uld(teacher, teacher).abs().max() < 1e-12
    by_k = torch.stack([uld(student, teacher[..., :k]) for k in range(1, 12)])
    assert (by_k.diff(dim=0) >= -1e-12).all()
    full = (student.sort(descending=True).values - teacher).abs().sum(-1)
    assert torch.allclose(by_k[-1], full, atol=1e-12)


def test_uld_gradient():
    logits = distributions(1, 3, 7, seed=4).log().requires_grad_()
    teacher = distributions(1, 3, 4, seed=5).mul(0.9).sort(descending=True).values.log()
    labels = torch.zeros(1, 3, dtype=torch.long)

    def loss(logits_RTV: Tensor, temperature: float) -> Tensor:
        return ULD(temperature=temperature)(
            student_logits_RTV=logits_RTV, labels_RT=labels, teacher_log_probs_RTK=teacher
        )

    assert torch.autograd.gradcheck(lambda x: loss(x, 2.0), logits)
    # Once hot enough to be flat, the size of the gradient no longer depends on the temperature.
    sizes = [torch.autograd.grad(loss(logits, t).sum(), logits)[0].norm() for t in (50.0, 100.0)]
    assert (sizes[0] / sizes[1]).item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("teacher", [[0.0, -math.inf], [-math.inf, -math.inf], [-200.0, -300.0]])
@pytest.mark.parametrize("student", [[1e30, 0.0, 0.0], [-math.inf, 0.0, -math.inf], [0.0, 0.0, 0.0]])
def test_uld_is_finite_at_the_extremes(teacher: list[float], student: list[float]):
    logits = torch.tensor([[student]]).requires_grad_()
    value = ULD(temperature=1.0)(
        student_logits_RTV=logits,
        labels_RT=torch.zeros(1, 1, dtype=torch.long),
        teacher_log_probs_RTK=torch.tensor([[teacher]]),
    )
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert 0 <= value.item() <= 2 + 1e-6
