"""What runs read and made, as W&B artifacts: corpus -> shards -> signals -> checkpoint -> predictions -> table.

Every name and every content is a function of what lies on disk, and W&B keeps one version of equal contents: whoever
names a thing, the run that made it or one that read it, names the same version. So offline runs need no server to refer
to each other. Send makers before readers all the same: a server may take who names a thing first for its maker.

Of a corpus, its shards and its signals only the manifest goes to W&B (hashes, counts, commit), not the data: they may
be large and not the user's to publish, and file:// references would be paths that mean nothing on another machine.
`logger.upload_data=true` sends them whole.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from needle.artifacts import REPOSITORY, hash_once
from needle.schema import EVALUATION_SPLITS
from needle.scores import answers_path

if TYPE_CHECKING:
    from wandb import Artifact

# What is in the repository is nobody's secret.
PUBLIC_CORPUS = REPOSITORY / "data" / "teacher_corpus"
# Of an answer's line in a file of scores: what tells right from wrong, and none of the request's or answer's words.
VERDICT = ("id", "kind", "domain", "split", "n_tools", "confidence", "exact", "exact_unordered", "name")
STAGES = {"corpus": "generate", "shards": "prepare", "signals": "signals"}


@dataclass(frozen=True)
class Thing:
    """An artifact to be: `files` maps names to paths that will not change any more, or to contents."""

    name: str
    kind: str
    metadata: Mapping[str, Any]
    files: Mapping[str, Path | bytes]

    def build(self) -> "Artifact":
        import wandb

        artifact = wandb.Artifact(artifact_name(self.name), type=self.kind, metadata=dict(self.metadata))
        for name, content in sorted(self.files.items()):
            if isinstance(content, Path):
                # Read where it lies when it is sent: a copy of every checkpoint would double what runs take.
                artifact.add_file(str(content), name=name, policy="immutable")
            else:
                with artifact.new_file(name, mode="wb") as stream:
                    stream.write(content)
        return artifact


def artifact_name(name: str) -> str:
    """W&B allows letters, digits, -, _ and ., at most 128 of them."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-128:]


def shares_texts(cfg: Mapping[str, Any]) -> bool:
    """Whether the corpus's requests and answers may leave the machine: the user said so, or they are the
    repository's own."""
    data = cfg["data"]
    is_public = Path(data["corpus"]).resolve() == PUBLIC_CORPUS and not data["given"]
    return _uploads(cfg) or is_public


def _uploads(cfg: Mapping[str, Any]) -> bool:
    return bool(cfg.get("logger", {}).get("upload_data"))


def shares_answers(cfg: Mapping[str, Any], run_folder: Path, score: Path) -> bool:
    """Whether the answers to a suite may: where texts may, and the suite is of the corpus. A file of requests that was
    scored besides is the user's own."""
    if _uploads(cfg):
        return True
    if not shares_texts(cfg):
        return False
    shards = Path(json.loads((run_folder / "run.json").read_text("utf-8"))["facts"]["shards"])
    asked = json.loads(score.read_text("utf-8"))["inputs"]["suite"]
    splits = [shards / f"{split}.jsonl" for split in EVALUATION_SPLITS]
    return any(path.is_file() and hash_once(path) == asked for path in splits)


def derived(folder: Path, *, with_data: bool) -> Thing:
    """A corpus, shards or signals: a folder with manifest.json (needle.artifacts)."""
    content = (folder / "manifest.json").read_bytes()
    manifest = json.loads(content)
    files: dict[str, Path | bytes] = {}
    if with_data:
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {name: manifest.get(name) for name in ("kind", "inputs", "counts", "commit", "dirty")}
    return Thing(folder.name, manifest["kind"], kept, {**files, "manifest.json": content})


def checkpoint(folder: Path, *, with_weights: bool) -> Thing:
    """A student's folder: RUN/model, or one that was published (experiments/...)."""
    is_of_run = (folder.parent / "run.json").is_file()
    name = f"{folder.parent.name}.{folder.name}" if is_of_run else folder.name
    weights = folder / "model.safetensors"
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    if not with_weights:
        del files[weights.name]
    metadata = {"kind": "checkpoint", "sha256": hash_once(weights), "bytes": weights.stat().st_size}
    return Thing(name, "checkpoint", metadata, files)


def predictions(run_folder: Path, score: Path, *, with_texts: bool) -> Thing:
    """A suite's totals and every answer's verdict; with the requests and answers where they may be sent."""
    totals = json.loads(score.read_text("utf-8"))
    answers = answers_path(score)
    files: dict[str, Path | bytes] = {}
    if with_texts:
        files |= {score.name: score, answers.name: answers}
    else:
        files[score.name] = json.dumps({**totals, "error_reasons": None}).encode()
        lines = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
        verdicts = [{name: line[name] for name in VERDICT if name in line} for line in lines]
        files[answers.name] = "".join(json.dumps(verdict) + "\n" for verdict in verdicts).encode()
    metadata = {"kind": "predictions", **{name: totals.get(name) for name in ("suite", "checkpoint", "n", "inputs")}}
    return Thing(f"{run_folder.name}.{score.stem}", "predictions", metadata | {"texts": with_texts}, files)


def table(folder: Path) -> Thing:
    """A report's folder: its table and figures."""
    names = ("results.csv", "results.md", *(path.name for path in sorted(folder.glob("*.png"))))
    # By content: the next report replaces these files.
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return Thing(f"table-{folder.name}", "table", {"kind": "table"}, files)


def student_folder(path: str | Path | None) -> Path | None:
    """The model's folder of a run's folder or of a model's; None where there is none."""
    if path is None:
        return None
    found = [folder for folder in (Path(path) / "model", Path(path)) if (folder / "model.safetensors").is_file()]
    return found[0] if found else None


def inputs_of(record: Mapping[str, Any], cfg: Mapping[str, Any]) -> tuple[list[Path], list[Path]]:
    """The derived folders and the students' folders that a training run read. `record`: its run.json."""
    named, root = record["inputs"], Path(cfg["paths"]["artifacts"])
    folders = [root / named[kind] for kind in ("shards", "signals") if kind in named]
    students = [student_folder(cfg.get("initial"))]
    if "teacher" in named:  # its network ran beside the student's; stored distributions name theirs themselves
        students.append(student_folder(cfg["teacher"].get("checkpoint")))
    return [one for one in folders if (one / "manifest.json").is_file()], [one for one in students if one]


def parents(folder: Path, *, corpus: Path) -> tuple[list[Path], list[Path]]:
    """As `inputs_of`, of a derived folder, by its manifest. `corpus`: where a bought corpus would lie that does not
    stand beside it."""
    inputs = json.loads((folder / "manifest.json").read_text("utf-8"))["inputs"]
    beside = [folder.parent / str(inputs[kind]) for kind in ("corpus", "shards") if kind in inputs]
    if "corpus" in inputs and corpus.name == inputs["corpus"]:
        beside.append(corpus)
    found = [one for one in dict.fromkeys(beside) if (one / "manifest.json").is_file()][:1]
    students = [student_folder(inputs[kind]) for kind in ("teacher", "tokenizer") if "/" in str(inputs.get(kind, ""))]
    return found, [one for one in students if one]


def ancestors(folders: list[Path], *, corpus: Path) -> list[Path]:
    """These derived folders and all that they stand on, what others stand on first."""
    found: list[Path] = []
    for folder in folders:
        found += [*ancestors(parents(folder, corpus=corpus)[0], corpus=corpus), folder]
    return list(dict.fromkeys(found))
