"""The recorded teacher: answers that lie in the repository."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from needle.corpus.catalogue import Catalogue, load


@dataclass(frozen=True)
class RecordedTeacher:
    """`folder`: DOMAIN.tools.json and DOMAIN.jsonl files, see data/README.md."""

    folder: Path
    capabilities: ClassVar[frozenset[str]] = frozenset({"text"})
    tokenizer: ClassVar[Literal["student", "own"]] = "own"

    def load(self) -> Catalogue:
        return load(self.folder)
