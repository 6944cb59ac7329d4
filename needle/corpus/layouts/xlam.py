"""xLAM and APIGen: query, tools and answers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from needle.corpus.layouts.literals import listed
from needle.corpus.layouts.schemas import JSON_TYPES, flat_parameters, is_schema, tool
from needle.corpus.layouts.turns import call, drafted
from needle.schema import Example

# What the layout of the first Needle has and xLAM has not.
_OTHERS_KEYS = frozenset({"model", "reasoning"})


def convert(record: Mapping[str, Any]) -> Example:
    """Salesforce/xlam-function-calling-60k (Liu et al. 2024, APIGen, https://arxiv.org/abs/2406.18518).

        {"query": "Is it raining in Oslo?",
         "tools": "[{\\"name\\": \\"rain\\", \\"description\\": \\"...\\", \\"parameters\\": {\\"city\\":
                    {\\"type\\": \\"str\\", \\"description\\": \\"...\\", \\"default\\": \\"Bergen\\"}}}]",
         "answers": "[{\\"name\\": \\"rain\\", \\"arguments\\": {\\"city\\": \\"Oslo\\"}}]"}

    Lists may be texts or lists. Types are Python's (`needle.corpus.layouts.schemas`); a parameter is required unless
    its type says "optional" or it has a default. Values are taken as they are: "5" for an int is refused.
    """
    flat = partial(flat_parameters, required_unless_said=True)
    tools = [tool(one, flat) for one in listed(record.get("tools"), "tools")]
    calls = [call(one) for one in listed(record.get("answers"), "answers")]
    return drafted(record.get("query"), tools, calls)


def fits(record: Mapping[str, Any]) -> bool:
    return has_columns(record) and not (_OTHERS_KEYS & set(record) or json_schemas(record))


def has_columns(record: Mapping[str, Any]) -> bool:
    lists = all(isinstance(record.get(key), (str, list)) for key in ("tools", "answers"))
    return lists and isinstance(record.get("query"), str)


def json_schemas(record: Mapping[str, Any]) -> bool:
    """Whether a tool has a whole schema, or a parameter that says `required`."""
    flat = [tool.get("parameters") for tool in _tools(record)]
    return any(
        is_schema(parameters) or any(isinstance(spec, Mapping) and "required" in spec for spec in parameters.values())
        for parameters in flat
        if isinstance(parameters, Mapping)
    )


def python_types(record: Mapping[str, Any]) -> bool:
    """Whether a parameter has a type that is not one of JSON Schema's."""
    flat = [tool.get("parameters") for tool in _tools(record)]
    specs = [spec for parameters in flat if isinstance(parameters, Mapping) for spec in parameters.values()]
    types = [spec.get("type") for spec in specs if isinstance(spec, Mapping)]
    return any(isinstance(kind, str) and kind not in JSON_TYPES for kind in types)


def _tools(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    try:
        return [tool for tool in listed(record.get("tools"), "tools") if isinstance(tool, Mapping)]
    except ValueError:
        return []
