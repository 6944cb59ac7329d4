"""Matches the student's layers to a teacher's of another depth and width (Romero et al. 2015; Jiao et al. 2020).

    auxiliary=[hidden_states]

Cost: the teacher's forward pass and a product of student width x teacher width a token and pair of layers.
"""

# R rows, T tokens of the source or the target, D a network's width, L one width that both have

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from needle.errors import ConfigError
from needle.loss.base import Auxiliary
from needle.loss.buckets import wide
from needle.loss.features import SEGMENTS, LayerMap, MappedLayers, Pair, check_maps
from needle.loss.schedule import Schedule
from needle.student.taps import Point, width

Distance = Literal["cosine", "mse"]
LayerNorm = Literal["none", "teacher", "both"]


def state_distance(
    *, student_states_RTL: Tensor, teacher_states_RTL: Tensor, distance: Distance, layer_norm: LayerNorm
) -> Tensor:
    """[R, T], without unit, 0 where the states agree.

    cosine: 1 - cos(student, teacher), 0 to 2 (Sanh et al. 2019). mse: (student - teacher)^2, the mean over the width.
    `layer_norm` brings each token's state of the teacher, or of both, to mean 0 and variance 1 over the width before:
    layers write into one running sum, whose size differs between depths, layers and networks, and mse then weighs all
    alike; a state of zeros is 1 away.
    """
    student, teacher = wide(student_states_RTL), wide(teacher_states_RTL)
    if layer_norm != "none":
        teacher = F.layer_norm(teacher, teacher.shape[-1:])
    if layer_norm == "both":
        student = F.layer_norm(student, student.shape[-1:])
    if distance == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(dim=-1)


@dataclass(frozen=True)
class HiddenStates:
    """Sum over pairs of layers and real tokens of `state_distance`, after a linear map of the student's states where
    `projection` is learned; one map a pair, without bias. The mean is over tokens and pairs.

    `encoder`, `decoder`: which layers go together (needle.loss.features).
    """

    weight: Schedule
    encoder: LayerMap
    decoder: LayerMap
    distance: Distance
    projection: Literal["learned", "none"]
    layer_norm: LayerNorm
    needs: ClassVar[frozenset[str]] = frozenset({"features"})

    def __post_init__(self) -> None:
        check_maps(encoder=self.encoder, decoder=self.decoder)
        if self.projection == "none" and self.layer_norm == "teacher":
            raise ValueError(
                "layer_norm=teacher with projection=none: the student could never reach the teacher's states, since "
                "its own keep their size; set layer_norm=both or none, or projection=learned"
            )

    def attach(self, *, student: nn.Module, teacher: nn.Module | None) -> "HiddenStatesTerm":
        return HiddenStatesTerm(self, student=student, teacher=teacher)


class HiddenStatesTerm(Auxiliary):
    """Holds the maps from the student's width to the teacher's.

    Raises:
        ConfigError: without a map, the widths differ; there is no teacher or no such layer.
    """

    def __init__(self, settings: HiddenStates, *, student: nn.Module, teacher: nn.Module | None):
        super().__init__()
        self.settings = settings
        maps = {"encoder": settings.encoder, "decoder": settings.decoder}
        self.layers = MappedLayers(maps, ["states"], student=student, teacher=teacher)
        self.projections = nn.ModuleDict()
        for pair in self.layers.pairs:
            mine = width(student, Point(pair.part, pair.student, "states"))
            theirs = width(teacher, Point(pair.part, pair.teacher, "states"))
            if settings.projection == "learned":
                self.projections[_key(pair)] = projection(mine, theirs)
            elif mine != theirs:
                raise ConfigError(
                    f"projection=none: the student's states are {mine} wide, the teacher's {theirs}; set "
                    "projection=learned"
                )

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.layers.count(batch)

    def forward(
        self, *, batch: Mapping[str, Tensor], student: nn.Module, student_outputs: Any, teacher_outputs: Any
    ) -> Tensor:
        total = batch["labels_RT"].new_zeros((), dtype=student_outputs.logits.dtype)
        for pair, _, mine, theirs in self.layers.read(student_outputs=student_outputs, teacher_outputs=teacher_outputs):
            distance_RT = state_distance(
                student_states_RTL=self.projections[_key(pair)](mine) if self.projections else mine,
                teacher_states_RTL=theirs,
                distance=self.settings.distance,
                layer_norm=self.settings.layer_norm,
            )
            total = total + distance_RT.masked_fill(batch[SEGMENTS[pair.part]] == 0, 0.0).sum()
        return total


def projection(student_width: int, teacher_width: int) -> nn.Linear:
    """Keeps the size of states at the start."""
    linear = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.normal_(linear.weight, std=student_width**-0.5)
    return linear


def _key(pair: Pair) -> str:
    return f"{pair.part}_{pair.student}_{pair.teacher}"
