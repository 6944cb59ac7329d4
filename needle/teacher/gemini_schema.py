"""Tools as Gemini's function declarations, and its calls as calls of those tools again.

Gemini documents which JSON Schema keywords it takes (`GenerationConfig.responseJsonSchema` in the API reference; here
used for parameters too): `SUPPORTED`. A keyword outside is written in those terms where they can say the same, told
in the description where it only narrows what a value may be, and refused where it does neither. What is sent excludes
no value that the tool's schema, which says its types, allows; whether an answer keeps to that schema is checked by
whoever reads it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from needle.errors import ConfigError
from needle.schema import Tool
from needle.teacher.aliases import Aliases

SUPPORTED = {
    *("type", "format", "title", "description", "enum", "anyOf", "minimum", "maximum"),
    *("items", "prefixItems", "minItems", "maxItems", "properties", "additionalProperties", "required"),
}
# Keywords that only narrow a value, and the words that tell them.
TOLD = {
    "pattern": "matches the regular expression {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "multipleOf": "a multiple of {}",
    "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}",
    "minProperties": "at least {} entries",
    "maxProperties": "at most {} entries",
    "contentEncoding": "encoded as {}",
    "contentMediaType": "of media type {}",
    "default": "default {}",
    "examples": "for example {}",
}
REFUSED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "unevaluatedItems"),
    *("unevaluatedProperties", "patternProperties", "propertyNames", "dependentRequired", "dependentSchemas"),
    *("$dynamicRef", "$dynamicAnchor", "$recursiveRef"),
)
# Gemini takes these formats of a string; any other makes it refuse the request.
FORMATS = frozenset({"date-time"})
TYPES = {
    "string": ("format", "pattern", "minLength", "maxLength", "contentEncoding", "contentMediaType"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"),
    "boolean": (),
    "null": (),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "object": ("properties", "additionalProperties", "required", "minProperties", "maxProperties"),
}
GENERAL = ("title", "description", "default", "examples")
LEGAL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]*")  # of a function
LEGAL_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAME_CHARS_MAX = 64
DEPTH_MAX = 64
Schema = Mapping[str, Any]


class _RefusedError(ValueError):
    """A keyword that cannot be said to Gemini."""


@dataclass(frozen=True)
class Declarations:
    """`functions` are Gemini's function declarations as JSON values; the rest leads its calls back to the tools."""

    functions: tuple[Mapping[str, Any], ...]
    tools: Mapping[str, Tool]  # by the name that Gemini was given
    parameters: Mapping[str, Mapping[str, str]]  # by that name: alias of a parameter -> its name

    def call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`{"name", "arguments"}` with the tool's own names, and integers where its schema says integer.

        A function that was never declared keeps its name and arguments.
        """
        tool = self.tools.get(name)
        if tool is None:
            return {"name": name, "arguments": dict(arguments)}
        aliases = self.parameters[name]
        own = _renamed(arguments, aliases) if aliases else arguments
        return {"name": tool.name, "arguments": _with_integers(own, [tool.parameters], tool.parameters)}


def declare(tools: Sequence[Tool]) -> Declarations:
    """
    Raises:
        ConfigError: a tool that Gemini cannot be told of, with the keyword of its schema; or two tools of one name.
    """
    try:
        names = Aliases([tool.name for tool in tools], legal=LEGAL_NAME, max_length=NAME_CHARS_MAX)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    functions, parameters = [], {}
    for tool in tools:
        given, own = names.to_legal(tool.name), sorted(set(_property_names(tool.parameters)))
        aliases = Aliases(own, legal=LEGAL_PARAMETER, max_length=NAME_CHARS_MAX)
        changed = {name: aliases.to_legal(name) for name in own if aliases.to_legal(name) != name}
        try:
            functions.append(_declaration(tool, given, changed))
        except _RefusedError as error:
            raise ConfigError(f"tool {tool.name!r}: Gemini cannot be told {error}") from None
        parameters[given] = {alias: name for name, alias in changed.items()}
    return Declarations(tuple(functions), {names.to_legal(tool.name): tool for tool in tools}, parameters)


def answer_schema(schema: Schema) -> dict[str, Any]:
    """`schema` in Gemini's keywords, its property names unchanged.

    Raises:
        ConfigError: naming the keyword that Gemini cannot be told.
    """
    try:
        return _Mapper(schema, {}).schema(schema)
    except _RefusedError as error:
        raise ConfigError(f"answer schema: Gemini cannot be told {error}") from None


def _declaration(tool: Tool, name: str, aliases: Mapping[str, str]) -> dict[str, Any]:
    declared = {"name": name, "description": tool.description or tool.name}  # Gemini wants a description
    mapper = _Mapper(tool.parameters, aliases)
    flat = mapper.flat(tool.parameters)
    if "anyOf" in flat:
        raise _RefusedError("anyOf or oneOf of all parameters; put the choice into one parameter, or make two tools")
    mapped = mapper.schema(flat)
    if mapped.get("properties") or mapped.get("additionalProperties"):  # else the field must be left out
        declared["parametersJsonSchema"] = mapped
    return declared


@dataclass(frozen=True)
class _Mapper:
    """`root` is where references start, `aliases` are property names that Gemini does not take."""

    root: Schema
    aliases: Mapping[str, str]

    def schema(self, schema: Any, depth: int = 0) -> dict[str, Any]:
        if schema is True:
            return {}
        if schema is False:
            raise _RefusedError("a schema that no value fulfils")
        if depth > DEPTH_MAX:
            raise _RefusedError("'$ref' that leads to itself; write out as many levels as are used")
        flat = self.flat(schema)
        said = {key: flat[key] for key in ("title", "description") if flat.get(key)}
        types = flat.get("type", _implied(flat))
        if "anyOf" in flat:
            rest = {k: v for k, v in flat.items() if k not in ("anyOf", *GENERAL)}
            given = [_both(rest, branch, self) for branch in flat["anyOf"] if branch is not False]
            branches = [self.schema(branch, depth + 1) for branch in given]
        elif isinstance(types, list) or "enum" in flat:
            branches = list(self._branches(flat, types, depth))
        elif types is None:
            return self._told(said, flat, (*TOLD,))
        else:
            return self._typed(flat, types, depth)
        return self._told(_joined(said, _any_of(branches)), flat, ("default", "examples"))

    def flat(self, schema: Schema, seen: tuple[str, ...] = ()) -> dict[str, Any]:
        """References and allOf merged in, const as enum, oneOf as anyOf; keywords without meaning here left out.

        `seen` are the references that led here.
        """
        for keyword in REFUSED:
            if keyword in schema:
                raise _RefusedError(f"{keyword!r}; leave it out or say it in the description")
        flat = {k: v for k, v in schema.items() if k in _MEANT and k not in ("$ref", "allOf", "const", "oneOf")}
        if "const" in schema:
            flat = _both(flat, {"enum": [schema["const"]]}, self)
        if "oneOf" in schema:
            if "anyOf" in flat:
                raise _RefusedError("'oneOf' beside 'anyOf'")
            flat["anyOf"] = schema["oneOf"]
        parts = [*schema.get("allOf", ()), *([self._target(schema["$ref"], seen)] if "$ref" in schema else [])]
        deeper = (*seen, schema["$ref"]) if "$ref" in schema else seen
        for part in parts:
            if part is False:
                raise _RefusedError("a schema that no value fulfils")
            flat = _both(flat, {} if part is True else self.flat(part, deeper), self)
        return flat

    def _target(self, reference: str, seen: tuple[str, ...]) -> Any:
        if reference in seen:
            raise _RefusedError(f"'$ref' {reference!r} that leads to itself; write out as many levels as are used")
        found = _follow(reference, self.root)
        if found is None:
            raise _RefusedError(f"'$ref' {reference!r}, which leads nowhere")
        return found

    def _branches(self, flat: Schema, types: Any, depth: int) -> Iterator[dict[str, Any]]:
        """One schema for each type of a list of types, or of the values of an enum."""
        allowed = [types] if isinstance(types, str) else types
        if "enum" not in flat:
            for type_name in allowed:
                own = {k: v for k, v in flat.items() if k in TYPES[type_name]}
                yield self._typed(own, type_name, depth)
            return
        groups: dict[str, list[Any]] = {}
        for value in flat["enum"]:
            type_name = _type_of(value)
            if allowed is None or type_name in allowed or (type_name == "integer" and "number" in allowed):
                groups.setdefault(type_name, []).append(int(value) if type_name == "integer" else value)
        if "integer" in groups and "number" in groups:
            groups["number"] += groups.pop("integer")
        for type_name, values in groups.items():
            if type_name in ("object", "array"):
                raise _RefusedError("'enum' or 'const' of objects or lists; describe their properties instead")
            if type_name == "null" or (type_name == "boolean" and len(set(values)) == 2):
                yield {"type": type_name}
            elif type_name == "boolean":
                yield {"type": "boolean", "description": f"always {json.dumps(values[0])}"}
            else:
                yield {"type": type_name, "enum": list(dict.fromkeys(values))}

    def _typed(self, flat: Schema, type_name: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {k: v for k, v in flat.items() if k in ("title", "description") and v}
        out["type"] = type_name
        for key in ("minimum", "maximum", "minItems", "maxItems"):
            if key in TYPES[type_name] and key in flat:
                out[key] = flat[key]
        told = [key for key in TOLD if key in flat and (key in TYPES[type_name] or key in GENERAL)]
        if type_name == "integer":
            _close_bounds(out, flat)
            told = [key for key in told if not key.startswith("exclusive")]
        if type_name == "string" and flat.get("format") in FORMATS:
            out["format"] = flat["format"]
        if type_name == "object":
            self._object(out, flat, depth)
        if type_name == "array":
            self._array(out, flat, depth)
        return self._told(out, flat, told)

    def _object(self, out: dict[str, Any], flat: Schema, depth: int) -> None:
        open_ended = flat.get("additionalProperties", False)
        properties = {name: child for name, child in flat.get("properties", {}).items() if child is not False}
        # Gemini wants every required property among the properties.
        properties |= {name: {} for name in flat.get("required", ()) if name not in properties}
        if properties:
            out["properties"] = {self.aliases.get(k, k): self.schema(v, depth + 1) for k, v in properties.items()}
        if flat.get("required"):
            out["required"] = [self.aliases.get(name, name) for name in dict.fromkeys(flat["required"])]
        if "additionalProperties" in flat:
            out["additionalProperties"] = (
                open_ended if isinstance(open_ended, bool) else self.schema(open_ended, depth + 1)
            )

    def _array(self, out: dict[str, Any], flat: Schema, depth: int) -> None:
        items = flat.get("items", True)
        if "prefixItems" in flat:
            out["prefixItems"] = [self.schema(child, depth + 1) for child in flat["prefixItems"]]
        if items is False:
            out["maxItems"] = min(len(flat.get("prefixItems", ())), flat.get("maxItems", 10**9))
        out["items"] = {} if items is False else self.schema(items, depth + 1)  # Gemini refuses an array without items

    def _told(self, out: dict[str, Any], flat: Schema, keywords: Sequence[str]) -> dict[str, Any]:
        """`out` with a description that also tells these keywords, a format Gemini does not know, and uniqueItems."""
        words = [TOLD[key].format(_words(key, flat[key])) for key in keywords if key in flat]
        kept = out.get("format")
        if isinstance(flat.get("format"), str) and kept is None and out.get("type") in ("string", None):
            words.insert(0, f"format {flat['format']}")
        if flat.get("uniqueItems") and out.get("type") == "array":
            words.append("no item twice")
        if not words:
            return out
        before = out.get("description", "")
        return {**out, "description": f"{before} ({'; '.join(words)})" if before else "; ".join(words)}


_MEANT = {
    *("type", "enum", "anyOf", "oneOf", "allOf", "const", "$ref"),
    *GENERAL,
    *(key for keys in TYPES.values() for key in keys),
}


def _implied(flat: Schema) -> str | None:
    """The type that a schema without one plainly means."""
    return next((t for t, key in (("object", "properties"), ("array", "items")) if key in flat), None)


def _any_of(branches: list[dict[str, Any]]) -> dict[str, Any]:
    if not branches:
        raise _RefusedError("a schema that no value fulfils")
    unique = [branch for i, branch in enumerate(branches) if branch not in branches[:i]]
    return unique[0] if len(unique) == 1 else {"anyOf": unique}


def _joined(said: Mapping[str, Any], branch: Mapping[str, Any]) -> dict[str, Any]:
    """`branch` under a title and description of its own and of what it is a branch of."""
    out = {**said, **branch}
    if "description" in said and "description" in branch:
        out["description"] = f"{said['description']} ({branch['description']})"
    return out


def _both(first: Schema, second: Any, mapper: _Mapper) -> dict[str, Any]:
    """One schema for values that fulfil both."""
    if second is True:
        return dict(first)
    out = dict(first)
    for key, value in mapper.flat(second).items() if _needs_flattening(second) else second.items():
        if key not in out or out[key] == value or key in GENERAL:
            out.setdefault(key, value)
        elif key in ("minimum", "exclusiveMinimum", "minItems", "minLength", "minProperties"):
            out[key] = max(out[key], value)
        elif key in ("maximum", "exclusiveMaximum", "maxItems", "maxLength", "maxProperties"):
            out[key] = min(out[key], value)
        elif key == "required":
            out[key] = list(dict.fromkeys([*out[key], *value]))
        elif key == "enum":
            out[key] = [item for item in out[key] if any(_same(item, other) for other in value)]
        elif key == "type":
            out[key] = _common_types(out[key], value)
        elif key == "properties":
            shared = {k: {"allOf": [out[key][k], value[k]]} for k in value if k in out[key]}
            out[key] = {**out[key], **value, **shared}
        else:
            raise _RefusedError(f"{key!r} twice, in 'allOf', 'anyOf' or beside '$ref'; merge the schemas by hand")
    return out


def _needs_flattening(schema: Any) -> bool:
    return not {"$ref", "allOf", "const", "oneOf", *REFUSED}.isdisjoint(schema)


def _common_types(first: Any, second: Any) -> Any:
    ours, theirs = ([t] if isinstance(t, str) else t for t in (first, second))
    common = [t for t in ours if t in theirs or (t == "integer" and "number" in theirs)]
    common += [t for t in theirs if t == "integer" and "number" in ours and t not in common]
    if not common:
        raise _RefusedError(f"'type' {first!r} and {second!r} at once")
    return common[0] if len(common) == 1 else common


def _close_bounds(out: dict[str, Any], flat: Schema) -> None:
    """Of integers: more than 2 is at least 3."""
    if "exclusiveMinimum" in flat:
        least = int(flat["exclusiveMinimum"] // 1) + 1
        out["minimum"] = max(least, flat.get("minimum", least))
    if "exclusiveMaximum" in flat:
        most = -int(-flat["exclusiveMaximum"] // 1) - 1
        out["maximum"] = min(most, flat.get("maximum", most))


def _words(keyword: str, value: Any) -> str:
    if keyword == "examples":
        return ", ".join(json.dumps(item, ensure_ascii=False) for item in value)
    return value if isinstance(value, str) and keyword != "default" else json.dumps(value, ensure_ascii=False)


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    names = {str: "string", float: "number", type(None): "null", list: "array"}
    return names.get(type(value), "object")


def _same(first: Any, second: Any) -> bool:
    """As JSON: 1 and 1.0 are, 1 and true are not."""
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def _follow(reference: str, root: Schema) -> Any:
    """What a reference within `root` names; None where there is nothing."""
    if not reference.startswith("#/"):
        anchor = reference[1:]
        return root if not anchor else next((s for s in _schemas(root) if s.get("$anchor") == anchor), None)
    found: Any = root
    for step in reference[2:].split("/"):
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return None
    return found


def _schemas(schema: Any) -> Iterator[Schema]:
    if isinstance(schema, Mapping):
        yield schema
        for child in schema.values():
            yield from _schemas(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from _schemas(child)


def _property_names(schema: Any) -> Iterator[str]:
    for part in _schemas(schema):
        if isinstance(part.get("properties"), Mapping):
            yield from part["properties"]
        if isinstance(part.get("required"), list):
            yield from (name for name in part["required"] if isinstance(name, str))


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {names.get(key, key): _renamed(child, names) for key, child in value.items()}
    return [_renamed(child, names) for child in value] if isinstance(value, list) else value


def _with_integers(value: Any, schemas: Sequence[Any], root: Schema) -> Any:
    """3.0 becomes 3 where one of the schemas says integer, or lists 3."""
    if isinstance(value, bool | str | int) or value is None:
        return value
    parts = [part for schema in schemas for part in _applying(schema, root, frozenset())]
    if isinstance(value, float):
        return int(value) if value.is_integer() and any(_says_integer(part, value) for part in parts) else value
    if isinstance(value, Mapping):
        return {k: _with_integers(v, [_child(part, k) for part in parts], root) for k, v in value.items()}
    return [_with_integers(v, [_item(part, i) for part in parts], root) for i, v in enumerate(value)]


def _applying(schema: Any, root: Schema, seen: frozenset[str]) -> Iterator[Schema]:
    """The schema and all that its references and alternatives say of the same value; `seen` references are not
    followed again."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        yield from _applying(_follow(reference, root), root, seen | {reference})
    for keyword in ("allOf", "anyOf", "oneOf"):
        for part in schema.get(keyword, ()):
            yield from _applying(part, root, seen)


def _says_integer(schema: Schema, value: float) -> bool:
    types = schema.get("type", ())
    listed = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]
    return "integer" in ([types] if isinstance(types, str) else types) or any(
        type(item) is int and item == value for item in listed
    )


def _child(schema: Schema, name: str) -> Any:
    return schema.get("properties", {}).get(name, schema.get("additionalProperties"))


def _item(schema: Schema, index: int) -> Any:
    prefix = schema.get("prefixItems", ())
    return prefix[index] if index < len(prefix) else schema.get("items")
