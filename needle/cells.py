"""How the cells of experiments stand on disk: which are finished, what they will cost, and what came of them.

A cell is known by needle.runs.identity. Its run is a training run's folder like any other; runs/cells/ holds what has
no run folder to lie in: the locks of cells that are running, and the errors of those that failed.
"""

import csv
import datetime
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from needle import artifacts
from needle.metrics.matching import METRICS
from needle.runs import Run
from needle.scores import TrainingRun, read_score, score_path

# Of the teacher-forced pass over the validation requests at the end of training, as history.jsonl has it.
VALIDATION = ("val/label_nats", "val/token_exact_frac", "val/call_forced_exact_frac")
FINISHED, RUNNING, FAILED, STOPPED, NEW = KINDS = ("finished", "running", "failed", "stopped", "new")


@dataclass(frozen=True)
class State:
    """`run`: the folder of the finished run, or of the one to continue. `error`: the last line of why it failed."""

    kind: str
    run: Path | None = None
    error: str = ""

    @property
    def can_continue(self) -> bool:
        return self.run is not None and any((self.run / "checkpoints").glob("*.ckpt"))


class Standing:
    """Every training run under `root` by identity, read once. Runs from a dirty tree count with `allow_dirty` alone."""

    def __init__(self, root: Path, *, allow_dirty: bool):
        self.root = Path(root)
        self.runs: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
        for path in sorted(self.root.glob("train/*/run.json")):
            try:
                record = json.loads(path.read_text("utf-8"))
            except (OSError, ValueError):
                continue  # being written, or damaged: as if it were not there
            if allow_dirty or not record.get("dirty"):
                self.runs.setdefault(record.get("identity", ""), []).append((path.parent, record))

    def of(self, identity: str, *, locked: bool = False) -> State:
        """`locked`: the caller holds the cell's lock, so nobody else runs it."""
        runs = sorted(self.runs.get(identity, []), key=lambda one: one[1].get("started_utc") or "")
        finished = [folder for folder, record in runs if record.get("status") == "finished"]
        if finished:
            return State(FINISHED, finished[-1])
        if not locked:
            with artifacts.locked(lock_path(self.root, identity), wait=False) as free:
                if not free:
                    return State(RUNNING)
        stopped = [folder for folder, _ in runs]  # or failed, which may have been a full disk: it goes on likewise
        failure = failure_path(self.root, identity)
        if failure.is_file() and not locked:
            told = json.loads(failure.read_text("utf-8"))["error"].strip().splitlines() or ["unknown"]
            return State(FAILED, stopped[-1] if stopped else None, told[-1])
        return State(STOPPED, stopped[-1]) if stopped else State(NEW)


def lock_path(root: Path, identity: str) -> Path:
    return Path(root) / "cells" / f"{identity}.lock"


def failure_path(root: Path, identity: str) -> Path:
    return Path(root) / "cells" / f"{identity}.failed.json"


def record_failure(root: Path, identity: str, *, arm: str | None, seed: int, error: str) -> None:
    """Kept until the cell is finished: a finished run outweighs it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    artifacts.write_json_atomic(
        failure_path(root, identity),
        {"identity": identity, "arm": arm, "seed": seed, "error": error, "at_utc": now, **artifacts.source_state()},
    )


@dataclass(frozen=True)
class Cost:
    """What cells will take; None where nothing is known yet: shards that are not built, sizes that never ran."""

    tokens: int | None
    hours: float | None

    @staticmethod
    def of(cells: Sequence[tuple[Mapping[str, Any], Path]], *, runs: Path) -> "Cost":
        speeds = _speeds(runs)
        tokens, hours = [], []
        for cfg, shards in cells:
            count = _tokens(cfg, shards)
            speed = speeds.get(_speed_key(cfg))
            tokens.append(count)
            hours.append(count / speed / 3600 if count and speed else None)
        return Cost(_sum(tokens), _sum(hours))

    def told(self, *, usd_per_hour: float) -> str:
        tokens = "an unknown number of tokens (no shards yet)" if self.tokens is None else f"{self.tokens:,} tokens"
        if self.hours is None:
            return f"{tokens}; hours are not known until a run of each student and loss has finished; nothing is bought"
        dollars = f", {self.hours * usd_per_hour:.2f} USD at {usd_per_hour:g} an hour" if usd_per_hour else ""
        return f"{tokens}, about {self.hours:.1f} hours of one worker{dollars}; nothing is bought"


def _sum(values: Sequence[Any]) -> Any:
    return None if any(value is None for value in values) else sum(values)


def _tokens(cfg: Mapping[str, Any], shards: Path) -> int | None:
    """Steps times the mean tokens of the rows of a step."""
    try:
        counts = json.loads((shards / "manifest.json").read_text("utf-8"))["counts"]["train"]
    except OSError:
        return None
    packing = cfg["data"]["packing"]
    row = packing["source_row_tokens"] + packing["target_row_tokens"]
    filled = 1 - counts["padding_frac"]["all"]
    return round(cfg["trainer"]["steps"] * cfg["trainer"]["rows_per_batch"] * row * filled)


def _speed_key(cfg: Mapping[str, Any]) -> tuple[Any, ...]:
    return cfg["student"].get("name"), cfg["trainer"]["accelerator"], cfg["loss"]["_target_"]


def _speeds(runs: Path) -> dict[tuple[Any, ...], float]:
    """Median tokens a second, scoring included, of the finished runs of each student and loss."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for path in Path(runs).glob("train/*/run.json"):
        try:
            run = TrainingRun.open(path.parent)
            started, ended = (datetime.datetime.fromisoformat(run.record[k]) for k in ("started_utc", "finished_utc"))
        except Exception:
            continue  # unfinished, or not readable: it tells no speed
        tokens, seconds = run.facts.get("tokens"), (ended - started).total_seconds()
        if run.finished and tokens and seconds > 0 and not run.record.get("resumed"):
            found.setdefault(_speed_key(run.config), []).append(tokens / seconds)
    return {key: statistics.median(values) for key, values in found.items()}


def _last_validation(folder: Path) -> dict[str, str]:
    records = [r for r in Run(folder).history() if "val/label_nats" in r]
    return {name: f"{records[-1][name]:.6f}" for name in VALIDATION} if records else {}


def write_cells_csv(path: Path, rows: Sequence[tuple[str, Mapping[str, Any], Path]], *, suites: Sequence[str]) -> None:
    """One line a cell and suite, each metric a column: what tables are rebuilt from, seed by seed. No time in it."""
    keys = list(rows[0][1])
    stream = io.StringIO()
    writer = csv.DictWriter(
        stream,
        ["arm", *keys, "suite", "n", "parameters", "tokens", "identity", "commit", *METRICS],
        lineterminator="\n",
    )
    writer.writeheader()
    for arm, point, folder in rows:
        run = TrainingRun.open(folder)
        validated = _last_validation(folder)
        for suite in suites:
            score = read_score(score_path(folder, checkpoint="final", name=suite))
            if score is None:
                continue
            values = {name: f"{value:.6f}" for name, value in score["metrics"].items() if value is not None}
            facts = {name: run.facts.get(name) for name in ("parameters", "tokens")}
            commit = str(run.record.get("commit"))[:10]
            head = {"arm": arm, **point, "suite": suite, "n": score["n"], **facts}
            writer.writerow({**head, "identity": run.record["identity"], "commit": commit, **values, **validated})
    artifacts.write_text_atomic(path, stream.getvalue())
