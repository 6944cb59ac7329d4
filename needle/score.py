"""Lets trained students answer evaluation suites and counts what is right.

    python -m needle.score                                            every finished training run
    python -m needle.score run=runs/train/NAME suites=[test]
    python -m needle.score run='runs/train/san_nano-*' suites=[my_examples.jsonl] checkpoints=[final]

Writes RUN/scores/CHECKPOINT_SUITE.json and .examples.jsonl (see needle.scores). What was scored before with the same
student, suite and settings is kept, so a killed scoring goes on with the first suite that was not complete.
Cost: a decoder step an answer token and batch; the undecided student of `initial` writes the longest answers.
"""

import difflib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.box import SIMPLE
from rich.table import Table

from needle import artifacts, config
from needle.console import is_quiet, show
from needle.decode import Decoded, Decoder
from needle.errors import ConfigError, DataError
from needle.metrics import matching
from needle.metrics.tool_call import FOLDER as METRIC_FOLDER
from needle.progress import Progress
from needle.runs import Paths
from needle.schema import EVALUATION_SPLITS, Example, read_examples
from needle.scores import (
    CHECKPOINTS,
    SCORE_VERSION,
    TrainingRun,
    answers_path,
    by_suite,
    read_score,
    score_name,
    score_path,
    select_runs,
    suite_name,
)
from needle.student import MODEL_FILES, load
from needle.student.confidence import HEAD_FILES

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Suite:
    """An evaluation suite of one run: `name` names the score files."""

    name: str
    path: Path


@dataclass(frozen=True)
class Settings:
    """What an answer depends on besides the student and the suite."""

    constrained: bool
    limit: int | None
    max_new_tokens: int
    max_calls: int
    matching_version: int


@config.stage("score")
def main(
    cfg: dict[str, Any],
    *,
    run: str | list[str] | None,
    suites: Annotated[list[str], Field(min_length=1)],
    checkpoints: Annotated[list[Literal["final", "initial"]], Field(min_length=1)],
    constrained: bool,
    limit: Count | None,
    max_new_tokens: Count,
    max_calls: Count,
    batch_size: Count,
    device: str,
    threads: Count | None,
    again: bool,
    paths: Paths,
) -> None:
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(constrained, limit, max_new_tokens, max_calls, matching.MATCHING_VERSION)
    runs = select_runs(run, root=paths.runs)
    planned = {one.folder: _suites(one, suites) for one in runs}  # finds every mistake before the first answer
    for one in runs:
        for checkpoint in checkpoints:
            _score_checkpoint(
                one, checkpoint, planned[one.folder], settings, batch_size=batch_size, device=device, again=again
            )
    names = [score_name(suite.name, constrained=constrained, limit=limit) for suite in planned[runs[0].folder]]
    if not is_quiet():
        show(_summary(runs, names))  # a terminal folds the names to keep the numbers whole


def score_run(folder: Path, *, suites: Sequence[str]) -> dict[str, float]:
    """Scores a run's final student under conf/score.yaml's settings, what is scored already excepted.

    Returns:
        `SUITE/METRIC` -> value.

    Raises:
        DataError: a suite is not there.
    """
    wanted = [f"run={json.dumps(str(folder))}", f"suites={json.dumps(list(suites))}", "checkpoints=[final]"]
    cfg, runtime = config.compose("score", [*wanted, "threads=null"])
    whole, built = config.prepared(cfg, main.stage_function, runtime=runtime)
    main.stage_function(whole, **built)
    run = TrainingRun.open(folder)
    found: dict[str, float] = {}
    for suite in _suites(run, suites):
        name = score_name(suite.name, constrained=built["constrained"], limit=built["limit"])
        score = read_score(score_path(folder, checkpoint="final", name=name))
        found |= by_suite(score) if score else {}
    return found


def check_suites(wanted: Sequence[str]) -> None:
    """What can be known of suites before there is a run: raises ConfigError for one that is neither a split nor a
    file."""
    for name in wanted:
        if name not in EVALUATION_SPLITS and not Path(name).is_file():
            near = difflib.get_close_matches(name, EVALUATION_SPLITS, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"suites: {name} is none of {', '.join(EVALUATION_SPLITS)}, and no file{guess}")


def _suites(run: TrainingRun, wanted: Sequence[str]) -> list[Suite]:
    """Raises DataError for a suite that is not there, ConfigError for two of one name."""
    found = []
    for name in wanted:
        if name in EVALUATION_SPLITS:
            shards = run.facts.get("shards")
            if shards is None:
                raise DataError(
                    f"{run.folder} does not record its shards, so suite {name} is unknown; give a path to JSONL"
                )
            suite = Suite(name, Path(shards) / f"{name}.jsonl")
            way_out = "run needle.prepare with this run's data settings again"
        else:
            suite = Suite(suite_name(name), Path(name))
            way_out = f"a suite is one of {', '.join(EVALUATION_SPLITS)}, or a path to JSONL"
        if not suite.path.is_file():
            raise DataError(f"suite {name}: there is no file {suite.path}; {way_out}")
        found.append(suite)
    twice = [name for name, times in Counter(suite.name for suite in found).items() if times > 1]
    if twice:
        raise ConfigError(f"suites: two would be stored as {twice[0]!r}; rename a file or score them one by one")
    return found


def _score_checkpoint(
    run: TrainingRun,
    checkpoint: str,
    suites: Sequence[Suite],
    settings: Settings,
    *,
    batch_size: int,
    device: str,
    again: bool,
) -> None:
    """Scores one student of a run on every suite; loads it only when a suite is not scored yet."""
    folder = run.folder / CHECKPOINTS[checkpoint]
    if not (folder / "model.safetensors").is_file():
        way_out = "checkpoints=[final]" if checkpoint == "initial" else f"python -m needle.train resume={run.folder}"
        raise DataError(f"{run.folder} has no {checkpoint} student ({folder}); {way_out}")
    # The confidence head changes no answer, but how sure each is.
    files = [*MODEL_FILES, *(name for name in HEAD_FILES if (folder / name).is_file())]
    identity = artifacts.fingerprint(**{name: artifacts.hash_file(folder / name) for name in files})
    decoder = None
    for suite in suites:
        inputs = {
            "student": identity,
            "suite": artifacts.hash_file(suite.path),
            "settings": artifacts.fingerprint(**asdict(settings)),
        }
        name = score_name(suite.name, constrained=settings.constrained, limit=settings.limit)
        path = score_path(run.folder, checkpoint=checkpoint, name=name)
        if not again and _same_inputs(path, inputs):
            if not is_quiet():
                print(f"already scored: {path}")
            continue
        if decoder is None:
            model, codec = load(folder)
            limits = {"max_new_tokens": settings.max_new_tokens, "max_calls": settings.max_calls}
            decoder = Decoder(model.to(device), codec, constrained=settings.constrained, **limits)
        with Progress(f"{run.folder.name} {checkpoint} {name}") as progress:
            score, lines = _score_suite(decoder, suite, settings.limit, batch_size, progress)
        head = {"schema_version": SCORE_VERSION, "suite": name, "checkpoint": checkpoint, **asdict(settings)}
        artifacts.write_text_atomic(answers_path(path), lines)
        artifacts.write_json_atomic(path, {**head, **score, "device": device, "inputs": inputs})


def _same_inputs(path: Path, inputs: dict[str, str]) -> bool:
    """Whether a complete score of just this is there; a damaged one is not, and is written anew."""
    try:
        score = read_score(path)
    except DataError as error:
        print(error)
        return False
    return score is not None and score["inputs"] == inputs and answers_path(path).is_file()


def _score_suite(
    decoder: Decoder, suite: Suite, limit: int | None, batch_size: int, progress: Progress
) -> tuple[dict[str, Any], str]:
    """Totals, and the text of the examples file. An example that cannot be answered counts as answered wrongly."""
    examples, skipped = read_examples(suite.path)
    if skipped:
        first = skipped[0]
        reason = f"the first is line {first.line_number}: {first.reason}"
        print(f"{suite.path}: {len(skipped)} unusable lines are not scored; {reason}")
    if limit is not None and limit < len(examples):
        examples = [examples[index * len(examples) // limit] for index in range(limit)]
    started = time.monotonic()
    answers = _answers(decoder, examples, batch_size, progress)
    seconds = time.monotonic() - started
    texts = [_judged_text(answer) for answer in answers]
    totals = _evaluate(texts, examples)
    lines = [_line(example, answer, text) for example, answer, text in zip(examples, answers, texts, strict=True)]
    score = {
        "n": len(examples),
        "skipped_lines": len(skipped),
        "errors": sum(answer.error is not None for answer in answers),
        "error_reasons": dict(sorted(Counter(answer.error for answer in answers if answer.error is not None).items())),
        "seconds": round(seconds, 2),
        "examples_per_s": round(len(examples) / max(seconds, 1e-9), 2),
        "metrics": {name: totals[name] for name in matching.METRICS},
        **{f"by_{group}": totals[f"by_{group}"] for group in matching.GROUPS},
    }
    return score, "".join(lines)


def _answers(decoder: Decoder, examples: Sequence[Example], batch_size: int, progress: Progress) -> list[Decoded]:
    """Every example's answer, in order. Examples of like length are decoded together, which saves padding."""
    order = sorted(range(len(examples)), key=lambda index: _length(examples[index]))
    answers: dict[int, Decoded] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        decoded = decoder.decode([(examples[index].query, examples[index].tools) for index in batch])
        answers.update(zip(batch, decoded, strict=True))
        progress.update(len(answers), len(examples))
    return [answers[index] for index in range(len(examples))]


def _length(example: Example) -> int:
    return len(example.query) + sum(len(tool.description) + len(str(tool.parameters)) for tool in example.tools)


def _judged_text(answer: Decoded) -> str:
    """What the metric reads: the calls, or the text that was not one."""
    if answer.error is None and answer.calls is not None:
        return json.dumps([asdict(call) for call in answer.calls])
    # Text that a limit cut off, or that the decoder refused, is no answer even where it happens to parse.
    return answer.text if matching.parse(answer.text) is None else ""


def _evaluate(texts: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
    import evaluate  # seconds to import

    metric = evaluate.load(str(METRIC_FOLDER), keep_in_memory=True)
    references = [json.dumps(example.to_dict()) for example in examples]
    safe = [_without_surrogates(text) for text in texts]
    return metric.compute(predictions=safe, references=references, group_by=matching.GROUPS) or {}


def _line(example: Example, answer: Decoded, text: str) -> str:
    counts = matching.judge(matching.parse(text), example.calls, example.tools)
    record = {
        "id": example.id,
        "kind": example.kind,
        "domain": example.domain,
        "split": example.split,
        "n_tools": len(example.tools),
        "query": example.query,
        "gold": [asdict(call) for call in example.calls],
        "calls": None if answer.calls is None else [asdict(call) for call in answer.calls],
        "text": answer.text,
        "error": answer.error,
        "confidence": None if answer.confidence is None else round(float(answer.confidence), 6),
        **{name: bool(counts[name]) for name in ("exact", "exact_unordered", "name")},
        "counts": counts,
    }
    return _without_surrogates(json.dumps(record, ensure_ascii=False)) + "\n"


def _without_surrogates(text: str) -> str:
    """Lone surrogates, which an answer's escapes can spell, as escapes again: UTF-8 has no bytes for them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _summary(runs: Sequence[TrainingRun], names: Sequence[str]) -> Table:
    """One row a run and suite: whole answers right before and after training, and what the final student does."""
    table = Table(
        title="Whole answers right before and after training; the rest: after", title_justify="left", box=SIMPLE
    )
    for column in ("run", "suite"):
        table.add_column(column, overflow="fold", min_width=10)
    for column in ("n", "before", "after", "name", "value", "F1", "abstain", "errors", "ex/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        for name in names:
            scores = {c: read_score(score_path(run.folder, checkpoint=c, name=name)) for c in CHECKPOINTS}
            shown = scores["final"] or scores["initial"]
            if shown is None:
                continue
            after = scores["final"]["metrics"] if scores["final"] else {}
            before = scores["initial"]["metrics"] if scores["initial"] else {}
            fractions = (before.get("call_exact_frac"), after.get("call_exact_frac"), after.get("name_frac"))
            fractions += (after.get("value_frac"), after.get("call_f1_frac"), after.get("abstain_recall_frac"))
            table.add_row(
                run.folder.name,
                name,
                str(shown["n"]),
                *("-" if value is None else f"{value:.3f}" for value in fractions),
                str(shown["errors"]),
                f"{shown['examples_per_s']:.1f}",
            )
    return table


if __name__ == "__main__":
    main()
