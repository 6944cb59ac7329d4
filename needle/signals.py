"""Stores a teacher's next-token distributions for a data setting's shards, once, for every student to read.

    python -m needle.signals teacher=checkpoint teacher.checkpoint=runs/train/... data=demo
    python -m needle.signals teacher=gemini teacher.response_logprobs=5 data=aligned data.corpus=artifacts/corpus-HASH
    python -m needle.signals teacher=transformers_local data=demo alignment=index

A checkpoint shares the student's tokens and scores every example. Any other teacher's tokens are its own, and are
aligned with the student's (conf/alignment): an asked one's log-probabilities come from the ledger, where they were
bought with its answers; a model that is run here scores the examples now.

Cost: one forward pass of a scoring teacher over train and validation, a millisecond of one core for each new name, key
or value to align; 6 x top_k bytes a target token on disk.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from needle import artifacts, config
from needle.data.settings import DataSettings
from needle.data.shards import Shard
from needle.errors import ConfigError, DataError
from needle.prepare import origins, shards_folder
from needle.progress import Progress
from needle.runs import Paths
from needle.student import load
from needle.teacher import aligned
from needle.teacher.aligned import Alignment
from needle.teacher.base import Teacher
from needle.teacher.checkpoint import CheckpointTeacher
from needle.text.tokenizer import TextCodec

SPLITS = ("train", "validation")


def scoring(*, teacher: Teacher, **_: Any) -> None:
    """Raises ConfigError for a teacher that says nothing of tokens."""
    if "top_k" not in teacher.capabilities:
        raise ConfigError(
            f"teacher={type(teacher).__name__} gives {', '.join(sorted(teacher.capabilities))} and no probabilities of "
            "tokens; use teacher=checkpoint, or one that is asked: gemini, openai_compatible, transformers_local"
        )


@config.stage("signals")
@config.cross_check(scoring)
def main(
    cfg: dict[str, Any],
    *,
    teacher: Teacher,
    alignment: Alignment,
    data: DataSettings,
    paths: Paths,
    rows_per_batch: Annotated[int, Field(ge=1)],
    threads: Annotated[int, Field(ge=1)] | None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    shards = shards_folder(paths, data)
    artifacts.require(shards, kind="shards", command="python -m needle.prepare " + config.as_overrides(cfg, "data"))
    if isinstance(teacher, CheckpointTeacher):
        teacher.check_tokenizer(shards)
    folder = aligned.signals_folder(teacher, alignment=alignment, artifacts=paths.artifacts, shards=shards)
    if folder.is_dir():
        print(f"signals are there already: {folder}")
        return
    if isinstance(teacher, CheckpointTeacher):
        _score(teacher, data, shards, folder, rows_per_batch=rows_per_batch)
    else:
        _align(teacher, alignment, data, paths, shards, folder)
    print(f"signals: {folder}")


def _score(teacher: CheckpointTeacher, data: DataSettings, shards: Path, folder: Path, *, rows_per_batch: int) -> None:
    model, _ = load(teacher.model_folder())
    counts: dict[str, Any] = {"top_k": teacher.top_k, "temperature": teacher.temperature}
    inputs = {"shards": shards.name, "teacher": str(teacher.checkpoint), "teacher_identity": teacher.identity()}
    with artifacts.publish(folder, kind="signals", inputs=inputs, counts=counts) as temporary:
        for split in SPLITS:
            shard = Shard.open(shards / split)
            with Progress(f"teacher scores {split}") as progress:
                ids, log_probs = teacher.top_log_probs(
                    model,
                    shard,
                    rows_per_batch=rows_per_batch,
                    source_row_tokens=data.packing.source_row_tokens,
                    target_row_tokens=data.packing.target_row_tokens,
                    progress=progress.update,
                )
            _save(temporary / split, ids, log_probs)
            label_log_probs = np.where(ids == np.asarray(shard.target)[:, None], log_probs, -np.inf).max(axis=1)
            stored = np.isfinite(label_log_probs)
            counts[split] = {
                "target_tokens": len(shard.target),
                "mass_stored_frac": round(float(np.exp(log_probs).sum(axis=1).mean()), 6),
                "label_in_top_k_frac": round(float(stored.mean()), 6),
                "label_is_top_1_frac": round(float((ids[:, 0] == shard.target).mean()), 6),
            }
            print(f"{split}: {counts[split]}")


def _align(teacher: Any, alignment: Alignment, data: DataSettings, paths: Paths, shards: Path, folder: Path) -> None:
    """Raises DataError when the teacher says nothing of any training example."""
    answers = aligned.answers_of(teacher, alignment=alignment, ledger=paths.ledger)
    counts: dict[str, Any] = {"top_k": alignment.top_k, "temperature": aligned.TEMPERATURE, "method": alignment.method}
    inputs = {"shards": shards.name, "teacher": answers.name}
    rows = aligned.Rows(TextCodec.load(shards), alignment, known=answers.vocabulary())
    with artifacts.publish(folder, kind="signals", inputs=inputs, counts=counts) as temporary:
        for split in SPLITS:
            shard = Shard.open(shards / split)
            keys = np.load(shards / split / "keys.npy").tolist()
            examples = origins(split, shards=shards, paths=paths, data=data)
            with Progress(f"aligning {split}") as progress:
                stored = aligned.store(
                    rows,
                    answers.of(aligned.Varied(*pair) for pair in examples),
                    index_of={key: index for index, key in enumerate(keys)},
                    target=shard.target,
                    spans=shard.spans,
                    offsets_N=shard.target_offsets,
                    alignment=alignment,
                    progress=progress.update,
                )
            if split == "train" and not np.isfinite(stored.log_probs_XK).any():
                raise DataError(
                    f"{answers.name} says nothing of any training example: none has the request and the answer of a "
                    "bought one; train on the corpus that its answers became (data.corpus=artifacts/corpus-...)"
                )
            _save(temporary / split, stored.ids_XK, stored.log_probs_XK)
            counts[split] = stored.report
            for span, of_span in stored.report.items():
                print(f"{split} {span}: {of_span}")
    answers.close()


def _save(folder: Path, ids_XK: np.ndarray, log_probs_XK: np.ndarray) -> None:
    folder.mkdir()
    np.save(folder / "ids.npy", ids_XK)
    np.save(folder / "log_probs.npy", log_probs_XK)


if __name__ == "__main__":
    main()
