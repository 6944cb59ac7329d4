"""Published tables, rebuilt and compared cell by cell with experiments/NAME/results.csv.

From cells.csv, which holds every run's metrics, come means, deviations and paired differences; from the run folders,
where they are there, everything, bootstrap intervals included. needle.sweep wrote both files.
Cost: milliseconds from cells.csv; from run folders half a second for each setting's intervals.
"""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from needle import config
from needle.errors import DataError
from needle.reporting import tables
from needle.reporting.collect import Setting, collect
from needle.reporting.compare import ENOUGH_SEEDS, Row, compare
from needle.runs import EXECUTION
from needle.scores import TrainingRun

EXPERIMENTS = config.CONF.parent / "experiments"
KEYS = ["setting", "suite", "metric"]
# Both files round to six digits: a mean of rounded values is off by 1e-6 at most, a deviation by 1.3e-6.
ROUNDING = 1.5e-6
# What cells.csv tells of a table, and what is compared as a number.
FROM_CELLS = [
    "n_seeds",
    "seeds",
    "n_examples",
    "mean",
    "sd",
    "difference",
    "n_paired_seeds",
    "parameters",
    "tokens",
    "commits",
    "preliminary",
]
NUMBERS = {"mean", "sd", "initial_mean", "difference", "ci_low", "ci_high"}
# Words of arms and students that say how large a student is.
_SIZES = re.compile(r"(?<![a-z0-9])(?:nano|micro|small|base|large)(?![a-z0-9])")
SAME_SIZE_FRAC = 0.05  # students that differ by less are of one size
_ABOUT_CELLS = ("arm", "suite", "n", "parameters", "tokens", "identity", "commit")


@dataclass(frozen=True)
class Published:
    """An experiment's published tables, every value as the text that stands in the file."""

    name: str
    folder: Path
    results: pd.DataFrame
    cells: pd.DataFrame

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(self.results["suite"]))

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(self.results["metric"]))

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(self.results["setting"]))

    @property
    def baselines(self) -> list[str]:
        return [name for name in dict.fromkeys(self.results["baseline"]) if name]

    @property
    def grid(self) -> list[str]:
        """The keys that tell an arm's cells apart: they stand between the arm and the suite."""
        columns = list(self.cells.columns)
        return columns[columns.index("arm") + 1 : columns.index("suite")]

    def row(self, setting: str, suite: str, metric: str) -> Mapping[str, str]:
        """Raises DataError where the table has no such row."""
        chosen = (self.results[KEYS] == [setting, suite, metric]).all(axis=1)
        if not chosen.any():
            raise DataError(f"{self.folder / 'results.csv'} has no row for {setting}, {suite}, {metric}")
        return self.results[chosen].iloc[0].to_dict()

    def cells_of(self, setting: str, suite: str) -> pd.DataFrame:
        """The lines of cells.csv behind a setting on a suite, in the order of their seeds.

        A setting is named after its arm, followed by `key=value` of the grid's other keys where they differ.

        Raises:
            DataError: there is none, or two share a seed.
        """
        arms = sorted({arm for arm in self.cells["arm"] if setting == arm or setting.startswith(f"{arm}, ")}, key=len)
        found = self.cells[self.cells["arm"].eq(arms[-1] if arms else None) & self.cells["suite"].eq(suite)]
        told = setting.removeprefix(arms[-1] if arms else "").split(", ")
        points = dict(part.split("=", 1) for part in told if "=" in part)
        for key in self.grid:
            if key != "seed" and key in points:
                found = found[found[key] == points[key]]
        if found.empty:
            raise DataError(f"{self.folder / 'cells.csv'} has no cell of {setting} on {suite}, which results.csv has")
        if found["seed"].duplicated().any():
            raise DataError(f"{self.folder / 'cells.csv'}: {setting} on {suite} has two cells of one seed")
        return found.sort_values("seed", key=lambda column: column.astype(int))


def paired(published: Published, setting: str, suite: str, column: str) -> dict[str, float]:
    """Seed -> the setting's value minus its baseline's, of a column of cells.csv; empty for a baseline."""
    baseline = published.row(setting, suite, published.metrics[0])["baseline"]
    if not baseline:
        return {}
    ours, theirs = (_values(published.cells_of(one, suite), column) for one in (setting, baseline))
    pairs = {seed: (ours[seed], theirs[seed]) for seed in ours if seed in theirs}
    return {seed: one - other for seed, (one, other) in pairs.items() if one is not None and other is not None}


def names(root: Path = EXPERIMENTS) -> list[str]:
    """Published experiments that can be rebuilt: those that have cells.csv."""
    return sorted(path.parent.name for path in Path(root).glob("*/cells.csv"))


def read(name: str, root: Path = EXPERIMENTS) -> Published:
    """An experiment's tables.

    Raises:
        DataError: it has none, or a column is missing.
    """
    folder = Path(root) / name
    for file in ("results.csv", "cells.csv"):
        if not (folder / file).is_file():
            there = ", ".join(names(root)) or "none yet"
            raise DataError(f"{folder} has no {file}; experiments that can be rebuilt: {there}")
    results, cells = (_table((folder / file).read_text("utf-8")) for file in ("results.csv", "cells.csv"))
    for file, table, wanted in (
        ("results.csv", results, tables.COLUMNS),
        ("cells.csv", cells, (*_ABOUT_CELLS, "seed")),
    ):
        missing = [column for column in wanted if column not in table.columns]
        if missing:
            raise DataError(f"{folder / file} has no column {missing[0]}: it was written by another version")
    return Published(name, folder, results, cells)


def _table(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)


def rebuild(published: Published) -> pd.DataFrame:
    """The rows of results.csv with the columns `KEYS` and `FROM_CELLS`, worked out from cells.csv alone.

    Raises:
        DataError: cells.csv and results.csv do not hold the same settings.
    """
    _check_coverage(published)
    rows = []
    for line in published.results.to_dict("records"):
        cells = published.cells_of(line["setting"], line["suite"])
        values = _values(cells, line["metric"])
        present = [value for value in values.values() if value is not None]
        difference, paired = None, []
        if line["baseline"]:
            reference = _values(published.cells_of(line["baseline"], line["suite"]), line["metric"])
            paired = [seed for seed in values if seed in reference]
            difference = _mean_difference(values, reference, paired)
        rows.append(
            {
                **{key: line[key] for key in KEYS},
                "n_seeds": str(len(cells)),
                "seeds": " ".join(cells["seed"]),
                "n_examples": cells["n"].iloc[0],
                "mean": _text(np.mean(present) if present else None),
                "sd": _text(np.std(present, ddof=1) if len(present) > 1 else None),
                "difference": _text(difference),
                "n_paired_seeds": str(len(paired)) if difference is not None else "",
                "parameters": cells["parameters"].iloc[0],
                "tokens": str(round(cells["tokens"].astype(int).mean())),
                "commits": " ".join(sorted(set(cells["commit"]))),
                "preliminary": str(len(cells) < ENOUGH_SEEDS).lower(),
            }
        )
    return pd.DataFrame(rows, columns=[*KEYS, *FROM_CELLS])


def _check_coverage(published: Published) -> None:
    used: set[int] = set()
    for setting in published.settings:
        for suite in published.suites:
            used |= set(published.cells_of(setting, suite).index)
    left = published.cells.drop(index=list(used))
    if len(left):
        one = left.iloc[0]
        raise DataError(
            f"{published.folder / 'cells.csv'} has cells that no setting of results.csv holds, such as {one['arm']} "
            f"with seed {one['seed']} on {one['suite']}"
        )


def _values(cells: pd.DataFrame, metric: str) -> dict[str, float | None]:
    """Seed -> value; None where a cell has nothing to count."""
    return {seed: float(text) if text else None for seed, text in zip(cells["seed"], cells[metric], strict=True)}


def _mean_difference(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None], seeds: Sequence[str]
) -> float | None:
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    if not pairs or any(one is None or other is None for one, other in pairs):
        return None
    return float(np.mean([one - other for one, other in pairs]))


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def compared(published: Published, rebuilt: pd.DataFrame) -> pd.DataFrame:
    """A line for each value of both tables: `published`, `rebuilt`, `off` (of numbers) and whether it `agrees`."""
    theirs = published.results.set_index(KEYS)
    lines = []
    for row in rebuilt.to_dict("records"):
        key = tuple(row[name] for name in KEYS)
        for column in (name for name in rebuilt.columns if name not in KEYS):
            there, here = str(theirs.loc[key, column]), str(row[column])
            off = abs(float(there) - float(here)) if column in NUMBERS and there and here else None
            agrees = off <= ROUNDING if off is not None else there == here
            lines.append((*key, column, there, here, off, agrees))
    return pd.DataFrame(lines, columns=[*KEYS, "column", "published", "rebuilt", "off", "agrees"])


def require_agreement(published: Published, rebuilt: pd.DataFrame, *, source: str) -> pd.DataFrame:
    """`compared`, once it is sure that every published row is rebuilt and every value agrees.

    Args:
        source: what it was rebuilt from, for the message.

    Raises:
        DataError: naming the first row that is missing, or the first value that differs.
    """
    found = compared(published, rebuilt)
    rebuilt_rows = set(rebuilt[KEYS].itertuples(index=False, name=None))
    missing = [key for key in published.results[KEYS].itertuples(index=False, name=None) if key not in rebuilt_rows]
    where = published.folder / "results.csv"
    if missing:
        raise DataError(f"{where}: {', '.join(missing[0])}: published, and {source} gives no such row")
    wrong = found[~found["agrees"].astype(bool)]
    if len(wrong):
        first = wrong.iloc[0]
        more = f"; {len(wrong) - 1} more values differ" if len(wrong) > 1 else ""
        raise DataError(
            f"{where}: {', '.join(first[name] for name in KEYS)}: {first['column']} is {first['published'] or 'empty'} "
            f"there and {first['rebuilt'] or 'empty'} from {source}{more}"
        )
    return found


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """A line for each column of `compared`: how many values agree, and the largest deviation of numbers."""
    grouped = found.groupby("column", sort=False)
    told = grouped.agg(values=("agrees", "size"), agree=("agrees", "sum"), largest_deviation=("off", "max"))
    told["largest_deviation"] = [f"{value:.1e}" if value == value else "" for value in told["largest_deviation"]]
    return told


def overview(published: Published, *, metric: str) -> pd.DataFrame:
    """The published rows of a metric to be read: values in percent, differences in percentage points, and what the
    interval says."""
    lines = []
    for row in published.results[published.results["metric"] == metric].to_dict("records"):
        lines.append(
            {
                "suite": row["suite"],
                "setting": row["setting"],
                "seeds": row["n_seeds"],
                "examples": row["n_examples"],
                "mean %": _percent(row["mean"]),
                "sd": _percent(row["sd"]),
                "difference [95 %]": _interval(row),
                "told": _told(row),
            }
        )
    return pd.DataFrame(lines).set_index(["suite", "setting"])


def apart(some: Iterable[Published], *, metric: str) -> pd.DataFrame:
    """The differences whose interval excludes zero, the largest first."""
    lines = []
    for published, row in _differences(some, metric):
        if _told(row) in ("ahead", "behind"):
            about = (published.name, row["suite"], row["setting"], row["baseline"], _interval(row), row["n_seeds"])
            lines.append((abs(float(row["difference"])), *about))
    columns = ["experiment", "suite", "setting", "baseline", "difference [95 %]", "seeds"]
    return pd.DataFrame([line[1:] for line in sorted(lines, reverse=True)], columns=columns)


def counted(some: Iterable[Published], *, metric: str) -> int:
    """How many differences there are."""
    return sum(1 for _ in _differences(some, metric))


def _differences(some: Iterable[Published], metric: str) -> Iterator[tuple[Published, Mapping[str, str]]]:
    for published in some:
        for row in published.results[published.results["metric"] == metric].to_dict("records"):
            if row["difference"]:
                yield published, row


def _told(row: Mapping[str, str]) -> str:
    if not row["difference"]:
        return "baseline" if not row["baseline"] else ""
    low, high = float(row["ci_low"]), float(row["ci_high"])
    return "ahead" if low > 0 else "behind" if high < 0 else "not told apart"


def _percent(text: str) -> str:
    return tables.percent(float(text)) if text else ""


def _interval(row: Mapping[str, str]) -> str:
    if not row["difference"]:
        return ""
    value, low, high = (tables.points(float(row[name])) for name in ("difference", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"


def differ_in_size(published: Published) -> bool:
    sizes = published.results["parameters"].astype(int)
    return bool(sizes.max() > (1 + SAME_SIZE_FRAC) * sizes.min())


def series(published: Published) -> dict[str, str]:
    """Setting -> its name without what says how large the student is: settings of one name are steps of one ladder."""
    return {name: _SIZES.sub("", name).strip(" ,_=").replace("__", "_") or "students" for name in published.settings}


@dataclass(frozen=True)
class RawTable:
    """What the run folders give: the table as results.csv has it, and what figures are drawn from, by suite."""

    table: pd.DataFrame
    settings: Mapping[str, tuple[Setting, ...]]
    rows: Mapping[str, tuple[Row, ...]]

    def headline(self, suite: str) -> list[Row]:
        """Of the first metric, one a setting."""
        return [row for row in self.rows[suite] if row.metric == self.rows[suite][0].metric]


def raw_runs(published: Published, roots: Sequence[Path]) -> tuple[list[TrainingRun], list[str]]:
    """The finished runs of the published cells under these folders of runs, known by their identity, and the names of
    the cells without one."""
    there: dict[str, TrainingRun] = {}
    for run in sorted(training_runs(roots), key=lambda one: (not one.record.get("dirty"), _started(one))):
        there[run.record.get("identity", "")] = run  # the newest of clean ones where there are several
    cells = published.cells.drop_duplicates("identity")
    missing = cells[~cells["identity"].isin(list(there))]
    labels = [" ".join([one["arm"], *(f"{key}={one[key]}" for key in published.grid)]) for _, one in missing.iterrows()]
    found = [
        replace(there[one["identity"]], config={**there[one["identity"]].config, "arm": one["arm"]})
        for _, one in cells.iterrows()
        if one["identity"] in there
    ]
    return found, labels


def training_runs(roots: Sequence[Path]) -> Iterator[TrainingRun]:
    """The finished ones under these folders of runs."""
    for root in roots:
        for path in sorted(Path(root).glob("train/*/run.json")):
            try:
                run = TrainingRun.open(path.parent)
            except DataError:
                continue  # being written, or damaged: as if it were not there
            if run.finished:
                yield run


def _started(run: TrainingRun) -> str:
    return str(run.record.get("started_utc") or "")


def rebuild_from_runs(published: Published, runs: Sequence[TrainingRun]) -> RawTable:
    """The whole table, intervals included, from the answers in the run folders: what needle.report does.

    Raises:
        ConfigError, DataError: the experiment's report settings or a score file cannot be read.
    """
    cfg, _ = config.compose("report", _report_overrides(published))
    bootstrap = config.build(cfg.bootstrap)
    parts, settings, rows = [], {}, {}
    for suite in published.suites:
        collection = collect(
            runs,
            suite=suite,
            checkpoint="final",
            where=[],
            ignored=[*cfg.ignored, *EXECUTION],
            allow_dirty="true" in set(published.results["dirty"]),
        )
        settings[suite] = collection.settings
        rows[suite] = tuple(
            compare(collection.settings, metrics=published.metrics, baseline=list(cfg.baseline), bootstrap=bootstrap)
        )
        parts.append(_table(tables.results_csv(rows[suite], suite=suite, checkpoint="final")))
    return RawTable(pd.concat(parts, ignore_index=True)[[*KEYS, *_compared_columns()]], settings, rows)


def _compared_columns() -> list[str]:
    return [name for name in tables.COLUMNS if name not in KEYS]


def _report_overrides(published: Published) -> list[str]:
    """Those of the experiment's file; without one the baseline is the table's own."""
    if (config.CONF / "experiment" / f"{published.name}.yaml").is_file():
        cfg, _ = config.compose("train", [f"experiment={published.name}"])
        return list(config.build(cfg.sweep).report)
    return [f"baseline=['arm:{published.baselines[0].split(', ')[0]}']"] if published.baselines else []
