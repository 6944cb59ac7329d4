"""What conf/data states: which requests, how they are varied, and how they become tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from needle.corpus.augment import Augment
from needle.corpus.split import SplitRule

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class TextSettings:
    """`tokenizer`: a folder whose tokenizer is taken; null: one of `vocab_size` pieces is trained on the train
    split."""

    style: Literal["signature", "json"]
    vocab_size: Annotated[int, Field(ge=300, le=65536)]
    tokenizer: Path | None
    max_source_tokens: Count
    max_target_tokens: Count


@dataclass(frozen=True)
class PackingSettings:
    source_row_tokens: Count
    target_row_tokens: Count
    window_examples: Count


@dataclass(frozen=True)
class EvaluationSettings:
    tools_min: Count
    tools_max: Count
    hard_frac: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class DataSettings:
    """`corpus`: folder of the recorded teacher's files. `answers`: which of a teacher's samples a training request is
    learnt from: the first (the commonest, the recorded one), or all, each an example of its own that is weighed by its
    share. `given`: JSONL files of examples with their tools, which join the training examples. `symbolic_examples`:
    how many a curriculum may mix in (needle.corpus.symbolic). `train_requests`: so many of the slice's training
    requests, the same for every seed, a smaller number among those of a larger; null: all."""

    corpus: Path
    answers: Literal["first", "all"]
    given: tuple[Path, ...]
    given_copies: Count
    symbolic_examples: Annotated[int, Field(ge=0)]
    split: SplitRule
    augment: Augment
    evaluation: EvaluationSettings
    text: TextSettings
    packing: PackingSettings
    train_requests: Count | None
    copies_per_request: Count
    seed: Annotated[int, Field(ge=0)]
