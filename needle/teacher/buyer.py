"""The process that buys: asks a teacher the questions that come on standard input and stores what it answers.

    python -m needle.teacher.buyer < questions     (started by needle.teacher.purchase, not by hand)

The first line is the order (teacher, ledger, account, budget), every other one a question with the most that it can
cost; each result is a line on standard output. When the input ends, which is also how the death of the asking process
shows, no new question starts, and the process ends when those under way are answered and stored.
"""

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_random_exponential

from needle import config
from needle.errors import UserError
from needle.teacher.base import AskedTeacher, Connection, FatalError, TeacherCall, TeacherReply, TransientError
from needle.teacher.ledger import Budget, Ledger, Owner

T = TypeVar("T")
# How long a ledger that cannot be written (a full disk, a lock) is waited for while paid answers are held in memory.
LEDGER_PATIENCE_S = 600.0
POLL_FIRST_S, POLL_MAX_S = 0.05, 2.0
# What comes within this time is one transaction: a synchronisation of the disk costs as much for one as for many.
GATHER_S = 0.01
# Thousands of questions under way are no garbage; the collector's own thresholds would have it look again and again.
GC_THRESHOLDS = (50_000, 20, 20)
STOPPED = "failed: stopped before it was asked"
BUDGET_REASONS = {
    "budget_calls": "budget: budget_calls={calls} is reached",
    "budget_usd": "budget: another call could pass budget_usd={usd}",
}


class SharedLedger:
    """Gives asynchronous code the ledger. What is asked for at about the same time is written in one transaction by a
    thread, and a result is handed back only after that is on disk."""

    def __init__(self, path: Path):
        self._ledger = Ledger(path)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._waiting: list[tuple[Callable[[Ledger], Any], asyncio.Future]] = []
        self._writing: asyncio.Task | None = None

    async def run(self, work: Callable[[Ledger], T]) -> T:
        """`work` inside a transaction; it may be run again when the ledger could not be written."""
        future: asyncio.Future = asyncio.get_running_loop().create_future()
        self._waiting.append((work, future))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        return await future

    async def _write(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            batch, self._waiting = self._waiting, []
            works = [work for work, _ in batch]
            try:
                results = await asyncio.get_running_loop().run_in_executor(
                    self._thread, _patiently, self._ledger, works
                )
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    future.set_result(result)
        self._writing = None

    def close(self) -> None:
        self._thread.shutdown()
        self._ledger.close()


def _patiently(ledger: Ledger, works: list[Callable[[Ledger], Any]]) -> list[Any]:
    end = time.monotonic() + LEDGER_PATIENCE_S
    told = False
    while True:
        try:
            with ledger.transaction():
                return [work(ledger) for work in works]
        except sqlite3.OperationalError as error:
            if time.monotonic() > end:
                raise
            if not told:
                print(
                    f"the ledger {ledger.path} cannot be written ({error}); answers wait", file=sys.stderr, flush=True
                )
                told = True
            time.sleep(1.0)


class Pace:
    """When the next question may start: at most so many a minute, and not before a provider's own wish."""

    def __init__(self, requests_per_minute: float | None):
        self._interval_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0

    def delay_s(self) -> float:
        """Takes the next turn; how long until it comes."""
        now = time.monotonic()
        start = max(self._next, now)
        self._next = start + self._interval_s
        return start - now

    def hold(self, seconds: float) -> None:
        """No turn that is not taken yet comes before that time."""
        self._next = max(self._next, time.monotonic() + seconds)


class Buying:
    """One order at work."""

    def __init__(self, teacher: AskedTeacher, ledger: SharedLedger, *, owner: str, account: str, budget: Budget):
        self.teacher, self.ledger = teacher, ledger
        self.owner, self.account, self.budget = owner, account, budget
        self._stopped = asyncio.Event()
        concurrency = teacher.traffic.concurrency
        # A few questions are claimed ahead of their turn, so that no place at the provider waits for the ledger.
        self._claims = asyncio.Semaphore(concurrency + max(concurrency // 4, 1))
        self._slots = asyncio.Semaphore(concurrency)
        self._pace = Pace(teacher.traffic.requests_per_minute)
        key = os.environ.get(teacher.key_variable or "", "")
        self._redact = (lambda text: text.replace(key, "[key]")) if key else str

    def stop(self) -> None:
        """Starts no further attempt; those under way end as they would."""
        self._stopped.set()

    async def answer(self, connection: Connection, key: str, call: TeacherCall, most_usd: float) -> None:
        """Buys one answer and reports what became of it."""
        try:
            async with self._claims:
                status, reason = await self._buy(connection, key, call, most_usd)
        except FatalError as error:
            status, reason = "failed", f"failed: {self._redact(str(error))}"
            if error.every_call:
                self.stop()
                _report({"fatal": self._redact(str(error))})
        except Exception as error:  # the ledger's own, or a fault of this code: nothing further can be bought safely
            self.stop()
            _report({"fatal": self._redact(f"{type(error).__name__}: {error}")})
            return
        _report({"key": key, "status": status, "reason": reason})

    async def _buy(self, connection: Connection, key: str, call: TeacherCall, most_usd: float) -> tuple[str, str]:
        state = await self._claim(key, most_usd)
        if state != "go":
            return state, BUDGET_REASONS.get(state, STOPPED).format(calls=self.budget.calls, usd=self.budget.usd)
        try:
            async with self._slots:
                reply = await self._ask(connection, key, call, most_usd)
        except _OutOfBudget as error:
            return error.state, BUDGET_REASONS[error.state].format(calls=self.budget.calls, usd=self.budget.usd)
        except _Stopped as error:
            return await self._give_up(key, most_usd, asked=error.asked, billed=error.billed, reason=STOPPED)
        except TransientError as error:
            reason = f"failed: {self.teacher.traffic.attempts_max} attempts, the last: {self._redact(str(error))}"
            return await self._give_up(key, most_usd, asked=True, billed=error.billed, reason=reason)
        except FatalError as error:
            reason = f"failed: {self._redact(str(error))}"
            await self._give_up(key, most_usd, asked=True, billed=False, reason=reason)
            raise
        await self.ledger.run(lambda ledger: ledger.settle(key, call, reply, account=self.account, most_usd=most_usd))
        return "bought", ""

    async def _claim(self, key: str, most_usd: float) -> str:
        """`go`, `known`, a budget's name, or `failed` when the order ends first; waits for other processes."""
        pause_s = POLL_FIRST_S
        terms = {"owner": self.owner, "account": self.account, "budget": self.budget, "most_usd": most_usd}
        while not self._stopped.is_set():
            state = await self.ledger.run(lambda ledger: ledger.begin(key, **terms))
            if state not in ("busy", "wait"):
                return state
            await self.ledger.run(Ledger.release_dead)
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_MAX_S)
        return "failed"

    async def _ask(self, connection: Connection, key: str, call: TeacherCall, most_usd: float) -> TeacherReply:
        last: TransientError | None = None
        async for attempt in self._retrying():
            with attempt:
                await self._sleep(self._pace.delay_s())
                if self._stopped.is_set():
                    raise _Stopped(asked=last is not None, billed=last is not None and last.billed)
                if last is not None:
                    await self._reserve_again(key, most_usd, last)
                start = time.monotonic()
                try:
                    reply = await connection.ask(call)
                except TransientError as error:
                    last = error
                    raise
                number = attempt.retry_state.attempt_number
                # A connection knows best how long it took; building a reply again takes longer than most of this.
                latency_s = reply.latency_s or time.monotonic() - start
                return (
                    reply if number == 1 and reply.latency_s else replace(reply, latency_s=latency_s, attempts=number)
                )
        raise AssertionError("tenacity ends with a result or an exception")

    def _retrying(self) -> AsyncRetrying:
        traffic = self.teacher.traffic
        backoff = wait_random_exponential(multiplier=traffic.wait_first_s, max=traffic.wait_max_s)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            wish_s = getattr(error, "retry_after_s", None)
            if wish_s is None:
                return backoff(state)
            self._pace.hold(wish_s)
            return wish_s

        return AsyncRetrying(
            retry=retry_if_exception_type(TransientError),
            stop=stop_after_attempt(traffic.attempts_max),
            wait=wait,
            sleep=self._sleep,
            reraise=True,
        )

    async def _sleep(self, seconds: float) -> None:
        """Ends early when the order does."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), seconds)

    async def _reserve_again(self, key: str, most_usd: float, last: TransientError) -> None:
        terms = {"account": self.account, "budget": self.budget, "most_usd": most_usd, "billed": last.billed}
        reason = self._redact(str(last))
        refusal = await self.ledger.run(lambda ledger: ledger.again(key, reason=reason, **terms))
        if refusal is not None:
            raise _OutOfBudget("budget_usd" if refusal == "wait" else refusal)

    async def _give_up(self, key: str, most_usd: float, **how: Any) -> tuple[str, str]:
        await self.ledger.run(lambda ledger: ledger.release(key, account=self.account, most_usd=most_usd, **how))
        return "failed", how["reason"]


class _OutOfBudget(Exception):
    def __init__(self, state: str):
        super().__init__(state)
        self.state = state


class _Stopped(Exception):
    """The order ended before the next attempt; `asked`: there was one before it, `billed`: which may have been
    charged."""

    def __init__(self, *, asked: bool, billed: bool):
        super().__init__()
        self.asked, self.billed = asked, billed


async def work(order: Mapping[str, Any], questions: asyncio.StreamReader, ledger: SharedLedger, owner: str) -> None:
    """Takes questions until the input ends, then waits for those under way."""
    teacher = config.build(order["teacher"])
    buying = Buying(teacher, ledger, owner=owner, account=order["account"], budget=Budget(**order["budget"]))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, buying.stop)
    connection = teacher.connect()
    under_way: set[asyncio.Task] = set()
    try:
        # A line without its end was cut off by the asking process's death.
        while (line := await questions.readline()).endswith(b"\n"):
            message = json.loads(line)
            call, most_usd = TeacherCall(**message["call"]), message["most_usd"]
            task = asyncio.create_task(buying.answer(connection, message["key"], call, most_usd))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        buying.stop()
        if under_way:
            await asyncio.wait(under_way)
    finally:
        await connection.close()


def _report(message: Mapping[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(message, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever asked is gone; the answer is in the ledger. What is written from now on goes nowhere.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


async def _main() -> None:
    loop = asyncio.get_running_loop()
    questions = asyncio.StreamReader(limit=2**26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    order = json.loads(await questions.readline())
    path = Path(order["ledger"])
    ledger = SharedLedger(path)
    owner = Owner(path)
    try:
        await ledger.run(Ledger.release_dead)
        await work(order, questions, ledger, owner.name)
    except UserError as error:
        _report({"fatal": str(error)})
    finally:
        ledger.close()
        owner.close()


if __name__ == "__main__":
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    asyncio.run(_main())
