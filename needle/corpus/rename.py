"""Other names for tools and parameters, so that a student reads the schema instead of remembering names."""

import re
from collections.abc import Sequence

import numpy as np

from needle.schema import Example, Tool, ToolCall

# Words of names that may stand for one another, a group a line.
_SYNONYMS = """
create add make new
delete remove erase
get fetch show retrieve
set change update
find search lookup
start begin launch
stop end halt
send dispatch
list enumerate
open access
cancel revoke
book reserve
check inspect verify
calculate compute work_out
convert translate_units
schedule plan
turn switch
play put_on
report file
adjust tweak
name label
title heading
date day
location place
amount quantity
message text
query term
duration length
time moment
recipient to
city town
note remark
"""
_GROUPS = {word: tuple(line.split()) for line in _SYNONYMS.strip().splitlines() for word in line.split()}
_STYLES = ("snake", "camel", "pascal", "kebab", "dotted", "scream")
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))


def rename(
    example: Example,
    *,
    rng: np.random.Generator,
    tools: float,
    parameters: float,
    opaque: float,
    drop_description: float,
    drop_optional: float,
    shuffle_parameters: float,
) -> Example:
    """Applies each change with its probability; one naming style serves all tools of the example.

    An opaque tool name keeps its description, and an opaque parameter stands only where the tool has a single one,
    since a student could not know what it means otherwise.
    """
    style = _STYLES[int(rng.integers(len(_STYLES)))] if rng.random() < max(tools, parameters) else None
    hide_names = rng.random() < opaque
    new_tools: list[Tool] = []
    taken: set[str] = set()
    changes: dict[str, tuple[str, dict[str, str]]] = {}
    used = {key for call in example.calls for key in call.arguments}
    for tool in example.tools:
        name = tool.name
        if hide_names and tool.description:
            name = _opaque(rng)
        elif style and rng.random() < tools:
            name = _styled(_synonyms(_words(name), rng), style)
        if not name or name in taken:
            name = tool.name if tool.name not in taken else _opaque(rng)
        taken.add(name)
        keep_text = hide_names or not tool.description or rng.random() >= drop_description
        keys = {key: key for key in tool.properties}
        if style and rng.random() < parameters:
            keys = _renamed_keys(tuple(keys), style, rng)
        if hide_names and len(keys) == 1 and rng.random() < opaque:
            keys = {key: _opaque(rng) for key in keys}
        order = list(tool.properties)
        if rng.random() < drop_optional:
            order = [key for key in order if key in tool.required or key in used]
        if rng.random() < shuffle_parameters:
            order = [order[i] for i in rng.permutation(len(order))]
        schema = {**tool.parameters, "properties": {keys[key]: tool.properties[key] for key in order}}
        if "required" in schema:
            schema["required"] = [keys[key] for key in tool.required]
        new_tools.append(Tool(name, tool.description if keep_text else "", schema))
        changes[tool.name] = (name, keys)
    calls = tuple(
        ToolCall(changes[call.name][0], {changes[call.name][1][key]: value for key, value in call.arguments.items()})
        for call in example.calls
    )
    return example.replace(tools=tuple(new_tools), calls=calls)


def _words(name: str) -> list[str]:
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return [word.lower() for word in re.findall(r"[A-Za-z0-9]+", spaced)]


def _synonyms(words: Sequence[str], rng: np.random.Generator) -> list[str]:
    chosen = []
    for word in words:
        group = _GROUPS.get(word)
        word = group[int(rng.integers(len(group)))] if group and rng.random() < 0.5 else word
        chosen += word.split("_")
    return chosen


def _styled(words: Sequence[str], style: str) -> str:
    if style == "camel":
        return words[0] + "".join(word.capitalize() for word in words[1:])
    if style == "pascal":
        return "".join(word.capitalize() for word in words)
    if style == "scream":
        return "_".join(words).upper()
    if style == "dotted" and len(words) > 1:
        return words[-1] + "." + "_".join(words[:-1])
    return {"kebab": "-"}.get(style, "_").join(words)


def _renamed_keys(keys: Sequence[str], style: str, rng: np.random.Generator) -> dict[str, str]:
    style = style if style in ("snake", "camel", "kebab") else "snake"
    new = {key: _styled(_synonyms(_words(key), rng), style) if _words(key) else key for key in keys}
    return new if len(set(new.values())) == len(new) else {key: key for key in keys}


def _opaque(rng: np.random.Generator) -> str:
    tail = "".join(rng.choice(_LETTERS, 3))
    return ("tool_", "fn_", "f", "action_")[int(rng.integers(4))] + tail
