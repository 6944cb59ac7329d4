"""The retrieval head: a tool's and a request's vector are their own, tools are found by them, and the head is saved."""

# R rows, S source tokens, E retrieval width

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from torch import nn

from needle.config import CONF, build
from needle.errors import ConfigError
from needle.loss import Contrastive, Schedule
from needle.optim import OptimSettings
from needle.schema import Example, Tool, ToolCall
from needle.student import SANConfig, SANForConditionalGeneration, load, save
from needle.student.retrieval import (
    RetrievalHead,
    ToolIndex,
    embed,
    mean_pool,
    parts_of,
    recall_frac,
    request_ids,
    tool_ids,
)
from needle.text.render import render_query, render_tools
from needle.text.tokenizer import PAD, QUERY, TOOLS, TextCodec, train_tokenizer
from needle.train import _initial_student

WORDS = {
    "start_timer": ("counts down", ["wake me in ten minutes", "ten minutes on the clock", "eggs need eight minutes"]),
    "get_weather": ("says if it rains", ["will I get wet in Porto", "is Porto sunny", "umbrella or not"]),
    "play_song": ("sounds through speakers", ["some jazz please", "put Fado on", "louder jazz"]),
    "send_mail": ("writes to people", ["tell Chidi that I am late", "let Rosa know", "reply to Chidi"]),
    "turn_light": ("lamps on and off", ["it is dark here", "too bright", "dark in the hall"]),
}
PIECES = 330
SIZES = {"width": 32, "heads": 2, "kv_heads": 1, "encoder_layers": 2, "decoder_layers": 1, "copy_width": 8}


@pytest.fixture(scope="module")
def tools() -> list[Tool]:
    return [
        Tool(name, description, {"type": "object", "properties": {"what": {"type": "string"}}})
        for name, (description, _) in WORDS.items()
    ]


@pytest.fixture(scope="module")
def codec(tools: list[Tool]) -> TextCodec:
    texts = [render_tools(tools, style="signature"), *(render_query(q) for _, qs in WORDS.values() for q in qs)]
    return TextCodec(train_tokenizer(texts * 3, vocab_size=PIECES), "signature")


@pytest.fixture
def model(codec: TextCodec) -> SANForConditionalGeneration:
    return student(codec)


def student(codec: TextCodec, **changes) -> SANForConditionalGeneration:
    torch.manual_seed(0)
    settings = {**SIZES, "retrieval_width": 16, "lexical_match": True, "separator_id": codec.separator_id, **changes}
    return SANForConditionalGeneration(SANConfig(vocab_size=codec.vocab_size, **settings)).eval()


def packed(prompts: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of prompts as ids and segments, with padding behind."""
    longest = 3 + max(sum(map(len, row)) for row in prompts)
    ids, segments = torch.full((len(prompts), longest), PAD), torch.zeros((len(prompts), longest), dtype=torch.long)
    for r, row in enumerate(prompts):
        place = 0
        for segment, prompt in enumerate(row, 1):
            ids[r, place : place + len(prompt)] = torch.tensor(prompt)
            segments[r, place : place + len(prompt)] = segment
            place += len(prompt)
    return ids, segments


def test_parts_by_hand():
    """Two tools and a request, a prompt without tools, a prompt with one; 9 separates, 0 pads."""
    ids = torch.tensor([[TOOLS, 20, 21, 9, 22, QUERY, 23, TOOLS, QUERY, 24, TOOLS, 25, QUERY, 26, PAD, PAD]])
    segments = torch.tensor([[1] * 7 + [2] * 3 + [3] * 4 + [0, 0]])
    parts = parts_of(ids, segments, separator_id=9)
    assert parts.numbers_RS.tolist() == [[1, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7, 0, 0]]
    assert parts.opens_tool_RS.nonzero()[:, 1].tolist() == [0, 3, 10]
    assert parts.opens_request_RS.nonzero()[:, 1].tolist() == [5, 8, 12]
    assert parts.places_RS[0, [0, 3, 10]].tolist() == [0, 1, 0]
    assert parts.ids_RS[0, 3] == TOOLS
    assert torch.equal(parts.ids_RS[ids != 9], ids[ids != 9])


def test_mean_pool_by_hand():
    states = torch.tensor([[[1.0], [3.0], [5.0], [100.0]], [[7.0], [100.0], [100.0], [100.0]]])
    pooled = mean_pool(states, torch.tensor([[1, 1, 2, 0], [1, 0, 0, 0]]))
    assert pooled[:, 1:].squeeze(-1).tolist() == [[2.0, 5.0], [7.0, 0.0]]


def test_vectors_have_unit_length_and_gradients_reach_every_weight_of_the_head():
    torch.manual_seed(0)
    head = RetrievalHead(width=128, retrieval_width=6)
    head.start()
    vectors = head(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(64), atol=1e-6)
    assert head.scale().item() == pytest.approx(1 / 0.07, rel=1e-5)
    (head.scale() * vectors[:, 0]).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_the_scale_ends_at_a_hundred_and_can_come_back():
    head = RetrievalHead(width=16, retrieval_width=6).train()
    with torch.no_grad():
        head.log_scale.fill_(9.0)
    scale = head.scale()
    assert scale.item() == pytest.approx(100.0, rel=1e-5)
    scale.backward()
    assert head.log_scale.grad.item() == pytest.approx(100.0, rel=1e-5)


def test_a_vector_does_not_depend_on_what_it_was_packed_with(model, codec, tools):
    """Parts of packed prompts, in any place of a row, have the vectors of the same tool or request embedded alone."""
    queries = [WORDS[tool.name][1][0] for tool in tools]
    prompts = [
        [codec.encode_prompt(queries[0], tools[:3]), codec.encode_prompt(queries[1], [])],
        [codec.encode_prompt(queries[2], tools[2:4]), codec.encode_prompt(queries[3], [tools[4], tools[0]])],
    ]
    parts = parts_of(*packed(prompts), separator_id=codec.separator_id)
    with torch.no_grad():
        states = model.encoder(parts.ids_RS, source_segments_BS=parts.numbers_RS).last_hidden_state
        vectors = model.retrieval_head(mean_pool(states, parts.numbers_RS))
    for opens, expected in (
        (parts.opens_tool_RS, [tool_ids(codec, tools[i]) for i in (0, 1, 2, 2, 3, 4, 0)]),
        (parts.opens_request_RS, [request_ids(codec, query) for query in queries[:4]]),
    ):
        rows, places = opens.nonzero(as_tuple=True)
        there = vectors[rows, parts.numbers_RS[rows, places]]
        assert torch.allclose(there, embed(model, expected, batch_size=3), atol=1e-5)
        assert torch.allclose(there, torch.cat([embed(model, [ids], batch_size=1) for ids in expected]), atol=1e-5)
    assert there[0] @ there[1] < 0.999  # vectors of different requests differ


def test_the_other_weights_are_those_of_a_student_without_the_head(codec):
    with_head, without = student(codec), student(codec, retrieval_width=0)
    assert without.retrieval_head is None
    theirs = dict(with_head.named_parameters())
    for name, parameter in without.named_parameters():
        assert torch.equal(parameter, theirs.pop(name)), name
    assert theirs
    assert all(name.startswith("retrieval_head.") for name in theirs)


def test_the_head_is_saved_with_the_student(model, codec, tools, tmp_path):
    with torch.no_grad():
        model.retrieval_head.log_scale.fill_(3.0)
    save(model, codec, tmp_path)
    loaded, its_codec = load(tmp_path)
    assert loaded.retrieval_head.log_scale.item() == 3.0
    texts = [tool_ids(its_codec, tool) for tool in tools]
    # one product rounds differently with where its weights lie in memory
    torch.testing.assert_close(embed(loaded, texts, batch_size=2), embed(model, texts, batch_size=2))


def test_a_student_from_before_there_was_a_head_loads_and_says_that_it_has_none(codec, tools, tmp_path):
    save(student(codec, retrieval_width=0), codec, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["retrieval_width"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    loaded, _ = load(tmp_path)
    with pytest.raises(ConfigError, match="retrieval_width=0"):
        ToolIndex(loaded, codec, tools, batch_size=2)


def test_the_head_is_optimised_by_adamw(model, repository):
    values = yaml.safe_load((repository / "conf" / "optim" / "muon_adamw.yaml").read_text())
    del values["_target_"]
    optimizer = OptimSettings(**values).build(model)
    kinds = {id(p): (group["kind"], group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    assert {kinds[id(p)] for p in model.retrieval_head.parameters()} == {("adamw", values["adamw_lr"])}


def test_a_search_gives_the_nearest_tools_best_first(model, codec, tools):
    index = ToolIndex(model, codec, tools, batch_size=2)
    queries = ["is Porto sunny", "some jazz please"]
    for query, found in zip(queries, index.search(queries, top=3), strict=True):
        vector = embed(model, [request_ids(codec, query)], batch_size=1)[0]
        cosines = {tool.name: float(embed(model, [tool_ids(codec, tool)], batch_size=1)[0] @ vector) for tool in tools}
        best = sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]
        assert [tool.name for tool, _ in found] == best
        assert [cosine for _, cosine in found] == pytest.approx([cosines[name] for name in best], abs=1e-5)
    assert len(index.search(queries, top=99)[0]) == len(tools)
    assert model.training is False


def example(query: str, shown: list[Tool], *called: str) -> Example:
    calls = tuple(ToolCall(name, {}) for name in called)
    return Example("e", query, tuple(shown), calls, "single" if calls else "none", "d", "s", "t", "test")


def test_recall_by_hand(model, codec, tools):
    """The tools a request calls are looked for among all that any request shows; what calls nothing is left out."""
    queries = ["is Porto sunny", "some jazz please", "let Rosa know"]
    order = [
        [tool.name for tool, _ in found]
        for found in ToolIndex(model, codec, tools, batch_size=9).search(queries, top=5)
    ]
    by_name = {tool.name: tool for tool in tools}
    examples = [
        example(queries[0], [by_name[order[0][0]]], order[0][0]),
        example(queries[1], tools, order[1][1], order[1][3], order[1][1]),
        example(queries[2], tools[:2]),
    ]
    recall = recall_frac(model, codec, examples, tops=[1, 2, 4], batch_size=4)
    assert recall == pytest.approx({1: 0.5, 2: 0.75, 4: 1.0})
    assert math.isnan(recall_frac(model, codec, examples[2:], tops=[1], batch_size=4)[1])


def test_training_on_pairs_finds_the_tools(codec, tools):
    """No word of a request stands in its tool; recall at 1 over five tools rises from about chance."""
    model = student(codec, encoder_layers=1)
    examples = [
        example(query, [tools[i], tools[(i + 1) % len(tools)]], tools[i].name)
        for i, tool in enumerate(tools)
        for query in WORDS[tool.name][1]
    ]
    before = recall_frac(model, codec, examples, tops=[1], batch_size=16)[1]
    ids, segments = packed([[codec.encode_prompt(e.query, e.tools)] for e in examples])
    batch = {"source_ids_RS": ids, "source_segments_RS": segments, "gold_tools_RS": torch.ones_like(ids)}
    weight = Schedule(shape="constant", start=0.1, end=0.1, begin_frac=0.0, end_frac=1.0)
    term = Contrastive(weight=weight).attach(student=model.train(), teacher=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        nats = term(batch=batch, student=model, student_outputs=None, teacher_outputs=None) / term.count(batch)
        nats.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
    after = recall_frac(model, codec, examples, tops=[1], batch_size=16)[1]
    assert before <= 0.5
    assert after >= 0.9


def test_a_head_may_be_put_on_an_initial_student(tmp_path: Path, repository: Path):
    initial = repository / "experiments/000_first_distillation/nano_initial"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["experiment=008_loss_checks", "student.retrieval_width=16"])
    model, _ = _initial_student(initial, build(cfg.student), initial)
    before, _ = load(initial)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in before.state_dict().items())
    assert set(weights.keys() - before.state_dict().keys()) == {
        f"retrieval_head.{name}" for name in model.retrieval_head.state_dict()
    }
