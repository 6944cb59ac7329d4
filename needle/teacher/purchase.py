"""Answers to a stream of questions, in order: from the ledger where it has them, else bought by a process of its own.

    with Purchases(ledger, node=..., account=..., budget=..., buy=True) as purchases:
        for answer in purchases.answers(calls): ...

Buying happens in a separate process (needle.teacher.buyer) that lives on for as long as its questions are under way:
whatever ends this one, even a kill, every answer that a provider was asked for is received and stored, and the next run
finds it in the ledger. Nothing is started, and no key is needed, when the ledger has every answer.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from needle.errors import ConfigError, UserError
from needle.teacher.base import AskedTeacher, TeacherCall, TeacherReply
from needle.teacher.ledger import Budget, Ledger

# Questions that are looked up or under way ahead of the one whose turn it is, for every one that may be in flight.
AHEAD = 4


@dataclass(frozen=True)
class Answer:
    """`reply` is None where there is none: `reason` begins with `budget`, `failed` or `not bought`."""

    call: TeacherCall
    reply: TeacherReply | None
    reason: str = ""


@dataclass(frozen=True)
class _Waiting:
    call: TeacherCall
    key: str
    reply: TeacherReply | None
    sent: bool


class Purchases:
    """`node` is the teacher's resolved configuration, from which the buying process builds it again; `buy=False` takes
    answers from the ledger only."""

    def __init__(
        self,
        ledger: Path,
        *,
        teacher: AskedTeacher,
        node: Mapping[str, Any],
        account: str,
        budget: Budget,
        buy: bool,
    ):
        self.ledger = Ledger(ledger)
        self.account, self.budget = account, budget
        self._teacher, self._node, self._buy = teacher, node, buy
        self._buyers: list[_Buyer] = []
        self.bought = self.replayed = 0
        self.budget_reached: str | None = None

    def __enter__(self) -> "Purchases":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits for the questions that are under way; no new one starts."""
        if self._buyers and kind is KeyboardInterrupt:
            print("waiting for the answers that are under way; Ctrl-C again leaves them to be stored", file=sys.stderr)
        for buyer in self._buyers:
            buyer.stop()
        for buyer in self._buyers:
            buyer.join()
        self.ledger.close()

    def answers(self, calls: Iterable[TeacherCall]) -> Iterator[Answer]:
        """An answer for every call, in the order of the calls; a bounded number of calls is read ahead.

        Once the budget has refused a call, later ones are answered from the ledger only.

        Raises:
            UserError: the teacher refuses every call (a wrong key, an unknown model), or the buying process ended.
        """
        ahead = AHEAD * self._teacher.traffic.concurrency
        waiting: deque[_Waiting] = deque()
        for call in calls:
            waiting.append(self._start(call))
            while waiting and (len(waiting) > ahead or self._is_ready(waiting[0])):
                yield self._finish(waiting.popleft())
        while waiting:
            yield self._finish(waiting.popleft())

    def _start(self, call: TeacherCall) -> "_Waiting":
        key = call.key()
        reply = self.ledger.get(key)
        if reply is not None or not self._buy:
            return _Waiting(call, key, reply, sent=False)
        self._buyer_of(key).send(key, call, self._teacher.most_usd(call))
        return _Waiting(call, key, None, sent=True)

    def _is_ready(self, waiting: "_Waiting") -> bool:
        return not waiting.sent or self._buyer_of(waiting.key).has_result(waiting.key)

    def _finish(self, waiting: "_Waiting") -> Answer:
        if not waiting.sent:
            self.replayed += waiting.reply is not None
            reason = "" if waiting.reply else self.budget_reached or "not bought: it is not in the ledger"
            return Answer(waiting.call, waiting.reply, reason)
        status, reason = self._buyer_of(waiting.key).result(waiting.key)
        if status in ("bought", "known"):
            self.bought += status == "bought"
            self.replayed += status == "known"
            return Answer(waiting.call, self.ledger.get(waiting.key))
        if status.startswith("budget"):
            self.budget_reached, self._buy = reason, False
        return Answer(waiting.call, None, reason)

    def _buyer_of(self, key: str) -> "_Buyer":
        """Equal questions go to one process. Processes start with the first question that must be bought."""
        if not self._buyers:
            check_key(self._teacher)
            order = {"ledger": str(self.ledger.path), "account": self.account, "budget": asdict(self.budget)}
            self._buyers = [_Buyer({"teacher": node, **order}) for node in self._shares()]
        return self._buyers[int(key[:8], 16) % len(self._buyers)]

    def _shares(self) -> list[dict[str, Any]]:
        """The teacher's configuration for each process, with its part of the calls in flight and of the rate."""
        traffic = self._teacher.traffic
        processes = min(traffic.processes, traffic.concurrency)
        rate = traffic.requests_per_minute
        shares = []
        for number in range(processes):
            more = number < traffic.concurrency % processes
            mine = {"concurrency": traffic.concurrency // processes + more, "processes": 1}
            mine["requests_per_minute"] = None if rate is None else rate / processes
            shares.append({**self._node, "traffic": {**self._node["traffic"], **mine}})
        return shares


def check_key(teacher: AskedTeacher) -> None:
    """Raises ConfigError when the key that the teacher needs is not in the environment."""
    if teacher.key_variable is not None and not os.environ.get(teacher.key_variable):
        raise ConfigError(
            f"{teacher.key_variable} is not set: answers that are not in the ledger can be bought only with the "
            f"provider's key; export {teacher.key_variable}=..., or take only stored answers with buy=false"
        )


class _Buyer:
    """The buying process: questions go to its standard input, results come from its standard output."""

    def __init__(self, order: Mapping[str, Any]):
        # A session of its own: neither Ctrl-C nor a kill of this process's group may reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "needle.teacher.buyer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self._results: dict[str, tuple[str, str]] = {}
        self._uses: dict[str, int] = {}
        self._fatal: str | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._write(order)

    def send(self, key: str, call: TeacherCall, most_usd: float) -> None:
        """A question that is asked twice is bought once."""
        with self._changed:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] > 1:
                return
        self._write({"key": key, "call": vars(call), "most_usd": most_usd})

    def has_result(self, key: str) -> bool:
        with self._changed:
            return key in self._results or self._ended or self._fatal is not None

    def result(self, key: str) -> tuple[str, str]:
        """Waits for it.

        Raises:
            UserError: see `Purchases.answers`.
        """
        with self._changed:
            self._changed.wait_for(lambda: key in self._results or self._ended or self._fatal is not None)
            if self._fatal is not None and self._results.get(key, ("failed",))[0] == "failed":
                raise UserError(self._fatal)
            if key not in self._results:
                raise UserError("the buying process ended before it had answered; run this again")
            result = self._results[key]
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key], self._results[key]
            return result

    def stop(self) -> None:
        """No further question comes."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def join(self) -> None:
        """Waits until all that is under way is stored."""
        self._process.wait()
        self._reader.join()

    def _write(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the reader sees the end of the process
            self._stdin.write(json.dumps(message, ensure_ascii=False) + "\n")
            self._stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            with self._changed:
                if "fatal" in message:
                    self._fatal = message["fatal"]
                else:
                    self._results[message["key"]] = (message["status"], message["reason"])
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
