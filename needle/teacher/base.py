"""What a teacher can give, the check that a loss asks for no more, and what passes between an asked teacher and us.

A teacher that answers question by question is asked with a `TeacherCall` and answers with a `TeacherReply`. Both are
plain data: the ledger stores them, and neither ever holds a key.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from needle.errors import ConfigError
from needle.schema import Tool, canonical_json

# text: one answer. samples: several, with weights. top_k: log-probabilities of the likeliest tokens at every position.
# full_logits: of all tokens. live: can score the student's own output while it trains. features: the states and
# attention inside its network.
CAPABILITIES = ("text", "samples", "top_k", "full_logits", "live", "features")
# Those that speak of single tokens, and so of a tokenizer.
TOKEN_CAPABILITIES = frozenset({"top_k", "full_logits", "live", "features"})
# Of those, what a teacher may give over its own tokens: see `check_legal`.
ALIGNABLE = frozenset({"top_k"})

# label: calls for a request. author: requests with answers, or tools, as JSON.
ROLES = ("label", "author")
# ok: it can be used. empty: nothing came back, neither text nor call (a text without calls is ok). malformed: it
# cannot be read as calls. truncated: a length limit cut it. blocked: the provider's safety rules withheld it.
STATUSES = ("ok", "empty", "malformed", "truncated", "blocked")


WRITTEN_TOOLS_MAX = 1024
_written_tools: dict[int, tuple[Sequence[Tool], str]] = {}


class Teacher(Protocol):
    """`tokenizer`: whose tokens its distributions are over: the student's, or its own."""

    capabilities: ClassVar[frozenset[str]]
    tokenizer: ClassVar[Literal["student", "own"]]


@dataclass(frozen=True)
class TeacherCall:
    """One question that can be bought: everything its answer depends on, and nothing else.

    `tools` is the canonical JSON of a list of `{"name", "description", "parameters"}`. `settings` are JSON values:
    temperature, limits, response schema. Equal calls with another `sample` are independent draws.
    """

    provider: str
    model: str
    role: str
    instruction: str
    prompt: str
    tools: str
    settings: Mapping[str, Any]
    sample: int = 0

    def key(self) -> str:
        """Content address: equal calls have equal keys, whatever the order of any mapping."""
        return hashlib.sha256(canonical_json(vars(self)).encode()).hexdigest()

    def seed(self) -> int:
        """Of the generator that a teacher in this process samples the answer with: the same in any batch."""
        return int(self.key()[:15], 16)


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
    `raw` is the provider's whole response as JSON values.
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
    """The provider did not answer, or asked to come again. `retry_after_s` is its own wish; `billed` says that it may
    have charged for the attempt all the same (a time-out, a cut connection)."""

    def __init__(self, message: str, *, retry_after_s: float | None = None, billed: bool = False):
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.billed = billed


class FatalError(Exception):
    """No repetition helps. `every_call`: nor will any other call succeed (a wrong key, an unknown model)."""

    def __init__(self, message: str, *, every_call: bool = False):
        super().__init__(message)
        self.every_call = every_call


@dataclass(frozen=True)
class Traffic:
    """How an asked teacher may be asked. It changes when answers come, never which. `processes` share the calls in
    flight and the rate: one process is as fast as its client on one core."""

    processes: Annotated[int, Field(ge=1, le=64)]
    concurrency: Annotated[int, Field(ge=1, le=4096)]
    requests_per_minute: Annotated[float, Field(gt=0)] | None
    timeout_s: Annotated[float, Field(gt=0)]
    attempts_max: Annotated[int, Field(ge=1)]
    wait_first_s: Annotated[float, Field(ge=0)]
    wait_max_s: Annotated[float, Field(ge=0)]


class Connection(Protocol):
    """An open client of a teacher. It makes one attempt a call: retries, counting and storing are the buyer's."""

    async def ask(self, call: TeacherCall) -> TeacherReply:
        """Raises TransientError or FatalError."""
        ...

    async def close(self) -> None: ...


class AskedTeacher(Teacher, Protocol):
    """A teacher that answers call by call. It is settings only: building one needs neither key nor network. `roles`:
    those of ROLES that it can take."""

    roles: ClassVar[frozenset[str]]
    traffic: Traffic
    key_variable: str | None  # environment variable that holds the key; null: no key is needed

    def label_call(self, *, instruction: str, query: str, tools: Sequence[Tool], sample: int) -> TeacherCall:
        """The question which tools a request calls for.

        Raises:
            ConfigError: the provider cannot take a tool; the message names the tool and the keyword of its schema.
        """
        ...

    def author_call(
        self, *, instruction: str, prompt: str, answer_schema: Mapping[str, Any], sample: int
    ) -> TeacherCall:
        """A question whose answer is JSON of `answer_schema`."""
        ...

    def most_usd(self, call: TeacherCall) -> float:
        """An upper bound of what one attempt can cost, from the price table and the call's limits."""
        ...

    def connect(self) -> Connection:
        """Raises ConfigError when the key is not in the environment."""
        ...


def tools_json(tools: Sequence[Tool]) -> str:
    """`tools` as a TeacherCall holds them; of a tuple that is asked for again, remembered."""
    known = _written_tools.get(id(tools))
    if known is not None and known[0] is tools:
        return known[1]
    text = _tools_json(tools)
    if isinstance(tools, tuple):  # which cannot change; kept beside its text, so that its id stays its own
        if len(_written_tools) >= WRITTEN_TOOLS_MAX:
            _written_tools.clear()
        _written_tools[id(tools)] = (tools, text)
    return text


def _tools_json(tools: Sequence[Tool]) -> str:
    return canonical_json([{"name": t.name, "description": t.description, "parameters": t.parameters} for t in tools])


def check_legal(
    *, loss_name: str, needs: Iterable[str], teacher_name: str, capabilities: Iterable[str], tokenizer: str
) -> None:
    """Which loss may learn from which teacher: the loss's needs must be among the teacher's capabilities, and those
    that speak of tokens must come over the student's.

    ALIGNABLE ones may come over the teacher's own tokens: needle.signals turns them into the student's, since stored
    log-probabilities of an answer can be aligned with it byte by byte. Nothing else can: full logits and what a network
    says of the student's own output are over whole vocabularies, batch by batch, and features over other positions.

    Raises:
        ConfigError: with the legal routes.
    """
    needed, given = frozenset(needs), frozenset(capabilities)
    lacking = sorted(needed - given, key=CAPABILITIES.index)
    routes = {
        "top_k": "use loss=hard_label (cross-entropy with the recorded answers), or teacher=checkpoint after "
        "`python -m needle.signals teacher=checkpoint`",
        "full_logits": "use a loss over top_k, or teacher=checkpoint",
        "live": "use teacher=checkpoint",
        "features": "use teacher=checkpoint",
        "samples": "use loss=hard_label, or a teacher that samples",
        "text": "use teacher=recorded",
    }
    if lacking:
        raise ConfigError(
            f"loss={loss_name} needs {', '.join(lacking)}; teacher={teacher_name} gives {', '.join(sorted(given))}: "
            f"{routes[lacking[0]]}"
        )
    foreign = sorted(needed & TOKEN_CAPABILITIES - ALIGNABLE, key=CAPABILITIES.index)
    if foreign and tokenizer != "student":
        raise ConfigError(
            f"loss={loss_name} needs {', '.join(foreign)} over the student's tokens; teacher={teacher_name} gives them "
            f"over its own: use a loss over top_k, whose signals are aligned (`python -m needle.signals "
            f"teacher={teacher_name}`), or teacher=checkpoint"
        )
