"""Span weights: the right one at every token, and only their ratios matter."""

import pytest
import torch

from needle.loss import HardLabel, SpanWeighting
from needle.loss.base import IGNORE, reduce
from needle.text.render import Span

WEIGHTS = {"structure": 1.0, "name": 2.0, "key": 1.5, "value": 4.0, "stop": 0.25}


def test_every_span_has_its_own_weight_and_ignored_labels_have_none():
    spans = torch.tensor([[Span.STRUCTURE, Span.NAME, Span.KEY, Span.VALUE, Span.STOP, Span.VALUE]])
    labels = torch.tensor([[1, 1, 1, 1, 1, IGNORE]])
    weights = SpanWeighting(**WEIGHTS)(spans_RT=spans, labels_RT=labels)
    assert weights.tolist() == [[1.0, 2.0, 1.5, 4.0, 0.25, 0.0]]
    assert weights.dtype == torch.float32


def test_whole_numbers_from_a_configuration_weigh_like_fractions():
    spans, labels = torch.arange(5).unsqueeze(0), torch.ones(1, 5, dtype=torch.long)
    weights = SpanWeighting(structure=1, name=2, key=3, value=4, stop=5)(spans_RT=spans, labels_RT=labels)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]


def test_a_weight_for_every_span_and_no_other():
    assert set(WEIGHTS) == {span.name.lower() for span in Span}
    with pytest.raises(TypeError):
        SpanWeighting(**WEIGHTS, prose=1.0)


def weighted_mean(weighting: SpanWeighting) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 7, generator=generator)
    labels = torch.randint(0, 7, (2, 9), generator=generator)
    labels[1, 5:] = IGNORE
    spans = torch.randint(0, len(Span), (2, 9), generator=generator)
    nats = HardLabel()(student_logits_RTV=logits, labels_RT=labels)
    terms = reduce(nats_RT=nats, weights_RT=weighting(spans_RT=spans, labels_RT=labels))
    return terms.sum_nats / terms.weight


def test_only_the_ratios_of_weights_matter():
    scaled = SpanWeighting(**{name: 8 * weight for name, weight in WEIGHTS.items()})
    assert torch.allclose(weighted_mean(SpanWeighting(**WEIGHTS)), weighted_mean(scaled))
    assert not torch.allclose(weighted_mean(SpanWeighting(**WEIGHTS)), weighted_mean(SpanWeighting(1, 1, 1, 1, 1)))


def test_a_weighted_mean_by_hand():
    """Two tokens of ln 2 and ln 4 nats, weighing 1 and 3."""
    nats = torch.tensor([[2.0, 4.0, 9.0]]).log()
    weights = SpanWeighting(structure=1, name=3, key=0, value=0, stop=0)(
        spans_RT=torch.tensor([[Span.STRUCTURE, Span.NAME, Span.KEY]]), labels_RT=torch.tensor([[5, 5, 5]])
    )
    terms = reduce(nats_RT=nats, weights_RT=weights)
    assert terms.weight.item() == 4
    assert terms.sum_nats.item() == pytest.approx((torch.tensor(2.0).log() + 3 * torch.tensor(4.0).log()).item())


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="every span weight is 0"):
        SpanWeighting(structure=0, name=0, key=0, value=0, stop=0)
