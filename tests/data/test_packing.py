"""Packing loses nothing, repeats nothing, fills its rows and can continue anywhere."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from needle.corpus.catalogue import load
from needle.data.datamodule import ValidationBatches
from needle.data.packing import IGNORE, PackedBatches, collate, pack, padding_frac
from needle.data.shards import About, Shard, ShardWriter, Signals
from needle.text.render import render_query, render_tools
from needle.text.tokenizer import BOS, PAD, TextCodec, train_tokenizer

ROW = {"source_row_tokens": 40, "target_row_tokens": 12}
STREAM = {**ROW, "rows_per_batch": 4, "window_examples": 16}
K = 3

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=30)

ABOUT = About(kind=0, gold_tools=1, tools=1)


def shard_of(lengths: list[tuple[int, int]], *, signals: bool = False) -> Shard:
    """Examples with tokens of their own: no two share one, so a misplaced token shows."""
    source_N, target_N = (np.array(column, dtype=np.int64) for column in zip(*lengths, strict=True))
    X = int(target_N.sum())
    stored = None
    if signals:
        ids_XK = np.arange(X * K, dtype=np.uint16).reshape(X, K)
        stored = Signals(ids_XK, -1 - np.arange(X * K, dtype=np.float32).reshape(X, K))
    return Shard(
        source=np.arange(10, 10 + source_N.sum(), dtype=np.uint16),
        target=np.arange(20_000, 20_000 + X, dtype=np.uint16),
        spans=(np.arange(X) % 5).astype(np.uint8),
        source_offsets=np.cumsum([0, *source_N]),
        target_offsets=np.cumsum([0, *target_N]),
        kind=(np.arange(len(lengths)) % 9).astype(np.uint8),
        gold_tools=1 + np.arange(len(lengths), dtype=np.int64),
        tools=(1 + np.arange(len(lengths)) % 5).astype(np.uint16),
        answer_weight=1 / (1 + np.arange(len(lengths), dtype=np.float32)),
        confidence=np.linspace(0, 1, len(lengths), dtype=np.float32),
        signals=stored,
    )


def random_shard(examples: int, seed: int = 0) -> Shard:
    rng = np.random.default_rng(seed)
    return shard_of(list(zip(rng.integers(1, 30, examples), rng.integers(1, 9, examples), strict=True)))


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def examples_in(batch: dict[str, Tensor], shard: Shard) -> list[int]:
    """Indices of the examples in a batch, by the first token of each target."""
    starts = batch["labels_RT"][batch["decoder_ids_RT"] == BOS]
    return np.searchsorted(shard.target_offsets, starts.numpy() - 20_000).tolist()


@given(lengths)
def test_every_example_is_in_exactly_one_row_and_no_row_overflows(lengths: list[tuple[int, int]]):
    source_N, target_N = np.array(lengths).T
    rows = pack(source_N, target_N, **ROW)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert row
        assert source_N[row].sum() <= ROW["source_row_tokens"]
        assert target_N[row].sum() <= ROW["target_row_tokens"]


def test_no_examples_make_no_rows():
    assert pack(np.zeros(0, np.int64), np.zeros(0, np.int64), **ROW) == []


@pytest.mark.parametrize("oversize", [(41, 1), (1, 13)])
def test_an_example_longer_than_a_row_is_refused_with_its_length(oversize: tuple[int, int]):
    source_N, target_N = np.array([(5, 5), oversize]).T
    with pytest.raises(ValueError, match=f"{oversize[0]} source and {oversize[1]} target"):
        pack(source_N, target_N, **ROW)


@given(lengths)
def test_a_batch_holds_every_example_shifted_and_aligned(lengths: list[tuple[int, int]]):
    shard = shard_of(lengths, signals=True)
    rows = pack(shard.source_lengths_N, shard.target_lengths_N, **ROW)
    batch = collate(shard, rows, **ROW)
    assert shard.signals is not None
    for r, row in enumerate(rows):
        for segment, index in enumerate(row, 1):
            place = slice(*shard.target_offsets[index : index + 2])
            in_source = batch["source_segments_RS"][r] == segment
            in_target = batch["target_segments_RT"][r] == segment
            target = shard.target[place].tolist()
            source = shard.source[slice(*shard.source_offsets[index : index + 2])].tolist()
            assert batch["source_ids_RS"][r][in_source].tolist() == source
            assert batch["labels_RT"][r][in_target].tolist() == target
            assert batch["decoder_ids_RT"][r][in_target].tolist() == [BOS, *target[:-1]]
            assert batch["spans_RT"][r][in_target].tolist() == shard.spans[place].tolist()
            for of_token, of_example in (
                ("kinds_RT", "kind"),
                ("answer_weights_RT", "answer_weight"),
                ("confidences_RT", "confidence"),
            ):
                assert set(batch[of_token][r][in_target].tolist()) == {getattr(shard, of_example)[index].item()}
            assert set(batch["gold_tools_RS"][r][in_source].tolist()) == {shard.gold_tools[index].item()}
            assert np.array_equal(batch["teacher_ids_RTK"][r][in_target], shard.signals.ids_XK[place])
            assert np.array_equal(batch["teacher_log_probs_RTK"][r][in_target], shard.signals.log_probs_XK[place])
    empty_S, empty_T = batch["source_segments_RS"] == 0, batch["target_segments_RT"] == 0
    assert (batch["source_ids_RS"][empty_S] == PAD).all()
    assert (batch["labels_RT"][empty_T] == IGNORE).all()
    assert (~empty_S).sum() == len(shard.source)
    assert (~empty_T).sum() == len(shard.target)


@pytest.mark.parametrize("window_examples", [7, 100])
def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(window_examples: int):
    shard = random_shard(53)
    stream = PackedBatches(shard, **{**STREAM, "window_examples": window_examples}, seed=1)
    epochs = [[index for row in stream.rows_of_epoch(epoch) for index in row] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(53))
    assert epochs[0] != epochs[1]


def test_the_stream_gives_every_example_once_an_epoch_across_batches():
    """Rows that fill no whole batch are carried over, not dropped."""
    shard = random_shard(53)
    stream = PackedBatches(shard, **STREAM, seed=1)
    rows = sum(len(stream.rows_of_epoch(epoch)) for epoch in range(4))
    seen: list[int] = []
    for batch in islice(stream, rows // 4):
        assert batch["source_ids_RS"].shape == (4, ROW["source_row_tokens"])
        seen += examples_in(batch, shard)
    counts = np.bincount(seen, minlength=53)
    in_last_rows = 53 * 4 - len(seen)
    assert counts.max() == 4
    assert (4 - counts).sum() == in_last_rows <= 3 * ROW["target_row_tokens"]
    assert counts.min() >= 3


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 25])
def test_a_stream_that_starts_later_continues_the_one_from_the_beginning(start: int):
    shard = random_shard(53)
    whole = islice(PackedBatches(shard, **STREAM, seed=1), start, start + 4)
    later = PackedBatches(shard, **STREAM, seed=1)
    later.start_at(start)
    for first, second in zip(whole, islice(later, 4), strict=True):
        assert_same(first, second)


def test_fewer_rows_than_a_batch_are_filled_up_from_the_next_epochs():
    shard = random_shard(2)
    batches = list(islice(PackedBatches(shard, **STREAM, seed=1), 5))
    assert all(len(batch["labels_RT"]) == 4 for batch in batches)
    later = PackedBatches(shard, **STREAM, seed=1)
    later.start_at(3)
    assert_same(next(iter(later)), batches[3])


def test_the_ranks_shares_together_are_the_batch():
    shard = random_shard(53)
    streams = [PackedBatches(shard, **STREAM, seed=1) for _ in range(3)]
    for rank in (0, 1):
        streams[rank].share(rank=rank, ranks=2)
    for first, second, whole in islice(zip(*streams, strict=True), 20):
        for name in whole:
            assert torch.equal(torch.stack((first[name], second[name]), dim=1).flatten(0, 1), whole[name])


def test_the_seed_alone_decides_the_stream():
    shard = random_shard(53)
    same = [list(islice(PackedBatches(shard, **STREAM, seed=seed), 12)) for seed in (3, 3, 4)]
    for first, second in zip(same[0], same[1], strict=True):
        assert_same(first, second)
    assert any(
        not torch.equal(first["labels_RT"], other["labels_RT"]) for first, other in zip(same[0], same[2], strict=True)
    )


def test_a_shard_without_examples_is_refused(tmp_path: Path):
    ShardWriter().save(tmp_path / "train")
    with pytest.raises(ValueError, match="without examples"):
        PackedBatches(Shard.open(tmp_path / "train"), **STREAM, seed=0)


def test_validation_holds_every_example_once_in_batches_of_one_shape():
    shard = random_shard(53)
    batches = ValidationBatches(shard, rows_per_batch=4, **ROW)
    every = [batches[i] for i in range(len(batches))]
    assert sorted(index for batch in every for index in examples_in(batch, shard)) == list(range(53))
    assert {tuple(batch["labels_RT"].shape) for batch in every} == {(4, ROW["target_row_tokens"])}


def test_padding_is_the_share_of_empty_slots():
    shard = shard_of([(10, 6), (20, 6), (40, 3)])
    frac = padding_frac([[0, 1], [2]], shard, **ROW)
    assert frac == pytest.approx({"source": 10 / 80, "target": 9 / 24, "all": 19 / 104})


def test_rows_of_the_recorded_corpus_hold_little_padding(repository: Path, tmp_path: Path):
    """Requests of the corpus with one to five tools of their domain, in rows of 512 source and 96 target tokens."""
    row = {"source_row_tokens": 512, "target_row_tokens": 96}
    catalogue = load(repository / "data" / "teacher_corpus")
    texts = [render_tools(tools, style="signature") for tools in catalogue.tools.values()]
    texts += [render_query(example.query) for example in catalogue.examples[::3]]
    codec = TextCodec(train_tokenizer(texts, vocab_size=2048), "signature")
    rng = np.random.default_rng(0)
    writer = ShardWriter()
    for index in rng.permutation(len(catalogue.examples))[:2048]:
        example = catalogue.examples[index]
        others = [tool for tool in catalogue.tools[example.domain] if tool not in example.tools]
        extra = rng.permutation(len(others))[: max(0, rng.integers(1, 6) - len(example.tools))]
        tools = [*example.tools, *(others[i] for i in extra)]
        source, (target, spans) = codec.encode_prompt(example.query, tools), codec.encode_target(example.calls, tools)
        if len(source) <= row["source_row_tokens"] and len(target) <= row["target_row_tokens"]:
            writer.add(example.id, source, target, spans, ABOUT)
    assert len(writer) > 1900
    writer.save(tmp_path / "train")
    shard = Shard.open(tmp_path / "train")
    rows = pack(shard.source_lengths_N, shard.target_lengths_N, **row)
    assert padding_frac(rows, shard, **row)["all"] < 0.05
