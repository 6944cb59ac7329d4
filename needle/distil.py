"""The LightningModule that joins student, loss, weighting and optimizer: glue, no mathematics.

One training step is one optimizer step over a packed batch. The batch may be computed in micro-batches of rows; every
micro-batch is divided by the whole batch's weight, so the split does not change the gradient.
"""

# R rows, T target tokens

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field
from torch import Tensor

from needle.errors import DataError
from needle.loss.base import IGNORE
from needle.loss.objective import TOKENS, Measured, Objective
from needle.optim import OptimSettings
from needle.rollouts import Rollouts, with_rows
from needle.runs import Run
from needle.text.render import Span

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class TrainerSettings:
    """How a run is executed (conf/trainer). `steps` and `rows_per_batch` set the token budget and so affect results."""

    accelerator: str
    devices: Count
    strategy: str
    # float16 would need its gradients unscaled before they are clipped.
    precision: Literal["32-true", "bf16-mixed"]
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
    """Trains `student` on packed batches; writes history.jsonl itself, so that a run is readable without any logger.
    `rollouts`: what replaces batches by the student's own answers; None where every step learns from the data."""

    def __init__(
        self,
        *,
        student: torch.nn.Module,
        objective: Objective,
        optim: OptimSettings,
        settings: TrainerSettings,
        run: Run,
        rollouts: Rollouts | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.student, self.objective = student, objective
        self.optim, self.settings, self.run, self.rollouts = optim, settings, run, rollouts
        self.tokens_seen = self.steps_done = 0
        self.last_loss_nats = float("nan")
        self.seconds_before = 0.0
        self.seconds: Callable[[], float] = lambda: self.seconds_before
        self.validated_step = -1
        self._measure = torch.compile(self._measured) if settings.compile else self._measured
        self._validation: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optim.build(self.student, beside=self.objective)
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
        return optimizer

    @property
    def progress(self) -> float:
        """Share of the training that is behind."""
        return self.global_step / self.settings.steps

    def _measured(self, batch: dict[str, Tensor], progress: Tensor, share: Tensor) -> Measured:
        return self.objective.measure(batch, student=self.student, progress=progress, share=share)

    def on_fit_start(self) -> None:
        """A teacher's network is no part of this module, so that it is neither trained nor saved: it moves apart."""
        scorer = self.rollouts.scorer if self.rollouts is not None else None
        for network in (self.objective.teacher, scorer.network if scorer is not None else None):
            if network is not None:
                network.to(self.device)

    @property
    def validates_now(self) -> bool:
        """Whether a validation follows the step that ended last."""
        return self.global_step % self.settings.validate_every_steps == 0

    def training_step(self, batch: dict[str, Tensor], _: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        factor = self.optim.rate_at(self.global_step, total_steps=self.settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        batch, on_policy = self._on_policy(batch)
        # The labels of an on-policy batch are the student's own tokens: nothing is learnt from them.
        progress, share = self.progress, 1.0 if on_policy else self.objective.mixing.at(self.progress)
        # Under DDP gradients are averaged over ranks, so each rank divides by the mean count of all ranks.
        counts = {name: self._mean_over_ranks(count) for name, count in self.objective.counts(batch).items()}
        parts = []
        for start in range(0, len(batch["labels_RT"]), self.settings.rows_per_micro_batch):
            rows = slice(start, start + self.settings.rows_per_micro_batch)
            part = {name: tensor[rows] for name, tensor in batch.items()}
            measured = self._measure(part, torch.tensor(progress), torch.tensor(share))
            part_frac = len(part["labels_RT"]) / len(batch["labels_RT"])
            self.manual_backward(self.objective.total(measured.sums, counts, progress=progress, part_frac=part_frac))
            parts.append(_detached(measured))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.settings.grad_clip_norm)
        # The wrapped optimizer counts global_step and applies the precision plugin's scaling.
        self.optimizers().step()
        optimizer.zero_grad(set_to_none=True)
        whole = _joined(parts)
        weights = self.objective.weighting(**batch)
        self.objective.advance(loss_nats_RT=whole.loss_nats_RT, weights_RT=weights, progress=progress)
        self.tokens_seen += self.trainer.world_size * int(
            (batch["source_segments_RS"] > 0).sum() + (batch["target_segments_RT"] > 0).sum()
        )
        if self.global_step % self.settings.log_every_steps == 0 or self.global_step == self.settings.steps:
            told = {"norm": float(norm), "factor": factor, "share": share, "on_policy": on_policy}
            self._record_step(whole, batch, counts, **told)

    def _on_policy(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        if self.rollouts is None:
            return batch, False
        batch, on_policy = self.rollouts.replace(
            batch, step=self.global_step, progress=self.progress, rank=self.trainer.global_rank
        )
        if self.trainer.world_size > 1:
            # Gradients meet after every micro-batch: each rank must have as many as the one with most rows.
            rows = self.all_gather(torch.tensor(len(batch["labels_RT"]), device=self.device))
            batch = with_rows(batch, int(rows.max()))
        return batch, on_policy

    def _mean_over_ranks(self, count: Tensor) -> Tensor:
        return self.all_gather(count).float().mean() if self.trainer.world_size > 1 else count

    def _record_step(
        self,
        measured: Measured,
        batch: dict[str, Tensor],
        counts: dict[str, Tensor],
        *,
        norm: float,
        factor: float,
        share: float,
        on_policy: bool,
    ) -> None:
        means = {name: float(total / counts[name].clamp_min(1e-9)) for name, total in measured.sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(
                f"the loss is not finite at step {self.global_step}; lower optim.muon_lr or adamw_lr"
            )
        self.last_loss_nats = means.pop(TOKENS)
        labels = _label_nats(measured.label_nats_RT, batch["labels_RT"])
        record = {"loss_nats": self.last_loss_nats, "label_nats": labels, "grad_norm": norm, "lr_factor": factor}
        record |= _by_span(measured.nats_RT, batch) | {f"auxiliary_{name}": mean for name, mean in means.items()}
        if self.objective.distils:
            record["mixing_share"] = share
        if self.rollouts is not None:
            record |= {"rollout": float(on_policy), **self.rollouts.record()}
            if on_policy:
                del record["label_nats"]  # it would be the student's surprise at its own words
        self._record({f"train/{name}": value for name, value in record.items()})

    def on_validation_epoch_start(self) -> None:
        self._validation.clear()

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        share = self.objective.mixing.at(self.progress)
        measured = self._measure(batch, torch.tensor(self.progress), torch.tensor(share))
        kept = {name: batch[name] for name in ("labels_RT", "spans_RT", "target_segments_RT")}
        nats = {"nats_RT": measured.nats_RT, "label_nats_RT": measured.label_nats_RT, "right_RT": measured.right_RT}
        self._validation.append({**nats, **kept, "weights_RT": self.objective.weighting(**batch)})

    def on_validation_epoch_end(self) -> None:
        whole = {name: torch.cat([part[name] for part in self._validation]) for name in self._validation[0]}
        right, weights, kept = whole["right_RT"], whole["weights_RT"], whole["labels_RT"] != IGNORE
        record = {"loss_nats": float((whole["nats_RT"] * weights).sum() / weights.sum())}
        record["label_nats"] = _label_nats(whole["label_nats_RT"], whole["labels_RT"])
        record |= _by_span(whole["nats_RT"], whole)
        record["token_exact_frac"] = float(right[kept].float().mean())
        record["call_forced_exact_frac"] = _whole_examples_right(right, whole["target_segments_RT"], kept)
        self._record({f"val/{name}": value for name, value in record.items()})
        self.validated_step = self.global_step
        if self.rollouts is not None and not self.trainer.sanity_checking:
            self.rollouts.validated(record["label_nats"])

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
            "rng": self._over_ranks(_random_state()),
        }
        if self.rollouts is not None:
            checkpoint["needle"]["rollouts"] = self._over_ranks(self.rollouts.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["needle"]
        self.tokens_seen, self.seconds_before = state["tokens_seen"], state["seconds"]
        self.steps_done = checkpoint["global_step"]
        if "rng" not in state:
            raise DataError("the checkpoint was written by older code, which kept less of a run: start the run anew")
        _set_random_state(state["rng"][self.trainer.global_rank])
        if self.rollouts is not None:
            self.rollouts.load(state["rollouts"][self.trainer.global_rank])

    def _over_ranks(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's, in their order; every rank asks, one writes."""
        gathered = [own] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(gathered, own)
        return gathered


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: dict[str, Any]) -> None:
    """Of the devices that are there: a run may go on elsewhere."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


def _detached(measured: Measured) -> Measured:
    """Without the graphs, which a step's log must not keep alive."""
    return Measured(*(x.detach() for x in measured[:-1]), {name: x.detach() for name, x in measured.sums.items()})


def _joined(parts: list[Measured]) -> Measured:
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums}
    return Measured(*(torch.cat(tensors) for tensors in zip(*(part[:-1] for part in parts), strict=True)), sums)


def _label_nats(nats_RT: Tensor, labels_RT: Tensor) -> float:
    """Unweighted mean over tokens: the one number that runs of every loss and weighting are compared by."""
    kept = labels_RT != IGNORE
    return float((nats_RT * kept).sum() / kept.sum())


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
