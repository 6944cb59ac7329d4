"""Matches how tokens relate to each other in chosen attention layers, whatever the widths and heads (MiniLMv2).

    auxiliary=[attention_relations]

Cost: the teacher's forward pass, and for each pair of layers and relation two matrices of relation_heads x L x L floats
that are kept for the backward pass, L being an example's length on a CPU and a row's on a GPU: 64 MiB for 4 whole rows
of 512 tokens and 8 relation heads.
"""

# R rows, T tokens of the source or the target, C all heads side by side, H relation heads, E relation head width

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from needle.errors import ConfigError
from needle.loss.base import Auxiliary
from needle.loss.buckets import wide
from needle.loss.features import SEGMENTS, LayerMap, MappedLayers, check_maps
from needle.loss.schedule import Schedule
from needle.student.taps import Point, width

Relation = Literal["queries", "keys", "values"]
FORBIDDEN = -1e9  # finite: 0 * (FORBIDDEN - FORBIDDEN) is 0 where -inf would give NaN


def log_relations(*, vectors_RTC: Tensor, segments_RT: Tensor, relation_heads: int, causal: bool) -> Tensor:
    """log softmax(A A^T / sqrt(E)) [R, H, T, T], A being one of H equal parts of the vectors (Wang et al. 2021).

    A token relates to those of its own segment, with `causal` to itself and earlier ones only; elsewhere the value is
    below -1e8.
    """
    vectors = wide(vectors_RTC)
    allowed_RTT = segments_RT[:, :, None] == segments_RT[:, None, :]
    if causal:
        allowed_RTT = allowed_RTT.tril()
    # Not in half precision, whatever the rest of the step: the exponential takes differences of large products.
    with torch.autocast(vectors.device.type, enabled=False):
        parts_RHTE = vectors.unflatten(-1, (relation_heads, -1)).transpose(1, 2)
        parts_RHTE = parts_RHTE * parts_RHTE.shape[-1] ** -0.25  # both factors, since they are smaller than the product
        products_RHTT = parts_RHTE @ parts_RHTE.mT
        return products_RHTT.masked_fill(~allowed_RTT.unsqueeze(1), FORBIDDEN).log_softmax(dim=-1)


def relation_kl(
    *,
    student_vectors_RTC: Tensor,
    teacher_vectors_RTC: Tensor,
    segments_RT: Tensor,
    relation_heads: int,
    causal: bool,
) -> Tensor:
    """KL of every token's relations: the mean over H of the sum over tokens of p_teacher * log(p_teacher / p_student),
    in nats [R, T]; 0 at padding. The two C may differ, `relation_heads` divides both."""
    how = {"segments_RT": segments_RT, "relation_heads": relation_heads, "causal": causal}
    teacher_RHTT = log_relations(vectors_RTC=teacher_vectors_RTC, **how)
    student_RHTT = log_relations(vectors_RTC=student_vectors_RTC, **how)
    nats_RHT = F.kl_div(student_RHTT, teacher_RHTT, reduction="none", log_target=True).sum(dim=-1)
    return nats_RHT.mean(dim=1).masked_fill(segments_RT == 0, 0.0)


@dataclass(frozen=True)
class AttentionRelations:
    """Sum over pairs of layers, `relations` and real tokens of `relation_kl`, in nats. The mean is over tokens and
    pairs, relations are added up.

    Queries and keys are taken after QK-norm and before rotation; those of heads that share a key or value count once.
    `encoder`, `decoder`: whose self-attention goes with whose (needle.loss.features).
    """

    weight: Schedule
    encoder: LayerMap
    decoder: LayerMap
    relations: Annotated[tuple[Relation, ...], Field(min_length=1)]
    relation_heads: Annotated[int, Field(ge=1)]
    needs: ClassVar[frozenset[str]] = frozenset({"features"})

    def __post_init__(self) -> None:
        check_maps(encoder=self.encoder, decoder=self.decoder)
        if len(set(self.relations)) != len(self.relations):
            raise ValueError(f"relations={list(self.relations)}: name each once")

    def attach(self, *, student: nn.Module, teacher: nn.Module | None) -> "AttentionRelationsTerm":
        return AttentionRelationsTerm(self, student=student, teacher=teacher)


class AttentionRelationsTerm(Auxiliary):
    """Learns nothing itself.

    Raises:
        ConfigError: `relation_heads` does not divide a width; there is no teacher or no such layer.
    """

    def __init__(self, settings: AttentionRelations, *, student: nn.Module, teacher: nn.Module | None):
        super().__init__()
        self.settings = settings
        maps = {"encoder": settings.encoder, "decoder": settings.decoder}
        self.layers = MappedLayers(maps, settings.relations, student=student, teacher=teacher)
        for pair in self.layers.pairs:
            for what in settings.relations:
                for whose, network in (("student", student), ("teacher", teacher)):
                    _check_heads(settings, whose, width(network, Point(pair.part, getattr(pair, whose), what)), what)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.layers.count(batch)

    def forward(
        self, *, batch: Mapping[str, Tensor], student: nn.Module, student_outputs: Any, teacher_outputs: Any
    ) -> Tensor:
        total = batch["labels_RT"].new_zeros((), dtype=student_outputs.logits.dtype)
        cuts = {part: pieces(batch[name]) for part, name in SEGMENTS.items()}
        for pair, _, mine, theirs in self.layers.read(student_outputs=student_outputs, teacher_outputs=teacher_outputs):
            segments_RT = batch[SEGMENTS[pair.part]]
            for row, place in cuts[pair.part]:
                nats_RT = relation_kl(
                    student_vectors_RTC=mine[row, place],
                    teacher_vectors_RTC=theirs[row, place],
                    segments_RT=segments_RT[row, place],
                    relation_heads=self.settings.relation_heads,
                    causal=pair.part == "decoder",
                )
                total = total + nats_RT.sum()
        return total


def pieces(segments_RT: Tensor) -> list[tuple[slice, slice]]:
    """Rows and tokens to look at together. On a CPU every example alone, which skips the products with the others in
    its row; on a GPU, or compiled, whole rows, since many small steps cost more there."""
    if segments_RT.is_cuda or torch.compiler.is_compiling():
        return [(slice(None), slice(None))]
    found = []
    for row, segments_T in enumerate(segments_RT):
        start = 0
        for segment, length in zip(
            *(x.tolist() for x in segments_T.unique_consecutive(return_counts=True)), strict=True
        ):
            if segment:
                found.append((slice(row, row + 1), slice(start, start + length)))
            start += length
    return found


def _check_heads(settings: AttentionRelations, whose: str, vectors_width: int, what: str) -> None:
    if vectors_width % settings.relation_heads:
        raise ConfigError(
            f"relation_heads={settings.relation_heads}: the {whose}'s {what} are {vectors_width} wide, which it does "
            "not divide; choose a number that divides the widths of both networks"
        )
