"""One W&B run a training run, with its whole configuration, its axes, and what it read and made.

Within a sweep of W&B's own (WANDB_SWEEP_ID is set by `wandb agent`) the run is online under the id that the agent gave
it; anywhere else its id is the run folder's name.
"""

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from needle.artifacts import write_json_atomic
from needle.budgets import budgets
from needle.console import is_quiet
from needle.errors import UserError
from needle.runs import Run
from needle.scores import by_suite
from needle.tracking import lineage
from needle.tracking.lineage import STAGES, Thing

if TYPE_CHECKING:
    from wandb import Run as WandbRun

# Lightning's count of optimizer steps; every line of history carries it and `tokens`.
STEP = "trainer/global_step"
# Metric -> what of it the summary keeps. The rest keep their last value.
SUMMARIES = {
    "val/loss_nats": "min,last",
    "val/label_nats": "min,last",
    "val/token_exact_frac": "max,last",
    "val/call_forced_exact_frac": "max,last",
}


class NoTracking:
    """logger=none: history.jsonl in the run folder is all there is."""

    def __enter__(self) -> "NoTracking":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def open(self, run: Run, cfg: dict[str, Any]) -> list[Any]:
        return []

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def summary(self, values: Mapping[str, float]) -> None:
        pass

    def close(self, exit_code: int) -> None:
        pass

    def tell_again(self, run: Run, cfg: Mapping[str, Any]) -> None:
        pass

    def report(self, folder: Path, scored: Sequence[tuple[Path, Mapping[str, Any], Path]], *, root: Path) -> None:
        pass


@dataclass(frozen=True)
class Identity:
    """How a run is sorted in W&B."""

    group: str | None
    job_type: str
    tags: tuple[str, ...]
    notes: str | None


def identity_of(cfg: Mapping[str, Any], logger: "WandbTracking", *, stage: str) -> Identity:
    """What the logger's settings say; where they say nothing, what the experiment says that the run belongs to: its
    name is the group, its question the notes, the arm a tag."""
    sweep = cfg.get("sweep") or {}
    arm, question = cfg.get("arm"), sweep.get("question")
    experiment = (cfg.get("_choices_") or {}).get("experiment") or cfg.get("name")
    belongs = arm is not None or question is not None
    return Identity(
        group=logger.group if logger.group is not None else experiment if belongs else None,
        job_type=logger.job_type or stage,
        tags=tuple(dict.fromkeys([*logger.tags, *([arm] if arm is not None else [])])),
        notes=logger.notes if logger.notes is not None else question,
    )


@dataclass(frozen=True)
class WandbTracking:
    """logger=wandb. Offline unless `mode` says otherwise; the key comes from WANDB_API_KEY only. As a context manager
    it ends the run as failed when the block does not end well."""

    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: tuple[str, ...]
    notes: str | None
    mode: Literal["offline", "online"]
    upload_data: bool
    upload_checkpoint: bool
    _opened: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise ValueError(
                "mode=online: the environment has no WANDB_API_KEY; export it, or set logger.mode=offline and send the "
                "runs later with `wandb sync`"
            )

    def __enter__(self) -> "WandbTracking":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.close(1)

    def open(self, run: Run, cfg: dict[str, Any]) -> list[Any]:
        """A Lightning logger of the run that `begin` begins. Empty on every rank but the first."""
        from pytorch_lightning.loggers import WandbLogger
        from pytorch_lightning.utilities.rank_zero import rank_zero_only

        if getattr(rank_zero_only, "rank", 0):
            return []
        return [WandbLogger(experiment=self.begin(run, cfg), save_dir=str(run.folder))]

    def begin(self, run: Run, cfg: dict[str, Any]) -> "WandbRun":
        """A W&B run that holds the whole resolved configuration from its first record on, and what the training reads.

        Raises:
            UserError: W&B does not let it begin.
        """
        _finish(1)  # one that an error left open would take this run's metrics in
        record = run.record
        folders, students = lineage.inputs_of(record, cfg)
        if not _agent_run():
            for folder in lineage.ancestors(folders, corpus=_corpus(cfg)):
                self._record_maker(folder, corpus=_corpus(cfg), root=run.folder.parent.parent)
        shown = identity_of(cfg, self, stage=record["stage"])
        own = {key: value for key, value in cfg.items() if not key.startswith("_")}
        facts = {key: record.get(key) for key in ("identity", "commit", "dirty")}
        tracked = self._start(
            run.folder,
            # A run that is continued goes on under the id that it began with.
            run_id=record["facts"].get("wandb", {}).get("id", run.folder.name),
            name=run.folder.name,
            shown=shown,
            config={**own, "choices": cfg["_choices_"], **facts},
        )
        run.note(wandb={"id": tracked.id, "project": tracked.project, "entity": tracked.entity or self.entity})
        _define_axes(tracked)
        for folder in folders:
            _use(tracked, lineage.derived(folder, with_data=self.upload_data))
        for folder in students:
            _use(tracked, lineage.checkpoint(folder, with_weights=self.upload_checkpoint))
        self._opened.update(run=run, cfg=cfg)
        return tracked

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Its rows are requests and answers: they go where those may go."""
        import wandb

        if wandb.run is None:
            return
        if "cfg" not in self._opened or not lineage.shares_texts(self._opened["cfg"]):
            print(f"W&B gets no table of {name}: logger.upload_data=false, and the corpus is your own")
            return
        wandb.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def summary(self, values: Mapping[str, float]) -> None:
        """Final values, such as a suite's `test/call_exact_frac`, which have no place on an axis."""
        import wandb

        if wandb.run is not None:
            wandb.run.summary.update(dict(values))

    def close(self, exit_code: int) -> None:
        """Finishes the run: without it every job of a multirun would write into the first one. One that ended well
        leaves what it spent, its student and its scored answers."""
        import wandb

        if wandb.run is not None and exit_code == 0 and "run" in self._opened:
            self.summary(budgets(self._opened["run"].record["facts"]))
            try:
                for thing in self._made():
                    wandb.run.log_artifact(thing.build())
            except wandb.errors.Error as error:  # the student is on disk: this is no reason for its run to fail
                print(f"W&B did not take what the run made: {error}", file=sys.stderr)
        self._opened.clear()
        _finish(exit_code)

    def tell_again(self, run: Run, cfg: Mapping[str, Any]) -> None:
        """Answers an agent that asks for a run which was finished before: W&B's sweep gets what that one came to."""
        agent = _agent_run()
        if agent is None:
            return
        where = self._lineage_folder(run.folder.parent.parent, f"again-{agent}")
        own = {key: value for key, value in cfg.items() if not key.startswith("_")}
        facts = {"identity": run.record["identity"], "finished_as": run.folder.name}
        shown = identity_of(cfg, self, stage=run.record["stage"])
        tracked = self._start(where, run_id=None, name=run.folder.name, shown=shown, config={**own, **facts})
        values = budgets(run.record["facts"])
        for path in sorted((run.folder / "scores").glob("final_*.json")):
            values |= by_suite(json.loads(path.read_text("utf-8")))
        with _finishing():
            tracked.summary.update(values)

    def _made(self) -> list[Thing]:
        folder, cfg = self._opened["run"].folder, self._opened["cfg"]
        scores = sorted((folder / "scores").glob("*.json"))
        return [
            lineage.checkpoint(folder / "model", with_weights=self.upload_checkpoint),
            *(self._predictions(folder, cfg, score) for score in scores),
        ]

    def _predictions(self, folder: Path, cfg: Mapping[str, Any], score: Path) -> Thing:
        return lineage.predictions(folder, score, with_texts=lineage.shares_answers(cfg, folder, score))

    def report(self, folder: Path, scored: Sequence[tuple[Path, Mapping[str, Any], Path]], *, root: Path) -> None:
        """A run of its own for the report in `folder`: its table, and the predictions that it compares.

        Args:
            folder: holds results.csv.
            scored: of every run compared its folder, its configuration and the score file that was read.
            root: the folder of all runs.
        """
        import wandb

        if _agent_run():
            return  # the process has one run, the training's
        _finish(1)
        shown = identity_of({}, self, stage="report")
        where = self._lineage_folder(root, f"report-{folder.name}")
        tracked = self._start(where, run_id=None, name=f"report-{folder.name}", shown=shown, config={})
        with _finishing():
            for run_folder, cfg, score in scored:
                _use(tracked, self._predictions(run_folder, cfg, score))
            with (folder / "results.csv").open(encoding="utf-8", newline="") as stream:
                head, *rows = csv.reader(stream)
            tracked.log({"results": wandb.Table(columns=head, data=rows)})
            tracked.log_artifact(lineage.table(folder).build())

    def _record_maker(self, folder: Path, *, corpus: Path, root: Path) -> None:
        """A run that stands for the making of a derived folder, reconstructed from its manifest; once for each."""
        where = self._lineage_folder(root, folder.name)
        if (where / "recorded.json").is_file():
            return
        where.mkdir(parents=True, exist_ok=True)
        thing = lineage.derived(folder, with_data=self.upload_data)
        shown = Identity(self.group, STAGES.get(thing.kind, thing.kind), self.tags, None)
        # The id is the folder's name: should two processes do this at once, it is one run on the server.
        tracked = self._start(where, run_id=folder.name, name=folder.name, shown=shown, config=dict(thing.metadata))
        with _finishing():
            made_of, students = lineage.parents(folder, corpus=corpus)
            for parent in made_of:
                _use(tracked, lineage.derived(parent, with_data=self.upload_data))
            for student in students:
                _use(tracked, lineage.checkpoint(student, with_weights=self.upload_checkpoint))
            tracked.log_artifact(thing.build())
        write_json_atomic(where / "recorded.json", {"id": tracked.id})

    def _lineage_folder(self, root: Path, name: str) -> Path:
        return root / "lineage" / lineage.artifact_name(self.project) / self.mode / name

    def _start(
        self, folder: Path, *, run_id: str | None, name: str, shown: Identity, config: dict[str, Any]
    ) -> "WandbRun":
        import wandb

        # Files that an artifact copies wait here to be sent: with the run, not in the home folder.
        os.environ["WANDB_DATA_DIR"] = str((folder / "wandb").resolve())
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        agent = _agent_run()
        # The agent's server knows the run by the agent's id, project and entity; it would refuse others.
        where = {} if agent else {"project": self.project, "entity": self.entity, "id": run_id}
        try:
            return wandb.init(
                **where,
                name=name,
                group=shown.group,
                job_type=shown.job_type,
                tags=list(shown.tags),
                notes=shown.notes,
                dir=str(folder),
                mode="online" if agent else self.mode,
                config=config,
                resume="allow",
                settings=_told_by_others(self.mode) if is_quiet() else None,
            )
        except (wandb.errors.Error, TimeoutError) as error:
            raise UserError(
                f"W&B does not let the run begin ({error}); look at WANDB_BASE_URL and WANDB_API_KEY, or set "
                "logger.mode=offline and send the run later with `wandb sync`"
            ) from error


Tracking = NoTracking | WandbTracking


def _told_by_others(mode: str) -> dict[str, bool]:
    """W&B's settings for one run of many: its forty lines of summary would bury the sweep's own. An online run still
    says what went wrong."""
    return {"silent": True} if mode == "offline" else {"quiet": True}


def _agent_run() -> str | None:
    """The id of the run that a W&B agent has asked this process for."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def _corpus(cfg: Mapping[str, Any]) -> Path:
    return Path(cfg["data"]["corpus"])


def _define_axes(tracked: "WandbRun") -> None:
    """Curves over tokens, the budget in which settings are compared; steps are a column of every line too."""
    for axis in (STEP, "tokens"):
        tracked.define_metric(axis)
    for metric in ("train/*", "val/*"):
        tracked.define_metric(metric, step_metric="tokens")
    for metric, kept in SUMMARIES.items():
        tracked.define_metric(metric, step_metric="tokens", summary=kept)


def _use(tracked: "WandbRun", thing: Thing) -> None:
    """Declares an input. It is described whole, since a server may not know it yet."""
    artifact = thing.build()
    if tracked.offline:
        # use_artifact refuses to work offline. This is what it does with an artifact that is not on the server yet, and
        # the record in the transaction log does the rest when the run is sent.
        tracked._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        tracked.use_artifact(artifact)


@contextmanager
def _finishing() -> Iterator[None]:
    try:
        yield
    except BaseException:
        _finish(1)
        raise
    _finish(0)


def _finish(exit_code: int) -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)
