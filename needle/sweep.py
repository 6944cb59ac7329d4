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

import difflib
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig
from pydantic import Field
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from needle import artifacts, cells, config, generate, prepare, signals, train
from needle.cells import FAILED, FINISHED, RUNNING, State
from needle.errors import ConfigError, UserError
from needle.experiment import Cell, Sweep, cells_of, chosen
from needle.report import main as report
from needle.runs import Paths, identity

EXPERIMENTS = config.CONF.parent / "experiments"


@dataclass(frozen=True)
class Planned:
    """A cell with its checked settings, what it reads, and how it stands."""

    cell: Cell
    cfg: Mapping[str, Any]
    settings: train.Settings
    sources: train.Sources
    identity: str
    state: State


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
    experiment = _known(exp)
    if not allow_dirty and artifacts.source_state()["dirty"]:
        raise ConfigError(
            "the tree has uncommitted changes, so no run of it would be a result: commit them, or set allow_dirty=true"
        )
    common = [f"experiment={experiment}", *_path_overrides(cfg["_overrides_"]), *overrides]
    sweep = _sweep_of(common)
    planned = _planned(chosen(cells_of(sweep), only), common, paths, allow_dirty=allow_dirty)
    _show_plan(planned, experiment, sweep, usd_per_hour=usd_per_hour)
    ready = [
        one for one in planned if one.state.kind not in (FINISHED, RUNNING) and (retry or one.state.kind != FAILED)
    ]
    if dry_run:
        return
    if ready:
        _build_shared(ready, common, workers=workers)
        _launch(ready, common)
    planned = _planned([one.cell for one in planned], common, paths, allow_dirty=allow_dirty)
    _report(planned, sweep, experiment, paths, allow_dirty=allow_dirty, publish=publish)
    _close(planned)


def _known(name: str | None) -> str:
    names = sorted(path.stem for path in (config.CONF / "experiment").glob("*.yaml"))
    if name in names:
        return name
    near = difflib.get_close_matches(name or "", names, n=1)
    guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise ConfigError(f"exp={name}: name an experiment of conf/experiment; {guess}")


def _path_overrides(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if override.startswith("paths.")]


def _sweep_of(common: Sequence[str]) -> Sweep:
    cfg, runtime = config.compose("train", common)
    _, built = config.prepared(cfg, train.main.stage_function, runtime=runtime)
    return built["sweep"]


def _planned(some: Sequence[Cell], common: Sequence[str], paths: Paths, *, allow_dirty: bool) -> list[Planned]:
    """Raises ConfigError with the problems of every cell, each once."""
    found, problems = [], {}
    standing = cells.Standing(paths.runs, allow_dirty=allow_dirty)
    for cell in some:
        try:
            cfg, runtime = config.compose("train", [*common, *cell.overrides])
            whole, built = config.prepared(cfg, train.main.stage_function, runtime=runtime)
            settings = train.Settings(**built)
            sources = train.sources(settings)
        except UserError as error:
            problems.setdefault(str(error), cell.name)
            continue
        known_as = identity(whole, sources.inputs)
        found.append(Planned(cell, whole, settings, sources, known_as, standing.of(known_as)))
    if problems:
        raise ConfigError("\n".join(f"cell {name}: {problem}" for problem, name in problems.items()))
    twice = {one.identity: one.cell.name for one in found}
    for one in found:
        if twice[one.identity] != one.cell.name:
            raise ConfigError(
                f"cells {one.cell.name} and {twice[one.identity]} have the same settings: they would be one run; "
                "change or leave out one of these arms"
            )
    return found


def _show_plan(planned: Sequence[Planned], experiment: str, sweep: Sweep, *, usd_per_hour: float) -> None:
    """How the cells stand, and what those that are left will take."""
    table = Table(title=f"{experiment}: {len(planned)} cells", title_justify="left", box=SIMPLE)
    for name in ("arm", *cells.KINDS):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in dict.fromkeys(one.cell.arm for one in planned):
        kinds = [one.state.kind for one in planned if one.cell.arm == arm]
        table.add_row(arm, *(str(kinds.count(kind) or "") for kind in cells.KINDS))
    if sweep.question:
        print(sweep.question.strip())
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    left = [one for one in planned if one.state.kind not in (FINISHED, FAILED)]
    cost = cells.Cost.of([(one.cfg, one.sources.shards) for one in left], runs=planned[0].settings.paths.runs)
    print(f"to run: {len(left)} cells; {cost.told(usd_per_hour=usd_per_hour)}")
    for one in planned:
        if one.state.kind == FAILED:
            print(f"failed: {one.cell.name}: {one.state.error}")


def _build_shared(planned: Sequence[Planned], common: Sequence[str], *, workers: int) -> None:
    """Corpus, shards and signals of the cells, each made once; a second sweep waits for the first to make them."""
    done: set[Path] = set()
    for one in planned:
        settings = one.settings
        corpus = generate.corpus_folder(settings.paths, settings.data)
        needed: list[tuple[Path, Any]] = [(corpus, lambda: _generate(common))]
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


def _generate(common: Sequence[str]) -> None:
    """The recorded corpus; any other is bought on purpose, by needle.generate."""
    cfg, runtime = config.compose("generate", [one for one in common if one.startswith("paths.")])
    whole, built = config.prepared(cfg, _stage(generate), runtime=runtime)
    _stage(generate)(whole, **built)


def _signals(cfg: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    own, _ = config.compose("signals", [])
    signals.scoring(**options)
    _stage(signals)(cfg, **options, rows_per_batch=own.rows_per_batch, threads=own.threads)


def _launch(ready: Sequence[Planned], common: Sequence[str]) -> None:
    """Hands the cells to Hydra's launcher; each runs `run_cell` in whatever process that starts."""
    chosen_launcher = list(HydraConfig.get().overrides.hydra)
    loader = config.loader()
    master = loader.load_configuration("train", [*common, *chosen_launcher], run_mode=RunMode.MULTIRUN)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks()), task_function=run_cell, config=master
    )
    returned = launcher.launch([[*common, *one.cell.overrides] for one in ready], initial_job_idx=0)
    for one, job in zip(ready, returned, strict=True):
        try:
            _ = job.return_value
        except Exception as error:  # its process was lost, so it could not record this itself
            where = {"arm": one.cell.arm, "seed": one.cfg["seed"]}
            cells.record_failure(one.settings.paths.runs, one.identity, **where, error=str(error))


def run_cell(cfg: DictConfig) -> str:
    """One cell, from wherever it stands to finished; a failure is recorded and no reason to stop the others."""
    whole, built = config.prepared(cfg, train.main.stage_function, runtime=HydraConfig.get())
    settings = train.Settings(**built)
    known_as = identity(whole, train.sources(settings).inputs)
    with artifacts.locked(cells.lock_path(settings.paths.runs, known_as), wait=False) as mine:
        if not mine:
            return RUNNING
        # A sweep runs dirty trees only where it was allowed to.
        state = cells.Standing(settings.paths.runs, allow_dirty=bool(artifacts.source_state()["dirty"])).of(
            known_as, locked=True
        )
        try:
            if state.kind == FINISHED:
                return FINISHED
            train.go_on(state.run, None) if state.run and state.can_continue else train.start(whole, settings)
        except (Exception, SystemExit) as error:
            told = str(error) if isinstance(error, UserError) else traceback.format_exc()
            cells.record_failure(settings.paths.runs, known_as, arm=whole["arm"], seed=whole["seed"], error=told)
            print(f"cell {whole['arm']} seed={whole['seed']} failed: {told}", file=sys.stderr, flush=True)
            return FAILED
    return FINISHED


def _report(
    planned: Sequence[Planned], sweep: Sweep, experiment: str, paths: Paths, *, allow_dirty: bool, publish: bool
) -> None:
    """One report for each suite that the cells answered, over the finished ones."""
    finished = [one for one in planned if one.state.kind == FINISHED]
    suites = list(dict.fromkeys(Path(name).stem for one in finished for name in one.settings.suites))
    if not finished or not suites:
        return
    folder = paths.runs / "sweeps" / experiment
    runs = ",".join(f'"{one.state.run}"' for one in finished)
    for suite in suites:
        words = [f"runs=[{runs}]", f"suite={suite}", f"output={folder / suite}", f"allow_dirty={allow_dirty}"]
        cfg, runtime = config.compose("report", [*words, *sweep.report])
        cfg.arms = {str(one.state.run): one.cell.arm for one in finished}
        whole, built = config.prepared(cfg, report.stage_function, runtime=runtime)
        report.stage_function(whole, **built)
    tables = [(folder / suite / "results.csv").read_text("utf-8") for suite in suites]
    (folder / "results.csv").write_text(tables[0] + "".join(t.split("\n", 1)[1] for t in tables[1:]), "utf-8")
    rows = [(one.cell.arm, one.cell.point, one.state.run) for one in finished]
    cells.write_cells_csv(folder / "cells.csv", rows, suites=suites)
    if publish:
        _publish(folder, experiment, suites, complete=len(finished) == len(planned))


def _publish(folder: Path, experiment: str, suites: Sequence[str], *, complete: bool) -> None:
    target = EXPERIMENTS / experiment
    if not complete:
        raise ConfigError(f"publish=true: not every cell is finished, so {target} stays as it is")
    (target / "figures").mkdir(parents=True, exist_ok=True)
    for name in ("results.csv", "cells.csv"):
        shutil.copy(folder / name, target / name)
    for suite in suites:
        for figure in sorted((folder / suite).glob("*.png")):
            shutil.copy(figure, target / "figures" / f"{suite}_{figure.name}")
    print(f"published: {target}")


def _close(planned: Sequence[Planned]) -> None:
    kinds = [one.state.kind for one in planned]
    told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in cells.KINDS if kind in kinds)
    print(f"cells: {told}")
    failed = [one for one in planned if one.state.kind == FAILED]
    if failed:
        lines = "".join(f"\n  {one.cell.name}: {one.state.error}" for one in failed)
        raise UserError(f"{len(failed)} cells failed; retry=true runs them again:{lines}")


if __name__ == "__main__":
    main()
