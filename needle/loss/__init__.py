"""Distillation losses: pure functions of keyword tensors, in nats a target token; what is weighed, mixed and added to
them. Neither Lightning nor Hydra here."""

from needle.loss.attention_relations import AttentionRelations
from needle.loss.balance import Fixed, LearnedUncertainty
from needle.loss.base import Auxiliary, AuxiliarySettings, Loss, LossTerms
from needle.loss.contrastive import Contrastive
from needle.loss.decoupled import DecoupledKD
from needle.loss.divergences import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)
from needle.loss.hard_label import HardLabel
from needle.loss.hidden_states import HiddenStates
from needle.loss.label_smoothing import LabelSmoothing
from needle.loss.schedule import Mixing, Schedule
from needle.loss.sequence import ExpectedCrossEntropy
from needle.loss.taid import TAID
from needle.loss.uld import ULD
from needle.loss.weighting import Weighting
from needle.loss.z_loss import ZLoss

__all__ = [
    "TAID",
    "ULD",
    "AdaptiveKL",
    "AttentionRelations",
    "Auxiliary",
    "AuxiliarySettings",
    "Contrastive",
    "DecoupledKD",
    "Divergence",
    "ExpectedCrossEntropy",
    "Fixed",
    "ForwardKL",
    "HardLabel",
    "HiddenStates",
    "JensenShannon",
    "LabelSmoothing",
    "LearnedUncertainty",
    "Loss",
    "LossTerms",
    "Mixing",
    "ReverseKL",
    "Schedule",
    "SkewForwardKL",
    "SkewReverseKL",
    "SymmetricKL",
    "TotalVariation",
    "Weighting",
    "ZLoss",
]
