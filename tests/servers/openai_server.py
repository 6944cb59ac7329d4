"""A local server that speaks OpenAI's chat completions protocol: what tests ask instead of a model.

    python tests/servers/openai_server.py --port 0 --latency-ms 100 [--key-required KEY]

prints `{"port": N}` and serves 127.0.0.1 until it is ended. The answer is a function of the request's body alone:
plausible calls of the tools shown with valid arguments, whose strings are words of the request; an instance of the
response format's schema; or a sentence. Token counts, log-probabilities and faults are functions of the body as well.

POST /v1/chat/completions   the protocol
GET  /stats                 received, answered, unique bodies, answered_twice (bodies), in_flight_max
POST /faults                a list of rules that replaces the last one and forgets the attempts counted so far, each
    {"fault": NAME, "frac": 0 to 1 of the bodies, "attempts": only the first so many of a body (absent: all),
     "containing": only bodies with this text, ...what the fault takes}. The first rule that fits is used.

Faults in place of an answer: status (status, headers, code, message), quota, html, half (a body cut in two), cut (no
answer), cut_midway, slow (seconds before an answer), error_in_200, echo_key (401 with the Authorization header in it).
Faults within an answer: malformed (arguments), length, content_filter, refusal, empty, no_usage, null_bytes, objects
(arguments as an object), hermes and json (calls as text), think (thoughts before the text), say (a given message and
usage), say_request (its headers and body as the answer's text). A rule of fault "none" answers as if there were none;
with "until_in_flight": N every answer waits until N calls were in flight at once.
Format: https://platform.openai.com/docs/api-reference/chat
"""

import argparse
import asyncio
import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import symbolic
from aiohttp import web

WORD = re.compile(r"\w+", re.UNICODE)
TOKEN = re.compile(r"\s*(?:[A-Za-z]{1,4}|\d{1,3}|[^\sA-Za-z\d])|\s+")
FORMATS = {
    "date": "2026-03-14",
    "time": "09:30:00Z",
    "date-time": "2026-03-14T09:30:00Z",
    "duration": "PT5M",
    "email": "ada@example.org",
    "hostname": "example.org",
    "ipv4": "192.0.2.7",
    "ipv6": "2001:db8::7",
    "uri": "https://example.org/a",
    "uuid": "7d444840-9dc0-4f2b-8f6e-3d2f1c9e1a10",
}
CALLS_WEIGHTS = (15, 60, 17, 8)  # of none, one, two and three calls


class Instances:
    """Draws instances of JSON Schemas; strings are made of `words`."""

    def __init__(self, rng: random.Random, words: Sequence[str]):
        self.rng, self.words = rng, list(words) or ["word"]

    def draw(self, schema: Any, root: Any = None, depth: int = 0) -> Any:
        root = schema if root is None else root
        if not isinstance(schema, Mapping):
            return self.rng.choice(self.words)
        if "$ref" in schema:
            return self.draw(_resolved(schema["$ref"], root), root, depth + 1)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self.rng.choice(schema["enum"])
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                return self.draw(self.rng.choice(schema[key]), root, depth + 1)
        if schema.get("allOf"):
            return self.draw(_merged([*schema["allOf"], schema], root), root, depth + 1)
        kind = schema.get("type") or ("object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = self.rng.choice([k for k in kind if k != "null"] or ["null"])
        return getattr(self, f"_{kind}")(schema, root, depth)

    def _null(self, *_: Any) -> None:
        return None

    def _boolean(self, *_: Any) -> bool:
        return self.rng.random() < 0.5

    def _integer(self, schema: Mapping, *_: Any) -> int:
        low, high = _bounds(schema, step=1)
        unit = schema.get("multipleOf", 1)
        return self.rng.randint(math.ceil(low / unit), math.floor(high / unit)) * unit

    def _number(self, schema: Mapping, *_: Any) -> float:
        low, high = _bounds(schema, step=0.5)
        unit = schema.get("multipleOf", 0.5)
        return self.rng.randint(math.ceil(low / unit), max(math.ceil(low / unit), math.floor(high / unit))) * unit

    def _string(self, schema: Mapping, *_: Any) -> str:
        if schema.get("format") in FORMATS:
            return FORMATS[schema["format"]]
        start = self.rng.randrange(len(self.words))
        text = " ".join(self.words[start : start + self.rng.randint(1, 3)])
        while len(text) < schema.get("minLength", 0):
            text += " " + self.rng.choice(self.words)
        return text[: schema.get("maxLength", len(text))]

    def _array(self, schema: Mapping, root: Any, depth: int) -> list:
        low = schema.get("minItems", 0 if depth > 8 else 1)
        size = self.rng.randint(low, max(low, min(schema.get("maxItems", low + 2), low + 2)))
        found: list = []
        for _ in range(20 * size):  # uniqueItems may refuse some
            item = self.draw(schema.get("items", {"type": "string"}), root, depth + 1)
            if len(found) < size and not (schema.get("uniqueItems") and item in found):
                found.append(item)
        return found

    def _object(self, schema: Mapping, root: Any, depth: int) -> dict:
        required = schema.get("required", ())
        return {
            key: self.draw(child, root, depth + 1)
            for key, child in schema.get("properties", {}).items()
            if key in required or (depth < 4 and self.rng.random() < 0.5)
        }


def _resolved(reference: str, root: Any) -> Any:
    for step in reference.removeprefix("#").strip("/").split("/"):
        root = root[step.replace("~1", "/").replace("~0", "~")] if step else root
    return root


def _merged(schemas: Sequence[Mapping], root: Any) -> dict:
    merged: dict = {"properties": {}, "required": []}
    for schema in schemas:
        schema = _resolved(schema["$ref"], root) if "$ref" in schema else schema
        merged |= {key: value for key, value in schema.items() if key not in ("allOf", "properties", "required")}
        merged["properties"] |= schema.get("properties", {})
        merged["required"] += schema.get("required", [])
    return merged


def _bounds(schema: Mapping, *, step: float) -> tuple[float, float]:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -step) + step if "exclusiveMinimum" in schema else None)
    high = schema.get("maximum", schema.get("exclusiveMaximum", 0) - step if "exclusiveMaximum" in schema else None)
    if low is None:
        low = 1 if high is None or high >= 1 else high - 10
    return low, low + 50 if high is None else high


class Answer:
    """The message to one body: its text or calls, and its tokens."""

    def __init__(self, body: Mapping[str, Any], digest: str):
        self.body, self.rng = body, random.Random(digest)
        self.asked = next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), "")
        self.instances = Instances(self.rng, WORD.findall(self.asked))
        self.text, self.calls = "", self._calls()
        if not self.calls:
            self.text = self._text()

    def _calls(self) -> list[dict[str, Any]]:
        tools, choice = self.body.get("tools") or [], self.body.get("tool_choice", "auto")
        if not tools or choice == "none":
            return []
        shown = [tool["function"] for tool in tools]
        if symbolic.is_request(self.asked, shown):
            return symbolic.label(self.asked, shown, self.rng)
        size = self.rng.choices(range(4), CALLS_WEIGHTS)[0]
        size = min(max(size, choice == "required"), 3 if self.body.get("parallel_tool_calls", True) else 1)
        chosen = [self.rng.choice(tools)["function"] for _ in range(size)]
        return [{"name": f["name"], "arguments": self.instances.draw(f.get("parameters", {}))} for f in chosen]

    def _text(self) -> str:
        if symbolic.is_authoring(self.asked):
            return symbolic.author(self.asked, self.rng)
        wanted = self.body.get("response_format") or {"type": "text"}
        if wanted["type"] == "json_schema":
            return json.dumps(self.instances.draw(wanted["json_schema"]["schema"]), ensure_ascii=False)
        if wanted["type"] == "json_object":
            return json.dumps({"answer": self.instances.draw({"type": "string"})}, ensure_ascii=False)
        return " ".join(["I", "cannot", *self.instances.words[: self.rng.randint(3, 12)]]) + "."

    def as_hermes(self) -> str:
        return "\n".join(f"<tool_call>\n{json.dumps(c, ensure_ascii=False)}\n</tool_call>" for c in self.calls)

    def tokens(self) -> list[bytes]:
        """What the model wrote; characters beyond ASCII are one token a byte, as byte-level tokenizers have them."""
        pieces = TOKEN.findall(self.text or self.as_hermes())
        return [t for p in pieces for t in ([p.encode()] if p.isascii() else [bytes([b]) for b in p.encode()])]


def log_probs(tokens: Sequence[bytes], *, top: int, null_bytes: bool, rng: random.Random) -> list[dict[str, Any]]:
    """The protocol's entries: the chosen token, and `top` alternatives, likeliest first, of mass below 1."""

    def entry(token: bytes, log_prob: float) -> dict[str, Any]:
        text = token.decode("utf-8", "backslashreplace")
        return {"token": text, "logprob": log_prob, "bytes": None if null_bytes else list(token)}

    found = []
    for token in tokens:
        probability = rng.uniform(0.6, 0.95)
        rest = [(1 - probability) * 0.5**k for k in range(1, top)]
        others = [entry(b" alt%d" % k, math.log(p)) for k, p in enumerate(rest)]
        chosen = entry(token, math.log(probability))
        found.append({**chosen, "top_logprobs": [chosen, *others] if top else []})
    return found


class Server:
    def __init__(self, *, latency_s: float, key: str | None):
        self.latency_s, self.key = latency_s, key
        self.rules: list[dict[str, Any]] = []
        self.attempts: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.received = self.in_flight = self.in_flight_max = 0
        self.seen: set[str] = set()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/stats", self.stats)
        app.router.add_post("/faults", self.set_faults)
        return app

    async def stats(self, _: web.Request) -> web.Response:
        twice = sum(1 for times in self.answers.values() if times > 1)
        counts = {"received": self.received, "answered": self.answers.total(), "unique": len(self.seen)}
        return web.json_response({**counts, "answered_twice": twice, "in_flight_max": self.in_flight_max})

    async def set_faults(self, request: web.Request) -> web.Response:
        self.rules = await request.json()
        self.attempts.clear()
        return web.json_response({"rules": len(self.rules)})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.received += 1
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            return await self._chat(request)
        finally:
            self.in_flight -= 1

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.seen.add(digest)
        self.attempts[digest] += 1
        authorization = request.headers.get("Authorization", "")
        if self.key is not None and authorization != f"Bearer {self.key}":
            return _error(401, f"Incorrect API key provided: {authorization[7:]}.", "invalid_api_key")
        try:
            body = json.loads(text)
            problem = _request_problem(body)
        except ValueError as error:
            problem = f"The body is not JSON: {error}"
        if problem:
            return _error(400, problem, "invalid_request")
        rule = self._rule(digest, text)
        await asyncio.sleep(self.latency_s + rule.get("seconds", 0))
        while self.in_flight_max < rule.get("until_in_flight", 0):
            await asyncio.sleep(0.01)
        refused = await _refused(request, rule, authorization)
        if refused is not None:
            return refused
        self.answers[digest] += 1
        return web.json_response(completion(text, digest, rule, request.headers))

    def _rule(self, digest: str, text: str) -> dict[str, Any]:
        """The first rule that fits. Which bodies a rule with frac takes depends on its place among the rules too."""
        for i, rule in enumerate(self.rules):
            share = int(hashlib.sha256(f"{i} {digest}".encode()).hexdigest()[:8], 16) / 2**32
            early = self.attempts[digest] <= rule.get("attempts", math.inf)
            if share < rule.get("frac", 1) and early and rule.get("containing", "") in text:
                return rule
        return {"fault": "none"}


def _request_problem(body: Any) -> str | None:
    """What OpenAI would refuse with 400."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or not body.get("messages"):
        return "you must provide a model and messages"
    for i, tool in enumerate(body.get("tools") or []):
        function = tool.get("function", {})
        if tool.get("type") != "function" or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", function.get("name", "")):
            return f"Invalid 'tools[{i}].function.name': string does not match pattern '^[a-zA-Z0-9_-]+$'."
        if function.get("parameters", {"type": "object"}).get("type") != "object":
            return f"Invalid schema for function {function['name']!r}: schema must be of type 'object'."
    if "tools" in body and not body["tools"]:
        return "Invalid 'tools': empty array."
    if not body.get("tools") and ("tool_choice" in body or "parallel_tool_calls" in body):
        return "'tool_choice' and 'parallel_tool_calls' are only allowed when 'tools' are specified."
    if body.get("top_logprobs") is not None and not (body.get("logprobs") and 0 <= body["top_logprobs"] <= 20):
        return "'top_logprobs' is 0 to 20 and needs 'logprobs'."
    if "max_tokens" in body and "max_completion_tokens" in body:
        return "'max_tokens' and 'max_completion_tokens' cannot both be set."
    return _format_problem(body.get("response_format") or {"type": "text"}, body["messages"])


def _format_problem(wanted: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str | None:
    if wanted["type"] == "json_object" and "json" not in json.dumps(messages).lower():
        return "'messages' must contain the word 'json' in some form to use 'response_format' of type 'json_object'."
    if wanted["type"] == "json_schema" and wanted["json_schema"].get("strict"):
        return _strict_problem(wanted["json_schema"]["schema"])
    return None


def _strict_problem(schema: Any) -> str | None:
    """The rules of strict mode: every object closed, every property required."""
    if isinstance(schema, list):
        return next(filter(None, map(_strict_problem, schema)), None)
    if not isinstance(schema, dict):
        return None
    if schema.get("type") == "object":
        if schema.get("additionalProperties") is not False:
            return "Invalid schema for response_format: 'additionalProperties' is required to be supplied and false."
        if set(schema.get("required", ())) != set(schema.get("properties", {})):
            return "Invalid schema for response_format: 'required' must include every key in properties."
    children = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values()]
    return _strict_problem([*children, schema.get("items"), schema.get("anyOf")])


def _error(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


async def _refused(request: web.Request, rule: Mapping[str, Any], authorization: str) -> web.StreamResponse | None:
    """The response of a fault that stands in place of an answer."""
    fault = rule["fault"]
    if fault == "status":
        status, message = rule["status"], rule.get("message", "fault asked for")
        return _error(status, message, rule.get("code", "fault"), rule.get("headers"))
    if fault == "quota":
        return _error(429, "You exceeded your current quota, check your plan.", "insufficient_quota")
    if fault == "echo_key":
        return _error(401, f"Incorrect API key provided: {authorization}", "invalid_api_key")
    if fault == "error_in_200":
        return web.json_response({"error": {"message": "upstream is busy", "code": 502}})
    if fault == "html":
        return web.Response(text="<!DOCTYPE html><title>Sign in</title>", content_type="text/html")
    if fault == "half":
        return web.Response(text='{"id": "chatcmpl-1", "choices": [{"mess', content_type="application/json")
    if fault in ("cut", "cut_midway"):
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        if fault == "cut_midway":
            await response.prepare(request)
            await response.write(b'{"id": "chatcmpl-1", ')
        assert request.transport is not None
        request.transport.abort() if fault == "cut" else request.transport.close()
        return response
    return None


def completion(text: str, digest: str, rule: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    """The protocol's chat.completion object to a body's text."""
    body = json.loads(text)
    answer, fault = Answer(body, digest), rule["fault"]
    message, reason = _message(answer, fault)
    if fault == "say":
        message, reason = rule["message"], "stop"
    if fault == "say_request":
        said = json.dumps({"headers": dict(headers), "body": body}, ensure_ascii=False)
        message, reason = {"role": "assistant", "content": said}, "stop"
    tokens = [] if fault in ("empty", "content_filter", "refusal") else answer.tokens()
    limit = body.get("max_completion_tokens", body.get("max_tokens", math.inf))
    thinking = answer.rng.randrange(200) if body.get("reasoning_effort") not in (None, "none") else 0
    thinking = int(min(thinking, limit))
    if len(tokens) + thinking > limit or fault == "length":
        tokens = tokens[: int(min(limit - thinking, max(0, len(tokens) - 1)))]
        cut = b"".join(tokens).decode("utf-8", "ignore") if not answer.calls else None
        message, reason = {"role": "assistant", "content": cut}, "length"
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    if body.get("logprobs"):
        top, blank = body.get("top_logprobs", 0), fault == "null_bytes"
        choice["logprobs"] = {"content": log_probs(tokens, top=top, null_bytes=blank, rng=answer.rng)}
    whole = {
        "id": f"chatcmpl-{digest[:16]}",
        "object": "chat.completion",
        "created": 1_780_000_000,
        "model": f"{body['model']}-2026-11-01",
        "system_fingerprint": "fp_local",
        "choices": [choice],
    }
    if fault == "no_usage":
        return whole
    return {**whole, "usage": rule.get("usage", _usage(text, answer, len(tokens), thinking))}


def _message(answer: Answer, fault: str) -> tuple[dict[str, Any], str]:
    """The message and its finish_reason."""
    if fault in ("empty", "content_filter"):
        return {"role": "assistant", "content": ""}, "stop" if fault == "empty" else fault
    if fault == "refusal":
        return {"role": "assistant", "content": None, "refusal": "I cannot help with that."}, "stop"
    if fault in ("hermes", "json") and answer.calls:
        text = answer.as_hermes() if fault == "hermes" else json.dumps(answer.calls, ensure_ascii=False)
        return {"role": "assistant", "content": text}, "stop"
    text = f"<think>\nLet me see.\n</think>\n\n{answer.text}" if fault == "think" else answer.text
    if not answer.calls:
        return {"role": "assistant", "content": text}, "stop"
    calls = []
    for i, call in enumerate(answer.calls):
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        written = {"malformed": arguments[:-1] + ", oops", "objects": call["arguments"]}.get(fault, arguments)
        calls.append({"id": f"call_{i}", "type": "function", "function": {"name": call["name"], "arguments": written}})
    return {"role": "assistant", "content": None, "tool_calls": calls}, "tool_calls"


def _usage(shown: str, answer: Answer, tokens: int, thinking: int) -> dict[str, Any]:
    """`shown`: the body, of which a token takes four bytes, and a chat template twenty tokens more."""
    prompt = len(shown.encode()) // 4 + 20
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens + thinking,
        "total_tokens": prompt + tokens + thinking,
        "prompt_tokens_details": {"cached_tokens": answer.rng.choice([0, prompt // 2])},
        "completion_tokens_details": {"reasoning_tokens": thinking},
    }


async def serve(port: int, server: Server) -> None:
    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
    await site.start()
    assert site._server is not None
    print(json.dumps({"port": site._server.sockets[0].getsockname()[1]}), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A local server that speaks OpenAI's chat completions protocol.")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--latency-ms", type=float, default=0)
    parser.add_argument("--key-required", help="refuse requests without this key")
    options = parser.parse_args()
    asyncio.run(serve(options.port, Server(latency_s=options.latency_ms / 1000, key=options.key_required)))


if __name__ == "__main__":
    main()
