"""Symbolic examples are right answers that only the prompt tells, and mean nothing."""

from collections import Counter
from pathlib import Path

import pytest

from needle.corpus.catalogue import load
from needle.corpus.symbolic import NONE_FRAC, symbolic_examples
from needle.schema import Example

COUNT = 1500


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(symbolic_examples(range(COUNT), tools_max=6, seed=0))


def names_of(example: Example) -> dict[str, tuple[str, str]]:
    """Of each shown tool: its name, and the last word of its description, by which a request may name it."""
    return {tool.name: (tool.name, tool.description.split()[-1].rstrip(".")) for tool in example.tools}


def test_every_example_is_valid(examples: list[Example]):
    assert [problem for example in examples for problem in example.problems()] == []
    assert len({example.id for example in examples}) == COUNT


def test_there_are_calls_of_every_sort(examples: list[Example]):
    kinds = Counter(example.kind for example in examples)
    assert set(kinds) == {"single", "multi", "repeat", "none"}
    assert kinds["none"] / COUNT == pytest.approx(NONE_FRAC, abs=0.03)
    assert min(kinds.values()) > COUNT / 40
    assert {len(example.tools) for example in examples} == set(range(1, 7))
    called = [
        (schema, example.calls)
        for example in examples
        for tool in example.tools
        for schema in tool.properties.values()
        if example.calls
    ]
    assert {schema["type"] for schema, _ in called} == {"string", "integer"}
    assert any("enum" in schema for schema, _ in called)


def test_every_value_is_quoted_in_the_request_as_the_answer_has_it(examples: list[Example]):
    values = [(v, e.query) for e in examples for call in e.calls for v in call.arguments.values()]
    assert len(values) > COUNT
    assert all(str(value) in query for value, query in values)


def test_the_request_names_the_called_tools_and_no_other(examples: list[Example]):
    """By name or by the word of its description; what is wanted of none of the tools is named as none of them is."""
    by_name = by_keyword = 0
    for example in examples:
        words = set(example.query.replace(":", " ").replace(",", " ").replace(";", " ").replace(". ", " ").split())
        called = {call.name for call in example.calls}
        for tool, names in names_of(example).items():
            assert bool(words & set(names)) == (tool in called), (example.query, names)
        by_name += bool(called & words)
        by_keyword += bool(called) and not called & words
    assert min(by_name, by_keyword) > COUNT / 3


def test_an_example_depends_on_seed_and_number_only(examples: list[Example]):
    fewer = list(symbolic_examples(range(50), tools_max=6, seed=0))
    assert fewer == examples[:50]
    for part in range(3):
        assert list(symbolic_examples(range(part, 50, 3), tools_max=6, seed=0)) == fewer[part::3]
    other = list(symbolic_examples(range(50), tools_max=6, seed=1))
    assert not {example.query for example in other} & {example.query for example in fewer}


def test_nothing_is_taken_from_the_recorded_corpus(examples: list[Example], repository: Path):
    catalogue = load(repository / "data" / "teacher_corpus")
    recorded = {tool.name for tools in catalogue.tools.values() for tool in tools}
    assert len(recorded) > 500
    assert not recorded & {tool.name for example in examples for tool in example.tools}
    assert not {e.query for e in catalogue.examples} & {e.query for e in examples}
