"""How the cells of experiments stand on disk: which are finished, what they will cost, and what came of them.

A cell is known by needle.runs.identity. Its run is a training run's folder like any other; runs/cells/ holds what has
no run folder to lie in: the locks of cells that are running, the errors of those that failed, and what a cell last told
of itself.
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
from needle.console import duration
from needle.experiment import HEADLINE
from needle.metrics.matching import METRICS
from needle.runs import Run
from needle.scores import TrainingRun, read_score, score_path, suite_name

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
    def is_trained(self) -> bool:
        return self.run is not None and Run(self.run).record["status"] == "finished"

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

    def of(self, identity: str, *, suites: Sequence[str] = (), locked: bool = False) -> State:
        """A run that is trained, and not scored on all of `suites`, has stopped before its end.

        Args:
            locked: the caller holds the cell's lock, so nobody else runs it.
        """
        runs = sorted(self.runs.get(identity, []), key=lambda one: one[1].get("started_utc") or "")
        trained = [folder for folder, record in runs if record.get("status") == "finished"]
        finished = [folder for folder in trained if is_scored(folder, suites)]
        if finished:
            return State(FINISHED, finished[-1])
        if not locked:
            with artifacts.locked(lock_path(self.root, identity), wait=False) as free:
                if not free:
                    return State(RUNNING)
        # Or failed, which may have been a full disk: it goes on likewise.
        stopped = trained or [folder for folder, _ in runs]
        failure = failure_path(self.root, identity)
        if failure.is_file() and not locked:
            told = json.loads(failure.read_text("utf-8"))["error"].strip().splitlines() or ["unknown"]
            return State(FAILED, stopped[-1] if stopped else None, told[-1])
        return State(STOPPED, stopped[-1]) if stopped else State(NEW)


def is_scored(folder: Path, suites: Sequence[str]) -> bool:
    paths = [score_path(folder, checkpoint="final", name=suite_name(suite)) for suite in suites]
    return all(path.is_file() for path in paths)


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
class Told:
    """What a cell last said of itself, from whatever process or machine it runs on: `kind` is one of KINDS. `result`:
    the headline of a finished one; `seconds`: how long it ran, this time; `error`: of a failed one, its last line."""

    kind: str
    result: str = ""
    seconds: float = 0.0
    error: str = ""


def told_path(root: Path, identity: str) -> Path:
    return Path(root) / "cells" / f"{identity}.told.json"


def tell(root: Path, identity: str, told: Told) -> None:
    """For needle.watch, which reads it while the cell runs."""
    artifacts.write_json_atomic(told_path(root, identity), told)


def headline(folder: Path, suites: Sequence[str]) -> str:
    """A finished run in two words, such as `24.1% unseen`: its whole answers on the first suite."""
    name = suite_name(suites[0]) if suites else None
    score = read_score(score_path(folder, checkpoint="final", name=name)) if name else None
    value = score["metrics"].get(HEADLINE) if score else None
    return f"{100 * value:.1f}% {name}" if value is not None else "not scored"


@dataclass(frozen=True)
class Pace:
    """How fast a finished run was: tokens a second of its training, and the seconds that it took besides, which are
    those of scoring and of the start."""

    exact: str
    alike: str
    suites: tuple[str, ...]
    tokens_per_s: float
    other_s: float


@dataclass(frozen=True)
class Cost:
    """What cells will take, by the runs that are finished here. `tokens` is None until the shards are built; `unknown`
    counts the cells of whose student no run is finished, which `seconds` leaves out."""

    cells: int
    tokens: int | None
    seconds: float
    unknown: int

    @staticmethod
    def of(cells: Sequence[tuple[Mapping[str, Any], Path]], *, runs: Sequence[Path]) -> "Cost":
        """`cells`: settings and shards of each. `runs`: folders of runs to learn from."""
        paces = [pace for root in runs for pace in _paces(root)]
        tokens = [_tokens(cfg, shards) for cfg, shards in cells]
        seconds = [_seconds(cfg, count, paces) for (cfg, _), count in zip(cells, tokens, strict=True)]
        known = [one for one in seconds if one is not None]
        total = None if None in tokens else sum(count for count in tokens if count is not None)
        return Cost(len(cells), total, sum(known), len(cells) - len(known))

    def told(self, *, usd_per_hour: float) -> str:
        tokens = "tokens not known before the shards are built" if self.tokens is None else f"{self.tokens:,} tokens"
        if self.unknown == self.cells > 0:
            return f"{tokens}; hours not known until a run of each student is finished; {NO_PURCHASE}"
        told = f"{tokens}, about {duration(self.seconds)} of one worker"
        if usd_per_hour:
            told += f", {self.seconds / 3600 * usd_per_hour:.2f} USD of machine time at {usd_per_hour:g} an hour"
        if self.unknown:
            told += f", and {self.unknown} cells of students of which no run is finished"
        return f"{told}; {NO_PURCHASE}"


NO_PURCHASE = "no teacher is asked, so no answer is bought"


def _seconds(cfg: Mapping[str, Any], tokens: int | None, paces: Sequence[Pace]) -> float | None:
    """By runs of the same network, loss and quantisation; failing that, of the same network with any loss."""
    exact, alike = _pace_keys(cfg)
    like = [one for one in paces if one.exact == exact] or [one for one in paces if one.alike == alike]
    if not like or tokens is None:
        return None
    suites = tuple(cfg["suites"])
    scored = [one for one in like if one.suites == suites] or like
    speed = statistics.median(one.tokens_per_s for one in like)
    return tokens / speed + statistics.median(one.other_s for one in scored)


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


def _pace_keys(cfg: Mapping[str, Any]) -> tuple[str, str]:
    """What a run's speed depends on: all that we know of, and the network and its device alone."""
    trainer, loss = cfg["trainer"], cfg["loss"]
    device = [trainer[key] for key in ("accelerator", "devices", "compile", "precision")]
    parts = [loss["_target_"], loss.get("distribution"), cfg["quantisation"]["_target_"], cfg["rollouts"], device]
    student = {key: value for key, value in cfg["student"].items() if key != "name"}
    return artifacts.fingerprint(student=student, parts=parts), artifacts.fingerprint(student=student, device=device)


def _paces(runs: Path) -> list[Pace]:
    found = []
    for path in Path(runs).glob("train/*/run.json"):
        try:
            run = TrainingRun.open(path.parent)
            started, ended = (datetime.datetime.fromisoformat(run.record[k]) for k in ("started_utc", "finished_utc"))
            keys = _pace_keys(run.config)
        except Exception:
            continue  # unfinished, of other code, or not readable: it tells no speed
        tokens, trained_s = run.facts.get("tokens"), run.facts.get("train_seconds")
        # The time between the parts of a run that was continued is nobody's work.
        if run.finished and tokens and trained_s and not run.record.get("resumed"):
            other_s = max((ended - started).total_seconds() - trained_s, 0)
            found.append(Pace(*keys, tuple(run.config["suites"]), tokens / trained_s, other_s))
    return found


def _last_validation(folder: Path) -> dict[str, str]:
    records = [r for r in Run(folder).history() if "val/label_nats" in r]
    return {name: f"{records[-1][name]:.6f}" for name in VALIDATION} if records else {}


def write_cells_csv(path: Path, rows: Sequence[tuple[str, Mapping[str, Any], Path]], *, suites: Sequence[str]) -> None:
    """One line a cell and suite, each metric a column: what tables are rebuilt from, seed by seed. No time in it."""
    keys = list(rows[0][1])
    stream = io.StringIO()
    writer = csv.DictWriter(
        stream,
        ["arm", *keys, "suite", "n", "parameters", "tokens", "identity", "commit", *METRICS, *VALIDATION],
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


def arms_by_identity(path: Path) -> dict[str, str]:
    """Of a cells.csv; empty where there is none."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["identity"]: row["arm"] for row in csv.DictReader(stream)}


def write_times(path: Path, rows: Sequence[tuple[str, Path]]) -> None:
    """How long the cells of each arm took, and on what: for whoever wants to know before running them again."""
    times: dict[str, list[float]] = {}
    hardware: list[Mapping[str, Any]] = []
    for arm, folder in rows:
        record = TrainingRun.open(folder).record
        started, ended = (datetime.datetime.fromisoformat(record[key]) for key in ("started_utc", "finished_utc"))
        if not record.get("resumed"):
            times.setdefault(arm, []).append((ended - started).total_seconds())
        hardware += [record["hardware"]] if record["hardware"] not in hardware else []
    seconds = {arm: statistics.median(values) for arm, values in times.items()}
    artifacts.write_json_atomic(path, {"seconds_per_cell": seconds, "hardware": hardware})
