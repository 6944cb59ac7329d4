"""The doctor as a user starts it: on a loss of the user's own, and on a small run made by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from needle import config, doctor
from needle.artifacts import publish
from needle.bench import made_up_texts
from needle.data.shards import About, ShardWriter
from needle.errors import ConfigError, DataError
from needle.runs import Run, claim
from needle.student import save
from needle.text.tokenizer import EOS, TextCodec, train_tokenizer

K = 4
OWN = """
import torch
from needle.loss import HardLabel

class Right(HardLabel):
    pass

class ForgetsPadding(HardLabel):
    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, *, labels_RT, **signals):
        return self.factor * super().__call__(labels_RT=labels_RT.clamp_min(0), **signals)
"""
STUDENT = ["student=san_nano", "student.width=16", "student.heads=2", "student.kv_heads=1", "student.encoder_layers=1"]
STUDENT += ["student.decoder_layers=1", "student.copy_width=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run at its start: initial student, shards of random tokens, a teacher's distributions over them."""
    folder = tmp_path_factory.mktemp("doctor")
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose(
            "train",
            [
                *STUDENT,
                "loss=forward_kl",
                "teacher=checkpoint",
                "mixing.start=0.75",
                "mixing.end=0.75",
                "weighting=spans",
                "auxiliary=[z_loss]",
                "trainer=fast",
                "logger=none",
                "data.packing.source_row_tokens=24",
                "data.packing.target_row_tokens=12",
                f"paths.artifacts={folder / 'artifacts'}",
                f"paths.runs={folder / 'runs'}",
            ],
        )
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    codec = TextCodec(train_tokenizer(made_up_texts(300), vocab_size=300), "signature")
    rng = np.random.default_rng(3)
    writer = ShardWriter()
    for number in range(12):
        target = [*rng.integers(8, 300, 5), EOS]
        writer.add(
            str(number),
            list(rng.integers(8, 300, 10)),
            target,
            [0, 1, 2, 3, 3, 4],
            About(kind=0, gold_tools=1, tools=1),
        )
    shards, signals = folder / "artifacts" / "shards-made", folder / "artifacts" / "signals-made"
    with publish(shards, kind="shards", inputs={}, counts={}) as temporary:
        writer.save(temporary / "train")
        codec.save(temporary)
    with publish(signals, kind="signals", inputs={}, counts={}) as temporary:
        (temporary / "train").mkdir()
        ids, log_probs = _distributions(rng, np.load(shards / "train" / "target.npy"))
        np.save(temporary / "train" / "ids.npy", ids)
        np.save(temporary / "train" / "log_probs.npy", log_probs)
    inputs = {"shards": shards.name, "signals": signals.name}
    made = claim(folder / "runs", stage="train", name="small", cfg=plain, inputs=inputs)
    torch.manual_seed(0)
    save(config.build(plain["student"]).build(codec), codec, made.folder / "initial")
    made.note(shards=str(shards))
    return made


def _distributions(rng: np.random.Generator, labels_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label first with 0.6, others with 0.1 each; every sixth token without a distribution."""
    ids = np.stack([labels_X, *(8 + (labels_X + n) % 292 for n in rng.integers(1, 90, 3))], axis=1)
    log_probs = np.log(np.array([0.6, 0.1, 0.1, 0.1], np.float32))[None].repeat(len(labels_X), axis=0)
    log_probs[::6] = -np.inf
    return ids.astype(np.uint16), log_probs


def started(run: Path | None = None, **settings: Any) -> None:
    """The stage in this process, on its own defaults."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("doctor"), resolve=True)
    function = doctor.main.stage_function
    function({"_overrides_": []}, **config.build_settings(cfg, function) | {"run": run} | settings)


def test_a_run_is_measured_on_its_own_data(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    output = tmp_path / "found.json"
    started(run=run.folder, batches=2, output=output)
    told = capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    found = json.loads(output.read_text())
    # Two examples fill the source of a row, and all of its target: 4 rows, 8 examples of 6 tokens.
    assert found["tokens"]["labelled"] == found["tokens"]["slots"] == 48
    spans = found["tokens"]["spans"]
    assert {name: span["tokens"] for name, span in spans.items()} == {
        "structure": 8, "name": 8, "key": 8, "value": 16, "stop": 8
    }  # fmt: skip
    # conf/weighting/spans: 1, 2, 1.5, 4, 1; a sixth of the tokens each, values two sixths.
    assert spans["value"]["weight_frac"] == pytest.approx(8 / 13.5)
    assert found["signal"] == {
        "stored_tokens": K,
        "uncovered": 8,
        "uncovered_frac": pytest.approx(1 / 6),
        "stored_mass": pytest.approx(0.9),
        "tail_mass": pytest.approx(0.1),
        "tail_mass_most": pytest.approx(0.1),
        "label_stored_frac": 1.0,
        "label_likeliest_frac": 1.0,
    }
    terms = found["terms"]
    assert list(terms) == ["distillation", "labels", "z_loss"]
    assert {name: term["coefficient"] for name, term in terms.items()} == pytest.approx(
        {"distillation": 0.75, "labels": 0.25, "z_loss": 1e-4}
    )
    assert all(term["mean"] > 0 and term["gradient_norm"] > 0 for term in terms.values())
    cosine = {tuple(pair["terms"]): pair["cosine"] for pair in found["cosines"]}
    # This teacher says what the labels say, with less certainty.
    assert cosine["distillation", "labels"] > 0.8
    assert any("z_loss has" in line and "no say" in line for line in found["warnings"])
    for word in ("distillation and labels", "warning: z_loss", "value", "16.67%"):
        assert word in told


def test_another_loss_in_the_runs_place(run: Run, tmp_path: Path):
    output = tmp_path / "found.json"
    started(run=run.folder, batches=1, output=output, target="needle.loss.HardLabel")
    found = json.loads(output.read_text())
    assert {name: term["coefficient"] for name, term in found["terms"].items()} == pytest.approx(
        {"tokens": 1.0, "z_loss": 1e-4}
    )
    assert found["signal"] == {}
    hotter = {"temperature": 3.0, "distribution": "top_k", "chunk_tokens": None}
    with pytest.raises(ConfigError, match="stored at temperature"):
        started(run=run.folder, target="needle.loss.ReverseKL", arguments=hotter)


def test_terms_add_up_to_what_training_minimises(run: Run):
    """The gradients of the parts, each with its coefficient, are the gradient of the whole."""
    from needle.loss.diagnosis import diagnose
    from needle.train import Settings, config_of
    from needle.train import main as training

    settings = Settings(**config.build_settings(config_of(run), training.stage_function))
    shards = Path(run.record["facts"]["shards"])
    patient = doctor._patient(run, settings, shards)
    batches = doctor._batches(settings, shards, doctor._signals(run, settings, shards), 2)
    found = diagnose(
        patient.objective, student=patient.student, batches=batches, progress=patient.progress, share=patient.share
    )
    objective, student = patient.objective, patient.student
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    measured = objective.measure(whole, student=student, progress=torch.tensor(0.0), share=patient.share)
    total = objective.total(measured.sums, objective.counts(whole), progress=0.0, part_frac=1.0)
    assert sum(t.coefficient * t.mean for t in found.terms.values()) == pytest.approx(float(total.detach()), rel=1e-5)
    gradients = torch.autograd.grad(total, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    norm = float(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
    # The square of a sum of vectors, from their norms and cosines.
    names = list(found.terms)
    parts = {name: found.terms[name].gradient_norm for name in names}
    square = sum(part**2 for part in parts.values())
    square += 2 * sum(cosine * parts[a] * parts[b] for (a, b), cosine in found.cosines.items())
    assert square**0.5 == pytest.approx(norm, rel=1e-4)


def test_a_users_own_loss_is_told_what_is_wrong(tmp_path: Path):
    (tmp_path / "ownlosses.py").write_text(OWN)
    done = subprocess.run(
        [sys.executable, "-m", "needle.doctor", "target=ownlosses.ForgetsPadding", "+arguments.factor=2.0"],
        cwd=tmp_path,
        env=os.environ | {"NEEDLE_TARGETS": "ownlosses"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "leaves ignored labels out" in line]
    assert line.strip().startswith("FAIL")
    assert "nats at an ignored label" in line
    assert "n/a   moves a state" in done.stdout


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target": "ownlosses.Right"}, ConfigError, "NEEDLE_TARGETS=package"),
        ({"target": "needle.loss.HardLable"}, ConfigError, "did you mean HardLabel"),
        ({"target": "needle.loss.Fixed"}, ConfigError, "is no loss"),
        ({"target": "needle.loss.ULD"}, ConfigError, "temperature is missing"),
        ({"arguments": {"factor": 2.0}}, ConfigError, "arguments"),
        ({"run": Path("/nowhere")}, DataError, "/nowhere is not a run's folder"),
    ],
)
def test_a_users_mistake_is_told_in_one_message(settings: dict[str, Any], error: type, words: str):
    with pytest.raises(error, match=words):
        started(**settings)


def test_mutations_of_one_loss(capsys: pytest.CaptureFixture[str]):
    started(target="needle.loss.HardLabel", mutations=True)
    table = capsys.readouterr().out
    # No temperature, no teacher to exchange, to detach or to truncate.
    assert table.strip().endswith("7/7 mutations caught")
