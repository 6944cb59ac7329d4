"""Token shards on disk: one flat array a field, memory-mapped, with offsets; example `i` is a slice of each.

A split's folder holds source.npy, target.npy (uint16), spans.npy (uint8), source_offsets.npy, target_offsets.npy
(int64), keys.npy (uint64, hashes that name the examples across shards), and an array for each field of `About`. Teacher
signals lie in a folder of their own, aligned to target.npy.
"""

# N examples, X target tokens of all examples, K stored teacher tokens

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from needle.errors import DataError

MAX_VOCABULARY = 2**16
GOLD_TOOLS_MAX = 62


class About(NamedTuple):
    """What a loss may want to know of a whole example.

    kind: index into schema.KINDS. gold_tools: bit i is set where the answer calls the prompt's tool i, of its first
    GOLD_TOOLS_MAX. tools: how many the prompt shows. answer_weight: the answer's share among the teacher's samples for
    this request, above 0 to 1. confidence: how far the answer is trusted, 0 to 1.
    """

    kind: int
    gold_tools: int
    tools: int
    answer_weight: float = 1.0
    confidence: float = 1.0


ABOUT_TYPES = {
    "kind": np.uint8,
    "gold_tools": np.int64,
    "tools": np.uint16,
    "answer_weight": np.float32,
    "confidence": np.float32,
}


def example_key(name: str) -> int:
    """What keys.npy holds of an example of this id."""
    return int.from_bytes(hashlib.sha1(name.encode()).digest()[:8], "little")


class ShardWriter:
    """Collects encoded examples and writes them as one split. Memory: two bytes a token."""

    def __init__(self) -> None:
        self._sources: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._spans: list[np.ndarray] = []
        self._keys: list[int] = []
        self._about: list[About] = []

    def __len__(self) -> int:
        return len(self._sources)

    def add(self, key: str, source: list[int], target: list[int], spans: list[int], about: About) -> None:
        self._sources.append(np.asarray(source, dtype=np.uint16))
        self._targets.append(np.asarray(target, dtype=np.uint16))
        self._spans.append(np.asarray(spans, dtype=np.uint8))
        self._keys.append(example_key(key))
        self._about.append(about)

    def save(self, folder: Path) -> dict[str, int]:
        """Writes the split; returns its counts."""
        folder.mkdir(parents=True)
        for name, parts in (("source", self._sources), ("target", self._targets), ("spans", self._spans)):
            dtype = np.uint8 if name == "spans" else np.uint16
            np.save(folder / f"{name}.npy", np.concatenate(parts) if parts else np.zeros(0, dtype))
        for name, parts in (("source", self._sources), ("target", self._targets)):
            np.save(folder / f"{name}_offsets.npy", np.cumsum([0, *map(len, parts)], dtype=np.int64))
        np.save(folder / "keys.npy", np.asarray(self._keys, dtype=np.uint64))
        for place, (name, dtype) in enumerate(ABOUT_TYPES.items()):
            np.save(folder / f"{name}.npy", np.asarray([about[place] for about in self._about], dtype=dtype))
        return {
            "examples": len(self),
            "source_tokens": sum(map(len, self._sources)),
            "target_tokens": sum(map(len, self._targets)),
        }


@dataclass(frozen=True)
class Signals:
    """A white-box teacher's top-k log-probabilities (nats) for every target token: [X, K] each, ids sorted by mass."""

    ids_XK: np.ndarray
    log_probs_XK: np.ndarray

    @staticmethod
    def open(folder: Path) -> "Signals":
        return Signals(_load(folder / "ids.npy"), _load(folder / "log_probs.npy"))


@dataclass(frozen=True)
class Shard:
    """One split, memory-mapped."""

    source: np.ndarray
    target: np.ndarray
    spans: np.ndarray
    source_offsets: np.ndarray
    target_offsets: np.ndarray
    kind: np.ndarray
    gold_tools: np.ndarray
    tools: np.ndarray
    answer_weight: np.ndarray
    confidence: np.ndarray
    signals: Signals | None = None

    @staticmethod
    def open(folder: Path, signals_folder: Path | None = None) -> "Shard":
        """Raises DataError when an array is missing, cut off, or not aligned with the others."""
        names = ("source", "target", "spans", "source_offsets", "target_offsets", *ABOUT_TYPES)
        arrays = {name: _load(Path(folder) / f"{name}.npy") for name in names}
        signals = Signals.open(Path(signals_folder)) if signals_folder is not None else None
        shard = Shard(**arrays, signals=signals)
        if shard.source_offsets[-1] != len(shard.source) or shard.target_offsets[-1] != len(shard.target):
            raise DataError(f"{folder} is inconsistent: offsets do not end where the tokens do; prepare it again")
        if len(shard.spans) != len(shard.target):
            raise DataError(
                f"{folder} is inconsistent: {len(shard.spans)} spans for {len(shard.target)} target tokens; prepare it "
                "again"
            )
        for name in ABOUT_TYPES:
            if len(arrays[name]) != len(shard):
                raise DataError(
                    f"{folder} is inconsistent: {name}.npy speaks of {len(arrays[name])} examples, there are "
                    f"{len(shard)}; prepare it again"
                )
        if signals is not None and signals.ids_XK.shape != signals.log_probs_XK.shape:
            raise DataError(
                f"{signals_folder} is inconsistent: ids of shape {signals.ids_XK.shape}, log-probabilities of "
                f"{signals.log_probs_XK.shape}; run needle.signals again"
            )
        if signals is not None and len(signals.ids_XK) != len(shard.target):
            raise DataError(
                f"{signals_folder} has signals for {len(signals.ids_XK)} target tokens, {folder} has "
                f"{len(shard.target)}: they belong to other shards; run needle.signals again"
            )
        return shard

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    @property
    def source_lengths_N(self) -> np.ndarray:
        return np.diff(self.source_offsets)

    @property
    def target_lengths_N(self) -> np.ndarray:
        return np.diff(self.target_offsets)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}; delete its folder and prepare it again") from error
