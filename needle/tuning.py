"""What a search for settings is made of: the axes of its space, and the watch over a trial that may be stopped early.

python -m needle.tune runs it; conf/space holds the spaces.
"""

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

from optuna.pruners import BasePruner, NopPruner, PercentilePruner
from optuna.trial import Trial
from pydantic import Field

from needle.errors import ConfigError
from needle.runs import Run

POLL_S = 1.0


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, to four significant digits; every setting in `keys` gets the same one."""

    keys: tuple[str, ...]
    low: float
    high: float
    scale: Literal["log", "linear"]

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("keys=[]: name at least one setting, such as optim.adamw_lr")
        if not self.low < self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low={self.low}: a logarithmic scale starts above 0; raise it, or set scale=linear")

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def suggested(self, trial: Trial, name: str) -> float:
        return float(f"{trial.suggest_float(name, self.low, self.high, log=self.scale == 'log'):.4g}")


@dataclass(frozen=True)
class Choice:
    """One of `values`; every setting in `keys` gets the same one. A whole group may be such a setting: keys: [loss]."""

    keys: tuple[str, ...]
    values: tuple[str | int | float | bool | None, ...]

    def __post_init__(self) -> None:
        if not self.keys or len(self.values) < 2:
            raise ValueError(f"keys={list(self.keys)}, values={list(self.values)}: a choice needs a key and two values")

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.values

    def holds(self, value: Any) -> bool:
        return value in self.values

    def suggested(self, trial: Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)


Axis = Range | Choice


def overrides_of(axis: Axis, value: Any) -> list[str]:
    """The value as needle.train's command line takes it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return [f"{key}={text}" for key in axis.keys]


@dataclass(frozen=True)
class Pruning:
    """conf/tune.yaml, `pruning`."""

    keep_frac: Annotated[float, Field(gt=0, le=1)]
    after_trials: Annotated[int, Field(ge=1)]
    after_step: Annotated[int, Field(ge=0)]

    def pruner(self) -> BasePruner:
        if self.keep_frac == 1:
            return NopPruner()
        steps, trials = self.after_step, self.after_trials
        return PercentilePruner(100 * self.keep_frac, n_startup_trials=trials, n_warmup_steps=steps)


def validations(folder: Path, objective: str) -> list[tuple[int, float]]:
    """Step and value of every validation of a run, in order.

    Raises:
        ConfigError: validations do not measure that.
    """
    found = []
    for record in Run(folder).history():
        measured = [key for key in record if key.startswith("val/")]
        if measured and objective not in record:
            raise ConfigError(f"objective={objective}: a validation measures {', '.join(sorted(measured))}")
        if measured:
            found.append((record["step"], record[objective]))
    return found


class Watch:
    """Reports a run's validations to its trial while it trains; once the trial is to be pruned, stops the training as
    Ctrl-C would, in a thread of its own.

    `told_through` goes over them once more when the training is over, so that whether a trial is pruned hangs on its
    values and not on how often they were looked at.
    """

    def __init__(self, trial: Trial, *, objective: str, find: Callable[[], Path | None], poll_s: float = POLL_S):
        self.pruned = False
        self.folder: Path | None = None  # once `find` has found it
        self._trial, self._objective, self._find, self._poll_s = trial, objective, find, poll_s
        # A trial that a killed process left has some of them already.
        self._reported = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Ends the interruption that the watch itself caused."""
        self._end()
        return self.pruned and isinstance(error, KeyboardInterrupt)

    def told_through(self, folder: Path) -> bool:
        """Whether the trial is pruned, after every validation of the run."""
        for step, value in validations(folder, self._objective):
            if self.pruned:
                break
            self._tell(step, value)
        return self.pruned

    def _end(self) -> None:
        self._over.set()
        try:
            self._thread.join()
        except KeyboardInterrupt:  # the watch's own, on its way when the training ended by itself
            if not self.pruned:
                raise

    def _tell(self, step: int, value: float) -> None:
        if step not in self._reported and math.isfinite(value):
            self._reported.add(step)
            self._trial.report(value, step)
            self.pruned = bool(self._trial.should_prune())

    def _run(self) -> None:
        while not self._over.wait(self._poll_s):
            self.folder = self._find()
            if self.folder is None:
                continue
            try:
                pruned = self.told_through(self.folder)
            except ConfigError:
                return  # told when the training is over
            if pruned:
                os.kill(os.getpid(), signal.SIGINT)
                return


def draw(space: Mapping[str, Axis], trial: Trial) -> dict[str, Any]:
    """The trial's value on each axis; a trial that has been drawn before has the same again."""
    return {name: axis.suggested(trial, name) for name, axis in space.items()}
