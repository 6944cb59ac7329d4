"""The data card of a corpus: what it holds, by split, kind and domain, and by which conventions it was written."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from needle.corpus.catalogue import Catalogue
from needle.schema import KINDS, SPLITS, Example

CONVENTIONS = "CONVENTIONS.md"


def card(catalogue: Catalogue, by_split: Mapping[str, Sequence[Example]], *, folder: Path) -> str:
    """Markdown. `folder`'s CONVENTIONS.md, where there is one, is taken in as it stands."""
    examples = catalogue.examples
    conventions = Path(folder) / CONVENTIONS
    kinds = [kind for kind in KINDS if any(example.kind == kind for example in examples)]
    counts = {split: Counter(example.kind for example in by_split[split]) for split in SPLITS}
    words = [len(example.query.split()) for example in examples]
    calls = Counter(len(example.calls) for example in examples)
    unseen = {example.domain for example in by_split["unseen"]}
    domains = []
    for domain, tools in catalogue.tools.items():
        of_domain = [example for example in examples if example.domain == domain]
        asked = sum(len(example.calls) for example in of_domain)
        named = ", ".join(f"`{tool.name}`" for tool in tools[:2])
        split = "unseen" if domain in unseen else "seen"
        domains.append((domain, split, len(tools), len(of_domain), asked, named))
    sections = [
        "# The teacher's corpus",
        f"{len(examples):,} requests in {len(catalogue.tools)} domains with "
        f"{sum(map(len, catalogue.tools.values())):,} tools, answered by "
        f"{sum(n * k for n, k in calls.items()):,} calls; "
        f"{statistics.mean(words):.1f} words a request (median {statistics.median(words):g}, longest {max(words)}). "
        f"Quarantined records: {len(catalogue.quarantine)}.",
        *([conventions.read_text("utf-8").strip()] if conventions.is_file() else []),
        "## Splits and kinds",
        "Requests of seen domains are split by a hash of their text, so that new domains move none; unseen domains "
        "are held out whole (conf/data/default.yaml).",
        table(
            ("kind", *SPLITS, "all"),
            [(kind, *(counts[s][kind] for s in SPLITS), sum(counts[s][kind] for s in SPLITS)) for kind in kinds]
            + [("all", *(len(by_split[split]) for split in SPLITS), len(examples))],
        ),
        "## Calls in an answer",
        table(("calls", "requests"), sorted(calls.items())),
        "## Domains",
        table(("domain", "split", "tools", "requests", "calls", "for example"), domains),
    ]
    return "\n\n".join(sections) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    rule = ["---" if all(isinstance(row[i], str) for row in rows) else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(head), rule, *cells])
