"""Calibration: folds without leaks, figures that improve where they can, verdicts where not, and one real run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from needle import calibrate as stage
from needle.calibrate import HEAD, RAW, RESCALED, Fitting, cross_fit, fit_calibrated, folds_of, platt, verdict
from needle.decode import Decoder
from needle.errors import DataError
from needle.metrics import calibration
from needle.predict import main as predict
from needle.reporting.compare import Bootstrap
from needle.schema import Example, Tool, ToolCall
from needle.student import SANConfig, SANForConditionalGeneration, load, save
from needle.student.confidence import SCALARS, Features
from needle.text.tokenizer import TextCodec, train_tokenizer

FITTING = Fitting(forms=("probability", "scalars", "encoder"), l2=(0.03,), folds=3, seed=0)
QUICK = Fitting(forms=("probability", "scalars"), l2=(0.03,), folds=2, seed=0)
DRAWS = Bootstrap(resamples=100, confidence_frac=0.9, seed=0)


def features(count: int, *, seed: int, log_odds=None, width: int = 6) -> Features:
    generator = torch.Generator().manual_seed(seed)
    scalars = torch.randn(count, len(SCALARS), generator=generator, dtype=torch.float64)
    if log_odds is not None:
        scalars[:, 0] = torch.from_numpy(log_odds)
    return Features(scalars, torch.randn(count, width, generator=generator, dtype=torch.float64))


def names(count: int) -> list[str]:
    return [f"g{index}" for index in range(count)]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_folds_keep_groups_whole_and_shares_alike():
    generator = np.random.default_rng(0)
    groups = [f"g{index}" for index in generator.integers(0, 60, 150)]
    right = generator.random(150) < 0.3
    folds = folds_of(groups, right, folds=5, seed=0)
    of_group = {group: {int(folds[i]) for i in range(150) if groups[i] == group} for group in groups}
    assert all(len(found) == 1 for found in of_group.values())
    assert sorted(set(folds.tolist())) == [0, 1, 2, 3, 4]
    single = folds_of(names(150), right, folds=5, seed=0)
    assert {int((single == fold).sum()) for fold in range(5)} == {30}
    assert np.ptp([right[single == fold].sum() for fold in range(5)]) <= 1
    assert not np.array_equal(single, folds_of(names(150), right, folds=5, seed=1))
    with pytest.raises(DataError, match=r"2 different requests .* fitting.folds=3"):
        folds_of(["a", "b", "b"], np.array([1, 0, 1]), folds=3, seed=0)


def test_a_head_finds_what_is_there_to_find():
    data = features(240, seed=1)
    right = (data.scalars_NF[:, 2] + data.states_ND[:, 0] > 0).numpy()
    confidence = cross_fit(data, right, names(240), FITTING)
    assert calibration.auroc(confidence, right) > 0.95
    fitted = fit_calibrated(data, right, names(240), FITTING)
    assert fitted.candidate.form == "encoder"
    assert [candidate.form for candidate, _ in fitted.losses] == ["probability", "scalars", "encoder"]
    losses = [loss for _, loss in fitted.losses]
    assert losses[2] < losses[1] < losses[0]


def test_noise_stays_noise_out_of_fold():
    """Groups of four copies with one correctness at random: a head that had seen a copy would know the others."""
    index = np.repeat(np.arange(60), 4)
    data = features(60, seed=2, width=40).take(index)
    coins = np.random.default_rng(2).random((3, 60)) < 0.5
    loose = Fitting(forms=("encoder",), l2=(0.003,), folds=2, seed=0)
    groups = [f"g{i}" for i in index]
    held = [calibration.auroc(cross_fit(data, coin[index], groups, loose), coin[index]) for coin in coins]
    assert np.mean(held) == pytest.approx(0.5, abs=0.12)
    # The other way about: were copies in several folds, this is what would be seen.
    right = coins[0][index]
    assert calibration.auroc(cross_fit(data, right, names(240), loose), right) > 0.9


def test_calibration_mends_overconfidence():
    generator = np.random.default_rng(3)
    honest = generator.normal(0, 1.5, 500)
    right = generator.random(500) < sigmoid(honest)
    raw = sigmoid(4 * honest)
    slope, _ = platt(4 * honest, right)
    assert slope == pytest.approx(1 / 4, abs=0.06)
    rescaled = cross_fit(
        features(500, seed=3, log_odds=4 * honest), right, names(500), Fitting(("probability",), (0.03,), 5, 0)
    )
    before, after = (calibration.summary(one, right, bins=10) for one in (raw, rescaled))
    assert after["ece_frac"] < before["ece_frac"] / 2
    assert after["log_loss_nats"] < before["log_loss_nats"]
    assert after["auroc"] == pytest.approx(before["auroc"], abs=0.01)  # rescaling ranks no answer anew


def test_the_slope_is_never_negative_and_separable_logits_stay_finite():
    logits = np.linspace(-3, 3, 40)
    slope, intercept = platt(logits, logits < 0)
    assert slope == pytest.approx(0, abs=1e-6)
    assert sigmoid(np.array(intercept)) == pytest.approx(0.5, abs=1e-3)
    slope, _ = platt(logits, logits > 0)
    assert 1 < slope < 100  # without targets off 0 and 1 it would grow without end


def test_the_probability_is_tried_once():
    forms = [(one.form, one.l2) for one in Fitting(("encoder", "probability"), (0.1, 1.0), 3, 0).candidates()]
    assert forms == [("probability", 0.1), ("encoder", 0.1), ("encoder", 1.0)]


def test_verdicts():
    losses = {RAW: 0.5, RESCALED: 0.45, HEAD: 0.4}
    assert verdict(HEAD, "scalars", losses, {"interval": (0.01, 0.1)}).startswith("The head (scalars) beats")
    assert "includes 0" in verdict(HEAD, "scalars", losses, {"interval": (-0.01, 0.1)})
    for saved, form, words in (
        (RESCALED, "encoder", "rescaled, is kept"),
        (RAW, "scalars", "unchanged"),
        (HEAD, "probability", "what the choice came to"),
    ):
        told = verdict(saved, form, losses, {"interval": (-0.1, 0.1)})
        assert told.startswith("The head does not beat")
        assert words in told


# The stage, with a tiny untrained student: it has no choice but to be right where no tool is shown.

TIMER = Tool("set_timer", "Start a timer.", {"type": "object", "properties": {"minutes": {"type": "integer"}}})


def example(index: int, **changes) -> Example:
    right = index % 3 == 0
    words = "".join("abcdefghij"[int(digit)] for digit in str(index))
    return Example(
        id=f"e{index}",
        query=f"{words} timer",
        tools=() if right else (TIMER,),
        calls=() if right else (ToolCall("set_timer", {"minutes": 10**12 + index}),),
        kind="no_tools" if right else "single",
        source="recorded",
        split="validation",
    ).replace(**changes)


def write(path: Path, examples) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(one.to_json() + "\n" for one in examples))
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A training run's folder, with its shards beside."""
    root = tmp_path_factory.mktemp("calibrate")
    torch.manual_seed(1)
    codec = TextCodec(train_tokenizer(["set_timer minutes timer"] * 3, vocab_size=310), "signature")
    config = SANConfig(
        vocab_size=codec.vocab_size, width=16, heads=1, kv_heads=1, encoder_layers=1, decoder_layers=1, copy=False
    )
    save(SANForConditionalGeneration(config), codec, root / "run" / "model")
    write(root / "shards" / "validation.jsonl", [example(index) for index in range(60)])
    (root / "run" / "run.json").write_text(json.dumps({"facts": {"shards": str(root / "shards")}}))
    return root / "run"


def calibrate(checkpoint: Path, **changes) -> None:
    settings = {"shards": None, "suite": None, "output": None, "limit": None, "fitting": QUICK, "bins": 5}
    settings |= {"bootstrap": DRAWS, "batch_size": 20, "max_new_tokens": 20, "max_calls": 2, "max_source_tokens": 99}
    settings |= {"device": "cpu", "threads": None, "checkpoint": checkpoint, **changes}
    stage.main.stage_function({"_overrides_": [f"checkpoint={checkpoint}"]}, **settings)


def test_from_a_run_to_calibrated_predictions(run_folder: Path):
    calibrate(run_folder)
    told = run_folder / "model_confidence"
    report = json.loads((told / "validation.json").read_text())
    assert (report["answers"], report["right"], report["unusable"], report["saved"]) == (60, 20, 0, "head")
    assert report["confidences"]["head"]["metrics"]["auroc"] == 1.0
    assert report["confidences"]["head"]["accuracy_at_coverage"]["0.3"] == 1.0
    assert (told / "validation.png").read_bytes().startswith(b"\x89PNG")
    assert report["verdict"] in (told / "validation.md").read_text()
    lines = [json.loads(line) for line in (told / "validation.answers.jsonl").read_text().splitlines()]
    assert [line["right"] for line in lines] == [index % 3 == 0 for index in range(60)]
    assert calibration.brier(
        np.array([line["head"] for line in lines]), np.array([line["right"] for line in lines])
    ) == pytest.approx(report["confidences"]["head"]["metrics"]["brier"], abs=1e-5)

    # The decoder's confidence is the head's; what cannot be answered, or is decoded otherwise, is told apart.
    model, codec = load(run_folder / "model")
    limits = {"max_new_tokens": 20, "max_calls": 2}
    requests = [(one.query, one.tools) for one in map(example, (90, 91, 92))]
    answers = Decoder(model, codec, constrained=True, **limits).decode(requests)
    assert [a.confidence for a in answers] == model.confidence_head.confidences([a.evidence for a in answers])
    assert answers[0].confidence > 0.8 > 0.2 > max(answers[1].confidence, answers[2].confidence)
    cut = Decoder(model, codec, constrained=True, max_new_tokens=1, max_calls=2).decode(requests[1:2])[0]
    assert (cut.calls, cut.confidence) == (None, 0.0)
    assert cut.probability > 0
    free = Decoder(model, codec, constrained=False, **limits).decode(requests)
    assert [a.confidence for a in free] == [a.probability for a in free]

    # needle.predict tells the head's confidence.
    source = write(run_folder / "in.jsonl", map(example, (90, 91, 92)))
    numbers = {"batch_size": 3, "max_source_tokens": 99, "threads": None, "device": "cpu", **limits}
    output = run_folder / "out.jsonl"
    predict.stage_function({}, checkpoint=run_folder, input=source, output=output, constrained=True, **numbers)
    told = [json.loads(line)["confidence"] for line in output.read_text().splitlines()]
    assert told == pytest.approx([a.confidence for a in answers], abs=2e-6)

    # The head that is there is evaluated on another file, also one that nothing may be fitted on.
    before = (run_folder / "model" / "confidence.safetensors").read_bytes()
    suite = write(run_folder / "other.jsonl", [example(index, split="test") for index in range(60, 90)])
    calibrate(run_folder, suite=suite)
    report = json.loads((run_folder / "model_confidence" / "other.json").read_text())
    assert (report["answers"], report["form"]) == (
        30,
        json.loads((run_folder / "model" / "confidence.json").read_text())["form"],
    )
    assert report["confidences"]["head"]["metrics"]["auroc"] == 1.0
    assert (run_folder / "model" / "confidence.safetensors").read_bytes() == before
    calibrate(run_folder, suite=run_folder.parent / "shards" / "validation.jsonl")
    flattering = json.loads((run_folder / "model_confidence" / "shards_validation.json").read_text())
    assert "fitted on these very requests" in flattering["verdict"]


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([example(1, split="test")], ["e1", "'test'", "for evaluation only", "suite="]),
        ([example(1, split="unseen")], ["'unseen'", "for evaluation only"]),
        ([example(1, source="bfcl_simple", split="")], ["'bfcl_simple'", "for evaluation only"]),
        ([example(index) for index in range(49)], ["49 answered requests", "needs 50", "validation_frac"]),
        ([example(3 * index) for index in range(55)], ["55 of 55", "0 wrong", "needs 10 of each"]),
    ],
    ids=["test", "unseen", "source", "few", "one-sided"],
)
def test_what_a_head_cannot_be_fitted_on(run_folder: Path, tmp_path: Path, examples, words: list[str]):
    write(tmp_path / "shards" / "validation.jsonl", examples)
    with pytest.raises(DataError) as told:
        calibrate(run_folder, shards=tmp_path / "shards")
    for word in words:
        assert word in str(told.value)


def test_missing_things_are_named(run_folder: Path, tmp_path: Path):
    student = tmp_path / "student"
    student.mkdir()
    for path in (run_folder / "model").iterdir():
        if "confidence" not in path.name:
            (student / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="shards=FOLDER"):
        calibrate(student)
    with pytest.raises(DataError, match=r"no validation.jsonl; .* shards=FOLDER"):
        calibrate(student, shards=tmp_path)
    suite = write(tmp_path / "suite.jsonl", [example(1)])
    with pytest.raises(DataError, match=r"no confidence head; fit one: python -m needle.calibrate"):
        calibrate(student, suite=suite)
