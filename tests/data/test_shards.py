"""What a shard was given, it gives back; arrays that do not belong together are refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from needle.data.shards import ABOUT_TYPES, GOLD_TOOLS_MAX, MAX_VOCABULARY, About, Shard, ShardWriter
from needle.errors import DataError

tokens = st.lists(st.integers(0, MAX_VOCABULARY - 1), min_size=1, max_size=9)
encoded = st.lists(st.tuples(tokens, tokens), max_size=6)


def about(i: int) -> About:
    """Values that float32 holds exactly."""
    gold_tools = 1 << (i * 11 % GOLD_TOOLS_MAX)
    return About(kind=i % 9, gold_tools=gold_tools, tools=300 * i, answer_weight=1 / 2**i, confidence=i / 8)


def write(folder: Path, examples: list[tuple[list[int], list[int]]]) -> dict[str, int]:
    writer = ShardWriter()
    for i, (source, target) in enumerate(examples):
        writer.add(f"example {i}", source, target, [token % 5 for token in target], about(i))
    return writer.save(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train", [([1, 2, 3], [4, 5]), ([65535], [6, 7, 8])])
    return tmp_path / "train"


@given(examples=encoded)
def test_every_example_comes_back(tmp_path_factory: pytest.TempPathFactory, examples: list):
    folder = tmp_path_factory.mktemp("shard") / "train"
    counts = write(folder, examples)
    shard = Shard.open(folder)
    assert len(shard) == counts["examples"] == len(examples)
    assert counts["source_tokens"] == shard.source_lengths_N.sum() == sum(len(source) for source, _ in examples)
    assert counts["target_tokens"] == shard.target_lengths_N.sum() == sum(len(target) for _, target in examples)
    for i, (source, target) in enumerate(examples):
        place = slice(*shard.target_offsets[i : i + 2])
        assert shard.source[slice(*shard.source_offsets[i : i + 2])].tolist() == source
        assert shard.target[place].tolist() == target
        assert shard.spans[place].tolist() == [token % 5 for token in target]
        assert tuple(getattr(shard, name)[i] for name in ABOUT_TYPES) == about(i)


def test_a_token_beyond_sixteen_bits_is_refused_not_wrapped():
    with pytest.raises(OverflowError):
        ShardWriter().add("a", [MAX_VOCABULARY], [1], [0], about(0))


def test_a_split_is_never_written_over(folder: Path):
    with pytest.raises(FileExistsError):
        write(folder, [([1], [2])])


@pytest.mark.parametrize("name", ["source", "target", "spans", "source_offsets", "target_offsets", *ABOUT_TYPES])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "pickle"])
def test_a_damaged_array_is_named(folder: Path, name: str, damage: str):
    path = folder / f"{name}.npy"
    whole = path.read_bytes()
    path.unlink()
    if damage == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif damage != "gone":
        path.write_bytes(whole[: len(whole) - 1 if damage == "cut" else 0])
    with pytest.raises(DataError, match=f"{name}.npy"):
        Shard.open(folder)


@pytest.mark.parametrize("name", ["source", "target", "spans"])
def test_arrays_of_different_lengths_are_refused(folder: Path, name: str):
    np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy")[:-1])
    with pytest.raises(DataError, match="inconsistent"):
        Shard.open(folder)


def test_signals_are_aligned_to_the_target_or_refused(folder: Path, tmp_path: Path):
    signals = tmp_path / "signals"
    signals.mkdir()
    np.save(signals / "ids.npy", np.arange(10, dtype=np.uint16).reshape(5, 2))
    np.save(signals / "log_probs.npy", np.log(np.full((5, 2), 0.5, np.float32)))
    shard = Shard.open(folder, signals)
    assert shard.signals is not None
    assert shard.signals.ids_XK.shape == shard.signals.log_probs_XK.shape == (len(shard.target), 2)
    np.save(signals / "ids.npy", np.zeros((5, 3), np.uint16))
    with pytest.raises(DataError, match="inconsistent"):
        Shard.open(folder, signals)
    np.save(signals / "ids.npy", np.zeros((4, 2), np.uint16))
    np.save(signals / "log_probs.npy", np.zeros((4, 2), np.float32))
    with pytest.raises(DataError, match="other shards"):
        Shard.open(folder, signals)
    (signals / "log_probs.npy").unlink()
    with pytest.raises(DataError, match=r"log_probs\.npy"):
        Shard.open(folder, signals)
