"""Weights: the right one at every token, and only their ratios matter."""

import math

import pytest
import torch

from needle.loss import Weighting
from needle.loss.base import IGNORE
from needle.schema import KINDS
from needle.text.render import Span

SPANS = {"structure": 1.0, "name": 2.0, "key": 1.5, "value": 4.0, "stop": 0.25}
EVEN = dict.fromkeys(SPANS, 1.0)
PLAIN = {"kinds": {}, "confidence_power": 0.0, "focal_gamma": 0.0}


def tokens(**changes) -> dict[str, torch.Tensor]:
    """One row of six tokens, a span each, the last ignored."""
    given = {
        "spans_RT": torch.tensor([[*Span, Span.VALUE]]),
        "labels_RT": torch.tensor([[1, 1, 1, 1, 1, IGNORE]]),
        "kinds_RT": torch.zeros(1, 6, dtype=torch.long),
        "confidences_RT": torch.ones(1, 6),
        "answer_weights_RT": torch.ones(1, 6),
    }
    return {**given, **changes}


def test_every_span_has_its_own_weight_and_ignored_labels_have_none():
    weights = Weighting(**SPANS, **PLAIN)(**tokens())
    assert weights.tolist() == [[1.0, 2.0, 1.5, 4.0, 0.25, 0.0]]
    assert weights.dtype == torch.float32


def test_whole_numbers_from_a_configuration_weigh_like_fractions():
    weights = Weighting(structure=1, name=2, key=3, value=4, stop=5, **PLAIN)(**tokens())
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 0.0]]


def test_a_weight_for_every_span_and_no_other():
    assert set(SPANS) == {span.name.lower() for span in Span}


def test_factors_of_span_kind_confidence_and_share_of_the_samples_multiply():
    kinds = torch.tensor([[KINDS.index("multi")] * 3 + [KINDS.index("single")] * 3])
    confidences, shares = torch.full((1, 6), 0.5), torch.full((1, 6), 0.75)
    weighting = Weighting(**SPANS, kinds={"multi": 3.0}, confidence_power=2.0, focal_gamma=0.0)
    weights = weighting(**tokens(kinds_RT=kinds, confidences_RT=confidences, answer_weights_RT=shares))
    assert weights.tolist() == [[w * 0.25 * 0.75 for w in (3.0, 6.0, 4.5, 4.0, 0.25, 0.0)]]
    without = Weighting(**SPANS, **PLAIN)(**tokens(confidences_RT=confidences))
    assert without.tolist() == [[1.0, 2.0, 1.5, 4.0, 0.25, 0.0]]


def test_the_focal_factor_is_the_students_doubt_and_sends_no_gradient():
    nats = torch.tensor([[0.0, math.log(2.0), math.log(10.0)]], requires_grad=True)
    focus = Weighting(**EVEN, kinds={}, confidence_power=0.0, focal_gamma=2.0).focus(label_nats_RT=nats)
    assert focus.tolist()[0] == pytest.approx([0.0, 0.25, 0.81], rel=1e-6)
    assert not focus.requires_grad
    assert Weighting(**EVEN, **PLAIN).focus(label_nats_RT=nats) is None


@pytest.mark.parametrize(
    ("spans", "kinds", "words"),
    [
        (dict.fromkeys(SPANS, 0.0), {}, "every span weight is 0"),
        (EVEN, {"singles": 2.0}, "kinds.singles: there is no such kind"),
        (EVEN, dict.fromkeys(KINDS, 0.0), "every kind's weight is 0"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(spans: dict, kinds: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Weighting(**spans, kinds=kinds, confidence_power=0.0, focal_gamma=0.0)
