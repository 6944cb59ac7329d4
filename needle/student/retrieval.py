"""Which tools a request may want, before any prompt is built: a head on the encoder that puts requests and tools, each
read alone, on one unit sphere.

    index = ToolIndex(model, codec, tools, batch_size=64)
    index.search(["wake me at seven"], top=8)    # then decode with those eight

Needs a student with `retrieval_width` above 0 that was trained with auxiliary=[contrastive].
Cost: one encoder pass a tool, once; one a request; and a product of requests x tools x retrieval_width.
"""

# R rows, S source tokens, P parts, D model width, E retrieval width, N texts, Q requests, W tools

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from needle.errors import ConfigError
from needle.schema import Example, Tool
from needle.text.tokenizer import PAD, QUERY, TOOLS, TextCodec

if TYPE_CHECKING:
    from needle.student.san import SANForConditionalGeneration

INITIAL_TEMPERATURE = 0.07
SCALE_MAX = 100.0  # both as CLIP has them


class RetrievalHead(nn.Module):
    """Unit vectors [P, E] from mean-pooled encoder states [P, D]: D -> D/4, ReLU, -> E, divided by the length.

    `scale`, the inverse temperature of their cosines, is learnt as its logarithm (Radford et al. 2021).
    """

    def __init__(self, *, width: int, retrieval_width: int):
        super().__init__()
        self.reduce = nn.Linear(width, width // 4, bias=False)
        self.project = nn.Linear(width // 4, retrieval_width, bias=False)
        self.log_scale = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def start(self) -> None:
        self.log_scale.fill_(math.log(1 / INITIAL_TEMPERATURE))

    def forward(self, pooled_PD: Tensor) -> Tensor:
        return F.normalize(self.project(F.relu(self.reduce(pooled_PD))).float(), dim=-1)

    def scale(self) -> Tensor:
        """At most 100. While training the parameter itself is held there: a clamped value would have no gradient that
        leads back."""
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(SCALE_MAX))
        return self.log_scale.exp()


class Parts(NamedTuple):
    """Packed prompts cut into tools and requests.

    ids_RS: the source, every tool opened by the same marker, wherever it stood in its prompt. numbers_RS: the part that
    a token belongs to, from 1 in each row; 0: none. opens_tool_RS, opens_request_RS: where one begins. places_RS: at a
    tool's tokens, which of its prompt's tools it is, from 0.
    """

    ids_RS: Tensor
    numbers_RS: Tensor
    opens_tool_RS: Tensor
    opens_request_RS: Tensor
    places_RS: Tensor


def parts_of(ids_RS: Tensor, segments_RS: Tensor, *, separator_id: int) -> Parts:
    """A prompt without tools has its request as only part; its marker of tools is a part of nothing."""
    real_RS = segments_RS > 0
    opens_request_RS = (ids_RS == QUERY) & real_RS
    first_RS = (ids_RS == TOOLS) & real_RS
    marks_tool_RS = first_RS | (ids_RS == separator_id) & real_RS
    number_RS = marks_tool_RS.cumsum(dim=1)
    before_RS = torch.where(first_RS, number_RS, 0).cummax(dim=1).values
    no_tools_RS = first_RS & F.pad(opens_request_RS[:, 1:], (0, 1))
    return Parts(
        ids_RS=torch.where(marks_tool_RS, TOOLS, ids_RS),
        numbers_RS=(marks_tool_RS | opens_request_RS).cumsum(dim=1) * real_RS,
        opens_tool_RS=marks_tool_RS & ~no_tools_RS,
        opens_request_RS=opens_request_RS,
        places_RS=number_RS - before_RS,
    )


def mean_pool(states_RSD: Tensor, numbers_RS: Tensor) -> Tensor:
    """[R, 1 + highest number, D], float32: the mean state of every part; of what has no tokens, 0."""
    count = int(numbers_RS.max()) + 1
    sums_RPD = states_RSD.new_zeros((len(numbers_RS), count, states_RSD.shape[-1]), dtype=torch.float32)
    sums_RPD = sums_RPD.scatter_add(1, numbers_RS.unsqueeze(-1).expand_as(states_RSD), states_RSD.float())
    return sums_RPD / part_lengths(numbers_RS).clamp_min(1).unsqueeze(-1)


def part_lengths(numbers_RS: Tensor) -> Tensor:
    """[R, 1 + highest number]: tokens of every part."""
    empty_RP = numbers_RS.new_zeros((len(numbers_RS), int(numbers_RS.max()) + 1))
    return empty_RP.scatter_add(1, numbers_RS, torch.ones_like(numbers_RS))


def head_of(model: nn.Module) -> RetrievalHead:
    """Raises ConfigError when the student has no retrieval head."""
    head = getattr(model, "retrieval_head", None)
    if not isinstance(head, RetrievalHead):
        raise ConfigError(
            "student.retrieval_width=0: this student has no retrieval head; train an encoder-decoder (student=san_nano "
            "to san_large) with student.retrieval_width=128 auxiliary=[contrastive]"
        )
    return head


@torch.no_grad()
def embed(model: "SANForConditionalGeneration", texts: Sequence[Sequence[int]], *, batch_size: int) -> Tensor:
    """Unit vectors [N, E] of token sequences, each a tool's or a request's with its marker, in evaluation mode.

    Raises:
        ConfigError: the student has no retrieval head.
    """
    head, was_training, device = head_of(model), model.training, model.embedding.weight.device
    model.eval()
    vectors_NE = torch.zeros(len(texts), head.project.out_features, device=device)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little of a batch is then padding
    for start in range(0, len(texts), batch_size):
        chosen = by_length[start : start + batch_size]
        ids_RS = torch.full((len(chosen), len(texts[chosen[-1]])), PAD, dtype=torch.long)
        numbers_RS = torch.zeros_like(ids_RS)
        for r, i in enumerate(chosen):
            ids_RS[r, : len(texts[i])], numbers_RS[r, : len(texts[i])] = torch.tensor(texts[i]), 1
        numbers_RS = numbers_RS.to(device)
        states_RSD = model.encoder(ids_RS.to(device), source_segments_BS=numbers_RS).last_hidden_state
        vectors_NE[torch.tensor(chosen, device=device)] = head(mean_pool(states_RSD, numbers_RS)[:, 1])
    model.train(was_training)
    return vectors_NE


def tool_ids(codec: TextCodec, tool: Tool) -> list[int]:
    """A tool as a part: its marker and its tokens, as in a prompt that shows it alone."""
    prompt = codec.encode_prompt("", [tool])
    return prompt[: prompt.index(QUERY)]


def request_ids(codec: TextCodec, query: str) -> list[int]:
    """A request as a part: its marker and its tokens."""
    prompt = codec.encode_prompt(query, [])
    return prompt[prompt.index(QUERY) :]


class ToolIndex:
    """Tools, read once, that requests are then compared with. Memory: tools x retrieval_width floats."""

    def __init__(
        self, model: "SANForConditionalGeneration", codec: TextCodec, tools: Sequence[Tool], *, batch_size: int
    ):
        self.model, self.codec, self.tools, self.batch_size = model, codec, tuple(tools), batch_size
        self.vectors_WE = embed(model, [tool_ids(codec, tool) for tool in self.tools], batch_size=batch_size)

    def scores(self, queries: Sequence[str]) -> Tensor:
        """Cosines [Q, W] of requests and tools, -1 to 1."""
        texts = [request_ids(self.codec, query) for query in queries]
        return embed(self.model, texts, batch_size=self.batch_size) @ self.vectors_WE.T

    def search(self, queries: Sequence[str], *, top: int) -> list[list[tuple[Tool, float]]]:
        """For each request its `top` likeliest tools with their cosines, best first; all tools where there are fewer.
        Tools that score the same stand in the index's order."""
        ranked_QW = self.scores(queries).sort(dim=-1, descending=True, stable=True)
        best = zip(ranked_QW.values[:, :top].tolist(), ranked_QW.indices[:, :top].tolist(), strict=True)
        return [
            [(self.tools[i], cosine) for cosine, i in zip(cosines, places, strict=True)] for cosines, places in best
        ]


def recall_frac(
    model: "SANForConditionalGeneration",
    codec: TextCodec,
    examples: Iterable[Example],
    *,
    tops: Sequence[int],
    batch_size: int,
) -> dict[int, float]:
    """Recall at k for every k of `tops`: the share of the distinct tools that a request calls which are among its k
    likeliest, of all tools that any of the examples shows; the mean over requests that call one.

    Tools are told apart by how a prompt shows them. 0 requests with a call give NaN.
    """
    examples = list(examples)
    numbers: dict[tuple[int, ...], int] = {}
    pool: list[Tool] = []
    wanted: list[tuple[str, set[int]]] = []
    for example in examples:
        called = {call.name for call in example.calls}
        gold = set()
        for tool in example.tools:
            number = numbers.setdefault(tuple(tool_ids(codec, tool)), len(pool))
            if number == len(pool):
                pool.append(tool)
            if tool.name in called:
                gold.add(number)
        if gold:
            wanted.append((example.query, gold))
    if not wanted:
        return dict.fromkeys(tops, math.nan)
    scores_QW = ToolIndex(model, codec, pool, batch_size=batch_size).scores([query for query, _ in wanted])
    order_QW = scores_QW.argsort(dim=-1, descending=True, stable=True).tolist()
    return {
        top: sum(len(gold & set(order[:top])) / len(gold) for (_, gold), order in zip(wanted, order_QW, strict=True))
        / len(wanted)
        for top in tops
    }
