"""Needle's own examples, as needle/schema.py writes them."""

from collections.abc import Mapping
from typing import Any

from needle.corpus.layouts.turns import inferred_kind
from needle.schema import Example, Tool, ToolCall


def convert(record: Mapping[str, Any]) -> Example:
    """Needle's Example as JSON (`needle.schema.Example.to_json`).

        {"id": "a1", "query": "stop the music", "tools": [{"name": "stop", "description": "", "parameters": {...}}],
         "calls": [{"name": "stop", "arguments": {}}], "kind": "single", "split": "train"}

    `kind` may be missing: it is inferred. `id`, `source`, `teacher` and `split` are kept where they are given, so that
    an example converted from an evaluation set stays marked as such.
    """
    if record.get("kind") is None and isinstance(record.get("tools"), list) and isinstance(record.get("calls"), list):
        tools = tuple(Tool.from_dict(tool) for tool in record["tools"])
        record = {**record, "kind": inferred_kind(tools, tuple(ToolCall.from_dict(call) for call in record["calls"]))}
    example = Example.from_dict(record)
    return example.replace(domain="", teacher=example.teacher or "recorded")


def fits(record: Mapping[str, Any]) -> bool:
    return "query" in record and "tools" in record and isinstance(record.get("calls"), list)
