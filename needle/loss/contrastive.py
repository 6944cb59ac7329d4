"""Requests and the tools they call, drawn together on the encoder's retrieval head."""

# R rows, S source tokens, P parts (tools or requests of the packed rows), Q distinct requests, W distinct tools,
# D model width, E retrieval width

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from needle.data.shards import GOLD_TOOLS_MAX
from needle.loss.base import Auxiliary
from needle.loss.schedule import Schedule
from needle.student.retrieval import Parts, RetrievalHead, head_of, mean_pool, part_lengths, parts_of

MASKED = -1e9  # finite, so that a pair without negatives has a gradient of 0 and not NaN


@dataclass(frozen=True)
class Contrastive:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021) between requests and tools, in nats a pair:

        1/2 * [-log (e^s(q,t) / (e^s(q,t) + sum over t' of e^s(q,t'))) - log (e^s(q,t) / (e^s(q,t) + sum over q' of
        e^s(q',t)))],   s(q,t) = scale * cosine of the head's vectors.

    A pair (q, t) is a request and one of the tools that its answer calls: a request that calls three gives three.
    Negatives t' are all other tools of the micro-batch, shown to whichever request; negatives q' all other requests,
    those that call nothing included. What is shown or asked twice counts once, and no tool that the same words call
    anywhere in the micro-batch is a negative of theirs. Tools behind a prompt's first 62 are negatives only.

    Every tool and every request is read alone, in one more pass of the encoder, as it is when tools are picked out of
    thousands. The negatives are those of the micro-batch, so that, unlike other terms, this one's value and gradient
    depend on trainer.rows_per_micro_batch (and on the number of devices): keep it equal in what is compared.

    Raises:
        ConfigError: the student has no retrieval head.
    """

    weight: Schedule
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def attach(self, *, student: nn.Module, teacher: nn.Module | None) -> Auxiliary:
        head_of(student)
        return _Contrastive(separator_id=student.config.separator_id)  # type: ignore[union-attr, arg-type]


class _Contrastive(Auxiliary):
    def __init__(self, *, separator_id: int):
        super().__init__()
        self.separator_id = separator_id

    def parts(self, batch: Mapping[str, Tensor]) -> Parts:
        return parts_of(batch["source_ids_RS"], batch["source_segments_RS"], separator_id=self.separator_id)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Pairs of a request and a tool that it calls."""
        return called(self.parts(batch), batch["gold_tools_RS"]).sum()

    def forward(
        self, *, batch: Mapping[str, Tensor], student: nn.Module, student_outputs: Any, teacher_outputs: Any
    ) -> Tensor:
        parts = self.parts(batch)
        encoded = student.get_encoder()(parts.ids_RS, source_segments_BS=parts.numbers_RS)  # type: ignore[operator]
        return _sum_nats(head_of(student), encoded.last_hidden_state, parts, batch)


def called(parts: Parts, gold_tools_RS: Tensor) -> Tensor:
    """[R, S]: True where a tool begins that its request's answer calls."""
    known_RS = parts.places_RS < GOLD_TOOLS_MAX
    bits_RS = gold_tools_RS >> parts.places_RS.clamp(0, GOLD_TOOLS_MAX - 1)
    return parts.opens_tool_RS & known_RS & (bits_RS & 1 > 0)


@torch.compiler.disable  # how many parts there are changes from batch to batch
def _sum_nats(head: RetrievalHead, states_RSD: Tensor, parts: Parts, batch: Mapping[str, Tensor]) -> Tensor:
    pooled_RPD = mean_pool(states_RSD, parts.numbers_RS)
    request_group_P, requests_QE = _distinct(head, pooled_RPD, parts, parts.opens_request_RS)
    tool_group_P, tools_WE = _distinct(head, pooled_RPD, parts, parts.opens_tool_RS)
    pairs_QW = _pairs(parts, batch, request_group_P, tool_group_P, (len(requests_QE), len(tools_WE)))
    similarity_QW = head.scale() * requests_QE @ tools_WE.T
    return pair_nats(similarity_QW=similarity_QW, is_gold_QW=pairs_QW > 0).mul(pairs_QW).sum()


def pair_nats(*, similarity_QW: Tensor, is_gold_QW: Tensor) -> Tensor:
    """The loss of every pair, [Q, W], in nats; where there is no pair the value means nothing, but is finite."""
    negatives_QW = similarity_QW.masked_fill(is_gold_QW, MASKED)
    # -log(e^s / (e^s + e^n)) = log(1 + e^(n - s)), where n is the negatives' log-sum-exp.
    to_tools_QW = F.softplus(negatives_QW.logsumexp(dim=1, keepdim=True) - similarity_QW)
    to_requests_QW = F.softplus(negatives_QW.logsumexp(dim=0, keepdim=True) - similarity_QW)
    return (to_tools_QW + to_requests_QW) / 2


def _distinct(head: RetrievalHead, pooled_RPD: Tensor, parts: Parts, opens_RS: Tensor) -> tuple[Tensor, Tensor]:
    """For the parts that begin where `opens_RS` says, in reading order: the number of the text that each holds, [P];
    and every distinct text's vector."""
    rows_P, starts_P = opens_RS.nonzero(as_tuple=True)
    if len(rows_P) == 0:
        return rows_P, head(pooled_RPD[rows_P, rows_P])
    numbers_P = parts.numbers_RS[rows_P, starts_P]
    lengths_P = part_lengths(parts.numbers_RS)[rows_P, numbers_P]
    steps = torch.arange(int(lengths_P.max()), device=rows_P.device)
    places_PS = (starts_P[:, None] + steps).clamp_max(opens_RS.shape[1] - 1)
    texts_PS = parts.ids_RS[rows_P[:, None], places_PS].masked_fill(steps >= lengths_P[:, None], -1)
    texts, groups_P = texts_PS.unique(dim=0, return_inverse=True)
    order_P = torch.arange(len(rows_P), device=rows_P.device)
    first = order_P.new_full((len(texts),), len(rows_P)).scatter_reduce(0, groups_P, order_P, "amin")
    return groups_P, head(pooled_RPD[rows_P[first], numbers_P[first]])


def _pairs(
    parts: Parts, batch: Mapping[str, Tensor], request_group_P: Tensor, tool_group_P: Tensor, shape: tuple[int, int]
) -> Tensor:
    """[Q, W]: how many examples hold the request and call the tool."""
    segments_RS = batch["source_segments_RS"]
    # The group of every example's request, looked up by row and segment.
    request_of_example = segments_RS.new_zeros((len(segments_RS), int(segments_RS.max()) + 1))
    rows_P, starts_P = parts.opens_request_RS.nonzero(as_tuple=True)
    request_of_example[rows_P, segments_RS[rows_P, starts_P]] = request_group_P
    rows_P, starts_P = parts.opens_tool_RS.nonzero(as_tuple=True)
    is_called_P = called(parts, batch["gold_tools_RS"])[rows_P, starts_P]
    requests_P = request_of_example[rows_P, segments_RS[rows_P, starts_P]]
    pairs_QW = torch.zeros(shape, device=segments_RS.device)
    ones = torch.ones(int(is_called_P.sum()), device=segments_RS.device)
    return pairs_QW.index_put((requests_P[is_called_P], tool_group_P[is_called_P]), ones, accumulate=True)
