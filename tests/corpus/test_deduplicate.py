"""Near-duplicates and contamination: the index against brute force, and which of two alike requests stays."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from needle import config
from needle.corpus import catalogue
from needle.corpus.deduplicate import Duplicates, EvaluationRequests, Index, Similarity, bands, jaccard, masked
from needle.schema import Example, Tool, ToolCall

RECORDED = catalogue.load(Path(__file__).resolve().parents[2] / "data" / "teacher_corpus")
QUERIES = list(dict.fromkeys(example.query for example in RECORDED.examples))
MANY = settings(max_examples=150, deadline=None, derandomize=True)


def similarity(*overrides: str) -> Similarity:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        changes = [f"validation.similarity.{override}" for override in overrides]
        return config.build(compose("validation/default", changes).validation.similarity)


SHIPPED = similarity()


# The index


@MANY
@given(st.floats(0.3, 1.0), st.integers(16, 512), st.floats(0.5, 0.999))
def test_bands_hold_the_promised_recall_with_the_fewest_candidates(threshold: float, permutations: int, recall: float):
    n, rows = bands(threshold, permutations=permutations, recall_min_frac=recall)

    def found(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (permutations // rows)

    assert n * rows <= permutations
    assert n >= 2
    assert rows == 1 or found(rows) >= recall
    if rows < permutations // 2:
        assert all(found(more) < recall for more in range(rows + 1, permutations // 2 + 1))


def varied(queries: Sequence[str]) -> list[str]:
    """Each request, without its last word, with one more, and with its first two words exchanged."""
    words = [query.split() for query in queries]
    shorter = [" ".join(one[:-1]) for one in words if len(one) > 1]
    swapped = [" ".join([*one[1::-1], *one[2:]]) for one in words]
    return [*queries, *shorter, *(f"{query} please" for query in queries), *swapped]


def test_the_index_finds_what_brute_force_finds():
    queries = varied(QUERIES[::60])
    index = Index(SHIPPED.same_answer_min_frac, SHIPPED)
    found = set()
    for i, query in enumerate(queries):
        sketch = SHIPPED.sketch(query)
        found |= {(j, i) for _, j in index.similar(sketch)}
        index.add(sketch)
    shingles = [SHIPPED.shingles(query) for query in queries]
    true = {
        (i, j)
        for i, j in combinations(range(len(queries)), 2)
        if jaccard(shingles[i], shingles[j]) >= SHIPPED.same_answer_min_frac
    }
    assert len(true) > 200
    assert found <= true  # exactly compared: no pair is invented
    assert len(found) >= SHIPPED.recall_min_frac * len(true)


@MANY
@given(st.lists(st.text("ab c1é'.", max_size=12), min_size=2, max_size=6))
def test_equal_words_are_found_first_whatever_case_and_punctuation(queries: list[str]):
    index = Index(0.5, SHIPPED)
    for query in queries:
        index.add(SHIPPED.sketch(query))
    for i, query in enumerate(queries):
        found = index.similar(SHIPPED.sketch(f" {query.upper()}!"))
        if SHIPPED.shingles(query) == SHIPPED.shingles(f" {query.upper()}!"):
            first = next(j for j, other in enumerate(queries) if SHIPPED.shingles(other) == SHIPPED.shingles(query))
            assert found[0] == (1.0, first)
            assert first <= i


def test_sketches_do_not_depend_on_the_process():
    code = (
        "from needle.corpus.deduplicate import Similarity\n"
        "s = Similarity(3, 64, 0.9, 0.5, 0.9, 0.5, 8, 7)\n"
        "print(s.sketch('turn the kitchen lights off at six').minhash.hashvalues.tolist())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=config.CONF.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    assert printed.pop().strip("[]\n")


# Duplicates

TOOLS = {
    name: Tool.from_dict({"name": name, "parameters": {"type": "object", "properties": {"x": {}}}})
    for name in ("lock", "open")
}


def example(query: str, *calls: tuple[str, object], tools: Sequence[str] = ("lock", "open"), id: str = "") -> Example:
    made = tuple(ToolCall(name, {"x": x}) for name, x in calls)
    return Example(id or query, query, tuple(TOOLS[name] for name in tools), made, "single" if calls else "none")


def twin(first: Example, second: Example, settings: Similarity = SHIPPED) -> str | None:
    duplicates = Duplicates(settings)
    duplicates.add(first, settings.sketch(first.query))
    found = duplicates.earlier(second, settings.sketch(second.query))
    return found and found.of


LONG = "please lock the front door of the house at the lake before everybody goes to bed tonight"


@pytest.mark.parametrize(
    ("first", "second", "duplicate"),
    [
        (example("Lock the door!", ("lock", "door")), example("lock the  door", ("lock", "Door.")), True),
        (example(LONG, ("lock", 1)), example(LONG + " dear", ("lock", 1)), True),
        (example("wake me at six", ("lock", 6)), example("wake me at seven", ("lock", 7)), False),
        (example(LONG, ("lock", 1)), example(LONG.replace("lake", "sea"), ("lock", 2)), False),
        (example("lock it", ("lock", 1)), example("lock it", ("lock", 2)), True),  # one of them is wrong
        (example("lock it", ("lock", 1)), example("lock it", tools=["open"]), False),  # other tools: a contrast
        (example("lock it", tools=["open"]), example("lock it", ("lock", 1)), False),
        (example("skip this song", tools=["open"]), example("skip this song", tools=["lock"]), True),
        (example("do both", ("lock", 1), ("open", 1)), example("do both!", ("open", 1), ("lock", 1)), True),
        (example("🎂"), example("👋"), False),
        (example("🎂"), example(" 🎂"), True),
    ],
)
def test_what_a_duplicate_is(first: Example, second: Example, duplicate: bool):
    assert twin(first, second) == (first.id if duplicate else None)


def test_equal_answers_need_less_likeness():
    first = "turn the lights in the kitchen off in twenty minutes"
    second = "turn the lights in the kitchen off"
    likeness = jaccard(SHIPPED.shingles(first), SHIPPED.shingles(second))
    between = similarity(f"same_answer_min_frac={likeness - 0.01}", f"other_answer_min_frac={likeness + 0.01}")
    assert twin(example(first, ("lock", 1)), example(second, ("lock", 1)), between) == first
    assert twin(example(first, ("lock", 1)), example(second, ("lock", 2)), between) is None


def test_the_thresholds_are_ordered():
    with pytest.raises(config.ConfigError, match=r"same_answer_min_frac=0\.95 is above"):
        similarity("same_answer_min_frac=0.95")


# Contamination


def test_numbers_are_masked():
    assert masked("Set a timer for 25 minutes!") == masked("set a timer for twenty-five minutes")
    assert masked("order 4410") != masked("order more")


def test_whole_requests_are_known_in_each_set_that_holds_them():
    requests = EvaluationRequests({"test": ["wake me at 6", "stop"], "other": ["Wake me at six thirty."]}, SHIPPED)
    found = requests.whole("wake me at 7:15")
    assert [(one.evaluation, one.request) for one in found] == [
        ("test", "wake me at 6"),
        ("other", "Wake me at six thirty."),
    ]
    assert requests.whole("wake him at 7") == []
    assert requests.whole("Stop.")[0].shared == "stop"


words = st.lists(st.sampled_from(["a1", "be", "see", "day", "ex", "5"]), min_size=1, max_size=7).map(" ".join)


@MANY
@given(st.lists(words, min_size=1, max_size=5), words)
def test_shared_ngrams_are_those_of_brute_force(evaluation: list[str], query: str):
    settings = replace(SHIPPED, contamination_ngram_words=3)
    found = EvaluationRequests({"test": evaluation}, settings).ngram(query)

    def grams(text: str) -> set[str]:
        masks = masked(text)
        return {" ".join(masks[i : i + 3]) for i in range(len(masks) - 2)}

    if not grams(query):
        assert found is None
        return
    shared = grams(query) & {gram for request in evaluation for gram in grams(request)}
    assert bool(found) == bool(shared)
    for overlap in found or ():
        assert overlap.shared in shared
        assert overlap.shared in grams(overlap.request)


def test_alike_requests_are_near():
    requests = EvaluationRequests({"test": QUERIES[::50]}, SHIPPED)
    held = next(query for query in QUERIES[::50] if len(query.split()) > 12)
    (found,) = requests.near(SHIPPED.sketch(held + " now"))
    assert (found.evaluation, found.request) == ("test", held)
    assert requests.near(SHIPPED.sketch("nothing like any of these requests stands in there")) == []
