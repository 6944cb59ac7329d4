"""Rounded weights stay within half a step; training applies the gradient at rounded weights to the masters, and only
those reach a checkpoint."""

# O outputs, I inputs, N groups, G inputs of a group

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from needle.distil import Distillation, TrainerSettings
from needle.loss import Fixed, HardLabel, Mixing, Weighting
from needle.loss.objective import Objective
from needle.optim import OptimSettings
from needle.quantise import FakeQuantisation, NoQuantisation, RoundedWeights
from needle.student import SANConfig, SANForConditionalGeneration
from needle.student.quantisation import fake_quantise, quantisable, quantise

STEPS = 4
INT4 = FakeQuantisation(bits=4, group=8, embedding=True, begin_frac=0.0)
SCHEMES = [{"bits": 4, "group": 32}, {"bits": 4, "group": 7}, {"bits": 8, "group": None}, {"bits": 2, "group": 1}]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- rounding


def test_a_group_of_four_bits_by_hand():
    """The largest becomes 7; the others the nearest whole number of sevenths of it."""
    weight = torch.tensor([[7.0, -3.4, 0.4, 0.6, -0.7, 1.4, 0.0, 0.1]])
    codes, scales = quantise(weight, bits=4, group=4)
    assert codes.tolist() == [[[7, -3, 0, 1], [-4, 7, 0, 0]]]  # -3.5 rounds to the even -4
    assert scales.flatten().tolist() == pytest.approx([1.0, 0.2])
    by_hand = torch.tensor([[7.0, -3.0, 0.0, 1.0, -0.8, 1.4, 0.0, 0.0]])
    assert torch.allclose(fake_quantise(weight, bits=4, group=4), by_hand)


def test_eight_bits_have_one_scale_an_output():
    weight = torch.tensor([[127.0, 50.4], [-1.27, 0.004]])
    assert torch.allclose(fake_quantise(weight, bits=8, group=None), torch.tensor([[127.0, 50.0], [-1.27, 0.0]]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_is_at_most_half_a_step(scheme: dict):
    weight = noise(20, 50, seed=0) * noise(20, 1, seed=1).exp()
    codes, scales = quantise(weight, **scheme)
    limit = 2 ** (scheme["bits"] - 1) - 1
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() == limit
    width = scheme["group"] or 50
    step_OI = scales.repeat_interleave(width, dim=1).squeeze(-1)[:, :50]
    error = (fake_quantise(weight, **scheme) - weight).abs()
    assert (error <= step_OI / 2 * 1.0001).all()
    if scheme["bits"] > 2:
        assert error.max() > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_what_is_rounded_changes_nothing(scheme: dict):
    once = fake_quantise(noise(20, 50, seed=2), **scheme)
    assert torch.equal(quantise(once, **scheme).codes_ONG, quantise(noise(20, 50, seed=2), **scheme).codes_ONG)
    assert torch.allclose(fake_quantise(once, **scheme), once, rtol=1e-6, atol=0)


def test_groups_are_apart_and_the_last_may_be_shorter():
    weight = noise(5, 70, seed=3)
    whole = fake_quantise(weight, bits=4, group=32)
    for start in (0, 32, 64):
        part = weight[:, start : start + 32]
        assert torch.equal(whole[:, start : start + 32], fake_quantise(part, bits=4, group=32))
    assert torch.equal(fake_quantise(weight, bits=4, group=500), fake_quantise(weight, bits=4, group=None))


def test_zeros_stay_zeros_and_tiny_or_half_precise_weights_finite():
    weight = torch.zeros(2, 8)
    weight[1, 4:] = 1e-39
    assert torch.equal(fake_quantise(weight, bits=4, group=4)[:, :4], torch.zeros(2, 4))
    assert fake_quantise(weight, bits=4, group=4).isfinite().all()
    half = fake_quantise(noise(2, 8, seed=4).bfloat16(), bits=8, group=None)
    assert half.dtype == torch.bfloat16


def student(**changes) -> SANForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "width": 16, "heads": 2, "kv_heads": 1, "encoder_layers": 1, "decoder_layers": 1}
    return SANForConditionalGeneration(SANConfig(**{**sizes, "copy_width": 8, **changes}))


def test_matrices_of_layers_are_chosen_and_nothing_else():
    model = student(ffn_width=12, selective_read=True, retrieval_width=8, lexical_match=True)
    attentions, feed_forwards = 3, 2
    chosen = quantisable(model, embedding=False)
    assert len(chosen) == 4 * attentions + 3 * feed_forwards
    assert {name.split(".")[-2] for name in chosen} == {"query", "key", "value", "output", "gate", "up"}
    assert quantisable(model, embedding=True).keys() - chosen.keys() == {"embedding.weight"}
    with pytest.raises(ValueError, match="no matrices"):
        quantisable(nn.Sequential(nn.Linear(2, 2)), embedding=False)


def test_the_finished_student_is_rounded_and_its_error_told():
    model = student()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = INT4.finish(model)["quantisation"]
    chosen = quantisable(model, embedding=True)
    difference = norm = 0.0
    for name, parameter in model.named_parameters():
        rounded = fake_quantise(before[name], bits=4, group=8) if name in chosen else before[name]
        assert torch.equal(parameter, rounded), name
        if name in chosen:
            difference += float((rounded - before[name]).square().sum())
            norm += float(before[name].square().sum())
    assert record["scheme"] == "int4, symmetric, groups of 8 inputs"
    assert record["weights"] == sum(p.numel() for p in chosen.values())
    assert record["error_relative_rms"] == pytest.approx((difference / norm) ** 0.5, rel=1e-3)
    assert model.encoder.embedding.weight is model.embedding.weight
    assert NoQuantisation().finish(model) == {}


# ---- training


class Toy(pl.LightningModule):
    """A linear student under manual optimisation in two micro-batches; writes a checkpoint within its second step."""

    def __init__(self, folder: Path):
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(8, 3)
        self.student = nn.ModuleDict({"attention": nn.ModuleDict({"query": self.layer})})
        self.folder = folder
        with torch.no_grad():
            self.layer.weight.copy_(noise(3, 8, seed=5))
        self.seen: list[Tensor] = []

    @property
    def progress(self) -> float:
        return self.global_step / STEPS

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, index: int):
        self.seen.append(self.layer.weight.detach().clone())
        for rows in (slice(0, 2), slice(2, 5)):
            self.manual_backward(self.layer(batch[rows]).square().sum())
        if index == 1:
            self.trainer.save_checkpoint(self.folder / "within.ckpt")
        self.optimizers().step()
        self.optimizers(use_pl_optimizer=False).zero_grad()


def trainer(folder: Path, *callbacks: Callback, steps: int = STEPS, **changes) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    settings = {"max_steps": steps, "max_epochs": -1, "num_sanity_val_steps": 0, "default_root_dir": folder}
    return pl.Trainer(**{**quiet, **settings, "enable_checkpointing": False, **changes}, callbacks=list(callbacks))


def loader(items: list) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(items, batch_size=None, shuffle=False)


@pytest.mark.parametrize("begin_frac", [0.0, 0.5, 1.0])
def test_masters_move_by_the_gradient_at_the_rounded_weights(begin_frac: float, tmp_path: Path):
    """W <- W - lr * d/dR |R x + b|^2 with R = round(W), the straight-through estimator, written out."""
    batches = [noise(5, 8, seed=seed) for seed in range(STEPS)]
    module, settings = Toy(tmp_path), FakeQuantisation(bits=4, group=4, embedding=False, begin_frac=begin_frac)
    layer = module.layer
    master, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    trainer(tmp_path, *settings.callbacks()).fit(module, loader(batches))
    for step, x in enumerate(batches):
        rounded = settings.rounded(master) if step / STEPS >= begin_frac else master
        assert torch.allclose(module.seen[step], rounded, atol=1e-5)
        if step == 1:
            stored = torch.load(tmp_path / "within.ckpt", weights_only=True)["state_dict"]
            assert torch.allclose(stored["student.attention.query.weight"], master, atol=1e-5)
        outputs = x @ rounded.T + bias
        master = master - 0.1 * 2 * outputs.T @ x
        bias = bias - 0.1 * 2 * outputs.sum(0)
    assert torch.allclose(layer.weight, master, rtol=1e-4, atol=1e-4)
    assert (settings.rounded(master) - master).abs().max() > 1e-3


def test_an_error_within_a_step_leaves_the_masters(tmp_path: Path):
    module = Toy(tmp_path)
    before = module.layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="shapes"):
        trainer(tmp_path, RoundedWeights(INT4)).fit(module, loader([noise(5, 9, seed=0)]))
    assert not torch.equal(module.seen[0], before)
    assert torch.equal(module.layer.weight, before)


def batches(count: int) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(count):
        ids = torch.randint(5, 40, (2, 8), generator=torch.Generator().manual_seed(seed))
        ones = torch.ones_like(ids)
        names = ("source_ids_RS", "decoder_ids_RT", "labels_RT")
        weights = {"answer_weights_RT": ones.float(), "confidences_RT": ones.float()}
        segments = {"source_segments_RS": ones, "target_segments_RT": ones}
        found.append({**dict.fromkeys(names, ids), **segments, **weights, "spans_RT": ids % 5, "kinds_RT": ids % 9})
    return found


def distillation(repository: Path) -> tuple[Distillation, list[dict]]:
    def conf(group: str, name: str) -> dict:
        values = yaml.safe_load((repository / "conf" / group / f"{name}.yaml").read_text())
        return {key: value for key, value in values.items() if key != "_target_"}

    settings = TrainerSettings(
        **{**conf("trainer", "cpu"), "steps": STEPS, "rows_per_batch": 2, "rows_per_micro_batch": 1}
    )
    optim = OptimSettings(**{**conf("optim", "muon_adamw"), "warmup_steps": 0})
    mixing = Mixing(shape="constant", start=1.0, end=1.0, begin_frac=0.0, end_frac=1.0)
    model, history = student(), []
    objective = Objective(
        loss=HardLabel(),
        mixing=mixing,
        weighting=Weighting(**conf("weighting", "uniform")),
        balance=Fixed(),
        auxiliaries={},
        student=model,
        teacher=None,
    )
    run = SimpleNamespace(history_append=history.append)
    return Distillation(student=model, objective=objective, optim=optim, settings=settings, run=run), history


@pytest.fixture(scope="module")
def trained(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Distillation, list[dict], Path]:
    """A student trained for STEPS steps in 4 bits, with a checkpoint and a validation every two."""
    folder = tmp_path_factory.mktemp("trained")
    module, history = distillation(repository)
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_train_epoch_end=False)
    changes = {"val_check_interval": 2, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    trainer(folder, RoundedWeights(INT4), keep, **changes).fit(module, loader(batches(STEPS)), loader(batches(1)))
    return module, history, folder


def by_hand(repository: Path, steps: int) -> Distillation:
    """The same training with a rounded copy of the student in place of the swap."""
    module, _ = distillation(repository)
    masters, optimizer = module.student, module.configure_optimizers()
    for step, batch in enumerate(batches(steps)):
        rounded = copy.deepcopy(masters)
        INT4.finish(rounded)
        rate = module.optim.rate_at(step, total_steps=STEPS)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * rate
        goal = module.objective
        measured = goal.measure(batch, student=rounded, progress=torch.tensor(step / STEPS), share=1.0)
        goal.total(measured.sums, goal.counts(batch), progress=step / STEPS, part_frac=1.0).backward()
        for mine, theirs in zip(masters.parameters(), rounded.parameters(), strict=True):
            mine.grad = theirs.grad
        nn.utils.clip_grad_norm_(masters.parameters(), module.settings.grad_clip_norm)
        optimizer.step()
    return module


def test_a_students_training_is_the_one_with_a_rounded_copy(trained, repository: Path):
    module, _, folder = trained
    for steps, found in (
        (2, torch.load(folder / "step=2.ckpt", weights_only=True)["state_dict"]),
        (STEPS, torch.load(folder / "step=4.ckpt", weights_only=True)["state_dict"]),
        (STEPS, module.state_dict()),
    ):
        for name, master in by_hand(repository, steps).state_dict().items():
            assert torch.allclose(found[name], master, rtol=1e-3, atol=2e-4), name
    assert "student.encoder.embedding.weight" in found  # the tied one under both its names
    rounded = copy.deepcopy(module.student)
    INT4.finish(rounded)
    weight = module.student.embedding.weight
    assert (rounded.embedding.weight - weight).abs().max() > 1e-2  # far above the tolerance


def test_validation_is_on_rounded_weights(trained, repository: Path):
    module, history, _ = trained
    validated = [line["val/loss_nats"] for line in history if "val/loss_nats" in line]
    (batch,) = batches(1)
    losses = []
    for model in (module.student, copy.deepcopy(module.student)):
        if losses:
            INT4.finish(model)
        with torch.no_grad():
            measured = module.objective.measure(batch, student=model.eval(), progress=torch.tensor(1.0), share=1.0)
        losses.append(float(measured.nats_RT.mean()))
    assert len(validated) == 2
    assert validated[-1] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_continued_run_is_the_uninterrupted_one(trained, repository: Path, tmp_path: Path):
    module, _, folder = trained
    again, _ = distillation(repository)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_train_epoch_end=False)
    runner = trainer(tmp_path, RoundedWeights(INT4), keep, enable_checkpointing=True)
    runner.fit(again, loader(batches(STEPS)[2:]), ckpt_path=folder / "step=2.ckpt", weights_only=True)
    assert runner.global_step == STEPS
    for name, parameter in module.student.named_parameters():
        assert torch.equal(again.student.get_parameter(name), parameter), name
