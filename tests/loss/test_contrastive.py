"""The contrastive loss: CLIP's formula, which tools and requests are negatives, and what does not matter."""

# R rows, S source tokens, Q distinct requests, W distinct tools, E retrieval width

import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from needle.errors import ConfigError
from needle.loss import Contrastive, Schedule
from needle.loss.contrastive import pair_nats
from needle.student import SANConfig, SANForConditionalGeneration
from needle.student.retrieval import embed
from needle.text.tokenizer import PAD, QUERY, TOOLS

SEPARATOR = 9
WEIGHT = Schedule(shape="constant", start=0.1, end=0.1, begin_frac=0.0, end_frac=1.0)
# A prompt: tools, request, and which of the tools are called.
A, B, C, D = (10, 11), (12,), (13, 14, 15), (11, 10)
Prompt = tuple[list[tuple[int, ...]], tuple[int, ...], tuple[int, ...]]
PROMPTS: list[Prompt] = [
    ([A, B, C], (30, 31), (1,)),
    ([C, A], (32,), (0, 1)),  # two pairs, and what others show again
    ([], (33, 34), ()),  # no tools
    ([D, B], (31, 30), ()),  # calls nothing
    ([D, A], (30, 31), ()),  # asks what the first asks, without its tool
    ([B], (35,), (0,)),  # the first one's tool again
]


@pytest.fixture(scope="module")
def model() -> SANForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "kv_heads": 1, "encoder_layers": 1, "decoder_layers": 1, "copy_width": 8}
    config = SANConfig(vocab_size=40, retrieval_width=8, separator_id=SEPARATOR, lexical_match=True, **sizes)
    return SANForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def term(model):
    return Contrastive(weight=WEIGHT).attach(student=model, teacher=None)


def batch_of(rows: list[list[Prompt]], padding: int = 2) -> dict[str, Tensor]:
    packed = []
    for row in rows:
        ids, segments, gold = [], [], []
        for segment, (tools, request, called) in enumerate(row, 1):
            shown = [token for i, tool in enumerate(tools) for token in ((SEPARATOR,) if i else ()) + tool]
            prompt = [TOOLS, *shown, QUERY, *request]
            ids += prompt
            segments += [segment] * len(prompt)
            gold += [sum(1 << i for i in called)] * len(prompt)
        packed.append((ids, segments, gold))
    longest = padding + max(len(ids) for ids, _, _ in packed)
    names = ("source_ids_RS", "source_segments_RS", "gold_tools_RS")
    fill = (PAD, 0, 0)
    return {
        name: torch.tensor([line[k] + [fill[k]] * (longest - len(line[k])) for line in packed])
        for k, name in enumerate(names)
    }


def value(term, model, batch: dict[str, Tensor]) -> Tensor:
    return term(batch=batch, student=model, student_outputs=None, teacher_outputs=None)


def reference(model, prompts: list[Prompt]) -> float:
    """The sum over pairs, written out pair by pair, in float64."""
    head = model.retrieval_head
    gold, tools, pairs = defaultdict(set), set(), []
    for shown, request, called in prompts:
        tools |= set(shown)
        gold[request] |= {shown[i] for i in called}
        pairs += [(request, shown[i]) for i in called]

    def vectors(texts, marker: int) -> dict:
        return dict(zip(texts, embed(model, [[marker, *t] for t in texts], batch_size=8).double(), strict=True))

    of_tool, of_request = vectors(sorted(tools), TOOLS), vectors(sorted(gold), QUERY)
    scale, total = math.exp(head.log_scale.item()), 0.0

    def e(request, tool) -> float:
        return math.exp(scale * float(of_request[request] @ of_tool[tool]))

    for request, tool in pairs:
        among_tools = e(request, tool) + sum(e(request, other) for other in tools if other not in gold[request])
        among_requests = e(request, tool) + sum(e(other, tool) for other in gold if tool not in gold[other])
        total -= (math.log(e(request, tool) / among_tools) + math.log(e(request, tool) / among_requests)) / 2
    return total


def test_two_pairs_by_hand():
    """Similarities [[log 3, 0], [0, log 2]]: rows and columns give 3/4 and 2/3, so log(4/3) and log(3/2)."""
    similarity = torch.tensor([[math.log(3), 0.0], [0.0, math.log(2)]])
    nats = pair_nats(similarity_QW=similarity, is_gold_QW=torch.eye(2, dtype=torch.bool))
    assert torch.allclose(nats.diag(), torch.tensor([math.log(4 / 3), math.log(3 / 2)]))


def test_with_one_tool_a_request_it_is_clips_symmetric_cross_entropy():
    similarity = 5 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    nats = pair_nats(similarity_QW=similarity, is_gold_QW=torch.eye(6, dtype=torch.bool)).diag()
    numbers = torch.arange(6)
    by_clip = (F.cross_entropy(similarity, numbers) + F.cross_entropy(similarity.T, numbers)) / 2
    assert nats.mean().item() == pytest.approx(by_clip.item(), rel=1e-5)


def test_requests_and_tools_may_change_places():
    generator = torch.Generator().manual_seed(1)
    similarity, gold = torch.randn(4, 5, generator=generator), torch.rand(4, 5, generator=generator) < 0.3
    one_way = pair_nats(similarity_QW=similarity, is_gold_QW=gold)
    assert torch.allclose(one_way, pair_nats(similarity_QW=similarity.T, is_gold_QW=gold.T).T)


def test_the_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(2)
    similarity = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    gold = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.autograd.gradcheck(lambda s: pair_nats(similarity_QW=s, is_gold_QW=gold)[gold], similarity)


def test_a_pair_without_negatives_costs_nothing_and_has_no_gradient():
    similarity = torch.tensor([[0.3]], requires_grad=True)
    nats = pair_nats(similarity_QW=similarity, is_gold_QW=torch.tensor([[True]]))
    nats.sum().backward()
    assert nats.item() == 0.0
    assert similarity.grad.item() == 0.0


@pytest.mark.parametrize("chosen", [[0, 1], [0, 4], [1], [0, 1, 2, 3, 4, 5], [0, 5, 5, 0]])
def test_the_term_is_its_formula(term, model, chosen: list[int]):
    prompts = [PROMPTS[i] for i in chosen]
    batch = batch_of([prompts])
    assert value(term, model, batch).item() == pytest.approx(reference(model, prompts), rel=1e-4)
    assert int(term.count(batch)) == sum(len(called) for _, _, called in prompts)


def test_rows_order_and_padding_change_neither_value_nor_gradient(term, model):
    batches = [
        batch_of([PROMPTS]),
        batch_of([PROMPTS[3:], PROMPTS[:3]], padding=0),
        batch_of([[prompt] for prompt in reversed(PROMPTS)] + [[]], padding=7),
    ]
    found = []
    for batch in batches:
        model.zero_grad()
        nats = value(term, model, batch)
        nats.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((nats.item(), gradients))
    assert found[0][0] > 0.1
    for nats, gradients in found[1:]:
        assert nats == pytest.approx(found[0][0], rel=1e-4)
        assert gradients.keys() == found[0][1].keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, found[0][1][name], atol=1e-4), name
    moved = {name for name, gradient in found[0][1].items() if gradient.abs().max() > 0}
    assert {"embedding.weight", "retrieval_head.log_scale", "retrieval_head.project.weight"} <= moved


def test_what_is_shown_or_asked_again_changes_nothing(term, model):
    """A request in other words' place that shows the same tools and calls none adds no negative that was not there."""
    once = value(term, model, batch_of([PROMPTS[:2]]))
    again = ([C, B, A], PROMPTS[1][1], ())
    assert value(term, model, batch_of([[*PROMPTS[:2], again, again]])).item() == pytest.approx(once.item(), rel=1e-5)


def test_other_tools_and_requests_that_call_nothing_are_negatives(term, model):
    once = value(term, model, batch_of([PROMPTS[:1]]))
    more = value(term, model, batch_of([[PROMPTS[0], ([D], (36,), ())]]))
    assert more.item() > once.item() + 1e-3


@pytest.mark.parametrize("prompts", [[PROMPTS[2]], [PROMPTS[3], PROMPTS[2]], []])
def test_without_pairs_it_is_zero(term, model, prompts: list[Prompt]):
    batch = batch_of([prompts, []])
    nats = value(term, model, batch)
    assert nats.item() == 0.0
    assert int(term.count(batch)) == 0
    nats.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_tools_behind_the_sixty_second_are_negatives_only(term, model):
    shown = [(10 + i % 20, 10 + i // 20) for i in range(64)]
    late = batch_of([[(shown, (33,), (61,))]])
    assert int(term.count(late)) == 1
    late["gold_tools_RS"][:] = 1 << 62
    assert int(term.count(late)) == 0


def test_a_student_without_the_head_is_refused(model):
    bare = SANForConditionalGeneration(SANConfig(**{**model.config.to_dict(), "retrieval_width": 0}))
    with pytest.raises(ConfigError, match="retrieval_width=128"):
        Contrastive(weight=WEIGHT).attach(student=bare, teacher=None)
