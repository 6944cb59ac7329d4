"""The conformance suite of losses: hand cases, gradients, limits and invariances."""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

import math

import pytest
import torch
from torch import Tensor

from needle.loss import ForwardKL, HardLabel
from needle.loss.base import IGNORE, reduce
from needle.loss.divergences import forward_kl_topk, log_tail

V = 11
LOSSES = {
    "hard_label": HardLabel(),
    "forward_kl": ForwardKL(temperature=1.0),
    "forward_kl_tempered": ForwardKL(temperature=2.0),
}


def log_probs(*shape: int, seed: int, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def top(teacher_RTV: Tensor, k: int) -> dict[str, Tensor]:
    values, ids = teacher_RTV.topk(k, dim=-1)
    return {"teacher_ids_RTK": ids, "teacher_log_probs_RTK": values}


def full_kl(teacher_RTV: Tensor, student_RTV: Tensor) -> Tensor:
    return (teacher_RTV.exp() * (teacher_RTV - student_RTV)).sum(-1)


def batch(rows: int = 3, length: int = 5, k: int = 4) -> dict[str, Tensor]:
    """Student logits, labels with some ignored, and a teacher, in float32 as in training."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, V, (rows, length), generator=generator)
    labels[:, -1] = IGNORE
    labels[0, 2:] = IGNORE
    teacher = {
        name: t.float() if t.is_floating_point() else t
        for name, t in top(log_probs(rows, length, V, seed=1), k).items()
    }
    return {"student_logits_RTV": log_probs(rows, length, V, seed=2).float(), "labels_RT": labels, **teacher}


# ---- hand cases


def test_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, 0.0, -math.inf]]])
    nats = HardLabel()(student_logits_RTV=logits, labels_RT=torch.tensor([[2, 0]]))
    # Uniform over four; then 3 / (3 + 1 + 1).
    assert nats.tolist()[0] == pytest.approx([math.log(4), math.log(5 / 3)], rel=1e-6)


def test_forward_kl_with_a_tail_by_hand():
    """Teacher (0.6, 0.3, 0.1), student (0.2, 0.5, 0.3), one token stored: buckets (0.6, 0.4) against (0.2, 0.8)."""
    teacher, student = (torch.tensor([[p]], dtype=torch.float64).log() for p in ([0.6, 0.3, 0.1], [0.2, 0.5, 0.3]))
    one = forward_kl_topk(student_log_probs_RTV=student, **top(teacher, 1))
    assert one.item() == pytest.approx(0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8), rel=1e-9)
    two = forward_kl_topk(student_log_probs_RTV=student, **top(teacher, 2))
    by_hand = 0.6 * math.log(0.6 / 0.2) + 0.3 * math.log(0.3 / 0.5) + 0.1 * math.log(0.1 / 0.3)
    assert two.item() == pytest.approx(by_hand, rel=1e-9)


def test_the_tail_is_the_mass_that_is_not_stored():
    stored = torch.tensor([[[0.5, 0.25]]], dtype=torch.float64).log()
    assert log_tail(stored).item() == pytest.approx(math.log(0.25))
    # A teacher sure of its stored tokens leaves a tail that is finite, not log 0.
    assert math.isfinite(log_tail(torch.zeros(1, 1, 1)).item())


# ---- zero, bounds and limits


@pytest.mark.parametrize("k", [1, 4, V])
def test_the_divergence_is_zero_where_the_student_is_the_teacher(k: int):
    teacher = log_probs(3, 5, V, seed=1)
    assert forward_kl_topk(student_log_probs_RTV=teacher, **top(teacher, k)).abs().max() < 1e-12


def test_more_stored_tokens_rise_to_the_full_divergence_and_never_pass_it():
    teacher, student = log_probs(20, 5, V, seed=1), log_probs(20, 5, V, seed=2)
    by_k = torch.stack([forward_kl_topk(student_log_probs_RTV=student, **top(teacher, k)) for k in range(1, V + 1)])
    full = full_kl(teacher, student)
    assert (by_k >= 0).all()
    assert (by_k.diff(dim=0) >= -1e-6).all()  # 1e-7 is the floor under the tail
    assert (by_k <= full + 1e-5).all()
    assert torch.allclose(by_k[-1], full, atol=1e-5)
    assert (full - by_k[0]).mean() > 0.1  # the case is one in which the tail matters


TEACHERS = {
    "one_hot": torch.full((1, 2, V), -math.inf).index_fill(-1, torch.tensor([3]), 0.0),
    "uniform": torch.full((1, 2, V), -math.log(V)),
    "tiny": torch.full((1, 2, V), -200.0).index_fill(-1, torch.tensor([3]), 0.0),
}
STUDENTS = {
    "ordinary": torch.linspace(-3, 3, V).expand(1, 2, V),
    "one_hot_elsewhere": torch.full((1, 2, V), -1e30).index_fill(-1, torch.tensor([5]), 0.0),
    "minus_infinity": torch.full((1, 2, V), -math.inf).index_fill(-1, torch.tensor([3, 5]), 0.0),
    "huge": (torch.arange(V) * 1e4).expand(1, 2, V),
}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("k", [1, 3, V])
def test_value_and_gradient_are_finite_at_the_extremes(teacher: str, student: str, k: int):
    logits = STUDENTS[student].clone().requires_grad_()
    labels = torch.tensor([[3, IGNORE]])
    for loss in LOSSES.values():
        nats = loss(student_logits_RTV=logits, labels_RT=labels, **top(TEACHERS[teacher], k))
        (gradient,) = torch.autograd.grad(nats.sum(), logits)
        assert nats.isfinite().all()
        assert gradient.isfinite().all()
        assert (nats >= -1e-5).all()


def test_a_one_hot_teacher_gives_cross_entropy():
    logits = log_probs(1, 2, V, seed=3).float()
    nats = ForwardKL(temperature=1.0)(
        student_logits_RTV=logits, labels_RT=torch.tensor([[3, 3]]), **top(TEACHERS["one_hot"], 4)
    )
    assert torch.allclose(nats, -logits[..., 3], atol=1e-4)


# ---- gradients


@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_the_gradient_of_the_divergence_is_that_of_finite_differences(k: int):
    signals = top(log_probs(2, 3, V, seed=1), k)
    logits = log_probs(2, 3, V, seed=2).requires_grad_()

    def divergence(logits: Tensor) -> Tensor:
        return forward_kl_topk(student_log_probs_RTV=logits.log_softmax(-1), **signals)

    assert torch.autograd.gradcheck(divergence, (logits,))


def test_the_gradient_of_the_full_divergence_is_student_minus_teacher():
    teacher, logits = log_probs(2, 3, V, seed=1), log_probs(2, 3, V, seed=2).float().requires_grad_()
    loss = ForwardKL(temperature=1.0)
    nats = loss(student_logits_RTV=logits, labels_RT=torch.zeros(2, 3, dtype=torch.long), **top(teacher.float(), V - 1))
    nats.sum().backward()
    assert torch.allclose(logits.grad.double(), logits.detach().double().softmax(-1) - teacher.exp(), atol=1e-5)


def test_the_gradient_of_cross_entropy_is_student_minus_label():
    inputs = batch()
    logits = inputs["student_logits_RTV"].clone().requires_grad_()
    HardLabel()(student_logits_RTV=logits, labels_RT=inputs["labels_RT"]).sum().backward()
    kept = inputs["labels_RT"] != IGNORE
    one_hot = torch.nn.functional.one_hot(inputs["labels_RT"].clamp_min(0), V)
    by_hand = (logits.detach().softmax(-1) - one_hot) * kept.unsqueeze(-1)
    assert torch.allclose(logits.grad, by_hand, atol=1e-6)


# ---- temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_of_tempered_distributions_times_the_square(temperature: float):
    teacher = (log_probs(2, 3, V, seed=1) / temperature).log_softmax(-1)
    logits = log_probs(2, 3, V, seed=2)
    nats = ForwardKL(temperature=temperature)(
        student_logits_RTV=logits.float(), labels_RT=torch.zeros(2, 3, dtype=torch.long), **top(teacher.float(), V)
    )
    by_hand = temperature**2 * full_kl(teacher, (logits / temperature).log_softmax(-1))
    assert torch.allclose(nats.double(), by_hand, rtol=1e-4, atol=1e-4)


def test_the_gradient_keeps_its_size_and_nears_the_high_temperature_limit():
    """Hinton et al. 2015: far above the logits, T^2 times the gradient is their centred difference over V."""
    teacher, student = (
        0.5 * torch.randn(1, 1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in (1, 2)
    )
    limit = (student - student.mean()) / V - (teacher - teacher.mean()) / V
    gradients = {}
    for temperature in (1.0, 2.0, 4.0, 16.0):
        logits = student.float().clone().requires_grad_()
        signals = top((teacher / temperature).log_softmax(-1).float(), V - 1)
        loss = ForwardKL(temperature=temperature)
        loss(student_logits_RTV=logits, labels_RT=torch.zeros(1, 1, dtype=torch.long), **signals).sum().backward()
        gradients[temperature] = logits.grad.double()
    assert torch.allclose(gradients[16.0], limit, rtol=0.1, atol=0.1 * limit.abs().max().item())
    for gradient in gradients.values():
        assert 0.6 < gradient.norm() / limit.norm() < 1.6


# ---- labels, mixing


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_labels_cost_nothing_and_teach_nothing(name: str):
    inputs = batch()
    logits = inputs["student_logits_RTV"].clone().requires_grad_()
    nats = LOSSES[name](**{**inputs, "student_logits_RTV": logits})
    nats.sum().backward()
    ignored = inputs["labels_RT"] == IGNORE
    assert ignored.any()
    assert (nats[ignored] == 0).all()
    assert (nats[~ignored] > 0).all()
    assert (logits.grad[ignored] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_lower_precision_logits_are_reduced_in_float32(name: str):
    inputs = batch()
    rounded = inputs["student_logits_RTV"].bfloat16()
    low = LOSSES[name](**{**inputs, "student_logits_RTV": rounded})
    assert low.dtype == torch.float32
    assert torch.equal(low, LOSSES[name](**{**inputs, "student_logits_RTV": rounded.float()}))


# ---- the mean over tokens


def mean_and_gradient(loss, parts: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean nats a token over micro-batches, and its gradient by a shift shared by all logits."""
    shift = torch.zeros(V, requires_grad=True)
    sums, weights = [], []
    for part in parts:
        nats = loss(**{**part, "student_logits_RTV": part["student_logits_RTV"] + shift})
        terms = reduce(nats_RT=nats, weights_RT=(part["labels_RT"] != IGNORE).float())
        sums.append(terms.sum_nats)
        weights.append(terms.weight)
    mean = torch.stack(sums).sum() / torch.stack(weights).sum()
    return mean.detach(), torch.autograd.grad(mean, shift)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_does_not_depend_on_micro_batches_padding_or_packing(name: str):
    whole = batch(rows=4, length=6)
    rows = [{key: value[r : r + 1] for key, value in whole.items()} for r in range(4)]

    def padded(part: dict[str, Tensor], extra: int) -> dict[str, Tensor]:
        """Garbage after the end, as a student gives it at padding, where labels are ignored."""
        longer = {key: torch.cat((v, v.flip(1)[:, :extra]), dim=1) for key, v in part.items()}
        longer["labels_RT"][:, -extra:] = IGNORE
        return longer

    one_long_row = {key: torch.cat([row[key] for row in rows], dim=1) for key in whole}
    ways = {
        "micro-batches": rows,
        "uneven micro-batches": [{key: v[:1] for key, v in whole.items()}, {key: v[1:] for key, v in whole.items()}],
        "padding": [padded(row, extra) for row, extra in zip(rows, (1, 2, 3, 4), strict=True)],
        "packing": [one_long_row],
    }
    mean, gradient = mean_and_gradient(LOSSES[name], [whole])
    assert mean > 0
    for way, parts in ways.items():
        other_mean, other_gradient = mean_and_gradient(LOSSES[name], parts)
        assert torch.allclose(mean, other_mean, rtol=1e-5), way
        assert torch.allclose(gradient, other_gradient, rtol=1e-4, atol=1e-6), way
