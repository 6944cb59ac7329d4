"""What one run of needle.generate brought, and the files of the corpus that it becomes."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from needle.corpus.card import card, table
from needle.corpus.catalogue import Catalogue
from needle.corpus.labelling import WeightedAnswer
from needle.corpus.plan import Plan, Realised
from needle.corpus.validate import Sifted, Validation
from needle.schema import SPLITS, BadLine, Example, Tool, ToolCall


@dataclass(frozen=True)
class Collect:
    """The recorded answers, as they are. `plan`: what their training part is compared with; null: nothing."""

    plan: Plan | None


@dataclass
class Harvest:
    """`examples` come from the teacher; `fixed` are split already and are not checked again. `judged` holds a judge's
    samples by example id, `answers` every distinct answer of a labelling teacher. `cut_short`: why there is less than
    was asked for."""

    tools: dict[str, tuple[Tool, ...]]
    examples: list[Example]
    fixed: dict[str, list[Example]] = field(default_factory=dict)
    quarantine: list[BadLine] = field(default_factory=list)
    judged: dict[str, list[tuple[ToolCall, ...]]] = field(default_factory=dict)
    answers: dict[str, list[WeightedAnswer]] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    plan: Plan | None = None
    realised: Realised | None = None
    cut_short: str = ""


def acceptance(sifted: Sifted, validation: Validation) -> dict[str, tuple[int, int, int]]:
    """check -> how many examples passed it, failed it, and were set aside for it."""
    return {
        check: (
            tally["passed"],
            tally["failed"],
            tally["failed"] if validation.action(check) == "quarantine" else 0,
        )
        for check, tally in sifted.counts.items()
    }


def merged(first: Sifted, second: Sifted) -> Sifted:
    """Both, one after the other."""
    counts = {
        check: {outcome: n + second.counts[check][outcome] for outcome, n in tally.items()}
        for check, tally in first.counts.items()
    }
    contaminated = {**first.contaminated, **second.contaminated}
    return Sifted((*first.verdicts, *second.verdicts), counts, contaminated)


def counts(harvest: Harvest, sifted: Sifted, by_split: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    every = [example for split in SPLITS for example in by_split[split]]
    return {
        "examples": {split: len(by_split[split]) for split in SPLITS},
        "kinds": dict(Counter(example.kind for example in every)),
        "domains": len(harvest.tools),
        "tools": sum(map(len, harvest.tools.values())),
        "quarantined": len(harvest.quarantine) + len(sifted.quarantined),
    }


def write_files(
    folder: Path,
    harvest: Harvest,
    sifted: Sifted,
    by_split: Mapping[str, Sequence[Example]],
    *,
    validation: Validation,
    conventions: Path,
) -> None:
    """Every file of a corpus but its manifest. Equal harvests give equal bytes."""
    for split in SPLITS:
        lines = "".join(example.replace(split=split).to_json() + "\n" for example in by_split[split])
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")
    tools = {domain: [asdict(tool) for tool in of_domain] for domain, of_domain in harvest.tools.items()}
    (folder / "tools.json").write_text(json.dumps(tools, ensure_ascii=False), "utf-8")
    (folder / "quarantine.jsonl").write_text("".join(_quarantine(harvest, sifted)), "utf-8")
    (folder / "answers.jsonl").write_text("".join(answer_lines(harvest, sifted)), "utf-8")
    every = [example for split in SPLITS for example in by_split[split]]
    whole = Catalogue(harvest.tools, every, [*harvest.quarantine])
    (folder / "README.md").write_text(card(whole, by_split, folder=conventions), "utf-8")
    (folder / "report.json").write_text(json.dumps(_report(harvest, sifted, validation), indent=2), "utf-8")
    (folder / "report.md").write_text(_report_text(harvest, sifted, validation), "utf-8")
    from needle.corpus import acceptance_figure  # matplotlib takes a second to load

    (folder / "acceptance.png").write_bytes(acceptance_figure.draw(sifted.counts, validation))
    figure = _plan_figure(harvest)
    if figure is not None:
        (folder / "plan.png").write_bytes(figure)


def _quarantine(harvest: Harvest, sifted: Sifted) -> list[str]:
    refused = [
        BadLine(
            "checked", number, "; ".join(f"{f.check}: {f.reason}" for f in verdict.failures), verdict.example.to_json()
        )
        for number, verdict in enumerate(sifted.verdicts, 1)
        if not verdict.kept
    ]
    return [bad.to_json() for bad in (*harvest.quarantine, *refused)]


def answer_lines(harvest: Harvest, sifted: Sifted) -> list[str]:
    """A line for each kept example that has more to tell than its calls: its weight, every distinct answer."""
    lines = []
    for example, weight in zip(sifted.kept, sifted.weights, strict=True):
        answers = [
            {"calls": [asdict(call) for call in answer.calls], "weight": answer.weight}
            for answer in harvest.answers.get(example.id, ())
        ]
        if answers or weight != 1.0:
            record = {"id": example.id, "weight": weight, "answers": answers}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return lines


def _report(harvest: Harvest, sifted: Sifted, validation: Validation) -> dict[str, Any]:
    checks = {check: {**tally, "action": validation.action(check)} for check, tally in sifted.counts.items()}
    report: dict[str, Any] = {"checks": checks, "contaminated": sifted.contaminated}
    report["replies"] = dict(sorted(harvest.statuses.items()))
    report["cut_short"] = harvest.cut_short
    if harvest.plan is not None and harvest.realised is not None:
        rows = [row._asdict() for row in harvest.realised.table(harvest.plan)]
        report["plan"] = {"rows": rows, "distances": harvest.realised.distances(harvest.plan)}
    return report


def _report_text(harvest: Harvest, sifted: Sifted, validation: Validation) -> str:
    kept = len(sifted.kept)
    parts = [
        "# What the checks say",
        f"{len(sifted.verdicts):,} examples were checked, {kept:,} kept. `count` sets nothing aside.",
        table(
            ("check", "action", "passed", "failed", "not applicable"),
            [
                (name, validation.action(name), tally["passed"], tally["failed"], tally["not_applicable"])
                for name, tally in sifted.counts.items()
            ],
        ),
        "![Share of examples that fail each check](acceptance.png)",
    ]
    if harvest.cut_short:
        parts.insert(1, f"**Cut short:** {harvest.cut_short}.")
    if harvest.statuses:
        parts += ["## Replies", table(("status", "replies"), sorted(harvest.statuses.items()))]
    shared = [(name, check, n) for name, tally in sifted.contaminated.items() for check, n in tally.items() if n]
    if shared:
        parts += ["## Shared with evaluation sets", table(("evaluation set", "check", "examples"), shared)]
    if harvest.plan is not None and harvest.realised is not None:
        rows = [
            (
                row.axis,
                row.value,
                _percent(row.planned_frac),
                _percent(row.realised_frac),
                row.accepted,
                row.rejected,
            )
            for row in harvest.realised.table(harvest.plan)
        ]
        parts += [
            "## Plan and corpus",
            table(("axis", "value", "planned", "realised", "accepted", "rejected"), rows),
            "![Planned and realised shares](plan.png)",
        ]
    return "\n\n".join(parts) + "\n"


def _percent(frac: float | None) -> str:
    return "" if frac is None else f"{100 * frac:.1f}%"


def _plan_figure(harvest: Harvest) -> bytes | None:
    if harvest.plan is None or harvest.realised is None:
        return None
    from needle.corpus import plan_figures

    plan, realised = harvest.plan, harvest.realised
    return plan_figures.draw(realised.table(plan), realised.distances(plan), requests=realised.requests)
