"""The OpenAI-compatible teacher through the real client, against a local server in a process of its own."""

import asyncio
import dataclasses
import json
import math
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from needle import config
from needle.errors import ConfigError
from needle.schema import Tool, ToolCall, call_problems, canonical_json
from needle.teacher.aliases import Aliases
from needle.teacher.base import FatalError, TeacherCall, TeacherReply, TransientError
from needle.teacher.openai_compatible import LEGAL_NAME, NAME_LENGTH, OpenAICompatibleTeacher
from needle.teacher.prices import Price, PriceTable

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "tests" / "servers" / "openai_server.py"
CORPUS = ROOT / "data" / "teacher_corpus"
KEY, VARIABLE = "sk-canary-5f1c0d/7e2b", "NEEDLE_TEST_OPENAI_KEY"
PRICE = Price(input_usd=2.0, cached_usd=0.5, output_usd=8.0, batch_frac=0.5)
PRICES = PriceTable(dated="2026-11-26", source="made up", models={}, otherwise=PRICE)
WEATHER = Tool.from_dict(
    {
        "name": "weather.now",
        "description": "The weather of a place.",
        "parameters": {"properties": {"place": {"type": "string"}, "days": {"type": "integer"}}, "required": ["place"]},
    }
)
LIGHT = Tool.from_dict({"name": "set_light", "parameters": {"properties": {"on": {"type": "boolean"}}}})
STRICT = {
    "type": "object",
    "properties": {
        "query": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "level": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 3}, {"type": "null"}]},
    },
    "required": ["query", "tags", "level"],
    "additionalProperties": False,
}
OPEN = {"type": "object", "properties": {"query": {"type": "string"}, "arguments": {"type": "object"}}}


class LocalServer:
    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}/v1"
        self._root = self.url.removesuffix("/v1")

    def faults(self, *rules: Mapping[str, Any]) -> None:
        request = urllib.request.Request(f"{self._root}/faults", json.dumps(rules).encode())
        urllib.request.urlopen(request, timeout=30).close()

    def stats(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self._root}/stats", timeout=30) as response:
            return json.load(response)


@contextmanager
def started(*options: str) -> Iterator[LocalServer]:
    process = subprocess.Popen([sys.executable, str(SERVER), *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield LocalServer(json.loads(process.stdout.readline())["port"])
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[LocalServer]:
    with started() as server:
        yield server


@pytest.fixture
def server(shared_server: LocalServer) -> LocalServer:
    shared_server.faults()
    return shared_server


def built(*overrides: str) -> OpenAICompatibleTeacher:
    """As a stage builds it from conf/."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("generate", ["teacher=openai_compatible", *(f"teacher.{o}" for o in overrides)])
    own = OmegaConf.masked_copy(cfg, "teacher")
    config.check(own, stage)
    return config.build_settings(OmegaConf.to_container(own, resolve=True), stage)["teacher"]


def stage(*, teacher: OpenAICompatibleTeacher) -> None:
    """What `built` binds the configuration to."""


@cache
def shipped() -> OpenAICompatibleTeacher:
    return built("provider=local", "model=m", "base_url=null")


def teacher_of(url: str | None, *, timeout_s: float = 20.0, concurrency: int = 8, **changes) -> OpenAICompatibleTeacher:
    """The settings of conf/teacher, with prices and traffic of these tests."""
    traffic = dataclasses.replace(shipped().traffic, timeout_s=timeout_s, concurrency=concurrency)
    return dataclasses.replace(shipped(), **{"base_url": url, "traffic": traffic, "prices": PRICES, **changes})


def label(teacher: OpenAICompatibleTeacher, query: str, tools=(WEATHER, LIGHT), sample: int = 0) -> TeacherCall:
    return teacher.label_call(instruction="Call what the request needs.", query=query, tools=tools, sample=sample)


def author(teacher: OpenAICompatibleTeacher, prompt: str, schema: Mapping[str, Any] = STRICT) -> TeacherCall:
    return teacher.author_call(instruction="Write requests.", prompt=prompt, answer_schema=schema, sample=0)


def ask(teacher: OpenAICompatibleTeacher, *calls: TeacherCall) -> list[Any]:
    """Replies and raised errors in the order of the calls."""

    async def run() -> list[Any]:
        connection = teacher.connect()
        try:
            return await asyncio.gather(*map(connection.ask, calls), return_exceptions=True)
        finally:
            await connection.close()

    return asyncio.run(run())


def one(teacher: OpenAICompatibleTeacher, call: TeacherCall) -> TeacherReply:
    (reply,) = ask(teacher, call)
    assert isinstance(reply, TeacherReply), reply
    return reply


def failure(teacher: OpenAICompatibleTeacher, call: TeacherCall | None = None) -> Any:
    (error,) = ask(teacher, call or label(teacher, "is it raining in Kyoto"))
    assert isinstance(error, TransientError | FatalError), error
    return error


def calling(teacher: OpenAICompatibleTeacher, *, calls: int) -> TeacherCall:
    """A question that the server answers with so many calls."""
    questions = [label(teacher, f"weather in Kyoto and lights in room {i}") for i in range(60)]
    replies = ask(teacher, *questions)
    return next(q for q, reply in zip(questions, replies, strict=True) if len(reply.calls) == calls)


def test_label_answers_hold_valid_calls_of_our_names_in_order(server: LocalServer):
    teacher = teacher_of(server.url)
    replies = ask(teacher, *(label(teacher, f"weather in Kyoto, lights in room {i}") for i in range(40)))
    sizes = {len(reply.calls) for reply in replies}
    assert sizes == {0, 1, 2, 3}
    for reply in replies:
        assert (reply.status, reply.model_version) == ("ok", "m-2026-11-01")
        assert bool(reply.calls) != bool(reply.text)
        written = reply.raw["choices"][0]["message"].get("tool_calls", [])
        names = [one["function"]["name"].replace("weather_now", "weather.now") for one in written]
        assert [call["name"] for call in reply.calls] == names
        assert [call["arguments"] for call in reply.calls] == [json.loads(w["function"]["arguments"]) for w in written]
        for call in reply.calls:
            tools = {tool.name: tool for tool in (WEATHER, LIGHT)}
            assert call_problems(ToolCall.from_dict(call), tools) == []


def test_what_is_sent_is_what_the_settings_say(server: LocalServer):
    server.faults({"fault": "say_request"})
    plain = teacher_of(server.url, seed_samples=False)
    assert sent(plain, label(plain, "wie wärmt 京都")) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Call what the request needs."},
            {"role": "user", "content": "wie wärmt 京都"},
        ],
        "tools": [
            {"type": "function", "function": {**dataclasses.asdict(WEATHER), "name": "weather_now"}},
            {"type": "function", "function": dataclasses.asdict(LIGHT)},
        ],
        "max_tokens": 4096,
        "temperature": 0.0,
        "tool_choice": "auto",
    }
    full = teacher_of(
        server.url,
        temperature=None,
        top_p=0.9,
        max_tokens_parameter="max_completion_tokens",
        max_output_tokens=700,
        reasoning_effort="low",
        top_logprobs=3,
        tool_choice="required",
        parallel_tool_calls=False,
    )
    sampling = {"top_p": 0.9, "max_completion_tokens": 700, "reasoning_effort": "low", "seed": 5}
    of_labels = {**sampling, "logprobs": True, "top_logprobs": 3}
    of_tools = {"tool_choice": "required", "parallel_tool_calls": False}
    assert sent(full, label(full, "a", sample=5), without=("model", "messages", "tools")) == {**of_labels, **of_tools}
    assert sent(full, label(full, "a", tools=(), sample=5), without=("model", "messages")) == of_labels
    written = dataclasses.replace(author(full, "a"), sample=5)
    assert sent(full, written, without=("model", "messages", "response_format")) == sampling
    silent = plain.label_call(instruction="", query="a", tools=(), sample=0)
    assert sent(plain, silent)["messages"] == [{"role": "user", "content": "a"}]


def sent(teacher: OpenAICompatibleTeacher, call: TeacherCall, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The body that reached the server, which says it."""
    said = one(teacher, call).raw["choices"][0]["message"]["content"]
    return {key: value for key, value in json.loads(said)["body"].items() if key not in without}


def test_an_address_holds_what_the_answer_depends_on_and_no_url():
    local, other = teacher_of("http://localhost:1/v1"), teacher_of("http://localhost:2/v1")
    assert label(local, "a").key() == label(other, "a").key()
    changed = [{"provider": "vllm"}, {"model": "n"}, {"temperature": 0.5}, {"text_calls": "json"}, {"top_logprobs": 1}]
    keys = [label(teacher_of(None, **change), "a").key() for change in (*changed, {"seed_samples": False})]
    keys += [label(local, "a").key(), label(local, "b").key(), label(local, "a", sample=1).key()]
    keys += [label(local, "a", tools=(LIGHT,)).key(), author(local, "a").key(), author(local, "a", OPEN).key()]
    assert len(set(keys)) == len(keys)


def test_samples_differ_by_their_seed_alone(server: LocalServer):
    teacher, unseeded = teacher_of(server.url), teacher_of(server.url, seed_samples=False)
    seeded = [one(teacher, label(teacher, "rain in Kyoto", sample=i)).raw["id"] for i in range(4)]
    assert len(set(seeded)) == 4
    assert len({one(unseeded, label(unseeded, "rain in Kyoto", sample=i)).raw["id"] for i in range(4)}) == 1


def test_without_tools_none_are_sent_and_text_is_an_answer_without_calls(server: LocalServer):
    teacher = teacher_of(server.url)
    reply = one(teacher, label(teacher, "is it raining in Kyoto", tools=()))
    assert (reply.status, reply.calls) == ("ok", ())
    assert reply.text.startswith("I cannot is it raining")


@pytest.mark.parametrize("form", ["hermes", "json"])
def test_calls_that_stand_in_the_text_are_read_where_asked_for(server: LocalServer, form: str):
    native, reading = teacher_of(server.url), teacher_of(server.url, text_calls=form)
    questions = [label(native, f"rain in Kyoto on day {i}") for i in range(20)]
    expected = [reply.calls for reply in ask(native, *questions)]
    server.faults({"fault": form})
    unread = ask(native, *questions)
    assert all(reply.calls == () and reply.text for reply in unread)
    read = ask(reading, *(dataclasses.replace(q, settings=label(reading, "").settings) for q in questions))
    assert [reply.calls for reply in read] == expected
    assert any(expected)
    assert not all(expected)


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("hermes", '<think>x</think><tool_call>{"name": "a", "arguments": {}}</tool_call>', [{}]),
        ("hermes", "no call is needed", []),
        ("hermes", '<tool_call>{"name": "a"', None),
        ("hermes", "<tool_call>a()</tool_call>", None),
        ("json", '```json\n[{"name": "a", "parameters": {"x": 1}}, {"name": "b"}]\n```', [{"x": 1}, {}]),
        ("json", "[]", []),
        ("json", "It rains.", []),
        ("json", '{"name": "a", "arguments": [1]}', None),
        ("json", '{"arguments": {}}', None),
        ("json", '{"name": "a", "arguments": "{\\"x\\": NaN}"}', None),
    ],
)
def test_text_that_is_calls_or_not(server: LocalServer, form: str, text: str, calls: list | None):
    server.faults({"fault": "say", "message": {"role": "assistant", "content": text}})
    teacher = teacher_of(server.url, text_calls=form)
    reply = one(teacher, label(teacher, "a"))
    assert (reply.status, reply.text) == ("ok" if calls is not None else "malformed", text)
    assert (reply.calls if calls is None else [call["arguments"] for call in reply.calls or ()]) == calls


def test_arguments_given_as_an_object_are_taken(server: LocalServer):
    teacher = teacher_of(server.url)
    question = calling(teacher, calls=2)
    expected = one(teacher, question).calls
    server.faults({"fault": "objects"})
    assert one(teacher, question).calls == expected


@pytest.mark.parametrize(
    ("fault", "status", "why"),
    [
        ("malformed", "malformed", "arguments are not JSON"),
        ("length", "truncated", "max_output_tokens"),
        ("content_filter", "blocked", "content_filter"),
        ("refusal", "blocked", "I cannot help with that"),
        ("empty", "empty", "neither text nor call"),
    ],
)
def test_answers_that_cannot_be_used(server: LocalServer, fault: str, status: str, why: str):
    teacher = teacher_of(server.url)
    question = calling(teacher, calls=1)
    server.faults({"fault": fault})
    reply = one(teacher, question)
    assert (reply.status, reply.calls) == (status, None)
    assert why in reply.reason
    assert reply.raw["choices"]


def test_a_length_limit_of_ours_truncates(server: LocalServer):
    teacher = teacher_of(server.url, max_output_tokens=3)
    reply = one(teacher, label(teacher, "is it raining in Kyoto", tools=()))
    assert (reply.status, reply.output_tokens, reply.text) == ("truncated", 3, "I cannot")


@pytest.mark.parametrize("form", ["json_schema", "json_object", "none"])
def test_author_answers_are_json(server: LocalServer, form: str):
    teacher = teacher_of(server.url, strict_json=form)
    call = author(teacher, "about weather in Kyoto")
    if form == "none":
        assert "response_format" not in call.settings["body"]
        reply = one(teacher, call)  # the server writes a sentence
        assert (reply.status, reply.calls) == ("malformed", None)
        assert reply.text.startswith("I cannot about weather")
        return
    reply = one(teacher, call)
    assert (reply.status, reply.calls) == ("ok", None)
    if form == "json_schema":
        jsonschema.validate(json.loads(reply.text), STRICT)
    assert (canonical_json(STRICT) in call.instruction) == (form != "json_schema")


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        (STRICT, True),
        (OPEN, False),
        ({**STRICT, "required": ["query"]}, False),
        ({**STRICT, "properties": {**STRICT["properties"], "query": {"type": "string", "minLength": 2}}}, False),
        ({**STRICT, "properties": {**STRICT["properties"], "tags": {"type": "array", "items": OPEN}}}, False),
        ({"type": "array", "items": STRICT}, False),
    ],
)
def test_strict_is_asked_for_only_where_the_schema_allows_it(server: LocalServer, schema: dict, strict: bool):
    """The server refuses strict schemas as OpenAI does; the schema itself is sent as it is."""
    teacher = teacher_of(server.url)
    call = author(teacher, "weather in Kyoto", schema)
    form = call.settings["body"]["response_format"]["json_schema"]
    assert (form["strict"], form["schema"]) == (strict, schema)
    jsonschema.validate(json.loads(one(teacher, call).text), schema)


def test_thoughts_and_fences_are_no_part_of_an_author_answer(server: LocalServer):
    teacher = teacher_of(server.url)
    call = author(teacher, "weather in Kyoto")
    expected = one(teacher, call).text
    server.faults({"fault": "think"})
    reply = one(teacher, call)
    assert (reply.status, reply.text) == ("ok", expected)
    assert "<think>" in reply.raw["choices"][0]["message"]["content"]


names = st.lists(st.text(min_size=1, max_size=90), unique=True, max_size=12)
clashing = st.lists(st.text("a._-é ", min_size=1, max_size=3), unique=True, max_size=30)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(names | clashing, st.sampled_from([(LEGAL_NAME, NAME_LENGTH), (re.compile(r"[a-zA-Z_][a-zA-Z0-9_.]*"), 8)]))
def test_aliases_are_legal_one_to_one_and_lead_back(given_names: list[str], rule: tuple[re.Pattern, int]):
    legal, length = rule
    aliases = Aliases(given_names, legal=legal, max_length=length)
    found = [aliases.to_legal(name) for name in given_names]
    assert len(set(found)) == len(found)
    for name, alias in zip(given_names, found, strict=True):
        assert legal.fullmatch(alias)
        assert len(alias) <= length
        assert aliases.to_original(alias) == name
        if legal.fullmatch(name) and len(name) <= length:
            assert alias == name
    again = Aliases(given_names, legal=legal, max_length=length)
    assert [again.to_legal(name) for name in given_names] == found


def test_an_alias_gives_way_to_a_tool_that_has_its_name():
    aliases = Aliases(["a.b", "a b", "a_b"], legal=LEGAL_NAME, max_length=NAME_LENGTH)
    assert [aliases.to_legal(name) for name in ("a.b", "a b", "a_b")] == ["a_b_2", "a_b_3", "a_b"]
    assert aliases.to_original("made_up") == "made_up"


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two tools are named 'set_light'"):
        label(teacher_of(None), "a", tools=(LIGHT, WEATHER, LIGHT))


def test_every_tool_of_the_corpus_is_accepted(server: LocalServer):
    teacher = teacher_of(server.url, tool_choice="required")
    shown = [
        [Tool.from_dict(tool) for tool in json.loads(path.read_text())] for path in sorted(CORPUS.glob("*.tools.json"))
    ]
    replies = ask(teacher, *(label(teacher, "please do this for me now", tools=tools) for tools in shown))
    assert len(replies) == 72
    for tools, reply in zip(shown, replies, strict=True):
        assert isinstance(reply, TeacherReply), reply
        by_name = {tool.name: tool for tool in tools}
        assert reply.calls
        assert [call_problems(ToolCall.from_dict(call), by_name) for call in reply.calls] == [[]] * len(reply.calls)


def test_log_probabilities(server: LocalServer):
    teacher = teacher_of(server.url, top_logprobs=5)
    call = label(teacher, "Regnet es in Köln oder 京都", tools=())
    reply = one(teacher, call)
    assert reply.log_probs is not None
    assert b"".join(token.token for token in reply.log_probs) == reply.text.encode()
    assert any(len(token.token) == 1 and token.token[0] > 127 for token in reply.log_probs)
    for token in reply.log_probs:
        assert token.log_prob <= 0
        assert len(token.top) == 5
        assert (token.token, token.log_prob) in token.top
        falling = [log_prob for _, log_prob in token.top]
        assert falling == sorted(falling, reverse=True)
        assert sum(map(math.exp, falling)) < 1
    off = teacher_of(server.url)
    assert one(off, label(off, "Regnet es in Köln", tools=())).log_probs is None


def test_tokens_without_bytes_are_taken_by_their_text(server: LocalServer):
    teacher = teacher_of(server.url, top_logprobs=2)
    call = label(teacher, "rain in Kyoto", tools=())
    expected = one(teacher, call).log_probs
    server.faults({"fault": "null_bytes"})
    assert one(teacher, call).log_probs == expected


def test_cost_is_that_of_the_counts_and_below_the_bound(server: LocalServer):
    teacher = teacher_of(server.url, reasoning_effort="low", max_output_tokens=300, top_logprobs=1)
    calls = [label(teacher, f"天気 {i} über Köln ☂" * (1 + i % 9)) for i in range(30)]
    calls += [author(teacher, "\u0000\n\t" * 40), author(teacher, "weather", OPEN)]
    replies = ask(teacher, *calls)
    assert any(reply.cached_tokens and reply.thinking_tokens for reply in replies)
    for call, reply in zip(calls, replies, strict=True):
        usage = reply.raw["usage"]
        assert reply.prompt_tokens == usage["prompt_tokens"] > reply.cached_tokens >= 0
        assert reply.output_tokens + reply.thinking_tokens == usage["completion_tokens"]
        fresh = reply.prompt_tokens - reply.cached_tokens
        expected = (fresh * 2.0 + reply.cached_tokens * 0.5 + usage["completion_tokens"] * 8.0) / 1e6
        assert reply.cost_usd == pytest.approx(expected, rel=1e-12)
        assert 0 < reply.cost_usd <= teacher.most_usd(call)
        assert reply.latency_s > 0


def test_the_bound_holds_where_every_byte_is_a_token_and_every_token_is_used(server: LocalServer):
    teacher = teacher_of(server.url, max_output_tokens=5)
    for call in (label(teacher, "京都 " * 200), author(teacher, "ü" * 500)):
        form = canonical_json(call.settings["body"].get("response_format", ""))
        shown = len("".join((call.instruction, call.prompt, call.tools, form)).encode())
        template = 900
        server.faults({"fault": "none", "usage": {"prompt_tokens": shown + template, "completion_tokens": 5}})
        reply = one(teacher, call)
        assert reply.cost_usd == pytest.approx(((shown + template) * 2.0 + 5 * 8.0) / 1e6)
        assert reply.cost_usd <= teacher.most_usd(call) <= 2.5 * reply.cost_usd


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({}, (0, 0, 0, 0)),
        (None, (0, 0, 0, 0)),
        ({"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": None}, (9, 0, 5, 0)),
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14, "thinking": 3}, (9, 0, 2, 3)),  # OpenAI
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 17, "thinking": 3}, (9, 0, 5, 3)),  # xAI
    ],
)
def test_counts_of_servers_that_count_otherwise(server: LocalServer, usage: dict | None, counts: tuple[int, ...]):
    if usage and "thinking" in usage:
        usage = {**usage, "completion_tokens_details": {"reasoning_tokens": usage["thinking"]}}
    server.faults({"fault": "none", "usage": usage})
    teacher = teacher_of(server.url)
    reply = one(teacher, label(teacher, "a"))
    assert (reply.prompt_tokens, reply.cached_tokens, reply.output_tokens, reply.thinking_tokens) == counts


def test_no_usage_costs_nothing_that_we_know_of(server: LocalServer):
    server.faults({"fault": "no_usage"})
    teacher = teacher_of(server.url)
    reply = one(teacher, label(teacher, "rain"))
    assert (reply.prompt_tokens, reply.output_tokens, reply.cost_usd) == (0, 0, 0.0)


def test_a_model_without_a_price_is_refused():
    with pytest.raises(ConfigError, match=r"teacher\.model=m: no price"):
        teacher_of(None, prices=dataclasses.replace(PRICES, otherwise=None))


@pytest.mark.parametrize(
    ("headers", "low_s", "high_s"),
    [
        ({}, None, None),
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": "0.5"}, 0.5, 0.5),
        ({"retry-after-ms": "250", "Retry-After": "7"}, 0.25, 0.25),
        ({"Retry-After": "in an hour"}, None, None),
        ({"Retry-After": "nan"}, None, None),
        ({"Retry-After": format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)}, 3000, 3600),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0, 0),
    ],
)
def test_a_servers_own_wish_to_wait(server: LocalServer, headers: dict, low_s: float | None, high_s: float | None):
    server.faults({"fault": "status", "status": 429, "headers": headers})
    error = failure(teacher_of(server.url))
    assert isinstance(error, TransientError)
    wish_s = error.retry_after_s
    assert (wish_s is None) == (low_s is None)
    if wish_s is not None and low_s is not None and high_s is not None:
        assert low_s <= wish_s <= high_s


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_errors_that_pass(server: LocalServer, status: int):
    server.faults({"fault": "status", "status": status, "message": "come again"})
    error = failure(teacher_of(server.url))
    assert isinstance(error, TransientError)
    assert (str(error), error.billed) == (f"status {status}: come again", False)


@pytest.mark.parametrize("status", [504, 524])
def test_a_gateway_that_gave_up_may_have_charged(server: LocalServer, status: int):
    server.faults({"fault": "status", "status": status})
    error = failure(teacher_of(server.url))
    assert isinstance(error, TransientError)
    assert error.billed


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"fault": "cut"}, "the connection was cut"),
        ({"fault": "cut_midway"}, "the connection was cut"),
        ({"fault": "html"}, "no chat completion: <!DOCTYPE html>"),
        ({"fault": "half"}, "no chat completion"),
        ({"fault": "error_in_200"}, "upstream is busy"),
        ({"fault": "slow", "seconds": 30}, r"no answer within traffic\.timeout_s=0\.3"),
    ],
)
def test_attempts_that_may_have_been_charged(server: LocalServer, fault: dict, why: str):
    server.faults(fault)
    error = failure(teacher_of(server.url, timeout_s=0.3 if fault["fault"] == "slow" else 20.0))
    assert isinstance(error, TransientError)
    assert re.search(why, str(error))
    assert (error.billed, error.retry_after_s) == (True, None)


def test_a_server_that_is_not_there_charges_nothing():
    with started() as server:
        teacher = teacher_of(server.url)
    error = failure(teacher)
    assert isinstance(error, TransientError)
    assert not error.billed
    assert "is the server running" in str(error)


@pytest.mark.parametrize(
    ("status", "every_call", "way_out"),
    [
        (400, False, ""),
        (413, False, ""),
        (422, False, ""),
        (401, True, "a call without key (teacher.key_variable) is not accepted"),
        (402, True, "no credit"),
        (403, True, "may not use teacher.model=m"),
        (404, True, "teacher.model=m and teacher.base_url=http://127.0.0.1"),
    ],
)
def test_errors_that_stay(server: LocalServer, status: int, every_call: bool, way_out: str):
    server.faults({"fault": "status", "status": status, "message": "no such thing"})
    error = failure(teacher_of(server.url))
    assert isinstance(error, FatalError)
    assert str(error).startswith(f"status {status}: no such thing")
    assert (error.every_call, way_out in str(error)) == (every_call, True)


def test_an_empty_account_is_no_rate_limit(server: LocalServer):
    server.faults({"fault": "quota"})
    error = failure(teacher_of(server.url))
    assert isinstance(error, FatalError)
    assert error.every_call
    assert "no credit" in str(error)


def test_one_ask_is_one_attempt(server: LocalServer):
    before = server.stats()
    server.faults({"fault": "status", "status": 500, "attempts": 1})
    teacher = teacher_of(server.url)
    call = label(teacher, "asked twice")
    assert isinstance(failure(teacher, call), TransientError)
    assert one(teacher, call).attempts == 1
    assert server.stats()["received"] - before["received"] == 2


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch):
    """The server repeats the key in an error and in an answer; it must stand nowhere that we keep or show."""
    monkeypatch.setenv(VARIABLE, f"{KEY}\n")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-canary")
    with started("--key-required", KEY) as server:
        teacher = teacher_of(server.url, key_variable=VARIABLE)
        call = label(teacher, "rain in Kyoto", tools=())
        assert one(teacher, call).status == "ok"
        server.faults({"fault": "say_request"})
        reply = one(teacher, call)
        assert json.loads(reply.text)["headers"]["Authorization"] == "Bearer [key]"
        server.faults({"fault": "echo_key"})
        error = failure(teacher, call)
        assert isinstance(error, FatalError)
        assert "Incorrect API key provided: Bearer [key]" in str(error)
        assert error.__cause__ is error.__context__ is None
        shown = [repr(x) for x in (teacher, call, reply, error, error.args, teacher.connect())]
        assert not [text for text in (*shown, json.dumps(reply.raw)) if "canary" in text]


def test_another_key_is_refused_for_every_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "sk-other-canary")
    with started("--key-required", KEY) as server:
        error = failure(teacher_of(server.url, key_variable=VARIABLE))
    assert isinstance(error, FatalError)
    assert error.every_call
    assert f"teacher.key_variable={VARIABLE}" in str(error)
    assert "canary" not in str(error)


@pytest.mark.parametrize(("value", "why"), [(None, "is not set"), ("  ", "is not set"), ("sk-canary x", "no key has")])
def test_a_missing_key_is_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch, value: str | None, why: str):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    teacher = teacher_of(None, key_variable=VARIABLE)
    with pytest.raises(ConfigError, match=rf"teacher\.key_variable={VARIABLE}: .*{why}") as caught:
        teacher.connect()
    assert "canary" not in str(caught.value)


def test_no_other_key_or_account_reaches_a_server_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    """The client reads OPENAI_API_KEY and more by itself; a server without key must not get them."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "sk-canary")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://canary.example")
    with started() as server:
        server.faults({"fault": "say_request"})
        teacher = teacher_of(server.url)
        said = one(teacher, label(teacher, "rain", tools=())).text
    assert json.loads(said)["headers"]["Authorization"] == "Bearer none"
    assert "canary" not in said
    assert str(teacher_of(None).connect()._clients[0].base_url) == "https://api.openai.com/v1/"


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://localhost/v1", "http:///v1", "http://me:secret@host/v1"])
def test_a_url_that_cannot_be_asked_is_refused(url: str):
    with pytest.raises(ConfigError, match=r"teacher: base_url") as caught:
        built("provider=local", "model=m", f"base_url='{url}'")
    assert "secret" not in str(caught.value)


def test_settings_are_checked_and_what_must_be_given_is_asked_for():
    wrong = ("temperature=3", "top_logprobs=21", "max_tokens_parameter=tokens", "seed_samples=1", "strict_json=yaml")
    with pytest.raises(ConfigError) as caught:
        built("provider=local", "model=m", "base_url=null", *wrong)
    assert len(str(caught.value).splitlines()) == len(wrong)
    with pytest.raises(ConfigError) as caught:
        built()
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        "teacher.provider",
        "teacher.base_url",
        "teacher.model",
    ]


def test_as_many_calls_are_in_flight_as_are_asked_for():
    """The server holds every answer back until all of them have arrived."""
    with started() as server:
        server.faults({"fault": "none", "until_in_flight": 300})
        teacher = teacher_of(server.url, concurrency=300)
        replies = ask(teacher, *(label(teacher, f"light {i}") for i in range(300)))
        assert {getattr(reply, "status", reply) for reply in replies} == {"ok"}
        assert server.stats() == {
            "received": 300,
            "answered": 300,
            "unique": 300,
            "answered_twice": 0,
            "in_flight_max": 300,
        }
