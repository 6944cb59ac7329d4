"""Reads the recorded teacher's corpus: DOMAIN.tools.json and DOMAIN.jsonl, every record checked, bad ones
quarantined."""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from needle.errors import DataError
from needle.schema import BadLine, Example, Tool, ToolCall, canonical_json, read_lines

MANY_BAD_FRAC = 0.05


@dataclass
class Catalogue:
    tools: dict[str, tuple[Tool, ...]] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    quarantine: list[BadLine] = field(default_factory=list)


def load(folder: Path) -> Catalogue:
    """Every domain of `folder`.

    Raises:
        DataError: there is no domain, a domain lacks a file, or a domain has no usable record.
    """
    folder = Path(folder)
    catalogue = Catalogue()
    files = sorted(folder.glob("*.tools.json"))
    if not files:
        raise DataError(f"{folder} holds no DOMAIN.tools.json: it is not a recorded teacher's corpus")
    orphans = {p.name.removesuffix(".jsonl") for p in folder.glob("*.jsonl")} - {
        p.name.removesuffix(".tools.json") for p in files
    }
    if orphans:
        raise DataError(f"{folder}: {sorted(orphans)[0]}.jsonl has no {sorted(orphans)[0]}.tools.json beside it")
    for path in files:
        domain = path.name.removesuffix(".tools.json")
        _load_domain(catalogue, domain, path, folder / f"{domain}.jsonl")
    bad, all_ = len(catalogue.quarantine), len(catalogue.quarantine) + len(catalogue.examples)
    if bad > MANY_BAD_FRAC * all_:
        print(
            f"warning: {bad} of {all_} records are quarantined; first: {catalogue.quarantine[0].reason}",
            file=sys.stderr,
        )
    return catalogue


def _load_domain(catalogue: Catalogue, domain: str, tools_path: Path, records_path: Path) -> None:
    try:
        tools = tuple(Tool.from_dict(record) for record in json.loads(tools_path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {tools_path}: {error}") from error
    catalogue.tools[domain] = tools
    by_name = {tool.name: tool for tool in tools}
    seen: set[str] = set()
    before = len(catalogue.examples)
    for number, value in read_lines(records_path):
        if isinstance(value, BadLine):
            catalogue.quarantine.append(value)
            continue
        try:
            example = _example(value, domain, by_name)
            reasons = example.problems()
        except (ValueError, KeyError, TypeError) as error:
            reasons = [f"not a record of this corpus: {error}"]
        else:
            if example.id in seen:
                reasons.append("repeats an earlier request of this domain")
        if reasons:
            text = canonical_json(value)
            catalogue.quarantine.append(BadLine(str(records_path), number, "; ".join(reasons), text))
        else:
            seen.add(example.id)
            catalogue.examples.append(example)
    if len(catalogue.examples) == before:
        last = f"; last reason: {catalogue.quarantine[-1].reason}" if catalogue.quarantine else " (the file is empty)"
        raise DataError(f"{records_path} holds no usable record{last}")


def _example(record: dict, domain: str, by_name: dict[str, Tool]) -> Example:
    calls = tuple(ToolCall(name, arguments) for name, arguments in record["c"])
    unknown = [call.name for call in calls if call.name not in by_name]
    if unknown:
        raise ValueError(f"the answer calls unknown tool {unknown[0]!r}")
    called = {call.name for call in calls}
    digest = hashlib.sha1(record["q"].encode()).hexdigest()[:10]
    plain = {"id": f"{domain}-{digest}", "query": record["q"], "tools": [], "calls": [], "kind": record["k"]}
    example = Example.from_dict({**plain, "domain": domain, "source": "recorded", "teacher": "recorded"})
    return example.replace(tools=tuple(by_name[name] for name in by_name if name in called), calls=calls)
