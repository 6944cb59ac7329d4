"""Requests that say nearly the same, and training requests that an evaluation set holds.

Similarity is the Jaccard index of two requests' sets of n-grams of 1 to `shingle_words` words. MinHash with banding
(Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3) finds candidates, each of which is then
compared exactly, so that chance can lose a pair but never invent one. 20,000 requests take about 10 s.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, cast

from datasketch import MinHash, MinHashLSH
from pydantic import Field

from needle.corpus.grounding import words_of
from needle.corpus.number_words import NUMBER_WORDS
from needle.metrics.matching import value_key
from needle.schema import Example, ToolCall

Frac = Annotated[float, Field(gt=0, le=1)]
MASK = "#"


@dataclass(frozen=True)
class Similarity:
    """When two requests are one, and when a training request is known from an evaluation set.

    Two requests with equal answers are near-duplicates from `same_answer_min_frac` on: the second teaches nothing new.
    With other answers they are from `other_answer_min_frac` on: requests that differ in a value only ("wake me at six",
    "wake me at seven") teach copying and stay. Requests of which one calls a tool that the other does not show are
    never duplicates: alike words with other tools are a contrast that must be learned.
    """

    shingle_words: Annotated[int, Field(ge=1, le=8)]
    permutations: Annotated[int, Field(ge=16, le=1024)]
    recall_min_frac: Annotated[float, Field(gt=0, lt=1)]
    same_answer_min_frac: Frac
    other_answer_min_frac: Frac
    contamination_min_frac: Frac
    contamination_ngram_words: Annotated[int, Field(ge=3, le=50)]
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]

    def __post_init__(self) -> None:
        if self.same_answer_min_frac > self.other_answer_min_frac:
            raise ValueError(
                f"same_answer_min_frac={self.same_answer_min_frac} is above "
                f"other_answer_min_frac={self.other_answer_min_frac}: equal answers need less likeness; lower it"
            )

    def sketch(self, query: str) -> "Sketch":
        shingles = self.shingles(query)
        minhash = _empty(self.permutations, self.seed).copy()
        minhash.update_batch([shingle.encode() for shingle in shingles])
        return Sketch(shingles, minhash)

    def shingles(self, query: str) -> frozenset[str]:
        """Never empty: a request without a word is its own only shingle."""
        words = words_of(query)
        found = {" ".join(gram) for n in range(1, self.shingle_words + 1) for gram in _ngrams(words, n)}
        return frozenset(found or {query.strip()})


@cache
def _empty(permutations: int, seed: int) -> MinHash:
    """Drawing the permutations takes longer than a sketch."""
    return MinHash(num_perm=permutations, seed=seed)


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def masked(query: str) -> tuple[str, ...]:
    """The words of a request, case and punctuation aside, each run of numbers as one mask."""
    words: list[str] = []
    for word in words_of(query):
        word = MASK if word in NUMBER_WORDS or any(character.isdecimal() for character in word) else word
        if word != MASK or words[-1:] != [MASK]:
            words.append(word)
    return tuple(words)


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / len(left | right)


def bands(threshold: float, *, permutations: int, recall_min_frac: float) -> tuple[int, int]:
    """(bands, rows a band) with the most rows at which a pair of similarity `threshold` still becomes a candidate with
    probability 1 - (1 - threshold^rows)^bands of at least `recall_min_frac`; one row where none does."""
    best = (permutations, 1)
    for rows in range(2, permutations // 2 + 1):
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= recall_min_frac:
            best = (permutations // rows, rows)
    return best


@dataclass(frozen=True, eq=False)
class Sketch:
    shingles: frozenset[str]
    minhash: MinHash


class Index:
    """Sketches in the order they were added, searched for those of at least a similarity of `threshold`."""

    def __init__(self, threshold: float, settings: Similarity):
        self.threshold = threshold
        params = bands(threshold, permutations=settings.permutations, recall_min_frac=settings.recall_min_frac)
        self._lsh = MinHashLSH(num_perm=settings.permutations, params=params)
        self._shingles: list[frozenset[str]] = []

    def add(self, sketch: Sketch) -> None:
        self._lsh.insert(len(self._shingles), sketch.minhash, check_duplication=False)
        self._shingles.append(sketch.shingles)

    def similar(self, sketch: Sketch) -> list[tuple[float, int]]:
        """(similarity, position) of all at least as similar as the threshold, the most similar first, then the
        earliest."""
        candidates = cast(list[int], self._lsh.query(sketch.minhash)) if self._shingles else []
        scored = [(jaccard(sketch.shingles, self._shingles[i]), i) for i in candidates]
        return sorted((one for one in scored if one[0] >= self.threshold), key=lambda one: (-one[0], one[1]))


@dataclass(frozen=True)
class Duplicate:
    """`of` is the id of the earlier example."""

    of: str
    query: str
    similarity_frac: float
    same_answer: bool


class Duplicates:
    """Finds the earlier near-duplicate of an example. What was never added is never found."""

    def __init__(self, settings: Similarity):
        self.settings = settings
        self._index = Index(settings.same_answer_min_frac, settings)
        self._examples: list[Example] = []
        self._answers: list[Hashable] = []

    def add(self, example: Example, sketch: Sketch) -> None:
        self._index.add(sketch)
        self._examples.append(example)
        self._answers.append(answer_key(example.calls))

    def earlier(self, example: Example, sketch: Sketch) -> Duplicate | None:
        """The most similar one."""
        answer = answer_key(example.calls)
        for similarity_frac, i in self._index.similar(sketch):
            other, same = self._examples[i], self._answers[i] == answer
            least = self.settings.same_answer_min_frac if same else self.settings.other_answer_min_frac
            if similarity_frac >= least and (same or (_could_answer(example, other) and _could_answer(other, example))):
                return Duplicate(other.id, other.query, similarity_frac, same)
        return None


def answer_key(calls: Sequence[ToolCall]) -> Hashable:
    """Equal for equal calls in any order; case and punctuation at the ends of a string aside."""
    keys = Counter((call.name, value_key(call.arguments, lenient=True)) for call in calls)
    return frozenset(keys.items())


def _could_answer(one: Example, other: Example) -> bool:
    """The tools of `one` allow the answer of `other`."""
    return {call.name for call in other.calls} <= {tool.name for tool in one.tools}


@dataclass(frozen=True)
class Overlap:
    """`shared`: the n-gram or the whole request as masked, or the similarity. `request` is the evaluation set's."""

    evaluation: str
    request: str
    shared: str


class EvaluationRequests:
    """The requests of evaluation sets by name, searched for what a training request shares with them."""

    def __init__(self, sets: Mapping[str, Sequence[str]], settings: Similarity):
        self.settings = settings
        self._whole: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
        self._grams: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
        self._index = Index(settings.contamination_min_frac, settings)
        self._requests: list[tuple[str, str]] = []
        for name, requests in sets.items():
            for request in dict.fromkeys(requests):
                words = masked(request)
                self._whole[words or (request.strip(),)].setdefault(name, request)
                for gram in _ngrams(words, settings.contamination_ngram_words):
                    self._grams[gram].setdefault(name, request)
                self._index.add(settings.sketch(request))
                self._requests.append((name, request))

    def whole(self, query: str) -> list[Overlap]:
        """The sets that hold the request itself, numbers aside."""
        words = masked(query) or (query.strip(),)
        return [Overlap(name, request, " ".join(words)) for name, request in self._whole.get(words, {}).items()]

    def ngram(self, query: str) -> list[Overlap] | None:
        """The sets of which a request shares an n-gram; None for a request that is too short to have one."""
        grams = _ngrams(masked(query), self.settings.contamination_ngram_words)
        found: dict[str, Overlap] = {}
        for gram in grams:
            for name, request in self._grams.get(gram, {}).items():
                found.setdefault(name, Overlap(name, request, " ".join(gram)))
        return list(found.values()) if grams else None

    def near(self, sketch: Sketch) -> list[Overlap]:
        """The sets that hold a request of a similarity of `contamination_min_frac`, each with the most similar one."""
        found: dict[str, Overlap] = {}
        for similarity_frac, i in self._index.similar(sketch):
            name, request = self._requests[i]
            found.setdefault(name, Overlap(name, request, f"similarity {similarity_frac:.2f}"))
        return list(found.values())
