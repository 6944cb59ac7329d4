"""Distillation losses: pure functions of keyword tensors, in nats a target token. Neither Lightning nor Hydra here."""

from needle.loss.base import Loss, LossTerms
from needle.loss.divergences import ForwardKL
from needle.loss.hard_label import HardLabel
from needle.loss.weighting import SpanWeighting

__all__ = ["ForwardKL", "HardLabel", "Loss", "LossTerms", "SpanWeighting"]
