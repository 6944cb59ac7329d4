"""The recorded corpus as tables and as text to read: what it holds, and what augmentation makes of one request.

Cost: seconds, to read and check every record.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from needle.corpus import catalogue
from needle.corpus.catalogue import Catalogue
from needle.corpus.mix import Mixer, evaluation, generator, has_pool
from needle.corpus.values import _span
from needle.data.settings import DataSettings
from needle.errors import DataError
from needle.schema import Example, Tool
from needle.text.render import render_calls, render_tools

STYLE = "signature"


def load(data: DataSettings) -> Catalogue:
    """The recorded answers that a data setting stands on. Raises DataError where there are none."""
    return catalogue.load(Path(data.corpus))


def table(found: Catalogue, data: DataSettings) -> pd.DataFrame:
    """A line a request: id, domain, kind, split, words, calls, arguments, texts (arguments that are texts) and copied
    (texts that stand in the request, once and whole)."""
    lines = []
    for example in found.examples:
        values = [value for call in example.calls for value in call.arguments.values()]
        texts = [value for value in values if isinstance(value, str)]
        lines.append(
            {
                "id": example.id,
                "domain": example.domain,
                "kind": example.kind,
                "split": data.split.assign(example),
                "words": len(example.query.split()),
                "calls": len(example.calls),
                "arguments": len(values),
                "texts": len(texts),
                "copied": sum(_span(example.query, text) is not None for text in texts),
                "query": example.query,
            }
        )
    return pd.DataFrame(lines)


def tools_table(found: Catalogue) -> pd.DataFrame:
    """A line a tool: domain, name, parameters, required, choices (parameters with a closed list), description."""
    return pd.DataFrame(
        [
            {
                "domain": domain,
                "name": tool.name,
                "parameters": len(tool.properties),
                "required": len(tool.required),
                "choices": sum("enum" in schema for schema in tool.properties.values()),
                "description": tool.description,
            }
            for domain, tools in found.tools.items()
            for tool in tools
        ]
    )


def text(example: Example) -> str:
    """An example as a student reads and writes it: tools, request, answer."""
    tools = render_tools(example.tools, style=STYLE) or "(none)"
    return f"[{example.kind}]\n{tools}\n> {example.query}\n= {answer(example)}"


def answer(example: Example) -> str:
    return "".join(part for part, _ in render_calls(example.calls, example.tools))


def shown(found: Catalogue, data: DataSettings, *, split: str, count: int) -> list[Example]:
    """So many of a split's requests of the data's slice, as students are asked them in evaluation: other tools beside
    the right ones. Spread over the split, which is ordered by domain.

    Raises:
        DataError: the split is empty.
    """
    rule = data.split
    some = [e for e in found.examples if rule.assign(e) == split and (split == "unseen" or rule.uses(e.domain))]
    if not some:
        raise DataError(f"the {split} split of {data.corpus} holds no request of this slice")
    some = [some[index * len(some) // min(count, len(some))] for index in range(min(count, len(some)))]
    return [example.replace(split=split) for example in evaluation(some, _tools(found, data, split), data)]


def _tools(found: Catalogue, data: DataSettings, split: str) -> dict[str, tuple[Tool, ...]]:
    """Of the slice; requests of unseen domains meet every tool."""
    if split == "unseen":
        return found.tools
    unseen = data.split.unseen_domains
    return {name: tools for name, tools in found.tools.items() if data.split.uses(name) and name not in unseen}


def variations(found: Catalogue, data: DataSettings, *, request: str, count: int) -> list[Example]:
    """The first copies that training would see of a request.

    Raises:
        DataError: no training request of the slice has this id.
    """
    rule = data.split
    train = [e for e in found.examples if rule.assign(e) == "train" and rule.uses(e.domain)]
    mixer = Mixer(replace(data, answers="first"), train=train, tools=_tools(found, data, "train"))
    example = next((one for one in train if one.id == request), None)
    if example is None:
        raise DataError(f"{request!r} is no training request of this slice; ids are in needle.reporting.portrait.table")
    tools = mixer.tools if has_pool(example, mixer.seen) else None
    return [
        data.augment(example, rng=generator(data.seed, example.id, copy), tools=tools, values=mixer.values)
        for copy in range(count)
    ]


def variations_table(example: Example, copies: Sequence[Example]) -> pd.DataFrame:
    """The recorded request above its copies: request, tools shown, answer."""
    lines = [(one.query, ", ".join(tool.name for tool in one.tools), answer(one)) for one in (example, *copies)]
    index = ["as recorded", *(f"copy {number}" for number in range(len(copies)))]
    return pd.DataFrame(lines, columns=["request", "tools shown", "answer"], index=index)
