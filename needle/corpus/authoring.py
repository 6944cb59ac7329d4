"""An authored corpus, round by round: tools are invented, requests written, checked, and the next round steered."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from needle.corpus.author import Domain, Question, questions, read, read_tools, tool_questions
from needle.corpus.plan import Plan, Pools, Realised
from needle.schema import BadLine, Example, Tool
from needle.teacher.base import AskedTeacher, TeacherCall
from needle.teacher.purchase import Answer

Ask = Callable[[Sequence[TeacherCall]], list[Answer]]
# Given all examples written so far, in order, the ids of those that every check accepts.
Accept = Callable[[Sequence[Example]], set[str]]


@dataclass(frozen=True)
class Author:
    """Writes requests with their answers, by a plan."""

    plan: Plan


@dataclass
class Written:
    """`examples` show what their author was shown, accepted or not; `accepted` are ids."""

    realised: Realised
    invented: dict[str, tuple[Tool, ...]] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    accepted: set[str] = field(default_factory=set)
    quarantine: list[BadLine] = field(default_factory=list)


def write(
    plan: Plan,
    *,
    teacher: AskedTeacher,
    tools: Mapping[str, Sequence[Tool]],
    existing: Mapping[str, Sequence[Tool]],
    ask: Ask,
    accept: Accept,
    is_over: Callable[[], bool],
) -> Written:
    """The whole plan, or what of it was written before `is_over` (a budget's end). `tools` are those that may be shown,
    `existing` those that invented ones may not double.

    Every question of a round depends on earlier rounds only, so equal answers give an equal corpus, in whatever order
    and by however many interrupted runs they were bought.
    """
    written = Written(Realised())
    if plan.tool_source.get("invented"):
        _invent(written, plan, teacher=teacher, existing=existing, ask=ask)
    pools = Pools(catalogue=tools, invented=written.invented)
    for round_ in range(plan.rounds):
        if is_over():
            break
        _round(written, plan, round_, pools, teacher=teacher, ask=ask, accept=accept)
    return written


def first_calls(
    plan: Plan,
    *,
    teacher: AskedTeacher,
    tools: Mapping[str, Sequence[Tool]],
    existing: Mapping[str, Sequence[Tool]],
) -> tuple[list[TeacherCall], int]:
    """The questions that need no answer first, and how many there will be if everything written is accepted."""
    invented = _tool_calls(plan, teacher=teacher, existing=existing) if plan.tool_source.get("invented") else []
    pools = Pools(catalogue=tools, invented={})
    wanted = math.ceil(plan.requests / plan.requests_per_call)
    return [*invented, *_request_calls(plan, 0, Realised(), pools, teacher=teacher)[1]], len(invented) + wanted


def _tool_calls(plan: Plan, *, teacher: AskedTeacher, existing: Mapping[str, Sequence[Tool]]) -> list[TeacherCall]:
    return [
        teacher.author_call(
            instruction=plan.wording.tools_instruction, prompt=q.prompt, answer_schema=q.schema, sample=q.sample
        )
        for q in tool_questions(plan, taken=sorted(existing), sample=0)
    ]


def _request_calls(
    plan: Plan, round_: int, realised: Realised, pools: Pools, *, teacher: AskedTeacher
) -> tuple[list[Question], list[TeacherCall]]:
    asked = questions(plan, round=round_, realised=realised, pools=pools)
    return asked, [
        teacher.author_call(
            instruction=plan.wording.instruction, prompt=q.prompt, answer_schema=q.schema, sample=q.sample
        )
        for q in asked
    ]


def _invent(
    written: Written, plan: Plan, *, teacher: AskedTeacher, existing: Mapping[str, Sequence[Tool]], ask: Ask
) -> None:
    asked = tool_questions(plan, taken=sorted(existing), sample=0)
    calls = _tool_calls(plan, teacher=teacher, existing=existing)
    for question, answer in zip(asked, ask(calls), strict=True):
        text = _text(answer, written, f"tools for {question.area}")
        if text is None:
            continue
        taken = {**existing, **written.invented}
        domain, bad = read_tools(text, question, invention=plan.invention, taken=taken)
        written.quarantine += bad
        if isinstance(domain, Domain):
            written.invented[domain.name] = domain.tools


def _round(
    written: Written,
    plan: Plan,
    round_: int,
    pools: Pools,
    *,
    teacher: AskedTeacher,
    ask: Ask,
    accept: Accept,
) -> None:
    asked, calls = _request_calls(plan, round_, written.realised, pools, teacher=teacher)
    known = {example.id for example in written.examples}
    brought: list[tuple[Question, list[Example]]] = []
    for question, answer in zip(asked, ask(calls), strict=True):
        text = _text(answer, written, question.brief.id)
        if text is None:
            # Never asked: it says nothing about what the author gets accepted.
            if answer.reply is not None:
                brought.append((question, []))
            continue
        examples, bad = read(text, question.brief)
        written.quarantine += bad
        fresh = []
        for number, example in enumerate(examples, 1):
            if example.id in known:
                reason = "repeats an earlier request of this domain"
                written.quarantine.append(BadLine(question.brief.id, number, reason, example.to_json()))
            else:
                known.add(example.id)
                fresh.append(example.replace(teacher=f"{answer.call.provider}:{answer.call.model}"))
        written.examples += fresh
        brought.append((question, fresh))
    written.accepted = accept(written.examples)
    for question, fresh in brought:
        written.realised.add(plan, question.brief, [e for e in fresh if e.id in written.accepted])


def _text(answer: Answer, written: Written, place: str) -> str | None:
    """The text to read: cut-off answers are read as far as they go."""
    reply = answer.reply
    if reply is not None and reply.status in ("ok", "truncated") and reply.text:
        return reply.text
    reason = answer.reason if reply is None else f"{reply.status}: {reply.reason}"
    written.quarantine.append(BadLine(place, 0, reason, reply.text if reply else ""))
    return None
