"""Collects a teacher's answers, checks each, and splits them.

    python -m needle.generate

Writes artifacts/corpus-HASH: train.jsonl, validation.jsonl, test.jsonl, unseen.jsonl, tools.json, quarantine.jsonl and
README.md, the data card. data/README.md is the card of the default settings.
"""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from needle import artifacts, config
from needle.corpus.card import card
from needle.data.settings import DataSettings
from needle.runs import Paths
from needle.schema import SPLITS, BadLine
from needle.teacher.recorded import RecordedTeacher

GENERATE_VERSION = 2


def corpus_folder(paths: Paths, data: DataSettings) -> Path:
    """Named after the files and the split rule; which slice of the domains is used comes later."""
    files = artifacts.hash_files(sorted(Path(data.corpus).glob("*.json*")))
    rule = replace(data.split, domains=None)
    return paths.artifacts / f"corpus-{artifacts.fingerprint(version=GENERATE_VERSION, files=files, split=rule)}"


@config.stage("generate")
def main(cfg: dict[str, Any], *, teacher: RecordedTeacher, data: DataSettings, paths: Paths) -> None:
    folder = corpus_folder(paths, data)
    if folder.is_dir():
        print(f"corpus is there already: {folder}")
        return
    catalogue = teacher.load()
    by_split = {split: [e for e in catalogue.examples if data.split.assign(e) == split] for split in SPLITS}
    counts = {
        "examples": {split: len(examples) for split, examples in by_split.items()},
        "kinds": dict(Counter(example.kind for example in catalogue.examples)),
        "domains": len(catalogue.tools),
        "tools": sum(map(len, catalogue.tools.values())),
        "quarantined": len(catalogue.quarantine),
    }
    inputs = {"teacher": type(teacher).__name__, "folder": str(teacher.folder)}
    with artifacts.publish(folder, kind="corpus", inputs=inputs, counts=counts) as temporary:
        for split, examples in by_split.items():
            lines = "".join(example.replace(split=split).to_json() + "\n" for example in examples)
            (temporary / f"{split}.jsonl").write_text(lines, "utf-8")
        tools = {domain: [asdict(tool) for tool in of_domain] for domain, of_domain in catalogue.tools.items()}
        (temporary / "tools.json").write_text(json.dumps(tools, ensure_ascii=False), "utf-8")
        (temporary / "README.md").write_text(card(catalogue, by_split, folder=teacher.folder), "utf-8")
        (temporary / "quarantine.jsonl").write_text("".join(map(BadLine.to_json, catalogue.quarantine)), "utf-8")
    print(f"corpus: {folder}\n{json.dumps(counts, indent=2)}")


if __name__ == "__main__":
    main()
