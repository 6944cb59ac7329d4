"""A curriculum shows what its phases choose, in the share that they state, and can continue anywhere."""

from itertools import chain, islice

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from needle import config
from needle.data.curriculum import Curriculum, Phase, Stretch
from needle.data.datamodule import PackedData
from needle.data.packing import PackedBatches, collate, pack
from needle.data.shards import Shard, Signals
from needle.errors import ConfigError
from needle.text.tokenizer import BOS

ROW = {"source_row_tokens": 40, "target_row_tokens": 12}
STREAM = {**ROW, "rows_per_batch": 4, "window_examples": 16}
K = 3


def shard_of(examples: int, *, first_token: int, seed: int) -> Shard:
    """Examples of 1 to 5 tools whose targets share no token, so that a batch tells which it holds."""
    rng = np.random.default_rng(seed)
    source_N, target_N = rng.integers(1, 30, examples), rng.integers(1, 9, examples)
    X = int(target_N.sum())
    return Shard(
        source=np.full(source_N.sum(), 9, dtype=np.uint16),
        target=np.arange(first_token, first_token + X, dtype=np.uint16),
        spans=np.zeros(X, np.uint8),
        source_offsets=np.cumsum([0, *source_N]),
        target_offsets=np.cumsum([0, *target_N]),
        kind=np.zeros(examples, np.uint8),
        gold_tools=np.ones(examples, np.int64),
        tools=rng.integers(1, 6, examples).astype(np.uint16),
        answer_weight=np.ones(examples, np.float32),
        confidence=np.ones(examples, np.float32),
        signals=Signals(np.zeros((X, K), np.uint16), np.full((X, K), -1.0, np.float32)),
    )


TRAIN = shard_of(53, first_token=20_000, seed=0)
SYMBOLIC = shard_of(17, first_token=40_000, seed=1)


def phase(frac: float, **changes) -> Phase:
    return Phase(**{"frac": frac, "symbolic_frac": 0.0, "tools_max": None, "source_tokens_max": None, **changes})


def stream(curriculum: Curriculum, *, seed: int = 1) -> PackedBatches:
    stretches = curriculum.stretches(TRAIN, SYMBOLIC)
    return PackedBatches(TRAIN, **STREAM, seed=seed, stretches=stretches, beside=SYMBOLIC)


def examples_in(batch: dict[str, torch.Tensor]) -> list[int]:
    """Indices into TRAIN, beyond its end into SYMBOLIC."""
    starts = batch["labels_RT"][batch["decoder_ids_RT"] == BOS].numpy()
    in_train = np.searchsorted(TRAIN.target_offsets, starts - 20_000)
    return np.where(starts < 40_000, in_train, 53 + np.searchsorted(SYMBOLIC.target_offsets, starts - 40_000)).tolist()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


phases = st.builds(
    phase,
    st.sampled_from([0.05, 0.2, 0.3]),
    symbolic_frac=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]),
    tools_max=st.sampled_from([None, 1, 3]),
    source_tokens_max=st.sampled_from([None, 20]),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(phases, max_size=3), st.integers(0, 60), st.integers(0, 9), st.sampled_from([1, 2, 4]))
def test_a_stream_that_starts_later_continues_the_one_from_the_beginning(chosen, start: int, seed: int, ranks: int):
    """Across phases too, and for every rank's share."""
    curriculum = Curriculum(steps=40, phases={str(n): one for n, one in enumerate(chosen)})
    whole, later = stream(curriculum, seed=seed), stream(curriculum, seed=seed)
    later.start_at(start)
    later.share(rank=ranks - 1, ranks=ranks)
    for first, second in zip(islice(whole, start, start + 5), islice(later, 5), strict=True):
        assert same({name: tensor[ranks - 1 :: ranks] for name, tensor in first.items()}, second)


@pytest.mark.parametrize("window_examples", [16, 100])
def test_without_phases_the_stream_is_a_permutation_an_epoch_packed_by_window(window_examples: int):
    """The stream as it was before there were curricula, written down once more."""
    rows: list[list[int]] = []
    for epoch in range(4):
        rng = np.random.default_rng([1, epoch])
        order = rng.permutation(53)
        for start in range(0, 53, window_examples):
            window = order[start : start + window_examples]
            packed = pack(TRAIN.source_lengths_N[window], TRAIN.target_lengths_N[window], **ROW)
            rows += [[int(window[i]) for i in packed[j]] for j in rng.permutation(len(packed))]
    none = Curriculum(steps=9, phases={})
    shape = {**STREAM, "window_examples": window_examples}
    found = PackedBatches(TRAIN, **shape, seed=1, stretches=none.stretches(TRAIN, None))
    batches = [collate(TRAIN, rows[i : i + 4], **ROW) for i in range(0, len(rows) - 3, 4)]
    assert len(batches) > 20
    assert all(same(first, second) for first, second in zip(batches, found, strict=False))


def test_each_phase_shows_what_it_chooses_for_as_long_as_it_lasts_and_then_everything_comes():
    curriculum = Curriculum(
        steps=30,
        phases={
            "few": phase(0.2, tools_max=2),
            "short": phase(0.1, source_tokens_max=10),
            "both": phase(0.25, tools_max=4, symbolic_frac=0.4),
        },
    )
    assert curriculum.batches() == {"few": 6, "short": 3, "both": 7}  # ends at 6, 9 and 16.5, rounded to even
    shown = [examples_in(batch) for batch in islice(stream(curriculum), 60)]
    few, short, both = (list(chain.from_iterable(part)) for part in (shown[:6], shown[6:9], shown[9:16]))
    assert set(few) == set(np.flatnonzero(TRAIN.tools <= 2))
    assert set(short) <= set(np.flatnonzero(TRAIN.source_lengths_N <= 10))
    assert {i for i in both if i < 53} <= set(np.flatnonzero(TRAIN.tools <= 4))
    assert any(i >= 53 for i in both)
    assert sorted(set(chain.from_iterable(shown[16:]))) == list(range(53))
    plain = PackedBatches(TRAIN, **STREAM, seed=1)
    after = stream(curriculum)
    after.start_at(16)
    assert all(same(first, second) for first, second in islice(zip(plain, after, strict=False), 10))


@pytest.mark.parametrize("frac", [0.05, 0.3, 0.5, 0.9])
def test_symbolic_examples_have_their_share_of_every_window_and_all_take_turns(frac: float):
    stretch = Curriculum(steps=9, phases={"a": phase(1.0, symbolic_frac=frac)}).stretches(TRAIN, SYMBOLIC)[0]
    orders = [stretch.order(stretch.generator(3, epoch), seed=3, epoch=epoch) for epoch in range(30)]
    for order in orders:
        for start in range(0, len(order) - 16, 16):
            assert abs((order[start : start + 16] >= 53).sum() - 16 * frac) <= 1
    times = np.bincount(np.concatenate(orders), minlength=70)
    # Whole permutations one after the other: nothing is shown twice more often than anything else.
    assert np.ptp(times[:53]) <= 1
    assert np.ptp(times[53:]) <= 1
    assert times[53:].sum() / times.sum() == pytest.approx(frac, abs=0.02)
    assert not np.array_equal(orders[0], orders[1])


def test_only_symbolic_examples():
    found = Curriculum(steps=8, phases={"a": phase(0.5, symbolic_frac=1.0)})
    shown = [examples_in(batch) for batch in islice(stream(found), 5)]
    assert min(chain.from_iterable(shown[:4])) >= 53
    assert max(shown[4]) < 53


def test_the_teacher_says_nothing_of_symbolic_examples():
    """Where the train split has distributions and they have none, the objective falls back on labels."""
    silent = shard_of(4, first_token=40_000, seed=2)
    silent = Shard(**{**vars(silent), "signals": None})
    batch = collate(TRAIN, [[0], [53], [54], [1]], **ROW, beside=silent)
    of_train = (batch["labels_RT"] >= 20_000) & (batch["labels_RT"] < 40_000)
    of_symbolic = batch["labels_RT"] >= 40_000
    assert of_train.any()
    assert of_symbolic.any()
    assert (batch["teacher_log_probs_RTK"][of_train] == -1).all()
    assert (batch["teacher_log_probs_RTK"][of_symbolic] == -torch.inf).all()


def test_a_phase_that_chooses_nothing_is_told_with_numbers():
    short = Curriculum(steps=9, phases={"tiny": phase(0.5, tools_max=3, source_tokens_max=1)})
    few = Shard(**{**vars(TRAIN), "source_offsets": np.arange(54) * 2})
    with pytest.raises(ConfigError) as told:
        short.stretches(few, None)
    for word in ("curriculum.phases.tiny", "53 training", "tools_max=3", "source_tokens_max=1", "tokens 2"):
        assert word in str(told.value)
    mixed = Curriculum(steps=9, phases={"copying": phase(0.5, symbolic_frac=0.5)})
    with pytest.raises(ConfigError, match=r"copying\.symbolic_frac=0\.5.*0 symbolic"):
        mixed.stretches(TRAIN, None)
    with pytest.raises(ConfigError, match=r"data\.symbolic_examples=0"):
        mixed.check(symbolic_examples=0)
    mixed.check(symbolic_examples=1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Curriculum(steps=9, phases={"a": phase(0.6), "b": phase(0.6)}), "add up to 1.2"),
        (lambda: phase(0.5, symbolic_frac=0.001), "0.01 to 0.99"),
    ],
)
def test_impossible_settings_are_refused(make, words: str):
    with pytest.raises(ValueError, match=words):
        make()


def test_configured_phases_keep_their_order_and_place():
    """The fractions are of the steps that the run was started with."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        node = compose("train", ["curriculum=induction_length", "trainer.steps=200"])
        found = config.build(node.curriculum)
        empty = config.build(compose("train").curriculum)
    assert found.batches() == {"two_tools": 30, "four_tools": 30}
    assert found.uses_symbolic
    assert empty.batches() == {}
    assert not empty.uses_symbolic


def test_the_datamodule_streams_the_curriculum():
    curriculum = Curriculum(steps=8, phases={"a": phase(0.5, symbolic_frac=0.5)})
    data = PackedData(train=TRAIN, validation=TRAIN, symbolic=SYMBOLIC, curriculum=curriculum, **{**STREAM, "seed": 1})
    assert all(same(a, b) for a, b in zip(islice(data.train_dataloader(), 6), stream(curriculum), strict=False))
    assert isinstance(data.stream.stretches[-1], Stretch)
