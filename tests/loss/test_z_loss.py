"""The z-loss is the square of the vocabulary's log-partition, whatever a copy head makes of the logits."""

# R rows, T target tokens, V vocabulary

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from needle.loss import Schedule, ZLoss
from needle.loss.base import IGNORE
from needle.loss.z_loss import z_squares
from needle.student import SANConfig, SANForConditionalGeneration

WEIGHT = Schedule(shape="constant", start=1e-4, end=1e-4, begin_frac=0.0, end_frac=1.0)
LOGITS = torch.tensor([[[1.0, 2.0, 1.0], [0.5, 0.25, 0.25], [9.0, 9.0, 9.0]]]).log()
LABELS = torch.tensor([[2, 0, IGNORE]])


@pytest.fixture
def term():
    return ZLoss(weight=WEIGHT).attach(student=nn.Identity(), teacher=None)


def student(**changes) -> SANForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "width": 16, "heads": 2, "kv_heads": 1, "encoder_layers": 1, "decoder_layers": 1}
    return SANForConditionalGeneration(SANConfig(**{**sizes, "copy_width": 8, **changes}))


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (3, 9), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :6]}


def value(term, outputs, labels_RT) -> torch.Tensor:
    return term(batch={"labels_RT": labels_RT}, student=None, student_outputs=outputs, teacher_outputs=None)


def test_by_hand(term):
    """1 + 2 + 1 = 4; a normalised distribution costs nothing; an unlabelled token neither, however large its logits."""
    squares = z_squares(logits_RTV=LOGITS, labels_RT=LABELS)
    assert torch.allclose(squares, torch.tensor([[math.log(4) ** 2, 0.0, 0.0]]), atol=1e-6)
    assert value(term, SimpleNamespace(logits=LOGITS), LABELS).item() == pytest.approx(math.log(4) ** 2, rel=1e-5)
    assert int(term.count({"labels_RT": LABELS})) == 2


def test_the_gradient_is_twice_the_log_partition_times_the_probability():
    logits = (3 * torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))).requires_grad_()
    labels = torch.tensor([[1, 2, IGNORE], [0, IGNORE, 3]])
    z_squares(logits_RTV=logits, labels_RT=labels).sum().backward()
    exact = logits.detach().double()
    by_formula = 2 * exact.logsumexp(-1, keepdim=True) * exact.softmax(-1) * (labels != IGNORE).unsqueeze(-1)
    assert torch.allclose(logits.grad.double(), by_formula, atol=1e-5)


@pytest.mark.parametrize("copy", [True, False])
def test_it_is_over_the_vocabularys_logits_before_the_mixture(term, copy: bool):
    model = student(copy=copy)
    outputs = model(**inputs())
    labels = inputs()["decoder_input_ids"]
    by_hand = nn.functional.linear(states(model), model.embedding.weight).logsumexp(-1).square().sum()
    assert by_hand > 1.0
    assert value(term, outputs, labels).item() == pytest.approx(by_hand.item(), rel=1e-4)
    mixture = z_squares(logits_RTV=outputs.logits, labels_RT=labels).sum()
    assert mixture.item() == pytest.approx(0.0 if copy else by_hand.item(), abs=1e-6, rel=1e-4)


def states(model: SANForConditionalGeneration) -> torch.Tensor:
    """What the output projection reads."""
    kept = []
    handle = model.norm.register_forward_hook(lambda _, __, output: kept.append(output))
    model(**inputs())
    handle.remove()
    return kept[0]


def test_without_a_copy_head_no_second_tensor_is_kept():
    outputs = student(copy=False)(**inputs())
    assert outputs.vocabulary_logits is outputs.logits


def test_micro_batches_add_up(term):
    outputs = student()(**inputs())
    labels = inputs()["decoder_input_ids"].clone()
    labels[1, 2:] = IGNORE
    rows = [
        value(term, SimpleNamespace(vocabulary_logits=outputs.vocabulary_logits[r : r + 1]), labels[r : r + 1])
        for r in range(3)
    ]
    assert torch.stack(rows).sum().item() == pytest.approx(value(term, outputs, labels).item(), rel=1e-5)
    assert sum(int(term.count({"labels_RT": labels[r : r + 1]})) for r in range(3)) == int((labels != IGNORE).sum())


def test_descending_it_brings_the_partition_to_one(term):
    logits = LOGITS.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        value(term, SimpleNamespace(logits=logits), LABELS).backward()
        optimizer.step()
    assert torch.allclose(logits[0, :2].exp().sum(-1), torch.ones(2), atol=1e-2)
    assert torch.equal(logits[0, 2], LOGITS[0, 2])
