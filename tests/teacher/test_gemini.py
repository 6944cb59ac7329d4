"""The Gemini teacher through the real client, against a local server in a process of its own."""

import asyncio
import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
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

from needle import config
from needle.errors import ConfigError
from needle.schema import Tool, ToolCall, call_problems, canonical_json
from needle.teacher.base import FatalError, TeacherCall, TeacherReply, TokenLogProb, TransientError
from needle.teacher.gemini import GeminiTeacher, request_body
from needle.teacher.gemini_schema import SUPPORTED, answer_schema, declare
from needle.teacher.prices import Price, PriceTable

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "data" / "teacher_corpus"
KEY, VARIABLE = "canary-5f1c0d7e2b", "NEEDLE_TEST_GEMINI_KEY"
PRICE = Price(input_usd=2.0, cached_usd=0.5, output_usd=8.0, batch_frac=0.5)
PRICES = PriceTable(dated="2026-11-26", source="made up", models={}, otherwise=PRICE)
PATIENCE_S = 30.0
WEATHER = Tool.from_dict(
    {
        "name": "weather.now",
        "description": "The weather of a place.",
        "parameters": {"properties": {"place": {"type": "string"}, "days": {"type": "integer"}}, "required": ["place"]},
    }
)
LIGHT = Tool.from_dict(
    {
        "name": "Licht schalten!",
        "parameters": {"properties": {"wie hell": {"type": "integer", "minimum": 7}}, "required": ["wie hell"]},
    }
)
ANSWERS = {
    "type": "object",
    "properties": {
        "query": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        "level": {"type": ["integer", "null"], "exclusiveMinimum": 0, "maximum": 3},
    },
    "required": ["query", "tags", "level"],
    "additionalProperties": False,
}


def servers_module() -> Any:
    spec = importlib.util.spec_from_file_location("running_servers", ROOT / "tests" / "servers" / "running.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Any]:
    with servers_module().running("gemini_server.py", "--key", KEY, "--batch-ms", "100") as server:
        yield server


@pytest.fixture
def server(shared_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without faults, and as if it had never been asked."""
    monkeypatch.setenv(VARIABLE, KEY)
    shared_server.faults()
    shared_server.reset(jobs=True)
    return shared_server


@cache
def configured() -> GeminiTeacher:
    """As conf/teacher/gemini.yaml has it."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config.build(compose("teacher/gemini").teacher)


def teacher_at(server: Any, **changes: Any) -> GeminiTeacher:
    traffic = dataclasses.replace(configured().traffic, timeout_s=changes.pop("timeout_s", PATIENCE_S))
    plain = {"model": "gemini-test", "prices": PRICES, "key_variable": VARIABLE, "traffic": traffic}
    batch = {"batch_settle_s": 0.05, "batch_poll_s": 0.02}
    return dataclasses.replace(configured(), **{**plain, **batch, "base_url": server.url, **changes})


def label(
    teacher: GeminiTeacher, query: str = "weather in Oslo and Rome", tools: Any = (WEATHER, LIGHT)
) -> TeacherCall:
    return teacher.label_call(instruction="Answer with calls.", query=query, tools=tools, sample=0)


def author(teacher: GeminiTeacher, prompt: str = "Write one.") -> TeacherCall:
    return teacher.author_call(instruction="You write requests.", prompt=prompt, answer_schema=ANSWERS, sample=0)


def ask(teacher: GeminiTeacher, *calls: TeacherCall) -> list[Any]:
    """Replies and errors in the order of the calls, through one connection."""

    async def run() -> list[Any]:
        connection = teacher.connect()
        try:
            return await asyncio.gather(*(connection.ask(call) for call in calls), return_exceptions=True)
        finally:
            await connection.close()

    return asyncio.run(run())


def reply_of(teacher: GeminiTeacher, call: TeacherCall) -> TeacherReply:
    (reply,) = ask(teacher, call)
    assert isinstance(reply, TeacherReply), reply
    return reply


def calls_of(reply: TeacherReply) -> tuple[Mapping[str, Any], ...]:
    assert reply.calls is not None
    return reply.calls


def steps_of(reply: TeacherReply) -> tuple[TokenLogProb, ...]:
    assert reply.log_probs is not None
    return reply.log_probs


# Answers


def test_parallel_calls_come_back_in_order_under_the_tools_own_names(server: Any):
    reply = reply_of(teacher_at(server), label(teacher_at(server)))
    raw = [part["functionCall"] for part in reply.raw["candidates"][0]["content"]["parts"]]
    assert (reply.status, reply.reason, len(raw)) == ("ok", "", 2)
    names = {"weather.now": "weather.now", "Licht_schalten_": "Licht schalten!"}
    assert [call["name"] for call in calls_of(reply)] == [names[call["name"]] for call in raw]
    assert {call["name"] for call in calls_of(reply)} == {tool.name for tool in (WEATHER, LIGHT)}
    tools = {tool.name: tool for tool in (WEATHER, LIGHT)}
    assert [call_problems(ToolCall.from_dict(call), tools) for call in calls_of(reply)] == [[], []]
    assert reply.model_version == "gemini-test-test"
    assert reply.latency_s > 0


def test_integers_that_come_as_floats_are_integers_again(server: Any):
    server.faults({"fault": "float_integers"})
    reply = reply_of(teacher_at(server), label(teacher_at(server), tools=[LIGHT]))
    (sent,) = reply.raw["candidates"][0]["content"]["parts"][0]["functionCall"]["args"].values()
    assert isinstance(sent, float)
    assert {type(call["arguments"]["wie hell"]) for call in calls_of(reply)} == {int}


def test_without_tools_the_answer_is_text_without_calls(server: Any):
    reply = reply_of(teacher_at(server), label(teacher_at(server), tools=[]))
    assert (reply.status, reply.calls) == ("ok", ())
    assert reply.text.startswith("I would say")


def test_an_answer_in_words_is_no_call(server: Any):
    server.faults({"fault": "text_only"})
    reply = reply_of(teacher_at(server), label(teacher_at(server)))
    assert (reply.status, reply.calls) == ("ok", ())


def test_a_call_of_an_unknown_function_is_kept_as_answered(server: Any):
    server.faults({"fault": "unknown_function"})
    reply = reply_of(teacher_at(server), label(teacher_at(server), query="weather"))
    assert reply.calls == ({"name": "no_such_function", "arguments": {}},)


def test_an_authored_answer_is_json_of_the_schema_and_differs_by_prompt(server: Any):
    teacher = teacher_at(server)
    replies = ask(teacher, *(author(teacher, f"Write number {i}.") for i in range(5)))
    for reply in replies:
        assert (reply.status, reply.calls) == ("ok", None)
        jsonschema.validate(json.loads(reply.text), ANSWERS)
    assert len({reply.text for reply in replies}) == 5


def test_samples_are_different_requests_and_the_same_request_has_the_same_answer(server: Any):
    teacher = teacher_at(server)
    calls = [
        teacher.author_call(instruction="", prompt="Write one.", answer_schema=ANSWERS, sample=sample)
        for sample in (0, 1, 2, 0)
    ]
    texts = [reply.text for reply in ask(teacher, *calls)]
    assert len(set(texts)) == 3
    assert texts[0] == texts[3]
    stats = server.stats()
    assert (stats["received"], stats["unique"], stats["answered_more_than_once"]) == (4, 3, 1)


def test_log_probabilities_are_those_of_the_answers_bytes(server: Any):
    teacher = teacher_at(server, response_logprobs=3)
    reply = reply_of(teacher, label(teacher, query="Wetter für Århus", tools=[]))
    assert b"".join(step.token for step in steps_of(reply)) == reply.text.encode()
    assert any(len(step.token) == 1 and step.token[0] > 127 for step in steps_of(reply))
    total = reply.raw["candidates"][0]["logprobsResult"]["logProbabilitySum"]
    assert math.isclose(sum(step.log_prob for step in steps_of(reply)), total)
    for step in steps_of(reply):
        assert len(step.top) == 3
        assert step.top[0] == (step.token, step.log_prob)
        assert [pair[1] for pair in step.top] == sorted((pair[1] for pair in step.top), reverse=True)
    assert reply_of(teacher_at(server), label(teacher_at(server))).log_probs is None


def test_settings_arrive_where_gemini_looks_for_them(server: Any):
    """And a batch job holds the very request that is sent alone."""
    changes = {
        "temperature": 0.5,
        "top_p": 0.9,
        "thinking": 128,
        "safety": {"HARM_CATEGORY_HARASSMENT": "OFF"},
        "response_logprobs": 2,
    }
    teacher = teacher_at(server, **changes)
    assert request_body(label(teacher))["generationConfig"] == {
        "maxOutputTokens": teacher.max_output_tokens,
        "seed": 0,
        "temperature": 0.5,
        "topP": 0.9,
        "thinkingConfig": {"thinkingBudget": 128},
        "responseLogprobs": True,
        "logprobs": 2,
    }
    level = request_body(label(teacher_at(server, thinking="low")))["generationConfig"]["thinkingConfig"]
    assert level == {"thinkingLevel": "LOW"}
    for make in (label, author):
        for changed in (teacher, teacher_at(server, thinking="low")):
            server.reset(jobs=True)
            batch = dataclasses.replace(changed, batch=True)
            one, two = reply_of(changed, make(changed)), reply_of(batch, make(batch))
            assert (one.calls, one.text, one.log_probs) == (two.calls, two.text, two.log_probs)
            assert server.stats()["unique"] == 1


# Outcomes that are no answer


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ({"fault": "blocked_prompt"}, "blocked", "PROHIBITED_CONTENT"),
        *[({"fault": "finish", "reason": r}, "blocked", r) for r in ("SAFETY", "RECITATION", "BLOCKLIST", "SPII")],
        ({"fault": "finish", "reason": "PROHIBITED_CONTENT"}, "blocked", "PROHIBITED_CONTENT"),
        ({"fault": "finish", "reason": "MAX_TOKENS"}, "truncated", "max_output_tokens=4096"),
        ({"fault": "finish", "reason": "MALFORMED_FUNCTION_CALL"}, "malformed", "MALFORMED_FUNCTION_CALL"),
        ({"fault": "finish", "reason": "UNEXPECTED_TOOL_CALL"}, "malformed", "UNEXPECTED_TOOL_CALL"),
        ({"fault": "finish", "reason": "A_REASON_OF_NEXT_YEAR"}, "malformed", "A_REASON_OF_NEXT_YEAR"),
        ({"fault": "finish", "reason": "STOP"}, "empty", "neither text nor call"),
        ({"fault": "no_candidates"}, "empty", "no candidate"),
        ({"fault": "no_parts"}, "empty", "neither text nor call"),
    ],
    ids=lambda value: value.get("reason", value["fault"]) if isinstance(value, dict) else None,
)
def test_each_outcome_has_a_status_and_a_reason(server: Any, fault: dict, status: str, words: str):
    server.faults(fault)
    for teacher in (teacher_at(server), teacher_at(server, batch=True)):
        for reply in ask(teacher, label(teacher), author(teacher)):
            assert (reply.status, reply.calls) == (status, None)
            assert words in reply.reason
            assert reply.prompt_tokens > 0
            assert reply.cost_usd > 0


def test_a_limit_cuts_the_answer(server: Any):
    teacher = teacher_at(server, max_output_tokens=6, thinking=0)
    for call in (label(teacher), author(teacher)):
        reply = reply_of(teacher, call)
        assert (reply.status, reply.calls) == ("truncated", None)
        assert reply.output_tokens + reply.thinking_tokens == 6


@pytest.mark.parametrize(
    ("fault", "retry_after_s"),
    [
        ({"fault": "rate_limit"}, None),
        ({"fault": "rate_limit", "retry_after": "7"}, 7.0),
        ({"fault": "rate_limit", "retry_after": "soon"}, None),
        ({"fault": "rate_limit", "retry_info": "39.5s"}, 39.5),
        ({"fault": "rate_limit", "retry_after": "7", "retry_info": "3s"}, 7.0),
        ({"fault": "rate_limit", "retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"fault": "error", "status": 500}, None),
        ({"fault": "error", "status": 503}, None),
        ({"fault": "error", "status": 408}, None),
        ({"fault": "page", "status": 502}, None),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_what_may_pass_is_transient_and_says_when_to_come_again(server: Any, fault: dict, retry_after_s: float | None):
    server.faults(fault)
    (error,) = ask(teacher_at(server), label(teacher_at(server)))
    assert type(error) is TransientError
    assert (error.retry_after_s, error.billed) == (retry_after_s, False)
    assert server.stats()["received"] == 1  # the client did not try again by itself


def test_a_date_to_come_again_is_taken_from_now(server: Any):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3600), usegmt=True)
    server.faults({"fault": "rate_limit", "retry_after": date})
    (error,) = ask(teacher_at(server), label(teacher_at(server)))
    assert 3600 - PATIENCE_S < error.retry_after_s <= 3600


@pytest.mark.parametrize(
    ("fault", "words", "answered"),
    [
        ({"fault": "cut_before"}, "broke", 0),
        ({"fault": "cut_after"}, "broke", 1),
        ({"fault": "not_json"}, "cannot be read", 1),
        ({"fault": "slow", "latency_s": PATIENCE_S}, "teacher.traffic.timeout_s=0.3", 0),
    ],
    ids=lambda value: value["fault"] if isinstance(value, dict) else None,
)
def test_what_may_have_been_paid_for_says_so(server: Any, fault: dict, words: str, answered: int):
    server.faults(fault)
    teacher = teacher_at(server, timeout_s=0.3) if fault["fault"] == "slow" else teacher_at(server)
    (error,) = ask(teacher, label(teacher))
    assert type(error) is TransientError
    assert error.billed
    assert words in str(error)
    stats = server.stats()
    assert (stats["received"], stats["answered"]) == (1, answered)


def test_a_server_that_is_not_there_is_transient(server: Any):
    teacher = teacher_at(server, base_url="http://127.0.0.1:9")
    (error,) = ask(teacher, label(teacher))
    assert type(error) is TransientError
    assert not error.billed


@pytest.mark.parametrize(
    ("fault", "every_call", "words"),
    [
        ({"fault": "error", "status": 400, "message": "Bad schema."}, False, ["Bad schema."]),
        (
            {"fault": "error", "status": 400, "message": "User location.", "rpc_status": "FAILED_PRECONDITION"},
            True,
            ["User location."],
        ),
        ({"fault": "error", "status": 401}, True, [VARIABLE]),
        ({"fault": "error", "status": 403}, True, [VARIABLE, "gemini-test"]),
        ({"fault": "daily_quota"}, True, ["gemini-test", "limit 20", "midnight Pacific"]),
    ],
    ids=lambda value: f"{value['fault']}-{value.get('status')}" if isinstance(value, dict) else None,
)
def test_what_no_repetition_helps_is_fatal(server: Any, fault: dict, every_call: bool, words: list[str]):
    server.faults(fault)
    (error,) = ask(teacher_at(server), label(teacher_at(server)))
    assert type(error) is FatalError
    assert error.every_call is every_call
    assert all(word in str(error) for word in words)


def test_a_wrong_key_and_an_unknown_model_are_told_with_the_way_out(server: Any, monkeypatch: pytest.MonkeyPatch):
    teacher = teacher_at(server, model="wrong-model")
    (error,) = ask(teacher, label(teacher))
    assert type(error) is FatalError
    assert error.every_call
    assert "teacher.model=wrong-model" in str(error)
    monkeypatch.setenv(VARIABLE, "another-key")
    (error,) = ask(teacher_at(server), label(teacher_at(server)))
    assert type(error) is FatalError
    assert error.every_call
    assert f"the environment variable {VARIABLE}" in str(error)


def test_no_key_in_the_environment_is_refused_when_connecting_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    label(configured())
    with pytest.raises(ConfigError, match=r"GEMINI_API_KEY is not set.*key_variable"):
        configured().connect()


def test_the_key_is_nowhere(server: Any):
    """Even where the server repeats it: in an error, or among the words of an answer."""
    rules = ["echo_key", "cut_before", "rate_limit", "text_only"]
    server.faults(*({"fault": rule, "match": f"town {rule}"} for rule in rules))
    for teacher in (teacher_at(server), teacher_at(server, batch=True)):
        connection = teacher.connect()
        assert KEY not in repr(teacher) + repr(connection) + repr(vars(connection))
        asyncio.run(connection.close())
        results = ask(teacher, *(label(teacher, query=f"{KEY} town {rule} {KEY}") for rule in rules))
        assert "***" in results[-1].text
        for result in results:
            chained = [result, getattr(result, "__cause__", None), getattr(result, "__context__", None)]
            assert KEY not in repr(chained)
            assert isinstance(result, TeacherReply) or "Gemini" in str(result)


def test_a_model_without_a_price_is_refused_and_listed_ones_have_one():
    teacher = dataclasses.replace(configured(), model="gemini-unknown")
    with pytest.raises(ConfigError, match="gemini-unknown: no price"):
        teacher.connect()
    assert configured().prices.of(configured().model).batch_frac == 0.5


@pytest.mark.parametrize("url", ["localhost:80", "ftp://host", "https://user:secret@host"])
def test_a_base_url_that_is_none_is_refused(url: str):
    with pytest.raises(ValueError, match="base_url") as told:
        dataclasses.replace(configured(), base_url=url)
    assert "secret" not in str(told.value)


def test_a_fault_befalls_the_same_attempts_whatever_the_order(server: Any):
    """So that an interrupted run and an uninterrupted one can be compared."""
    server.faults({"fault": "error", "status": 503, "probability": 0.5}, seed=3)
    teacher = teacher_at(server)
    calls = [label(teacher, query=f"weather in town {i}") for i in range(40)]

    def fared(order: list[TeacherCall]) -> dict[str, list[str]]:
        server.reset(jobs=True)
        rounds = [ask(teacher, *order) for _ in range(2)]
        return {call.key(): [type(one[i]).__name__ for one in rounds] for i, call in enumerate(order)}

    first, second = fared(calls), fared(calls[::-1])
    assert first == second
    assert {len(set(attempts)) for attempts in first.values()} == {1, 2}
    stats = server.stats()
    assert stats["received"] == 80 == stats["answered"] + stats["faults"]["error"]


# Cost


def test_cost_by_hand(server: Any):
    """1e-6 * (2.0 * (prompt - cached) + 0.5 * cached + 8.0 * (output + thinking)), and half of it in a batch job."""
    teacher = teacher_at(server)
    replies = ask(teacher, *(label(teacher, query=f"weather in {i} and {i + 1}") for i in range(10)))
    for reply in replies:
        usage = reply.raw["usageMetadata"]
        prompt, cached = usage["promptTokenCount"], usage.get("cachedContentTokenCount", 0)
        output, thinking = usage["candidatesTokenCount"], usage.get("thoughtsTokenCount", 0)
        told = (reply.prompt_tokens, reply.cached_tokens, reply.output_tokens, reply.thinking_tokens)
        assert told == (prompt, cached, output, thinking)
        by_hand = 1e-6 * (2.0 * (prompt - cached) + 0.5 * cached + 8.0 * (output + thinking))
        assert math.isclose(reply.cost_usd, by_hand)
    assert {reply.cached_tokens > 0 for reply in replies} == {True, False}
    assert {reply.thinking_tokens > 0 for reply in replies} == {True}
    batch = dataclasses.replace(teacher, batch=True)
    halved = [
        reply.cost_usd for reply in ask(batch, *(label(batch, query=f"weather in {i} and {i + 1}") for i in range(10)))
    ]
    assert halved == pytest.approx([reply.cost_usd / 2 for reply in replies])


def test_no_attempt_costs_more_than_its_bound(server: Any):
    for teacher in (teacher_at(server), teacher_at(server, max_output_tokens=9), teacher_at(server, batch=True)):
        queries = ["", "Ж" * 300, "weather in Århus and \U0001f327" * 20]
        calls = [label(teacher, query=f"{query} {i}") for i, query in enumerate(queries)]
        calls.append(author(teacher))
        for call, reply in zip(calls, ask(teacher, *calls), strict=True):
            assert reply.cost_usd <= teacher.most_usd(call)
    cheap, dear = teacher_at(server, max_output_tokens=10), teacher_at(server, max_output_tokens=1010)
    assert math.isclose(dear.most_usd(label(dear)) - cheap.most_usd(label(cheap)), 1000 * 8e-6, rel_tol=0.01)


# Batch jobs


def test_a_job_gathers_calls_and_gives_each_its_own_answer(server: Any):
    teacher = teacher_at(server, batch=True, batch_calls_max=4)
    calls = [author(teacher, f"Write batch {i}.") for i in range(10)]
    replies = ask(teacher, *calls)
    direct = ask(teacher_at(server), *calls)
    assert [reply.text for reply in replies] == [reply.text for reply in direct]
    assert len({reply.text for reply in replies}) == 10
    assert server.stats()["jobs"] == 3  # 4 + 4 + what came until it settled


def test_the_job_of_an_interrupted_run_is_taken_up(shared_server: Any, server: Any):
    teacher = teacher_at(server, batch=True)
    calls = [label(teacher, query=f"weather in interrupted town {i}") for i in range(3)]

    async def interrupted() -> None:
        connection = teacher.connect()
        asked = [asyncio.ensure_future(connection.ask(call)) for call in calls]
        while server.stats()["jobs"] == 0:
            await asyncio.sleep(0.01)
        await connection.close()
        assert {type(result) for result in await asyncio.gather(*asked, return_exceptions=True)} == {TransientError}

    asyncio.run(interrupted())
    replies = ask(teacher, *calls)
    assert [reply.status for reply in replies] == ["ok"] * 3
    assert server.stats()["jobs"] == 1
    # Of other calls, those that a finished job has answered are not sent again.
    more = [*calls[1:], label(teacher, query="weather in another town")]
    again = ask(teacher, *more)
    assert [reply.calls for reply in again[:2]] == [reply.calls for reply in replies[1:]]
    stats = server.stats()
    assert (stats["jobs"], stats["received"], stats["answered_more_than_once"]) == (2, 4, 0)


def test_a_call_asked_again_in_the_same_run_is_a_new_question(server: Any):
    teacher = teacher_at(server, batch=True)
    call = label(teacher, query="weather asked twice")

    async def run() -> list[TeacherReply]:
        connection = teacher.connect()
        try:
            return [await connection.ask(call), await connection.ask(call)]
        finally:
            await connection.close()

    asyncio.run(run())
    assert server.stats()["jobs"] == 2


def test_items_that_fail_do_not_hold_up_the_others(server: Any):
    server.faults(
        {"fault": "error", "status": 400, "match": "bad item"},
        {"fault": "rate_limit", "match": "busy item"},
        {"fault": "error", "status": 500, "match": "broken item"},
    )
    teacher = teacher_at(server, batch=True)
    calls = [label(teacher, query=f"weather {word} item") for word in ("good", "bad", "busy", "broken")]
    good, bad, busy, broken = ask(teacher, *calls)
    assert good.status == "ok"
    assert type(bad) is FatalError
    assert not bad.every_call
    assert type(busy) is type(broken) is TransientError


def test_a_job_that_fails_whole_can_be_asked_again(server: Any):
    server.faults({"fault": "job_failed", "match": "failing job", "attempts": 1})
    teacher = teacher_at(server, batch=True)
    call = label(teacher, query="weather failing job")
    (error,) = ask(teacher, call)
    assert type(error) is TransientError
    assert "JOB_STATE_FAILED" in str(error)
    assert reply_of(teacher, call).status == "ok"


def test_a_wrong_key_reaches_every_call_of_a_job(server: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "another-key")
    teacher = teacher_at(server, batch=True)
    errors = ask(teacher, *(label(teacher, query=f"weather {i}") for i in range(3)))
    assert {(type(error), error.every_call) for error in errors} == {(FatalError, True)}


# Schemas


def keywords(schema: Any) -> set[str]:
    """Of a schema and of those in it."""
    if not isinstance(schema, dict):
        return set()
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ()), *schema.get("prefixItems", ())]
    inner += [schema.get("items"), schema.get("additionalProperties")]
    return set(schema).union(*map(keywords, inner))


def test_every_tool_of_the_corpus_can_be_declared():
    """Their schemas use supported keywords alone, so that what is sent says the same."""
    files = sorted(CORPUS.glob("*.tools.json"))
    tools = [Tool.from_dict(record) for file in files for record in json.loads(file.read_text())]
    assert len(tools) > 1000
    for tool in tools:
        declared = declare([tool])
        (function,) = declared.functions
        assert (function["name"], function["description"]) == (tool.name, tool.description)
        assert declared.parameters == {tool.name: {}}
        sent = function.get("parametersJsonSchema", {"type": "object", "properties": {}})
        assert keywords(sent) <= SUPPORTED
        assert without_empty_required(sent) == without_empty_required(tool.parameters)


def without_empty_required(schema: Any) -> Any:
    if isinstance(schema, list):
        return [without_empty_required(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: without_empty_required(v) for k, v in schema.items() if k != "required" or v}


@pytest.mark.parametrize(
    ("given_schema", "sent"),
    [
        ({"const": "on"}, {"type": "string", "enum": ["on"]}),
        ({"const": None}, {"type": "null"}),
        ({"const": True, "description": "yes"}, {"type": "boolean", "description": "yes (always true)"}),
        ({"enum": [True, False]}, {"type": "boolean"}),
        ({"enum": [1, 2]}, {"type": "integer", "enum": [1, 2]}),
        ({"enum": [1, 2.5]}, {"type": "number", "enum": [2.5, 1]}),
        ({"enum": ["a", None]}, {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]}),
        ({"type": "string", "enum": ["a", 1]}, {"type": "string", "enum": ["a"]}),
        (
            {"type": ["integer", "null"], "exclusiveMinimum": 0},
            {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
        ),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ({"type": "integer", "exclusiveMaximum": 2.5}, {"type": "integer", "maximum": 2}),
        ({"type": "integer", "exclusiveMaximum": 3}, {"type": "integer", "maximum": 2}),
        ({"type": "number", "exclusiveMinimum": 0}, {"type": "number", "description": "more than 0"}),
        ({"type": "string", "format": "date-time"}, {"type": "string", "format": "date-time"}),
        (
            {"type": "string", "format": "date", "maxLength": 9, "description": "Day."},
            {"type": "string", "description": "Day. (format date; at most 9 characters)"},
        ),
        ({"type": "array"}, {"type": "array", "items": {}}),
        (
            {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
            {"type": "array", "items": {"type": "string"}, "description": "no item twice"},
        ),
        ({"$ref": "#/$defs/level", "description": "now"}, {"type": "integer", "maximum": 5, "description": "now"}),
        (
            {"allOf": [{"type": "number", "minimum": 1}, {"type": "integer", "minimum": 3}]},
            {"type": "integer", "minimum": 3},
        ),
        (
            {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            {
                "anyOf": [
                    {"type": "object", "properties": {"a": {}}, "required": ["a"]},
                    {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]},
                ]
            },
        ),
    ],
    ids=lambda value: canonical_json(value)[:50],
)
def test_keywords_are_said_in_those_that_gemini_takes(given_schema: dict, sent: dict):
    level = {"$defs": {"level": {"type": "integer", "maximum": 5}}}
    (function,) = declare(
        [Tool.from_dict({"name": "t", "parameters": {"properties": {"p": given_schema}, **level}})]
    ).functions
    assert function["parametersJsonSchema"]["properties"]["p"] == sent


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"properties": {"a": {"not": {"type": "string"}}}}, "'not'"),
        ({"properties": {"a": {"if": {}, "then": {}}}}, "'if'"),
        ({"properties": {"a": {"type": "object", "patternProperties": {"x": {}}}}}, "'patternProperties'"),
        ({"properties": {"a": {"type": "object", "properties": {"b": {"$ref": "#/properties/a"}}}}}, "leads to itself"),
        ({"properties": {"a": {"anyOf": [{"type": "string"}, {"$ref": "#/properties/a"}]}}}, "leads to itself"),
        ({"properties": {"a": {"$ref": "#/$defs/missing"}}}, "'#/$defs/missing', which leads nowhere"),
        ({"properties": {"a": {}}, "oneOf": [{"required": ["a"]}]}, "anyOf or oneOf of all parameters"),
        ({"properties": {"a": {"enum": [{"x": 1}]}}}, "'enum'"),
        ({"properties": {"a": {"allOf": [{"pattern": "a"}, {"pattern": "b"}]}}}, "'pattern' twice"),
        ({"properties": {"a": {"allOf": [{"type": "string"}, {"type": "number"}]}}}, "'type'"),
    ],
)
def test_what_gemini_cannot_be_told_is_refused_by_tool_and_keyword(parameters: dict, words: str):
    tool = Tool.from_dict({"name": "the_tool", "parameters": parameters})
    with pytest.raises(ConfigError) as told:
        configured().label_call(instruction="", query="q", tools=[tool], sample=0)
    assert "tool 'the_tool'" in str(told.value)
    assert words in str(told.value)


def test_a_function_without_parameters_declares_none():
    assert declare([Tool("ping", "", {"type": "object", "properties": {}})]).functions == (
        {"name": "ping", "description": "ping"},
    )


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"weather\.now"):
        declare([WEATHER, WEATHER])


SCALARS = st.one_of(
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-5, 5),
        st.integers(0, 9),
    ),
    st.builds(lambda low: {"type": "integer", "exclusiveMinimum": low}, st.integers(-5, 5)),
    st.just({"type": "number", "multipleOf": 0.5}),
    st.just({"type": "boolean"}),
    st.builds(lambda n: {"type": "string", "minLength": n}, st.integers(0, 3)),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.sampled_from(["a", "b", 1, 2.5, None, True]), min_size=1, unique_by=repr),
    ),
    st.builds(lambda value: {"const": value}, st.sampled_from(["a", 3, False])),
    st.builds(
        lambda types: {"type": types}, st.lists(st.sampled_from(["string", "integer", "null"]), min_size=1, unique=True)
    ),
    st.just({"$ref": "#/$defs/shared"}),
)
PROPERTY_NAMES = st.one_of(st.sampled_from(["a", "b_2", "ä", "x y", "x-y", "9"]), st.text(min_size=1, max_size=70))


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    objects = st.builds(
        lambda properties, required: {
            "type": "object",
            "properties": properties,
            "required": [name for name, wanted in zip(properties, required, strict=False) if wanted],
        },
        st.dictionaries(PROPERTY_NAMES, inner, max_size=3),
        st.lists(st.booleans(), min_size=3, max_size=3),
    )
    arrays = st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner)
    choices = st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)
    return st.one_of(objects, arrays, choices, st.builds(lambda part: {"allOf": [part]}, inner))


PARAMETERS = st.builds(
    lambda properties: {
        "type": "object",
        "properties": properties,
        "$defs": {
            "shared": {"type": "object", "properties": {"k": {"type": "integer"}}, "additionalProperties": False}
        },
    },
    st.dictionaries(PROPERTY_NAMES, st.recursive(SCALARS, nested, max_leaves=6), min_size=1, max_size=4),
)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-7, 14),
        st.sampled_from([0.5, 2.5, 2.0]),
        st.sampled_from(["", "a", "bcd"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(PROPERTY_NAMES, inner, max_size=3)),
    max_leaves=4,
)


def renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): renamed(child, names) for key, child in value.items()}
    return [renamed(child, names) for child in value] if isinstance(value, list) else value


def instance_of(draw: Callable, schema: dict, shared: dict) -> Any:
    """A value for a schema of `PARAMETERS`, valid in most draws; the judge is jsonschema."""
    if "$ref" in schema:
        return instance_of(draw, shared, shared)
    if "allOf" in schema:
        return instance_of(draw, schema["allOf"][0], shared)
    if "anyOf" in schema:
        return instance_of(draw, draw(st.sampled_from(schema["anyOf"])), shared)
    if "const" in schema or "enum" in schema:
        return draw(st.sampled_from(schema.get("enum", [schema.get("const")])))
    kind = schema["type"] if isinstance(schema["type"], str) else draw(st.sampled_from(schema["type"]))
    if kind == "object":
        kept = [n for n in schema["properties"] if n in schema.get("required", ()) or draw(st.booleans())]
        return {name: instance_of(draw, schema["properties"][name], shared) for name in kept}
    if kind == "array":
        return [instance_of(draw, schema["items"], shared) for _ in range(draw(st.integers(0, 2)))]
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    plain = {
        "integer": st.integers(low, schema.get("maximum", low + 9)),
        "number": st.sampled_from([0.5, 2.0, -1.5]),
        "boolean": st.booleans(),
        "string": st.text(min_size=schema.get("minLength", 0), max_size=5),
        "null": st.none(),
    }
    return draw(plain[kind])


@settings(max_examples=80, derandomize=True, deadline=None)
@given(parameters=PARAMETERS, data=st.data())
def test_what_is_sent_allows_all_that_the_tool_allows_and_answers_keep_their_names(
    parameters: dict, data: st.DataObject
):
    tool = Tool.from_dict({"name": data.draw(PROPERTY_NAMES.filter(str.strip)), "parameters": parameters})
    declared = declare([tool])
    (function,) = declared.functions
    sent = function["parametersJsonSchema"]
    jsonschema.Draft202012Validator.check_schema(sent)
    assert keywords(sent) <= SUPPORTED
    aliases = declared.parameters[function["name"]]
    assert len(set(aliases)) == len(set(aliases.values()))
    shared = parameters["$defs"]["shared"]
    arguments = instance_of(data.draw, parameters, shared)
    jsonschema.validate(arguments, parameters)
    answered = renamed(arguments, {name: alias for alias, name in aliases.items()})
    jsonschema.validate(answered, sent)
    assert declared.call(function["name"], answered) == {"name": tool.name, "arguments": arguments}
    # As they would come from a Struct of protocol buffers, in which all numbers are floats.
    floats = json.loads(json.dumps(answered), parse_int=float)
    back = declared.call(function["name"], floats)["arguments"]
    assert back == arguments
    assert not list(jsonschema.Draft202012Validator(parameters).iter_errors(back))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(schema=st.recursive(SCALARS, nested, max_leaves=5), value=VALUES)
def test_any_value_that_a_schema_allows_is_allowed_by_what_is_sent(schema: dict, value: Any):
    whole = {"properties": {"p": schema}, "type": "object", "$defs": {"shared": {"type": "integer", "maximum": 3}}}
    sent = answer_schema(whole)
    allowed = jsonschema.Draft202012Validator(whole).is_valid({"p": value})
    assert not allowed or jsonschema.Draft202012Validator(sent).is_valid({"p": value})


@settings(max_examples=100, derandomize=True, deadline=None)
@given(names=st.lists(PROPERTY_NAMES.filter(str.strip), min_size=1, max_size=6, unique=True))
def test_function_names_are_legal_distinct_and_lead_back(names: list[str]):
    tools = [Tool(name, "", {"type": "object", "properties": {}}) for name in names]
    declared = declare(tools)
    sent = [function["name"] for function in declared.functions]
    assert len(set(sent)) == len(sent)
    assert all(len(name) <= 64 and (name[0].isalpha() or name[0] == "_") and name.isascii() for name in sent)
    assert [declared.call(name, {})["name"] for name in sent] == names
    assert sent == [function["name"] for function in declare(tools).functions]


def test_equal_questions_have_equal_keys_and_traffic_is_no_part_of_them(server: Any):
    one = teacher_at(server)
    other = teacher_at(server, timeout_s=5.0, batch=True, batch_calls_max=3, base_url="http://127.0.0.1:1")
    assert label(one).key() == label(other).key()
    assert label(dataclasses.replace(one, base_url=None)).key() != label(one).key()
    assert label(teacher_at(server, thinking="high")).key() != label(one).key()
