"""A trained student as a white-box teacher: it re-scores the recorded answers of a shard, token by token.

The student it teaches must share its tokenizer, since the stored distributions are over its pieces.
"""

# R rows, T target tokens, V vocabulary, K stored tokens, X target tokens of all examples

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from needle.artifacts import fingerprint, hash_file
from needle.data.packing import collate, pack
from needle.data.shards import Shard
from needle.errors import ConfigError, DataError


@dataclass(frozen=True)
class CheckpointTeacher:
    """`checkpoint`: a student's folder. `top_k`: stored tokens a position. `temperature`: of the stored
    distribution."""

    checkpoint: Path
    top_k: Annotated[int, Field(ge=1, le=65536)]
    temperature: Annotated[float, Field(gt=0)]
    capabilities: ClassVar[frozenset[str]] = frozenset({"text", "top_k", "full_logits", "live"})
    tokenizer: ClassVar[Literal["student", "own"]] = "student"

    def model_folder(self) -> Path:
        folder = Path(self.checkpoint)
        return folder / "model" if (folder / "model").is_dir() else folder

    def identity(self) -> str:
        """Hash of what the signals depend on besides the shards."""
        weights = self.model_folder() / "model.safetensors"
        if not weights.is_file():
            raise DataError(
                f"teacher.checkpoint={self.checkpoint}: no model.safetensors there; train one "
                "(`make teacher`) or name a student's folder"
            )
        return fingerprint(weights=hash_file(weights), top_k=self.top_k, temperature=self.temperature)

    def signals_folder(self, artifacts: Path, shards: Path) -> Path:
        return artifacts / f"signals-{fingerprint(shards=shards.name, teacher=self.identity())}"

    def check_tokenizer(self, shards: Path) -> None:
        """Raises DataError when the shards were written with another tokenizer."""
        if hash_file(self.model_folder() / "tokenizer.json") != hash_file(shards / "tokenizer.json"):
            raise DataError(
                f"{shards} were written with another tokenizer than the teacher's; prepare them with "
                f"data.text.tokenizer={self.model_folder()}"
            )

    @torch.no_grad()
    def top_log_probs(
        self,
        model: torch.nn.Module,
        shard: Shard,
        *,
        rows_per_batch: int,
        source_row_tokens: int,
        target_row_tokens: int,
        progress: Callable[[int, int], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (uint16) and log-probabilities in nats (float32) of the top_k tokens at every target token: [X, K]
        each.

        Raises:
            ConfigError: the teacher has fewer tokens than `top_k`.
        """
        pieces = model.config.vocab_size
        if self.top_k > pieces:
            raise ConfigError(
                f"teacher.top_k={self.top_k}: the teacher's tokenizer has {pieces} pieces; choose at most that many"
            )
        shape = {"source_row_tokens": source_row_tokens, "target_row_tokens": target_row_tokens}
        rows = pack(shard.source_lengths_N, shard.target_lengths_N, **shape)
        ids_XK = np.zeros((len(shard.target), self.top_k), np.uint16)
        log_probs_XK = np.zeros((len(shard.target), self.top_k), np.float32)
        for start in range(0, len(rows), rows_per_batch):
            chosen = rows[start : start + rows_per_batch]
            batch = collate(shard, chosen, **shape)
            logits_RTV = model(
                input_ids=batch["source_ids_RS"],
                source_segments_BS=batch["source_segments_RS"],
                decoder_input_ids=batch["decoder_ids_RT"],
                target_segments_BT=batch["target_segments_RT"],
            ).logits
            top = (logits_RTV.float() / self.temperature).log_softmax(dim=-1).topk(self.top_k, dim=-1)
            for r, row in enumerate(chosen):
                t = 0
                for index in row:
                    place = slice(*shard.target_offsets[index : index + 2])
                    end = t + place.stop - place.start
                    ids_XK[place], log_probs_XK[place] = top.indices[r, t:end], top.values[r, t:end]
                    t = end
            progress(min(start + rows_per_batch, len(rows)), len(rows))
        return ids_XK, log_probs_XK
