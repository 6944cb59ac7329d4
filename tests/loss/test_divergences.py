"""Divergences in both forms: hand cases, gradients, truncation, temperature, extremes, memory."""

# R rows, T target tokens, V vocabulary, K stored teacher tokens, N buckets or tokens

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from math import log, sqrt

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from needle import loss as losses
from needle.loss.base import IGNORE
from needle.loss.buckets import log1mexp, teacher_buckets
from needle.loss.divergences import Divergence

V = 11
PLAIN = {"temperature": 1.0, "distribution": "full", "chunk_tokens": None}
LOSSES: dict[str, Divergence] = {
    "forward_kl": losses.ForwardKL(**PLAIN),
    "reverse_kl": losses.ReverseKL(**PLAIN),
    "symmetric_kl": losses.SymmetricKL(**PLAIN),
    "jensen_shannon": losses.JensenShannon(**PLAIN, beta=0.25),
    "skew_forward_kl": losses.SkewForwardKL(**PLAIN, alpha=0.1),
    "skew_reverse_kl": losses.SkewReverseKL(**PLAIN, alpha=0.1),
    "total_variation": losses.TotalVariation(**PLAIN),
    "adaptive_kl": losses.AdaptiveKL(**PLAIN, head_mass=0.7),
    "taid": losses.TAID(**PLAIN, t_start=0.5, t_end=1.0, alpha=0.1, beta_momentum=0.5),
    "decoupled_kd": losses.DecoupledKD(**PLAIN, alpha=2.0, beta=3.0),
}
F_DIVERGENCES = [name for name in LOSSES if name not in ("adaptive_kl", "taid", "decoupled_kd")]
STOPS_GRADIENT = ("adaptive_kl", "taid")
FORMS = ("top_k", "full")
each_loss = pytest.mark.parametrize("name", LOSSES)
each_form = pytest.mark.parametrize("form", FORMS)


def random_logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signals_of(teacher_logits_RTV: Tensor, *, k: int, temperature: float = 1.0) -> dict[str, Tensor]:
    """All that any divergence may ask for; `progress` is such that TAID's t is its state's."""
    top = (teacher_logits_RTV / temperature).log_softmax(-1).topk(k, dim=-1)
    return {
        "teacher_logits_RTV": teacher_logits_RTV,
        "teacher_ids_RTK": top.indices,
        "teacher_log_probs_RTK": top.values,
        "progress": torch.tensor(0.0),
        "state": torch.tensor([0.5, 0.0, math.inf]),
    }


def measured(loss: Divergence, student: Tensor, teacher: Tensor, *, k: int = 4, labels: Tensor | None = None) -> Tensor:
    labels = torch.full(student.shape[:2], 3) if labels is None else labels
    return loss(student_logits_RTV=student, labels_RT=labels, **signals_of(teacher, k=k, temperature=loss.temperature))


def with_gradient(loss: Divergence, student: Tensor, teacher: Tensor, **more) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    nats = measured(loss, student, teacher, **more)
    return nats.detach(), torch.autograd.grad(nats.sum(), student)[0]


# ---- hand cases


def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


# Teacher p, student q; with one token stored their buckets are P and Q. The label is the second token.
p, q = (0.6, 0.3, 0.1), (0.2, 0.5, 0.3)
P, Q = (0.6, 0.4), (0.2, 0.8)
# sqrt(p * q), renormalised: TAID's target at t = 1/2.
ROOTS, ROOTS_2 = sqrt(0.12) + sqrt(0.15) + sqrt(0.03), sqrt(0.12) + sqrt(0.32)
HAND = {  # full vocabulary, one token stored
    "forward_kl": (0.6 * log(3) + 0.3 * log(0.6) + 0.1 * log(1 / 3), 0.6 * log(3) + 0.4 * log(0.5)),
    "reverse_kl": (0.2 * log(1 / 3) + 0.5 * log(5 / 3) + 0.3 * log(3), 0.2 * log(1 / 3) + 0.8 * log(2)),
    "symmetric_kl": (
        0.5 * (0.4 * log(3) + 0.2 * log(5 / 3) + 0.2 * log(3)),  # (p - q) * log(p / q), token by token
        0.5 * (0.4 * log(3) + 0.4 * log(2)),
    ),
    "jensen_shannon": (
        0.25 * kl(p, (0.3, 0.45, 0.25)) + 0.75 * kl(q, (0.3, 0.45, 0.25)),
        0.25 * kl(P, (0.3, 0.7)) + 0.75 * kl(Q, (0.3, 0.7)),
    ),
    "skew_forward_kl": (kl(p, (0.24, 0.48, 0.28)), 0.6 * log(2.5) + 0.4 * log(0.4 / 0.76)),
    "skew_reverse_kl": (kl(q, (0.56, 0.32, 0.12)), 0.2 * log(0.2 / 0.56) + 0.8 * log(0.8 / 0.44)),
    "total_variation": (0.4, 0.4),
    # Head {0.6, 0.3} with gaps 0.4 + 0.2, rest 0.2; of the buckets both are needed for 0.7.
    "adaptive_kl": (0.75 * kl(p, q) + 0.25 * kl(q, p), kl(P, Q)),
    "taid": (
        kl((sqrt(0.12) / ROOTS, sqrt(0.15) / ROOTS, sqrt(0.03) / ROOTS), q),
        kl((sqrt(0.12) / ROOTS_2, sqrt(0.32) / ROOTS_2), Q),
    ),
    # The label's 0.3 against 0.5, then 6/7, 1/7 against 2/5, 3/5. Not stored, the label is the tail; no rest is left.
    "decoupled_kd": (
        2 * (0.3 * log(0.6) + 0.7 * log(1.4)) + 3 * (6 / 7 * log(15 / 7) + 1 / 7 * log(5 / 21)),
        2 * (0.4 * log(0.5) + 0.6 * log(3)),
    ),
}


@each_loss
def test_by_hand(name: str):
    teacher, student = (torch.tensor([[x]], dtype=torch.float64).log() for x in (p, q))
    label = torch.tensor([[1]])
    full, one_stored = HAND[name]
    top_k = dataclasses.replace(LOSSES[name], distribution="top_k")
    assert measured(LOSSES[name], student, teacher, k=1, labels=label).item() == pytest.approx(full, rel=1e-6)
    assert measured(top_k, student, teacher, k=1, labels=label).item() == pytest.approx(one_stored, rel=1e-6)
    # Two of three stored: the tail is one token, and nothing is lost.
    assert measured(top_k, student, teacher, k=2, labels=label).item() == pytest.approx(full, rel=1e-6)


def test_the_adaptive_head_is_the_teachers_likeliest_whatever_the_order_of_storage():
    """At a head of 0.5 it is {0.6} alone: gaps 0.4 and 0.2 + 0.2, equal weights."""
    teacher, student = (torch.tensor([[x]], dtype=torch.float64).log() for x in (p, q))
    loss = losses.AdaptiveKL(temperature=1.0, distribution="top_k", chunk_tokens=None, head_mass=0.5)
    for order in ([0, 1], [1, 0]):
        ids = torch.tensor([[order]])
        nats = loss(
            student_logits_RTV=student,
            labels_RT=torch.tensor([[1]]),
            teacher_ids_RTK=ids,
            teacher_log_probs_RTK=teacher.gather(-1, ids),
        )
        assert nats.item() == pytest.approx(0.5 * kl(p, q) + 0.5 * kl(q, p), rel=1e-6)


def test_symmetric_kl_is_the_mean_of_both_directions():
    student, teacher = random_logits(2, 3, V, seed=2), random_logits(2, 3, V, seed=1)
    both, forward, reverse = (
        measured(LOSSES[name], student, teacher) for name in ("symmetric_kl", "forward_kl", "reverse_kl")
    )
    assert torch.allclose(both, (forward + reverse) / 2, rtol=1e-12)


def test_the_generalised_jensen_shannon_divergence_nears_either_kl():
    student, teacher = random_logits(2, 3, V, seed=2, scale=1), random_logits(2, 3, V, seed=1, scale=1)
    small = 1e-5
    near_forward = measured(losses.JensenShannon(**PLAIN, beta=small), student, teacher) / small
    near_reverse = measured(losses.JensenShannon(**PLAIN, beta=1 - small), student, teacher) / small
    assert torch.allclose(near_forward, measured(LOSSES["forward_kl"], student, teacher), rtol=1e-3)
    assert torch.allclose(near_reverse, measured(LOSSES["reverse_kl"], student, teacher), rtol=1e-3)


def test_decoupled_kd_with_the_teachers_weight_on_the_rest_is_forward_kl():
    """KL(p || q) = TCKD + (1 - p(label)) * NCKD."""
    student, teacher = random_logits(2, 3, V, seed=2), random_logits(2, 3, V, seed=1)
    parts = [
        measured(losses.DecoupledKD(**PLAIN, alpha=float(a), beta=float(b)), student, teacher)
        for a, b in ((1, 0), (0, 1))
    ]
    rest = 1 - teacher.softmax(-1)[..., 3]
    assert torch.allclose(parts[0] + rest * parts[1], measured(LOSSES["forward_kl"], student, teacher), rtol=1e-9)


# ---- gradients


def inputs(rows: int = 1, length: int = 4) -> dict[str, Tensor]:
    labels = torch.arange(rows * length).reshape(rows, length) % V
    labels[:, 1] = IGNORE
    return {
        "student": random_logits(rows, length, V, seed=2),
        "teacher": random_logits(rows, length, V, seed=1),
        "labels": labels,
    }


@each_form
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in STOPS_GRADIENT])
def test_gradients_are_those_of_finite_differences(name: str, form: str):
    loss = dataclasses.replace(LOSSES[name], temperature=1.5, distribution=form, chunk_tokens=2)
    teacher, labels = random_logits(1, 4, 5, seed=1), torch.tensor([[3, IGNORE, 0, 1]])

    def value(student: Tensor) -> Tensor:
        return measured(loss, student, teacher, k=2, labels=labels)

    assert torch.autograd.gradcheck(value, (random_logits(1, 4, 5, seed=2).requires_grad_(),), rtol=1e-5, atol=1e-9)


def frozen(name: str, loss, student: Tensor, teacher: Tensor) -> Callable[[Tensor], Tensor]:
    """The formula over all tokens, with what is a constant for the gradient taken at `student`."""
    T = loss.temperature
    log_p, log_q0 = (teacher / T).log_softmax(-1), (student.detach() / T).log_softmax(-1)

    def divergence(one: Tensor, other: Tensor) -> Tensor:
        return (one.exp() * (one - other)).sum(-1)

    def value(logits: Tensor) -> Tensor:
        log_q = (logits / T).log_softmax(-1)
        if name == "taid":
            return T**2 * divergence((0.5 * log_p + 0.5 * log_q0).log_softmax(-1), log_q)
        share = loss.forward_frac(teacher_XN=log_p.exp(), student_XN=log_q0.exp(), tail=False)
        return T**2 * (share * divergence(log_p, log_q) + (1 - share) * divergence(log_q, log_p))

    return value


@each_form
@pytest.mark.parametrize("name", STOPS_GRADIENT)
def test_gradients_hold_weights_and_targets_of_the_student_itself_constant(name: str, form: str):
    loss = dataclasses.replace(LOSSES[name], temperature=1.5, distribution=form, chunk_tokens=2)
    given = inputs(rows=2)
    student, teacher = given["student"], given["teacher"]
    labels = torch.ones(student.shape[:2], dtype=torch.long)
    by_hand = frozen(name, loss, student, teacher)
    (expected,) = torch.autograd.grad(by_hand(leaf := student.clone().requires_grad_()).sum(), leaf)
    nats, gradient = with_gradient(loss, student, teacher, k=V - 1, labels=labels)
    assert torch.allclose(nats, by_hand(student), rtol=1e-9)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-9)
    assert torch.autograd.gradcheck(by_hand, (student.requires_grad_(),), rtol=1e-5)


@pytest.mark.parametrize("stored", [1, 4, V - 1, V])
def test_the_gradient_of_forward_kl_is_student_minus_teacher(stored: int):
    """Of the buckets: within the tail the teacher's mass is spread as the student's."""
    student, teacher = random_logits(2, 3, V, seed=2), random_logits(2, 3, V, seed=1)
    p, q = teacher.softmax(-1), student.softmax(-1)
    ids = p.topk(stored).indices
    in_tail = torch.ones_like(p).scatter(-1, ids, 0.0)
    tail_p, tail_q = ((x * in_tail).sum(-1, keepdim=True) for x in (p, q))
    target = torch.where(in_tail > 0, q * tail_p / tail_q.clamp_min(1e-300), p)
    _, gradient = with_gradient(
        dataclasses.replace(LOSSES["forward_kl"], distribution="top_k"), student, teacher, k=stored
    )
    assert torch.allclose(gradient, q - target, rtol=1e-6, atol=1e-9)


def test_a_students_tail_far_below_rounding_still_gets_its_gradient():
    """q = (1 - 1e-12 ...): 1 - sum would be 0 in float32, and the tail would be lost."""
    student = torch.tensor([[[28.0, 0.0, 0.0, -1.0]]])
    teacher = torch.tensor([[[0.9, 0.06, 0.03, 0.01]]]).log()
    loss = dataclasses.replace(LOSSES["forward_kl"], distribution="top_k")
    nats, gradient = with_gradient(loss, student, teacher, k=1)
    in_tail = student[..., 1:].double()
    tail = float(in_tail.logsumexp(-1) - student.double().logsumexp(-1))
    assert nats.item() == pytest.approx(0.9 * log(0.9) + 0.1 * (log(0.1) - tail), rel=1e-5)
    assert torch.allclose(gradient[..., 1:].double(), -0.1 * in_tail.softmax(-1), rtol=1e-5)


@each_form
@each_loss
def test_the_teacher_gets_no_gradient(name: str, form: str):
    loss = dataclasses.replace(LOSSES[name], distribution=form)
    teacher = random_logits(1, 3, V, seed=1).requires_grad_()
    student = random_logits(1, 3, V, seed=2).requires_grad_()
    measured(loss, student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@each_form
def test_the_incoming_gradient_scales_each_position_and_a_graph_may_be_walked_twice(form: str):
    loss = dataclasses.replace(LOSSES["reverse_kl"], distribution=form)
    given = inputs(rows=2)
    weights = torch.rand(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = given["student"].requires_grad_()
    nats = measured(loss, student, given["teacher"])
    (plain,) = torch.autograd.grad(nats.sum(), student, retain_graph=True)
    plain = plain.clone()
    (weighed,) = torch.autograd.grad((weights * nats).sum(), student)
    assert torch.allclose(weighed, weights.unsqueeze(-1) * plain, rtol=1e-12)


# ---- truncation


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_more_stored_tokens_rise_to_the_full_divergence_and_never_pass_it(name: str):
    """The data-processing inequality: buckets are a function of the token."""
    student, teacher = random_logits(20, 5, V, seed=2), random_logits(20, 5, V, seed=1)
    loss = dataclasses.replace(LOSSES[name], distribution="top_k")
    by_k = torch.stack([measured(loss, student, teacher, k=k) for k in range(1, V + 1)])
    full = measured(LOSSES[name], student, teacher)
    assert (by_k[0] >= -1e-12).all()
    assert (by_k.diff(dim=0) >= -1e-9).all()
    assert torch.allclose(by_k[-2], full, rtol=1e-6, atol=1e-9)
    assert torch.allclose(by_k[-1], full, rtol=1e-9, atol=1e-12)
    assert (full - by_k[0]).mean() > 0.005  # the case is one in which the tail matters


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in F_DIVERGENCES])
def test_other_divergences_converge_as_more_tokens_are_stored(name: str):
    student, teacher = random_logits(20, 5, V, seed=2), random_logits(20, 5, V, seed=1)
    loss = dataclasses.replace(LOSSES[name], distribution="top_k")
    full = measured(LOSSES[name], student, teacher)
    errors = [(measured(loss, student, teacher, k=k) - full).abs().mean().item() for k in range(1, V + 1)]
    assert errors[0] > 0.05
    assert errors[V // 2] < 0.5 * errors[0]
    assert errors[-2] < 1e-6
    assert errors[-1] < 1e-9


@each_loss
def test_a_student_that_is_the_teacher_diverges_by_nothing(name: str):
    teacher = random_logits(3, 5, V, seed=1)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        for form, k in (("full", 1), ("top_k", 1), ("top_k", 4), ("top_k", V)):
            loss = dataclasses.replace(LOSSES[name], distribution=form)
            nats, gradient = with_gradient(loss, teacher.to(dtype), teacher.to(dtype), k=k)
            assert nats.abs().max() < limit
            if name != "total_variation":  # whose slope jumps there
                assert gradient.abs().max() < 10 * limit


def test_log1mexp_keeps_its_digits_on_both_sides():
    x = torch.tensor([-1e-5, -1e-3, -0.5, -0.7, -5.0, -15.0])
    assert torch.allclose(log1mexp(x), (-torch.expm1(x.double())).log().float(), rtol=1e-6, atol=1e-9)
    assert log1mexp(torch.zeros(1)).item() == pytest.approx(log(torch.finfo(torch.float32).eps))


def test_the_teachers_tail_is_what_is_not_stored():
    def tail(*log_probs: float, vocabulary: int) -> float:
        return teacher_buckets(torch.tensor([log_probs]), vocabulary=vocabulary)[0, -1].item()

    assert tail(log(0.5), log(0.25), vocabulary=8) == pytest.approx(log(0.25), rel=1e-6)
    # Below rounding six tokens are left, each at most as likely as the least stored.
    assert tail(0.0, -30.0, vocabulary=8) == pytest.approx(log(6) - 30)
    # All are stored: nothing is left, whatever the rounding of the sum.
    assert tail(log(0.5), log(0.4999), vocabulary=2) == -1e4
    # What is not stated is tail.
    assert tail(-math.inf, -math.inf, vocabulary=8) == 0.0


@each_loss
def test_a_stored_token_without_a_probability_counts_with_the_tail(name: str):
    """Its id is padding, and may be any."""
    loss = dataclasses.replace(LOSSES[name], distribution="top_k")
    student, teacher = random_logits(2, 3, V, seed=2), random_logits(2, 3, V, seed=1)
    signals = signals_of(teacher, k=3)
    padded = dict(signals)
    for pad in (0, 5):
        padding = torch.full_like(signals["teacher_ids_RTK"][..., :2], pad)
        padded["teacher_ids_RTK"] = torch.cat((signals["teacher_ids_RTK"], padding), dim=-1)
        padded["teacher_log_probs_RTK"] = torch.cat(
            (signals["teacher_log_probs_RTK"], torch.full_like(padding, -math.inf, dtype=torch.float64)), dim=-1
        )
        found = []
        for given in (signals, padded):
            logits = student.clone().requires_grad_()
            nats = loss(student_logits_RTV=logits, labels_RT=torch.full((2, 3), 3), **given)
            found.append((nats, torch.autograd.grad(nats.sum(), logits)[0]))
        assert torch.allclose(found[0][0], found[1][0], rtol=1e-9)
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)


# ---- extremes

TEACHERS = {
    "one_hot": torch.full((1, 2, V), -math.inf).index_fill(-1, torch.tensor([3]), 0.0),
    "one_hot_elsewhere": torch.full((1, 2, V), -math.inf).index_fill(-1, torch.tensor([4]), 0.0),
    "uniform": torch.full((1, 2, V), -math.log(V)),
    "tiny": torch.full((1, 2, V), -200.0).index_fill(-1, torch.tensor([3]), 0.0),
    "ordinary": random_logits(1, 2, V, seed=1).float().log_softmax(-1),
}
STUDENTS = {
    "ordinary": torch.linspace(-3, 3, V).expand(1, 2, V),
    "one_hot_elsewhere": torch.full((1, 2, V), -1e30).index_fill(-1, torch.tensor([5]), 0.0),
    "one_token_left": torch.full((1, 2, V), -math.inf).index_fill(-1, torch.tensor([5]), 0.0),
    "minus_infinity": torch.full((1, 2, V), -math.inf).index_fill(-1, torch.tensor([3, 5]), 0.0),
    "huge": (torch.arange(V) * 1e4).expand(1, 2, V),
    "uniform": torch.zeros(1, 2, V),
    "copy_head": torch.full((1, 2, V), -69.0).index_fill(-1, torch.tensor([5]), 0.0),
}


@each_loss
@pytest.mark.parametrize("student", STUDENTS)
def test_value_and_gradient_are_finite_at_the_extremes(name: str, student: str):
    labels = torch.tensor([[3, IGNORE]])
    for teacher in TEACHERS.values():
        for form, k in (("top_k", 1), ("top_k", 3), ("top_k", V), ("full", 1)):
            loss = dataclasses.replace(LOSSES[name], distribution=form)
            nats, gradient = with_gradient(loss, STUDENTS[student], teacher, k=k, labels=labels)
            assert nats.isfinite().all()
            assert gradient.isfinite().all()
            assert (nats >= -1e-5).all()
            assert nats[0, 1] == 0
            assert (gradient[0, 1] == 0).all()


@each_loss
def test_a_silent_teacher_and_padding_as_packed_are_finite(name: str):
    """Padding repeats token 0 with probability 1."""
    loss = dataclasses.replace(LOSSES[name], distribution="top_k")
    logits = random_logits(1, 3, V, seed=2).float().requires_grad_()
    signals = {
        **signals_of(TEACHERS["ordinary"][:, :1].expand(1, 3, V), k=3),
        "teacher_ids_RTK": torch.tensor([[[1, 2, 3], [0, 0, 0], [0, 0, 0]]]),
    }
    signals["teacher_log_probs_RTK"] = signals["teacher_log_probs_RTK"].clone()
    signals["teacher_log_probs_RTK"][0, 1:] = torch.tensor([[-math.inf], [0.0]])
    nats = loss(student_logits_RTV=logits, labels_RT=torch.tensor([[3, 3, IGNORE]]), **signals)
    nats.sum().backward()
    assert nats[0, 0] > 0
    assert nats[0, 1:].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1:].abs().max() < 1e-6
    assert (logits.grad[0, 2] == 0).all()


@each_form
def test_a_one_hot_teacher_gives_cross_entropy(form: str):
    logits = random_logits(1, 2, V, seed=3).float()
    loss = dataclasses.replace(LOSSES["forward_kl"], distribution=form)
    nats = measured(loss, logits, TEACHERS["one_hot"])
    assert torch.allclose(nats, -logits.log_softmax(-1)[..., 3], rtol=1e-5)


# ---- temperature


@each_form
@each_loss
def test_gradients_keep_their_size_at_high_temperatures(name: str, form: str):
    """Far above the logits' range they reach a limit; without the factor they would fall by 4 or by 16."""
    student, teacher = random_logits(1, 6, V, seed=2, scale=1), random_logits(1, 6, V, seed=1, scale=1)
    norms = {}
    for temperature in (1.0, 32.0, 128.0):
        loss = dataclasses.replace(LOSSES[name], temperature=temperature, distribution=form)
        norms[temperature] = with_gradient(loss, student, teacher, k=6)[1].norm().item()
    assert norms[128.0] == pytest.approx(norms[32.0], rel=0.1)
    assert 1 / 8 < norms[128.0] / norms[1.0] < 8


def test_forward_kl_nears_the_high_temperature_limit():
    """Hinton et al. 2015: T^2 times the gradient nears the logits' centred difference over V."""
    student, teacher = random_logits(1, 1, V, seed=2, scale=0.5), random_logits(1, 1, V, seed=1, scale=0.5)
    limit = (student - student.mean() - teacher + teacher.mean()) / V
    _, gradient = with_gradient(dataclasses.replace(LOSSES["forward_kl"], temperature=100.0), student, teacher)
    assert torch.allclose(gradient, limit, rtol=0.02, atol=0.02 * limit.abs().max().item())


@each_form
@each_loss
def test_a_temperature_tempers_both_distributions_and_scales_the_value(name: str, form: str):
    student, teacher = random_logits(2, 3, V, seed=2), random_logits(2, 3, V, seed=1)
    plain = dataclasses.replace(LOSSES[name], distribution=form)
    for temperature in (0.5, 4.0):
        nats = measured(dataclasses.replace(plain, temperature=temperature), student, teacher)
        factor = temperature if name == "total_variation" else temperature**2
        assert torch.allclose(nats, factor * measured(plain, student / temperature, teacher / temperature), rtol=1e-9)


# ---- positions, precision, chunks


@each_form
@each_loss
def test_a_position_depends_on_itself_alone(name: str, form: str):
    """Hence the mean does not depend on micro-batches, padding or packing."""
    loss = dataclasses.replace(LOSSES[name], distribution=form, chunk_tokens=3)
    given = inputs(rows=3)
    nats, gradient = with_gradient(loss, given["student"], given["teacher"], labels=given["labels"])
    kept = given["labels"] != IGNORE
    assert (nats[kept] > 0).all()
    assert (nats[~kept] == 0).all()
    assert (gradient[~kept] == 0).all()
    for r, t in ((0, 0), (2, 3)):
        place = (slice(r, r + 1), slice(t, t + 1))
        one = {key: value[place] for key, value in given.items()}
        alone, gradient_alone = with_gradient(loss, one["student"], one["teacher"], labels=one["labels"])
        assert torch.allclose(nats[place], alone, rtol=1e-12)
        assert torch.allclose(gradient[place], gradient_alone, rtol=1e-12)


@each_form
@each_loss
def test_logits_may_be_shifted_and_may_be_log_probabilities(name: str, form: str):
    loss = dataclasses.replace(LOSSES[name], distribution=form)
    student, teacher = random_logits(2, 3, V, seed=2), random_logits(2, 3, V, seed=1)
    nats = measured(loss, student, teacher)
    assert torch.allclose(nats, measured(loss, student.log_softmax(-1), teacher), rtol=1e-9)
    assert torch.allclose(nats, measured(loss, student + 50, teacher), rtol=1e-9)


@each_form
@each_loss
def test_lower_precision_is_reduced_in_float32(name: str, form: str):
    loss = dataclasses.replace(LOSSES[name], distribution=form)
    student, teacher = random_logits(2, 3, V, seed=2).bfloat16(), random_logits(2, 3, V, seed=1).float()
    low, low_gradient = with_gradient(loss, student, teacher)
    high, high_gradient = with_gradient(loss, student.float(), teacher)
    assert low.dtype == high.dtype == torch.float32
    assert torch.equal(low, high)
    assert low_gradient.dtype == torch.bfloat16
    assert torch.equal(low_gradient, high_gradient.bfloat16())


@each_loss
@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
def test_chunks_change_nothing(name: str, chunk_tokens: int):
    given = inputs(rows=3)
    found = [
        with_gradient(dataclasses.replace(LOSSES[name], chunk_tokens=size), given["student"], given["teacher"])
        for size in (None, chunk_tokens)
    ]
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-12, atol=1e-15)


@each_form
def test_nothing_labelled_is_nothing_learnt(form: str):
    loss = dataclasses.replace(LOSSES["forward_kl"], distribution=form, chunk_tokens=2)
    given = inputs()
    nats, gradient = with_gradient(loss, given["student"], given["teacher"], labels=torch.full((1, 4), IGNORE))
    assert (nats == 0).all()
    assert (gradient == 0).all()


def peak_copies(work: Callable[[], object], copy_bytes: int) -> float:
    """The most memory that `work` holds beyond what was there, in copies of the logits."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measurement:
        work()
    events = [e for e in measurement.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / copy_bytes


@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl", "decoupled_kd"])
def test_memory_is_one_gradient_and_a_chunk(name: str):
    student = random_logits(2, 64, 256, seed=2).float().requires_grad_()
    teacher = random_logits(2, 64, 256, seed=1).float()
    labels = torch.full((2, 64), 3)
    whole = {"student_logits_RTV": student, "labels_RT": labels, **signals_of(teacher, k=8)}

    def peak(**settings) -> float:
        loss = dataclasses.replace(LOSSES[name], **settings)
        return peak_copies(lambda: loss(**whole).sum().backward(), student.numel() * 4)

    peaks = []
    for settings in ({"chunk_tokens": 2}, {"chunk_tokens": None}, {"distribution": "top_k"}):
        student.grad = None
        peaks.append(peak(**settings))
    chunked, at_once, top_k = peaks
    assert 1 <= chunked < 1.6  # the gradient, and at most some 20 copies of a chunk of 2 of 128 positions
    assert at_once > 5
    assert top_k < 2.6  # a copy for a moment in either direction, its -inf where tokens are stored, K + 1 wide tensors


@each_form
def test_compiled_gives_the_same(form: str):
    loss = dataclasses.replace(LOSSES["jensen_shannon"], distribution=form, chunk_tokens=3)
    given = {key: value.float() if value.is_floating_point() else value for key, value in inputs(rows=2).items()}
    signals = signals_of(given["teacher"], k=4)

    def nats(student: Tensor) -> Tensor:
        return loss(student_logits_RTV=student, labels_RT=given["labels"], **signals).sum()

    found = []
    for function in (nats, torch.compile(nats, backend="aot_eager")):
        student = given["student"].clone().requires_grad_()
        value = function(student)
        found.append((value.detach(), torch.autograd.grad(value, student)[0]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)


# ---- the moving target


def taid(**changes) -> losses.TAID:
    return losses.TAID(**PLAIN, **{"t_start": 0.2, "t_end": 0.9, "alpha": 0.1, "beta_momentum": 0.5, **changes})


def test_taid_moves_as_by_hand():
    loss = taid()
    first = loss.next_state(loss.initial_state(), mean_nats=torch.tensor(4.0), progress=0.0)
    assert first.tolist() == pytest.approx([0.2, 0.0, 4.0])  # nothing to compare with yet
    second = loss.next_state(first, mean_nats=torch.tensor(3.0), progress=0.01)
    momentum = 0.5 * 0 + 0.5 * (4 - 3) / 4
    t = 0.2 + 0.1 * (1 - 0.2) / (1 + math.exp(-momentum))
    assert second.tolist() == pytest.approx([t, momentum, 3.0], rel=1e-6)


def test_taid_never_lies_below_its_linear_schedule_nor_passes_its_end():
    loss = taid(alpha=0.05)
    state, seen = loss.initial_state(), []
    for step in range(100):
        state = loss.next_state(state, mean_nats=torch.tensor(4.0 - 0.03 * step), progress=step / 100)
        seen.append(state[0].item())
        assert seen[-1] >= 0.2 + 0.7 * step / 100 - 1e-6
    assert all(after >= before for before, after in pairwise(seen))
    assert seen[10] > 0.2 + 0.7 * 10 / 100 + 0.01  # it hurries
    assert seen[-1] == pytest.approx(0.9)


def test_a_falling_loss_hurries_taid_and_a_mean_of_nothing_leaves_it():
    loss, start = taid(), torch.tensor([0.3, 0.0, 2.0])
    fall, rise = (loss.next_state(start, mean_nats=torch.tensor(x), progress=0.0)[0] for x in (1.0, 3.0))
    assert fall > rise > 0.3
    assert torch.equal(loss.next_state(start, mean_nats=torch.tensor(math.nan), progress=0.0), start)


@each_form
def test_taid_goes_from_the_student_to_forward_kl(form: str):
    student, teacher = random_logits(2, 3, V, seed=2), random_logits(2, 3, V, seed=1)
    loss = dataclasses.replace(taid(t_start=0.0, t_end=1.0), distribution=form)
    given = {"student_logits_RTV": student, "labels_RT": torch.full((2, 3), 3), **signals_of(teacher, k=4)}

    def at(t: float, progress: float = 0.0) -> Tensor:
        return loss(**{**given, "state": torch.tensor([t, 0.0, 1.0]), "progress": torch.tensor(progress)})

    forward = measured(dataclasses.replace(LOSSES["forward_kl"], distribution=form), student, teacher)
    assert at(0.0).abs().max() < 1e-12
    assert torch.allclose(at(1.0), forward, rtol=1e-9)
    assert torch.allclose(at(0.0, progress=1.0), forward, rtol=1e-9)  # by the linear schedule
    assert ((at(0.5) > 0) & (at(0.5) < forward)).all()


# ---- settings


@each_form
@each_loss
def test_needs_follow_the_distribution(name: str, form: str):
    needs = dataclasses.replace(LOSSES[name], distribution=form).needs
    assert needs == {"top_k": {"top_k"}, "full": {"full_logits"}}[form]


def test_settings_that_teach_nothing_are_refused():
    with pytest.raises(ValueError, match=r"t_start=0\.9 is above t_end=0\.5"):
        taid(t_start=0.9, t_end=0.5)
    with pytest.raises(ValueError, match="alpha=0 and beta=0"):
        dataclasses.replace(LOSSES["decoupled_kd"], alpha=0.0, beta=0.0)
