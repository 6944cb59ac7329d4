"""What the notebooks in notebooks/ do beside looking: find the repository, run stages, say what there is to see."""

import contextlib
import importlib
import io
import logging
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from needle import config
from needle.errors import DataError
from needle.experiment import Sweep
from needle.reporting import answers, figures, portrait, published
from needle.reporting.compare import bootstrap_differences
from needle.reporting.pictures import Picture
from needle.reporting.published import RawTable
from needle.reporting.tables import points
from needle.runs import Run
from needle.scores import TrainingRun

# Said when a library is imported in a notebook without widgets: its bars are not shown at all.
warnings.filterwarnings("ignore", message="IProgress not found")
LAST_LINES = 12
PLACES = 3


def begin() -> Path:
    """Makes the repository's root the working folder, wherever the notebook was opened, and tables readable. Returns
    the root as `.`, so that no machine's path gets into the outputs."""
    os.chdir(config.CONF.parent)
    pd.set_option("display.max_colwidth", 300, "display.max_rows", 60, "display.precision", PLACES)
    return Path()


def settings(stage: str, *overrides: str) -> dict[str, Any]:
    """What `python -m needle.STAGE OVERRIDES` would be given, built.

    Raises:
        ConfigError: with every problem of it.
    """
    cfg, runtime = config.compose(stage, overrides)
    _, built = config.prepared(cfg, _function(stage), runtime=runtime)
    return built


def _function(stage: str) -> Any:
    return importlib.import_module(f"needle.{stage}").main.stage_function


def run(stage: str, *overrides: str, lines: int = LAST_LINES) -> None:
    """`python -m needle.STAGE OVERRIDES` in this process: shows the command and the last lines that it prints.

    Raises:
        UserError: what the command line would have said.
        DataError: lines of predictions have errors.
    """
    print("$", shlex.join(["python", "-m", f"needle.{stage}", *overrides]))
    cfg, runtime = config.compose(stage, overrides)
    function = _function(stage)
    whole, built = config.prepared(cfg, function, runtime=runtime)
    told, progress = io.StringIO(), io.StringIO()
    logging.disable(logging.INFO)  # libraries' remarks about themselves
    try:
        # Progress goes to standard error, where it is of no use once it is over.
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(progress):
            function(whole, **built)
    except SystemExit as error:
        raise DataError(f"needle.{stage}: {progress.getvalue().strip() or error}") from error
    finally:
        logging.disable(logging.NOTSET)
    said = told.getvalue().rstrip().splitlines()
    for line in said[max(0, len(said) - lines) :]:
        print(line)


def newest_run(runs: Path) -> TrainingRun:
    """Raises DataError where no training run lies under this folder of runs."""
    folders = [path.parent for path in Path(runs).glob("train/*/run.json")]
    if not folders:
        raise DataError(f"no training run under {Path(runs) / 'train'}")
    return max(map(TrainingRun.open, folders), key=lambda run: str(run.record.get("started_utc")))


def history(run: TrainingRun) -> list[dict[str, Any]]:
    return Run(run.folder).history()


def question(experiment: str) -> str:
    """What it asks and how that is decided; empty where it has no file in conf/experiment."""
    if not (config.CONF / "experiment" / f"{experiment}.yaml").is_file():
        return ""
    return (sweep_of(experiment).question or "").strip()


def report_pictures(raw: RawTable, *, suite: str) -> list[Picture]:
    """The figures of needle.report on a suite, drawn again from the run folders."""
    confidence_frac = config.compose("report", [])[0].bootstrap.confidence_frac
    drawn = figures.draw(raw.settings[suite], raw.headline(suite), suite=suite, confidence_frac=confidence_frac)
    return [Picture(png) for png in drawn.values()]


def before_and_after(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """The difference in whole answers with its interval over resampled examples (conf/report.yaml), in a sentence."""
    bootstrap = config.build(config.compose("report", [])[0].bootstrap)
    counts = before.set_index("id")["exact"].astype(float), after.set_index("id")["exact"].astype(float)
    right_S2MN = np.stack([counts[1], counts[0].reindex(counts[1].index)])[None, :, None, :]
    drawn_KM = bootstrap_differences(
        right_S2MN, np.ones_like(right_S2MN), resamples=bootstrap.resamples, seed=bootstrap.seed
    )
    tail = (1 - bootstrap.confidence_frac) / 2
    low, high = np.quantile(drawn_KM[:, 0], [tail, 1 - tail])
    earlier, later = (100 * one.mean() for one in counts)
    return (
        f"Whole answers right on {len(after)} held-out requests: {earlier:.1f} % before, {later:.1f} % after; "
        f"{points(later / 100 - earlier / 100)} points, {100 * bootstrap.confidence_frac:g} % interval over requests "
        f"{points(low)} to {points(high)}. One seed: nothing is said of others."
    )


@dataclass(frozen=True)
class Source:
    """Answers to look at, and a sentence on whose they are."""

    told: str
    answers: pd.DataFrame


def answers_of(
    experiment: str, *, runs: Sequence[Path], suite: str, students: Mapping[str, str], sample: int, data: Sequence[str]
) -> Source:
    """The answers of an experiment's runs where they lie under one of these folders of runs, else those of published
    students, asked here.

    Args:
        experiment: its name; with published cells their runs alone are taken, else every finished run of that name.
        students: name -> folder, to be asked otherwise.
        sample: how many requests they are asked.
        data: overrides of needle.prepare: the slice and the evaluation settings under which they are asked.
    """
    found = _runs_of(experiment, runs)
    if found:
        told = f"{len(found)} runs of {experiment}, all their answers to {suite}."
        return Source(told, answers.of_runs(found, suite=suite, checkpoint="final"))
    chosen = settings("prepare", *data)["data"]
    examples = portrait.shown(portrait.load(chosen), chosen, split=suite, count=sample)
    told = (
        f"No run of {experiment} lies here (`make sweep EXP={experiment}` makes them), so published students were "
        f"asked {len(examples)} requests of {suite} just now: {', '.join(students)}."
    )
    score, _ = config.compose("score", [])
    limits = {name: score[name] for name in ("batch_size", "max_new_tokens", "max_calls")}
    return Source(told, answers.live({name: Path(folder) for name, folder in students.items()}, examples, **limits))


def _runs_of(experiment: str, roots: Sequence[Path]) -> list[TrainingRun]:
    if experiment in published.names():
        return published.raw_runs(published.read(experiment), roots)[0]
    return [
        run
        for run in published.training_runs(roots)
        if experiment in (run.config.get("name"), run.record.get("choices", {}).get("experiment"))
    ]


def standing(root: Path = published.EXPERIMENTS) -> pd.DataFrame:
    """Every comparison of conf/experiment with its question, and whether its table is published."""
    lines = []
    for path in sorted((config.CONF / "experiment").glob("[0-9]*.yaml")):
        sweep = sweep_of(path.stem)
        if sweep.arms and sweep.question:
            is_there = path.stem in published.names(root)
            lines.append((path.stem, len(sweep.arms), "yes" if is_there else "missing", sweep.question.strip()))
    return pd.DataFrame(lines, columns=["experiment", "arms", "published", "question"]).set_index("experiment")


def sweep_of(experiment: str) -> Sweep:
    cfg, _ = config.compose("train", [f"experiment={experiment}"])
    return config.build(cfg.sweep)
