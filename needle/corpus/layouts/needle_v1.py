"""The public Needle project's data set and fine-tuning files."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from needle.corpus.layouts import xlam
from needle.corpus.layouts.literals import listed
from needle.corpus.layouts.schemas import flat_parameters, tool
from needle.corpus.layouts.turns import call, drafted
from needle.schema import Example


def convert(record: Mapping[str, Any]) -> Example:
    """Cactus-Compute/tool-calls (its card, and the code that reads it, are in https://github.com/cactus-compute/needle:
    dataset_readme.md, needle/dataset/), and the fine-tuning JSONL of the same project (doc/finetuning.md).

        {"query": "lamp off please",
         "tools": "[{\\"name\\": \\"lamp\\", \\"description\\": \\"...\\", \\"parameters\\": {\\"state\\":
                    {\\"type\\": \\"string\\", \\"description\\": \\"...\\", \\"required\\": true}}}]",
         "answers": "[{\\"name\\": \\"lamp\\", \\"arguments\\": {\\"state\\": \\"off\\"}}]",
         "source": "...", "model": "..."}

    Lists may be texts (data set) or lists (fine-tuning). Parameters are flat, or a JSON Schema; a flat one is required
    only where it says `"required": true`. `answers` is empty where nothing is to be called. `reasoning` and `system`
    are left away: an Example has no place for them.
    """
    flat = partial(flat_parameters, required_unless_said=False)
    tools = [tool(one, flat) for one in listed(record.get("tools"), "tools")]
    calls = [call(one) for one in listed(record.get("answers"), "answers")]
    return drafted(record.get("query"), tools, calls)


def fits(record: Mapping[str, Any]) -> bool:
    return xlam.has_columns(record) and (not xlam.fits(record) or not xlam.python_types(record))
