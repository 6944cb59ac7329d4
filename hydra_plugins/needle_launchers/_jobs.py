"""What the launchers share: how a run that failed, or was lost, or was stopped, is told to whoever launched it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import CompactHydraException

from needle.errors import UserError


class LaunchError(UserError, CompactHydraException):
    """A launch that cannot work, or a run of which nothing came back. Hydra, too, tells it without a traceback."""


def failed(overrides: Sequence[str], error: BaseException) -> JobReturn:
    """A result like one of Hydra's own: its `return_value` raises `error`, so that one run's end is not the others'."""
    return JobReturn(overrides=list(overrides), status=JobStatus.FAILED, _return_value=error)


def tell_failures(results: Sequence[JobReturn]) -> None:
    """Names on stderr the runs that did not end well, before Hydra stops at the first of them."""
    bad = [result for result in results if result.status != JobStatus.COMPLETED]
    lines = [f"{len(bad)} of {len(results)} runs did not end well:"] if bad else []
    for result in bad:
        error = result._return_value
        text = f"exit status {error.code}" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        lines.append(f"{' '.join(filter_overrides(result.overrides or ()))}\n    {text}")
    for line in lines:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def stopping(cancel: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C or SIGTERM while runs go on elsewhere: `cancel` ends them, then the interruption goes on its way."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        print("stopping the runs; each writes a checkpoint", file=sys.stderr, flush=True)
        cancel()
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
