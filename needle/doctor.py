"""Says whether a loss is right, and what a run's objective does to its student.

    python -m needle.doctor loss=reverse_kl                              # make doctor LOSS=reverse_kl
    NEEDLE_TARGETS=mypackage python -m needle.doctor target=mypackage.MyLoss +arguments.temperature=2.0
    python -m needle.doctor mutations=true                               # would the checks notice a fault?
    python -m needle.doctor run=runs/train/NAME                          # make doctor RUN=runs/train/NAME

Of a loss: every property of needle.loss.conformance, as pass, FAIL with the offending numbers, or n/a with the reason;
exit status 1 if one fails. Cost: a second. Of a run: its newest student on batches of its training data; tokens, what
the teacher says, every term's size and gradient, and whether terms pull against each other. Cost: a training step a
term and batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import torch
from hydra import compose
from pydantic import Field

from needle import artifacts, config
from needle.artifacts import write_json_atomic
from needle.data.packing import PackedBatches
from needle.data.shards import Shard
from needle.errors import ConfigError
from needle.loss import Loss, Mixing, Weighting
from needle.loss.conformance import Result, check
from needle.loss.diagnosis import Diagnosis, diagnose
from needle.loss.mutations import as_text, survey
from needle.loss.objective import NETWORK, Objective
from needle.loss.trials import Subject, forms
from needle.runs import Run, existing

Count = Annotated[int, Field(ge=1)]
WORDS = {True: "pass", False: "FAIL", None: "n/a"}
# Labels and distillation are both measured, whatever the mixture's share is.
BOTH = Mixing(shape="constant", start=0.5, end=0.5, begin_frac=0.0, end_frac=1.0)


@config.stage("doctor")
def main(
    cfg: dict[str, Any],
    *,
    loss: Loss,
    weighting: Weighting,
    target: str | None,
    arguments: Mapping[str, Any],
    mutations: bool,
    run: Path | None,
    batches: Count,
    threads: Count | None,
    output: Path | None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    own = _own(target, arguments)
    named = own is not None or any(o.partition("=")[0].split(".")[0] == "loss" for o in cfg["_overrides_"])
    chosen = own or loss
    if run is not None:
        found = _examine(existing(run), loss=chosen if named else None, batches=batches)
    elif mutations:
        found = _mutate([chosen] if named else registered_losses(), weighting)
    else:
        found = _check(chosen, weighting)
    if output is not None:
        write_json_atomic(output, found)
    if found["failed"]:
        raise SystemExit(1)


def _own(target: str | None, arguments: Mapping[str, Any]) -> Loss | None:
    """Raises ConfigError: there is no such class, or it is not built with these arguments."""
    if target is None:
        if arguments:
            raise ConfigError(
                f"arguments={dict(arguments)} are those of target=..., which is not set; see loss.* instead"
            )
        return None
    node = {"loss": {"_target_": target, **arguments}}

    def take(*, loss: Loss) -> None: ...

    config.check(node, take)
    built = config.build(node["loss"])
    if not callable(built) or not isinstance(getattr(built, "needs", None), frozenset):
        raise ConfigError(
            f"target={target} is no loss: it has to be callable and have `needs`, a frozenset (needle.loss.base.Loss)"
        )
    return cast(Loss, built)


def registered_losses() -> list[Loss]:
    """One of each file of conf/loss, where Hydra runs."""
    names = sorted(path.stem for path in (config.CONF / "loss").glob("*.yaml"))
    return [config.build(compose("doctor", [f"loss={name}"]).loss) for name in names]


# ---- a loss


def _check(loss: Loss, weighting: Weighting) -> dict[str, Any]:
    results = {}
    for form in forms(loss):
        subject = Subject(form, weighting)
        results[subject.name] = check(subject)
        print(_report(subject.name, results[subject.name]), end="\n\n")
    failed = [name for name, found in results.items() if any(result.passed is False for result in found)]
    return {"failed": failed, "results": {n: [r._asdict() for r in found] for n, found in results.items()}}


def _report(name: str, results: Sequence[Result]) -> str:
    wide = max(len(result.name) for result in results)
    lines = [f"  {WORDS[result.passed]:4}  {result.name:{wide}}  {result.detail}" for result in results]
    count = {word: sum(WORDS[result.passed] == word for result in results) for word in WORDS.values()}
    told = f"{count['pass']} pass, {count['FAIL']} FAIL, {count['n/a']} n/a"
    return "\n".join([f"{name}: {told}", *lines])


def _mutate(losses: Iterable[Loss], weighting: Weighting) -> dict[str, Any]:
    rows = survey([Subject(form, weighting) for loss in losses for form in forms(loss)])
    print(as_text(rows))
    return {"failed": [row.mutation for row in rows if row.missed], "mutations": [asdict(row) for row in rows]}


# ---- a run


class Patient(NamedTuple):
    """A run's student as it is now, what it minimises, and how far it has come."""

    student: torch.nn.Module
    objective: Objective
    source: str
    progress: float
    share: float


def _examine(run: Run, *, loss: Loss | None, batches: int) -> dict[str, Any]:
    from needle.prepare import shards_folder
    from needle.train import Settings, config_of, legal  # it brings Lightning, which a loss alone must not wait for
    from needle.train import main as training

    settings = Settings(**config.build_settings(config_of(run), training.stage_function))
    if loss is not None:
        settings = replace(settings, loss=loss)
        legal(**vars(settings))
    shards = Path(run.record["facts"].get("shards") or shards_folder(settings.paths, settings.data))
    artifacts.require(shards, kind="shards", command="python -m needle.prepare with the run's data settings")
    patient = _patient(run, settings, shards)
    data = _batches(settings, shards, _signals(run, settings, shards), batches)
    found = diagnose(
        patient.objective,
        student=patient.student,
        batches=data,
        progress=patient.progress,
        share=patient.share,
    )
    print(f"{run.folder}: {patient.source}, {patient.progress:.0%} of the training behind, {len(data)} batches\n")
    print(describe(found))
    terms = {name: asdict(term) for name, term in found.terms.items()}
    cosines = [{"terms": list(pair), "cosine": cosine} for pair, cosine in found.cosines.items()]
    return {
        "failed": [],
        "run": str(run.folder),
        "student": patient.source,
        "progress": patient.progress,
        "tokens": found.tokens,
        "signal": found.signal,
        "terms": terms,
        "cosines": cosines,
        "warnings": list(found.warnings()),
    }


def _signals(run: Run, settings: Any, shards: Path) -> Path | None:
    if "top_k" not in settings.needs:
        return None
    if "signals" in run.record["inputs"]:
        folder = settings.paths.artifacts / run.record["inputs"]["signals"]
    else:
        from needle.teacher.aligned import signals_folder

        where = {"artifacts": settings.paths.artifacts, "shards": shards}
        folder = signals_folder(settings.teacher, alignment=settings.alignment, **where)
    artifacts.require(
        folder, kind="signals", command="python -m needle.signals with the run's data and teacher settings"
    )
    return folder


def _patient(run: Run, settings: Any, shards: Path) -> Patient:
    """Raises DataError: there is no student in the run's folder."""
    from needle.checkpoints import newest_checkpoint, step_of
    from needle.student import load

    checkpoint = newest_checkpoint(run.folder / "checkpoints", required=False)
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"] if checkpoint else {}
    folder, source, progress = run.folder / "initial", "as it was before the first step", 0.0
    if (run.folder / "model" / "model.safetensors").is_file():
        folder, source, progress = run.folder / "model", "the trained student", 1.0
    student, _ = load(folder)
    if checkpoint is not None and progress < 1:
        step = step_of(checkpoint)
        source, progress = f"the student at step {step}", min(1.0, step / settings.trainer.steps)
        student.load_state_dict(_part(stored, "student."))
    network = None
    if settings.needs & NETWORK:
        settings.teacher.check_tokenizer(shards)
        network = settings.teacher.network()
    objective = Objective(
        loss=settings.loss,
        mixing=BOTH,
        weighting=settings.weighting,
        balance=settings.balance,
        auxiliaries=settings.auxiliaries,
        student=student,
        teacher=network,
    )
    # What terms have learnt is in checkpoints alone. A loss put in the run's place may have another state.
    learnt, wanted = _part(stored, "objective."), objective.state_dict()
    fitting = {name: x for name, x in learnt.items() if name in wanted and wanted[name].shape == x.shape}
    objective.load_state_dict({**wanted, **fitting})
    return Patient(student, objective, source, progress, settings.mixing.at(progress))


def _part(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def _batches(settings: Any, shards: Path, signals: Path | None, count: int) -> list[dict[str, torch.Tensor]]:
    packing = settings.data.packing
    stream = PackedBatches(
        Shard.open(shards / "train", signals and signals / "train"),
        rows_per_batch=settings.trainer.rows_per_batch,
        source_row_tokens=packing.source_row_tokens,
        target_row_tokens=packing.target_row_tokens,
        window_examples=packing.window_examples,
        seed=settings.seed,
    )
    return list(islice(stream, count))


def describe(found: Diagnosis) -> str:
    """Aligned tables: tokens, the teacher's signal, terms, cosines; then what deserves a look."""
    tokens, blocks = found.tokens, []
    rows = [
        (name, span["tokens"], f"{span['tokens_frac']:.1%}", f"{span['weight_frac']:.1%}")
        for name, span in tokens["spans"].items()
    ]
    title = f"{tokens['labelled']} labelled tokens in {tokens['slots']} slots, {tokens['masked_frac']:.1%} masked"
    blocks.append(f"{title}\n" + _table(("span", "tokens", "of tokens", "of weight"), rows))
    if found.signal:
        rows = [(name.removesuffix("_frac").replace("_", " "), _figure(name, x)) for name, x in found.signal.items()]
        blocks.append("what the teacher says\n" + _table(("", ""), rows))
    rows = [
        (name, f"{term.mean:.4g}", f"{term.coefficient:.4g}", f"{term.gradient_norm:.4g}")
        for name, term in found.terms.items()
    ]
    blocks.append("terms\n" + _table(("term", "mean", "coefficient", "gradient norm"), rows))
    if found.cosines:
        rows = [(f"{a} and {b}", "none" if x is None else f"{x:+.3f}") for (a, b), x in found.cosines.items()]
        blocks.append("cosine of gradients\n" + _table(("", ""), rows))
    blocks.append("\n".join(f"warning: {line}" for line in found.warnings()) or "nothing deserves a warning")
    return "\n\n".join(blocks)


def _figure(name: str, value: float) -> str:
    if name.endswith(("_frac", "mass", "mass_most")):
        return f"{value:.2%}"
    return f"{value:.4g}" if name.endswith("_nats") else f"{value:.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Names to the left, figures to the right."""
    lines = [[str(cell) for cell in row] for row in (([head] if any(head) else []) + list(rows))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  "
        + "  ".join(
            f"{cell:<{w}}" if place == 0 else f"{cell:>{w}}"
            for place, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


if __name__ == "__main__":
    main()
