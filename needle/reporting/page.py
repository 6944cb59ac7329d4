"""The comparison as one HTML page that needs nothing but itself: figures are embedded, styles are in it."""

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from needle.reporting import tables
from needle.reporting.collect import Collection, ScoredRun, Setting
from needle.reporting.compare import Row
from needle.schema import KINDS

CAPTIONS = {
    "differences.png": "Points: mean over paired seeds. Bars: bootstrap interval. Grey: not from a clean tree.",
    "learning_curves.png": "Each run's own loss: levels compare only between settings of the same loss. Bold: mean "
    "of the seeds; thin: seeds, where there are few settings. Losses are running means over a twentieth of the log.",
    "by_kind.png": "Bars: mean over seeds. Dots: seeds. Black line: the same students before training.",
    "size.png": "Lines: mean over seeds. Dashes: seeds.",
}


def template(name: str) -> jinja2.Template:
    """A page beside this module. Everything that is put into it is escaped."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(resources.files("needle.reporting").joinpath(name).read_text("utf-8"))


def render(
    collection: Collection,
    rows: Sequence[Row],
    figures: Mapping[str, bytes],
    *,
    suite: str,
    checkpoint: str,
    notices: Sequence[str],
    equality: str,
    method: str,
    examples: int,
    command: str,
) -> str:
    """The page as text; the same for the same inputs.

    Args:
        rows: every setting and metric, the headline metric first.
        figures: file name -> PNG.
        examples: how many sample answers to show.
        command: the shell command that makes this report.
    """
    metrics = list(dict.fromkeys(row.metric for row in rows))
    headline = [row for row in rows if row.metric == metrics[0]]
    settings = collection.settings
    return template("page.html").render(
        t=tables,
        title=tables.title(metrics[0]),
        suite=suite,
        checkpoint=checkpoint,
        verdict=verdict(headline),
        notices=notices,
        equality=equality,
        method=method,
        headline=headline,
        baselines={row.difference.baseline for row in headline if row.difference},
        best=best_of(headline),
        every_metric=[
            (tables.title(metric), [tables.percent(row.mean) for row in rows if row.metric == metric])
            for metric in metrics
        ],
        settings=settings,
        factor_names=list(settings[0].factors),
        left_out=collection.left_out,
        figures=[(name, CAPTIONS[name], _data_uri(png)) for name, png in figures.items()],
        samples=samples(settings, examples),
        examples_rule=examples_rule(examples),
        reproduce=reproduce(settings),
        command=command,
        hardware=hardware(settings),
    )


def best_of(headline: Sequence[Row]) -> Row | None:
    """The row with the highest mean, of those that are results if there are any."""
    ranked = [row for row in headline if row.mean is not None]
    clean = [row for row in ranked if row.setting.is_clean]
    return max(clean or ranked, key=lambda row: row.mean, default=None)


def verdict(headline: Sequence[Row]) -> str:
    """The best setting in a sentence, and whether its difference is told apart from zero."""
    best = best_of(headline)
    if best is None:
        return "Nothing to compare: no setting has a value."
    seeds = len(best.setting.runs)
    text = f"Highest: {best.setting.label}, {tables.percent(best.mean)} % over {seeds} seed{'s' if seeds > 1 else ''}"
    if best.difference is None:
        return text + "."
    one = best.difference
    apart = "the interval excludes zero" if one.low > 0 or one.high < 0 else "the interval includes zero"
    return f"{text}, {tables.difference_text(best)} points from {one.baseline}: {apart}."


def examples_rule(count: int) -> str:
    return (
        f"{count} examples, one kind of request after the other in turn, within a kind in the order of the SHA-1 of "
        "their ids: no one picked them. Each setting answers with its lowest seed."
    )


def samples(settings: Sequence[Setting], count: int) -> list[dict[str, Any]]:
    """The examples of `examples_rule` that every shown student answered, with all answers."""
    students = [(setting, setting.runs[0]) for setting in settings]
    ids = set.intersection(*(set(run.answers) for _, run in students))
    by_kind: dict[str, list[str]] = {}
    for one in sorted(ids, key=lambda name: hashlib.sha1(name.encode()).hexdigest()):
        by_kind.setdefault(students[0][1].answers[one]["kind"], []).append(one)
    chosen: list[str] = []
    queues = [by_kind[kind] for kind in KINDS if kind in by_kind]
    while len(chosen) < count and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue][: count - len(chosen)]
    return [_sample(one, students) for one in chosen]


def _sample(name: str, students: Sequence[tuple[Setting, ScoredRun]]) -> dict[str, Any]:
    record = students[0][1].answers[name]
    answers = []
    before = next((run for _, run in students if name in run.initial_answers), None)
    if before is not None:
        answers.append(("before training", *_shown(before.initial_answers[name])))
    answers += [(setting.label, *_shown(run.answers[name])) for setting, run in students]
    return {
        "query": record["query"],
        "kind": record["kind"].replace("_", " "),
        "domain": record["domain"].replace("_", " "),
        "n_tools": record["n_tools"],
        "gold": calls_text(record["gold"]),
        "answers": answers,
    }


def _shown(record: Mapping[str, Any]) -> tuple[str, bool]:
    if record["calls"] is not None and record["error"] is None:
        return calls_text(record["calls"]), record["exact"]
    return f"{record['text'][:300]} ({record['error'] or 'not a list of calls'})".strip(), record["exact"]


def calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """`name(key: value, ...)`, a line a call; `no call` for none."""
    if not calls:
        return "no call"
    return "\n".join(
        f"{call['name']}({', '.join(f'{key}: {_value(value)}' for key, value in call['arguments'].items())})"
        for call in calls
    )


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def reproduce(settings: Sequence[Setting]) -> list[dict[str, str]]:
    """The commit and the training command of every run."""
    return [
        {
            "folder": run.run.folder.name,
            "commit": run.commit + (" + uncommitted changes" if run.dirty else ""),
            "command": "python -m needle.train " + " ".join(shlex.quote(one) for one in _overrides(run)),
        }
        for setting in settings
        for run in setting.runs
    ]


def _overrides(run: ScoredRun) -> list[str]:
    given = [str(one) for one in run.run.record.get("overrides", [])]
    return given if any(one.startswith("seed=") for one in given) else [*given, f"seed={run.seed}"]


def hardware(settings: Sequence[Setting]) -> list[dict[str, str]]:
    """One entry for each machine and software environment among the runs, with training and scoring speed."""
    found: dict[str, dict[str, Any]] = {}
    for run in (run for setting in settings for run in setting.runs):
        record = run.run.record
        machine = ", ".join(f"{key} {value}" for key, value in record.get("hardware", {}).items())
        software = ", ".join(f"{key} {value}" for key, value in record.get("environment", {}).items())
        entry = found.setdefault(
            machine + software, {"machine": machine, "software": software, "seconds": 0.0, "runs": 0}
        )
        entry["seconds"] += float(run.run.facts.get("train_seconds") or 0)
        entry["runs"] += 1
    return [{**entry, "hours": f"{entry['seconds'] / 3600:.2f}"} for entry in found.values()]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
