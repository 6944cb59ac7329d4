"""One account's purchases for one corpus: from the teacher and, where there is one, from a judge beside it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from needle.artifacts import fingerprint
from needle.progress import Progress
from needle.teacher.base import AskedTeacher, TeacherCall
from needle.teacher.ledger import Budget, Ledger
from needle.teacher.purchase import Answer, Purchases

# What changes when and where answers are bought, not which.
NOT_IDENTITY = ("traffic", "prices", "base_url", "key_variable")


class Market:
    """`statuses` counts the replies used, `cost_usd` is what they cost when they were bought, now or earlier."""

    def __init__(
        self,
        ledger: Path,
        *,
        teacher: tuple[AskedTeacher, Mapping[str, Any]],
        judge: tuple[AskedTeacher, Mapping[str, Any]] | None,
        account: str,
        budget: Budget,
        buy: bool,
    ):
        terms = {"account": account, "budget": budget, "buy": buy}
        self.account, self.budget, self.ledger_path = account, budget, ledger
        self.teacher = teacher[0]
        self.judge = judge[0] if judge else teacher[0]
        self._from_teacher = Purchases(ledger, teacher=teacher[0], node=teacher[1], **terms)
        self._from_judge = Purchases(ledger, teacher=judge[0], node=judge[1], **terms) if judge else self._from_teacher
        self.statuses: Counter[str] = Counter()
        self.cost_usd = 0.0

    def __enter__(self) -> "Market":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._from_teacher.__exit__(kind, error, trace)
        if self._has_own_judge:
            self._from_judge.__exit__(kind, error, trace)

    @property
    def ledger(self) -> Ledger:
        return self._from_teacher.ledger

    @property
    def bought(self) -> int:
        return self._from_teacher.bought + (self._from_judge.bought if self._has_own_judge else 0)

    @property
    def replayed(self) -> int:
        return self._from_teacher.replayed + (self._from_judge.replayed if self._has_own_judge else 0)

    @property
    def _has_own_judge(self) -> bool:
        return self._from_judge is not self._from_teacher

    @property
    def budget_reached(self) -> str:
        """The limit that refused a call, or nothing."""
        return self._from_teacher.budget_reached or self._from_judge.budget_reached or ""

    def ask(self, calls: Iterable[TeacherCall], *, title: str, total: int) -> Iterator[Answer]:
        yield from self._answers(self._from_teacher, calls, title, total)

    def ask_judge(self, calls: Iterable[TeacherCall], *, title: str, total: int) -> Iterator[Answer]:
        yield from self._answers(self._from_judge, calls, title, total)

    def _answers(self, purchases: Purchases, calls: Iterable[TeacherCall], title: str, total: int) -> Iterator[Answer]:
        with Progress(title) as progress:
            for number, answer in enumerate(purchases.answers(calls), 1):
                if answer.reply is None:
                    self.statuses[answer.reason.partition(":")[0]] += 1
                else:
                    self.statuses[answer.reply.status] += 1
                    self.cost_usd += answer.reply.cost_usd
                progress.update(number, total, f"${self.cost_usd:,.4f}")
                yield answer

    def summary(self) -> str:
        spent = self.ledger.spending(self.account)
        lines = [
            f"{self.bought:,} answers bought, {self.replayed:,} were in the ledger; the answers used cost "
            f"${self.cost_usd:,.4f} when they were bought",
            f"account {self.account}: {spent.calls:,} attempts, ${spent.usd:,.4f} paid or perhaps charged",
        ]
        return "\n".join(lines)


def account_of(*, name: str, teacher: Mapping[str, Any], **rest: Any) -> str:
    """Equal for runs that would ask the same questions of the same teacher."""
    return f"{name}-{fingerprint(teacher={k: v for k, v in teacher.items() if k not in NOT_IDENTITY}, **rest)}"
