"""Compares scored training runs: tables, figures and one page that explains itself.

    python -m needle.report
    python -m needle.report where=[student:san_nano] suite=unseen output=experiments/001_losses

Writes results.csv, results.md, report.html and the figures as PNG; the same run folders give the same files.
A run from a tree with uncommitted changes is shown and is no result: results.csv leaves it out.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from needle import artifacts, config
from needle.reporting import figures, page, tables
from needle.reporting.collect import check_metrics, collect
from needle.reporting.compare import Bootstrap, compare, equality, notices
from needle.runs import EXECUTION, Paths
from needle.scores import TrainingRun, select_runs
from needle.tracking import Tracking

Fraction = Annotated[float, Field(ge=0, le=1)]
FIGURES = ("differences.png", "learning_curves.png", "by_kind.png", "size.png")


@config.stage("report")
def main(
    cfg: dict[str, Any],
    *,
    runs: str | list[str] | None,
    where: list[str],
    baseline: Annotated[list[str], Field(min_length=1)],
    suite: str,
    checkpoint: Literal["final", "initial"],
    metrics: Annotated[list[str], Field(min_length=1)],
    output: Path,
    allow_dirty: bool,
    examples: Annotated[int, Field(ge=0)],
    tokens_tolerance_frac: Fraction,
    bootstrap: Bootstrap,
    ignored: list[str],
    arms: dict[str, str],
    logger: Tracking,
    paths: Paths,
) -> None:
    check_metrics(metrics)
    collection = collect(
        _named(select_runs(runs, root=paths.runs), arms),
        suite=suite,
        checkpoint=checkpoint,
        where=where,
        ignored=[*ignored, *EXECUTION],
        allow_dirty=allow_dirty,
    )
    settings = collection.settings
    rows = compare(settings, metrics=metrics, baseline=baseline, bootstrap=bootstrap)
    head = {"suite": suite, "checkpoint": checkpoint}
    told = {
        "notices": notices(settings, rows, baseline=baseline, tokens_tolerance_frac=tokens_tolerance_frac),
        "equality": equality(settings, tokens_tolerance_frac=tokens_tolerance_frac),
        "method": method(bootstrap),
    }
    headline = [row for row in rows if row.metric == metrics[0]]
    drawn = figures.draw(settings, headline, suite=suite, confidence_frac=bootstrap.confidence_frac)
    published = [row for row in rows if row.setting.is_clean or allow_dirty]
    command = " ".join(["python -m needle.report", *map(shlex.quote, cfg["_overrides_"])])

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        (output / name).unlink(missing_ok=True)
    for name, png in drawn.items():
        (output / name).write_bytes(png)
    artifacts.write_text_atomic(output / "results.csv", tables.results_csv(published, **head))
    markdown = tables.results_markdown(rows, **head, **told)
    artifacts.write_text_atomic(output / "results.md", markdown)
    html = page.render(collection, rows, drawn, **head, **told, examples=examples, command=command)
    artifacts.write_text_atomic(output / "report.html", html)
    compared = [(one.run.folder, one.run.config, one.score_file) for setting in settings for one in setting.runs]
    logger.report(output, compared, root=paths.runs)
    print(page.verdict(headline))
    for notice in told["notices"]:
        print(f"  {notice}")
    print(f"report: {output / 'report.html'}")


def _named(runs: Sequence[TrainingRun], arms: Mapping[str, str]) -> list[TrainingRun]:
    """The runs under the names that an experiment has for them: one run may be an arm of two experiments."""
    return [
        replace(run, config={**run.config, "arm": arms.get(str(run.folder), run.config.get("arm"))}) for run in runs
    ]


def method(bootstrap: Bootstrap) -> str:
    """How the numbers of the tables came about, for their readers."""
    return (
        "Difference: mean over the seeds that both settings have, on the same examples, in percentage points. "
        f"Interval: {100 * bootstrap.confidence_frac:g} % percentile bootstrap, {bootstrap.resamples:,} resamples of "
        "examples and, with two paired seeds or more, of seeds. With one seed it says nothing about other seeds."
    )


if __name__ == "__main__":
    main()
