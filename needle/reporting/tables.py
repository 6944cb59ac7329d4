"""The comparison as results.csv (published, machine-readable) and results.md (read by people). Neither holds a time."""

import csv
import io
from collections.abc import Sequence

from needle.reporting.collect import Setting
from needle.reporting.compare import Row

# Column -> meaning; results.md repeats this under its tables.
COLUMNS = {
    "setting": "the choices that tell the setting from the others",
    "suite": "evaluation examples",
    "checkpoint": "final or initial student",
    "metric": "name in needle.metrics.matching.METRICS",
    "n_seeds": "runs",
    "seeds": "their seeds",
    "n_examples": "examples of the suite",
    "mean": "mean over seeds, 0 to 1",
    "sd": "standard deviation over seeds (n - 1); empty for one seed",
    "initial_mean": "mean before training; empty when not scored",
    "baseline": "setting that the difference is taken from; empty for a baseline",
    "difference": "mean over paired seeds of setting minus baseline, on examples that both answered",
    "ci_low": "lower end of its bootstrap interval",
    "ci_high": "upper end",
    "n_paired_seeds": "seeds that both have",
    "parameters": "of the student",
    "tokens": "seen in training, mean over seeds",
    "commits": "of the runs",
    "dirty": "true: some run had uncommitted changes and this is no result",
    "preliminary": "true: fewer than five seeds",
}


def results_csv(rows: Sequence[Row], *, suite: str, checkpoint: str) -> str:
    """One line a setting and metric, with a header. Rows of dirty settings are the caller's to leave out."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        setting, difference = row.setting, row.difference
        writer.writerow(
            {
                "setting": setting.label,
                "suite": suite,
                "checkpoint": checkpoint,
                "metric": row.metric,
                "n_seeds": len(setting.runs),
                "seeds": " ".join(str(run.seed) for run in setting.runs),
                "n_examples": setting.runs[0].score["n"],
                "mean": _number(row.mean),
                "sd": _number(row.sd),
                "initial_mean": _number(row.initial_mean),
                "baseline": difference.baseline if difference else "",
                "difference": _number(difference and difference.value),
                "ci_low": _number(difference and difference.low),
                "ci_high": _number(difference and difference.high),
                "n_paired_seeds": len(difference.seeds) if difference else "",
                "parameters": setting.parameters,
                "tokens": mean_tokens(setting),
                "commits": " ".join(commits(setting)),
                "dirty": str(not setting.is_clean).lower(),
                "preliminary": str(row.preliminary).lower(),
            }
        )
    return stream.getvalue()


def results_markdown(
    rows: Sequence[Row], *, suite: str, checkpoint: str, notices: Sequence[str], equality: str, method: str
) -> str:
    """The headline table (first metric), the other metrics, and what the columns mean."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    parts = [f"# {title(metrics[0])} on {suite} ({checkpoint} students)"]
    parts += [f"> {notice}" for notice in notices]
    parts += [equality] if equality else []
    head = ("setting", "seeds", "mean %", "sd", "before training %", "difference in points", "commit", "status")
    parts.append(
        _table(
            head,
            [
                (
                    row.setting.label,
                    str(len(row.setting.runs)),
                    percent(row.mean),
                    percent(row.sd),
                    percent(row.initial_mean),
                    difference_text(row),
                    " ".join(commits(row.setting)),
                    status(row),
                )
                for row in rows
                if row.metric == metrics[0]
            ],
        )
    )
    parts.append(method)
    by_setting: dict[int, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(id(row.setting), []).append(row)
    parts.append(
        _table(
            ("mean % over seeds", *map(title, metrics)),
            [(some[0].setting.label, *(percent(row.mean) for row in some)) for some in by_setting.values()],
        )
    )
    parts.append("Columns of results.csv: " + "; ".join(f"`{name}` {text}" for name, text in COLUMNS.items()) + ".")
    return "\n\n".join(parts) + "\n"


def title(metric: str) -> str:
    return metric.removesuffix("_frac").replace("_", " ")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def short(count: float) -> str:
    """A count in three figures: 987, 1.10M, 26.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:#.3g}".rstrip(".") + unit
    return str(round(count))


def difference_text(row: Row) -> str:
    if row.difference is None:
        return "–"
    one = row.difference
    return f"{points(one.value)} [{points(one.low)}, {points(one.high)}]"


def status(row: Row) -> str:
    marks = [] if row.setting.is_clean else ["dirty, not a result"]
    return ", ".join(marks + (["preliminary"] if row.preliminary else [])) or "result"


def commits(setting: Setting) -> list[str]:
    return sorted({run.commit for run in setting.runs})


def mean_tokens(setting: Setting) -> int:
    tokens = [int(run.run.facts.get("tokens") or 0) for run in setting.runs]
    return round(sum(tokens) / len(tokens))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
