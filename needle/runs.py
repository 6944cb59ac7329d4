"""Run folders: one a run, never reused, with everything needed to say later what was run on what."""

import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf

from needle.artifacts import fingerprint, source_state, write_json_atomic, write_text_atomic
from needle.errors import DataError

RUN_VERSION = 1
# Keys that say how a run is named, executed and watched, and nothing of what it is. A teacher's answers reach a run as
# its corpus, which is among its inputs; its older settings for them stay in, as published runs are named with them.
EXECUTION = (
    "name",
    "arm",
    "sweep",
    "suites",
    "samples",
    "resume",
    "logger",
    "paths",
    "student.name",
    "teacher.answer_temperature",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.strategy",
    "trainer.threads",
    "trainer.compile",
    "trainer.rows_per_micro_batch",
    "trainer.validate_every_steps",
    "trainer.checkpoint_every_steps",
    "trainer.log_every_steps",
)
PACKAGES = ("torch", "pytorch-lightning", "transformers", "tokenizers", "llguidance", "hydra-core", "wandb", "numpy")


@dataclass(frozen=True)
class Paths:
    """Where derived data, runs, bought answers and published results are kept (conf/paths)."""

    artifacts: Path
    runs: Path
    ledger: Path
    experiments: Path


class Run:
    """A run's folder. As a context manager it records `interrupted` or `failed` when the block does not end well."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text("utf-8"))

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(json.dumps(OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"))))

    def note(self, **facts: Any) -> None:
        """Adds facts (parameters, tokens, seconds, ...) to run.json."""
        record = self.record
        record["facts"] |= facts
        write_json_atomic(self.folder / "run.json", record)

    def finish(self, status: str) -> None:
        """`finished`, `failed` or `interrupted`."""
        write_json_atomic(self.folder / "run.json", {**self.record, "status": status, "finished_utc": _now()})

    def history_append(self, record: dict[str, Any]) -> None:
        """One line of history.jsonl, on disk at once."""
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Every whole line; one that a kill cut off is left out."""
        path = self.folder / "history.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records

    def resume(self, cfg: dict[str, Any]) -> None:
        """Marks the run as running again, with `cfg`; run.json keeps when, from which code and what was set before."""
        record = self.record
        this = {"at_utc": _now(), **source_state(), "steps_before": self.config["trainer"]["steps"]}
        write_text_atomic(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(cfg)))
        record |= {"status": "running", "finished_utc": None, "resumed": [*record.get("resumed", []), this]}
        record["dirty"] = record["dirty"] or this["dirty"]
        if cfg["trainer"]["steps"] != this["steps_before"]:
            record["identity"] = lengthened(record["identity"], cfg["trainer"]["steps"])
        write_json_atomic(self.folder / "run.json", record)

    def truncate_history(self, *, after_step: int) -> None:
        """Forgets what was logged after the checkpoint that a resumed run starts from."""
        kept = [record for record in self.history() if record["step"] <= after_step]
        write_text_atomic(self.folder / "history.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self.record["status"] == "running":
            try:
                self.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            except Exception as second:  # a full disk, most likely the very error that is on its way up
                print(f"could not record how {self.folder} ended: {second}", file=sys.stderr)


def identity(cfg: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """What a run is, as 12 hexadecimal digits: its resolved settings without EXECUTION, and the hashes of its inputs.
    Runs of one identity would have one outcome."""

    shaping = _shaping(cfg)

    def kept(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found = {}
        for key, value in node.items():
            name = f"{prefix}{key}"
            if (name in EXECUTION and name not in shaping) or (not prefix and key.startswith("_")):
                continue
            found[key] = kept(value, f"{name}.") if isinstance(value, Mapping) else value
        return found

    return fingerprint(settings=kept(cfg, ""), inputs=inputs)


def lengthened(known_as: str, steps: int) -> str:
    """The identity of a run that went on to another length. It is a run of neither length: schedules and curricula were
    laid out for the first."""
    return fingerprint(run=known_as, steps=steps)


def _shaping(cfg: Mapping[str, Any]) -> set[str]:
    """Keys of EXECUTION that do say what this run is."""
    found = set()
    if cfg.get("trainer", {}).get("devices", 1) != 1:  # each draws for itself what is dropped and sampled
        found.add("trainer.devices")
    if any("Contrastive" in str(term.get("_target_")) for term in (cfg.get("auxiliaries") or {}).values()):
        found.add("trainer.rows_per_micro_batch")  # its negatives are those of the micro-batch
    if (cfg.get("rollouts") or {}).get("raise_frac"):
        found.add("trainer.validate_every_steps")  # every validation may raise the share of on-policy steps
    return found


def claim(root: Path, *, stage: str, name: str, cfg: dict[str, Any], inputs: dict[str, str]) -> Run:
    """Makes ROOT/STAGE/NAME-TIME-XXXX and records configuration, source, environment, hardware and inputs in it."""
    parent = Path(root) / stage
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        folder = parent / f"{name}-{time}-{secrets.token_hex(2)}"
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue
    write_text_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(cfg)))
    record = {
        "schema_version": RUN_VERSION,
        "stage": stage,
        "name": name,
        "status": "running",
        **source_state(),
        "started_utc": _now(),
        "finished_utc": None,
        "seed": cfg.get("seed"),
        "choices": cfg.get("_choices_", {}),
        "overrides": cfg.get("_overrides_", []),
        "environment": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
        "inputs": inputs,
        "identity": identity(cfg, inputs),
        "facts": {},
    }
    write_json_atomic(folder / "run.json", record)
    return Run(folder)


def existing(folder: Path) -> Run:
    """Raises DataError when the folder is no run's."""
    folder = Path(folder)
    if not (folder / "run.json").is_file() or not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} is not a run's folder: run.json and config.yaml are not both there")
    return Run(folder)


def reopen(folder: Path) -> Run:
    """A run that can be continued, untouched as yet.

    Raises:
        DataError: the folder is no run's, or the run is finished.
    """
    run = existing(folder)
    if run.record["status"] == "finished":
        raise DataError(f"{folder} is finished: there is nothing to continue")
    return run


def find(root: Path, *, stage: str | None = None) -> list[Run]:
    """Every run under `root`, by name; folders without a readable run.json are passed over."""
    pattern = f"{stage or '*'}/*/run.json"
    return [Run(path.parent) for path in sorted(Path(root).glob(pattern))]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _hardware() -> dict[str, Any]:
    """What speed depends on. torch is asked only where it is loaded already."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    facts: dict[str, Any] = {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}
    facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
