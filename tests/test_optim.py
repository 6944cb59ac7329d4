"""The optimizer is the one its papers state, and a restarted run goes on as if it had not stopped."""

import copy
import io
import itertools
import math

import pytest
import torch
import yaml
from torch import Tensor, nn

from needle.optim import MuonAdamW, OptimSettings, orthogonalise, orthogonalise_by_head
from needle.student import SANConfig, SANForConditionalGeneration

ADAMW = {"kind": "adamw", "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MUON = {
    "kind": "muon",
    "lr": 0.1,
    "momentum": 0.95,
    "newton_schulz_steps": 5,
    "heads": 1,
    "by_column": False,
    "weight_decay": 0.0,
}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def settings(repository) -> OptimSettings:
    values = yaml.safe_load((repository / "conf" / "optim" / "muon_adamw.yaml").read_text())
    del values["_target_"]
    return OptimSettings(**values)


def changed(settings: OptimSettings, **changes) -> OptimSettings:
    return OptimSettings(**{**vars(settings), **changes})


def student(**changes) -> SANForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "width": 32, "heads": 4, "kv_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
    return SANForConditionalGeneration(SANConfig(**{**sizes, "copy_width": 8, **changes}))


# ---- Newton-Schulz


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (5, 64)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]):
    """From a spectrum of one decade, as five steps are meant for."""
    u, singular, vt = torch.linalg.svd(noise(4, *shape, seed=0), full_matrices=False)
    spread = u * torch.logspace(-1, 0, singular.shape[-1]) @ vt
    singular = torch.linalg.svdvals(orthogonalise(spread, steps=5))
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_orthogonalising_keeps_the_singular_vectors():
    """U S V^T becomes U S' V^T with S' near 1."""
    matrix = noise(12, 8, seed=1)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalise(matrix.unsqueeze(0), steps=5)[0] @ vt.T
    assert (inner - torch.diag(inner.diag())).abs().max() < 1e-4
    assert inner.diag().min() > 0.6


def test_orthogonalising_does_not_depend_on_scale_and_leaves_zero_alone():
    matrix = noise(1, 8, 8, seed=2)
    assert torch.allclose(orthogonalise(matrix, steps=5), orthogonalise(1000 * matrix, steps=5), atol=1e-4)
    assert torch.equal(orthogonalise(torch.zeros(1, 8, 8), steps=5), torch.zeros(1, 8, 8))


def test_stacked_matrices_are_orthogonalised_as_if_alone():
    stacked = noise(5, 12, 8, seed=3) * torch.tensor([1e-3, 1.0, 10.0, 0.1, 1.0])[:, None, None]
    alone = torch.cat([orthogonalise(matrix.unsqueeze(0), steps=5) for matrix in stacked])
    assert torch.allclose(orthogonalise(stacked, steps=5), alone, atol=1e-5)


@pytest.mark.parametrize("by_column", [False, True])
def test_by_head_every_heads_part_is_orthogonalised_alone(by_column: bool):
    matrix = noise(2, 16, 24, seed=4)
    parts = matrix.chunk(4, dim=2 if by_column else 1)
    alone = torch.cat([orthogonalise(part, steps=5) for part in parts], dim=2 if by_column else 1)
    whole = orthogonalise_by_head(matrix, heads=4, by_column=by_column, steps=5)
    assert torch.allclose(whole, alone, atol=1e-5)


# ---- steps


def test_adamw_is_torchs_adamw():
    ours, theirs = ([nn.Parameter(noise(*shape, seed=5)) for shape in ((6, 4), (7,), ())] for _ in range(2))
    optimizers = (
        MuonAdamW([{"params": ours, **ADAMW}]),
        torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    )
    for step in range(20):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for i, p in enumerate(parameters):
                p.grad = noise(*p.shape, seed=100 * step + i) * 10.0**i
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_adamw_corrects_each_parameters_bias_by_its_own_steps():
    """A parameter without a gradient in some steps, as a head that a loss leaves out, has made fewer steps."""
    ours, theirs = ([nn.Parameter(noise(3, seed=6)) for _ in range(2)] for _ in range(2))
    optimizers = (
        MuonAdamW([{"params": ours, **ADAMW}]),
        torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    )
    for step in range(6):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameters[0].grad = noise(3, seed=step) if step % 3 == 2 else None
            parameters[1].grad = noise(3, seed=step)
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_muons_first_step_by_hand():
    """A diagonal gradient: every entry steps by about the rate against its sign, whatever its size."""
    parameter = nn.Parameter(torch.zeros(3, 3))
    parameter.grad = torch.diag(torch.tensor([5.0, -2.0, 1.0]))
    MuonAdamW([{"params": [parameter], **MUON}]).step()
    step = parameter.detach() / 0.1
    assert step.diag().sign().tolist() == [-1, 1, -1]
    assert ((step.diag().abs() > 0.6) & (step.diag().abs() < 1.3)).all()
    assert (step - torch.diag(step.diag())).abs().max() < 1e-6


def test_muon_steps_by_the_nesterov_momentum():
    """Second step by hand: m1 = 0.05 g1, m2 = 0.95 m1 + 0.05 g2, direction 0.05 g2 + 0.95 m2."""
    parameter = nn.Parameter(noise(6, 4, seed=7))
    optimizer = MuonAdamW([{"params": [parameter], **MUON, "weight_decay": 0.5}])
    g1, g2 = noise(6, 4, seed=8), noise(6, 4, seed=9)
    parameter.grad = g1
    optimizer.step()
    before = parameter.detach().clone()
    parameter.grad = g2
    optimizer.step()
    momentum = 0.95 * 0.05 * g1 + 0.05 * g2
    update = orthogonalise((0.05 * g2 + 0.95 * momentum).unsqueeze(0), steps=5)[0]
    by_hand = before * (1 - 0.1 * 0.5) - 0.1 * math.sqrt(6 / 4) * update
    assert torch.allclose(parameter, by_hand, atol=1e-5)


def test_parameters_of_several_shapes_step_as_if_alone():
    shapes = [(8, 8), (16, 8), (8, 8), (8, 16)]
    together = [nn.Parameter(noise(*shape, seed=i)) for i, shape in enumerate(shapes)]
    apart = copy.deepcopy(together)
    optimizers = [MuonAdamW([{"params": together, **MUON}]), *(MuonAdamW([{"params": [p], **MUON}]) for p in apart)]
    for step in range(3):
        for i, p in enumerate(itertools.chain(together, apart)):
            p.grad = noise(*p.shape, seed=50 * step + i % 4)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = MuonAdamW([{"params": [parameter], **ADAMW}])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert parameter.item() < 2.0


# ---- grouping


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("ffn_width", [0, 24])
def test_muon_gets_exactly_the_matrices_of_attention_and_feed_forward(
    settings: OptimSettings, by_head: bool, ffn_width: int
):
    model = student(ffn_width=ffn_width)
    optimizer = changed(settings, muon_by_head=by_head).build(model)
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)]: group["kind"] for group in optimizer.param_groups for p in group["params"]}
    assert kinds.keys() == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    roles = ("query.weight", "key.weight", "value.weight", "output.weight", "gate.weight", "up.weight")
    matrices = {
        name for name in names.values() if name.endswith(roles) and ("layers" in name) and "residual" not in name
    }
    assert {name for name, kind in kinds.items() if kind == "muon"} == matrices
    assert len(matrices) == 4 * 2 + 8 * 2 + (3 * 4 if ffn_width else 0)


def test_heads_are_cut_where_the_attention_cuts_them(settings: OptimSettings):
    """Rows of query (4 heads), key and value (2), columns of output (4)."""
    model = student()
    groups = [group for group in settings.build(model).param_groups if group["kind"] == "muon"]
    names = {id(p): name.split(".")[-2] for name, p in model.named_parameters()}
    cuts = {names[id(p)]: (group["heads"], group["by_column"]) for group in groups for p in group["params"]}
    assert cuts == {"query": (4, False), "key": (2, False), "value": (2, False), "output": (4, True)}


def test_without_a_muon_rate_all_is_adamw_and_the_same_matrices_decay(settings: OptimSettings):
    with_muon, without = (
        changed(settings, muon_lr=rate, weight_decay=0.1).build(student()).param_groups for rate in (0.02, None)
    )
    assert {group["kind"] for group in without} == {"adamw"}
    decayed = [sum(p.numel() for g in gs if g["weight_decay"] for p in g["params"]) for gs in (with_muon, without)]
    muon = sum(p.numel() for group in with_muon if group["kind"] == "muon" for p in group["params"])
    assert decayed == [muon, muon]
    assert {group["lr"] for group in without if group["weight_decay"]} == {settings.adamw_lr}


# ---- schedule


def test_the_rate_warms_up_stays_and_decays_to_nothing(settings: OptimSettings):
    rates = [changed(settings, warmup_steps=10, decay_frac=0.4).rate_at(step, total_steps=100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:61] == [1.0] * 52
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[60:]))
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 40)
    assert rates[100] == 0


@pytest.mark.parametrize("warmup_steps", [0, 5, 1000])
@pytest.mark.parametrize("decay_frac", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("total_steps", [1, 7, 100])
def test_the_rate_stays_between_nothing_and_one(
    settings: OptimSettings, warmup_steps: int, decay_frac: float, total_steps: int
):
    schedule = changed(settings, warmup_steps=warmup_steps, decay_frac=decay_frac)
    rates = [schedule.rate_at(step, total_steps=total_steps) for step in range(total_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    if warmup_steps == 0:
        assert rates[0] == 1
    if decay_frac == 0 and warmup_steps <= total_steps:
        assert rates[-1] == 1


# ---- restart


def test_a_restored_optimizer_continues_identically(settings: OptimSettings):
    model = student()
    optimizer = settings.build(model)

    def train(model: nn.Module, optimizer: MuonAdamW, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = noise(*p.shape, seed=1000 * step + i)
            optimizer.step()

    train(model, optimizer, range(3))
    disk = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, disk)
    disk.seek(0)
    saved = torch.load(disk, weights_only=True)
    restored = student()
    restored.load_state_dict(saved["model"])
    restored_optimizer = settings.build(restored)
    restored_optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(3, 6))
    train(restored, restored_optimizer, range(3, 6))
    for (name, one), other in zip(model.named_parameters(), restored.parameters(), strict=True):
        assert torch.equal(one, other), name
