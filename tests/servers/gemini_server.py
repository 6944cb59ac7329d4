"""A server on this machine that speaks Gemini's REST protocol, for tests and benchmarks.

    python tests/servers/gemini_server.py --port 0 --latency-ms 100

The first line on standard output is `{"port": N}`; SIGTERM or SIGINT ends it. An answer depends on the content of its
request alone, so two runs can be compared byte for byte: calls of declared functions with arguments valid for their
schemas and words of the request, or JSON valid for the wanted schema; what symbolic.py writes and reads is answered by
it. Beside Gemini's own paths (generateContent,
batchGenerateContent, batches) it has GET /stats, POST /reset (`{"jobs": true}` forgets the batch jobs too) and POST
/faults.

Faults: `{"seed": 0, "rules": [{"fault": "rate_limit", "probability": 0.1, "match": "text", "attempts": 2, ...}]}`.
A rule applies to a request that holds `match`, up to its `attempts`-th attempt, with `probability`; the first that
applies is taken. The n-th attempt of the same content always fares the same. What each fault does: `FAULTS`.
"""

import argparse
import asyncio
import hashlib
import json
import math
import random
import re
import signal
import sys
from dataclasses import dataclass, field
from typing import Any

import symbolic
from aiohttp import web

# Told after the answer was made and counted: the work was done and would be paid for.
FAULTS = {
    "rate_limit": "429; retry_after: text of the Retry-After header; retry_info: text of RetryInfo.retryDelay",
    "daily_quota": "429 that names a quota of the day",
    "error": "status (default 500) with Google's error body; message; reason: of an ErrorInfo; rpc_status",
    "echo_key": "400 whose message holds the key that came",
    "page": "status (default 502) with an HTML page",
    "slow": "latency_s more before an ordinary answer",
    "cut_before": "the connection is cut, nothing was done",
    "cut_after": "the connection is cut after the answer was made",
    "not_json": "200 with a body that is cut in the middle",
    "blocked_prompt": "promptFeedback with a block reason",
    "finish": "reason: the candidate ends with it, without content",
    "no_candidates": "200 without candidates",
    "no_parts": "a candidate without parts",
    "text_only": "an ordinary answer in words, without a call",
    "float_integers": "integers in arguments come as 3.0",
    "unknown_function": "a call of a function that was not declared",
    "job_failed": "the batch job that holds the request fails whole",
}
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
WORDS = WORD.findall(
    "amber anchor basket bridge candle canyon cedar circle copper desert dragon early ember falcon forest garden "
    "harbor hollow island ivory jacket kettle lantern lemon marble meadow mirror morning needle ocean orchard paper "
    "pepper planet quiet ribbon river saddle silver summer temple thunder timber tunnel velvet violet walnut window "
    "winter yellow"
)
TOKEN = re.compile(r"\s?\w+|[^\w\s]|\s+")
RPC = {400: (3, "INVALID_ARGUMENT"), 401: (16, "UNAUTHENTICATED"), 403: (7, "PERMISSION_DENIED"), 404: (5, "NOT_FOUND")}
RPC |= {408: (4, "DEADLINE_EXCEEDED"), 429: (8, "RESOURCE_EXHAUSTED"), 500: (13, "INTERNAL"), 503: (14, "UNAVAILABLE")}
ACTION = re.compile(r"/v1beta/models/([^/:]+):(generateContent|batchGenerateContent)")
BATCHES = re.compile(r"/v1beta/batches(?:/([^/:]+))?")
SHUTDOWN_S = 0.5  # that requests under way are waited for
JSON = {"Content-Type": "application/json; charset=UTF-8"}


@dataclass
class Stats:
    """Counts of requests for content, those within batch jobs included. An answer counts when it was made."""

    received: int = 0
    answered: int = 0
    in_flight_max: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    jobs: int = 0
    attempts: dict[bytes, int] = field(default_factory=dict)  # by content
    answers: dict[bytes, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        plain = ("received", "answered", "in_flight_max", "prompt_tokens", "output_tokens", "jobs", "faults")
        return {
            **{key: getattr(self, key) for key in plain},
            "unique": len(self.attempts),
            "unique_answered": len(self.answers),
            "answered_more_than_once": sum(count > 1 for count in self.answers.values()),
        }


@dataclass
class Job:
    name: str
    display_name: str
    model: str
    items: list[dict[str, Any]]
    done_at: float
    failed: bool

    def to_operation(self, now: float, *, whole: bool) -> dict[str, Any]:
        done = now >= self.done_at
        state = ("BATCH_STATE_FAILED" if self.failed else "BATCH_STATE_SUCCEEDED") if done else "BATCH_STATE_RUNNING"
        metadata: dict[str, Any] = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "name": self.name,
            "displayName": self.display_name,
            "model": f"models/{self.model}",
            "createTime": "2026-01-01T00:00:00Z",
            "state": state,
        }
        if done and whole and not self.failed:
            metadata["output"] = {"inlinedResponses": {"inlinedResponses": self.items}}
        return {"name": self.name, "metadata": metadata, "done": done}


class GeminiServer:
    def __init__(self, *, latency_s: float, batch_s: float, key: str | None):
        self.latency_s, self.batch_s, self.key = latency_s, batch_s, key
        self.stats, self.jobs = Stats(), []
        self.rules: list[dict[str, Any]] = []
        self.seed = 0
        self.in_flight = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if not path.startswith("/v1"):
            return await self._own(request)
        refusal = self._refused_key(request.headers.get("x-goog-api-key"))
        if refusal is not None:
            return refusal
        action = ACTION.fullmatch(path)
        if action is None:
            return self._batches(path, request)
        model, method = action.groups()
        if not model.startswith("gemini-"):
            words = f"models/{model} is not found for API version v1beta, or is not supported for {method}."
            return error_response(404, words)
        body = await request.read()
        if method == "batchGenerateContent":
            return self._new_job(model, json.loads(body))
        self.in_flight += 1
        self.stats.in_flight_max = max(self.stats.in_flight_max, self.in_flight)
        try:
            return await self._generate(request, model, body)
        finally:
            self.in_flight -= 1

    def _refused_key(self, key: str | None) -> web.Response | None:
        if not key:
            words = "Method doesn't allow unregistered callers (callers without established identity)."
            return error_response(403, words)
        if self.key is not None and key != self.key:
            return error_response(400, "API key not valid. Please pass a valid API key.", reason="API_KEY_INVALID")
        return None

    async def _own(self, request: web.BaseRequest) -> web.Response:
        if request.path == "/stats":
            return web.json_response(self.stats.to_dict())
        if request.path == "/reset":
            self.stats = Stats()
            if (await request.json()).get("jobs"):
                self.jobs = []
            return web.json_response({})
        if request.path == "/faults":
            plan = await request.json()
            unknown = [rule["fault"] for rule in plan["rules"] if rule["fault"] not in FAULTS]
            if unknown:
                return web.json_response({"unknown": unknown, "known": FAULTS}, status=400)
            self.seed, self.rules = plan.get("seed", 0), plan["rules"]
            return web.json_response({})
        return web.Response(status=404)

    async def _generate(self, request: web.BaseRequest, model: str, raw: bytes) -> web.StreamResponse:
        try:
            body = json.loads(raw)
        except ValueError:
            return error_response(400, "Invalid JSON payload received.")
        digest = content_digest(body)
        rule = self._rule(digest, raw)
        fault = rule["fault"] if rule else ""
        wait_s = self.latency_s + (rule["latency_s"] if rule and fault == "slow" else 0)
        if wait_s:
            await asyncio.sleep(wait_s)
        if fault == "cut_before":
            return cut(request)
        refusal = refused(rule, request.headers["x-goog-api-key"]) if rule else None
        if refusal is not None:
            return refusal
        text = json.dumps(self._answer(model, body, digest, rule))
        if fault == "cut_after":
            return cut(request)
        return web.Response(text=text[: len(text) // 2] if fault == "not_json" else text, headers=JSON)

    def _rule(self, digest: bytes, raw: bytes) -> dict[str, Any] | None:
        """Counts an attempt, and says which fault befalls it."""
        self.stats.received += 1
        attempt = self.stats.attempts[digest] = self.stats.attempts.get(digest, 0) + 1
        for i, rule in enumerate(self.rules):
            if attempt > rule.get("attempts", attempt) or rule.get("match", "").encode() not in raw:
                continue
            if rule.get("probability", 1) < 1:
                drawn = hashlib.blake2b(digest + f"{self.seed} {i} {attempt}".encode(), digest_size=8).digest()
                if int.from_bytes(drawn, "big") / 2**64 >= rule["probability"]:
                    continue
            self.stats.faults[rule["fault"]] = self.stats.faults.get(rule["fault"], 0) + 1
            return rule
        return None

    def _answer(self, model: str, body: dict[str, Any], digest: bytes, rule: dict[str, Any] | None) -> dict[str, Any]:
        answer = Answer(model, body, digest, rule or {}).to_dict()
        usage, stats = answer["usageMetadata"], self.stats
        stats.answered += 1
        stats.answers[digest] = stats.answers.get(digest, 0) + 1
        stats.prompt_tokens += usage["promptTokenCount"]
        stats.output_tokens += usage.get("candidatesTokenCount", 0) + usage.get("thoughtsTokenCount", 0)
        return answer

    def _new_job(self, model: str, body: dict[str, Any]) -> web.Response:
        batch = body["batch"]
        items, failed = [], False
        for entry in batch["inputConfig"]["requests"]["requests"]:
            request = entry["request"]
            digest = content_digest(request)
            rule = self._rule(digest, json.dumps(request, ensure_ascii=False).encode())
            failed |= rule is not None and rule["fault"] == "job_failed"
            error = refused(rule, "") if rule else None
            if error is not None:
                told = json.loads(error.text or "{}")["error"]
                item = {"error": {"code": RPC[error.status][0], "message": told["message"]}}
            else:
                item = {"response": self._answer(model, request, digest, rule)}
            items.append({"metadata": entry.get("metadata", {}), **item})
        self.stats.jobs += 1
        now = asyncio.get_running_loop().time()
        job = Job(f"batches/{len(self.jobs) + 1:08d}", batch["displayName"], model, items, now + self.batch_s, failed)
        self.jobs.append(job)
        return web.json_response(job.to_operation(now, whole=True))

    def _batches(self, path: str, request: web.BaseRequest) -> web.Response:
        found = BATCHES.fullmatch(path)
        now = asyncio.get_running_loop().time()
        if found is None:
            return error_response(404, f"{path} is not a method")
        if found[1]:
            job = next((job for job in self.jobs if job.name == f"batches/{found[1]}"), None)
            if job is None:
                return error_response(404, f"batches/{found[1]} is not found")
            return web.json_response(job.to_operation(now, whole=True))
        start, size = int(request.query.get("pageToken", 0)), int(request.query.get("pageSize", 50))
        page = [job.to_operation(now, whole=False) for job in self.jobs[start : start + size]]
        more = {"nextPageToken": str(start + size)} if start + size < len(self.jobs) else {}
        return web.json_response({"operations": page, **more})


class Answer:
    """What the model would say to one request."""

    def __init__(self, model: str, body: dict[str, Any], digest: bytes, rule: dict[str, Any]):
        self.model, self.body, self.rule = model, body, rule
        self.rng = random.Random(digest)
        self.generation = body.get("generationConfig", {})
        self.prompt = body["contents"][-1]["parts"][-1]["text"]
        self.words = WORD.findall(self.prompt) or WORDS
        self.numbers = [int(word) for word in self.words if word.isdecimal() and len(word) < 10]

    def to_dict(self) -> dict[str, Any]:
        fault = self.rule.get("fault")
        usage = {"promptTokenCount": len(json.dumps({**self.body, "model": ""})) // 4 + 1}
        if "systemInstruction" in self.body and self.rng.random() < 0.5:
            usage["cachedContentTokenCount"] = len(self.body["systemInstruction"]["parts"][0]["text"]) // 4
        answer: dict[str, Any] = {"usageMetadata": usage, "modelVersion": f"{self.model}-test"}
        if fault == "blocked_prompt":
            return {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, **answer}
        if fault == "no_candidates":
            return answer
        parts = [] if fault in ("no_parts", "finish") else self.parts()
        finish = self.rule["reason"] if fault == "finish" else "STOP"
        tokens = TOKEN.findall(" ".join(part.get("text") or json.dumps(part["functionCall"]) for part in parts))
        thoughts = 0 if self.generation.get("thinkingConfig", {}).get("thinkingBudget") == 0 else self.rng.randrange(40)
        room = self.generation.get("maxOutputTokens", 65536)
        if thoughts + len(tokens) > room:
            thoughts, finish = min(thoughts, room), "MAX_TOKENS"
            tokens = tokens[: room - thoughts]
            parts = [{"text": "".join(tokens)}] if tokens and "text" in parts[0] else []
        usage["candidatesTokenCount"] = len(tokens)
        if thoughts:
            usage["thoughtsTokenCount"] = thoughts
        candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "finishReason": finish, "index": 0}
        if self.generation.get("responseLogprobs"):
            candidate["logprobsResult"] = self.log_probs(tokens)
        return {"candidates": [candidate], **answer}

    def parts(self) -> list[dict[str, Any]]:
        schema = self.generation.get("responseJsonSchema")
        if schema is not None and symbolic.is_authoring(self.prompt):
            return [{"text": symbolic.author(self.prompt, self.rng)}]
        if schema is not None:
            return [{"text": json.dumps(self.instance(schema, invent=True), ensure_ascii=False)}]
        functions = [f for tool in self.body.get("tools", ()) for f in tool["functionDeclarations"]]
        if not functions or self.rule.get("fault") == "text_only":
            return [{"text": f"I would say: {self.span(8)}."}]
        shown = [{**f, "parameters": f.get("parametersJsonSchema") or f.get("parameters") or {}} for f in functions]
        if symbolic.is_request(self.prompt, shown):
            heard = symbolic.label(self.prompt, shown, self.rng)
            calls = [{"functionCall": {"name": call["name"], "args": call["arguments"]}} for call in heard]
            return calls or [{"text": "No tool serves that."}]
        asked = {word.lower() for word in self.words}
        functions = sorted(
            functions, key=lambda f: -len(asked.intersection(WORD.findall(f["name"].lower().replace("_", " "))))
        )
        count = 2 if "and" in asked else 1
        return [{"functionCall": self.call(functions[i % len(functions)])} for i in range(count)]

    def call(self, function: dict[str, Any]) -> dict[str, Any]:
        if self.rule.get("fault") == "unknown_function":
            return {"name": "no_such_function", "args": {}}
        schema = function.get("parametersJsonSchema") or function.get("parameters")
        arguments = self.instance(schema, invent=False) if schema else {}
        return {"name": function["name"], "args": arguments}

    def instance(self, schema: Any, *, invent: bool) -> Any:
        """A value that a schema in Gemini's keywords allows; its texts are words of the request, or invented."""
        rng = self.rng
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "anyOf" in schema:
            return self.instance(rng.choice(schema["anyOf"]), invent=invent)
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if kind == "object":
            required = schema.get("required", ())
            return {
                name: self.instance(child, invent=invent)
                for name, child in schema.get("properties", {}).items()
                if name in required or rng.random() < 0.5
            }
        if kind == "array":
            prefix = schema.get("prefixItems", [])
            least = schema.get("minItems", 0)
            count = rng.randint(least, min(schema.get("maxItems", least + 3), least + 3))
            children = [*prefix, *[schema.get("items", {})] * count][:count]
            return [self.instance(child, invent=invent) for child in children]
        if kind in ("integer", "number"):
            return self.number(schema, kind)
        if kind == "string":
            if schema.get("format") == "date-time":
                return f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}T{rng.randint(0, 23):02}:00:00Z"
            return " ".join(rng.choices(WORDS, k=rng.randint(3, 8))) if invent else self.span(rng.randint(1, 3))
        return rng.random() < 0.5 if kind == "boolean" else None

    def number(self, schema: Any, kind: str) -> int | float:
        low = schema.get("minimum", min(0, schema.get("maximum", 0)))
        high = schema.get("maximum", max(low + 100, 100))
        fitting = [n for n in self.numbers if low <= n <= high]
        value = self.rng.choice(fitting) if fitting else self.rng.randint(-int(-low // 1), int(high // 1))
        return float(value) if kind == "integer" and self.rule.get("fault") == "float_integers" else value

    def span(self, count: int) -> str:
        """`count` words of the request that stand together."""
        start = self.rng.randrange(max(1, len(self.words) - count + 1))
        return " ".join(self.words[start : start + count])

    def log_probs(self, tokens: list[str]) -> dict[str, Any]:
        """Of every token its own probability, and the likeliest alternatives; characters outside ASCII are told byte
        by byte, as a tokenizer does that does not know them."""
        count = self.generation.get("logprobs", 0)
        chosen, top, total = [], [], 0.0
        told = [
            t for token in tokens for t in ([token] if token.isascii() else [f"<0x{b:02X}>" for b in token.encode()])
        ]
        for token in told:
            log_prob = -round(self.rng.random() / 2, 4)
            total += log_prob
            chosen.append({"token": token, "tokenId": len(token), "logProbability": log_prob})
            # Each alternative has half of what is left; all that are told have less than 1 together.
            rest = math.log(max(1e-6, 1 - math.exp(log_prob)))
            others = [
                {"token": f"alt{i}", "tokenId": i, "logProbability": rest - (i + 1) * math.log(2)}
                for i in range(count - 1)
            ]
            top.append({"candidates": [chosen[-1], *others]} if count else {})
        return {"topCandidates": top, "chosenCandidates": chosen, "logProbabilitySum": total}


def content_digest(body: dict[str, Any]) -> bytes:
    """Equal for a request alone and in a batch job."""
    content = {key: value for key, value in body.items() if key != "model"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def refused(rule: dict[str, Any], key: str) -> web.Response | None:
    """The error that a rule asks for, if it is one."""
    fault = rule["fault"]
    if fault == "rate_limit":
        headers = {"Retry-After": rule["retry_after"]} if "retry_after" in rule else {}
        details = []
        if "retry_info" in rule:
            details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": rule["retry_info"]})
        return error_response(429, "Resource has been exhausted (e.g. check quota).", headers=headers, details=details)
    if fault == "daily_quota":
        violation = {
            "quotaMetric": "generativelanguage.googleapis.com/generate_content_free_tier_requests",
            "quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier",
            "quotaValue": "20",
        }
        details = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]}]
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "30s"})
        return error_response(429, "You exceeded your current quota, please check your plan.", details=details)
    if fault == "error":
        words = rule.get("message", "An internal error has occurred.")
        told = {"reason": rule.get("reason"), "rpc_status": rule.get("rpc_status")}
        return error_response(rule.get("status", 500), words, **told)
    if fault == "echo_key":
        return error_response(400, f"Bad request of {key}")
    if fault == "page":
        return web.Response(status=rule.get("status", 502), text="<html>Bad Gateway</html>", content_type="text/html")
    return None


def error_response(
    status: int,
    message: str,
    *,
    reason: str | None = None,
    rpc_status: str | None = None,
    headers: dict[str, str] | None = None,
    details: list[dict[str, Any]] | None = None,
) -> web.Response:
    details = list(details or [])
    if reason:
        info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": "googleapis.com"}
        details.append(info)
    name = rpc_status or RPC.get(status, (2, "UNKNOWN"))[1]
    error = {"code": status, "message": message, "status": name} | ({"details": details} if details else {})
    return web.json_response({"error": error}, status=status, headers=headers)


def cut(request: web.BaseRequest) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def serve(arguments: argparse.Namespace) -> None:
    server = GeminiServer(
        latency_s=arguments.latency_ms / 1000, batch_s=arguments.batch_ms / 1000, key=arguments.key or None
    )
    # Without a router and an access log: this machine's time is the tested program's.
    runner = web.ServerRunner(web.Server(server.handle, access_log=None), shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", arguments.port, backlog=4096)
    await site.start()
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--latency-ms", type=float, default=0, help="before every answer")
    parser.add_argument("--batch-ms", type=float, default=0, help="until a batch job is done")
    parser.add_argument("--key", default="", help="the only key that is valid; left out: every one is")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
