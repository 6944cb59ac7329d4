"""Score files: which runs can have them, where they lie in a run's folder, and how they are read back.

    RUN/scores/final_validation.json             totals: metrics, groups, speed, and the hashes of what was scored
    RUN/scores/final_validation.examples.jsonl   one line an example: the answer and its counts, for pairing runs

An unconstrained or a shortened scoring has a name of its own (`validation_free`, `validation_limit100`), so it never
replaces a full one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import yaml

from needle.errors import DataError
from needle.schema import EVALUATION_SPLITS, SPLITS

SCORE_VERSION = 1
CHECKPOINTS = {"final": "model", "initial": "initial"}  # checkpoint -> the folder inside a run that holds it


@dataclass(frozen=True)
class TrainingRun:
    """A training run as it lies on disk: `record` is run.json, `config` the resolved configuration."""

    folder: Path
    record: dict[str, Any]
    config: dict[str, Any]

    @staticmethod
    def open(folder: Path) -> "TrainingRun":
        """Raises DataError when the folder is no training run's."""
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            why = "holds no run.json" if folder.is_dir() else "does not exist"
            raise DataError(f"{folder} is not a run's folder: it {why}; name a folder such as runs/train/NAME")
        try:
            record = json.loads((folder / "run.json").read_text("utf-8"))
            config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(f"{folder}: cannot read its run.json and config.yaml: {error}") from error
        if record.get("stage") != "train":
            raise DataError(f"{folder} is a run of stage {record.get('stage')!r}; only training runs have a student")
        return TrainingRun(folder, record, config or {})

    @property
    def finished(self) -> bool:
        return self.record.get("status") == "finished"

    @property
    def facts(self) -> dict[str, Any]:
        return self.record.get("facts", {})


def select_runs(wanted: str | Sequence[str] | None, *, root: Path) -> list[TrainingRun]:
    """The training runs that are named by folders or glob patterns, or every finished one under `root` for None.

    Raises:
        DataError: a name is no training run's folder, a pattern matches none, or there is no finished run at all.
    """
    if wanted is None:
        found = [TrainingRun.open(path.parent) for path in sorted(Path(root).glob("train/*/run.json"))]
        runs = [run for run in found if run.finished]
        if not runs:
            raise DataError(f"no finished training run under {Path(root) / 'train'}; run: python -m needle.train")
        return runs
    runs = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if not has_magic(name):
            runs.append(TrainingRun.open(Path(name)))
            continue
        matched = [Path(path) for path in sorted(glob(name)) if (Path(path) / "run.json").is_file()]
        if not matched:
            raise DataError(f"no run's folder matches {name}")
        runs += [TrainingRun.open(path) for path in matched]
    by_folder = {run.folder.resolve(): run for run in runs}
    return list(by_folder.values())


def suite_name(wanted: str) -> str:
    """What a suite is called that is asked for as a split or as a path to JSONL; a file that is named like a split gets
    its folder's name as well."""
    path = Path(wanted)
    if wanted in EVALUATION_SPLITS or path.stem not in SPLITS:
        return path.stem
    return f"{path.resolve().parent.name}_{path.stem}"


def score_name(suite: str, *, constrained: bool, limit: int | None) -> str:
    """What a suite's score files are called, and what a report calls the suite."""
    return suite + ("" if constrained else "_free") + ("" if limit is None else f"_limit{limit}")


def score_path(run_folder: Path, *, checkpoint: str, name: str) -> Path:
    return Path(run_folder) / "scores" / f"{checkpoint}_{name}.json"


def answers_path(score: Path) -> Path:
    return score.with_name(score.name.removesuffix(".json") + ".examples.jsonl")


def read_score(path: Path) -> dict[str, Any] | None:
    """The totals, or None when this was never scored.

    Raises:
        DataError: the file is damaged or of another version.
    """
    if not path.is_file():
        return None
    try:
        score = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run needle.score again") from error
    if score.get("schema_version") != SCORE_VERSION:
        raise DataError(f"{path} has version {score.get('schema_version')}, not {SCORE_VERSION}; score the run again")
    return score


def by_suite(score: Mapping[str, Any]) -> dict[str, float]:
    """`SUITE/METRIC` -> value, of a score's totals."""
    return {f"{score['suite']}/{metric}": value for metric, value in score["metrics"].items() if value is not None}


def read_answers(score: Path) -> list[dict[str, Any]]:
    """One record an example, in the suite's order."""
    path = answers_path(score)
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; delete {score.name} and run needle.score again") from error
