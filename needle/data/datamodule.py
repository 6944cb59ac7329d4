"""Packed batches as a LightningDataModule."""

import pytorch_lightning as pl
import torch
from torch import Tensor

from needle.data.curriculum import Curriculum
from needle.data.packing import PackedBatches, collate, pack
from needle.data.shards import Shard


class ValidationBatches(torch.utils.data.Dataset):
    """Every example of a shard once, packed; the last batch is filled up with empty rows."""

    def __init__(self, shard: Shard, *, rows_per_batch: int, source_row_tokens: int, target_row_tokens: int):
        self.shape = {"source_row_tokens": source_row_tokens, "target_row_tokens": target_row_tokens}
        rows = pack(shard.source_lengths_N, shard.target_lengths_N, **self.shape)
        # Whole batches only differ in content, not in shape: a compiled student is compiled once.
        rows += [[] for _ in range(-len(rows) % rows_per_batch)]
        self.shard = shard
        self.batches = [rows[i : i + rows_per_batch] for i in range(0, len(rows), rows_per_batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return collate(self.shard, self.batches[index], **self.shape)


class PackedData(pl.LightningDataModule):
    """The train stream, resumable (see PackedBatches), and the validation set.

    `symbolic`: what the curriculum's phases mix in; None where it asks for none.

    Raises:
        ConfigError: a phase of the curriculum chooses no example.
    """

    def __init__(
        self,
        *,
        train: Shard,
        validation: Shard,
        symbolic: Shard | None,
        curriculum: Curriculum,
        rows_per_batch: int,
        source_row_tokens: int,
        target_row_tokens: int,
        window_examples: int,
        seed: int,
    ):
        super().__init__()
        self.train, self.validation, self.rows_per_batch = train, validation, rows_per_batch
        self.shape = {"source_row_tokens": source_row_tokens, "target_row_tokens": target_row_tokens}
        self.stream = PackedBatches(
            train,
            rows_per_batch=rows_per_batch,
            window_examples=window_examples,
            seed=seed,
            stretches=curriculum.stretches(train, symbolic),
            beside=symbolic,
            **self.shape,
        )

    def train_dataloader(self) -> PackedBatches:
        if self.trainer is not None and self.trainer.world_size > 1:
            self.stream.share(rank=self.trainer.global_rank, ranks=self.trainer.world_size)
        return self.stream

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        batches = ValidationBatches(self.validation, rows_per_batch=self.rows_per_batch, **self.shape)
        return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)
