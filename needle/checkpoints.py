"""Training checkpoints that are either whole or not there."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn

from needle.artifacts import FULL
from needle.errors import DataError, UserError

if TYPE_CHECKING:
    from needle.distil import Distillation


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: a kill or a full disk leaves the older checkpoint
    whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        try:
            with partial.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except Exception as error:
            cause = _disk_error(error)
            if cause is None:
                raise
            partial.unlink(missing_ok=True)
            free_mib = shutil.disk_usage(path.parent).free / 2**20
            why = "the disk is full" if cause.errno in FULL else str(cause)
            older = newest_checkpoint(path.parent, required=False)
            rest = f"the last whole checkpoint is {older}" if older else "there is no older checkpoint"
            raise UserError(
                f"cannot write checkpoint {path}: {why} ({free_mib:.0f} MiB free); {rest}. "
                f"Free some space, then continue with resume={path.parent.parent}"
            ) from error
        finally:
            partial.unlink(missing_ok=True)


def _disk_error(error: BaseException | None) -> OSError | None:
    """The system's error behind it: torch.save turns a full disk into a RuntimeError about positions."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def step_of(path: Path) -> int:
    found = re.search(r"step=(\d+)", path.name)
    return int(found.group(1)) if found else -1


def newest_checkpoint(folder: Path, *, required: bool = True) -> Path | None:
    """The whole checkpoint with the highest step; damaged ones are passed over with a note on standard error.

    Raises:
        DataError: there is none and `required`.
    """
    for path in sorted(Path(folder).glob("*.ckpt"), key=step_of, reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return path
        except Exception as error:  # a cut zip, a wrong magic number, a short read: each its own exception
            print(f"passing over damaged checkpoint {path}: {error}", file=sys.stderr)
    if required:
        raise DataError(f"no usable checkpoint in {folder}: the run cannot be continued, start it anew")
    return None


class Checkpoints(Callback):
    """Writes one every `checkpoint_every_steps`, behind the validation where one follows that step, since a run that
    goes on does not repeat it. Keeps the newest and the one before, in case the newest is damaged by what stopped the
    run."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: "Distillation", *_: Any) -> None:
        if not module.validates_now:
            self._keep(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: "Distillation") -> None:
        # A stop has one more validation, and the one after the last step is not part of the training.
        if module.validates_now and trainer.state.fn == TrainerFn.FITTING:
            self._keep(trainer, module)

    def _keep(self, trainer: pl.Trainer, module: "Distillation") -> None:
        if trainer.global_step % module.settings.checkpoint_every_steps == 0:
            save_checkpoint(trainer, module)
            if trainer.is_global_zero:
                for path in sorted((module.run.folder / "checkpoints").glob("*.ckpt"), key=step_of)[:-2]:
                    path.unlink(missing_ok=True)


def save_checkpoint(trainer: pl.Trainer, module: "Distillation") -> None:
    """Of all ranks together; the first writes it."""
    trainer.save_checkpoint(module.run.folder / "checkpoints" / f"step={trainer.global_step}.ckpt")
