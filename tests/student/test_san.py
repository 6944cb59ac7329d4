"""The student: its sizes, what it must not see, and that the saved, the cached and the packed one are the same one."""

# B batch, S source tokens, T target tokens, V vocabulary

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

import needle.student
from needle.data.packing import IGNORE, collate
from needle.data.shards import About, Shard, ShardWriter
from needle.errors import DataError
from needle.schema import Tool, ToolCall
from needle.student import SANConfig, SANForConditionalGeneration, SimpleAttentionNetwork
from needle.student.san import CopyHead, LexicalMatch, RMSNorm, rotary_angles, rotate
from needle.text.render import render_query, render_tools
from needle.text.tokenizer import BOS, EOS, PAD, QUERY, TOOLS, TextCodec, train_tokenizer

PIECES = 360
ROW = {"source_row_tokens": 300, "target_row_tokens": 100}
SMALL = {"width": 32, "heads": 4, "kv_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "copy_width": 8}
CASES = [
    ("start the timer for ten minutes", "start_timer", {"duration": "ten minutes"}),
    ("weather in Lisbon and the wind in Porto", "get_weather", {"city": "Lisbon", "wind": True}),
    ("remind me to call Chidi", "add_reminder", {"text": "call Chidi"}),
]
SWITCHES = {
    "copy_off": {"copy": False},
    "feed_forward": {"ffn_width": 24},
    "plain_residuals": {"gated": False},
    "qk_norm_off": {"qk_norm": False},
    "sandwich_norm": {"sandwich_norm": True},
    "one_kv_head": {"kv_heads": 1},
    "full_kv_heads": {"kv_heads": 4},
    "one_layer": {"encoder_layers": 1, "decoder_layers": 1},
}


def settings(repository: Path, name: str) -> dict:
    """A student's file under conf/, its defaults merged in."""
    values = yaml.safe_load((repository / "conf" / "student" / f"{name}.yaml").read_text())
    parents = [parent for parent in values.pop("defaults", []) if parent != "_self_"]
    for parent in parents:
        values = {**settings(repository, parent), **values}
    values.pop("_target_", None)
    return values


@pytest.fixture(scope="module")
def tools() -> tuple[Tool, ...]:
    return tuple(
        Tool.from_dict(
            {
                "name": name,
                "description": query.replace("the", "a"),
                "parameters": {"properties": {key: {} for key in arguments}},
            }
        )
        for query, name, arguments in CASES
    )


@pytest.fixture(scope="module")
def codec(tools: tuple[Tool, ...]) -> TextCodec:
    texts = [render_tools(tools, style="signature"), *(render_query(query) for query, _, _ in CASES)]
    return TextCodec(train_tokenizer(texts * 3, vocab_size=PIECES), "signature")


@pytest.fixture(scope="module")
def shard(codec: TextCodec, tools: tuple[Tool, ...], tmp_path_factory: pytest.TempPathFactory) -> Shard:
    writer = ShardWriter()
    for i, (query, name, arguments) in enumerate(CASES):
        shown = tools[: i + 1]
        target = codec.encode_target([ToolCall(name, arguments)], shown)
        writer.add(query, codec.encode_prompt(query, shown), *target, About(kind=0, gold_tools=1, tools=len(shown)))
    folder = tmp_path_factory.mktemp("shard") / "train"
    writer.save(folder)
    return Shard.open(folder)


@pytest.fixture(scope="module")
def build(repository: Path, codec: TextCodec):
    """Makes a small student of the default architecture with switches changed."""
    defaults = settings(repository, "san_base")

    def make(**changes) -> SANForConditionalGeneration:
        torch.manual_seed(0)
        model = SimpleAttentionNetwork(**{**defaults, **SMALL, **changes}).build(codec).eval()
        # Gates, norms and biases start at 0, where an error in them would not show.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": batch["source_ids_RS"],
        "decoder_input_ids": batch["decoder_ids_RT"],
        "source_segments_BS": batch["source_segments_RS"],
        "target_segments_BT": batch["target_segments_RT"],
    }


def alone(shard: Shard, index: int) -> dict[str, Tensor]:
    """An example without packing or padding."""
    lengths = {
        "source_row_tokens": int(shard.source_lengths_N[index]),
        "target_row_tokens": int(shard.target_lengths_N[index]),
    }
    return collate(shard, [[index]], **lengths)


def plain_inputs(shard: Shard, index: int) -> dict[str, Tensor]:
    batch = alone(shard, index)
    return {"input_ids": batch["source_ids_RS"], "decoder_input_ids": batch["decoder_ids_RT"]}


# ---- sizes


@pytest.mark.parametrize(
    ("name", "pieces", "millions"),
    [
        ("san_nano", 2048, (1.0, 1.3)),
        ("san_micro", 2048, (2.8, 3.3)),
        ("san_small", 8192, (7.5, 8.5)),
        ("san_base", 8192, (26.2, 26.3)),
        ("san_large", 8192, (50.0, 54.0)),
    ],
)
def test_a_students_size_is_what_its_file_says(repository: Path, name: str, pieces: int, millions: tuple[float, float]):
    values = settings(repository, name)
    assert values.pop("name") == name
    with torch.device("meta"):
        model = SANForConditionalGeneration(SANConfig(vocab_size=pieces, **values))
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions[0] <= counted <= millions[1]
    comment = (repository / "conf" / "student" / f"{name}.yaml").read_text().partition("_target_")[0]
    assert f"{counted:.1f}M parameters with {pieces:,} pieces" in comment


def test_the_public_models_architecture_has_its_number_of_parameters(repository: Path):
    values = {**settings(repository, "san_base"), "lexical_match": False, "selective_read": False}
    with torch.device("meta"):
        model = SANForConditionalGeneration(SANConfig(vocab_size=8192, **values))
    assert 26.2e6 <= sum(p.numel() for p in model.parameters()) <= 26.3e6


def test_every_setting_reaches_the_model(repository: Path, build):
    config = build(rope_theta=5000.0, ffn_width=40).config
    names = {field.name for field in fields(SimpleAttentionNetwork)} - {"name"}
    expected = {**settings(repository, "san_base"), **SMALL, "rope_theta": 5000.0, "ffn_width": 40}
    assert {name: getattr(config, name) for name in names} == {name: expected[name] for name in names}


@pytest.mark.parametrize("bad", [{"heads": 5}, {"kv_heads": 3}, {"width": 36, "heads": 4}])
def test_widths_that_do_not_divide_are_refused_with_their_values(build, bad: dict):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
        build(**bad)


# ---- parts, by hand


def test_rms_norm_by_hand():
    norm = RMSNorm(3)
    x = torch.tensor([[1.0, 2.0, 2.0]])
    assert torch.allclose(norm(x), x / 3**0.5, atol=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 1.0, -1.0]))
    assert torch.allclose(norm(x), x / 3**0.5 * torch.tensor([1.0, 2.0, 0.0]), atol=1e-5)


def test_rotation_keeps_lengths_and_knows_only_distances():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8)
    positions = torch.tensor([0, 3, 10, 13])
    angles = rotary_angles(positions, 8, 10000.0)
    queries, keys = (rotate(x.expand(1, 1, 4, 8), angles)[0, 0] for x in (query, key))
    assert torch.allclose(queries.norm(dim=-1), query.norm().expand(4), atol=1e-5)
    assert torch.allclose(queries[0], query.flatten())
    scores = queries @ keys.T
    assert torch.allclose(scores[1, 0], scores[3, 2], atol=1e-5)
    assert not torch.allclose(scores[1, 0], scores[0, 1], atol=1e-3)


# ---- what a token may see


@pytest.mark.parametrize("switch", [{}, *SWITCHES.values()], ids=["default", *SWITCHES])
def test_a_packed_example_gives_the_logits_it_gives_alone(build, shard: Shard, switch: dict):
    model = build(**switch)
    rows = [[2, 0, 1], [1, 1, 2]]
    packed = collate(shard, rows, **ROW)
    logits = model(**inputs_of(packed)).logits
    assert logits.isfinite().all()
    for r, row in enumerate(rows):
        for segment, index in enumerate(row, 1):
            there = logits[r][packed["target_segments_RT"][r] == segment]
            for single in (inputs_of(alone(shard, index)), plain_inputs(shard, index)):
                assert torch.allclose(there, model(**single).logits[0], atol=1e-4)


def test_a_packed_batch_gives_the_gradient_of_its_examples(build, shard: Shard):
    model = build()

    def gradient(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        model.zero_grad()
        for batch in batches:
            logits = model(**inputs_of(batch)).logits.transpose(1, 2)
            nn.functional.cross_entropy(logits, batch["labels_RT"], ignore_index=IGNORE, reduction="sum").backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together = gradient([collate(shard, [[0, 1, 2], []], **ROW)])
    apart = gradient([alone(shard, index) for index in range(3)])
    assert together.keys() == apart.keys() == {name for name, _ in model.named_parameters()}
    for name, expected in apart.items():
        assert torch.allclose(together[name], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()), name


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_the_source_changes_nothing(build, shard: Shard, side: str):
    model = build()
    for index in range(3):
        plain = plain_inputs(shard, index)
        ids = plain["input_ids"]
        padding = torch.full((1, 13), PAD)
        parts = (ids, padding) if side == "right" else (padding, ids)
        padded = torch.cat(parts, dim=1)
        mask = torch.cat([torch.full_like(part, part is ids) for part in parts], dim=1)
        there = model(input_ids=padded, attention_mask=mask, decoder_input_ids=plain["decoder_input_ids"]).logits
        assert torch.allclose(there, model(**plain).logits, atol=1e-4)


@pytest.mark.parametrize("copy", [True, False])
def test_a_target_token_changes_nothing_before_it(build, shard: Shard, copy: bool):
    model = build(copy=copy)
    inputs = plain_inputs(shard, 1)
    before = model(**inputs).logits
    for t in (1, 4, inputs["decoder_input_ids"].shape[1] - 1):
        changed = inputs["decoder_input_ids"].clone()
        changed[0, t] = (changed[0, t] + 1) % PIECES
        after = model(**{**inputs, "decoder_input_ids": changed}).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-3)


def test_every_source_token_counts(build, shard: Shard):
    model = build()
    inputs = plain_inputs(shard, 0)
    before = model(**inputs).logits
    for s in range(inputs["input_ids"].shape[1]):
        changed = inputs["input_ids"].clone()
        changed[0, s] = (changed[0, s] + 1) % PIECES
        assert not torch.equal(model(**{**inputs, "input_ids": changed}).logits, before)


# ---- probabilities and gradients


@pytest.mark.parametrize("switch", [{}, *SWITCHES.values()], ids=["default", *SWITCHES])
def test_every_switch_trains_every_parameter(build, shard: Shard, switch: dict):
    model = build(**switch).train()
    batch = collate(shard, [[0, 1], [2]], **ROW)
    out = model(**inputs_of(batch), labels=batch["labels_RT"])
    out.loss.backward()
    assert out.loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_dropout_changes_training_only(build, shard: Shard):
    inputs = inputs_of(collate(shard, [list(range(len(CASES)))], **ROW))
    model, without = build(dropout_frac=0.5), build()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, without(**inputs).logits)
        torch.manual_seed(1)
        first, second = (model.train()(**inputs).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_the_loss_given_labels_is_the_mean_cross_entropy(build, shard: Shard):
    model = build()
    batch = alone(shard, 0)
    out = model(input_ids=batch["source_ids_RS"], labels=batch["labels_RT"])
    log_probs = model(**plain_inputs(shard, 0)).logits.log_softmax(-1)
    by_hand = -log_probs.gather(-1, batch["labels_RT"].unsqueeze(-1)).mean()
    assert out.loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_logits_are_log_probabilities_with_the_copy_head(build, shard: Shard):
    for copy in (True, False):
        logits = build(copy=copy)(**inputs_of(collate(shard, [[0, 1, 2], []], **ROW))).logits
        normalised = torch.allclose(logits.logsumexp(-1), torch.zeros(logits.shape[:-1]), atol=1e-5)
        assert normalised == copy
        assert logits.isfinite().all()


def force_copying(model: SANForConditionalGeneration) -> None:
    with torch.no_grad():
        model.copy_head.gate.weight.zero_()
        model.copy_head.gate.bias.fill_(-60.0)


def test_a_student_that_only_copies_writes_only_tokens_of_its_own_source(build, shard: Shard):
    model = build()
    force_copying(model)
    rows = [[0, 1, 2]]
    batch = collate(shard, rows, **ROW)
    probabilities = model(**inputs_of(batch)).logits.exp()
    for segment in (1, 2, 3):
        own = batch["source_ids_RS"][batch["source_segments_RS"] == segment].unique()
        there = probabilities[batch["target_segments_RT"] == segment]
        assert torch.allclose(there[:, own].sum(-1), torch.ones(len(there)), atol=1e-5)
        assert (there[:, own] > 1e-12).any(dim=0).all()  # no place is out of reach


def test_copying_finds_what_followed_a_token_in_the_source(codec: TextCodec):
    """Keys carry the token before: a query for token a must land on the token that follows a, in its own segment."""
    config = SANConfig(vocab_size=50, **{**SMALL, "copy_width": 32})
    head = CopyHead(config)
    with torch.no_grad():
        for linear in (head.query, head.previous_key):
            linear.weight.copy_(torch.eye(32))
        head.state_key.weight.zero_()
        head.gate.weight.zero_()
        head.gate.bias.fill_(-60.0)
    source = torch.tensor([[7, 8, 9, 7, 3]])
    segments = torch.tensor([[1, 1, 1, 2, 2]])
    embedded = 30.0 * torch.eye(50, 32)[source]
    keys = head.keys(torch.zeros(1, 5, 32), embedded, segments)
    assert torch.equal(keys[0, 0], torch.zeros(32))  # nothing stands before the first token
    assert torch.equal(keys[0, 3], torch.zeros(32))  # of a segment
    state = 30.0 * torch.eye(50, 32)[torch.tensor([[7, 8, 7]])]
    mask = torch.tensor([1, 1, 2])[None, :, None] == segments[:, None, :]
    copied = head(state, torch.zeros(1, 3, 50), keys, source, mask, None).exp()
    assert copied.argmax(-1).tolist() == [[8, 9, 3]]
    assert copied.max(-1).values.min() > 0.99


def lexical_match(*texts: str) -> LexicalMatch:
    match = LexicalMatch(SANConfig(vocab_size=len(texts), width=8, separator_id=5))
    match.start(texts)
    return match


def test_lexical_match_by_hand():
    """Tools [play music] and [pause game], request [the music game game]: each holds one word of the request."""
    match = lexical_match(*"?????", "\n", "play", " music", "pause", " game", " the")
    importance = torch.zeros(11)
    importance[[6, 7, 9]] = torch.tensor([5.0, 1.0, 2.0])
    match.importance.data.copy_(importance)
    ids = torch.tensor([[TOOLS, 6, 7, 5, 8, 9, QUERY, 10, 7, 9, 9, PAD]])
    first, second = 1 / 3**0.5, 2 / 3**0.5  # over the root of the length, its opening token included
    by_hand = torch.tensor([[first] * 3 + [second] * 3 + [0.0] * 6])
    segments = (ids != PAD).long()
    assert torch.allclose(match.scores(ids, segments), by_hand)
    # Packed behind another example, whose words are not its own.
    doubled, apart = torch.cat([ids[:, :7], ids], dim=1), torch.cat([segments[:, :7], 2 * segments], dim=1)
    alone = torch.cat([torch.zeros(1, 7), by_hand], dim=1)
    assert torch.allclose(match.scores(doubled, apart), alone)
    match.feature.data = torch.eye(2, 8)
    behind = torch.where(segments == 1, second - by_hand, 0.0)
    assert torch.allclose(match.embed(by_hand, segments)[..., :2], torch.stack([by_hand, behind], dim=-1))


def test_words_are_put_together_from_their_tokens_and_known_by_their_first_letters():
    texts = (
        "?",
        "?",
        "?",
        "?",
        "?",
        "\n",
        " re",
        "minder",
        " remin",
        "ds",
        "Wea",
        "wea",
        "ther",
        "_",
        " a",
        "get",
        "7",
    )
    number = {text: texts.index(text) for text in texts}
    match = lexical_match(*texts)

    def stems(*tokens: str) -> list[int]:
        return match.word_stems(torch.tensor([[number[token] for token in tokens]]))[0].tolist()

    whole = stems(" re", "minder")
    assert whole[0] == whole[1] == stems(" remin", "ds")[0] > 0  # one word however it is cut, and in the plural
    hump, part = stems("get", "Wea", "ther"), stems("get", "_", "wea", "ther")
    assert hump[1] == hump[2] == part[2] == part[3] != hump[0] == part[0]
    assert len({*stems(" a", "7", "_", " a")}) == 4
    assert max(stems(" a", "7", "_", " a")) < 0


def test_value_and_gradient_of_the_copy_mixture_are_those_of_float64(codec: TextCodec):
    """Against the formula written out over places and tokens, and against central differences of it."""
    torch.manual_seed(1)
    V, S, T, D, C = 6, 4, 2, 5, 3
    head = CopyHead(SANConfig(vocab_size=V, width=D, copy_width=C))
    nn.init.normal_(head.gate.bias)
    source = torch.tensor([[2, 4, 2, 5]])
    mask = torch.tensor([[[True, True, True, False], [True, True, True, True]]])
    inputs = [torch.randn(1, T, D), torch.randn(1, T, V), torch.randn(1, S, C)]
    direction = torch.randn(1, T, V)
    query, gate, bias = head.query.weight.double(), head.gate.weight.double(), head.gate.bias.double()

    def reference(state: Tensor, logits: Tensor, keys: Tensor) -> Tensor:
        rows = []
        for t in range(T):
            g = torch.sigmoid(state[0, t] @ gate[0] + bias[0])
            scores = torch.stack([(query @ state[0, t]) @ keys[0, s] / C**0.5 for s in range(S)])
            weights = scores.exp() * mask[0, t]
            weights = weights / weights.sum()
            vocabulary = logits[0, t].exp() / logits[0, t].exp().sum()
            copied = [sum(weights[s] for s in range(S) if source[0, s] == v) for v in range(V)]
            rows.append(torch.stack([(g * vocabulary[v] + (1 - g) * copied[v]).log() for v in range(V)]))
        return torch.stack(rows).unsqueeze(0)

    exact = [x.double() for x in inputs]
    with torch.no_grad():
        assert torch.allclose(head(*inputs, source, mask, None).double(), reference(*exact), atol=1e-5)
    for x in inputs:
        x.requires_grad_()
    (head(*inputs, source, mask, None) * direction).sum().backward()
    step = 1e-5
    for x, x64 in zip(inputs, exact, strict=True):
        for place in torch.ones_like(x64).nonzero():
            nudge = torch.zeros_like(x64)
            nudge[tuple(place)] = step
            up, down = (
                (reference(*(y + sign * nudge if y is x64 else y for y in exact)) * direction).sum() for sign in (1, -1)
            )
            slope = ((up - down) / (2 * step)).item()
            assert x.grad[tuple(place)].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)


# ---- decoding


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 1, 3]])
@pytest.mark.parametrize("switch", [{}, {"copy": False}, {"ffn_width": 24}], ids=["default", "copy_off", "ffn"])
def test_steps_with_a_cache_equal_the_full_pass(build, shard: Shard, switch: dict, chunks: list[int]):
    model = build(**switch)
    inputs = plain_inputs(shard, 0)
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :9]
    full = model(**inputs).logits
    encoded = model.get_encoder()(input_ids=inputs["input_ids"])
    cache, steps = None, []
    for tokens in inputs["decoder_input_ids"].split(chunks, dim=1):
        out = model(
            input_ids=inputs["input_ids"],
            encoder_outputs=encoded,
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, dim=1), full, atol=1e-4)


def prompts(shard: Shard) -> list[list[int]]:
    return [shard.source[slice(*shard.source_offsets[i : i + 2])].tolist() for i in range(len(shard))]


def padded(sources: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, sources))
    return {
        "input_ids": torch.tensor([ids + [PAD] * (width - len(ids)) for ids in sources]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sources]),
    }


def naive_greedy(model: nn.Module, source: list[int], steps: int) -> list[int]:
    written = [BOS]
    while len(written) <= steps and written[-1] != EOS:
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@torch.no_grad()
def test_generate_is_greedy_search_example_by_example(build, shard: Shard):
    model = build()
    sources = prompts(shard)
    written = model.generate(**padded(sources), max_new_tokens=12, do_sample=False)
    for row, source in zip(written.tolist(), sources, strict=True):
        expected = naive_greedy(model, source, 12)
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {PAD}
    assert len({tuple(row) for row in written.tolist()}) == len(sources)


@torch.no_grad()
def test_generate_stops_at_the_end_token(build, shard: Shard):
    """A head that sees the end wherever the source holds it, in one of two prompts."""
    model = build()
    force_copying(model)
    one, other = prompts(shard)[:2]
    written = model.generate(**padded([[EOS] * 5, other]), max_new_tokens=6, min_new_tokens=0, do_sample=False)
    assert written[0].tolist() == [BOS, EOS, *[PAD] * (written.shape[1] - 2)]
    assert written.shape[1] == 7
    assert model.generate(torch.tensor([[EOS] * len(one)]), max_new_tokens=6, do_sample=False).tolist() == [[BOS, EOS]]


@torch.no_grad()
def test_beam_search_finds_nothing_less_likely_than_greedy(build, shard: Shard):
    model = build()
    inputs = padded(prompts(shard))
    scores = []
    for beams in (1, 4):
        written = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, num_beams=beams, do_sample=False, length_penalty=0.0
        )
        log_probs = model(**inputs, decoder_input_ids=written[:, :-1]).logits.log_softmax(-1)
        scores.append(log_probs.gather(-1, written[:, 1:, None]).sum())
    assert scores[1] >= scores[0] - 1e-4


# ---- on disk


@pytest.fixture
def saved(build, codec: TextCodec, tmp_path: Path) -> tuple[SANForConditionalGeneration, Path]:
    model = build()
    needle.student.save(model, codec, tmp_path / "model")
    return model, tmp_path / "model"


def test_a_saved_student_is_the_same_student(saved, shard: Shard, codec: TextCodec):
    model, folder = saved
    loaded, its_codec = needle.student.load(folder)
    assert not loaded.training
    assert its_codec.tokenizer.to_str() == codec.tokenizer.to_str()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.embedding.weight is loaded.encoder.embedding.weight
    inputs = plain_inputs(shard, 0)
    # Weights mapped from a file lie elsewhere in memory: sums may round differently.
    assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_a_saved_student_loads_through_transformers(saved, shard: Shard):
    model, folder = saved
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    assert type(loaded) is SANForConditionalGeneration
    inputs = plain_inputs(shard, 1)
    assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_the_folder_holds_no_pickle_and_the_embedding_once(saved):
    model, folder = saved
    suffixes = {path.suffix for path in folder.iterdir()}
    assert suffixes == {".json", ".safetensors"}
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        stored = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    assert [shape for name, shape in stored.items() if "embedding" in name] == [[PIECES, 32]]
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters <= stored.keys()


def test_a_loaded_student_trains_on_with_its_embedding_tied(saved, shard: Shard):
    loaded, _ = needle.student.load(saved[1])
    loaded.train()
    batch = alone(shard, 0)
    loaded(input_ids=batch["source_ids_RS"], labels=batch["labels_RT"]).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert sum("embedding" in name for name, _ in loaded.named_parameters()) == 1


@pytest.mark.parametrize("name", needle.student.MODEL_FILES)
def test_a_missing_file_is_named(saved, name: str):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(DataError, match=name):
        needle.student.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kept_frac", [0.0, 0.3, 0.97])
def test_a_cut_file_is_named(saved, name: str, kept_frac: float):
    _, folder = saved
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * kept_frac)])
    with pytest.raises(DataError, match=name):
        needle.student.load(folder)


def test_damaged_weights_are_named(saved):
    _, folder = saved
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        needle.student.load(folder)


@pytest.mark.parametrize("change", [{"width": 64}, {"encoder_layers": 3}, {"decoder_layers": 1}, {"vocab_size": 500}])
def test_weights_of_another_architecture_are_refused(saved, change: dict):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(DataError, match=r"model\.safetensors does not fit config\.json"):
        needle.student.load(folder)


@pytest.mark.parametrize("change", [{"model_type": "t5"}, {"model_type": "unheard_of"}, {"heads": 0}, {"width": "x"}])
def test_a_configuration_of_something_else_is_refused(saved, change: dict):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(DataError, match=r"describes no student|holds a t5 model"):
        needle.student.load(folder)


def test_a_tokenizer_of_another_size_is_refused(saved, tools: tuple[Tool, ...]):
    _, folder = saved
    other = train_tokenizer([render_tools(tools, style="signature")] * 3, vocab_size=320)
    TextCodec(other, "signature").save(folder)
    with pytest.raises(DataError, match=f"tokenizer has 320 pieces, the student {PIECES}"):
        needle.student.load(folder)
