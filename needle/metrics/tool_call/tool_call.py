"""Tool-call metrics for `evaluate.load`; the definitions are those of `needle.metrics.matching`."""

# Never `import a, b`: the loader reads these lines one by one to find what the script needs.
import json

import datasets
import evaluate

from needle.metrics import matching
from needle.schema import Tool, ToolCall

_DESCRIPTION = "Whether a model answers with the right calls: whole answers, names, arguments, abstention."
_CITATION = ""
_INPUTS = """
Args:
    predictions: texts; each the JSON of a list of {"name", "arguments"}, or whatever the model wrote instead.
    references: texts; each the JSON of {"calls": [...], "tools": [...], "kind"?, "domain"?, "split"?}.
    group_by: any of "kind", "tools", "domain", "seen"; each adds "by_GROUP": {value: {"n", metrics}}.
Returns:
    {"n": examples, "call_exact_frac": ..., ...}, see needle.metrics.matching.METRICS. None: nothing to count.
"""


class ToolCallMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, group_by=()):
        records = [json.loads(reference) for reference in references]
        judged = [_judge(*pair) for pair in zip(predictions, records, strict=True)]
        result = {"n": len(judged), **matching.fractions(judged)}
        for group in group_by:
            members = {}
            for record, counts in zip(records, judged, strict=True):
                members.setdefault(_group(group, record), []).append(counts)
            result[f"by_{group}"] = {
                value: {"n": len(members[value]), **matching.fractions(members[value])} for value in sorted(members)
            }
        return result


def _judge(prediction, record):
    gold = [ToolCall.from_dict(call) for call in record["calls"]]
    tools = [Tool.from_dict(tool) for tool in record["tools"]]
    return matching.judge(matching.parse(prediction), gold, tools)


def _group(group, record):
    return matching.group_of(
        group,
        kind=record.get("kind", ""),
        n_tools=len(record["tools"]),
        domain=record.get("domain", ""),
        split=record.get("split", ""),
    )
