"""What a teacher can give, the check that a loss asks for no more, and what passes between a hosted teacher and us.

A hosted or slow teacher is asked through `TeacherCall` and answers with `TeacherReply`. Both are plain data: the ledger
stores them, and neither ever holds a key.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from needle.errors import ConfigError
from needle.schema import Tool, canonical_json

# text: one answer. samples: several, with weights. top_k: log-probabilities of the likeliest tokens at every position.
# full_logits: of all tokens. live: can score the student's own output while it trains.
CAPABILITIES = ("text", "samples", "top_k", "full_logits", "live")


# ok: it can be used. empty: nothing came back, neither text nor call (an answer without calls is ok). malformed: it
# cannot be read as calls. truncated: a length limit cut it. blocked: the provider's safety rules withheld it.
STATUSES = ("ok", "empty", "malformed", "truncated", "blocked")


class Teacher(Protocol):
    capabilities: ClassVar[frozenset[str]]


@dataclass(frozen=True)
class TeacherCall:
    """One question that can be bought: everything its answer depends on, and nothing else.

    `role` is label (calls for a request) or author (requests with answers for tools). `settings` are JSON values:
    temperature, limits, response schema. Equal calls with another `sample` are independent draws.
    """

    provider: str
    model: str
    role: str
    instruction: str
    prompt: str
    tools: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    sample: int = 0

    def key(self) -> str:
        """Content address: equal calls have equal keys, whatever the order of any mapping."""
        return hashlib.sha256(canonical_json(vars(self)).encode()).hexdigest()


@dataclass(frozen=True)
class TokenLogProb:
    """One token of the answer in the teacher's own tokenizer: its bytes, its natural-log probability, and the likeliest
    alternatives as (bytes, log-probability) in falling order, the chosen one included where it is among them."""

    token: bytes
    log_prob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class TeacherReply:
    """What came back. `calls` are `{"name", "arguments"}` as answered, not yet validated; None where there is no
    answer to read. Tokens are the provider's count; prompt_tokens include cached ones; output_tokens exclude thinking.
    """

    status: str
    reason: str = ""
    text: str = ""
    calls: tuple[Mapping[str, Any], ...] | None = None
    log_probs: tuple[TokenLogProb, ...] | None = None
    model_version: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    thinking_tokens: int = 0
    cost_usd: float = 0.0
    latency_s: float = 0.0
    attempts: int = 1
    raw: Mapping[str, Any] = field(default_factory=dict)


class TransientError(Exception):
    """The provider did not answer, or asked to come again; nothing was billed. `retry_after_s` is its own wish."""

    def __init__(self, message: str, *, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FatalError(Exception):
    """No repetition helps: wrong key, unknown model, a request the provider refuses as malformed."""


class AskedTeacher(Teacher, Protocol):
    """A teacher that answers call by call. It does not retry, count or store: needle.teacher.purchase does."""

    concurrency: int

    def label_call(self, query: str, tools: Sequence[Tool], *, sample: int) -> TeacherCall:
        """The question; raises ConfigError when the provider cannot take a tool's schema, naming tool and keyword."""
        ...

    async def ask(self, call: TeacherCall) -> TeacherReply:
        """One attempt. Raises TransientError or FatalError."""
        ...

    def most_usd(self, call: TeacherCall) -> float:
        """An upper bound of what one attempt can cost, from the price table and the call's limits."""
        ...

    async def close(self) -> None: ...


def check_legal(*, loss_name: str, needs: Iterable[str], teacher_name: str, capabilities: Iterable[str]) -> None:
    """Raises ConfigError with the legal routes when the loss needs what the teacher cannot give."""
    lacking = sorted(set(needs) - set(capabilities), key=CAPABILITIES.index)
    if not lacking:
        return
    routes = {
        "top_k": "use loss=hard_label (cross-entropy with the recorded answers), or teacher=checkpoint after "
        "`python -m needle.signals teacher=checkpoint`",
        "full_logits": "use a loss over top_k, or teacher=checkpoint",
        "live": "use teacher=checkpoint",
        "samples": "use loss=hard_label, or a teacher that samples",
        "text": "use teacher=recorded",
    }
    raise ConfigError(
        f"loss={loss_name} needs {', '.join(lacking)}; teacher={teacher_name} gives {', '.join(sorted(capabilities))}: "
        f"{routes[lacking[0]]}"
    )
