"""What an experiment compares: conf/experiment/NNN_name.yaml, `sweep`, and the cells that it stands for.

    sweep:
      question: ...
      arms:
        hard_label: [loss=hard_label]
        forward_kl: [loss=forward_kl, optim.muon_lr=0.005]
      grid:
        seed: [1, 2, 3]

is six cells: each arm at each point of the grid. The file's other keys hold for all of them.
"""

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from needle import config
from needle.errors import ConfigError

ONLY_ARM = "all"  # of an experiment without arms
HEADLINE = "call_exact_frac"  # what a cell is told by in a line, on its first suite


@dataclass(frozen=True)
class Sweep:
    """conf/train.yaml, `sweep`."""

    question: str | None
    arms: Mapping[str, tuple[str, ...]]
    grid: Mapping[str, tuple[Any, ...]]
    report: tuple[str, ...]
    fast: tuple[str, ...] = ()  # absent in runs whose settings were written before there was one

    def __post_init__(self) -> None:
        for key, values in self.grid.items():
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"grid.{key}={values!r} is no list of values, such as [1, 2, 3]")
        for arm, overrides in self.arms.items():
            if not isinstance(overrides, list | tuple) or not all(isinstance(one, str) for one in overrides):
                raise ValueError(f"arms.{arm}={overrides!r} is no list of overrides, such as [loss=forward_kl]")
        if not all(isinstance(one, str) and ":" in one for one in self.fast):
            raise ValueError(f"fast={list(self.fast)!r} is no list of conditions, such as ['seed:1']")


@dataclass(frozen=True)
class Cell:
    """One run of an experiment: an arm at a point of the grid."""

    arm: str
    point: Mapping[str, Any]
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join([self.arm, *(f"{key}={_plain(value)}" for key, value in self.point.items())])

    def meets(self, key: str, value: str) -> bool:
        return value == (self.arm if key == "arm" else _plain(self.point[key]))


def known_experiment(name: str | None) -> str:
    """Raises ConfigError where conf/experiment has none of this name."""
    names = sorted(path.stem for path in (config.CONF / "experiment").glob("*.yaml"))
    if name in names:
        return name
    near = difflib.get_close_matches(name or "", names, n=1)
    guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise ConfigError(f"exp={name or 'null'}: name an experiment of conf/experiment; {guess}")


def cells_of(sweep: Sweep) -> list[Cell]:
    """Every cell, point by point, so that a sweep that is stopped early has whole seeds and not whole arms."""
    arms = dict(sweep.arms) or {ONLY_ARM: ()}
    found = []
    for values in itertools.product(*sweep.grid.values()):
        point = dict(zip(sweep.grid, values, strict=True))
        words = tuple(f"{key}={json.dumps(value)}" for key, value in point.items())
        found += [Cell(arm, point, (*overrides, *words, f"arm={arm}")) for arm, overrides in arms.items()]
    return found


def chosen(cells: Sequence[Cell], only: Sequence[str], *, key_name: str = "only") -> list[Cell]:
    """The cells that meet every condition `arm:NAME` or `key:value`; conditions of one key are alternatives.

    Args:
        key_name: the setting that holds the conditions, for messages.

    Raises:
        ConfigError: a condition names no key of the experiment, or a value that no cell has.
    """
    wanted: dict[str, list[str]] = {}
    for condition in only:
        key, separator, value = condition.partition(":")
        keys = ["arm", *cells[0].point]
        if not separator or key not in keys:
            raise ConfigError(f"{key_name}={condition}: a condition is KEY:VALUE, KEY one of {', '.join(keys)}")
        if not any(cell.meets(key, value) for cell in cells):
            there = dict.fromkeys(cell.arm if key == "arm" else _plain(cell.point[key]) for cell in cells)
            raise ConfigError(f"{key_name}={condition}: {key} is one of {', '.join(there)}")
        wanted.setdefault(key, []).append(value)
    return [cell for cell in cells if all(any(cell.meets(k, v) for v in values) for k, values in wanted.items())]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
