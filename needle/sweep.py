"""Runs an experiment's cells: plans, builds what they share once, launches those that are not finished, reports.

    python -m needle.sweep exp=001_losses dry_run=true
    python -m needle.sweep exp=001_losses hydra/launcher=joblib hydra.launcher.n_jobs=2
    python -m needle.sweep exp=001_losses only=[arm:forward_kl,seed:1]
    python -m needle.sweep exp=001_losses retry=true

A cell is known by the hash of its settings and of its inputs, not by who ran it: a run of needle.train counts, and a
cell that is finished is never run again. Ctrl-C and kills lose at most the steps since the last checkpoint; the same
command goes on. A cell that fails leaves its error in runs/cells/ and lets the others run. Two sweeps at a time share
the work: a cell that another process runs is passed over.
"""

import csv
import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig
from pydantic import Field
from rich.box import SIMPLE
from rich.table import Table

from needle import artifacts, cells, config, generate, prepare, signals, train
from needle.cells import FAILED, FINISHED, RUNNING, STOPPED, State, Told
from needle.console import quiet, show
from needle.errors import ConfigError, UserError
from needle.experiment import Cell, Sweep, cells_of, chosen, known_experiment
from needle.report import main as report_stage
from needle.runs import Paths, Run
from needle.score import score_run
from needle.scores import suite_name
from needle.watch import Watch, Watched


@dataclass(frozen=True)
class Planned:
    """A cell with its checked settings, what it reads, and how it stands."""

    cell: Cell
    composed: train.Composed
    identity: str
    state: State

    @property
    def cfg(self) -> Mapping[str, Any]:
        return self.composed.cfg

    @property
    def settings(self) -> train.Settings:
        return self.composed.settings

    @property
    def sources(self) -> train.Sources:
        return self.composed.sources


@dataclass(frozen=True)
class Plan:
    """An experiment's cells, or those of them that were asked for. `common`: the words that each of them gets."""

    experiment: str
    sweep: Sweep
    common: tuple[str, ...]
    paths: Paths
    allow_dirty: bool
    cells: tuple[Planned, ...]

    def of(self, kind: str) -> list[Planned]:
        return [one for one in self.cells if one.state.kind == kind]

    def only(self, conditions: Sequence[str], *, key_name: str) -> "Plan":
        """Raises ConfigError for a condition that no cell can meet."""
        wanted = chosen([one.cell for one in self.cells], conditions, key_name=key_name)
        return replace(self, cells=tuple(one for one in self.cells if one.cell in wanted))

    def again(self) -> "Plan":
        """The same cells, as they stand now."""
        standing = cells.Standing(self.paths.runs, allow_dirty=self.allow_dirty)
        return replace(self, cells=tuple(replace(one, state=_state(one.composed, standing)) for one in self.cells))


@config.stage("sweep")
def main(
    cfg: dict[str, Any],
    *,
    exp: str | None,
    overrides: list[str],
    only: list[str],
    retry: bool,
    dry_run: bool,
    allow_dirty: bool,
    publish: bool,
    usd_per_hour: Annotated[float, Field(ge=0)],
    workers: Annotated[int, Field(ge=1)],
    paths: Paths,
) -> None:
    if publish and only:
        raise ConfigError(f"publish=true: only=[{','.join(only)}] leaves cells out, and a part is no result; drop one")
    words = [*config.path_words(cfg["_overrides_"]), *overrides]
    plan = planned(exp, words, paths=paths, allow_dirty=allow_dirty, only=only)
    if publish:
        _check_publication(plan, overrides)
    show_plan(plan, title=plan.experiment)
    cost = cost_of(plan, known=[paths.runs], retry=retry)
    show_cost(plan, cost, usd_per_hour=usd_per_hour, retry=retry)
    if dry_run:
        return
    trained = {one.identity for one in plan.cells if one.state.is_trained}
    plan = run(plan, retry=retry, workers=workers)
    for one in plan.of(FINISHED):
        if one.identity in trained and one.state.run is not None:
            one.settings.logger.tell_again(Run(one.state.run), one.cfg)
    folder = write_report(plan)
    if folder is None and plan.of(FINISHED):
        print("suites=[]: no cell answers a suite, so there is no table; name some in the experiment's file")
    if publish and folder is not None:
        _publish(plan, folder)
    close(plan)


def _check_publication(plan: Plan, overrides: Sequence[str]) -> None:
    """Raises ConfigError where there would be nothing to publish, or where what is published is of other settings than
    the experiment's file."""
    if not _suites(plan.cells):
        raise ConfigError(
            f"publish=true: experiment {plan.experiment} has suites=[], so there is nothing to publish; name some in "
            "its file, such as suites: [validation]"
        )
    folder = plan.paths.experiments / plan.experiment
    published = set(cells.arms_by_identity(folder / "cells.csv"))
    if overrides and published and published != {one.identity for one in plan.cells}:
        raise ConfigError(
            f"publish=true: overrides=[{', '.join(overrides)}] makes another experiment, and its table would replace "
            f"{folder}; write it into a file of its own in conf/experiment, or drop publish"
        )


def planned(
    name: str | None, words: Sequence[str], *, paths: Paths, allow_dirty: bool, only: Sequence[str] = ()
) -> Plan:
    """The cells of the experiment `name` with the overrides `words`, checked; of `only`, those that meet it.

    Raises:
        ConfigError: there is no such experiment; the tree is dirty; some cells' settings are wrong, each problem told
            once.
    """
    experiment = known_experiment(name)
    artifacts.require_clean(allow_dirty=allow_dirty)
    common = (f"experiment={experiment}", f"name={experiment}", *words)
    sweep = _sweep_of(common)
    wanted = chosen(cells_of(sweep), only)
    found, problems = [], {}
    standing = cells.Standing(paths.runs, allow_dirty=allow_dirty)
    for cell in wanted:
        try:
            found.append(_planned(cell, common, standing))
        except UserError as error:
            problems.setdefault(str(error), []).append(cell)
    if problems:
        raise ConfigError("\n".join(f"{_where(some, wanted)}: {problem}" for problem, some in problems.items()))
    _refuse_twins(found)
    return Plan(experiment, sweep, common, paths, allow_dirty, tuple(found))


def _sweep_of(common: Sequence[str]) -> Sweep:
    cfg, runtime = config.compose("train", common)
    _, built = config.prepared(cfg, train.main.stage_function, runtime=runtime)
    return built["sweep"]


def _planned(cell: Cell, common: Sequence[str], standing: cells.Standing) -> Planned:
    composed = train.composed(*config.compose("train", [*common, *cell.overrides]))
    devices = composed.settings.trainer.devices
    if devices > 1:
        raise ConfigError(
            f"trainer.devices={devices}: a sweep's cells have one device each, since further ranks are started as the "
            "same command again, which would be the sweep; set trainer.devices=1 and run cells side by side, or run "
            "needle.train"
        )
    return Planned(cell, composed, composed.identity, _state(composed, standing))


def _state(composed: train.Composed, standing: cells.Standing) -> State:
    return standing.of(composed.identity, suites=composed.settings.suites)


def _where(some: Sequence[Cell], wanted: Sequence[Cell]) -> str:
    """The cells of one problem: by their arms where it is there at every point of the grid, else by the first cell."""
    arms = list(dict.fromkeys(cell.arm for cell in some))
    if len(some) > 1 and all(cell in some for cell in wanted if cell.arm in arms):
        return f"{'arm' if len(arms) == 1 else 'arms'} {', '.join(arms)}"
    more = f" and {len(some) - 1} more" if len(some) > 1 else ""
    return f"cell {some[0].name}{more}"


def _refuse_twins(found: Sequence[Planned]) -> None:
    last = {one.identity: one.cell.name for one in found}
    for one in found:
        if last[one.identity] != one.cell.name:
            raise ConfigError(
                f"cells {one.cell.name} and {last[one.identity]} have the same settings: they would be one run; "
                "change or leave out one of these arms"
            )


def show_plan(plan: Plan, *, title: str) -> None:
    """The question, how the cells of each arm stand, and why those failed that did."""
    if plan.sweep.question:
        show(plan.sweep.question.strip())
    print(f"{title}: {len(plan.cells)} cells")
    table = Table(box=SIMPLE)
    kinds = [kind for kind in cells.KINDS if plan.of(kind)]
    for name in ("arm", *kinds):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in dict.fromkeys(one.cell.arm for one in plan.cells):
        standing = [one.state.kind for one in plan.cells if one.cell.arm == arm]
        table.add_row(arm, *(str(standing.count(kind) or "") for kind in kinds))
    show(table)
    for one in plan.of(FAILED):
        print(f"failed: {one.cell.name}: {one.state.error}")


def _passed_over(*, retry: bool) -> tuple[str, ...]:
    """Kinds of cells that a sweep does not start."""
    return (FINISHED, RUNNING) if retry else (FINISHED, RUNNING, FAILED)


def cost_of(plan: Plan, *, known: Sequence[Path], retry: bool) -> cells.Cost:
    """Of the cells that a sweep would start now, by the finished runs in the folders `known`."""
    left = [one for one in plan.cells if one.state.kind not in _passed_over(retry=retry)]
    return cells.Cost.of([(one.cfg, one.sources.shards) for one in left], runs=known)


def show_cost(plan: Plan, cost: cells.Cost, *, usd_per_hour: float, retry: bool) -> None:
    told = f"{cost.cells} cells; {cost.told(usd_per_hour=usd_per_hour)}" if cost.cells else "nothing"
    failed = 0 if retry else len(plan.of(FAILED))
    again = f"; {failed} failed before, and run again with retry=true" if failed else ""
    show(f"to run: {told}{again}")


def run(plan: Plan, *, retry: bool, workers: int) -> Plan:
    """Builds what is missing and runs the cells that are not finished, failed ones where `retry` says so; returns the
    plan as it stands then.

    Raises:
        KeyboardInterrupt: it was stopped; the message says how far it came.
    """
    ready = [one for one in plan.cells if one.state.kind not in _passed_over(retry=retry)]
    try:
        if ready:
            _build_shared(ready, plan.common, workers=workers)
            _launch(ready, plan)
    except KeyboardInterrupt:
        now = plan.again()
        finished = f"{len(now.of(FINISHED))} of {len(now.cells)} cells are finished"
        raise KeyboardInterrupt(f"{finished}; the same command goes on") from None
    return plan.again()


def _build_shared(ready: Sequence[Planned], common: Sequence[str], *, workers: int) -> None:
    """Corpus, shards and signals of the cells, each made once; a second sweep waits for the first to make them."""
    done: set[Path] = set()
    for one in ready:
        settings = one.settings
        corpus = generate.corpus_folder(settings.paths, settings.data)
        needed: list[tuple[Path, Any]] = [(corpus, lambda c=one.cfg: _generate(c, common))]
        options = {"data": settings.data, "paths": settings.paths}
        needed.append((one.sources.shards, lambda o=options, c=one.cfg: _stage(prepare)(c, **o, workers=workers)))
        if one.sources.signals is not None:
            options = {**options, "teacher": settings.teacher, "alignment": settings.alignment}
            needed.append((one.sources.signals, lambda o=options, c=one.cfg: _signals(c, o)))
        for folder, make in needed:
            if folder in done or folder.is_dir():
                continue
            print(f"building {folder}", flush=True)
            with artifacts.locked(folder.with_name(f".{folder.name}.lock"), wait=True):
                if not folder.is_dir():
                    make()
            done.add(folder)


def _stage(module: Any) -> Any:
    return module.main.stage_function


def _generate(cell: Mapping[str, Any], common: Sequence[str]) -> None:
    """The corpus of recorded answers; any other is bought on purpose, by needle.generate."""
    cfg, runtime = config.compose("generate", config.path_words(common))
    cfg.data = cell["data"]
    whole, built = config.prepared(cfg, _stage(generate), runtime=runtime)
    _stage(generate)(whole, **built)


def _signals(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    own, _ = config.compose("signals", [])
    signals.scoring(**options)
    _stage(signals)(cfg, **options, rows_per_batch=own.rows_per_batch, threads=own.threads)


def _launch(ready: Sequence[Planned], plan: Plan) -> None:
    """Hands the cells to Hydra's launcher; each runs `run_cell` in whatever process that starts."""
    chosen_launcher = list(HydraConfig.get().overrides.hydra)
    loader = config.loader()
    master = loader.load_configuration("train", [*plan.common, *chosen_launcher], run_mode=RunMode.MULTIRUN)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks()), task_function=run_cell, config=master
    )
    _silence_launchers()
    root = plan.paths.runs
    watched = [
        Watched(number, one.cell.name, one.cell.arm, cells.told_path(root, one.identity))
        for number, one in enumerate(plan.cells, 1)
        if one in ready
    ]
    try:
        with Watch(watched, total=len(plan.cells), finished=len(plan.of(FINISHED))):
            returned = launcher.launch([[*plan.common, *one.cell.overrides] for one in ready], initial_job_idx=0)
    except BrokenProcessPool as error:  # joblib gives up with its first lost process
        raise UserError(
            f"a process was lost, perhaps for want of memory: {str(error).splitlines()[0]}\nThe same command goes on; "
            "hydra.launcher.n_jobs=1 runs one cell at a time"
        ) from None
    for one, job in zip(ready, returned, strict=True):
        try:
            _ = job.return_value
        except Exception as error:  # its process was lost, so it could not record this itself
            where = {"arm": one.cell.arm, "seed": one.cfg["seed"]}
            cells.record_failure(root, one.identity, **where, error=str(error))


def _silence_launchers() -> None:
    """Hydra's launchers print all overrides of every run, a line of a thousand characters each; needle.watch tells of
    the cells instead. What our own launchers say beside these lines is kept."""
    for name in ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins.hydra_joblib_launcher._core"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("on_slurm", "on_ray"):
        logging.getLogger(f"hydra_plugins.needle_launchers.{name}").addFilter(_is_no_list_of_overrides)


def _is_no_list_of_overrides(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("\t")


def run_cell(cfg: DictConfig) -> str:
    """One cell, from wherever it stands to finished; a failure is recorded and no reason to stop the others."""
    composed = train.composed(cfg, HydraConfig.get())
    whole, settings = composed.cfg, composed.settings
    root, known_as = settings.paths.runs, composed.identity
    with artifacts.locked(cells.lock_path(root, known_as), wait=False) as mine:
        if not mine:
            return RUNNING
        started = time.monotonic()

        def tell(kind: str, **words: str) -> str:
            cells.tell(root, known_as, Told(kind, seconds=round(time.monotonic() - started, 1), **words))
            return kind

        tell(RUNNING)
        try:
            with quiet():
                folder = _finished(whole, settings, known_as)
            return tell(FINISHED, result=cells.headline(folder, settings.suites))
        except KeyboardInterrupt:
            tell(STOPPED)
            raise
        except (Exception, SystemExit) as error:
            told = str(error) if isinstance(error, UserError) else traceback.format_exc()
            cells.record_failure(root, known_as, arm=whole["arm"], seed=whole["seed"], error=told)
            if not isinstance(error, UserError):
                print(f"cell {whole['arm']} seed={whole['seed']} failed: {told}", file=sys.stderr, flush=True)
            return tell(FAILED, error=(told.strip().splitlines() or ["unknown"])[-1])


def _finished(whole: dict[str, Any], settings: train.Settings, known_as: str) -> Path:
    """The folder of the cell's finished run, trained and scored now as far as it is not; the caller holds the cell's
    lock."""
    # A sweep runs dirty trees only where it was allowed to.
    dirty = bool(artifacts.source_state()["dirty"])
    standing = cells.Standing(settings.paths.runs, allow_dirty=dirty)
    state = standing.of(known_as, suites=settings.suites, locked=True)
    if state.run is not None and state.is_trained:
        folder = state.run
    elif state.run is not None and state.can_continue and _is_understood(state.run):
        folder = train.go_on(state.run, None)
    else:
        folder = train.start(whole, settings)
    # Another experiment, or a search, may have begun the run and asked for other suites.
    if not cells.is_scored(folder, settings.suites):
        score_run(folder, suites=settings.suites)
    return folder


def _is_understood(folder: Path) -> bool:
    """Whether this code can continue the run: other code may have written its settings. Then it starts anew."""
    try:
        train.config_of(Run(folder))
    except ConfigError:
        return False
    return True


def write_report(plan: Plan) -> Path | None:
    """One report for each suite that the cells answered, over the finished ones; results.csv and cells.csv of all of
    them beside it. Returns the folder, or None where there is nothing to report."""
    finished = plan.of(FINISHED)
    suites = _suites(finished)
    if not suites:
        return None
    folder = plan.paths.runs / "sweeps" / plan.experiment
    runs = json.dumps([str(one.state.run) for one in finished], ensure_ascii=False)
    for suite in suites:
        words = [f"runs={runs}", f"suite={suite}", f"allow_dirty={plan.allow_dirty}"]
        words.append(f"output={json.dumps(str(folder / suite), ensure_ascii=False)}")
        cfg, runtime = config.compose("report", [*words, *plan.sweep.report])
        cfg.arms = {str(one.state.run): one.cell.arm for one in finished}
        whole, built = config.prepared(cfg, report_stage.stage_function, runtime=runtime)
        report_stage.stage_function(whole, **built)
    tables = [(folder / suite / "results.csv").read_text("utf-8") for suite in suites]
    (folder / "results.csv").write_text(tables[0] + "".join(t.split("\n", 1)[1] for t in tables[1:]), "utf-8")
    rows = [(one.cell.arm, one.cell.point, one.state.run) for one in finished if one.state.run is not None]
    cells.write_cells_csv(folder / "cells.csv", rows, suites=suites)
    show(_results(folder / "results.csv"))
    return folder


def _suites(some: Sequence[Planned]) -> list[str]:
    """The names of their score files."""
    return list(dict.fromkeys(suite_name(name) for one in some for name in one.settings.suites))


def _results(path: Path) -> Table:
    """The first metric of results.csv: a row for each suite and setting."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    metric = rows[0]["metric"] if rows else ""
    print(f"{metric}, and the paired difference from the baseline in percentage points:")
    table = Table(box=SIMPLE)
    for name in ("suite", "setting", "seeds", "mean", "difference", "interval"):
        table.add_column(name, justify="left" if name in ("suite", "setting") else "right")
    for row in rows:
        if row["metric"] == metric:
            difference, interval = "", ""
            if row["difference"]:
                difference = f"{100 * float(row['difference']):+.1f}"
                interval = f"{100 * float(row['ci_low']):+.1f} to {100 * float(row['ci_high']):+.1f}"
            mean = f"{100 * float(row['mean']):.1f}%" if row["mean"] else ""
            table.add_row(row["suite"], row["setting"], row["n_seeds"], mean, difference, interval)
    return table


def _publish(plan: Plan, folder: Path) -> None:
    target = plan.paths.experiments / plan.experiment
    missing = [one.cell.name for one in plan.cells if one.state.kind != FINISHED]
    if missing:
        raise ConfigError(
            f"publish=true: {len(missing)} cells are not finished ({missing[0]}), so {target} stays as it is"
        )
    (target / "figures").mkdir(parents=True, exist_ok=True)
    for name in ("results.csv", "cells.csv"):
        shutil.copy(folder / name, target / name)
    for suite in _suites(plan.cells):
        for figure in sorted((folder / suite).glob("*.png")):
            shutil.copy(figure, target / "figures" / f"{suite}_{figure.name}")
    cells.write_times(target / "times.json", [(one.cell.arm, one.state.run) for one in plan.cells if one.state.run])
    print(f"published: {target}; commit it before the next run, which takes clean trees only")


def close(plan: Plan) -> None:
    """Says how the cells stand at the end.

    Raises:
        UserError: some failed, each with its error.
    """
    told = ", ".join(f"{len(plan.of(kind))} {kind}" for kind in cells.KINDS if plan.of(kind))
    print(f"cells: {told}")
    failed = plan.of(FAILED)
    if failed:
        lines = "".join(f"\n  {one.cell.name}: {one.state.error}" for one in failed)
        raise UserError(f"{len(failed)} cells failed; retry=true runs them again:{lines}")


if __name__ == "__main__":
    main()
