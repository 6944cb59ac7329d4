"""Distillation losses: pure functions of keyword tensors, in nats a target token; what is weighed, mixed and added to
them. Neither Lightning nor Hydra here."""

from needle.loss.balance import Fixed, LearnedUncertainty
from needle.loss.base import Auxiliary, AuxiliarySettings, Loss, LossTerms
from needle.loss.divergences import ForwardKL
from needle.loss.hard_label import HardLabel
from needle.loss.schedule import Mixing, Schedule
from needle.loss.weighting import Weighting

__all__ = [
    "Auxiliary",
    "AuxiliarySettings",
    "Fixed",
    "ForwardKL",
    "HardLabel",
    "LearnedUncertainty",
    "Loss",
    "LossTerms",
    "Mixing",
    "Schedule",
    "Weighting",
]
