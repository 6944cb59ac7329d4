"""Searches settings for the best value of a validation metric; each trial is a training run.

    python -m needle.tune study=forward_kl exp=001_losses arm=forward_kl dry_run=true
    python -m needle.tune study=forward_kl exp=001_losses arm=forward_kl trials=20
    python -m needle.tune study=rates 'overrides=["student=san_nano","data=demo"]' space=one_rate

The first trial has the settings as they are, so that the search says what it gained. Ctrl-C and kills lose at most the
steps since the last checkpoint: the same command goes on with the very trial, and draws what it would have drawn. The
same command in another process, or another job of a cluster with a shared disk, takes trials of the same study. A trial
that fails is listed with its error. Any view of Optuna studies opens runs/tuning/STUDY.db. Costs a run of needle.train
a trial, less where trials are pruned.
"""

import csv
import datetime
import io
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import Field
from rich.box import SIMPLE
from rich.table import Table

from needle import artifacts, cells, config, train
from needle.console import show
from needle.errors import ConfigError, UserError
from needle.experiment import known_experiment
from needle.runs import Paths, Run
from needle.train import Composed
from needle.tuning import Axis, Pruning, Watch, draw, overrides_of, validations

# So many failures in a row are not the draws' fault.
FAILURES_MAX = 3
SHOWN = 5


@dataclass(frozen=True)
class Search:
    """conf/tune.yaml, built, and the overrides of needle.train that all trials have."""

    study: str
    common: tuple[str, ...]
    space: Mapping[str, Axis]
    objective: str
    direction: Literal["minimize", "maximize"]
    trials: int
    startup_trials: int
    pruning: Pruning
    seed: int
    allow_dirty: bool
    paths: Paths

    @property
    def folder(self) -> Path:
        """Locks and the table; the study itself is the file beside it."""
        return self.paths.runs / "tuning" / self.study

    @property
    def database(self) -> Path:
        return self.folder.with_suffix(".db")

    def lock(self, number: int) -> Path:
        return self.folder / f"trial-{number:03}.lock"


@config.stage("tune")
def main(
    cfg: dict[str, Any],
    *,
    study: Annotated[str, Field(pattern=r"^[\w.-]+$")],
    exp: str | None,
    arm: str | None,
    overrides: list[str],
    space: Mapping[str, Any],
    objective: Annotated[str, Field(pattern=r"^val/\w+$")],
    direction: Literal["minimize", "maximize"],
    trials: Annotated[int, Field(ge=1)],
    startup_trials: Annotated[int, Field(ge=1)],
    pruning: Pruning,
    seed: Annotated[int, Field(ge=0)],
    dry_run: bool,
    allow_dirty: bool,
    usd_per_hour: Annotated[float, Field(ge=0)],
    paths: Paths,
) -> None:
    artifacts.require_clean(allow_dirty=allow_dirty)
    common = (
        *_arm(exp, arm),
        *config.path_words(cfg["_overrides_"]),
        *overrides,
        "samples=0",
        "suites=[]",
        f"name={study}",
    )
    names = "study common space objective direction trials startup_trials pruning seed allow_dirty paths"
    search = Search(**{key: value for key, value in locals().items() if key in names.split()})
    as_they_are = _check(search)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if dry_run and not search.database.is_file():
        _show_plan(search, 0, as_they_are, usd_per_hour)
        return
    opened = _opened(search)
    _show_plan(search, _counted(opened), as_they_are, usd_per_hour)
    if dry_run:
        return
    _enqueue(search, opened, as_they_are)
    failures = 0
    while True:
        with _next(search, opened) as trial:
            if trial is None:
                break
            failures = 0 if _run(search, opened, trial) else failures + 1
        if failures == FAILURES_MAX:
            error = opened.trials[-1].user_attrs.get("error", "unknown")
            raise UserError(f"{failures} trials in a row failed, the search stops; the last one: {error}")
    _report(search, opened)


def _arm(exp: str | None, arm: str | None) -> list[str]:
    """The overrides that choose the experiment and, of it, the arm."""
    if exp is None:
        if arm is not None:
            raise ConfigError(f"arm={arm}: name the experiment that it is an arm of with exp=...")
        return []
    experiment = f"experiment={known_experiment(exp)}"
    if arm is None:
        return [experiment]
    arms = config.compose("train", [experiment])[0].sweep.arms
    if arm not in arms:
        raise ConfigError(f"arm={arm}: {exp} has {', '.join(arms) or 'no arms'}")
    return [experiment, *arms[arm]]


def _composed(search: Search, overrides: Sequence[str]) -> Composed:
    return train.composed(*config.compose("train", [*search.common, *overrides]))


def _check(search: Search) -> Composed:
    """The settings as they are, once it is sure that the data is there and, of a study to be begun, that every end of
    every axis is legal.

    Raises:
        ConfigError: an axis names no setting of needle.train, or goes beyond what it may be.
        DataError: shards or signals are not there.
    """
    if not search.space:
        raise ConfigError("space={}: nothing to search; choose one of conf/space, such as space=learning_rates")
    base = _composed(search, [])
    if not search.database.is_file():
        _check_ends(search)
    command = f"python -m needle.prepare {config.as_overrides(base.cfg, 'data')}"
    artifacts.require(base.sources.shards, kind="shards", command=command)
    if base.sources.signals is not None:
        command = f"python -m needle.signals {config.as_overrides(base.cfg, 'data', 'teacher', 'alignment')}"
        artifacts.require(base.sources.signals, kind="signals", command=command)
    return base


def _check_ends(search: Search) -> None:
    """All axes at their first end, then all at the next: to check a configuration takes half a second."""
    axes = search.space.values()
    for place in range(max(len(axis.ends) for axis in axes)):
        ends = [(axis, axis.ends[min(place, len(axis.ends) - 1)]) for axis in axes]
        _composed(search, [word for axis, end in ends for word in overrides_of(axis, end)])


def _opened(search: Search) -> optuna.Study:
    """Raises ConfigError when the study was begun with other settings: its trials would not be comparable."""
    search.folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{search.database}", engine_kwargs={"connect_args": {"timeout": 60}}
    )
    opened = optuna.create_study(
        storage=storage,
        study_name=search.study,
        direction=search.direction,
        pruner=search.pruning.pruner(),
        load_if_exists=True,
    )
    own = json.loads(json.dumps(_description(search)))
    before = opened.user_attrs.get("settings")
    if before is None:
        opened.set_user_attr("settings", own)
        return opened
    changed = [key for key in own if before.get(key) != own[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{search.database} was begun with {key}={before.get(key)}, this is {own[key]}: go on with that, or begin "
            "another one with study=NAME"
        )
    return opened


def _description(search: Search) -> dict[str, Any]:
    """What all trials of a study have in common. More trials, or another place, are no other study."""
    space = {name: {"kind": type(axis).__name__, **asdict(axis)} for name, axis in search.space.items()}
    # Where things lie says nothing about what they are.
    common = [override for override in search.common if not override.startswith("paths.")]
    rest = {key: getattr(search, key) for key in ("objective", "direction", "startup_trials", "seed")}
    return {"overrides": common, "space": space, "pruning": asdict(search.pruning), **rest}


def _counted(opened: optuna.Study) -> int:
    """Trials that are over and did not fail."""
    return len(opened.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _show_plan(search: Search, done: int, as_they_are: Composed, usd_per_hour: float) -> None:
    left = max(0, search.trials - done)
    one = (as_they_are.cfg, as_they_are.sources.shards)
    cost = cells.Cost.of([one] * left, runs=[search.paths.runs])
    print(f"study {search.study}: {search.direction} {search.objective} over")
    for name, axis in search.space.items():
        print(f"  {name}: {' = '.join(axis.keys)}, {' to '.join(map(str, axis.ends))}")
    print(f"{done} of {search.trials} trials are over, left: {cost.told(usd_per_hour=usd_per_hour)}", flush=True)


def _enqueue(search: Search, opened: optuna.Study, as_they_are: Composed) -> None:
    """Makes the settings as they are the first trial, where the space holds them."""
    cfg = OmegaConf.create(as_they_are.cfg)
    values = {}
    for name, axis in search.space.items():
        current = {OmegaConf.select(cfg, key) for key in axis.keys}
        if len(current) != 1 or not axis.holds(next(iter(current))):
            print(f"the first trial is drawn: the space does not hold what {' and '.join(axis.keys)} are now")
            return
        values[name] = current.pop()
    with artifacts.locked(search.folder / "ask.lock", wait=True):
        if not opened.get_trials(deepcopy=False):
            opened.enqueue_trial(values)


@contextmanager
def _next(search: Search, opened: optuna.Study) -> Iterator[Trial | None]:
    """A trial, held while the block runs: one that a killed process left, or a new one; None when there are enough.

    One process at a time draws. What a trial draws hangs on the study's seed, the trial's number and the trials before
    it, and so not on how often the search was stopped.
    """
    with ExitStack() as held:
        with artifacts.locked(search.folder / "ask.lock", wait=True):
            trial = None
            running = opened.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            for left in running:
                if held.enter_context(artifacts.locked(search.lock(left.number), wait=False)):
                    opened.sampler = _sampler(search, left.number)  # it may have been killed before it drew
                    trial = Trial(opened, left._trial_id)
                    break
            if trial is None and _counted(opened) + len(running) < search.trials:
                trial = _drawn(search, opened)
                held.enter_context(artifacts.locked(search.lock(trial.number), wait=True))
        yield trial


def _drawn(search: Search, opened: optuna.Study) -> Trial:
    waiting = opened.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    number = waiting[0].number if waiting else len(opened.get_trials(deepcopy=False))
    opened.sampler = _sampler(search, number)
    trial = opened.ask()
    draw(search.space, trial)
    return trial


def _sampler(search: Search, number: int) -> optuna.samplers.TPESampler:
    """Of one trial: a generator that all trials shared would begin again after each interruption."""
    return optuna.samplers.TPESampler(
        n_startup_trials=search.startup_trials,
        constant_liar=True,  # trials that run elsewhere count as bad ones, so that nobody tries the same
        seed=int(artifacts.fingerprint(seed=search.seed, number=number), 16) % 2**32,
    )


def _run(search: Search, opened: optuna.Study, trial: Trial) -> bool:
    """Trains the trial, from wherever it stands, and tells the study; False when it failed."""
    values = draw(search.space, trial)
    words = [word for name, axis in search.space.items() for word in overrides_of(axis, values[name])]
    trial.set_user_attr("overrides", words)
    print(f"trial {trial.number}: {' '.join(words)}", flush=True)
    try:
        folder, pruned = _trained(search, trial, _composed(search, words))
        trial.set_user_attr("run", str(folder))
        value = validations(folder, search.objective)[-1][1]
    except FloatingPointError as error:  # too high a rate, which is worth knowing
        trial.set_user_attr("error", str(error))
        opened.tell(trial, state=TrialState.PRUNED)
        print(f"trial {trial.number}: diverged: {error}", flush=True)
        return True
    except (Exception, SystemExit) as error:
        told = str(error) if isinstance(error, UserError) else traceback.format_exc()
        trial.set_user_attr("error", told)
        opened.tell(trial, state=TrialState.FAIL)
        print(f"trial {trial.number}: failed: {told}", flush=True)
        return False
    opened.tell(trial, state=TrialState.PRUNED) if pruned else opened.tell(trial, value)
    print(f"trial {trial.number}: {search.objective}={value:.4f}{', pruned' if pruned else ''}", flush=True)
    return True


def _trained(search: Search, trial: Trial, composed: Composed) -> tuple[Path, bool]:
    """The trial's run and whether it is pruned. A run that is there already is taken, or continued."""
    runs, known_as = search.paths.runs, composed.identity
    with artifacts.locked(cells.lock_path(runs, known_as), wait=True):
        state = cells.Standing(runs, allow_dirty=search.allow_dirty).of(known_as, locked=True)
        if state.kind == cells.FINISHED and state.run:
            return state.run, Watch(trial, objective=search.objective, find=lambda: state.run).told_through(state.run)
        stopped = state.run if state.can_continue else None
        begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        find_run = (lambda: stopped) if stopped else (lambda: _begun_since(begun, search, known_as))
        folder = None
        with Watch(trial, objective=search.objective, find=find_run) as watch:
            folder = train.go_on(stopped, None) if stopped else train.start(composed.cfg, composed.settings)
        folder = folder or watch.folder
        assert folder is not None  # a watch prunes only what it has found
        return folder, watch.told_through(folder)


def _begun_since(begun_utc: str, search: Search, known_as: str) -> Path | None:
    """The folder of the run that this process has just claimed, once it has one."""
    for path in (search.paths.runs / "train").glob(f"{search.study}-*/run.json"):
        record = Run(path.parent).record
        if record.get("identity") == known_as and record["started_utc"] >= begun_utc:
            return path.parent
    return None


def _report(search: Search, opened: optuna.Study) -> None:
    """The best trials, what the search gained, and every trial in trials.csv."""
    trials = opened.get_trials(deepcopy=False)
    _write_csv(search, trials)
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    for trial in trials:
        if trial.state == TrialState.FAIL:
            print(f"trial {trial.number} failed: {trial.user_attrs.get('error', 'unknown').splitlines()[-1]}")
    if not finished:
        raise UserError(f"no trial of {search.study} came to its end: see {search.folder / 'trials.csv'}")
    ranked = sorted(finished, key=lambda one: one.value, reverse=search.direction == "maximize")
    table = Table(title=f"{search.study}: {len(finished)} finished trials", title_justify="left", box=SIMPLE)
    for name in ("trial", search.objective, *search.space, "run"):
        table.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
    for trial in ranked[:SHOWN]:
        values = {name: trial.params[name] for name in search.space}
        told = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values.values()]
        table.add_row(str(trial.number), f"{trial.value:.4f}", *told, trial.user_attrs["run"])
    show(table)
    best, first = ranked[0], trials[0]
    if first.state == TrialState.COMPLETE and best is not first:
        print(f"first trial: {first.value:.4f}, best: {best.value:.4f}, of one seed each")
    print(f"best: {' '.join(best.user_attrs['overrides'])}")


def _write_csv(search: Search, trials: Sequence[FrozenTrial]) -> None:
    stream = io.StringIO()
    names = ["trial", "state", search.objective, *search.space, "run", "error"]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        value = trial.value if trial.state == TrialState.COMPLETE else trial.intermediate_values.get(trial.last_step)
        known = {name: trial.user_attrs.get(name) for name in ("run", "error")}
        row = {"trial": trial.number, "state": trial.state.name.lower(), search.objective: value}
        writer.writerow({**row, **trial.params, **known})
    artifacts.write_text_atomic(search.folder / "trials.csv", stream.getvalue())


if __name__ == "__main__":
    main()
