"""Tells of a sweep's cells while a launcher runs them: a line when a cell starts, and one when it ends.

A cell says how it stands in a file of its own (needle.cells.tell), from whatever process or machine it runs on; the
sweep's process reads these files every POLL_S seconds. Cost: a `stat` for each cell.
"""

import json
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from needle.cells import FAILED, FINISHED, RUNNING, STOPPED, Told
from needle.console import duration

POLL_S = 1.0


@dataclass(frozen=True)
class Watched:
    """A cell that is about to run: its place among all cells of the sweep, and the file in which it tells of itself."""

    number: int
    name: str
    arm: str
    path: Path


class Watch:
    """`with Watch(cells, total=18, finished=3): launch()`. `total` and `finished` count the whole sweep's cells."""

    def __init__(self, watched: Sequence[Watched], *, total: int, finished: int):
        self.watched, self.total, self.finished = watched, total, finished
        self._seen = {one.number: _changed(one.path) for one in watched}  # what an earlier sweep left is no news
        self._since: dict[int, float] = {}
        self._took: dict[str, list[float]] = {}
        self._ended: set[int] = set()
        self._at_once = 1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.poll()

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            self.poll()

    def poll(self) -> None:
        """Prints what is new."""
        news = [(one, told) for one in self.watched if (told := self._news(one)) is not None]
        for one, told in news:
            self._note(one, told)
        self._at_once = max(self._at_once, len(self._since))
        for one, told in sorted(news, key=lambda each: each[1].kind == RUNNING):
            print(f"cell {one.number}/{self.total} {one.name}: {self._words(told)}", flush=True)

    def _news(self, one: Watched) -> Told | None:
        changed = _changed(one.path)
        if changed is None or changed == self._seen[one.number]:
            return None
        self._seen[one.number] = changed
        return Told(**json.loads(one.path.read_text("utf-8")))

    def _note(self, one: Watched, told: Told) -> None:
        if told.kind == RUNNING:
            self._since[one.number] = time.monotonic()
            return
        self._since.pop(one.number, None)
        self._ended.add(one.number)
        if told.kind == FINISHED:
            self.finished += 1
            self._took.setdefault(one.arm, []).append(told.seconds)

    def _words(self, told: Told) -> str:
        if told.kind == RUNNING:
            return "started"
        if told.kind == FAILED:
            return f"failed after {duration(told.seconds)}: {told.error}"
        if told.kind == STOPPED:
            return f"stopped after {duration(told.seconds)}, to go on from its last checkpoint"
        left = self._left_s()
        after = f", about {duration(left)} left" if left else ""
        return f"finished, {told.result}, {duration(told.seconds)}; {self.finished} of {self.total} done{after}"

    def _left_s(self) -> float:
        now = time.monotonic()
        waiting = [one for one in self.watched if one.number not in self._ended]
        left = [(one.arm, now - self._since.get(one.number, now)) for one in waiting]
        return left_s(left, self._took, at_once=self._at_once)


def left_s(left: Sequence[tuple[str, float]], took: Mapping[str, Sequence[float]], *, at_once: int) -> float:
    """Seconds until every cell is through.

    Args:
        left: the arm of each cell that is not, and how many seconds it has run.
        took: arm -> seconds of its finished cells. An arm without one takes what the others took.
        at_once: cells that run side by side.
    """
    usual = statistics.mean([one for values in took.values() for one in values])
    needed = [max((statistics.mean(took[arm]) if took.get(arm) else usual) - ran, 0) for arm, ran in left]
    return max([sum(needed) / max(at_once, 1), *needed]) if needed else 0.0


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
