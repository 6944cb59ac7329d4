"""Every loss of conf/loss, in both forms, under every weighting of conf/weighting, against the conformance suite; and
the suite itself against losses that are wrong in ways that users' own are."""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from needle import config
from needle.loss import HardLabel
from needle.loss.base import IGNORE
from needle.loss.conformance import PROPERTIES, Result, check, name_of
from needle.loss.references import REFERENCES
from needle.loss.trials import Subject, forms

LOSSES = sorted(path.stem for path in (config.CONF / "loss").glob("*.yaml"))
WEIGHTINGS = sorted(path.stem for path in (config.CONF / "weighting").glob("*.yaml"))
MEANS = {"makes one mean however batches are cut", "divides by the weights"}


def failures(results: list[Result]) -> dict[str, str]:
    return {result.name: result.detail for result in results if result.passed is False}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_conforms_in_every_form(name: str, losses: dict[str, Any], weightings: dict[str, Any]):
    for form in forms(losses[name]):
        results = check(Subject(form, weightings["uniform"]))
        assert failures(results) == {}
        # If most properties had nothing to say, nothing would have been checked.
        assert sum(result.passed is True for result in results) >= 9


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_makes_one_mean_of_every_loss(
    weighting: str, losses: dict[str, Any], weightings: dict[str, Any]
):
    others = {name_of(holds) for holds in PROPERTIES} - MEANS
    for name, loss in losses.items():
        results = check(Subject(loss, weightings[weighting]), without=others)
        assert [result.passed for result in results] == [True, True], (name, failures(results))


def test_every_loss_has_a_reference(losses: dict[str, Any]):
    assert {type(loss).__name__ for loss in losses.values()} == set(REFERENCES)


# ---- losses as users write them


class OwnKL:
    """Forward KL over K + 1 buckets, right in every respect; subclasses go wrong in one."""

    needs = frozenset({"top_k"})
    rises_with_k = True

    def __init__(self, temperature: float = 1.0):
        self.temperature = temperature

    def __call__(self, *, student_logits_RTV, labels_RT, teacher_ids_RTK, teacher_log_probs_RTK, **_) -> Tensor:
        logits = student_logits_RTV if student_logits_RTV.dtype == torch.float64 else student_logits_RTV.float()
        log_q = (logits / self.temperature).log_softmax(-1).clamp_min(-1e4).gather(-1, teacher_ids_RTK)
        nats = self.buckets(log_p=teacher_log_probs_RTK.detach(), log_q=log_q)
        return self.masked(nats, labels_RT)

    def buckets(self, *, log_p: Tensor, log_q: Tensor) -> Tensor:
        p_tail, q_tail = (1 - x.exp().sum(-1, keepdim=True) for x in (log_p, log_q))
        p, q = (torch.cat((x.exp(), tail.clamp_min(1e-7)), -1) for x, tail in ((log_p, p_tail), (log_q, q_tail)))
        return (p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log())).sum(-1)

    def masked(self, nats: Tensor, labels_RT: Tensor) -> Tensor:
        return nats.masked_fill(labels_RT == IGNORE, 0.0) * self.temperature**2


class StoredOnly(OwnKL):
    """The sum over the stored tokens, which is 0 at student = teacher and not least there."""

    def buckets(self, *, log_p, log_q):
        return (log_p.exp().clamp_min(0) * (log_p.clamp_min(-1e4) - log_q)).sum(-1)


class MultipliedMask(OwnKL):
    def __call__(self, *, labels_RT, **signals):
        return super().__call__(labels_RT=torch.zeros_like(labels_RT), **signals) * (labels_RT != 0)


class MeanOverTokens(OwnKL):
    def masked(self, nats, labels_RT):
        return super().masked(nats, labels_RT).mean()


class HalfPrecision(OwnKL):
    def __call__(self, *, student_logits_RTV, **signals):
        return super().__call__(student_logits_RTV=student_logits_RTV.half(), **signals).half()


class NormalisedByRow(OwnKL):
    def masked(self, nats, labels_RT):
        return F.layer_norm(super().masked(nats, labels_RT), nats.shape[-1:])


class DetachTooMany(OwnKL):
    def buckets(self, *, log_p, log_q):
        return super().buckets(log_p=log_p, log_q=torch.cat((log_q[..., :1].detach(), log_q[..., 1:]), -1))


class Raises(OwnKL):
    def buckets(self, *, log_p, log_q):
        raise RuntimeError("shapes [3, 10, 4] and [3, 10] do not go together")


class WrongSign(HardLabel):
    def __call__(self, **signals):
        return -super().__call__(**signals)


class Stateful(OwnKL):
    def initial_state(self):
        return torch.zeros(())

    def next_state(self, state, *, mean_nats, progress):
        return 1 / mean_nats


def test_a_users_own_loss_passes_without_a_reference(weightings: dict[str, Any]):
    results = check(Subject(OwnKL(), weightings["spans"]))
    assert failures(results) == {}
    unsaid = {result.name for result in results if result.passed is None}
    assert unsaid == {
        "is the formula",
        "has the direction of its formula",
        "moves a state that is a finite tensor",
    }


@pytest.mark.parametrize(
    ("loss", "name", "words"),
    [
        (StoredOnly(), "has the known value where it is known", "a gradient of"),
        (MultipliedMask(), "leaves ignored labels out", "nats at an ignored label"),
        (MeanOverTokens(), "gives nats for every token in float32", "shape () for labels of shape (3, 10)"),
        (HalfPrecision(), "gives nats for every token in float32", "torch.float16"),
        (NormalisedByRow(), "looks at its own token only", "depend on the logits at"),
        (DetachTooMany(), "has the gradient of its value", "apart"),
        (Raises(), "is finite at the extremes", "it raises RuntimeError: shapes [3, 10, 4]"),
        (WrongSign(), "has the known value where it is known", "nats where the label's logit was raised"),
        (Stateful(), "moves a state that is a finite tensor", "inf"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, OwnKL | HardLabel) else "",
)
def test_a_wrong_loss_is_told_what_is_wrong(loss: Any, name: str, words: str, weightings: dict[str, Any]):
    found = failures(check(Subject(loss, weightings["uniform"])))
    assert words in found[name], found


def test_a_loss_that_needs_a_network_is_not_judged(weightings: dict[str, Any]):
    class Live(OwnKL):
        needs = frozenset({"top_k", "live"})

    results = check(Subject(Live(), weightings["uniform"]))
    assert {result.passed for result in results} == {None}
    assert "live" in results[0].detail
