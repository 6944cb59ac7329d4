"""A teacher for tests of buying: it answers from the question alone and writes down every attempt, as a bill would.

Its process imports this file by name: NEEDLE_TARGETS=counting_teacher, with this folder on PYTHONPATH.
"""

import asyncio
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from needle.schema import Tool
from needle.teacher.base import FatalError, TeacherCall, TeacherReply, TokenLogProb, Traffic, TransientError, tools_json

PRICE_USD = 0.001
MOST_USD = 0.01


@dataclass(frozen=True)
class CountingTeacher:
    """`bill`: a file that gets a line an attempt. `faults`: prompt -> what its attempts meet, one after the other:
    transient, billed (a cut connection), wait (the provider asks to wait), fatal, ends (no call can succeed)."""

    bill: Path
    latency_s: float
    faults: Mapping[str, list[str]]
    key_variable: str | None
    traffic: Traffic
    capabilities: ClassVar[frozenset[str]] = frozenset({"text", "samples"})
    roles: ClassVar[frozenset[str]] = frozenset({"label", "author"})
    tokenizer: ClassVar[Literal["student", "own"]] = "own"

    def label_call(self, *, instruction: str, query: str, tools: Sequence[Tool], sample: int) -> TeacherCall:
        return TeacherCall("counting", "1", "label", instruction, query, tools_json(tools), {}, sample)

    def author_call(
        self, *, instruction: str, prompt: str, answer_schema: Mapping[str, Any], sample: int
    ) -> TeacherCall:
        return TeacherCall(
            "counting", "1", "author", instruction, prompt, "[]", {"schema": dict(answer_schema)}, sample
        )

    def most_usd(self, call: TeacherCall) -> float:
        return MOST_USD

    def connect(self) -> "CountingConnection":
        return CountingConnection(self)


class CountingConnection:
    def __init__(self, teacher: CountingTeacher):
        self._teacher = teacher
        self._attempts: dict[str, int] = {}
        self._bill = os.open(teacher.bill, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def ask(self, call: TeacherCall) -> TeacherReply:
        number = self._attempts[call.key()] = self._attempts.get(call.key(), 0) + 1
        os.write(self._bill, f"{call.key()} {call.prompt}\n".encode())
        latency_s = self._teacher.latency_s
        await asyncio.sleep(random.Random(call.prompt).uniform(0.5 * latency_s, 1.5 * latency_s))
        faults = self._teacher.faults.get(call.prompt, [])
        match faults[number - 1] if number <= len(faults) else "":
            case "transient":
                raise TransientError("status 500")
            case "billed":
                raise TransientError("the connection was cut", billed=True)
            case "wait":
                raise TransientError("status 429", retry_after_s=0.05)
            case "fatal":
                raise FatalError(f"the provider refuses {call.prompt!r}: {os.environ.get('COUNTING_KEY')}")
            case "ends":
                raise FatalError(f"the key {os.environ.get('COUNTING_KEY')} is not valid", every_call=True)
        calls = ({"name": "say", "arguments": {"text": call.prompt}},)
        return TeacherReply(
            "ok",
            text=f"answer to {call.prompt}",
            calls=calls,
            log_probs=(TokenLogProb(b"\xff", -0.5, ((b"\xff", -0.5), (b"a", -1.0))),),
            model_version="1",
            prompt_tokens=10,
            output_tokens=2,
            thinking_tokens=1,
            cost_usd=PRICE_USD,
            raw={"prompt": call.prompt},
        )

    async def close(self) -> None:
        os.close(self._bill)


def attempts(bill: Path) -> list[str]:
    """The prompts of the bill, one an attempt."""
    return [line.split(" ", 1)[1] for line in bill.read_text().splitlines()] if bill.is_file() else []


def node(bill: Path, *, latency_s: float = 0.0, **changes: Any) -> dict[str, Any]:
    """The resolved configuration of a CountingTeacher."""
    traffic = {
        "_target_": "needle.teacher.base.Traffic",
        "processes": 1,
        "concurrency": 16,
        "requests_per_minute": None,
        "timeout_s": 5.0,
        "attempts_max": 4,
        "wait_first_s": 0.0,
        "wait_max_s": 0.0,
    } | changes.pop("traffic", {})
    plain = {"bill": str(bill), "latency_s": latency_s, "faults": {}, "key_variable": None, "traffic": traffic}
    return json.loads(json.dumps({"_target_": "counting_teacher.CountingTeacher", **plain, **changes}))
