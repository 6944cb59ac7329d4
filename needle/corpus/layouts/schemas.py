"""Tools of loosely written layouts as JSON Schema, and arguments in the form that their schema asks for.

    str, int, float, bool, list, dict      string, integer, number, boolean, array, object
    List[int], Tuple[float, float], Set    arrays; a tuple of n has n items, each of one of the tuple's types
    Dict[str, int]                         an object whose values are integers
    Union[int, str], int | str             anyOf
    Optional[str]                          anyOf with null; as a parameter it may be left out
    Any                                    no type: any value
    "str, optional"                        as a parameter it may be left out

The words of Java, JavaScript and JSON Schema are read too. A word that is not known is an error, not "any".
"""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from needle.corpus.layouts.literals import json_value
from needle.schema import Tool

_SCALARS = {
    "string": "str string text char",
    "integer": "int integer long short byte bigint",
    "number": "float number double",
    "boolean": "bool boolean",
    "null": "none null nonetype",
}
_ARRAYS = frozenset(
    {"list", "array", "arraylist", "tuple", "set", "frozenset", "sequence", "iterable", "queue", "stack"}
)
_OBJECTS = frozenset({"dict", "object", "mapping", "hashmap", "hashtable"})
_WORDS = {word: kind for kind, words in _SCALARS.items() for word in words.split()}
_WORDS |= dict.fromkeys(_ARRAYS, "array") | dict.fromkeys(_OBJECTS, "object")
JSON_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_MAY_BE_LEFT_OUT = re.compile(r"\s*(?:,|\()\s*(?:optional|default)\b(?!\s*\[).*$", re.IGNORECASE | re.DOTALL)
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "$defs", "definitions")
_EXACT_INTEGERS = 2**53  # floats below hold every integer


def python_type(text: str) -> tuple[dict[str, Any], bool]:
    """The JSON Schema of a type, and whether a parameter of it may be left out.

    Raises:
        ValueError: the type is not known.
    """
    bare = _MAY_BE_LEFT_OUT.sub("", text).strip()
    try:
        tree = ast.parse(bare, mode="eval").body
        schema = _type(tree)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"type {text[:80]!r} is not known") from error
    nullable = {"type": "null"} in schema.get("anyOf", ())
    return schema, nullable or bare != text.strip()


def json_schema(loose: Any) -> Any:
    """A schema with the types of JSON Schema: type words as above, `required: true` inside a property moved to its
    object, a list under `items` as `prefixItems`, and keys whose value is null left out.

    Raises:
        ValueError: not a schema, or a type that is not known.
    """
    if isinstance(loose, bool):
        return loose
    if not isinstance(loose, Mapping):
        raise ValueError(f"a schema must be an object, not {type(loose).__name__}")
    schema: dict[str, Any] = {}
    for key, value in loose.items():
        if value is None and key != "const":
            continue
        if key == "type":
            schema = {**_type_word(value), **schema}
        elif key in _MAPS and isinstance(value, Mapping):
            schema[key] = {name: json_schema(_without_flag(child)) for name, child in value.items()}
        elif key in _LISTS and isinstance(value, list):
            schema[key] = [json_schema(option) for option in value]
        elif key == "items":
            name = "prefixItems" if isinstance(value, list) else "items"
            schema[name] = [json_schema(item) for item in value] if isinstance(value, list) else json_schema(value)
        elif key == "additionalProperties":
            schema[key] = json_schema(value)
        else:
            schema[key] = value
    return _with_flagged(schema, loose.get("properties"))


def flat_parameters(flat: Any, *, required_unless_said: bool) -> dict[str, Any]:
    """The schema of `{parameter: {"type", "description", "default"?, "required"?, ...}}`, or of a whole schema.

    `required_unless_said`: a parameter that says nothing about it must be given. Saying so are "optional" in its type,
    a default (Python lets a call leave it out), and `required`, which rules.

    Raises:
        ValueError: as `json_schema`.
    """
    if not isinstance(flat, Mapping):
        raise ValueError(f"parameters must be an object, not {type(flat).__name__}")
    if is_schema(flat):
        return json_schema(flat)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, spec in flat.items():
        if not isinstance(spec, Mapping):
            raise ValueError(f"parameter {name!r} must be an object, not {type(spec).__name__}")
        properties[name] = json_schema(_without_flag(spec))
        may_be_left_out = "default" in spec or (isinstance(spec.get("type"), str) and python_type(spec["type"])[1])
        said = spec.get("required")
        if said is True or (not isinstance(said, bool) and required_unless_said and not may_be_left_out):
            required.append(name)
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def is_schema(parameters: Mapping[str, Any]) -> bool:
    """Whether these are a whole schema; flat parameters named "type" or "properties" are objects with text inside."""
    properties = parameters.get("properties")
    inside = isinstance(properties, Mapping) and all(isinstance(child, Mapping) for child in properties.values())
    return isinstance(parameters.get("type"), str) or inside


def tool(record: Any, parameters: Callable[[Any], Any] = json_schema) -> Tool:
    """A tool, bare or wrapped as OpenAI's; `parameters` turns what it has of them into a JSON Schema.

    Raises:
        ValueError: as `Tool.from_dict` and `parameters`.
    """
    if isinstance(record, Mapping) and record.get("type") == "function" and "function" in record:
        record = record["function"]
    if not isinstance(record, Mapping):
        raise ValueError(f"a tool must be an object, not {type(record).__name__}")
    try:
        schema = parameters({} if record.get("parameters") is None else record["parameters"])
    except ValueError as error:
        raise ValueError(f"tool {record.get('name')!r}: {error}") from error
    return Tool.from_dict({**record, "parameters": schema})


def tidy(value: Any, schema: Any) -> tuple[Any, int]:
    """`value` with 3.0 written 3 where the schema asks for an integer, and how often that was done. It is the one
    change that is ever made to an argument; "5" for an integer stays, and is refused."""
    if not isinstance(schema, Mapping):
        return value, 0
    if isinstance(value, float):
        exact = schema.get("type") == "integer" and value.is_integer() and abs(value) < _EXACT_INTEGERS
        return (int(value), 1) if exact else (value, 0)
    if isinstance(value, Mapping):
        named, more = schema.get("properties") or {}, schema.get("additionalProperties")
        done = {key: tidy(child, named.get(key, more)) for key, child in value.items()}
        return {key: child for key, (child, _) in done.items()}, sum(count for _, count in done.values())
    if isinstance(value, list):
        first = schema.get("prefixItems") or ()
        items = [tidy(v, first[i] if i < len(first) else schema.get("items")) for i, v in enumerate(value)]
        return [child for child, _ in items], sum(count for _, count in items)
    return value, 0


def _type_word(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return python_type(value)[0]
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return _union([python_type(one)[0] for one in value])
    raise ValueError(f"type {value!r} is not known")


def _without_flag(spec: Any) -> Any:
    """A property without `required: true` or `false`, which no JSON Schema of today has."""
    if isinstance(spec, Mapping) and isinstance(spec.get("required"), bool):
        return {key: value for key, value in spec.items() if key != "required"}
    return spec


def _with_flagged(schema: dict[str, Any], properties: Any) -> dict[str, Any]:
    flagged = [
        name
        for name, spec in (properties.items() if isinstance(properties, Mapping) else ())
        if isinstance(spec, Mapping) and spec.get("required") is True
    ]
    named = schema.get("required", [])
    if flagged and isinstance(named, list):
        schema["required"] = [*named, *(name for name in flagged if name not in named)]
    return schema


def _type(node: ast.expr) -> dict[str, Any]:
    if isinstance(node, ast.Constant) and node.value is None:
        return {"type": "null"}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _type(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([_type(node.left), _type(node.right)])
    if isinstance(node, ast.Attribute):  # typing.List
        return _type(ast.Name(node.attr))
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _generic(_word(node.value), inner)
    word = _word(node)
    if word == "any":
        return {}
    return {"type": _WORDS[word]} if word in _WORDS else _unknown(word)


def _generic(word: str, inner: list[ast.expr]) -> dict[str, Any]:
    if word == "literal":
        return {"enum": [json_value(ast.literal_eval(node)) for node in inner]}
    if word == "optional" and len(inner) == 1:
        return _union([_type(inner[0]), {"type": "null"}])
    if word == "union":
        return _union([_type(node) for node in inner])
    if word in _OBJECTS and len(inner) == 2:
        values = _type(inner[1])
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    if word == "tuple" and not (isinstance(inner[-1], ast.Constant) and inner[-1].value is ...):
        count = len(inner)
        return {"type": "array", "items": _union([_type(n) for n in inner]), "minItems": count, "maxItems": count}
    if word in _ARRAYS and (len(inner) == 1 or word == "tuple"):
        return {"type": "array", "items": _type(inner[0])}
    return _unknown(word)


def _word(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr.lower()
    return node.id.lower() if isinstance(node, ast.Name) else _unknown(ast.dump(node)[:40])


def _union(options: list[dict[str, Any]]) -> dict[str, Any]:
    """One option stays itself, unions in unions are flattened, and any value swallows the rest."""
    flat: list[dict[str, Any]] = []
    for option in options:
        flat += [one for one in option.get("anyOf", [option]) if one not in flat]
    if {} in flat:
        return {}
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _unknown(word: str) -> Any:
    raise ValueError(f"{word} is not a type")
