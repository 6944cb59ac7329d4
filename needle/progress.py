"""Progress with an estimate of the time left: a live bar on a terminal, a line every tenth elsewhere (logs, CI)."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from needle.console import is_quiet


class Progress:
    """`with Progress("scores") as progress: progress.update(done, total, "loss 0.41")`. Writes to standard error."""

    def __init__(self, title: str):
        self.title = title
        self._bar: RichProgress | None = None
        self._printed = 0
        self._first: tuple[float, int] | None = None
        self._silent = False

    def __enter__(self) -> "Progress":
        self._silent = is_quiet()
        if sys.stderr.isatty() and not self._silent:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.title, total=None, note="")
            self._bar.start()
        return self

    def update(self, done: int, total: int, note: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
            return
        if self._silent:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        tenth = 10 * done // max(total, 1)
        if tenth > self._printed or (done >= total > 0 and self._printed < 10):
            self._printed = tenth
            started, at = self._first
            # Nothing can be estimated from the first update, with which a resumed run begins anywhere.
            left_s = (now - started) / max(done - at, 1) * (total - done)
            left = f", {left_s:.0f} s left" if done > at or done >= total else ""
            print(f"{self.title}: {done}/{total}{left} {note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
