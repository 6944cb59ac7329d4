"""The grammar of an answer: exactly the JSON calls that the tools shown allow, in the form that `render_calls` writes.

Built with llguidance from one JSON Schema of the whole answer. Names, keys, types, enums, required and nested
parameters are enforced; arguments come in the order of the tool's schema; every string value opens with the one space
of `render`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
from tokenizers import Tokenizer

from needle.errors import DataError
from needle.schema import Tool, canonical_json
from needle.text.tokenizer import EOS

# What a free string may be: one space, then anything. (?s) lets it hold (escaped) line breaks.
FREE_STRING = {"type": "string", "pattern": "^ (?s:.*)$"}
# Formats as regular expressions, since the leading space rules out llguidance's own.
_FORMATS = {
    "date": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    "time": r"([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]+)?)?(Z|[+-][0-9]{2}:[0-9]{2})?",
    "date-time": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})",
    "email": r"[^@\s\"\\]+@[^@\s\"\\]+\.[^@\s\"\\]+",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
}  # fmt: skip
_KEPT = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems")
_MAX_DEPTH = 16
CACHED_GRAMMARS = 256
# Otherwise llguidance tokenises fixed text by itself and masks every other cut of it, also the one that students are
# taught where a token, such as `","arguments":{"`, reaches beyond the fixed text.
UNFORCED = '%llguidance {"no_forcing": true}'


class AnswerGrammar:
    """Grammars for one tokenizer; matchers start at the beginning of an answer."""

    def __init__(self, tokenizer: Tokenizer, *, max_calls: int):
        self.tokens = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=tokenizer.get_vocab_size(), eos_token=EOS)
        self.max_calls = max_calls
        self._compiled: dict[str, llguidance.LLMatcher] = {}

    def matcher(self, tools: Sequence[Tool]) -> llguidance.LLMatcher:
        """A fresh matcher for these tools; compiling is cached, so repeated tools cost microseconds.

        Raises:
            DataError: the tools give no grammar even after every doubtful part was loosened.
        """
        key = canonical_json([[tool.name, tool.parameters] for tool in tools])
        if key not in self._compiled:
            if len(self._compiled) >= CACHED_GRAMMARS:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = self._compile(tools)
        return self._compiled[key].deep_copy()

    def _compile(self, tools: Sequence[Tool]) -> llguidance.LLMatcher:
        problem = ""
        for loose in (False, True):
            schema = json.dumps(canonical_schema(tools, self.max_calls, loose=loose), ensure_ascii=False)
            grammar = llguidance.LLMatcher.grammar_from_lark(f"{UNFORCED}\nstart: %json {schema}")
            matcher = llguidance.LLMatcher(self.tokens, grammar, log_level=0)
            if not matcher.is_error():
                return matcher
            problem = matcher.get_error().splitlines()[0]
        raise DataError(f"no grammar can be built for these {len(tools)} tools: {problem}")


def canonical_schema(tools: Sequence[Tool], max_calls: int, *, loose: bool) -> dict[str, Any]:
    """The JSON Schema of an answer. `loose` keeps the types and drops bounds, patterns and formats."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "arguments": _object(tool.parameters, tool.parameters, loose, 0),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    answer = {"type": "array", "items": {"anyOf": calls}, "maxItems": max_calls} if calls else {"const": []}
    form = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    return {**answer, "x-guidance": form}


def allowed_tokens(masks: np.ndarray, vocab_size: int) -> np.ndarray:
    """Bit masks [rows, words] as booleans [rows, vocab_size]."""
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return bits[:, :vocab_size].astype(bool)


def _spaced(schema: Any, root: Mapping[str, Any], loose: bool, depth: int) -> dict[str, Any] | bool:
    """The schema of a value as it is rendered: strings, also in enums, open with a space."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return _anything(2)
    if "$ref" in schema:
        return _spaced(_resolved(schema["$ref"], root), root, loose, depth + 1)
    if "enum" in schema or "const" in schema:
        members = schema["enum"] if "enum" in schema else [schema["const"]]
        return {"enum": [_spaced_value(member) for member in members]}
    for union in ("anyOf", "oneOf"):
        if union in schema:
            rest = {key: value for key, value in schema.items() if key != union}
            return {"anyOf": [_spaced({**rest, **option}, root, loose, depth + 1) for option in schema[union]]}
    if "allOf" in schema:
        merged = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            part = _resolved(part["$ref"], root) if "$ref" in part else part
            properties = {**merged.get("properties", {}), **part.get("properties", {})}
            required = [*merged.get("required", []), *part.get("required", [])]
            merged = {**merged, **part, "properties": properties, "required": required}
        return _spaced(merged, root, loose, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        return {"anyOf": [_spaced({**schema, "type": one}, root, loose, depth + 1) for one in kind]}
    if kind == "string":
        return _string(schema, loose)
    if kind == "object" or (kind is None and "properties" in schema):
        return _object(schema, root, loose, depth)
    if kind == "array":
        bounds = {} if loose else {key: schema[key] for key in ("minItems", "maxItems") if key in schema}
        return {"type": "array", "items": _spaced(schema.get("items", {}), root, loose, depth + 1), **bounds}
    if kind is None:
        return _anything(2)
    bounds = {} if loose else {key: schema[key] for key in _KEPT if key in schema}
    return {"type": kind, **bounds}


def _object(schema: Mapping[str, Any], root: Mapping[str, Any], loose: bool, depth: int) -> dict[str, Any]:
    """Properties in order. Other keys only where the schema says so, or where it is a part that names no property."""
    properties = {
        key: _spaced(child, root, loose, depth + 1) for key, child in (schema.get("properties") or {}).items()
    }
    more = schema.get("additionalProperties", depth > 0 and not properties)
    if more is not False:
        more = _anything(2) if more is True else _spaced(more, root, loose, depth + 1)
    required = [key for key in dict.fromkeys(schema.get("required", ())) if key in properties or more is not False]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}


def _string(schema: Mapping[str, Any], loose: bool) -> dict[str, Any]:
    if loose:
        return FREE_STRING
    if "pattern" in schema:
        pattern = str(schema["pattern"])
        inside = pattern[1:] if pattern.startswith("^") else f"(?s:.*){pattern}"
        return {"type": "string", "pattern": f"^ {inside}"}
    if schema.get("format") in _FORMATS:
        return {"type": "string", "pattern": f"^ {_FORMATS[schema['format']]}$"}
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if low or high is not None:
        return {"type": "string", "pattern": f"^ (?s:.{{{low},{'' if high is None else high}}})$"}
    return FREE_STRING


def _anything(depth: int) -> dict[str, Any]:
    """Any JSON value down to `depth` levels, for parts that a schema leaves open."""
    simple = [FREE_STRING, {"type": "number"}, {"type": "boolean"}, {"type": "null"}]
    if depth == 0:
        return {"anyOf": simple}
    inner = _anything(depth - 1)
    return {"anyOf": [*simple, {"type": "array", "items": inner}, {"type": "object", "additionalProperties": inner}]}


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """What `#/$defs/...` names within the tool's own schema; anything else is left open."""
    found: Any = root
    if not reference.startswith("#"):
        return {}
    for step in re.findall(r"[^/#]+", reference):
        found = found.get(step, {}) if isinstance(found, Mapping) else {}
    return found


def _spaced_value(value: Any) -> Any:
    if isinstance(value, str):
        return " " + value
    if isinstance(value, Mapping):
        return {key: _spaced_value(child) for key, child in value.items()}
    return [_spaced_value(item) for item in value] if isinstance(value, list) else value
