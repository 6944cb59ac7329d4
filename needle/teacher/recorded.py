"""The recorded teacher: answers that exist already, in the repository, in public data, or in a ledger."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from needle.corpus import catalogue
from needle.corpus.catalogue import Catalogue
from needle.corpus.labelling import weigh
from needle.corpus.layouts import AUTO, LAYOUTS, read
from needle.errors import DataError
from needle.schema import BadLine, Example, Tool, ToolCall, kind_of_calls, strict_json
from needle.teacher.ledger import Entry, Ledger

# needle: a folder of DOMAIN.tools.json and DOMAIN.jsonl (data/README.md). ledger: the label answers of a ledger's file.
OWN_LAYOUTS = ("needle", "ledger")


@dataclass(frozen=True)
class RecordedTeacher:
    """`path`: a file, a folder or hub:owner/name in `layout`; `split` names files or a hub dataset's split;
    `limit`: the first so many usable examples. `split` and `limit` do not apply to Needle's own layouts."""

    path: str
    layout: str
    split: str | None
    limit: Annotated[int, Field(ge=1)] | None
    capabilities: ClassVar[frozenset[str]] = frozenset({"text"})
    tokenizer: ClassVar[Literal["student", "own"]] = "own"

    def __post_init__(self):
        known = (*OWN_LAYOUTS, AUTO, *LAYOUTS)
        if self.layout not in known:
            raise ValueError(f"layout={self.layout}: choose one of {', '.join(known)}")

    def load(self) -> Catalogue:
        """Raises DataError: nothing usable is there."""
        if self.layout == "needle":
            return catalogue.load(Path(self.path))
        if self.layout == "ledger":
            return _from_ledger(Path(self.path))
        return read(self.path, self.layout, split=self.split, limit=self.limit)


def _from_ledger(path: Path) -> Catalogue:
    """Every labelled request once, with its commonest answer; each brings the tools that its teacher was shown."""
    if not path.is_file():
        raise DataError(f"{path} is not there: a ledger is one file, see conf/paths")
    found = Catalogue()
    samples: dict[str, list[Entry]] = defaultdict(list)
    for entry in Ledger(path).entries():
        if entry.call.role == "label":
            samples[f"{entry.call.provider}|{entry.call.model}|{entry.call.prompt}|{entry.call.tools}"].append(entry)
    for entries in samples.values():
        for example, reason in _examples(entries):
            if reason:
                found.quarantine.append(BadLine(str(path), 0, reason, entries[0].call.prompt))
            else:
                found.examples.append(example)
    if not found.examples:
        raise DataError(f"{path} holds no usable label answer")
    return found


def _examples(entries: list[Entry]) -> Iterator[tuple[Example, str]]:
    call = entries[0].call
    usable = [entry.reply.calls for entry in entries if entry.reply.status == "ok" and entry.reply.calls is not None]
    blank = Example(f"ledger-{entries[0].key[:12]}", call.prompt, (), (), "none", source="ledger")
    if not usable:
        yield blank, f"{entries[0].reply.status}: {entries[0].reply.reason}"
        return
    try:
        calls = weigh([tuple(ToolCall.from_dict(c) for c in answer) for answer in usable])[0].calls
        tools = tuple(Tool.from_dict(tool) for tool in strict_json(call.tools))
    except ValueError as error:
        yield blank, str(error)
        return
    kind = kind_of_calls(calls) if tools else "no_tools"
    example = blank.replace(tools=tools, calls=calls, kind=kind, teacher=f"{call.provider}:{call.model}")
    yield example, "; ".join(example.problems())
