"""The `evaluate` module: loads offline from its folder and gives what needle.metrics.matching gives."""

import json
import os
import subprocess
import sys

import evaluate
import pytest

from needle.metrics import matching
from needle.metrics.tool_call import FOLDER
from needle.schema import Tool, ToolCall

TOOLS = [{"name": "a", "description": "", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}]
ANSWERS = ['[{"name":"a","arguments":{"x":1}}]', '[{"name":"a","arguments":{"x":2}}]', "[]", "no json \ufffd"]
GOLD = [{"x": 1}, {"x": 1}, None, None]


def reference(arguments: dict | None, **fields: str) -> dict:
    calls = [] if arguments is None else [{"name": "a", "arguments": arguments}]
    return {"calls": calls, "tools": TOOLS, **fields}


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(FOLDER), keep_in_memory=True)


def test_agrees_with_the_plain_functions(metric):
    references = [json.dumps(reference(arguments)) for arguments in GOLD]
    result = metric.compute(predictions=ANSWERS, references=references)
    tools = [Tool.from_dict(tool) for tool in TOOLS]
    judged = [
        matching.judge(matching.parse(answer), [] if gold is None else [ToolCall("a", gold)], tools)
        for answer, gold in zip(ANSWERS, GOLD, strict=True)
    ]
    assert result == {"n": 4, **matching.fractions(judged)}
    assert result["call_exact_frac"] == 2 / 4


def test_groups(metric):
    fields = [
        {"kind": "single", "domain": "d", "split": "validation"},
        {"kind": "single", "domain": "e", "split": "unseen"},
        {"kind": "none", "domain": "d", "split": "validation"},
        {"kind": "none", "domain": "d"},
    ]
    references = [json.dumps(reference(gold, **extra)) for gold, extra in zip(GOLD, fields, strict=True)]
    result = metric.compute(predictions=ANSWERS, references=references, group_by=matching.GROUPS)
    assert {kind: (part["n"], part["call_exact_frac"]) for kind, part in result["by_kind"].items()} == {
        "none": (2, 0.5),
        "single": (2, 0.5),
    }
    assert {domain: part["n"] for domain, part in result["by_domain"].items()} == {"d": 3, "e": 1}
    assert {seen: part["n"] for seen, part in result["by_seen"].items()} == {"seen": 2, "unseen": 1, "unknown": 1}
    assert list(result["by_tools"]) == ["1"]


def test_loads_in_a_process_of_its_own_without_network_or_cache(tmp_path):
    code = f"import evaluate; print(evaluate.load({str(FOLDER)!r}).compute(predictions=['[]'], references="
    code += """['{"calls": [], "tools": []}'])["call_exact_frac"])"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9"}
    environment["https_proxy"] = environment["http_proxy"]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0"
