"""Gemini as a teacher that is asked: native function calls, JSON answers, log-probabilities, batch jobs at half price.

An attempt costs what the price table says of the tokens that Gemini counts; `most_usd` bounds it beforehand.
"""

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import aiohttp
from pydantic import Field

from needle.errors import ConfigError
from needle.schema import Tool, canonical_json, strict_json
from needle.teacher.base import (
    Connection,
    FatalError,
    TeacherCall,
    TeacherReply,
    TokenLogProb,
    Traffic,
    TransientError,
    tools_json,
)
from needle.teacher.gemini_schema import Declarations, answer_schema, declare
from needle.teacher.prices import PriceTable
from needle.teacher.retry_after import until_s

if TYPE_CHECKING:  # the package takes two seconds to import, which settings alone need not wait for
    from google.genai import Client, types

PROVIDER = "gemini"
API_VERSION = "v1beta"  # the only one whose functions take JSON Schema
OTHER_PROVIDER = "gemini_base_url"  # of calls to another server than Google's: its answers are not Google's
# What a prompt may hold beyond the bytes that were sent: the words that the provider puts around functions.
PROMPT_MARGIN_TOKENS = 1000
TRUNCATED = frozenset({"MAX_TOKENS", "CONTINUATION"})
BLOCKED = frozenset(
    {
        "SAFETY",
        "RECITATION",
        "LANGUAGE",
        "BLOCKLIST",
        "PROHIBITED_CONTENT",
        "SPII",
        "OTHER",
        "ESCALATION",
        "MODEL_ARMOR",
        "PUP_LIMITED_DISABLED",
    }
)
FINISHED = frozenset({"STOP", "FINISH_REASON_UNSPECIFIED", ""})
# google.rpc.Code of an item of a batch job as the HTTP status of the same meaning.
HTTP_OF_RPC = {1: 499, 3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 13: 500, 14: 503, 16: 401}
JOB_PREFIX = "needle-"
JOB_BYTES_MAX = 18_000_000  # of the 20 MB that a job with its requests in line may have
JOB_DONE = frozenset({"JOB_STATE_SUCCEEDED", "JOB_STATE_PARTIALLY_SUCCEEDED"})
JOB_DEAD = frozenset({"JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_CANCELLING", "JOB_STATE_EXPIRED"})
POLL_FAILURES_MAX = 10  # in a row

Category = Literal[
    "HARM_CATEGORY_HARASSMENT",
    "HARM_CATEGORY_HATE_SPEECH",
    "HARM_CATEGORY_SEXUALLY_EXPLICIT",
    "HARM_CATEGORY_DANGEROUS_CONTENT",
    "HARM_CATEGORY_CIVIC_INTEGRITY",
]
Threshold = Literal["BLOCK_LOW_AND_ABOVE", "BLOCK_MEDIUM_AND_ABOVE", "BLOCK_ONLY_HIGH", "BLOCK_NONE", "OFF"]
Level = Literal["minimal", "low", "medium", "high", "xhigh"]


@dataclass(frozen=True)
class GeminiTeacher:
    """An `AskedTeacher` (needle.teacher.base). Null leaves a setting to the model.

    `response_logprobs` is how many likeliest tokens come with each token, 0: no log-probabilities. `thinking` is a
    level, or a budget in tokens: 0 none, -1 as the model likes. `batch` gathers calls into jobs of at most
    `batch_calls_max`; a job is sent when it is full or no call has come for `batch_settle_s`.
    """

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    max_output_tokens: Annotated[int, Field(ge=1)]
    thinking: Level | Annotated[int, Field(ge=-1)] | None
    response_logprobs: Annotated[int, Field(ge=0, le=20)]
    safety: Mapping[Category, Threshold]
    base_url: str | None
    key_variable: str | None
    batch: bool
    batch_calls_max: Annotated[int, Field(ge=1)]
    batch_settle_s: Annotated[float, Field(ge=0)]
    batch_poll_s: Annotated[float, Field(gt=0)]
    traffic: Traffic
    prices: PriceTable

    capabilities: ClassVar[frozenset[str]] = frozenset({"text", "samples", "top_k"})
    roles: ClassVar[frozenset[str]] = frozenset({"label", "author"})
    tokenizer: ClassVar[Literal["student", "own"]] = "own"

    def __post_init__(self) -> None:
        if self.base_url is not None:
            parts = urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"base_url={self.base_url}: give a URL such as https://host, or null for Google's")
            if parts.username or parts.password:
                raise ValueError("base_url holds a user or password; give a key in an environment variable instead")

    def label_call(self, *, instruction: str, query: str, tools: Sequence[Tool], sample: int) -> TeacherCall:
        text = tools_json(tools)
        _declared(text)
        return self._call("label", instruction, query, text, sample, {})

    def author_call(
        self, *, instruction: str, prompt: str, answer_schema: Mapping[str, Any], sample: int
    ) -> TeacherCall:
        _answer_schema(canonical_json(answer_schema))
        return self._call("author", instruction, prompt, "[]", sample, {"answer_schema": dict(answer_schema)})

    def _call(
        self, role: str, instruction: str, prompt: str, tools: str, sample: int, more: Mapping[str, Any]
    ) -> TeacherCall:
        settings = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_output_tokens": self.max_output_tokens,
            "thinking": self.thinking,
            "response_logprobs": self.response_logprobs,
            "safety": dict(self.safety),
            **more,
        }
        provider = PROVIDER if self.base_url is None else OTHER_PROVIDER
        return TeacherCall(provider, self.model, role, instruction, prompt, tools, settings, sample)

    def most_usd(self, call: TeacherCall) -> float:
        """A token has at least one byte, and what is sent holds the prompt. `max_output_tokens` bounds thinking and
        answer together: github.com/googleapis/python-genai/issues/2062 measured 1,024 of 1,024 for both."""
        price, prompt_tokens = (
            self.prices.of(call.model),
            _fixed_bytes(call) + _bytes(call.prompt) + PROMPT_MARGIN_TOKENS,
        )
        return max(
            price.cost_usd(
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                output_tokens=call.settings["max_output_tokens"],
                thinking_tokens=0,
                batch=self.batch,
            )
            for cached_tokens in (0, prompt_tokens)
        )

    def connect(self) -> Connection:
        self.prices.of(self.model)
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else "none"
        if not key:
            raise ConfigError(
                f"teacher=gemini needs a key: the environment variable {self.key_variable} is not set; "
                f"set it, or name another with teacher.key_variable=..."
            )
        return (_BatchConnection if self.batch else _Connection)(self, _client(self, key), _Scrubber(key))


def _client(teacher: GeminiTeacher, key: str) -> "Client":
    from google import genai

    options = genai.types.HttpOptions(
        base_url=teacher.base_url,
        api_version=API_VERSION,
        timeout=max(1, round(teacher.traffic.timeout_s * 1000)),
        # One attempt. Only with options of its own does the client leave out its silent retry of a lost connection.
        retry_options=genai.types.HttpRetryOptions(attempts=1),
    )
    return genai.Client(api_key=key, vertexai=False, http_options=options)


@dataclass(frozen=True)
class _Scrubber:
    """Takes the key out of whatever is shown or stored."""

    key: str = field(repr=False)

    def text(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key in text else text

    def values(self, values: Any) -> Any:
        text = json.dumps(values)
        return json.loads(self.text(text)) if self.key in text else values


@lru_cache(maxsize=4096)
def _declared(tools: str) -> Declarations:
    return declare([Tool.from_dict(tool) for tool in json.loads(tools)])


@lru_cache(maxsize=256)
def _answer_schema(schema: str) -> dict[str, Any]:
    return answer_schema(json.loads(schema))


def _client_config(body: dict[str, Any]) -> "types.GenerateContentConfig":
    """A configuration of the client that sends `body` and gives back the answer's text."""
    from google.genai import types

    return _config_class().model_construct(
        http_options=types.HttpOptions.model_construct(extra_body=body),
        should_return_http_response=True,
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
        automatic_continuation=False,
    )


@lru_cache(maxsize=1)
def _config_class() -> "type[types.GenerateContentConfig]":
    from google.genai import types

    class Config(types.GenerateContentConfig):
        def __contains__(self, key: str) -> bool:
            """The client asks sixty times a call whether a key is among the items, and then for the attribute; without
            this, each question walks through all fields, a third of a call's time."""
            return False

        def __deepcopy__(self, memo: Any = None) -> "Config":
            """The client copies it call by call and then changes nothing but `tools`, which are not set here."""
            return self

    return Config


def _fixed_body(call: TeacherCall) -> dict[str, Any]:
    """What a request says beside its prompt, as https://ai.google.dev/api/generate-content has it."""
    settings = call.settings
    # Sampled answers differ by their seed, and an answer asked for again is the same one as far as Gemini keeps to it.
    generation: dict[str, Any] = {"maxOutputTokens": settings["max_output_tokens"], "seed": call.sample}
    for key, name in (("temperature", "temperature"), ("top_p", "topP")):
        if settings[key] is not None:
            generation[name] = settings[key]
    thinking = settings["thinking"]
    if isinstance(thinking, str):
        generation["thinkingConfig"] = {"thinkingLevel": thinking.upper()}
    elif thinking is not None:
        generation["thinkingConfig"] = {"thinkingBudget": thinking}
    if settings["response_logprobs"]:
        generation |= {"responseLogprobs": True, "logprobs": settings["response_logprobs"]}
    if call.role == "author":
        schema = _answer_schema(canonical_json(settings["answer_schema"]))
        generation |= {"responseMimeType": "application/json", "responseJsonSchema": schema}
    body: dict[str, Any] = {"generationConfig": generation}
    if call.instruction:
        body["systemInstruction"] = {"parts": [{"text": call.instruction}]}
    functions = _declared(call.tools).functions
    if functions:
        body["tools"] = [{"functionDeclarations": list(functions)}]
    if settings["safety"]:
        body["safetySettings"] = [{"category": c, "threshold": t} for c, t in sorted(settings["safety"].items())]
    return body


def request_body(call: TeacherCall) -> dict[str, Any]:
    """The request of a call as JSON values."""
    return {"contents": [{"role": "user", "parts": [{"text": call.prompt}]}], **_fixed_body(call)}


def _bytes(body: Any) -> int:
    """Of what is sent: JSON in ASCII, never shorter than its text in UTF-8."""
    return len(json.dumps(body))


def _fixed_bytes(call: TeacherCall) -> int:
    """Of all of a request but its prompt, which is the same for many calls."""
    return _place_bytes(call.role, call.instruction, call.tools, canonical_json(call.settings))


@lru_cache(maxsize=4096)
def _place_bytes(role: str, instruction: str, tools: str, settings: str) -> int:
    call = TeacherCall("", "", role, instruction, "", tools, json.loads(settings), sample=2**31)
    return _bytes(request_body(call))


class _Connection:
    """One request for one call."""

    def __init__(self, teacher: GeminiTeacher, client: "Client", scrubber: _Scrubber):
        self._teacher, self._client, self._scrubber = teacher, client, scrubber
        self._configs: dict[tuple[str, ...], types.GenerateContentConfig] = {}

    async def ask(self, call: TeacherCall) -> TeacherReply:
        started = time.monotonic()
        work = self._client.aio.models.generate_content(
            model=call.model, contents=call.prompt, config=self._config(call)
        )
        http = (await self._attempt(call, work)).sdk_http_response
        try:
            raw = strict_json(self._scrubber.text(http.body or ""))
            reply = read_reply(call, raw, self._teacher.prices, batch=False)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise TransientError(f"Gemini's answer cannot be read: {error}", billed=True) from None
        return _timed(reply, started)

    async def close(self) -> None:
        await self._client.aio.aclose()
        self._client.close()

    def _config(self, call: TeacherCall) -> "types.GenerateContentConfig":
        """The body goes as it is past the client's validation, which costs more time than all the rest, and the
        answer comes back as text; both are checked here."""
        place = (call.role, call.instruction, call.tools, canonical_json(call.settings), str(call.sample))
        config = self._configs.get(place)
        if config is None:
            if len(self._configs) >= 4096:
                self._configs.clear()
            self._configs[place] = config = _client_config(_fixed_body(call))
        return config

    async def _attempt(self, call: TeacherCall, work: Awaitable[Any]) -> Any:
        """The result of a request, its errors as those of the contract and without the key."""
        from google.genai.errors import APIError

        try:
            return await work
        except APIError as error:
            status, details = error.code or 0, error.details
            headers = getattr(error.response, "headers", None) or {}
            told = self._told(call, status, details, headers)
        except TimeoutError:
            limit_s = self._teacher.traffic.timeout_s
            told = TransientError(f"no answer from Gemini within teacher.traffic.timeout_s={limit_s:g}", billed=True)
        except (aiohttp.ClientError, OSError) as error:
            words = self._scrubber.text(f"{type(error).__name__}: {error}")
            sent = not isinstance(error, aiohttp.ClientConnectorError)
            told = TransientError(f"the connection to Gemini broke: {words}", billed=sent)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            told = TransientError(f"Gemini's answer is not JSON: {error}", billed=True)
        raise told

    def _told(
        self, call: TeacherCall, status: int, body: Any, headers: Mapping[str, str]
    ) -> TransientError | FatalError:
        body = self._scrubber.values(body)
        return _told_error(status, body, headers, model=call.model, key_variable=self._teacher.key_variable)


def _timed(reply: TeacherReply, started: float) -> TeacherReply:
    return replace(reply, latency_s=time.monotonic() - started)


def read_reply(call: TeacherCall, raw: Mapping[str, Any], prices: PriceTable, *, batch: bool) -> TeacherReply:
    """A GenerateContentResponse as a reply.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: it is none.
    """
    usage = raw.get("usageMetadata") or {}
    counts = {
        "prompt_tokens": usage.get("promptTokenCount") or 0,
        "cached_tokens": usage.get("cachedContentTokenCount") or 0,
        "output_tokens": usage.get("candidatesTokenCount") or 0,
        "thinking_tokens": usage.get("thoughtsTokenCount") or 0,
    }
    candidate = (raw.get("candidates") or [{}])[0]
    parts = (candidate.get("content") or {}).get("parts") or []
    text = "".join(part["text"] for part in parts if "text" in part and not part.get("thought"))
    asked = [part["functionCall"] for part in parts if "functionCall" in part]
    status, reason, calls = _outcome(call, raw, candidate, text, asked)
    return TeacherReply(
        status=status,
        reason=reason,
        text=text,
        calls=calls,
        log_probs=_log_probs(candidate.get("logprobsResult") or {}) if call.settings["response_logprobs"] else None,
        model_version=raw.get("modelVersion") or "",
        **counts,
        cost_usd=prices.of(call.model).cost_usd(**counts, batch=batch),
        raw=raw,
    )


def _outcome(
    call: TeacherCall, raw: Mapping[str, Any], candidate: Mapping[str, Any], text: str, asked: list[Mapping[str, Any]]
) -> tuple[str, str, tuple[Mapping[str, Any], ...] | None]:
    """Status, reason and calls."""
    finish = candidate.get("finishReason") or ""
    why = f"finish reason {finish}" + (f": {candidate['finishMessage']}" if candidate.get("finishMessage") else "")
    block = (raw.get("promptFeedback") or {}).get("blockReason")
    if block:
        return "blocked", f"the prompt was blocked: {block}", None
    if not candidate:
        return "empty", "no candidate came back", None
    if finish in TRUNCATED:
        return "truncated", f"{why} at max_output_tokens={call.settings['max_output_tokens']}", None
    if finish in BLOCKED:
        return "blocked", why, None
    if finish not in FINISHED:
        return "malformed", why, None
    if not text and not asked:
        return "empty", "neither text nor call came back", None
    if call.role == "author":
        try:
            strict_json(text)
        except ValueError as error:
            return "malformed", f"not JSON: {error}", None
        return "ok", "", None
    wrong = next((c for c in asked if not c.get("name") or not isinstance(c.get("args") or {}, Mapping)), None)
    if wrong is not None:
        return "malformed", f"not a call: {canonical_json(wrong)[:200]}", None
    declared = _declared(call.tools)
    return "ok", "", tuple(declared.call(c["name"], c.get("args") or {}) for c in asked)


def _log_probs(result: Mapping[str, Any]) -> tuple[TokenLogProb, ...] | None:
    chosen = result.get("chosenCandidates")
    if not chosen:
        return None
    top = result.get("topCandidates") or []
    rows = [step.get("candidates") or [] for step in top] + [[]] * (len(chosen) - len(top))
    return tuple(
        TokenLogProb(
            _token_bytes(one.get("token", "")),
            float(one.get("logProbability", 0.0)),
            tuple(
                sorted(
                    ((_token_bytes(c.get("token", "")), float(c.get("logProbability", 0.0))) for c in row),
                    key=lambda pair: -pair[1],
                )
            ),
        )
        for one, row in zip(chosen, rows, strict=False)
    )


def _token_bytes(token: str) -> bytes:
    """A token is text, or one byte that is not a character alone, written as SentencePiece does: <0xE2>."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.encode("utf-8", "surrogatepass")


def _told_error(
    status: int, body: Any, headers: Mapping[str, str], *, model: str, key_variable: str | None
) -> TransientError | FatalError:
    """What an HTTP status and a google.rpc.Status in the body say, in the contract's terms."""
    if isinstance(body, list) and body:
        body = body[0]
    told = (body.get("error") or body) if isinstance(body, Mapping) else {}
    told = told if isinstance(told, Mapping) else {"message": str(told)}
    words = f"Gemini answered {status} {told.get('status') or ''}: {str(told.get('message') or 'no message')[:500]}"
    details = [item for item in told.get("details") or [] if isinstance(item, Mapping)]
    key_help = f"check the key in the environment variable {key_variable}"
    if status == 429:
        daily = _daily_quota(details)
        if daily:
            return FatalError(
                f"the daily quota of {model} is spent ({daily}); it is refilled at midnight Pacific time: run again "
                "then, or raise it at https://ai.google.dev/gemini-api/docs/rate-limits",
                every_call=True,
            )
    if status in (408, 429, 499) or 500 <= status < 600:
        return TransientError(words, retry_after_s=_retry_after_s(headers, details))
    if any(item.get("reason") == "API_KEY_INVALID" for item in details) or status in (401, 403):
        return FatalError(f"{words}; {key_help}, and that it may use {model}", every_call=True)
    if status == 404:
        return FatalError(f"{words}; teacher.model={model} is not served: name another", every_call=True)
    # 400 FAILED_PRECONDITION: not offered in this country without billing, and the like.
    return FatalError(words, every_call=told.get("status") == "FAILED_PRECONDITION")


def _daily_quota(details: Sequence[Mapping[str, Any]]) -> str:
    """The spent quota of a day as Gemini names it, or nothing."""
    for item in details:
        for violation in item.get("violations") or []:
            name = str(violation.get("quotaId") or "")
            if "PerDay" in name:
                return f"{name}, limit {violation.get('quotaValue', 'not told')}"
    return ""


def _retry_after_s(headers: Mapping[str, str], details: Sequence[Mapping[str, Any]]) -> float | None:
    """The longest wait that the Retry-After header (seconds or an HTTP date) or a google.rpc.RetryInfo asks for."""
    wishes = []
    header = headers.get("Retry-After") or headers.get("retry-after") or ""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", header):
        wishes.append(float(header))
    elif (wish_s := until_s(header)) is not None:
        wishes.append(wish_s)
    for item in details:
        delay = re.fullmatch(r"(\d+(?:\.\d+)?)s", str(item.get("retryDelay", "")))
        if delay:
            wishes.append(float(delay[1]))
    return max(wishes, default=None)


@dataclass
class _Waiting:
    """A call on its way into a job, and all who wait for its answer."""

    call: TeacherCall
    started: float
    answers: list[asyncio.Future[TeacherReply]]

    def give(self, result: TeacherReply | Exception) -> None:
        for answer in self.answers:
            if answer.done():
                continue
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(_timed(result, self.started))


class _BatchConnection(_Connection):
    """Gathers calls into jobs. A job is named after its calls, so that the job of an earlier, interrupted run is taken
    up instead of paid twice; answers in finished jobs of earlier runs are used call by call."""

    def __init__(self, teacher: GeminiTeacher, client: "Client", scrubber: _Scrubber):
        super().__init__(teacher, client, scrubber)
        self._gathered: dict[str, _Waiting] = {}
        self._gathered_bytes = 0
        self._settle: asyncio.TimerHandle | None = None
        self._earlier: asyncio.Task[dict[str, Mapping[str, Any]]] | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._used: set[str] = set()  # jobs whose answers have been given: asked again, a call gets a new job

    async def ask(self, call: TeacherCall) -> TeacherReply:
        key, answer = call.key(), asyncio.get_running_loop().create_future()
        waiting = self._gathered.get(key)
        if waiting is None:
            self._gathered[key] = waiting = _Waiting(call, time.monotonic(), [])
            self._gathered_bytes += _bytes(request_body(call))
        waiting.answers.append(answer)
        if self._settle is not None:
            self._settle.cancel()
        if len(self._gathered) >= self._teacher.batch_calls_max or self._gathered_bytes > JOB_BYTES_MAX:
            self._send()
        else:
            self._settle = asyncio.get_running_loop().call_later(self._teacher.batch_settle_s, self._send)
        return await answer

    async def close(self) -> None:
        if self._settle is not None:
            self._settle.cancel()
        running = [*self._jobs, *([self._earlier] if self._earlier else [])]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for waiting in self._gathered.values():
            waiting.give(TransientError("the connection was closed before the call was sent"))
        await super().close()

    def _send(self) -> None:
        gathered, self._gathered, self._gathered_bytes, self._settle = self._gathered, {}, 0, None
        if gathered:
            task = asyncio.get_running_loop().create_task(self._run(gathered))
            self._jobs.add(task)
            task.add_done_callback(self._jobs.discard)

    async def _run(self, gathered: dict[str, _Waiting]) -> None:
        try:
            if self._earlier is None:
                self._earlier = asyncio.get_running_loop().create_task(self._answers_of_earlier_jobs())
            earlier = await asyncio.shield(self._earlier)
            for key in [key for key in gathered if key in earlier]:
                self._give(gathered.pop(key), {"response": earlier.pop(key)})
            if gathered:
                await self._run_job(gathered)
        except (TransientError, FatalError) as error:
            if self._earlier is not None and self._earlier.done() and self._earlier.exception() is not None:
                self._earlier = None  # the next job looks again
            for waiting in gathered.values():
                waiting.give(error)
        except asyncio.CancelledError:
            for waiting in gathered.values():
                waiting.give(TransientError("the connection was closed before the job was done"))
            raise
        except Exception as error:  # whoever waits must hear of it
            for waiting in gathered.values():
                waiting.give(error)

    async def _run_job(self, gathered: Mapping[str, _Waiting]) -> None:
        keys = sorted(gathered)
        job = await self._adopted(keys) or await self._created([(key, gathered[key].call) for key in keys])
        job = await self._done(job, gathered[keys[0]].call)
        self._used.add(job["name"])
        if job["state"] in JOB_DEAD:
            error = job.get("error") or {}
            words = self._scrubber.text(f"batch job {job['name']}: {job['state']}: {error.get('message', '')}")
            for waiting in gathered.values():
                waiting.give(TransientError(words))
            return
        items = _items(job)
        named = {(item.get("metadata") or {}).get("key"): item for item in items}
        by_position = dict(zip(keys, items, strict=False)) if len(items) == len(keys) else {}
        for key in keys:
            self._give(gathered[key], named.get(key) or by_position.get(key) or {})

    def _give(self, waiting: _Waiting, item: Mapping[str, Any]) -> None:
        call, error = waiting.call, item.get("error")
        if error:
            code = HTTP_OF_RPC.get(error.get("code") or 0, error.get("code") or 500)
            waiting.give(self._told(call, code, {"error": error}, {}))
            return
        try:
            raw = self._scrubber.values(item["response"])
            waiting.give(read_reply(call, raw, self._teacher.prices, batch=True))
        except (ValueError, TypeError, AttributeError, KeyError) as problem:
            waiting.give(TransientError(f"a batch job's answer cannot be read: {problem!r}", billed=True))

    async def _adopted(self, keys: Sequence[str]) -> dict[str, Any] | None:
        """A job of the same calls that is running or done."""
        for job in await self._listed():
            live = job["state"] not in JOB_DEAD and job["name"] not in self._used
            if live and job.get("displayName") == _job_name(keys):
                return job
        return None

    async def _created(self, calls: Sequence[tuple[str, TeacherCall]]) -> dict[str, Any]:
        from google.genai import types

        name, model = _job_name([key for key, _ in calls]), calls[0][1].model
        sent = [
            {"request": {"model": f"models/{call.model}", **request_body(call)}, "metadata": {"key": key}}
            for key, call in calls
        ]
        body = {"batch": {"inputConfig": {"requests": {"requests": sent}}}}
        options = types.HttpOptions(extra_body=body)  # takes the place of what the client makes of `src`
        config = types.CreateBatchJobConfig(display_name=name, http_options=options)
        work = self._client.aio.batches.create(model=model, src=[types.InlinedRequest()], config=config)
        return _values(await self._attempt(calls[0][1], work))

    async def _done(self, job: dict[str, Any], call: TeacherCall) -> dict[str, Any]:
        """The job with its answers, once it is done or dead. A poll that fails is tried again at the next."""
        failures = 0
        while True:
            try:
                job = _values(await self._attempt(call, self._client.aio.batches.get(name=job["name"])))
                failures = 0
            except TransientError as error:
                failures += 1
                if failures >= POLL_FAILURES_MAX:
                    raise TransientError(f"batch job {job['name']} cannot be followed: {error}", billed=True) from None
            if job["state"] in JOB_DEAD or (job["state"] in JOB_DONE and failures == 0):
                return job
            await asyncio.sleep(self._teacher.batch_poll_s)

    async def _listed(self) -> list[dict[str, Any]]:
        """The jobs at the provider that were sent from here."""

        async def pages() -> list[dict[str, Any]]:
            pager = await self._client.aio.batches.list(config={"page_size": 100})
            return [_values(job) async for job in pager]

        call = TeacherCall(PROVIDER, self._teacher.model, "label", "", "", "[]", {})
        found = await self._attempt(call, pages())
        return [job for job in found if str(job.get("displayName") or "").startswith(JOB_PREFIX)]

    async def _answers_of_earlier_jobs(self) -> dict[str, Mapping[str, Any]]:
        """Responses by the key of their call, from finished jobs that keep the keys with the answers."""
        call = TeacherCall(PROVIDER, self._teacher.model, "label", "", "", "[]", {})
        found: dict[str, Mapping[str, Any]] = {}
        for job in await self._listed():
            if job["state"] in JOB_DONE:
                full = _values(await self._attempt(call, self._client.aio.batches.get(name=job["name"])))
                for item in _items(full):
                    key = (item.get("metadata") or {}).get("key")
                    if key and item.get("response"):
                        found[key] = item["response"]
        return found


def _values(job: "types.BatchJob") -> dict[str, Any]:
    """A job as JSON values with Gemini's own names."""
    values = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    values["state"] = str(values.get("state") or "JOB_STATE_UNSPECIFIED")
    return values


def _items(job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return (job.get("dest") or {}).get("inlinedResponses") or []


def _job_name(keys: Sequence[str]) -> str:
    return JOB_PREFIX + hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()[:40]
