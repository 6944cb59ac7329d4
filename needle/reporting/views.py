"""What a dashboard shows, defined once. needle.reporting.board draws the views as a local page from run folders,
needle.reporting.workspace tells them to W&B; both take titles, words, panels and keys from here.

A key is spelled as W&B has it: what a run logs (`val/loss_key_nats`), a score (`SUITE/METRIC`), or a key of `BUDGETS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from needle.reporting.figures import FORCED, SPANS
from needle.reporting.tables import title

# What a training may be measured in (needle.budgets) -> the title of its axis.
BUDGETS = {
    "parameters": "parameters of the student",
    "tokens": "tokens seen in training",
    "train_hours": "hours of training",
    "train_flops": "FLOPs of training, estimated",
}


@dataclass(frozen=True)
class Panel:
    """One picture. `lines`: y over x of every run; `points`: a run is a point; `columns`: the last value of every y.

    `y` and `x` are keys; `x` is empty for `columns`.
    """

    kind: Literal["lines", "points", "columns"]
    title: str
    y: tuple[str, ...]
    x: str = ""
    unit: str = ""
    log: bool = False  # of y


@dataclass(frozen=True)
class View:
    """A section of the dashboard; `told` says how to read it."""

    name: str
    title: str
    told: str
    panels: tuple[Panel, ...]


def score_key(suite: str, metric: str) -> str:
    return f"{suite}/{metric}"


def loss_key(split: str, span: str) -> str:
    return f"{split}/loss_{span}_nats"


def views(*, suite: str, metrics: Sequence[str], faults: Sequence[str]) -> tuple[View, ...]:
    """The five views.

    Args:
        suite: whose scores are shown.
        metrics: the columns of the leaderboard; the first is the headline.
        faults: metrics that say what goes wrong: less is better.
    """
    quality = score_key(suite, metrics[0])
    headline = title(metrics[0])
    columns = tuple(score_key(suite, name) for name in metrics)
    losses = [
        Panel("lines", f"{split}: {span}", (loss_key(split, span),), x="tokens", unit="nats a token", log=True)
        for split in ("train", "val")
        for span in SPANS
    ]
    against = {
        key: Panel("points", f"{headline} against {name}", (quality,), x=key, unit="%") for key, name in BUDGETS.items()
    }
    forced = Panel("lines", "whole answers, teacher-forced", (FORCED,), x="tokens", unit="%")
    return (
        View(
            "leaderboard",
            "Leaderboard",
            "A setting is the mean over its seeds. Differences are from the baseline on paired seeds and examples, in "
            "percentage points, with their bootstrap interval.",
            (Panel("columns", f"{headline} on {suite}", columns[:1]), Panel("columns", "every metric", columns)),
        ),
        View(
            "curves",
            "Learning curves by span",
            "Each run's own loss on each part of the answer: levels compare only between settings of the same loss.",
            tuple(losses),
        ),
        View("size", "Size against quality", f"{headline.capitalize()} on {suite}.", (against["parameters"],)),
        View(
            "budget",
            "Budget against quality",
            "Hours are those of the machines that ran it; FLOPs are six for each parameter and token, without the "
            "teacher's.",
            (against["tokens"], against["train_hours"], against["train_flops"], forced),
        ),
        View(
            "faults",
            "What goes wrong",
            "Shares of what each metric counts (needle/metrics/matching.py): less is better.",
            (Panel("columns", "what goes wrong", tuple(score_key(suite, name) for name in faults)),),
        ),
    )
