"""Where metrics go besides history.jsonl: Weights & Biases, or nowhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from needle.runs import Run


class NoTracking:
    """logger=none: history.jsonl in the run folder is all there is."""

    def open(self, run: Run, cfg: dict[str, Any]) -> list[Any]:
        return []

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def close(self, exit_code: int) -> None:
        pass


@dataclass(frozen=True)
class WandbTracking:
    """logger=wandb: one W&B run a job, offline unless `mode` says otherwise; the key comes from WANDB_API_KEY only."""

    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: tuple[str, ...]
    notes: str | None
    mode: Literal["offline", "online"]

    def open(self, run: Run, cfg: dict[str, Any]) -> list[Any]:
        """A Lightning logger whose W&B run holds the whole resolved configuration from its first record on."""
        from pytorch_lightning.loggers import WandbLogger

        logger = WandbLogger(
            project=self.project,
            entity=self.entity,
            group=self.group,
            job_type=self.job_type,
            tags=list(self.tags),
            notes=self.notes,
            name=run.folder.name,
            id=run.folder.name,
            save_dir=str(run.folder),
            offline=self.mode == "offline",
            config={key: value for key, value in cfg.items() if not key.startswith("_")}
            | {"choices": cfg["_choices_"]},
            resume="allow",
        )
        _ = logger.experiment  # starts the run now: a failure to start belongs before the training, not into it
        return [logger]

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        if wandb.run is not None:
            wandb.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def close(self, exit_code: int) -> None:
        """Finishes the run: without it every job of a multirun would write into the first one."""
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=exit_code)


Tracking = NoTracking | WandbTracking
