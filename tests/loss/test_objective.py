"""The objective: how loss, labels, weights and terms beside them become one number, whatever the micro-batches."""

# R rows, T target tokens, V vocabulary, K stored teacher tokens

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from needle.loss import Auxiliary, Fixed, ForwardKL, HardLabel, LearnedUncertainty, Mixing, Schedule, Weighting
from needle.loss.base import IGNORE
from needle.loss.objective import TOKENS, Objective

R, T, V, K = 4, 6, 11, 3
SPANS = dict.fromkeys(("structure", "name", "key", "value", "stop"), 1.0)
CONSTANT = {"shape": "constant", "begin_frac": 0.0, "end_frac": 1.0}


class Table(nn.Module):
    """A student whose logits are one learnt table, so that its gradients can be read off."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(3)))

    def forward(self, *, decoder_input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[decoder_input_ids])


class SquaredLogits(Auxiliary):
    """Sum of squared logits over real tokens; a scale of its own to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def count(self, batch):
        return (batch["target_segments_RT"] > 0).sum()

    def forward(self, *, batch, student, student_outputs, teacher_outputs):
        return self.scale * (student_outputs.logits.square().mean(-1) * (batch["target_segments_RT"] > 0)).sum()


class SquaredLogitsSettings:
    needs = frozenset({"text"})

    def __init__(self, weight: Schedule):
        self.weight = weight

    def attach(self, *, student, teacher):
        return SquaredLogits()


def batch(silent: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, V, (R, T), generator=generator)
    labels = torch.randint(0, V, (R, T), generator=generator)
    segments = torch.ones(R, T, dtype=torch.long)
    for row, length in enumerate((6, 2, 5, 3)):
        labels[row, length:], segments[row, length:] = IGNORE, 0
    teacher = (2 * torch.randn(R, T, V, generator=generator)).log_softmax(-1).topk(K, dim=-1)
    log_probs = teacher.values.clone()
    if silent:
        log_probs[:, ::2] = -torch.inf
    return {
        "source_ids_RS": ids,
        "source_segments_RS": segments,
        "decoder_ids_RT": ids,
        "target_segments_RT": segments,
        "labels_RT": labels,
        "spans_RT": ids % 5,
        "kinds_RT": ids % 9,
        "answer_weights_RT": torch.rand(R, T, generator=generator),
        "confidences_RT": torch.rand(R, T, generator=generator),
        "gold_tools_RS": ids,
        "teacher_ids_RTK": teacher.indices,
        "teacher_log_probs_RTK": log_probs,
    }


def objective(loss=None, *, share=0.5, balance=None, weight=0.0, focal=0.0, **weights) -> Objective:
    schedule = Schedule(start=weight, end=weight, **CONSTANT)
    return Objective(
        loss=loss or HardLabel(),
        mixing=Mixing(start=share, end=share, **CONSTANT),
        weighting=Weighting(**{**SPANS, **weights}, kinds={}, confidence_power=1.0, focal_gamma=focal),
        balance=balance or Fixed(),
        auxiliaries={"squares": SquaredLogitsSettings(schedule)} if weight else {},
        student=nn.Identity(),
        teacher=None,
    )


def total(goal: Objective, student: Table, whole: dict[str, Tensor], cuts: list[slice]) -> Tensor:
    counts, share = goal.counts(whole), goal.mixing.at(0.3)
    totals = []
    for cut in cuts:
        part = {name: tensor[cut] for name, tensor in whole.items()}
        sums = goal.measure(part, student=student, progress=torch.tensor(0.3), share=share).sums
        totals.append(goal.total(sums, counts, progress=0.3, part_frac=len(part["labels_RT"]) / R))
    return torch.stack(totals).sum()


GOALS = {
    "labels": {},
    "focal": {"focal": 2.0},
    "mixed": {"loss": ForwardKL(temperature=1.0, distribution="top_k", chunk_tokens=None)},
    "beside": {"weight": 0.1},
    "uncertain": {"weight": 0.1, "balance": LearnedUncertainty()},
}


@pytest.mark.parametrize("name", GOALS)
@pytest.mark.parametrize("cuts", [[slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]])
def test_micro_batches_add_up_to_the_batch(name: str, cuts: list[slice]):
    goal, student, whole = objective(value=3.0, **GOALS[name]), Table(), batch()
    learnt = [*student.parameters(), *goal.parameters()]
    at_once = total(goal, student, whole, [slice(0, R)])
    in_parts = total(goal, student, whole, cuts)
    assert torch.allclose(at_once, in_parts, rtol=1e-5)
    for one, other in zip(torch.autograd.grad(at_once, learnt), torch.autograd.grad(in_parts, learnt), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_mean_is_the_weighted_mean_of_cross_entropy():
    goal, student, whole = objective(name=2.0), Table(), batch()
    logits, labels = student.table[whole["decoder_ids_RT"]], whole["labels_RT"]
    expected_sum = expected_weight = 0.0
    for r in range(R):
        for t in range(T):
            if labels[r, t] == IGNORE:
                continue
            weight = (2.0 if whole["spans_RT"][r, t] == 1 else 1.0) * float(
                whole["confidences_RT"][r, t] * whole["answer_weights_RT"][r, t]
            )
            expected_sum -= weight * float(logits[r, t].detach().log_softmax(-1)[labels[r, t]])
            expected_weight += weight
    assert float(total(goal, student, whole, [slice(0, R)]).detach()) == pytest.approx(
        expected_sum / expected_weight, rel=1e-5
    )


def test_the_share_goes_from_labels_to_the_teacher():
    student, whole = Table(), batch()
    loss = GOALS["mixed"]["loss"]
    values = {share: total(objective(loss, share=share), student, whole, [slice(0, R)]) for share in (0.0, 0.25, 1.0)}
    labels = total(objective(), student, whole, [slice(0, R)])
    assert torch.equal(values[0.0], labels)
    assert not torch.allclose(values[1.0], labels)
    assert torch.allclose(values[0.25], 0.25 * values[1.0] + 0.75 * labels)


def test_where_the_teacher_is_silent_the_label_speaks_even_when_nothing_is_mixed():
    student, whole = Table(), batch(silent=True)
    measured = objective(GOALS["mixed"]["loss"], share=1.0).measure(
        whole, student=student, progress=torch.tensor(0.0), share=1.0
    )
    assert torch.equal(measured.nats_RT[:, ::2], measured.label_nats_RT[:, ::2])
    assert torch.equal(measured.nats_RT[:, 1::2], measured.loss_nats_RT[:, 1::2])
    (gradient,) = torch.autograd.grad(measured.sums[TOKENS], student.table)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_a_batch_without_any_unit_adds_nothing_rather_than_dividing_by_zero():
    whole = batch()
    whole["labels_RT"] = torch.full((R, T), IGNORE)
    whole["target_segments_RT"] = torch.zeros(R, T, dtype=torch.long)
    goal, student = objective(weight=0.5), Table()
    value = total(goal, student, whole, [slice(0, R)])
    (gradient,) = torch.autograd.grad(value, student.table)
    assert value == 0
    assert (gradient == 0).all()


def test_a_learnt_uncertainty_settles_where_each_term_counts_one_over_its_size():
    """Minimising exp(-s) * mean + s gives s = log mean: each weighed term is 1 there."""
    balance = LearnedUncertainty().attach(["a", "b"])
    means = {"a": torch.tensor(8.0), "b": torch.tensor(0.25)}
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        balance(means, {"a": 1.0, "b": 1.0}, 1.0).backward()
        optimizer.step()
    assert {name: float(s.exp()) for name, s in balance.log_variances.items()} == pytest.approx(
        {"a": 8.0, "b": 0.25}, rel=1e-3
    )


def test_a_coefficient_of_zero_leaves_a_term_out():
    balance = LearnedUncertainty().attach(["a", "b"])
    means = {"a": torch.tensor(2.0), "b": torch.tensor(5.0, requires_grad=True)}
    balance(means, {"a": 1.0, "b": 0.0}, 1.0).backward()
    assert balance.log_variances["b"].grad == 0
    assert means["b"].grad == 0
