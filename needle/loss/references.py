"""Every loss of conf/loss a second time, in numpy and float64, straight from the papers' formulas.

Nothing here is fast, shares code with the losses, or avoids large tensors: it is what `needle.loss.conformance` holds
them against. Formulas are over N: tokens, or K stored tokens and one tail.
"""

# R rows, T target tokens, V vocabulary, K stored teacher tokens, N buckets or tokens

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

IGNORE = -100
TINY = 1e-300


class Case(NamedTuple):
    """One batch. `constant_logits_RTV` are the student's too, where the formula takes them as given: they differ from
    `student_logits_RTV` only while a derivative is taken. Of the teacher's signals, those that the loss needs."""

    student_logits_RTV: np.ndarray
    constant_logits_RTV: np.ndarray
    labels_RT: np.ndarray
    teacher_ids_RTK: np.ndarray | None
    teacher_log_probs_RTK: np.ndarray | None
    teacher_logits_RTV: np.ndarray | None
    progress: float
    state: np.ndarray | None


Reference = Callable[[Any, Case], np.ndarray]  # (loss, case) -> nats [R, T]


@dataclass(frozen=True)
class Facts:
    """What is known of a formula beyond the contract of a loss.

    nats: the formula itself; None where nobody has written it down. zero_at_teacher: it is least, and 0, where the
    student's distribution is the teacher's. smooth: its gradient is then 0 there, which that of absolute differences is
    not. rises_with_k: to split a bucket of tokens never makes it less, as with every f-divergence. stops_gradient: some
    of what depends on the student is a constant for the gradient.
    """

    nats: Reference | None
    zero_at_teacher: bool
    smooth: bool
    rises_with_k: bool
    stops_gradient: bool


class Distributions(NamedTuple):
    """Teacher's p, student's q, and q as a constant, each [R, T, N]; `target_RTN` is True at the label's bucket."""

    p: np.ndarray
    q: np.ndarray
    constant_q: np.ndarray
    target_RTN: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Sum over N of p * log(p / q), with 0 * log 0 = 0."""
    return (p * (np.log(np.maximum(p, TINY)) - np.log(np.maximum(q, TINY)))).sum(axis=-1)


def distributions(loss: Any, case: Case) -> Distributions:
    q, constant = (softmax(x / loss.temperature) for x in (case.student_logits_RTV, case.constant_logits_RTV))
    labels = np.maximum(case.labels_RT, 0)[..., None]
    if case.teacher_log_probs_RTK is None:
        target = np.arange(q.shape[-1]) == labels
        return Distributions(softmax(case.teacher_logits_RTV / loss.temperature), q, constant, target)
    stored = case.teacher_ids_RTK == labels
    target = np.concatenate((stored, ~stored.any(axis=-1, keepdims=True)), axis=-1)
    p = np.exp(case.teacher_log_probs_RTK)
    gathered = (np.take_along_axis(x, case.teacher_ids_RTK, axis=-1) for x in (q, constant))
    return Distributions(*map(_with_tail, (p, *gathered)), target)


def _with_tail(stored_RTK: np.ndarray) -> np.ndarray:
    tail = np.maximum(1 - stored_RTK.sum(axis=-1, keepdims=True), 0.0)
    return np.concatenate((stored_RTK, tail), axis=-1)


def _tempered(formula: Reference, *, power: int) -> Reference:
    """The formula times temperature^power, 0 where labels are ignored."""

    def nats(loss: Any, case: Case) -> np.ndarray:
        return np.where(case.labels_RT == IGNORE, 0.0, formula(loss, case) * loss.temperature**power)

    return nats


def cross_entropy(loss: Any, case: Case) -> np.ndarray:
    """-log q(label), 0 where labels are ignored."""
    q = softmax(case.student_logits_RTV)
    chosen = np.take_along_axis(q, np.maximum(case.labels_RT, 0)[..., None], axis=-1)[..., 0]
    return np.where(case.labels_RT == IGNORE, 0.0, -np.log(np.maximum(chosen, TINY)))


def forward_kl(loss: Any, d: Distributions) -> np.ndarray:
    """Hinton, Vinyals & Dean 2015."""
    return kl(d.p, d.q)


def reverse_kl(loss: Any, d: Distributions) -> np.ndarray:
    """Gu et al. 2024 (MiniLLM), token by token."""
    return kl(d.q, d.p)


def symmetric_kl(loss: Any, d: Distributions) -> np.ndarray:
    """Half of Jeffreys' divergence (1946)."""
    return (kl(d.p, d.q) + kl(d.q, d.p)) / 2


def jensen_shannon(loss: Any, d: Distributions) -> np.ndarray:
    """Agarwal et al. 2024 (GKD), equation 1."""
    middle = loss.beta * d.p + (1 - loss.beta) * d.q
    return loss.beta * kl(d.p, middle) + (1 - loss.beta) * kl(d.q, middle)


def skew_forward_kl(loss: Any, d: Distributions) -> np.ndarray:
    """Ko et al. 2024 (DistiLLM), equation 4."""
    return kl(d.p, loss.alpha * d.p + (1 - loss.alpha) * d.q)


def skew_reverse_kl(loss: Any, d: Distributions) -> np.ndarray:
    """Ko et al. 2024 (DistiLLM)."""
    return kl(d.q, (1 - loss.alpha) * d.p + loss.alpha * d.q)


def total_variation(loss: Any, d: Distributions) -> np.ndarray:
    """Wen et al. 2023 (f-distill)."""
    return np.abs(d.p - d.q).sum(axis=-1) / 2


def adaptive_kl(loss: Any, case: Case) -> np.ndarray:
    """Wu et al. 2024 (AKL): the gap over the teacher's head weighs forward KL, the gap over the rest reverse KL. The
    bucket of what is not stored comes last, whatever its mass."""
    d = distributions(loss, case)
    ranked = -d.p
    if case.teacher_log_probs_RTK is not None:
        ranked[..., -1] = 1.0
    order = np.argsort(ranked, axis=-1, kind="stable")
    p, q = (np.take_along_axis(x, order, axis=-1) for x in (d.p, d.constant_q))
    head = np.cumsum(p, axis=-1) - p < loss.head_mass
    gaps = np.abs(p - q)
    head_gap, rest_gap = (gaps * head).sum(axis=-1), (gaps * ~head).sum(axis=-1)
    return (head_gap * kl(d.p, d.q) + rest_gap * kl(d.q, d.p)) / np.maximum(head_gap + rest_gap, TINY)


def taid(loss: Any, case: Case) -> np.ndarray:
    """Shing et al. 2025, equations 4 and 5: forward KL to a target between the student of now, held constant, and the
    teacher, mixed in logits. softmax forgets constants, so log-probabilities do for logits."""
    d = distributions(loss, case)
    t = max(float(case.state[0]), loss.t_start + (loss.t_end - loss.t_start) * case.progress)
    mixed = (1 - t) * np.log(np.maximum(d.constant_q, TINY)) + t * np.log(np.maximum(d.p, TINY))
    return kl(softmax(mixed), d.q)


def decoupled_kd(loss: Any, case: Case) -> np.ndarray:
    """Zhao et al. 2022, equation 7: the label against the rest, and the rest within itself."""
    d = distributions(loss, case)
    p_label, q_label = ((x * d.target_RTN).sum(axis=-1, keepdims=True) for x in (d.p, d.q))
    target_class = kl(np.concatenate((p_label, 1 - p_label), axis=-1), np.concatenate((q_label, 1 - q_label), axis=-1))
    p_rest, q_rest = (x * ~d.target_RTN / (x * ~d.target_RTN).sum(axis=-1, keepdims=True) for x in (d.p, d.q))
    return loss.alpha * target_class + loss.beta * kl(p_rest, q_rest)


def label_smoothing(loss: Any, case: Case) -> np.ndarray:
    """Szegedy et al. 2016, section 7: cross-entropy with (1 - eps) * label + eps / V."""
    log_q = np.log(np.maximum(softmax(case.student_logits_RTV), TINY))
    target = (1 - loss.smoothing_frac) * (np.arange(log_q.shape[-1]) == case.labels_RT[..., None])
    target = target + loss.smoothing_frac / log_q.shape[-1]
    return np.where(case.labels_RT == IGNORE, 0.0, -(target * log_q).sum(axis=-1))


def uld(loss: Any, case: Case) -> np.ndarray:
    """Boizard et al. 2024, equation 5, over sorted probabilities; what the teacher does not store is one rank more."""
    q = -np.sort(-softmax(case.student_logits_RTV / loss.temperature), axis=-1)
    p = -np.sort(-np.exp(case.teacher_log_probs_RTK), axis=-1)
    ranks = q[..., : p.shape[-1]], p
    return np.abs(_with_tail(ranks[0]) - _with_tail(ranks[1])).sum(axis=-1)


def _divergence(formula: Callable[[Any, Distributions], np.ndarray], *, power: int = 2, smooth: bool = True) -> Facts:
    nats = _tempered(lambda loss, case: formula(loss, distributions(loss, case)), power=power)
    return Facts(nats, zero_at_teacher=True, smooth=smooth, rises_with_k=True, stops_gradient=False)


def _other(formula: Reference, *, stops_gradient: bool) -> Facts:
    """Of a teacher's distribution, but not a sum over buckets of a function of p and q alone."""
    nats = _tempered(formula, power=2)
    return Facts(nats, zero_at_teacher=True, smooth=True, rises_with_k=False, stops_gradient=stops_gradient)


def _of_labels(formula: Reference) -> Facts:
    return Facts(formula, zero_at_teacher=False, smooth=True, rises_with_k=False, stops_gradient=False)


# By class name, so that a loss and its reference need not know each other.
REFERENCES: dict[str, Facts] = {
    "HardLabel": _of_labels(cross_entropy),
    "ExpectedCrossEntropy": _of_labels(cross_entropy),
    "LabelSmoothing": _of_labels(label_smoothing),
    "ForwardKL": _divergence(forward_kl),
    "ReverseKL": _divergence(reverse_kl),
    "SymmetricKL": _divergence(symmetric_kl),
    "JensenShannon": _divergence(jensen_shannon),
    "SkewForwardKL": _divergence(skew_forward_kl),
    "SkewReverseKL": _divergence(skew_reverse_kl),
    "TotalVariation": _divergence(total_variation, power=1, smooth=False),
    "AdaptiveKL": _other(adaptive_kl, stops_gradient=True),
    "TAID": _other(taid, stops_gradient=True),
    "DecoupledKD": _other(decoupled_kd, stops_gradient=False),
    "ULD": Facts(_tempered(uld, power=1), zero_at_teacher=True, smooth=False, rises_with_k=True, stops_gradient=False),
}
