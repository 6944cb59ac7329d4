"""The student: what it computes does not depend on padding, packing, caching or being saved."""

from pathlib import Path

import pytest
import torch
import yaml

from needle.data.packing import collate
from needle.data.shards import Shard, ShardWriter
from needle.errors import DataError
from needle.student import SimpleAttentionNetwork, load, save
from needle.text.tokenizer import QUERY, TOOLS, TextCodec, train_tokenizer

SMALL = {"name": "t", "width": 32, "heads": 4, "kv_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "ffn_width": 0}
SMALL |= {"rope_theta": 1e4, "gated": True, "qk_norm": True, "sandwich_norm": False, "copy": True, "copy_width": 16}
SMALL |= {"lexical_match": True, "selective_read": True}
SIZES = {"nano": (1.0e6, 1.35e6, 2048), "micro": (2.8e6, 3.4e6, 2048), "small": (7.5e6, 8.5e6, 8192)}
SIZES |= {"base": (26.2e6, 26.7e6, 8192), "large": (50e6, 54e6, 8192)}


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    texts = [f"word{chr(97 + i)}{chr(97 + j)} set timer play song" for i in range(26) for j in range(26)]
    return TextCodec(train_tokenizer(texts, vocab_size=500), "signature")


def student(codec: TextCodec, **changes):
    torch.manual_seed(0)
    return SimpleAttentionNetwork(**{**SMALL, **changes}).build(codec).eval()


def source(length: int, codec: TextCodec, seed: int) -> torch.Tensor:
    """Random prompt of two tools and a request."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, codec.vocab_size, (1, length), generator=generator)
    ids[0, 0], ids[0, length // 3], ids[0, 2 * length // 3] = TOOLS, codec.separator_id, QUERY
    return ids


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str, repository: Path):
    folder = repository / "conf" / "student"
    settings = yaml.safe_load((folder / "san_base.yaml").read_text())
    settings |= yaml.safe_load((folder / f"san_{size}.yaml").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("_target_", "defaults")}
    low, high, pieces = SIZES[size]
    letters = "abcdefghijklmnopqrst"
    texts = [" ".join(f"{a}{b}{c}" for c in letters[:16]) for a in letters for b in letters[:16]]
    codec = TextCodec(train_tokenizer(texts * 2, vocab_size=pieces), "signature")
    with torch.device("meta"):
        from needle.student.san import SANConfig, SANForConditionalGeneration

        shape = {key: value for key, value in settings.items() if key != "name"}
        model = SANForConditionalGeneration(SANConfig(vocab_size=pieces, separator_id=codec.separator_id, **shape))
    assert low <= sum(p.numel() for p in model.parameters()) <= high


def test_logits_are_log_probabilities(codec: TextCodec):
    logits = student(codec)(input_ids=source(30, codec, 0), decoder_input_ids=torch.tensor([[1, 9, 12]])).logits
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1, 3))


def test_padding_changes_nothing(codec: TextCodec):
    model, ids, target = student(codec), source(30, codec, 0), torch.tensor([[1, 9, 12, 40]])
    alone = model(input_ids=ids, decoder_input_ids=target).logits
    padded = torch.cat((ids, torch.zeros(1, 7, dtype=torch.long)), dim=1)
    mask = torch.cat((torch.ones(1, 30), torch.zeros(1, 7)), dim=1).long()
    together = model(input_ids=padded, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def packed(tmp_path: Path, codec: TextCodec):
    writer = ShardWriter()
    for seed, (s, t) in enumerate(((30, 6), (21, 9), (12, 3))):
        target = torch.randint(5, codec.vocab_size, (t,), generator=torch.Generator().manual_seed(seed)).tolist()
        writer.add(str(seed), source(s, codec, seed)[0].tolist(), target, [3] * t)
    writer.save(tmp_path / "shard")
    return Shard.open(tmp_path / "shard")


def call(model, batch):
    return model(
        input_ids=batch["source_ids_RS"],
        source_segments_BS=batch["source_segments_RS"],
        decoder_input_ids=batch["decoder_ids_RT"],
        target_segments_BT=batch["target_segments_RT"],
    ).logits


def test_packing_changes_neither_logits_nor_gradients(tmp_path: Path, codec: TextCodec):
    model, shard = student(codec), packed(tmp_path, codec)
    shape = {"source_row_tokens": 70, "target_row_tokens": 24}
    together = collate(shard, [[0, 1, 2]], **shape)
    logits = call(model, together)
    kept = together["labels_RT"] >= 0
    loss = torch.nn.functional.cross_entropy(logits[kept], together["labels_RT"][kept], reduction="sum")
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    start, total = 0, [0.0] * len(gradients)
    for index in range(3):
        alone = collate(shard, [[index]], **shape)
        single = call(model, alone)
        mine = alone["labels_RT"] >= 0
        length = int(mine.sum())
        torch.testing.assert_close(single[mine], logits[0, start : start + length], atol=2e-4, rtol=1e-4)
        start += length
        part = torch.nn.functional.cross_entropy(single[mine], alone["labels_RT"][mine], reduction="sum")
        for i, g in enumerate(torch.autograd.grad(part, list(model.parameters()), allow_unused=True)):
            total[i] = total[i] + (0.0 if g is None else g)
    for ours, theirs in zip(gradients, total, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_no_token_sees_the_future(codec: TextCodec):
    model, ids = student(codec), source(30, codec, 0)
    one = model(input_ids=ids, decoder_input_ids=torch.tensor([[1, 9, 12, 40]])).logits
    other = model(input_ids=ids, decoder_input_ids=torch.tensor([[1, 9, 77, 41]])).logits
    torch.testing.assert_close(one[:, :2], other[:, :2])
    assert not torch.allclose(one[:, 2], other[:, 2])


def test_cached_steps_equal_one_pass(codec: TextCodec):
    model, ids, target = student(codec), source(30, codec, 0), torch.tensor([[1, 9, 12, 40, 6, 7]])
    whole = model(input_ids=ids, decoder_input_ids=target).logits
    encoded, cache, steps = model.get_encoder()(input_ids=ids), None, []
    for chunk in (target[:, :1], target[:, 1:4], target[:, 4:]):
        step = model(encoder_outputs=encoded, decoder_input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_generate_is_greedy(codec: TextCodec):
    model, ids = student(codec), source(30, codec, 0)
    answer = torch.ones(1, 1, dtype=torch.long)
    for _ in range(8):
        token = model(input_ids=ids, decoder_input_ids=answer).logits[:, -1:].argmax(-1)
        answer = torch.cat((answer, token), dim=1)
        if token.item() == 2:
            break
    assert model.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist() == answer.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"copy": False}, {"ffn_width": 48}, {"gated": False}, {"qk_norm": False}, {"sandwich_norm": True}),
        *({"lexical_match": False}, {"selective_read": False}),
    ],
    ids=str,
)
def test_every_switch_trains(codec: TextCodec, changes: dict):
    model = student(codec, **changes).train()
    labels = torch.tensor([[9, 12, 40, 2]])
    model(input_ids=source(30, codec, 0), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_save_and_load(tmp_path: Path, codec: TextCodec):
    model, ids = student(codec), source(30, codec, 0)
    save(model, codec, tmp_path / "model")
    again, same_codec = load(tmp_path / "model")
    target = torch.tensor([[1, 9, 12]])
    torch.testing.assert_close(
        again(input_ids=ids, decoder_input_ids=target).logits, model(input_ids=ids, decoder_input_ids=target).logits
    )
    assert same_codec.encode_prompt("a word", ()) == codec.encode_prompt("a word", ())
    assert {path.suffix for path in (tmp_path / "model").iterdir()} <= {".json", ".safetensors"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_folder_is_told(tmp_path: Path, codec: TextCodec, name: str, damage: str):
    save(student(codec), codec, tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=str(tmp_path)):
        load(tmp_path)


def test_a_shared_word_makes_a_tool_likelier_from_the_start(codec: TextCodec):
    model = student(codec)
    ids = [TOOLS, *codec._ids("set timer"), codec.separator_id, *codec._ids("play song"), QUERY, *codec._ids(" a song")]
    source_ids = torch.tensor([ids])
    scores = model.lexical_match.scores(source_ids, torch.ones_like(source_ids))[0]
    assert scores[1] == 0
    assert scores[ids.index(codec.separator_id) + 1] > 0
    assert (scores[ids.index(QUERY) :] == 0).all()
