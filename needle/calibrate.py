"""Fits a confidence head to a trained student: how likely each of its answers is to be right.

    python -m needle.calibrate checkpoint=runs/train/NAME
    python -m needle.calibrate checkpoint=FOLDER shards=artifacts/shards-HASH
    python -m needle.calibrate checkpoint=runs/train/NAME suite=test.jsonl        evaluates the head that is there

The student answers the validation requests of its shards as needle.predict does; an answer is right when all its calls
are (`exact` of needle.metrics.matching). From then on `confidence` of needle.predict is the head's. A student has one
head: fitting again replaces it. Requests of test and unseen domains are never fitted on.

What is reported is out of fold: for each fold, the whole procedure (choosing a head by cross-validated log loss,
fitting it, calibrating it) runs on the other folds alone, and the head that comes out judges the fold. A head that does
not beat the student's own probability so is not kept; what is saved then is the probability, rescaled if that helps.

Cost: decoding the requests (a few a second on one core), then seconds.
"""

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import minimize
from scipy.special import expit

from needle import artifacts, config
from needle.corpus.split import SplitRule
from needle.decode import Decoded, Decoder
from needle.errors import DataError
from needle.metrics import calibration, matching
from needle.progress import Progress
from needle.reporting import confidence as pages
from needle.reporting.compare import Bootstrap
from needle.schema import EVALUATION_ONLY, SPLITS, Example, read_examples
from needle.student import load
from needle.student.confidence import Candidate, ConfidenceHead, Features, Form, save_head, unchanged

REPORT_VERSION = 1
FEWEST_ANSWERS = 50
FEWEST_OF_EACH = 10  # right, and wrong
RAW, RESCALED, HEAD = "probability", "rescaled", "head"
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Fitting:
    """conf/calibrate.yaml, `fitting`."""

    forms: Annotated[tuple[Form, ...], Field(min_length=1)]
    l2: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    folds: Annotated[int, Field(ge=2, le=20)]
    seed: Annotated[int, Field(ge=0)]

    def candidates(self) -> list[Candidate]:
        """From the simplest to the largest. The probability's one weight takes the calibration's slope in any case, so
        one strength is tried with it."""
        order = [form for form in ("probability", "scalars", "encoder") if form in self.forms]
        return [Candidate(form, l2) for form in order for l2 in (self.l2 if form != "probability" else self.l2[:1])]


@dataclass(frozen=True)
class Answers:
    """Usable answers to a suite. `probability_N`: the student's own; `groups_N`: equal for variants of a request."""

    ids: list[str]
    groups_N: list[str]
    features: Features
    probability_N: np.ndarray
    confidence_N: np.ndarray
    right_N: np.ndarray
    unusable: int


@config.stage("calibrate")
def main(
    cfg: dict[str, Any],
    *,
    checkpoint: Path,
    shards: Path | None,
    suite: Path | None,
    output: Path | None,
    limit: Count | None,
    fitting: Fitting,
    bins: Annotated[int, Field(ge=2, le=50)],
    bootstrap: Bootstrap,
    batch_size: Count,
    max_new_tokens: Count,
    max_calls: Count,
    max_source_tokens: Count,
    device: str,
    threads: Count | None,
) -> None:
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
    folder = checkpoint / "model" if (checkpoint / "model").is_dir() else checkpoint
    path = suite if suite is not None else _shards(checkpoint, folder, shards) / "validation.jsonl"
    examples = _examples(path, limit, fitting=suite is None)
    if suite is None and not os.access(folder, os.W_OK):
        raise DataError(f"checkpoint={folder} cannot be written into, and the head lies beside the student's weights")
    model, codec = load(folder)
    if suite is not None and model.confidence_head is None:
        raise DataError(f"{folder} has no confidence head; fit one: python -m needle.calibrate checkpoint={checkpoint}")
    limits = {"max_new_tokens": max_new_tokens, "max_calls": max_calls, "max_source_tokens": max_source_tokens}
    decoder = Decoder(model.to(device), codec, constrained=True, **limits)
    with Progress("answers") as progress:
        answers = answered(decoder, examples, batch_size=batch_size, progress=progress)
    decoding = {"constrained": True, **limits}
    about = {"suite": str(path), "sha256": artifacts.hash_file(path), "limit": limit}
    if suite is None:
        check_enough(answers, path)
        facts = {"decoding": decoding, "fitted_on": about, "answers": len(answers.ids)}
        told = _fit_and_save(answers, folder, fitting, bootstrap, facts | {"right": int(answers.right_N.sum())})
    else:
        told = _evaluate(answers, model.confidence_head, about["sha256"], bootstrap)
    report = {
        "schema_version": REPORT_VERSION,
        "student": str(folder),
        **about,
        "decoding": decoding,
        "matching_version": matching.MATCHING_VERSION,
        "answers": len(answers.ids),
        "right": int(answers.right_N.sum()),
        "unusable": answers.unusable,
        "interval_frac": bootstrap.confidence_frac,
        "command": shlex.join(["python", "-m", "needle.calibrate", *cfg["_overrides_"]]),
        **told.facts,
    }
    beside = folder.absolute()
    output = output or beside.with_name(f"{beside.name}_confidence")
    # An evaluation on some validation file must not take the place of the fit's report.
    name = f"{path.absolute().parent.name}_{path.stem}" if suite is not None and path.stem in SPLITS else path.stem
    _write(output, name, report, told, answers, bins, bootstrap)


def _shards(checkpoint: Path, folder: Path, given: Path | None) -> Path:
    """The folder of validation.jsonl, from the setting or from the record of the student's run."""
    if given is None:
        records = [
            place / "run.json" for place in (checkpoint, folder.resolve().parent) if (place / "run.json").is_file()
        ]
        try:
            known = json.loads(records[0].read_text("utf-8")).get("facts", {}).get("shards") if records else None
        except ValueError as error:
            raise DataError(f"cannot read {records[0]}: {error}") from error
        if known is None:
            raise DataError(f"no run records which shards {folder} was trained on; name them: shards=FOLDER")
        given = Path(known)
    if not (given / "validation.jsonl").is_file():
        raise DataError(
            f"{given} has no validation.jsonl; prepare the student's data again (python -m needle.prepare) or give "
            "shards=FOLDER"
        )
    return given


def _examples(path: Path, limit: int | None, *, fitting: bool) -> list[Example]:
    """The sound examples of a file.

    Raises:
        DataError: there is none, or (`fitting`) one that nothing may be fitted on.
    """
    examples, skipped = read_examples(path)
    if skipped:
        first = skipped[0]
        print(
            f"{path}: {len(skipped)} unusable lines are left out; the first is line {first.line_number}: {first.reason}"
        )
    for example in examples if fitting else ():
        if example.source.startswith(EVALUATION_ONLY) or example.split not in ("validation", ""):
            what = f"source {example.source!r}, split {example.split!r}"
            raise DataError(
                f"{path}: {example.id} ({what}) is for evaluation only, and a head is fitted on validation requests; "
                f"to evaluate a head on this file: suite={path}"
            )
    if limit is not None and limit < len(examples):
        examples = [examples[index * len(examples) // limit] for index in range(limit)]
    return examples


def answered(decoder: Decoder, examples: Sequence[Example], *, batch_size: int, progress: Progress) -> Answers:
    """Decodes and judges. Examples of like length are decoded together, which saves padding; the order is kept.

    Raises:
        DataError: no example has a usable answer.
    """
    lengths = [len(decoder.codec.encode_prompt(example.query, example.tools)) for example in examples]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    decoded: dict[int, Decoded] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        requests = [(examples[index].query, examples[index].tools) for index in batch]
        decoded.update(zip(batch, decoder.decode(requests), strict=True))
        progress.update(len(decoded), len(examples))
    usable = [index for index in range(len(examples)) if decoded[index].calls is not None]
    if not usable:
        raise DataError(f"none of {len(examples)} requests has a usable answer; the first error: {decoded[0].error}")
    chosen = [(examples[index], decoded[index]) for index in usable]
    return Answers(
        ids=[example.id for example, _ in chosen],
        groups_N=[SplitRule.words(example.query) or example.query for example, _ in chosen],
        features=Features.of([answer.evidence for _, answer in chosen]),
        probability_N=np.array([answer.probability for _, answer in chosen]),
        confidence_N=np.array([answer.confidence for _, answer in chosen]),
        right_N=np.array([_is_right(example, answer) for example, answer in chosen]),
        unusable=len(examples) - len(usable),
    )


def _is_right(example: Example, answer: Decoded) -> bool:
    return bool(matching.judge(answer.calls, example.calls, example.tools)["exact"])


def check_enough(answers: Answers, path: Path) -> None:
    """Raises DataError when no head can be fitted on so few answers, or so few right or wrong ones."""
    count, right = len(answers.ids), int(answers.right_N.sum())
    wrong = count - right
    if count < FEWEST_ANSWERS:
        raise DataError(
            f"{path} has {count} answered requests, a head needs {FEWEST_ANSWERS}; raise limit, or prepare data with a "
            "larger data.split.validation_frac"
        )
    if min(right, wrong) < FEWEST_OF_EACH:
        raise DataError(
            f"{right} of {count} answers to {path} are right and {wrong} wrong, a head needs {FEWEST_OF_EACH} of each: "
            f"train the student {'longer' if right < wrong else 'on harder requests'}, or give it more requests"
        )


def folds_of(groups_N: Sequence[str], right_N: np.ndarray, *, folds: int, seed: int) -> np.ndarray:
    """[N]: the fold of each answer. Groups stay whole, and folds get like shares of right answers: without that, the
    base rate of the other folds alone would tell on which side of it a fold's own lies.

    Raises:
        DataError: fewer groups than folds.
    """
    names, group_N = np.unique(np.asarray(groups_N), return_inverse=True)
    if len(names) < folds:
        raise DataError(f"{len(names)} different requests do not make fitting.folds={folds}; give more requests")
    share_G = np.bincount(group_N, weights=right_N) / np.bincount(group_N)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    fold_G = np.empty(len(names), dtype=np.int64)
    fold_G[shuffled[np.argsort(share_G[shuffled], kind="stable")]] = np.arange(len(names)) % folds
    return fold_G[group_N]


def platt(logit_N: np.ndarray, right_N: np.ndarray) -> tuple[float, float]:
    """Slope (at least 0: calibration never turns the ranking round) and intercept that minimise the log loss of
    sigmoid(slope * logit + intercept), with targets drawn from 0 and 1 by one answer each (Platt 1999)."""
    right = int(right_N.sum())
    target_N = np.where(right_N, (right + 1) / (right + 2), 1 / (len(right_N) - right + 2))

    def loss(ends: np.ndarray) -> tuple[float, np.ndarray]:
        z_N = ends[0] * logit_N + ends[1]
        error_N = expit(z_N) - target_N
        return float(np.mean(np.logaddexp(0, z_N) - target_N * z_N)), np.array(
            [np.mean(error_N * logit_N), np.mean(error_N)]
        )

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=[(0, None), (None, None)], method="L-BFGS-B")
    return float(found.x[0]), float(found.x[1])


@dataclass(frozen=True)
class Fitted:
    """A calibrated head, the candidate that it comes from, and each candidate's log loss out of fold."""

    head: ConfidenceHead
    candidate: Candidate
    losses: list[tuple[Candidate, float]]


def fit_calibrated(
    features: Features,
    right_N: np.ndarray,
    groups_N: Sequence[str],
    fitting: Fitting,
    *,
    done: Callable[[], None] = lambda: None,
) -> Fitted:
    """Chooses the candidate with the lowest cross-validated log loss after calibration (the simpler of equals), fits it
    on all answers, and calibrates it by the logits that heads fitted without an answer give that answer."""
    fold_N = folds_of(groups_N, right_N, folds=fitting.folds, seed=fitting.seed)
    tried: list[tuple[Candidate, float, tuple[float, float]]] = []
    for candidate in fitting.candidates():
        logit_N = np.empty(len(features))
        for fold in range(fitting.folds):
            out_N = fold_N == fold
            head = candidate.fit(features.take(~out_N), right_N[~out_N], seed=fitting.seed)
            logit_N[out_N] = head.logits(features.take(out_N)).numpy()
            done()
        slope, intercept = platt(logit_N, right_N)
        loss = calibration.log_loss_nats(expit(slope * logit_N + intercept), right_N)
        tried.append((candidate, loss, (slope, intercept)))
    best, _, (slope, intercept) = min(tried, key=lambda one: one[1])
    head = best.fit(features, right_N, seed=fitting.seed)
    head.slope.fill_(slope)
    head.intercept.fill_(intercept)
    return Fitted(head, best, [(candidate, loss) for candidate, loss, _ in tried])


def cross_fit(
    features: Features,
    right_N: np.ndarray,
    groups_N: Sequence[str],
    fitting: Fitting,
    *,
    done: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """[N]: the confidence that `fit_calibrated` on the other folds gives each answer."""
    # Another seed than the folds inside, which would else be cut along the same order.
    fold_N = folds_of(groups_N, right_N, folds=fitting.folds, seed=fitting.seed + 1)
    confidence_N = np.empty(len(features))
    for fold in range(fitting.folds):
        out_N = fold_N == fold
        others = [group for group, out in zip(groups_N, out_N, strict=True) if not out]
        fitted = fit_calibrated(features.take(~out_N), right_N[~out_N], others, fitting, done=done)
        confidence_N[out_N] = fitted.head(features.take(out_N)).numpy()
    return confidence_N


@dataclass(frozen=True)
class _Told:
    """What a fit or an evaluation has to report: kinds of confidence by name, and further facts."""

    confidences: dict[str, np.ndarray]
    facts: dict[str, Any]


def _fit_and_save(
    answers: Answers, folder: Path, fitting: Fitting, bootstrap: Bootstrap, facts: Mapping[str, Any]
) -> _Told:
    data = (answers.features, answers.right_N, answers.groups_N)
    simple = Fitting(("probability",), fitting.l2, fitting.folds, fitting.seed)
    total = (1 + fitting.folds) * fitting.folds * (len(fitting.candidates()) + 1)
    count = iter(range(1, total + 1))
    with Progress("fits") as progress:

        def done() -> None:
            progress.update(next(count), total)

        confidences = {
            RAW: answers.probability_N,
            RESCALED: cross_fit(*data, simple, done=done),
            HEAD: cross_fit(*data, fitting, done=done),
        }
        fits = {RESCALED: fit_calibrated(*data, simple, done=done), HEAD: fit_calibrated(*data, fitting, done=done)}
    losses = {name: calibration.log_loss_nats(one, answers.right_N) for name, one in confidences.items()}
    saved = min(losses, key=losses.__getitem__)
    head = unchanged(width=answers.features.states_ND.shape[1]) if saved == RAW else fits[saved].head
    save_head(head.with_facts({**facts, "fitting": vars(fitting), "kept": saved}), folder)
    gain = _gain(confidences, answers, bootstrap)
    told = {
        "saved": saved,
        "form": head.form,
        "head_form": fits[HEAD].candidate.form,
        "candidates": [{**vars(candidate), "log_loss_nats": loss} for candidate, loss in fits[HEAD].losses],
        "gain": gain,
        "fitting": vars(fitting),
        "verdict": verdict(saved, fits[HEAD].candidate.form, losses, gain),
        "method": (
            f"Everything is out of fold ({fitting.folds} folds, variants of a request together): the head that judges "
            "an answer was chosen, fitted and calibrated without it. Folds are scaled apart, which alone moves auroc a "
            "little."
        ),
    }
    return _Told(confidences, told)


def _gain(confidences: Mapping[str, np.ndarray], answers: Answers, bootstrap: Bootstrap) -> dict[str, Any]:
    """By how much the head's log loss is lower than that of the best other confidence, with its interval."""
    losses = {name: calibration.log_loss_nats(one, answers.right_N) for name, one in confidences.items()}
    rival = min((name for name in losses if name != HEAD), key=losses.__getitem__)

    def lower(index: np.ndarray) -> dict[str, float | None]:
        right_N = answers.right_N[index]
        loss = [calibration.log_loss_nats(confidences[name][index], right_N) for name in (rival, HEAD)]
        return {"log_loss_nats": loss[0] - loss[1]}

    interval = calibration.resampled(lower, answers.groups_N, **_draws(bootstrap))["log_loss_nats"]
    return {"over": rival, **lower(np.arange(len(answers.ids))), "interval": interval}


def verdict(saved: str, form: str, losses: Mapping[str, float], gain: Mapping[str, Any]) -> str:
    """Whether the head beats the student's own probability, in a few sentences."""
    shown = (
        f"log loss {losses[HEAD]:.4f} nats against {losses[RAW]:.4f} (probability) and {losses[RESCALED]:.4f} "
        "(rescaled)"
    )
    low, high = gain["interval"]
    if saved == HEAD and form != "probability":
        if low > 0:
            return f"The head ({form}) beats the student's own probability: {shown}."
        return (
            f"The head ({form}) is better than the student's own probability on these answers: {shown}. The gain's "
            f"interval, {low:.4f} to {high:.4f}, includes 0: on other requests it may be none."
        )
    kept = {
        RAW: "The probability itself is the best calibrated of the three and is kept unchanged",
        RESCALED: "The probability, rescaled, is kept",
        HEAD: "The probability, rescaled, is what the choice came to and what is kept",
    }[saved]
    return f"The head does not beat the student's own probability: {shown}. {kept}."


def _evaluate(answers: Answers, head: ConfidenceHead, sha256: str, bootstrap: Bootstrap) -> _Told:
    """The saved head on answers that it was, as a rule, not fitted on."""
    fitted_on = head.facts.get("fitted_on", {})
    confidences = {RAW: answers.probability_N, HEAD: answers.confidence_N}
    loss = {name: calibration.log_loss_nats(one, answers.right_N) for name, one in confidences.items()}
    gain = _gain(confidences, answers, bootstrap)
    low, high = gain["interval"]
    better = "better" if low > 0 else "worse" if high < 0 else "neither shown to be better nor worse"
    told = (
        f"The saved head ({head.form}) is {better} than the student's own probability here: log loss {loss[HEAD]:.4f} "
        f"nats against {loss[RAW]:.4f}; the gain's interval is {low:.4f} to {high:.4f}."
    )
    if fitted_on.get("sha256") == sha256:
        told += " It was fitted on these very requests, so these figures flatter it."
    method = f"The head was fitted on {fitted_on.get('suite', 'an unknown file')}; nothing was fitted here."
    return _Told(
        confidences, {"form": head.form, "gain": gain, "verdict": told, "method": method, "fitted_on": fitted_on}
    )


def _draws(bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "resamples": bootstrap.resamples,
        "confidence_frac": bootstrap.confidence_frac,
        "seed": bootstrap.seed,
    }


def described(
    confidence_N: np.ndarray, right_N: np.ndarray, groups_N: Sequence[str], *, bins: int, bootstrap: Bootstrap
) -> dict[str, Any]:
    """Every figure of one kind of confidence, with intervals."""

    def figures(index: np.ndarray) -> dict[str, float | None]:
        return calibration.summary(confidence_N[index], right_N[index], bins=bins)

    curve = {f"{at:g}": calibration.accuracy_at(confidence_N, right_N, at) for at in calibration.COVERAGES}
    return {
        "metrics": figures(np.arange(len(right_N))),
        "intervals": calibration.resampled(figures, groups_N, **_draws(bootstrap)),
        "accuracy_at_coverage": curve,
        "reliability": calibration.reliability(confidence_N, right_N, bins=bins).tolist(),
    }


def _write(
    output: Path, name: str, report: dict[str, Any], told: _Told, answers: Answers, bins: int, bootstrap: Bootstrap
) -> None:
    """NAME.json, NAME.md, NAME.png and NAME.answers.jsonl, in place of earlier ones."""
    report["confidences"] = {
        kind: described(values_N, answers.right_N, answers.groups_N, bins=bins, bootstrap=bootstrap)
        for kind, values_N in told.confidences.items()
    }
    lines = []
    for index, one in enumerate(answers.ids):
        values = {kind: round(float(values_N[index]), 6) for kind, values_N in told.confidences.items()}
        lines.append(json.dumps({"id": one, "right": bool(answers.right_N[index]), **values}) + "\n")
    text = pages.markdown(report)
    png = pages.draw(told.confidences, answers.right_N, bins=bins, title=f"Confidence on {name} ({len(lines)} answers)")
    artifacts.write_text_atomic(output / f"{name}.answers.jsonl", "".join(lines))
    artifacts.write_bytes_atomic(output / f"{name}.png", png)
    artifacts.write_json_atomic(output / f"{name}.json", report)
    artifacts.write_text_atomic(output / f"{name}.md", text)
    print(text)
    print(f"report: {output / f'{name}.md'}")


if __name__ == "__main__":
    main()
