"""Stores a white-box teacher's next-token distributions for a data setting's shards, once, for every student to read.

    python -m needle.signals teacher=checkpoint teacher.checkpoint=runs/train/... data=demo

Cost: one forward pass of the teacher over train and validation; 6 x top_k bytes a target token on disk.
"""

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from needle import artifacts, config
from needle.data.settings import DataSettings
from needle.data.shards import Shard
from needle.prepare import shards_folder
from needle.progress import Progress
from needle.runs import Paths
from needle.student import load
from needle.teacher.checkpoint import CheckpointTeacher


@config.stage("signals")
def main(
    cfg: dict[str, Any],
    *,
    teacher: CheckpointTeacher,
    data: DataSettings,
    paths: Paths,
    rows_per_batch: Annotated[int, Field(ge=1)],
    threads: Annotated[int, Field(ge=1)] | None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    shards = shards_folder(paths, data)
    artifacts.require(shards, kind="shards", command="python -m needle.prepare " + config.as_overrides(cfg, "data"))
    teacher.check_tokenizer(shards)
    folder = teacher.signals_folder(paths.artifacts, shards)
    if folder.is_dir():
        print(f"signals are there already: {folder}")
        return
    model, _ = load(teacher.model_folder())
    counts: dict[str, Any] = {"top_k": teacher.top_k, "temperature": teacher.temperature}
    inputs = {"shards": shards.name, "teacher": str(teacher.checkpoint), "teacher_identity": teacher.identity()}
    with artifacts.publish(folder, kind="signals", inputs=inputs, counts=counts) as temporary:
        for split in ("train", "validation"):
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
            (temporary / split).mkdir()
            np.save(temporary / split / "ids.npy", ids)
            np.save(temporary / split / "log_probs.npy", log_probs)
            label_log_probs = np.where(ids == np.asarray(shard.target)[:, None], log_probs, -np.inf).max(axis=1)
            stored = np.isfinite(label_log_probs)
            counts[split] = {
                "target_tokens": len(shard.target),
                "mass_stored_frac": round(float(np.exp(log_probs).sum(axis=1).mean()), 6),
                "label_in_top_k_frac": round(float(stored.mean()), 6),
                "label_is_top_1_frac": round(float((ids[:, 0] == shard.target).mean()), 6),
            }
            print(f"{split}: {counts[split]}")
    print(f"signals: {folder}")


if __name__ == "__main__":
    main()
