"""Collects a teacher's answers, or buys them, checks each, and splits them.

    python -m needle.generate                                             # the recorded answers
    python -m needle.generate teacher=recorded teacher.path=FILE teacher.layout=xlam
    python -m needle.generate teacher=gemini role=label budget_usd=5      # a teacher answers the recorded requests
    python -m needle.generate teacher=gemini role=author validation=strict budget_usd=5
    python -m needle.generate teacher=gemini role=label dry_run=true      # what it would cost

Writes artifacts/corpus-HASH: train.jsonl, validation.jsonl, test.jsonl, unseen.jsonl, tools.json, quarantine.jsonl,
answers.jsonl (every distinct answer with its weight), report.md, report.json and acceptance.png (what each check passed
and refused), plan.png (an authored corpus against its plan) and README.md, the data card. data/README.md is the card of
the default settings.

What is bought goes into the ledger (conf/paths) before it is used: the same command goes on where an interrupted one
stopped, and pays for nothing twice. A bought corpus is trained on as data.corpus=artifacts/corpus-HASH; its validation,
test and unseen requests are the recorded ones with their recorded answers, so that students of different teachers are
compared on the same questions.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import Field

from needle import artifacts, config
from needle.corpus import authoring, catalogue
from needle.corpus.authoring import Author
from needle.corpus.catalogue import Catalogue
from needle.corpus.harvest import Collect, Harvest, acceptance, answer_lines, counts, merged, write_files
from needle.corpus.labelling import Label, label_calls, labelled, read_calls
from needle.corpus.layouts import read
from needle.corpus.plan import Realised
from needle.corpus.validate import Sifted, Validation
from needle.data.settings import DataSettings
from needle.errors import ConfigError, DataError
from needle.runs import Paths
from needle.schema import EVALUATION_ONLY, SPLITS, BadLine, Example, Tool, ToolCall
from needle.teacher.base import Teacher, TeacherCall
from needle.teacher.estimate import estimate
from needle.teacher.ledger import Budget
from needle.teacher.market import Market, account_of
from needle.teacher.purchase import Answer
from needle.teacher.recorded import RecordedTeacher

GENERATE_VERSION = 3
# What a judge says that cannot be read: it agrees with no answer.
NO_ANSWER = (ToolCall("no answer that can be read"),)
Role = Collect | Label | Author


def corpus_folder(paths: Paths, data: DataSettings) -> Path:
    """The corpus that a data setting stands on: data.corpus where that is one already, else the recorded answers under
    the default checks. Named after the files and the split rule; which slice of the domains is used comes later.

    Raises:
        DataError: it is neither.
    """
    folder = Path(data.corpus)
    if (folder / "manifest.json").is_file():
        return folder
    if not any(folder.glob("*.tools.json")):
        problem = "holds no corpus" if folder.is_dir() else "is not there"
        raise DataError(
            f"data.corpus={folder} {problem}: name a folder that needle.generate has written (with manifest.json), or "
            "recorded answers (DOMAIN.jsonl and DOMAIN.tools.json)"
        )
    files = artifacts.hash_files(sorted(folder.glob("*.json*")))
    rule = replace(data.split, domains=None)
    return paths.artifacts / f"corpus-{artifacts.fingerprint(version=GENERATE_VERSION, files=files, split=rule)}"


def fitting(*, teacher: Any, judge: Any, role: Role, judge_samples: int, **_: Any) -> None:
    """Which role goes with which teacher."""
    asked = hasattr(teacher, "label_call")
    if isinstance(role, Collect) and not isinstance(teacher, RecordedTeacher):
        raise ConfigError(
            "role=collect takes answers that are recorded; this teacher is asked: choose role=label (it answers "
            "recorded requests) or role=author (it writes requests), or teacher=recorded"
        )
    if not isinstance(role, Collect) and not asked:
        raise ConfigError("role=label and role=author need a teacher that can be asked; choose another teacher=...")
    if isinstance(role, Author) and "author" not in teacher.roles:
        raise ConfigError("this teacher answers requests, it cannot write them: choose role=label")
    if judge is not None and not hasattr(judge, "label_call"):
        raise ConfigError("judge: this teacher cannot be asked; choose another teacher@judge=...")
    if judge is not None and not (isinstance(role, Author) and judge_samples):
        raise ConfigError("a judge answers authored requests again: set role=author and judge_samples=1 or more")
    if not isinstance(role, Collect):
        for one in (teacher, judge):
            prices = getattr(one, "prices", None)
            if prices is not None:
                prices.of(one.model)
    if judge_samples and not isinstance(role, Author):
        raise ConfigError(f"judge_samples={judge_samples}: only role=author has requests to be answered again")


@config.stage("generate")
@config.cross_check(fitting)
def main(
    cfg: dict[str, Any],
    *,
    teacher: Teacher,
    judge: Teacher | None,
    judge_samples: Annotated[int, Field(ge=0)],
    role: Role,
    label_instruction: str,
    validation: Validation,
    evaluation: tuple[Path, ...],
    data: DataSettings,
    paths: Paths,
    buy: bool,
    budget_calls: Annotated[int, Field(ge=0)] | None,
    budget_usd: Annotated[float, Field(ge=0)] | None,
    dry_run: bool,
    dry_run_calls: Annotated[int, Field(ge=0)],
) -> None:
    task = Task(label_instruction, judge_samples, role, validation, data, _requests_of_files(evaluation))
    if isinstance(role, Collect):
        _collect(task, teacher, paths)
        return
    account = ("dry-run-" if dry_run else "") + account_of(
        name=f"{cfg['_choices_'].get('teacher')}-{cfg['_choices_'].get('role')}",
        **{key: cfg[key] for key in ("teacher", "judge", "judge_samples", "role", "label_instruction", "data")},
    )
    market = Market(
        paths.ledger,
        teacher=(teacher, cfg["teacher"]),
        judge=None if judge is None else (judge, cfg["judge"]),
        account=account,
        budget=Budget(dry_run_calls if dry_run else budget_calls, budget_usd),
        buy=buy,
    )
    with market:
        if dry_run:
            print(_dry_run(task, market, dry_run_calls))
            return
        harvest = _label(task, market) if isinstance(role, Label) else _author(task, market)
        print(market.summary())
        _publish_bought(task, market, harvest, paths)


@dataclass(frozen=True)
class Task:
    """What is to be made, apart from who answers. `evaluation`: file name -> requests that training may not hold."""

    label_instruction: str
    judge_samples: int
    role: Role
    validation: Validation
    data: DataSettings
    evaluation: Mapping[str, Sequence[str]]


def _collect(task: Task, teacher: RecordedTeacher, paths: Paths) -> None:
    folder = _collected_folder(task, teacher, paths)
    if folder.is_dir():
        print(f"corpus is there already: {folder}")
        return
    found = teacher.load()
    harvest = Harvest(found.tools, [], quarantine=found.quarantine)
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in found.examples:
        by_split[example.split or task.data.split.assign(example)].append(example)
    held_out = [example for split in SPLITS[1:] for example in by_split[split]]
    # What evaluates is checked, too, but only training requests can be contaminated by it.
    checked = task.validation.sift(held_out, evaluation={})
    sifted = merged(checked, task.validation.sift(by_split["train"], evaluation=_evaluation(task, by_split)))
    kept = {example.id for example in sifted.kept}
    by_split = {split: [e for e in examples if e.id in kept] for split, examples in by_split.items()}
    plan = task.role.plan if isinstance(task.role, Collect) else None
    if plan is not None:
        # A domain's tools join the called ones when shards are prepared: how many are shown is not known yet.
        plain = [e.replace(tools=()) if e.domain in found.tools else e for e in by_split["train"]]
        harvest.plan, harvest.realised = plan, Realised.of(plan, plain)
    inputs = {"teacher": type(teacher).__name__, "path": teacher.path, "layout": teacher.layout}
    _publish(folder, task, harvest, sifted, by_split, inputs=inputs, conventions=Path(teacher.path))


def _collected_folder(task: Task, teacher: RecordedTeacher, paths: Paths) -> Path:
    default = config.build(OmegaConf.load(config.CONF / "validation" / "default.yaml"))
    plain = teacher.layout == "needle" and Path(teacher.path) == task.data.corpus
    assert isinstance(task.role, Collect)
    if plain and task.validation == default and not task.evaluation and task.role.plan is None:
        return corpus_folder(paths, task.data)
    files = [path for path in sorted(Path(teacher.path).rglob("*")) if path.is_file()] or [Path(teacher.path)]
    read_from = artifacts.hash_files([path for path in files if path.is_file()])
    parts = {"teacher": teacher, "files": read_from, "validation": task.validation, "evaluation": task.evaluation}
    parts["plan"] = task.role.plan
    rule = replace(task.data.split, domains=None)
    return paths.artifacts / f"corpus-{artifacts.fingerprint(version=GENERATE_VERSION, split=rule, **parts)}"


def _recorded(task: Task) -> tuple[Catalogue, dict[str, list[Example]]]:
    """The recorded corpus in the slice, by split."""
    found = catalogue.load(task.data.corpus)
    rule = task.data.split
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in found.examples:
        split = rule.assign(example)
        if split == "unseen" or rule.uses(example.domain):
            by_split[split].append(example)
    return found, by_split


def _label(task: Task, market: Market) -> Harvest:
    role = task.role
    assert isinstance(role, Label)
    asked, fixed, found = _to_label(task, role)
    questions = label_calls(
        market.teacher, asked, found.tools, samples=role.samples, instruction=task.label_instruction
    )
    answers = market.ask(questions, title="labels", total=len(asked) * role.samples)
    harvest = Harvest(found.tools, [], fixed=fixed, quarantine=[*found.quarantine])
    for example in asked:
        of_example = list(islice(answers, role.samples))
        bought = [answer for answer in of_example if not _is_missing(answer)]
        name = f"{of_example[0].call.provider}:{of_example[0].call.model}"
        labelled_, weighted, refused = labelled(example, found.tools, bought, teacher=name)
        harvest.quarantine += refused
        if labelled_ is not None:
            harvest.examples.append(labelled_)
            harvest.answers[example.id] = weighted
    return harvest


def _to_label(task: Task, role: Label) -> tuple[list[Example], dict[str, list[Example]], Catalogue]:
    """The requests to be answered, the recorded splits that stay, and the tools that there are."""
    found, by_split = _recorded(task)
    if role.requests is None:
        asked = [example for split in role.splits for example in by_split[split]]
        fixed = {split: by_split[split] for split in SPLITS if split not in role.splits}
    else:
        reading = read(role.requests, role.layout, split=None, limit=None)
        held_out = [e for e in reading.examples if e.source.startswith(EVALUATION_ONLY)]
        refused = [BadLine(e.source, 0, "is for evaluation only", e.to_json()) for e in held_out]
        asked = [example for example in reading.examples if example not in held_out]
        fixed = {split: by_split[split] for split in SPLITS if split != "train"}
        found = Catalogue(found.tools, [], [*reading.quarantine, *refused])
    return asked[: role.limit], fixed, found


def _is_missing(answer: Answer) -> bool:
    """Whether it was never asked for: the budget ended, or nothing is to be bought."""
    return answer.reply is None and not answer.reason.startswith("failed")


def _author(task: Task, market: Market) -> Harvest:
    role = task.role
    assert isinstance(role, Author)
    found, by_split = _recorded(task)
    fixed = {split: by_split[split] for split in SPLITS if split != "train"}
    shown = _seen_tools(task, found)
    judged: dict[str, list[tuple[ToolCall, ...]]] = {}
    evaluation = _evaluation(task, fixed)

    def accept(examples: Sequence[Example]) -> set[str]:
        _judge(task, market, examples, judged)
        kept = task.validation.sift(examples, judged=judged, evaluation=evaluation).kept
        return {e.id for e in kept if e.id not in _unjudged(task, examples, judged)}

    written = authoring.write(
        role.plan,
        teacher=market.teacher,
        tools=shown,
        existing=found.tools,
        ask=lambda calls: list(market.ask(calls, title="authored", total=len(calls))),
        accept=accept,
        is_over=lambda: bool(market.budget_reached),
    )
    unjudged = _unjudged(task, written.examples, judged)
    examples = [example for example in written.examples if example.id not in unjudged]
    harvest = Harvest({**found.tools, **written.invented}, examples, fixed=fixed, judged=judged)
    harvest.plan, harvest.realised = role.plan, written.realised
    reason = market.budget_reached or "the judge gave no answer"
    refused = [BadLine("judge", 0, reason, e.to_json()) for e in written.examples if e.id in unjudged]
    harvest.quarantine = [*written.quarantine, *refused]
    return harvest


def _seen_tools(task: Task, found: Catalogue) -> dict[str, tuple[Tool, ...]]:
    rule = task.data.split
    return {d: tools for d, tools in found.tools.items() if rule.uses(d) and d not in rule.unseen_domains}


def _judge(
    task: Task, market: Market, examples: Sequence[Example], judged: dict[str, list[tuple[ToolCall, ...]]]
) -> None:
    """Asks again about examples that every check before agreement keeps, and that were not asked about yet."""
    if not task.judge_samples:
        return
    asked = [e for e in examples if e.id not in judged and not _is_refused(task.validation, e)]
    samples = task.judge_samples
    questions = label_calls(market.judge, asked, {}, samples=samples, instruction=task.label_instruction)
    answers = market.ask_judge(questions, title="judged", total=len(asked) * samples)
    for example in asked:
        bought = [answer for answer in islice(answers, samples) if answer.reply is not None]
        calls = [read_calls(answer) for answer in bought]
        judged[example.id] = [NO_ANSWER if isinstance(c, str) else c for c in calls]


def _unjudged(
    task: Task, examples: Sequence[Example], judged: Mapping[str, Sequence[tuple[ToolCall, ...]]]
) -> set[str]:
    """Ids of those that a judge should have answered and never did: whether they hold is not known."""
    return {e.id for e in examples if e.id in judged and not judged[e.id]} if task.judge_samples else set()


def _is_refused(validation: Validation, example: Example) -> bool:
    return any(validation.action(failure.check) == "quarantine" for failure in validation.check(example))


def _evaluation(task: Task, by_split: Mapping[str, Sequence[Example]]) -> dict[str, list[str]]:
    """Every request that training may not hold, by the set it is of."""
    own = {split: [example.query for example in by_split.get(split, ())] for split in SPLITS[1:]}
    return {**own, **{name: list(requests) for name, requests in task.evaluation.items()}}


def _requests_of_files(paths: Sequence[Path]) -> dict[str, list[str]]:
    return {
        path.name: [example.query for example in read(str(path), "auto", split=None, limit=None).examples]
        for path in paths
    }


def _dry_run(task: Task, market: Market, calls_to_buy: int) -> str:
    questions, expected = _planned(task, market)
    if calls_to_buy:
        for _ in market.ask(questions[:calls_to_buy], title="sample", total=min(calls_to_buy, len(questions))):
            pass
    figures = estimate(questions, teacher=market.teacher, ledger=market.ledger, expected_calls=expected)
    lines = ["dry run: nothing but the sample is bought", figures.text()]
    if isinstance(task.role, Author) and task.judge_samples:
        most = task.role.plan.requests * task.judge_samples
        lines.append(f"the judge would be asked {most:,} questions more, of which the estimate says nothing")
    return "\n".join(lines)


def _planned(task: Task, market: Market) -> tuple[list[TeacherCall], int | None]:
    """Questions that can be put already, and how many there will be in all (null: these)."""
    if isinstance(task.role, Label):
        asked, _, found = _to_label(task, task.role)
        instruction, samples = task.label_instruction, task.role.samples
        return list(label_calls(market.teacher, asked, found.tools, samples=samples, instruction=instruction)), None
    assert isinstance(task.role, Author)
    found, _ = _recorded(task)
    shown = _seen_tools(task, found)
    return authoring.first_calls(task.role.plan, teacher=market.teacher, tools=shown, existing=found.tools)


def _publish_bought(task: Task, market: Market, harvest: Harvest, paths: Paths) -> None:
    harvest.statuses, harvest.cost_usd = market.statuses, market.cost_usd
    harvest.cut_short = market.budget_reached
    evaluation = _evaluation(task, harvest.fixed)
    sifted = task.validation.sift(harvest.examples, judged=harvest.judged, evaluation=evaluation)
    market.ledger.record_acceptance(market.account, acceptance(sifted, task.validation))
    kept = [_with_called_tools(example, harvest.tools) for example in sifted.kept]
    if not kept:
        first = [bad.reason for bad in harvest.quarantine[:1]] + [
            f.reason for v in sifted.verdicts[:1] for f in v.failures
        ]
        why = harvest.cut_short or next(iter(first), "there is no request in this slice")
        raise DataError(f"no example came of it, so there is no corpus to write: {why}")
    by_split: dict[str, list[Example]] = {split: list(harvest.fixed.get(split, ())) for split in SPLITS}
    for example in kept:
        # A split that is fixed is what students are evaluated on: nothing bought joins it.
        split = task.data.split.assign(example)
        by_split["train" if split in harvest.fixed else split].append(example)
    parts = {"examples": [e.to_dict() for e in kept], "fixed": sorted(e.id for s in harvest.fixed.values() for e in s)}
    parts |= {"validation": task.validation, "tools": sorted(harvest.tools), "answers": answer_lines(harvest, sifted)}
    folder = paths.artifacts / f"corpus-{artifacts.fingerprint(version=GENERATE_VERSION, **parts)}"
    if folder.is_dir():
        print(f"corpus is there already: {folder}\ntrain on it with data.corpus={folder}")
        return
    inputs = {"teacher": type(market.teacher).__name__, "account": market.account, "corpus": str(task.data.corpus)}
    _publish(folder, task, harvest, sifted, by_split, inputs=inputs, conventions=task.data.corpus)
    if harvest.cut_short:
        print(f"{harvest.cut_short}: the corpus holds what was bought", file=sys.stderr)
    print(f"train on it with data.corpus={folder}")


def _with_called_tools(example: Example, tools: Mapping[str, Sequence[Tool]]) -> Example:
    """As the recorded corpus has them: the called tools of a domain whose list is known; others join at prepare."""
    if example.domain not in tools:
        return example
    called = {call.name for call in example.calls}
    return example.replace(tools=tuple(tool for tool in tools[example.domain] if tool.name in called))


def _publish(
    folder: Path,
    task: Task,
    harvest: Harvest,
    sifted: Sifted,
    by_split: Mapping[str, Sequence[Example]],
    *,
    inputs: Mapping[str, Any],
    conventions: Path,
) -> None:
    found = counts(harvest, sifted, by_split) | {"cost_usd": round(harvest.cost_usd, 6)}
    with artifacts.publish(folder, kind="corpus", inputs=inputs, counts=found) as temporary:
        write_files(temporary, harvest, sifted, by_split, validation=task.validation, conventions=conventions)
    print(f"corpus: {folder}\n{json.dumps(found, indent=2)}")


if __name__ == "__main__":
    main()
