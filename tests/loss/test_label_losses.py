"""Losses over labels: hard, smoothed, and sampled from the teacher."""

# R rows, T target tokens, V vocabulary

import math
from math import log

import pytest
import torch
from torch import Tensor

from needle.loss import ExpectedCrossEntropy, HardLabel, LabelSmoothing, Weighting
from needle.loss.base import IGNORE, reduce

V = 7
LOSSES = {
    "hard_label": HardLabel(),
    "label_smoothing": LabelSmoothing(smoothing_frac=0.2),
    "expected_cross_entropy": ExpectedCrossEntropy(),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def random_logits(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradient(loss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    nats = loss(student_logits_RTV=logits, labels_RT=labels)
    return nats.detach(), torch.autograd.grad(nats.sum(), logits)[0]


def test_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [log(3.0), 0.0, 0.0, -math.inf]]])
    nats = HardLabel()(student_logits_RTV=logits, labels_RT=torch.tensor([[2, 0]]))
    # Uniform over four; then 3 / (3 + 1 + 1).
    assert nats.tolist()[0] == pytest.approx([log(4), log(5 / 3)], rel=1e-6)


def test_label_smoothing_by_hand():
    """Student (0.2, 0.5, 0.3), label the second: 0.7 on it and 0.1 on each of three."""
    logits = torch.tensor([[[0.2, 0.5, 0.3]]]).log()
    nats = LabelSmoothing(smoothing_frac=0.3)(student_logits_RTV=logits, labels_RT=torch.tensor([[1]]))
    assert nats.item() == pytest.approx(-0.1 * log(0.2) - 0.8 * log(0.5) - 0.1 * log(0.3), rel=1e-6)


def test_label_smoothing_is_least_at_the_smoothed_label_and_without_it_is_cross_entropy():
    labels = torch.tensor([[1, 4]])
    smoothed = torch.full((1, 2, V), 0.2 / V, dtype=torch.float64)
    smoothed = smoothed.scatter_add(-1, labels.unsqueeze(-1), torch.full((1, 2, 1), 0.8, dtype=torch.float64))
    nats, gradient = with_gradient(LOSSES["label_smoothing"], smoothed.log(), labels)
    assert torch.allclose(nats, -(smoothed * smoothed.log()).sum(-1), rtol=1e-9)
    assert gradient.abs().max() < 1e-12
    logits = random_logits(1, 2, V, seed=1)
    plain, none = (
        loss(student_logits_RTV=logits, labels_RT=labels) for loss in (HardLabel(), LabelSmoothing(smoothing_frac=0.0))
    )
    assert torch.allclose(plain, none, rtol=1e-9)


@each_loss
def test_gradients_are_those_of_finite_differences(name: str):
    labels = torch.tensor([[2, IGNORE, 0]])

    def value(logits: Tensor) -> Tensor:
        return LOSSES[name](student_logits_RTV=logits, labels_RT=labels)

    assert torch.autograd.gradcheck(value, (random_logits(1, 3, V, seed=2).requires_grad_(),), rtol=1e-5)


def test_the_gradient_of_cross_entropy_is_student_minus_label():
    logits, labels = random_logits(2, 3, V, seed=2), torch.tensor([[0, 1, IGNORE], [6, 6, 2]])
    _, gradient = with_gradient(HardLabel(), logits, labels)
    one_hot = torch.nn.functional.one_hot(labels.clamp_min(0), V)
    assert torch.allclose(gradient, (logits.softmax(-1) - one_hot) * (labels != IGNORE).unsqueeze(-1), atol=1e-12)


@each_loss
def test_ignored_labels_cost_and_teach_nothing_and_positions_are_alone(name: str):
    logits, labels = random_logits(2, 3, V, seed=2), torch.tensor([[0, 1, IGNORE], [IGNORE, 6, 2]])
    nats, gradient = with_gradient(LOSSES[name], logits, labels)
    kept = labels != IGNORE
    assert (nats[~kept] == 0).all()
    assert (gradient[~kept] == 0).all()
    assert (nats[kept] > 0).all()
    alone, gradient_alone = with_gradient(LOSSES[name], logits[1:, 1:2], labels[1:, 1:2])
    assert torch.allclose(nats[1:, 1:2], alone, rtol=1e-12)
    assert torch.allclose(gradient[1:, 1:2], gradient_alone, rtol=1e-12)


STUDENTS = {
    "copy_head": torch.full((1, 2, V), -69.0).index_fill(-1, torch.tensor([3]), 0.0),
    "masked": torch.full((1, 2, V), -math.inf).index_fill(-1, torch.tensor([3]), 0.0),
    "huge": (torch.arange(V) * 1e4).expand(1, 2, V),
}


@each_loss
@pytest.mark.parametrize("student", STUDENTS)
def test_value_and_gradient_are_finite_at_the_extremes(name: str, student: str):
    for label in (3, 5):
        nats, gradient = with_gradient(LOSSES[name], STUDENTS[student], torch.tensor([[label, IGNORE]]))
        assert nats.isfinite().all()
        assert gradient.isfinite().all()
        assert nats[0, 1] == 0
        assert (gradient[0, 1] == 0).all()


def test_smoothing_pays_a_copy_heads_floor_in_full():
    """Right and sure, six of seven tokens at -69: 0.2 / 7 * 6 * 69 nats."""
    nats = LOSSES["label_smoothing"](student_logits_RTV=STUDENTS["copy_head"], labels_RT=torch.tensor([[3, IGNORE]]))
    assert nats[0, 0].item() == pytest.approx(0.2 / 7 * 6 * 69, rel=1e-5)


@each_loss
def test_lower_precision_is_reduced_in_float32(name: str):
    logits, labels = random_logits(2, 3, V, seed=2).bfloat16(), torch.tensor([[0, 1, 2], [3, 4, 5]])
    low = LOSSES[name](student_logits_RTV=logits, labels_RT=labels)
    assert low.dtype == torch.float32
    assert torch.equal(low, LOSSES[name](student_logits_RTV=logits.float(), labels_RT=labels))


def test_the_expected_cross_entropy_is_the_answers_weighed_by_their_shares():
    """One request, two distinct answers: three samples of four say the tokens (1, 2), one says (3, 4, 5). As packed:
    one row, then padding. The student gives each token of the first answer 1/2, of the second 1/8."""
    assert ExpectedCrossEntropy().needs == {"samples"}
    labels = torch.tensor([[1, 2, 3, 4, 5, IGNORE]])
    given = torch.tensor([0.5, 0.5, 0.125, 0.125, 0.125, 0.5])
    student = ((1 - given) / (V - 1)).unsqueeze(-1).expand(6, V).clone()
    student.scatter_(-1, labels[0].clamp_min(0).unsqueeze(-1), given.unsqueeze(-1))
    spans = dict.fromkeys(("structure", "name", "key", "value", "stop"), 1.0)
    weighting = Weighting(**spans, kinds={}, confidence_power=0.0, focal_gamma=0.0)
    weights = weighting(
        spans_RT=torch.zeros_like(labels),
        labels_RT=labels,
        kinds_RT=torch.zeros_like(labels),
        confidences_RT=torch.ones(1, 6),
        answer_weights_RT=torch.tensor([[0.75, 0.75, 0.25, 0.25, 0.25, 1.0]]),
    )
    nats = ExpectedCrossEntropy()(student_logits_RTV=student.log().unsqueeze(0), labels_RT=labels)
    terms = reduce(nats_RT=nats, weights_RT=weights)
    # CE_1 = 2 log 2 and CE_2 = 3 log 8 nats; 0.75 * 2 + 0.25 * 3 tokens.
    assert terms.sum_nats.item() == pytest.approx(0.75 * 2 * log(2) + 0.25 * 3 * log(8), rel=1e-5)
    assert terms.weight.item() == pytest.approx(2.25)


def test_the_expected_cross_entropy_is_the_sequence_kl_plus_the_teachers_entropy():
    """Answers of one token whose shares are the teacher's probabilities."""
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    student = random_logits(1, 1, 3, seed=4).log_softmax(-1)
    nats = ExpectedCrossEntropy()(student_logits_RTV=student.expand(3, 1, 3), labels_RT=torch.arange(3).unsqueeze(-1))
    divergence = (shares * (shares.log() - student[0, 0])).sum()
    entropy = -(shares * shares.log()).sum()
    assert reduce(nats_RT=nats, weights_RT=shares.unsqueeze(-1)).sum_nats.item() == pytest.approx(
        float(divergence + entropy), rel=1e-9
    )
