"""A stand-in for a model's understanding: writes requests by a fixed form, and answers requests of that form.

The form names each argument ("... with minutes 20 with label pasta and then ..."), so that the same few rules can write
and read it. It errs now and then, always the same way for the same question: an answer of another length, a value that
the request does not hold, a cut-off text. Nothing of it is natural language; what it is good for is that whole runs can
be compared, and that every check has something to find.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

VALUES = [
    "amber",
    "basil",
    "cedar",
    "delta",
    "ember",
    "fern",
    "garnet",
    "hazel",
    "iris",
    "juniper",
    "kelp",
    "lotus",
    "maple",
    "nectar",
    "opal",
    "pine",
    "quartz",
    "reed",
    "sage",
    "thyme",
    "umber",
    "violet",
    "willow",
    "yarrow",
    "zinnia",
]
CHAT = ("how old is the moon", "tell me a joke about bees", "why do cats purr so loudly", "is pluto still a planet")
PADDING = [
    "when",
    "you",
    "get",
    "a",
    "moment",
    "please",
    "since",
    "i",
    "am",
    "busy",
    "with",
    "other",
    "things",
    "today",
    "and",
    "cannot",
    "do",
    "it",
    "myself",
    "right",
    "now",
]
THEN = " and then "
ERRORS = {"ungrounded": 0.05, "extra_call": 0.03, "placeholder": 0.02, "copied": 0.04, "broken": 0.02}
CUT_FRAC = 0.02
LABEL_ERROR_FRAC = 0.06


def author(prompt: str, rng: random.Random) -> str:
    """The JSON text that a question of needle.corpus.author asks for."""
    told = _invented_tools(prompt, rng) if prompt.startswith("Area:") else _requests(prompt, rng)
    text = json.dumps(told, ensure_ascii=False)
    return text[: int(len(text) * 0.8)] if rng.random() < CUT_FRAC else text


def is_authoring(prompt: str) -> bool:
    return prompt.startswith(("Area:", "Domain:"))


def _requests(prompt: str, rng: random.Random) -> dict[str, Any]:
    lines = prompt.splitlines()
    tools = [json.loads(line) for line in lines if line.startswith('{"name"')]
    count = int(_first(r"Write (\d+) requests", prompt))
    kind = _first(r"Kind: (\w+)\.", prompt)
    low, high = map(int, re.search(r"Length: (\d+) to (\d+) words", prompt).groups())
    requests: list[dict[str, Any]] = []
    for _ in range(count):
        requests.append(_request(tools, kind, rng.randint(low, high), rng))
        if rng.random() < ERRORS["copied"]:
            requests[-1] = dict(requests[rng.randrange(len(requests))])
    return {"requests": requests}


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return found[1]


def _request(tools: Sequence[Mapping[str, Any]], kind: str, words: int, rng: random.Random) -> dict[str, Any]:
    if kind in ("none", "near_miss", "no_tools") or not tools:
        query = _padded(f"{rng.choice(CHAT)} {rng.choice(VALUES)} {rng.choice(VALUES)}", words, rng)
        return {"query": query, **({} if kind != "none" or rng.random() < 0.9 else {"calls": []})}
    first = rng.choice(tools)
    chosen = [first]
    if kind == "multi":
        chosen += rng.sample([tool for tool in tools if tool is not first] or [first], 1)
    if kind == "repeat":
        chosen.append(first)
    long = kind == "long_values"
    calls = [(tool["name"], _arguments(tool, rng, long=long)) for tool in chosen]
    query = THEN.join(_phrase(tool, arguments) for tool, (_, arguments) in zip(chosen, calls, strict=True))
    written = [{"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)} for name, arguments in calls]
    _err(written, calls, rng)
    return {"query": _padded(query, words, rng), "calls": written}


def _err(written: list[dict[str, Any]], calls: Sequence[tuple[str, dict[str, Any]]], rng: random.Random) -> None:
    """Now and then one thing is wrong."""
    texts = [key for key, value in calls[0][1].items() if isinstance(value, str)]
    draw = rng.random()
    for error, frac in ERRORS.items():
        if (draw := draw - frac) >= 0:
            continue
        if error == "extra_call":
            written.append(dict(written[0]))
        elif error == "broken":
            written[0]["arguments"] = written[0]["arguments"][:-1]
        elif texts and error in ("ungrounded", "placeholder"):
            value = "somewhere else entirely" if error == "ungrounded" else "<value>"
            written[0]["arguments"] = json.dumps({**calls[0][1], texts[0]: value})
        return


def _padded(query: str, words: int, rng: random.Random) -> str:
    missing = words - len(query.split())
    if missing <= 0:
        return query
    start = rng.randrange(len(PADDING))
    return " ".join([(PADDING * 4)[start + i] for i in range(missing)]) + " " + query


def _arguments(tool: Mapping[str, Any], rng: random.Random, *, long: bool) -> dict[str, Any]:
    schema = tool["parameters"]
    properties, required = schema.get("properties", {}), schema.get("required", ())
    simple = [name for name, child in properties.items() if _can_say(child)]
    names = [name for name in properties if name in required or (name in simple and rng.random() < 0.4)]
    if long:
        names += [n for n in simple if n not in names and properties[n].get("type") == "string"][:1]
    return {name: _value(properties[name], rng, long=long) for name in names}


def _can_say(schema: Mapping[str, Any]) -> bool:
    return "enum" in schema or schema.get("type") in ("string", "integer", "number", "boolean", "array")


def _value(schema: Mapping[str, Any], rng: random.Random, *, long: bool) -> Any:
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return [_value(schema.get("items", {"type": "string"}), rng, long=False)]
    if kind in ("integer", "number"):
        low = int(schema.get("minimum", 1))
        return rng.randint(low, int(schema.get("maximum", low + 90)))
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "object":
        return {}
    return " ".join(rng.sample(VALUES, 8 if long and "enum" not in schema else rng.randint(1, 2)))


def _phrase(tool: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    said = [f"with {_spoken(name)} {_said(value)}" for name, value in arguments.items()]
    return " ".join([_title(tool), *said])


def _title(tool: Mapping[str, Any]) -> str:
    return _spoken(tool["name"])


def _spoken(name: str) -> str:
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return re.sub(r"[^a-z0-9]+", " ", apart.lower()).strip()


def _said(value: Any) -> str:
    if isinstance(value, list):
        return _said(value[0]) if value else "nothing"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def label(query: str, tools: Sequence[Mapping[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """The calls that a request of the form asks for; none for any other."""
    calls = []
    for part in query.split(THEN):
        titles = [tool for tool in tools if _says(part, tool)]
        if not titles:
            continue
        tool = max(titles, key=lambda tool: len(_title(tool)))
        calls.append({"name": tool["name"], "arguments": _heard(part, tool)})
    if calls and rng.random() < LABEL_ERROR_FRAC:
        calls[0]["arguments"] = dict(list(calls[0]["arguments"].items())[:-1])
    return calls


def is_request(query: str, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it was written here: it names a tool, or is one of the requests for nothing."""
    return any(chat in query for chat in CHAT) or any(_says(query, tool) for tool in tools)


def _says(part: str, tool: Mapping[str, Any]) -> bool:
    return re.search(rf"(?<!\w){re.escape(_title(tool))}(?= with |{THEN}|$)", part) is not None


def _heard(part: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, schema in tool["parameters"].get("properties", {}).items():
        match = re.search(rf" with {re.escape(_spoken(name))} (.+?)(?= with |$)", part)
        if match:
            found[name] = _meant(match[1], schema)
    return found


def _meant(text: str, schema: Mapping[str, Any]) -> Any:
    if "enum" in schema:
        return next((member for member in schema["enum"] if _said(member) == text), text)
    kind = schema.get("type")
    if kind == "array":
        return [_meant(text, schema.get("items", {}))]
    if kind in ("integer", "number") and re.fullmatch(r"-?\d+", text):
        return int(text)
    if kind == "boolean":
        return text == "yes"
    return {} if kind == "object" else text


def _invented_tools(prompt: str, rng: random.Random) -> dict[str, Any]:
    area = _first(r"Area: (.+)", prompt)
    slug = re.sub(r"[^a-z0-9]+", "_", area.lower()).strip("_")
    fewest = int(_first(r"Write (\d+) to", prompt))
    verbs = rng.sample(
        [
            "add",
            "list",
            "rename",
            "archive",
            "weigh",
            "measure",
            "export",
            "pause",
            "resume",
            "share",
            "inspect",
            "repair",
        ],
        fewest,
    )
    parameters = {
        "type": "object",
        "properties": {
            "item": {"type": "string", "description": "What it is about"},
            "amount": {"type": "integer", "minimum": 1, "maximum": 99},
            "mode": {"type": "string", "enum": ["gentle", "strict"]},
        },
        "required": ["item"],
    }
    tools = [
        {
            "name": f"{verb}_{slug}_{i}"[:60],
            "description": f"{verb.capitalize()} one thing of {area}, {rng.choice(VALUES)} variant {i}.",
            "parameters": json.dumps(parameters),
        }
        for i, verb in enumerate(verbs)
    ]
    return {"domain": slug[:38], "tools": tools}
