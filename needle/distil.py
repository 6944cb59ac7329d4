"""The LightningModule that joins student, loss, weighting and optimizer: glue, no mathematics.

One training step is one optimizer step over a packed batch. The batch may be computed in micro-batches of rows; every
micro-batch is divided by the whole batch's weight, so the split does not change the gradient.
"""

# R rows, T target tokens

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field
from torch import Tensor

from needle.loss.base import IGNORE, Loss, reduce
from needle.loss.weighting import SpanWeighting
from needle.optim import OptimSettings
from needle.runs import Run
from needle.text.render import Span

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class TrainerSettings:
    """How a run is executed (conf/trainer). `steps` and `rows_per_batch` set the token budget and so affect results."""

    accelerator: str
    devices: Count
    strategy: str
    precision: str
    threads: Count | None
    compile: bool
    steps: Count
    rows_per_batch: Count
    rows_per_micro_batch: Count
    grad_clip_norm: Annotated[float, Field(gt=0)]
    validate_every_steps: Count
    checkpoint_every_steps: Count
    log_every_steps: Count

    def __post_init__(self) -> None:
        if self.rows_per_batch % self.rows_per_micro_batch:
            raise ValueError(
                f"rows_per_batch={self.rows_per_batch} is not a multiple of "
                f"rows_per_micro_batch={self.rows_per_micro_batch}"
            )
        if self.rows_per_batch % self.devices:
            raise ValueError(f"rows_per_batch={self.rows_per_batch} does not divide among devices={self.devices}")


class Distillation(pl.LightningModule):
    """Trains `student` on packed batches; writes history.jsonl itself, so that a run is readable without any logger."""

    def __init__(
        self,
        *,
        student: torch.nn.Module,
        loss: Loss,
        weighting: SpanWeighting,
        optim: OptimSettings,
        settings: TrainerSettings,
        run: Run,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.student = student
        self.loss, self.weighting, self.optim, self.settings, self.run = loss, weighting, optim, settings, run
        self.tokens_seen = self.steps_done = 0
        self.last_loss_nats = float("nan")
        self.seconds_before = 0.0
        self.seconds: Callable[[], float] = lambda: 0.0
        self._nats = torch.compile(self._nats_of_batch) if settings.compile else self._nats_of_batch
        self._validation: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optim.build(self.student)
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
        return optimizer

    def _nats_of_batch(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss in nats and whether the label is the likeliest token, both [R, T]."""
        logits = self.student(
            input_ids=batch["source_ids_RS"],
            source_segments_BS=batch["source_segments_RS"],
            decoder_input_ids=batch["decoder_ids_RT"],
            target_segments_BT=batch["target_segments_RT"],
        ).logits
        signals = {name: batch[name] for name in ("teacher_ids_RTK", "teacher_log_probs_RTK") if name in batch}
        nats = self.loss(student_logits_RTV=logits, labels_RT=batch["labels_RT"], **signals)
        return nats, logits.detach().argmax(dim=-1) == batch["labels_RT"]

    def training_step(self, batch: dict[str, Tensor], _: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        factor = self.optim.rate_at(self.global_step, total_steps=self.settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        weights = self.weighting(spans_RT=batch["spans_RT"], labels_RT=batch["labels_RT"])
        # Under DDP gradients are averaged over ranks, so each rank divides by the mean weight of all ranks.
        weight = self.all_gather(weights.sum()).float().mean() if self.trainer.world_size > 1 else weights.sum()
        detached = []
        for start in range(0, len(weights), self.settings.rows_per_micro_batch):
            rows = slice(start, start + self.settings.rows_per_micro_batch)
            nats, _right = self._nats({name: tensor[rows] for name, tensor in batch.items()})
            self.manual_backward(reduce(nats_RT=nats, weights_RT=weights[rows]).sum_nats / weight)
            detached.append(nats.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.grad_clip_norm)
        # The wrapped optimizer counts global_step and applies the precision plugin's scaling.
        self.optimizers().step()
        optimizer.zero_grad(set_to_none=True)
        self.tokens_seen += self.trainer.world_size * int(
            (batch["source_segments_RS"] > 0).sum() + (batch["target_segments_RT"] > 0).sum()
        )
        if self.global_step % self.settings.log_every_steps == 0 or self.global_step == self.settings.steps:
            nats = torch.cat(detached)
            if not torch.isfinite(nats).all():
                raise FloatingPointError(
                    f"the loss is not finite at step {self.global_step}; lower optim.muon_lr or adamw_lr"
                )
            self.last_loss_nats = float((nats * weights).sum() / weights.sum())
            record = {"train/loss_nats": self.last_loss_nats, "train/grad_norm": float(norm)}
            record |= {f"train/{name}": value for name, value in _by_span(nats, batch).items()}
            self._record({**record, "train/lr_factor": factor})

    def on_validation_epoch_start(self) -> None:
        self._validation.clear()

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        nats, right = self._nats(batch)
        kept = {name: batch[name] for name in ("labels_RT", "spans_RT", "target_segments_RT")}
        self._validation.append({"nats_RT": nats, "right_RT": right, **kept})

    def on_validation_epoch_end(self) -> None:
        whole = {name: torch.cat([part[name] for part in self._validation]) for name in self._validation[0]}
        nats, right, labels = whole["nats_RT"], whole["right_RT"], whole["labels_RT"]
        weights = self.weighting(spans_RT=whole["spans_RT"], labels_RT=labels)
        kept = labels != IGNORE
        record = {"loss_nats": float((nats * weights).sum() / weights.sum()), **_by_span(nats, whole)}
        record["token_exact_frac"] = float(right[kept].float().mean())
        record["call_forced_exact_frac"] = _whole_examples_right(right, whole["target_segments_RT"], kept)
        self._record({f"val/{name}": value for name, value in record.items()})

    def _record(self, values: dict[str, float]) -> None:
        if not self.trainer.is_global_zero or self.trainer.sanity_checking:
            return
        line = {"step": self.global_step, "tokens": self.tokens_seen, "time_s": round(self.seconds(), 2)}
        self.run.history_append({**line, **{name: round(value, 6) for name, value in values.items()}})
        for logger in self.loggers:
            logger.log_metrics({**values, "tokens": self.tokens_seen}, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["needle"] = {
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds(),
            "rng_state": torch.get_rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["needle"]
        self.tokens_seen, self.seconds_before = state["tokens_seen"], state["seconds"]
        torch.set_rng_state(state["rng_state"])


def _by_span(nats_RT: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
    """Unweighted mean nats of each span that occurs."""
    kept = batch["labels_RT"] != IGNORE
    means = {}
    for span in Span:
        chosen = kept & (batch["spans_RT"] == span)
        if chosen.any():
            means[f"loss_{span.name.lower()}_nats"] = float(nats_RT[chosen].mean())
    return means


def _whole_examples_right(right_RT: Tensor, segments_RT: Tensor, kept_RT: Tensor) -> float:
    """Share of examples in which every token is the likeliest one, under teacher forcing."""
    count = int(segments_RT.max()) + 1
    wrong_RN = torch.zeros(len(right_RT), count).scatter_add(1, segments_RT.cpu(), (~right_RT & kept_RT).cpu().float())
    present_RN = torch.zeros(len(right_RT), count).scatter_add(1, segments_RT.cpu(), kept_RT.cpu().float())
    examples = present_RN > 0
    return float((wrong_RN[examples] == 0).float().mean())
