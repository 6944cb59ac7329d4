"""The confidence head: what it reads, the optimum that it is fitted to, and its files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from needle.errors import DataError
from needle.student import load, save
from needle.student.confidence import (
    HEAD_FILES,
    LOG_ODDS_HIGH,
    LOG_ODDS_LOW,
    SCALARS,
    Candidate,
    ConfidenceHead,
    Evidence,
    Features,
    load_head,
    log_odds,
    save_head,
    unchanged,
)
from needle.student.san import SANConfig, SANForConditionalGeneration
from needle.text.tokenizer import TextCodec, train_tokenizer

WIDTH = 16


def evidence(seed: int, *, width: int = WIDTH) -> Evidence:
    generator = np.random.default_rng(seed)
    log_probs = tuple((-generator.exponential(0.3, generator.integers(1, 9))).tolist())
    return Evidence(generator.normal(size=width).astype(np.float32), log_probs, int(generator.integers(3)), 4)


def test_log_odds():
    for p in (1e-6, 0.2, 0.5, 0.999):
        assert log_odds(math.log(p)) == pytest.approx(math.log(p / (1 - p)), rel=1e-9, abs=1e-12)
    assert log_odds(0.0) == log_odds(1e-9) == LOG_ODDS_HIGH
    assert log_odds(-1e4) == log_odds(-math.inf) == LOG_ODDS_LOW
    steps = [log_odds(x) for x in np.linspace(-25, 0, 200)]
    assert steps == sorted(steps)


def test_scalars_by_hand():
    one = Evidence(np.zeros(2), (math.log(0.5), math.log(0.8)), calls=2, tools=3)
    expected = [math.log(0.4 / 0.6), log_odds(math.log(0.4) / 2), 0.0, math.log(3), 2.0, math.log(4)]
    assert one.scalars() == pytest.approx(expected, abs=1e-12)
    assert len(SCALARS) == len(expected)


def test_unchanged_gives_the_probability_back():
    head = unchanged(width=WIDTH)
    answers = [evidence(seed) for seed in range(9)]
    expected = [math.exp(sum(one.token_log_probs)) for one in answers]
    assert head.confidences(answers) == pytest.approx(expected, rel=1e-6)
    assert head.confidences([]) == []


def test_logistic_regression_is_at_its_optimum():
    """There the gradient is 0: X^T (p - y) / N + l2 w for the weights, mean(p - y) for the bias."""
    features = Features.of([evidence(seed) for seed in range(60)])
    right = np.random.default_rng(0).random(60) < 0.4
    head = Candidate("scalars", 0.05).fit(features, right, seed=0)
    x = (features.scalars_NF - head.mean) / head.scale
    # log_tools never varies: it is at 0 and not divided by 0.
    assert x[:, SCALARS.index("log_tools")].abs().max() < 1e-9
    error = torch.sigmoid(head.logits(features)) - torch.from_numpy(right).double()
    assert (x.T @ error / 60 + 0.05 * head.output.weight[0]).abs().max() < 1e-5
    assert abs(float(error.mean())) < 1e-5


def test_the_encoder_form_learns_what_scalars_cannot_tell():
    features = Features.of([evidence(seed) for seed in range(200)])
    right = (features.states_ND[:, 0].abs() > 0.67).numpy()  # no line through the states tells it either
    small, large = (Candidate(form, 0.01).fit(features, right, seed=0) for form in ("scalars", "encoder"))
    loss = {
        head.form: float(torch.nn.functional.binary_cross_entropy(head(features), torch.from_numpy(right).double()))
        for head in (small, large)
    }
    assert loss["encoder"] < 0.4 < 0.6 < loss["scalars"]


def test_fitting_is_deterministic_and_leaves_the_random_state_alone():
    features = Features.of([evidence(seed) for seed in range(30)])
    right = np.arange(30) % 3 == 0
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    one = Candidate("encoder", 0.1).fit(features, right, seed=3)
    assert torch.rand(()) == expected
    two, other = (Candidate("encoder", 0.1).fit(features, right, seed=seed) for seed in (3, 4))
    assert torch.equal(one(features), two(features))
    assert not torch.equal(one(features), other(features))


# Files.


@pytest.fixture(scope="module")
def model_and_codec():
    torch.manual_seed(0)
    codec = TextCodec(train_tokenizer(["set a timer for ten minutes"] * 3, vocab_size=310), "signature")
    config = SANConfig(
        vocab_size=codec.vocab_size, width=WIDTH, heads=1, kv_heads=1, encoder_layers=1, decoder_layers=1, copy=False
    )
    return SANForConditionalGeneration(config), codec


@pytest.fixture
def folder(tmp_path: Path, model_and_codec) -> Path:
    """A saved student with a head."""
    save(*model_and_codec, tmp_path)
    save_head(fitted("encoder"), tmp_path)
    return tmp_path


def fitted(form) -> ConfidenceHead:
    features = Features.of([evidence(seed) for seed in range(20)])
    head = Candidate(form, 0.1).fit(features, np.arange(20) % 2 == 0, seed=0)
    head.slope.fill_(0.7)
    return head.with_facts({"decoding": {"constrained": True}})


def test_a_student_is_loaded_with_its_head(folder: Path, model_and_codec):
    answers = [evidence(seed) for seed in range(5)]
    model, _ = load(folder)
    assert model.confidence_head.confidences(answers) == fitted("encoder").confidences(answers)
    assert model.confidence_head.fits(constrained=True)
    assert not model.confidence_head.fits(constrained=False)
    assert not any("confidence" in name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    # Another form takes its place; other weights in the same folder have no head.
    save_head(fitted("probability"), folder)
    assert load(folder)[0].confidence_head.form == "probability"
    save(*model_and_codec, folder)
    assert load(folder)[0].confidence_head is None
    assert not any((folder / name).exists() for name in HEAD_FILES)


def change(folder: Path, **changes) -> None:
    path = folder / "confidence.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil(folder: Path) -> None:
    head = fitted("encoder")
    head.output.weight[0, 0] = math.nan
    save_head(head, folder)


def another_student(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "confidence.json").unlink(), ["confidence.safetensors", "confidence.json is not there"]),
        (lambda f: (f / "confidence.safetensors").unlink(), ["confidence.safetensors is not there"]),
        (lambda f: (f / "confidence.json").write_text("{"), ["confidence.json describes no confidence head"]),
        (lambda f: (f / "confidence.json").write_text("[]"), ["confidence.json describes no confidence head"]),
        (lambda f: (f / "confidence.safetensors").write_bytes(b"cut"), ["confidence.safetensors is damaged"]),
        (another_student, ["confidence.json belongs to another student"]),
        (lambda f: change(f, form="tree"), ["form='tree'"]),
        (lambda f: change(f, width=-1), ["width=-1"]),
        (lambda f: change(f, width=WIDTH * 2), ["confidence.safetensors does not fit confidence.json"]),
        (lambda f: change(f, schema_version=9), ["version 9"]),
        (spoil, ["not finite"]),
    ],
)
def test_a_damaged_head_is_named_with_the_way_out(folder: Path, damage, words: list[str]):
    damage(folder)
    with pytest.raises(DataError) as told:
        load_head(folder)
    for word in (*words, "python -m needle.calibrate"):
        assert word in str(told.value)


def test_a_head_of_another_width_is_refused(folder: Path):
    save_head(unchanged(width=WIDTH + 1), folder)
    with pytest.raises(DataError, match=f"width={WIDTH + 1}, the student {WIDTH}"):
        load(folder)
