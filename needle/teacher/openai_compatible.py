"""A model behind OpenAI's chat completions protocol: vLLM, Ollama, llama.cpp, a gateway, OpenAI itself.

    python -m needle.generate teacher=openai_compatible teacher.provider=vllm teacher.model=Qwen/Qwen3-32B \
        teacher.base_url=http://localhost:8000/v1

Cost: what the server charges. Our own part is about 1.5 ms of one core a call.
Protocol: https://platform.openai.com/docs/api-reference/chat
"""

import asyncio
import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import openai
from pydantic import Field

from needle.errors import ConfigError
from needle.schema import Tool, canonical_json, strict_json
from needle.teacher.aliases import Aliases
from needle.teacher.base import FatalError, TeacherCall, TeacherReply, TokenLogProb, Traffic, TransientError, tools_json
from needle.teacher.prices import PriceTable
from needle.teacher.retry_after import until_s

OPENAI_URL = "https://api.openai.com/v1"
# https://platform.openai.com/docs/api-reference/chat/create, tools.function.name
LEGAL_NAME, NAME_LENGTH = re.compile(r"[a-zA-Z0-9_-]+"), 64
# What servers write around our text: the chat template, and how it explains the use of tools.
PROMPT_MARGIN_TOKENS = 1024
# A pool of connections looks through all of them twice a call: several small ones are faster than a large one.
POOL_CONNECTIONS = 25
SHOWN_CHARACTERS = 500  # of a server's own message
SHORTEST_SECRET = 8  # a shorter key (EMPTY, none) is no secret, and its letters may stand in an answer by chance
QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached", "credit_balance_exhausted"})
# Of openai's transport: raised before a byte of the request was sent.
NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})
# A gateway gave up waiting for a model that may have answered all the same: 504, and Cloudflare's 524.
GATEWAY_TIMEOUTS = frozenset({504, 524})
# Of JSON Schema, what OpenAI's strict mode takes: https://platform.openai.com/docs/guides/structured-outputs
# fmt: off
STRICT_KEYWORDS = frozenset({
    "type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref", "$defs",
    "title", "description", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minItems", "maxItems",
})
# fmt: on
THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*)\n\s*```\s*$", re.DOTALL)
HERMES = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class OpenAICompatibleTeacher:
    """Settings of the teacher; the fields are explained in conf/teacher/openai_compatible.yaml.

    Author answers under `json_schema` are sent with strict=true where the schema keeps OpenAI's rules for it (every
    object closed, every property required), else with strict=false. A schema is never rewritten to fit: optional
    properties would come back as null, and free-form objects, such as a call's arguments, would be lost. vLLM and
    llama.cpp hold answers to the schema either way.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"text", "samples", "top_k"})
    roles: ClassVar[frozenset[str]] = frozenset({"label", "author"})
    tokenizer: ClassVar[Literal["student", "own"]] = "own"

    provider: Annotated[str, Field(min_length=1)]
    base_url: str | None
    model: Annotated[str, Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    max_output_tokens: Annotated[int, Field(ge=1)]
    max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"]
    reasoning_effort: str | None
    top_logprobs: Annotated[int, Field(ge=0, le=20)]
    seed_samples: bool
    tool_choice: Literal["auto", "required", "none"]
    parallel_tool_calls: bool | None
    strict_json: Literal["json_schema", "json_object", "none"]
    text_calls: Literal["none", "hermes", "json"]
    key_variable: str | None
    traffic: Traffic
    prices: PriceTable

    def __post_init__(self) -> None:
        if self.base_url is not None:
            parts = urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"base_url={self.base_url}: give a URL such as http://localhost:8000/v1, or null")
            if parts.username or parts.password:
                raise ValueError("base_url holds a user or password; put it into an environment variable: key_variable")
        self.prices.of(self.model)

    def label_call(self, *, instruction: str, query: str, tools: Sequence[Tool], sample: int) -> TeacherCall:
        body = self._sampling()
        if self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if tools:
            body["tool_choice"] = self.tool_choice
            if self.parallel_tool_calls is not None:
                body["parallel_tool_calls"] = self.parallel_tool_calls
        shown = tools_json(tools)
        try:
            _wire_tools(shown)
        except ValueError as error:
            raise ConfigError(f"teacher.provider={self.provider}: {error}") from None
        settings = {"body": body, "seed_samples": self.seed_samples, "text_calls": self.text_calls}
        return TeacherCall(self.provider, self.model, "label", instruction, query, shown, settings, sample)

    def author_call(
        self, *, instruction: str, prompt: str, answer_schema: Mapping[str, Any], sample: int
    ) -> TeacherCall:
        body = self._sampling()
        if self.strict_json == "json_schema":
            form = {"name": "answer", "schema": dict(answer_schema), "strict": _fits_strict(answer_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        else:  # the model sees the schema nowhere else
            wanted = f"Answer with nothing but JSON of this JSON Schema:\n{canonical_json(answer_schema)}"
            instruction = f"{instruction}\n\n{wanted}" if instruction else wanted
        if self.strict_json == "json_object":
            body["response_format"] = {"type": "json_object"}
        settings = {"body": body, "seed_samples": self.seed_samples}
        return TeacherCall(self.provider, self.model, "author", instruction, prompt, "[]", settings, sample)

    def most_usd(self, call: TeacherCall) -> float:
        """Takes it that a token stands for at least one byte of what is sent, and that what the server adds stays
        within PROMPT_MARGIN_TOKENS."""
        price = self.prices.of(call.model)
        prompt_tokens = len(_request_json(call)) + PROMPT_MARGIN_TOKENS
        body = call.settings["body"]
        most = body.get("max_tokens") or body["max_completion_tokens"]
        return max(
            price.cost_usd(
                prompt_tokens=prompt_tokens, cached_tokens=cached, output_tokens=most, thinking_tokens=0, batch=False
            )
            for cached in (0, prompt_tokens)
        )

    def connect(self) -> "OpenAIConnection":
        return OpenAIConnection(self, _key(self.key_variable))

    def _sampling(self) -> dict[str, Any]:
        """The part of the request's body that both roles share; null settings are not sent."""
        body = {
            self.max_tokens_parameter: self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "reasoning_effort": self.reasoning_effort,
        }
        return {name: value for name, value in body.items() if value is not None}


class OpenAIConnection:
    """An open client. Replies and errors never hold the key: where a server repeats it, `[key]` stands instead."""

    def __init__(self, teacher: OpenAICompatibleTeacher, key: str | None):
        self._teacher, self._key = teacher, key
        traffic = teacher.traffic
        self._clients = [
            openai.AsyncOpenAI(
                api_key=key or "none",
                base_url=teacher.base_url or OPENAI_URL,
                timeout=traffic.timeout_s,
                max_retries=0,
            )
            for _ in range(math.ceil(traffic.concurrency / POOL_CONNECTIONS))
        ]
        if teacher.base_url is not None:  # OPENAI_ORG_ID and OPENAI_PROJECT_ID are no business of another server
            for client in self._clients:
                client.organization = client.project = None
        self._next_client = itertools.cycle(self._clients)

    async def ask(self, call: TeacherCall) -> TeacherReply:
        """Raises TransientError or FatalError, with nothing chained to it that could show the request's headers."""
        started_s = time.perf_counter()
        try:
            text = await self._post(_request_json(call))
        except openai.APIStatusError as error:
            problem: Exception = self._refused(error)
        except (openai.APIConnectionError, TimeoutError) as error:
            problem = self._unanswered(error)
        else:
            return self._reply(call, self._redacted(text), time.perf_counter() - started_s)
        raise problem

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def _post(self, content: bytes) -> str:
        """The body of a response of status 200. `chat.completions.create` would walk the request's types and build the
        response's, which costs twice as much as all the rest."""
        async with asyncio.timeout(self._teacher.traffic.timeout_s):  # the client's is for each read alone
            return await next(self._next_client).post(
                "/chat/completions",
                cast_to=str,
                content=content,
                options={"headers": {"Content-Type": "application/json"}, "security": {"bearer_auth": True}},
            )

    def _redacted(self, text: str) -> str:
        if self._key is None or len(self._key) < SHORTEST_SECRET:
            return text
        for written in {self._key, json.dumps(self._key)[1:-1], self._key.replace("/", "\\/")}:
            text = text.replace(written, "[key]")
        return text

    def _shown(self, text: str) -> str:
        text = " ".join(self._redacted(text).split())
        return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."

    def _unanswered(self, error: Exception) -> TransientError:
        where = self._teacher.base_url or OPENAI_URL
        if isinstance(error, TimeoutError | openai.APITimeoutError) and not _not_sent(error):
            limit = self._teacher.traffic.timeout_s
            return TransientError(f"{where}: no answer within traffic.timeout_s={limit}", billed=True)
        cause = self._shown(str(error.__cause__ or error)) or type(error.__cause__ or error).__name__
        if _not_sent(error):
            return TransientError(f"{where}: cannot connect ({cause}); is the server running, is base_url right?")
        return TransientError(f"{where}: the connection was cut ({cause})", billed=True)

    def _refused(self, error: openai.APIStatusError) -> TransientError | FatalError:
        status, teacher = error.status_code, self._teacher
        detail = error.body.get("message") if isinstance(error.body, Mapping) else None
        message = f"status {status}: {self._shown(str(detail or error.body or 'no message'))}"
        if status == 429 and QUOTA & {error.code, error.type}:
            return FatalError(f"{message} (the account has no credit left: add some)", every_call=True)
        if status in (408, 409, 425, 429) or status >= 500:
            wish_s = _retry_after_s(error.response.headers)
            return TransientError(message, retry_after_s=wish_s, billed=status in GATEWAY_TIMEOUTS)
        where, variable = teacher.base_url or OPENAI_URL, teacher.key_variable
        key = f"the key in teacher.key_variable={variable}" if variable else "a call without key (teacher.key_variable)"
        way_out = {
            401: f"{key} is not accepted",
            402: "the account has no credit left: add some",
            403: f"{key} may not use teacher.model={teacher.model}",
            404: f"check teacher.model={teacher.model} and teacher.base_url={where} (it often ends in /v1)",
            405: f"check teacher.base_url={where} (it often ends in /v1)",
        }
        if status < 400:
            way_out[status] = f"check teacher.base_url={where}: the server sends us elsewhere"
        if status in way_out:
            return FatalError(f"{message} ({way_out[status]})", every_call=True)
        return FatalError(message)

    def _reply(self, call: TeacherCall, text: str, latency_s: float) -> TeacherReply:
        try:
            raw = strict_json(text)
            choice = raw["choices"][0]
            message = choice["message"]
            content = message.get("content") or ""
            reason = choice.get("finish_reason") or ""
            log_probs = _log_probs(choice.get("logprobs"))
            tokens = _tokens(raw.get("usage") or {})
            if not isinstance(content, str):
                raise TypeError("content is not text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise TransientError(f"status 200, but no chat completion: {self._shown(text)}", billed=True) from None
        status, why, calls = _outcome(call, message, content, reason)
        if call.role == "author" and status == "ok":
            content = _bare(content)
        return TeacherReply(
            status=status,
            reason=why,
            text=content,
            calls=calls,
            log_probs=log_probs,
            model_version=str(raw.get("model") or ""),
            **tokens,
            cost_usd=self._teacher.prices.of(call.model).cost_usd(**tokens, batch=False),
            latency_s=latency_s,
            raw=raw,
        )


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"teacher.key_variable={variable}: this environment variable is not set; export it with your key, or give "
            "teacher.key_variable=null for a server that needs none"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"teacher.key_variable={variable}: no key has the spaces or characters that it holds; export it again"
        )
    return key


def _request_json(call: TeacherCall) -> bytes:
    """The request's body. It depends on the call alone, so that a stored call can be asked again."""
    messages = [{"role": "system", "content": call.instruction}] if call.instruction else []
    body = {"model": call.model, "messages": [*messages, {"role": "user", "content": call.prompt}]}
    body |= call.settings["body"]
    if call.settings["seed_samples"]:
        body["seed"] = call.sample
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    wire, _ = _wire_tools(call.tools)
    return (f'{{"tools":{wire},{text[1:]}' if wire else text).encode()


@lru_cache(maxsize=4096)
def _wire_tools(tools: str) -> tuple[str, Aliases]:
    """The protocol's tools as JSON, empty where there are none, and their names' aliases.

    Raises:
        ValueError: two tools have one name.
    """
    ours = json.loads(tools)
    aliases = Aliases((tool["name"] for tool in ours), legal=LEGAL_NAME, max_length=NAME_LENGTH)
    wire = [{"type": "function", "function": {**tool, "name": aliases.to_legal(tool["name"])}} for tool in ours]
    return (json.dumps(wire, ensure_ascii=False, separators=(",", ":")) if wire else ""), aliases


def _fits_strict(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "object" and all(map(_node_fits_strict, _nodes(schema)))


def _node_fits_strict(node: Mapping[str, Any]) -> bool:
    if not node.keys() <= STRICT_KEYWORDS:
        return False
    if "object" in (node.get("type"), *(node["type"] if isinstance(node.get("type"), list) else ())):
        closed = node.get("additionalProperties") is False
        return closed and set(node.get("required", ())) == set(node.get("properties", {}))
    return True


def _nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The schema and every schema in it, as far as STRICT_KEYWORDS lead."""
    if isinstance(schema, Mapping):
        yield schema
        inner = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values(), *schema.get("anyOf", ())]
        for child in (*inner, schema.get("items")):
            yield from _nodes(child)


def _outcome(
    call: TeacherCall, message: Mapping[str, Any], text: str, finish_reason: str
) -> tuple[str, str, tuple[Mapping[str, Any], ...] | None]:
    """Status, reason and calls of an answer."""
    if message.get("refusal"):
        return "blocked", f"refused: {message['refusal']}", None
    if finish_reason == "content_filter":
        return "blocked", "finish_reason content_filter", None
    if finish_reason == "length":
        return "truncated", "finish_reason length: the answer needs a higher max_output_tokens", None
    written = message.get("tool_calls") or []
    if not written and not text.strip():
        return "empty", f"neither text nor call; finish_reason {finish_reason or 'missing'}", None
    try:
        if call.role == "author":
            strict_json(_bare(text))
            return "ok", "", None
        _, aliases = _wire_tools(call.tools)
        found = _native_calls(written) if written else _text_calls(text, form=call.settings["text_calls"])
    except ValueError as error:
        return "malformed", str(error), None
    return "ok", "", tuple({**one, "name": aliases.to_original(one["name"])} for one in found)


def _native_calls(written: Any) -> list[dict[str, Any]]:
    """Raises ValueError for what cannot be read."""
    if not isinstance(written, list):
        raise ValueError("tool_calls is not a list")
    return [_call(one.get("function") if isinstance(one, Mapping) else one) for one in written]


def _text_calls(text: str, *, form: str) -> list[dict[str, Any]]:
    """The calls that stand in an answer's text; none where it is plain text.

    Raises:
        ValueError: it starts like calls and cannot be read as such.
    """
    text = THOUGHTS.sub("", text)
    if form == "hermes":
        blocks = HERMES.findall(text)
        if any(end == "" for _, end in blocks):
            raise ValueError("<tool_call> without an end")
        return [_call(strict_json(inner)) for inner, _ in blocks]
    if form == "json" and _bare(text).startswith(("{", "[")):
        value = strict_json(_bare(text))
        return [_call(one) for one in (value if isinstance(value, list) else [value])]
    return []


def _call(function: Any) -> dict[str, Any]:
    """A call as the protocol has it: arguments are JSON as text. Ollama once gave an object; models that write calls as
    text give one too, and those of Llama name it `parameters`; vLLM gives empty text where there is no argument."""
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"a call must be an object with a name, not {canonical_json(function)[:80]}")
    name = function["name"]
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = strict_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ValueError(f"call of {name!r}: its arguments are not JSON: {error}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"call of {name!r}: its arguments are {type(arguments).__name__}, not an object")
    return {"name": name, "arguments": arguments}


def _bare(text: str) -> str:
    """The text without thoughts before it and without a Markdown fence around it."""
    text = THOUGHTS.sub("", text).strip()
    fenced = FENCE.match(text)
    return fenced[1].strip() if fenced else text


def _log_probs(entry: Any) -> tuple[TokenLogProb, ...] | None:
    """None where there are none: not asked for, not offered, or, at OpenAI, the answer is a call."""
    content = (entry or {}).get("content")
    if content is None:
        return None
    return tuple(
        TokenLogProb(
            _bytes(token),
            float(token["logprob"]),
            tuple(
                sorted(
                    ((_bytes(other), float(other["logprob"])) for other in token.get("top_logprobs") or ()),
                    key=lambda pair: -pair[1],
                )
            ),
        )
        for token in content
    )


def _bytes(token: Mapping[str, Any]) -> bytes:
    """A token may be a part of a character: its text is then no more than a picture of its bytes."""
    given = token.get("bytes")
    return token["token"].encode() if given is None else bytes(given)


def _tokens(usage: Mapping[str, Any]) -> dict[str, int]:
    """Counts as a TeacherReply has them; servers that do not count give zeros."""
    prompt, output = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thinking = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    # OpenAI counts thinking within completion_tokens, xAI beside them; the total tells which.
    if usage.get("total_tokens") != prompt + output + thinking:
        output -= thinking
    return {
        "prompt_tokens": prompt,
        "cached_tokens": min(cached, prompt),
        "output_tokens": max(output, 0),
        "thinking_tokens": thinking,
    }


def _not_sent(error: Exception) -> bool:
    return type(error.__cause__).__name__ in NOT_SENT


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server wishes, from `retry-after-ms` (OpenAI) or `retry-after` (RFC 9110: seconds or a date)."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            wish_s = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        if math.isfinite(wish_s):
            return max(0.0, wish_s)
    return until_s(headers.get("retry-after", ""))
