"""Trains one student on prepared shards, from one teacher, with one loss and one weighting.

    python -m needle.train student=san_nano loss=forward_kl teacher=checkpoint data=demo seed=1
    python -m needle.train --multirun loss=hard_label,forward_kl seed=0,1,2 teacher=checkpoint
    python -m needle.train resume=runs/train/NAME
    python -m needle.train resume=runs/train/NAME trainer.steps=4000

Ends with runs/train/NAME/model/ (safetensors). Ctrl-C finishes the step, writes a checkpoint and says how to go on;
after a kill the last checkpoint is continued and the trace of losses is the one that the uninterrupted run would have
had. A run may be continued to another length, since rates stay level until the decay at its end.
"""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pydantic import Field
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from transformers import PreTrainedModel

from needle import artifacts, cells, config
from needle.checkpoints import AtomicCheckpoints, Checkpoints, newest_checkpoint, save_checkpoint, step_of
from needle.console import is_quiet
from needle.data.curriculum import Curriculum
from needle.data.datamodule import PackedData
from needle.data.settings import DataSettings
from needle.data.shards import Shard
from needle.decode import Decoder
from needle.distil import Distillation, TrainerSettings
from needle.errors import ConfigError, DataError, UserError
from needle.experiment import Sweep
from needle.loss import AuxiliarySettings, Contrastive, Loss, Mixing, Weighting
from needle.loss.balance import Balance
from needle.loss.objective import NETWORK, Objective, needs_of
from needle.optim import OptimSettings
from needle.prepare import shards_folder
from needle.progress import Progress
from needle.quantise import Quantisation
from needle.rollouts import Rollouts, RolloutSettings, Scorer
from needle.rollouts import check_legal as check_rollouts
from needle.runs import Paths, Run, claim, identity, lengthened, reopen
from needle.schema import canonical_json, read_examples
from needle.score import check_suites, score_run
from needle.student import Architecture, load, save
from needle.teacher.aligned import Alignment, check_alignment, signals_folder, stored_temperature
from needle.teacher.base import Teacher, check_legal
from needle.text.tokenizer import TextCodec
from needle.tracking import Tracking

FOLDER_OF_RANKS = "NEEDLE_FOLDER_OF_RANKS"


@dataclass(frozen=True)
class Settings:
    """What a run is composed of: conf/train.yaml's keys, built."""

    name: str
    teacher: Any
    alignment: Alignment
    data: DataSettings
    curriculum: Curriculum
    student: Architecture
    loss: Any
    mixing: Mixing
    weighting: Weighting
    balance: Any
    auxiliaries: Mapping[str, Any]
    rollouts: RolloutSettings
    optim: OptimSettings
    quantisation: Any
    trainer: TrainerSettings
    logger: Tracking
    paths: Paths
    initial: Path | None
    resume: Path | None
    samples: int
    suites: tuple[str, ...]
    arm: str | None
    sweep: Sweep
    seed: int

    @property
    def needs(self) -> frozenset[str]:
        """Of the teacher."""
        return needs_of(self.loss, self.auxiliaries)


def legal(
    *,
    teacher: Teacher,
    loss: Loss,
    auxiliaries: Mapping[str, AuxiliarySettings],
    alignment: Alignment,
    student: Architecture,
    data: DataSettings,
    curriculum: Curriculum,
    rollouts: RolloutSettings,
    suites: tuple[str, ...],
    **_: Any,
) -> None:
    """The teacher x loss x data rule, checked while the configuration is composed."""
    check_suites(suites)
    curriculum.check(symbolic_examples=data.symbolic_examples)
    _check_student(student, auxiliaries)
    gives = {"capabilities": teacher.capabilities, "tokenizer": teacher.tokenizer}
    for asking in (loss, *auxiliaries.values()):
        names = {"loss_name": type(asking).__name__, "teacher_name": type(teacher).__name__}
        check_legal(needs=asking.needs, **gives, **names)
        check_alignment(loss=asking, teacher=teacher, alignment=alignment)
        if "samples" in asking.needs and data.answers == "first":
            raise ConfigError(
                f"data.answers=first: {type(asking).__name__} is an expectation over a teacher's samples, these shards "
                "hold one answer a request; set data.answers=all (with data.corpus=artifacts/corpus-..., labelled with "
                "role.samples=2 or more) and run needle.prepare, or choose loss=hard_label"
            )
    check_rollouts(settings=rollouts, teacher=teacher, loss=loss, target_row_tokens=data.packing.target_row_tokens)
    stored = stored_temperature(teacher)
    if "top_k" in loss.needs and stored != getattr(loss, "temperature", stored):
        cure = f"set teacher.temperature={loss.temperature} and run needle.signals again"
        if teacher.tokenizer == "own":  # told token by token, truncated: it cannot be tempered
            cure = f"set loss.temperature={stored}"
        raise ConfigError(
            f"loss.temperature={loss.temperature}: the teacher's distributions are stored at temperature {stored}; "
            f"{cure}"
        )


def _check_student(student: Architecture, auxiliaries: Mapping[str, AuxiliarySettings]) -> None:
    """Raises ConfigError where a term beside the loss asks for what the student does not have."""
    for name, term in auxiliaries.items():
        contrastive = isinstance(term, Contrastive)
        wanted = "retrieval" if contrastive else "taps" if "features" in term.needs else None
        if wanted is not None and wanted not in student.offers:
            what = "a retrieval head" if contrastive else "inner layers to compare"
            raise ConfigError(
                f"student={student.name} has no {what.removeprefix('a ')}, and auxiliary={name} needs {what}: take an "
                f"encoder-decoder (student=san_nano to san_large), or leave {name} out of auxiliary=[...]"
            )
        if contrastive and not student.retrieval_width:
            raise ConfigError(
                "student.retrieval_width=0: auxiliary=contrastive trains a retrieval head, which this student lacks; "
                "set student.retrieval_width=128"
            )


@config.stage("train")
@config.cross_check(legal)
def main(
    cfg: dict[str, Any],
    *,
    name: str,
    teacher: Teacher,
    alignment: Alignment,
    data: DataSettings,
    curriculum: Curriculum,
    student: Architecture,
    loss: Loss,
    mixing: Mixing,
    weighting: Weighting,
    balance: Balance,
    auxiliaries: Mapping[str, Any],
    rollouts: RolloutSettings,
    optim: OptimSettings,
    quantisation: Quantisation,
    trainer: TrainerSettings,
    logger: Tracking,
    paths: Paths,
    initial: Path | None,
    resume: Path | None,
    samples: Annotated[int, Field(ge=0)],
    suites: tuple[str, ...],
    arm: str | None,
    sweep: Sweep,
    seed: Annotated[int, Field(ge=0)],
) -> None:
    settings = Settings(**{key: value for key, value in locals().items() if key != "cfg"})
    if resume is not None:
        steps = trainer.steps if _new_length(cfg["_overrides_"]) else None
        with _alone(Path(resume).resolve().parent.parent, _identities(resume, steps)):
            go_on(resume, steps)
    else:
        with _alone(paths.runs, {identity(cfg, sources(settings).inputs)}):
            start(cfg, settings)


@contextmanager
def _alone(root: Path, identities: set[str]) -> Iterator[None]:
    """Holds the locks of these cells, by which a sweep knows that somebody trains them.

    Raises:
        UserError: somebody does.
    """
    with ExitStack() as held:
        # Other ranks belong to the run of the first.
        for known_as in sorted(identities) if _is_first_rank() else ():
            if not held.enter_context(artifacts.locked(cells.lock_path(root, known_as), wait=False)):
                raise UserError(
                    "another process trains just this, with these settings and inputs; wait for it, or change a "
                    "setting, such as seed"
                )
        yield


def _identities(folder: Path, steps: int | None) -> set[str]:
    """Of the run as it stands, and as it will be with another length."""
    run = reopen(folder)
    known_as = run.record["identity"]
    if steps is None or steps == run.config["trainer"]["steps"]:
        return {known_as}
    return {known_as, lengthened(known_as, steps)}


def _is_first_rank() -> bool:
    return not getattr(rank_zero_only, "rank", 0)


@dataclass(frozen=True)
class Sources:
    """What a run reads; `inputs` names each by its content."""

    shards: Path
    signals: Path | None
    inputs: Mapping[str, str]


def sources(settings: Settings) -> Sources:
    """Worked out from the settings: shards and signals need not be there yet.

    Raises:
        DataError: a file that they are named after cannot be read.
    """
    shards, signals = shards_folder(settings.paths, settings.data), None
    inputs = {"shards": shards.name}
    if "top_k" in settings.needs:
        where = {"artifacts": settings.paths.artifacts, "shards": shards}
        signals = signals_folder(settings.teacher, alignment=settings.alignment, **where)
        inputs["signals"] = signals.name
    if settings.initial is not None:
        inputs["initial"] = artifacts.hash_file(settings.initial / "model.safetensors")
    if settings.needs & NETWORK or settings.rollouts.on:
        inputs["teacher"] = settings.teacher.student_identity()
    return Sources(shards, signals, inputs)


@dataclass(frozen=True)
class Composed:
    """A run that might be: its settings, checked, and what it reads."""

    cfg: dict[str, Any]
    settings: Settings
    sources: Sources

    @property
    def identity(self) -> str:
        return identity(self.cfg, self.sources.inputs)


def composed(cfg: DictConfig, runtime: DictConfig) -> Composed:
    """Of a composed configuration and the `hydra` node that belongs to it (config.compose).

    Raises:
        ConfigError: with every problem of it.
        DataError: a file that its sources are named after cannot be read.
    """
    whole, built = config.prepared(cfg, main.stage_function, runtime=runtime)
    settings = Settings(**built)
    return Composed(whole, settings, sources(settings))


def start(cfg: dict[str, Any], settings: Settings) -> Path:
    """Trains from the first step; returns the run's folder.

    Raises:
        DataError: shards or signals are not there, or are damaged.
        KeyboardInterrupt: it was stopped, and can go on.
    """
    return _train(cfg, settings, run=None, checkpoint=None)


def _new_length(overrides: Sequence[str]) -> bool:
    """Whether a resumed run gets another number of steps, the one setting of its that may change.

    Raises:
        ConfigError: the command line asks for another change, which would be ignored.
    """
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for name, override in zip(names, overrides, strict=True):
        if name not in ("resume", "trainer.steps") and not name.startswith(("paths.", "hydra")):
            raise ConfigError(
                f"{override}: a resumed run keeps its own settings, only trainer.steps may change; leave it out, or "
                "start another run"
            )
    return "trainer.steps" in names


def config_of(run: Run) -> dict[str, Any]:
    """The run's resolved configuration, once it is sure that this code understands it.

    Raises:
        ConfigError: other code started the run.
    """
    cfg = run.config
    try:
        config.check({key: value for key, value in cfg.items() if not key.startswith("_")}, main.stage_function)
    except ConfigError as error:
        raise ConfigError(
            f"{run.folder} was started by commit {run.record['commit'][:12]}, whose settings are not this code's; go "
            f"on with that commit, or start another run:\n{error}"
        ) from error
    return cfg


def go_on(folder: Path, steps: int | None) -> Path:
    """Continues a run from its newest checkpoint, to another length where `steps` says so.

    Raises:
        DataError: there is nothing to continue.
        ConfigError: it is too late for that length.
        KeyboardInterrupt: it was stopped again.
    """
    run = reopen(folder)
    checkpoint = newest_checkpoint(run.folder / "checkpoints")
    cfg = config_of(run)
    if steps is not None:
        optim, before = config.build_settings(cfg, main.stage_function)["optim"], cfg["trainer"]["steps"]
        if optim.decay_start(total_steps=min(steps, before)) < step_of(checkpoint):
            raise ConfigError(
                f"trainer.steps={steps}: the run is at step {step_of(checkpoint)}, where the rates of a run of "
                f"{min(steps, before)} steps fall already; choose another length, or start another run"
            )
        cfg["trainer"]["steps"] = steps
    if _is_first_rank():
        run.resume(cfg)
    return _train(cfg, Settings(**config.build_settings(cfg, main.stage_function)), run=run, checkpoint=checkpoint)


def _train(cfg: dict[str, Any], settings: Settings, *, run: Run | None, checkpoint: Path | None) -> Path:
    teacher, trainer, seed = settings.teacher, settings.trainer, settings.seed
    found = sources(settings)
    shards, signals = found.shards, found.signals
    artifacts.require(shards, kind="shards", command="python -m needle.prepare " + config.as_overrides(cfg, "data"))
    if signals is not None:
        command = f"python -m needle.signals {config.as_overrides(cfg, 'data', 'teacher', 'alignment')}"
        artifacts.require(signals, kind="signals", command=command)

    torch.set_flush_denormal(True)
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    pl.seed_everything(seed, verbose=False)
    model, codec = _initial_student(settings.initial, settings.student, shards)
    network = None
    if settings.needs & NETWORK or settings.rollouts.on:
        teacher.check_tokenizer(shards)
        network = teacher.network()
    # Built after the student, so that what a loss learns does not change the student's first weights.
    objective = Objective(
        loss=settings.loss,
        mixing=settings.mixing,
        weighting=settings.weighting,
        balance=settings.balance,
        auxiliaries=settings.auxiliaries,
        student=model,
        teacher=network if settings.needs & NETWORK else None,
    )
    packed = _packed(settings, shards, signals)
    is_first = _is_first_rank()
    if run is None:
        run = _claimed(cfg, settings, found)
    if is_first and checkpoint is None:
        save(model, codec, run.folder / "initial")
    with run if is_first else nullcontext(), settings.logger:
        if is_first:
            run.note(shards=str(shards), parameters=sum(p.numel() for p in model.parameters()))
        rollouts = _rollouts(settings, model, codec, network) if settings.rollouts.on else None
        built = {"student": model, "objective": objective, "optim": settings.optim, "rollouts": rollouts}
        module = Distillation(**built, settings=trainer, run=run)
        stopped = _fit(
            module,
            packed,
            cfg,
            checkpoint=checkpoint,
            logger=settings.logger,
            quantisation=settings.quantisation,
            run=run,
        )
        if not is_first:
            return run.folder
        if stopped:
            if not is_quiet():
                print(f"stopped at step {module.global_step}; go on: python -m needle.train resume={run.folder}")
            run.finish("interrupted")
            settings.logger.close(1)
            raise KeyboardInterrupt
        run.note(**settings.quantisation.finish(model))
        save(model, codec, run.folder / "model")
        if settings.samples:
            _sample_answers(model, codec, shards, settings.samples, settings.logger, run)
        if settings.suites:
            settings.logger.summary(score_run(run.folder, suites=settings.suites))
        settings.logger.close(0)
        run.finish("finished")
    if not is_quiet():
        print(f"run: {run.folder}")
    return run.folder


def _claimed(cfg: dict[str, Any], settings: Settings, found: Sources) -> Run:
    """A new run's folder. Lightning starts the other ranks as processes that run the same command again: they find the
    folder that the first has claimed in the environment."""
    if not _is_first_rank():
        return Run(Path(os.environ[FOLDER_OF_RANKS]))
    run = claim(settings.paths.runs, stage="train", name=settings.name, cfg=cfg, inputs=dict(found.inputs))
    os.environ[FOLDER_OF_RANKS] = str(run.folder)
    return run


def _rollouts(
    settings: Settings, model: PreTrainedModel, codec: TextCodec, network: torch.nn.Module | None
) -> Rollouts:
    """`network`: the teacher's. It scores here where the loss reads stored distributions; where it reads logits, the
    objective runs it."""
    packing, scorer = settings.data.packing, None
    if "top_k" in settings.loss.needs and network is not None:
        scorer = Scorer(network, top_k=settings.teacher.top_k, temperature=settings.loss.temperature)
    return Rollouts(
        settings.rollouts,
        student=model,
        codec=codec,
        scorer=scorer,
        source_row_tokens=packing.source_row_tokens,
        target_row_tokens=packing.target_row_tokens,
        # A compiled step is compiled for one number of rows.
        rows_multiple=settings.trainer.rows_per_micro_batch if settings.trainer.compile else 1,
        seed=settings.seed,
    )


def _packed(settings: Settings, shards: Path, signals: Path | None) -> PackedData:
    packing, curriculum = settings.data.packing, settings.curriculum
    return PackedData(
        train=Shard.open(shards / "train", signals and signals / "train"),
        validation=Shard.open(shards / "validation", signals and signals / "validation"),
        symbolic=Shard.open(shards / "symbolic") if curriculum.uses_symbolic else None,
        curriculum=curriculum,
        rows_per_batch=settings.trainer.rows_per_batch,
        source_row_tokens=packing.source_row_tokens,
        target_row_tokens=packing.target_row_tokens,
        window_examples=packing.window_examples,
        seed=settings.seed,
    )


def _initial_student(initial: Path | None, student: Architecture, shards: Path) -> tuple[PreTrainedModel, TextCodec]:
    codec = TextCodec.load(shards)
    if initial is None:
        return student.build(codec).train(), codec
    model, its_codec = load(Path(initial))
    if artifacts.hash_file(Path(initial) / "tokenizer.json") != artifacts.hash_file(shards / "tokenizer.json"):
        raise DataError(
            f"initial={initial} was trained with another tokenizer than {shards}; prepare with "
            f"data.text.tokenizer={initial}"
        )
    fresh = student.build(codec)
    if type(model) is not type(fresh):
        raise DataError(
            f"initial={initial} is a {model.config.model_type} student, student={student.name} makes a "
            f"{fresh.config.model_type}: start from a student of the same architecture, or choose its student=..."
        )
    wanted = {key: getattr(fresh.config, key) for key in vars(student) if key != "name"}
    differing = [key for key, value in wanted.items() if getattr(model.config, key) != value]
    if differing == ["retrieval_width"] and not model.config.retrieval_width:
        # A head may be put on a student that has none: it starts fresh, all else is the initial student's.
        fresh.load_state_dict(model.state_dict(), strict=False)
        return fresh.train(), its_codec
    if differing:
        key = differing[0]
        raise DataError(
            f"initial={initial} has {key}={getattr(model.config, key)}, student.{key} is {wanted[key]}: they must agree"
        )
    object.__setattr__(model, "confidence_head", None)  # it judges the student that this was before training
    return model.train(), its_codec


def _fit(
    module: Distillation,
    data: PackedData,
    cfg: dict[str, Any],
    *,
    checkpoint: Path | None,
    logger: Tracking,
    quantisation: Quantisation,
    run: Run,
) -> bool:
    """Trains to the end or to a Ctrl-C; returns whether it was stopped."""
    settings = module.settings
    _silence_lightning(devices=settings.devices)
    stop = StopAtSignal()
    runner = pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=settings.strategy,
        precision=settings.precision,
        max_steps=settings.steps,
        max_epochs=-1,
        val_check_interval=settings.validate_every_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=logger.open(run, cfg),
        callbacks=[*quantisation.callbacks(), Checkpoints(), stop, Report()],
        plugins=[AtomicCheckpoints()],
        default_root_dir=run.folder,
        enable_checkpointing=False,  # our own callback writes them
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=settings.log_every_steps,
    )
    if checkpoint is not None:
        step = step_of(checkpoint)
        data.stream.start_at(step)
        if _is_first_rank():
            run.truncate_history(after_step=step)
        validated = [one["step"] for one in run.history() if "val/loss_nats" in one and one["step"] <= step]
        module.validated_step = max(validated, default=-1)
    with stop.listening():
        runner.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    # The last step need be no multiple of a validation's, and a kill may have come between the two.
    if not stop.requested and module.validated_step < settings.steps:
        runner.validate(module, datamodule=data, verbose=False)
    seconds = module.seconds()
    if _is_first_rank():
        run.note(
            steps=module.steps_done,
            tokens=module.tokens_seen,
            train_seconds=round(seconds, 1),
            tokens_per_s=round(module.tokens_seen / max(seconds, 1e-9), 1),
        )
    return stop.requested and module.steps_done < settings.steps


def _silence_lightning(*, devices: int) -> None:
    """Lightning's remarks on every run that say nothing of this one; whatever else it warns of is shown."""
    # Which accelerators there are, advertisements, that max_steps was reached: run.json holds what matters of it.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Its own call of a part of torch that will go.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    if devices == 1:  # there is nothing for srun to start
        warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")


def _sample_answers(
    model: PreTrainedModel, codec: TextCodec, shards: Path, count: int, logger: Tracking, run: Run
) -> None:
    """A table of validation requests with the student's answers, in the run folder and in W&B."""
    examples, _ = read_examples(shards / "validation.jsonl")
    # Spread over the file, which is ordered by domain.
    chosen = examples[:: max(1, len(examples) // count)][:count]
    decoder = Decoder(model.eval(), codec, constrained=True, max_new_tokens=256, max_calls=8)
    answers = decoder.decode([(example.query, example.tools) for example in chosen])
    columns = ("request", "tools", "gold", "answer", "confidence")
    rows = [
        (
            example.query,
            ", ".join(tool.name for tool in example.tools),
            canonical_json([asdict(call) for call in example.calls]),
            answer.error or canonical_json([asdict(call) for call in answer.calls or ()]),
            round(answer.confidence or 0.0, 4),
        )
        for example, answer in zip(chosen, answers, strict=True)
    ]
    artifacts.write_json_atomic(run.folder / "samples.json", [dict(zip(columns, row, strict=True)) for row in rows])
    logger.table("samples", columns, rows)


class StopAtSignal(Callback):
    """Ctrl-C or SIGTERM lets the step finish, writes a checkpoint and ends the training; a second one ends at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._note) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("finishing the step and writing a checkpoint; once more to stop at once", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Distillation, *_: Any) -> None:
        if self.requested and not trainer.should_stop:
            save_checkpoint(trainer, module)
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, module: Distillation) -> None:
        """Once more, with what a validation that was due has changed."""
        if trainer.should_stop and module.validates_now and trainer.state.fn == TrainerFn.FITTING:
            save_checkpoint(trainer, module)


class Report(Callback):
    """Progress with ETA, and the clock that history and checkpoints read."""

    def on_train_start(self, trainer: pl.Trainer, module: Distillation) -> None:
        started = time.monotonic()
        module.seconds = lambda: module.seconds_before + time.monotonic() - started
        self._progress = Progress("trains").__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Distillation, *_: Any) -> None:
        module.steps_done = trainer.global_step
        if trainer.is_global_zero and trainer.global_step % module.settings.log_every_steps == 0:
            note = f"loss {module.last_loss_nats:.3f} nats, {module.tokens_seen / module.seconds():,.0f} tokens/s"
            self._progress.update(trainer.global_step, module.settings.steps, note)

    def on_train_end(self, trainer: pl.Trainer, module: Distillation) -> None:
        self._progress.__exit__(None, None, None)


if __name__ == "__main__":
    main()
