"""Quantisation-aware training: the student learns with weights rounded to few bits, so that it loses little when they
are stored so. Weights only; activations stay in floating point.

    python -m needle.train quantisation=int4
    python -m needle.train quantisation=int8 quantisation.begin_frac=0.8

Straight-through (Bengio et al. 2013; Jacob et al. 2018): gradients are taken at the rounded weights and applied to the
full-precision ones, the masters. For that the weights themselves are replaced in place for the length of a step's
forward and backward passes, which leaves the student's code, tied weights, compilation and micro-batches as they are.
Validation is on rounded weights too. Checkpoints hold the masters, so that a continued run is the uninterrupted one;
the finished student is saved rounded, in floating point.

Cost: a pass over the weights a step, and a copy of those that are rounded.
"""

# O outputs, I inputs

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import pytorch_lightning as pl
import torch
from pydantic import Field
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from needle.student.quantisation import fake_quantise, quantisable

if TYPE_CHECKING:
    from needle.distil import Distillation


class Quantisation(Protocol):
    """What conf/quantisation states."""

    def callbacks(self) -> list[Callback]:
        """For the trainer, whose module has a `student` and a `progress` from 0 to 1."""
        ...

    def finish(self, student: nn.Module) -> dict[str, Any]:
        """Rounds the trained student in place; what was done and the error it made, for the run's record."""
        ...


@dataclass(frozen=True)
class NoQuantisation:
    def callbacks(self) -> list[Callback]:
        return []

    def finish(self, student: nn.Module) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class FakeQuantisation:
    """`bits` and `group` as in needle.student.quantisation. It begins when `begin_frac` of the training is behind."""

    bits: Annotated[int, Field(ge=2, le=8)]
    group: Annotated[int, Field(ge=1)] | None
    embedding: bool
    begin_frac: Annotated[float, Field(ge=0, le=1)]

    def callbacks(self) -> list[Callback]:
        return [RoundedWeights(self)]

    def rounded(self, weight_OI: Tensor) -> Tensor:
        return fake_quantise(weight_OI, bits=self.bits, group=self.group)

    @torch.no_grad()
    def finish(self, student: nn.Module) -> dict[str, Any]:
        chosen = quantisable(student, embedding=self.embedding)
        error = norm = 0.0
        for parameter in chosen.values():
            rounded = self.rounded(parameter)
            error += float((rounded - parameter).double().square().sum())
            norm += float(parameter.double().square().sum())
            parameter.copy_(rounded)
        return {
            "quantisation": {
                "scheme": f"int{self.bits}, symmetric, "
                + (f"groups of {self.group} inputs" if self.group else "one scale an output"),
                "matrices": len(chosen),
                "weights": sum(parameter.numel() for parameter in chosen.values()),
                "error_relative_rms": round((error / max(norm, 1e-30)) ** 0.5, 6),
            }
        }


class RoundedWeights(Callback):
    """Puts rounded weights in place of the student's masters while gradients or validation losses are computed."""

    def __init__(self, settings: FakeQuantisation):
        self.settings = settings
        self._parameters: list[nn.Parameter] = []
        self._masters: list[Tensor] = []
        self._swapped = False

    def on_train_batch_start(self, trainer: pl.Trainer, module: "Distillation", *_: Any) -> None:
        self._round(module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        """Comes after all micro-batches' backward passes, before anything is updated."""
        self._restore()

    def on_validation_start(self, trainer: pl.Trainer, module: "Distillation") -> None:
        self._round(module)

    def on_validation_end(self, *_: Any) -> None:
        self._restore()

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def on_save_checkpoint(self, trainer: pl.Trainer, module: "Distillation", checkpoint: dict[str, Any]) -> None:
        """Checkpoints are written between steps, where the masters are in place; one from within a step gets them."""
        if self._swapped:
            masters = {id(p): master for p, master in zip(self._parameters, self._masters, strict=True)}
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if id(parameter) in masters:
                    checkpoint["state_dict"][name] = masters[id(parameter)].clone()

    @torch.no_grad()
    def _round(self, module: "Distillation") -> None:
        if self._swapped or module.progress < self.settings.begin_frac:
            return
        chosen = quantisable(module.student, embedding=self.settings.embedding)
        self._parameters = list(chosen.values())
        if [m.device for m in self._masters] != [p.device for p in self._parameters]:
            self._masters = [torch.empty_like(parameter) for parameter in self._parameters]
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.copy_(parameter)
            parameter.copy_(self.settings.rounded(parameter))
        self._swapped = True

    @torch.no_grad()
    def _restore(self) -> None:
        if self._swapped:
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.copy_(master)
            self._swapped = False
