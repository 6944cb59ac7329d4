"""Three stages of checks on a teacher's answers: form, grounding, agreement; then near-duplicates and contamination.

Each check has a name, a switch (conf/validation) and a count. What a check cannot judge is neither passed nor failed:
it is not applicable. Verdicts are deterministic and never depend on later examples.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field

from needle.corpus.deduplicate import Duplicates, EvaluationRequests, Overlap, Similarity, Sketch, answer_key
from needle.corpus.grounding import Grounding, Traced, words_of
from needle.corpus.number_words import listed
from needle.metrics.matching import call_key, values_equal
from needle.schema import EMPTY_KINDS, Example, Tool, ToolCall, call_problems, canonical_json, strict_json

# off: not run. count: a failure is counted. quarantine: and the example is set aside.
Action = Literal["off", "count", "quarantine"]
# weight: the share of agreeing samples becomes the example's weight.
AgreementAction = Literal["off", "count", "quarantine", "weight"]
Frac = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]

# The fields of Validation that are checks, in the order in which they are reported.
FORM = (
    "query_length",
    "query_natural",
    "query_tool_name",
    "tools_sound",
    "tool_known",
    "arguments_valid",
    "kind_agrees",
    "placeholder_value",
    "repeated_call",
)
GROUNDING = ("grounded_text", "grounded_number")
CORPUS = ("near_duplicate", "contaminated_whole", "contaminated_ngram", "contaminated_near")
CHECKS = (*FORM, *GROUNDING, "agreement", *CORPUS)
OUTCOMES = ("passed", "failed", "not_applicable")

_FILLERS = frozenset(
    listed(
        "string text value number integer boolean object array null undefined unknown unspecified none nil na n/a tbd "
        "tba todo placeholder example sample foo bar baz xxx xyz abc lorem test dummy your_name user_name name_here "
        "... … ?"
    )
)
_FILLER_FORM = re.compile(
    r"<[^<>]+>|\[[^\[\]\d][^\[\]]*\]|\{\{?[^{}\d][^{}]*\}\}?|\$\{.+\}|%[A-Z_]+%"  # <city>, [city], {{city}}, ${CITY}
    r"|(?:your|insert|enter|some|the)[_ ].*[_ ]?(?:here|name|value|id)|(?:path/to|lorem ipsum).*"
    r"|api_call_\d+|x{3,}|.*\bexample\.(?:com|org|net)\b.*|.*@(?:domain|email|mail)\.com",
    re.IGNORECASE,
)
_SLOT = re.compile(
    r"\{\{?\s*[a-z_][\w ]*\}\}?|<[a-z_][\w ]*>|\[(?:your|insert|enter)\b[^\]]*\]|\[[a-z]+_[a-z_]+\]", re.I
)
_LABEL = re.compile(r"\s*(?:user|query|request|instruction|assistant|prompt|example)\s*\d*\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """Which check of CHECKS an example does not pass, and why."""

    check: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """`failures` hold those of checks that only count, too. `weight` is 1 unless agreement gives another."""

    example: Example
    failures: tuple[Failure, ...]
    kept: bool
    weight: float


@dataclass(frozen=True)
class Sifted:
    """`verdicts` in the order of the examples. `counts`: check -> passed, failed, not_applicable, for every check that
    is not off. `contaminated`: evaluation set -> check -> examples."""

    verdicts: tuple[Verdict, ...]
    counts: Mapping[str, Mapping[str, int]]
    contaminated: Mapping[str, Mapping[str, int]]

    @property
    def kept(self) -> list[Example]:
        return [verdict.example for verdict in self.verdicts if verdict.kept]

    @property
    def weights(self) -> list[float]:
        """Of `kept`."""
        return [verdict.weight for verdict in self.verdicts if verdict.kept]

    @property
    def quarantined(self) -> list[tuple[Example, tuple[Failure, ...]]]:
        return [(verdict.example, verdict.failures) for verdict in self.verdicts if not verdict.kept]


@dataclass(frozen=True)
class Validation:
    """A switch for each check, and the checks' limits.

    `agreement_min_frac`: of the judge's samples, those that must agree with the answer. `query_words_*`: length of a
    request in words.
    """

    query_length: Action
    query_natural: Action
    query_tool_name: Action
    tools_sound: Action
    tool_known: Action
    arguments_valid: Action
    kind_agrees: Action
    placeholder_value: Action
    repeated_call: Action
    grounded_text: Action
    grounded_number: Action
    agreement: AgreementAction
    near_duplicate: Action
    contaminated_whole: Action
    contaminated_ngram: Action
    contaminated_near: Action
    query_words_min: Count
    query_words_max: Count
    agreement_min_frac: Frac
    grounding: Grounding
    similarity: Similarity

    def __post_init__(self) -> None:
        if self.query_words_min > self.query_words_max:
            raise ValueError(
                f"query_words_min={self.query_words_min} is above query_words_max={self.query_words_max}; lower it"
            )

    def action(self, check: str) -> str:
        return getattr(self, check)

    def check(self, example: Example, *, judged: Sequence[Sequence[ToolCall]] | None = None) -> list[Failure]:
        """What one example fails of stages 1 to 3, checks that only count included.

        `judged`: the calls of each sample that a judge gave for the same request and tools.
        """
        return _failures(self._outcomes(example, judged))

    def sift(
        self,
        examples: Iterable[Example],
        *,
        judged: Mapping[str, Sequence[Sequence[ToolCall]]] | None = None,
        evaluation: Mapping[str, Sequence[str]],
    ) -> Sifted:
        """Every check on every example, in order. An example is compared with those kept before it.

        `judged` maps an example's id to the judge's samples, `evaluation` an evaluation set's name to its requests.
        """
        comparison = _Comparison(self, evaluation)
        counts = {check: dict.fromkeys(OUTCOMES, 0) for check in CHECKS if self.action(check) != "off"}
        verdicts = []
        for example in examples:
            samples = (judged or {}).get(example.id)
            sketch = self.similarity.sketch(example.query)
            outcomes = self._outcomes(example, samples) | comparison.outcomes(example, sketch)
            for check, tally in counts.items():
                tally["not_applicable" if outcomes[check] is None else "failed" if outcomes[check] else "passed"] += 1
            failures = tuple(_failures(outcomes))
            kept = not any(self.action(failure.check) == "quarantine" for failure in failures)
            weight = agreement_frac(example, samples) if samples and self.agreement == "weight" else 1.0
            verdicts.append(Verdict(example, failures, kept, weight))
            if kept:
                comparison.earlier.add(example, sketch)
        return Sifted(tuple(verdicts), counts, comparison.contaminated)

    def _outcomes(self, example: Example, judged: Sequence[Sequence[ToolCall]] | None) -> dict[str, list[str] | None]:
        """check -> reasons (none: passed), or None where it has nothing to judge. Checks that are off are left out."""
        outcomes = {check: rule(self, example) for check, rule in _FORM_RULES.items() if self.action(check) != "off"}
        if any(self.action(check) != "off" for check in GROUNDING):
            # A schema that is none explains no value.
            traced = [] if _tools_sound(self, example) else self.grounding.trace(example)
            texts = [one for one in traced if one.is_text]
            numbers = [one for one in traced if isinstance(one.value, int | float) and not isinstance(one.value, bool)]
            outcomes |= {
                check: _ungrounded(found)
                for check, found in zip(GROUNDING, (texts, numbers), strict=True)
                if self.action(check) != "off"
            }
        if self.agreement != "off":
            outcomes["agreement"] = self._disagreement(example, judged)
        return outcomes

    def _disagreement(self, example: Example, judged: Sequence[Sequence[ToolCall]] | None) -> list[str] | None:
        if not judged:
            return None
        share = agreement_frac(example, judged)
        if share >= self.agreement_min_frac:
            return []
        return [f"{share:.0%} of {len(judged)} samples agree, at least {self.agreement_min_frac:.0%} must"]


class _Comparison:
    """The checks that need other requests: those kept so far, and the evaluation sets'."""

    def __init__(self, settings: Validation, evaluation: Mapping[str, Sequence[str]]):
        self.on = [check for check in CORPUS if settings.action(check) != "off"]
        self.earlier = Duplicates(settings.similarity)
        self.requests = EvaluationRequests(evaluation, settings.similarity) if evaluation else None
        contamination = [check for check in self.on if check != "near_duplicate"]
        self.contaminated = {name: dict.fromkeys(contamination, 0) for name in evaluation}

    def outcomes(self, example: Example, sketch: Sketch) -> dict[str, list[str] | None]:
        found: dict[str, list[str] | None] = dict.fromkeys(self.on)
        if "near_duplicate" in self.on:
            twin = self.earlier.earlier(example, sketch)
            found["near_duplicate"] = [f"{twin.similarity_frac:.0%} like {twin.of}: {twin.query!r}"] if twin else []
        for check in self.on if self.requests else ():
            if check == "near_duplicate":
                continue
            overlaps = self._overlaps(check, example.query, sketch)
            if overlaps is not None:
                found[check] = [f"{one.evaluation} has {one.request!r} ({one.shared})" for one in overlaps]
            for one in overlaps or ():
                self.contaminated[one.evaluation][check] += 1
        return found

    def _overlaps(self, check: str, query: str, sketch: Sketch) -> list[Overlap] | None:
        assert self.requests is not None
        if check == "contaminated_whole":
            return self.requests.whole(query)
        return self.requests.ngram(query) if check == "contaminated_ngram" else self.requests.near(sketch)


def _failures(outcomes: Mapping[str, list[str] | None]) -> list[Failure]:
    return [Failure(check, "; ".join(reasons)) for check in CHECKS if (reasons := outcomes.get(check))]


def _ungrounded(traced: Sequence[Traced]) -> list[str] | None:
    if not traced:
        return None
    return [f"{one.path}={one.value!r}: {one.reason}" for one in traced if not one.how]


# Stage 1: form


def _query_length(settings: Validation, example: Example) -> list[str]:
    words = len(example.query.split())
    if settings.query_words_min <= words <= settings.query_words_max:
        return []
    return [f"{words} words; {settings.query_words_min} to {settings.query_words_max} are allowed"]


def _query_natural(settings: Validation, example: Example) -> list[str]:
    """A request as somebody would say it: no JSON, no call, no slot left open, no label, no broken character."""
    query = example.query.strip()
    found = []
    if query[:1] in "{[" and (query[0] == "{" or isinstance(_json(query), list)):
        found.append("it is JSON, not a request")
    if any(re.fullmatch(rf"{re.escape(tool.name)}\s*\(.*\)", query, re.DOTALL) for tool in example.tools):
        found.append("it is a call, not a request")
    if slot := _SLOT.search(query):
        found.append(f"the slot {slot.group()} is not filled")
    if label := _LABEL.match(query):
        found.append(f"it opens with the label {label.group().strip()!r}")
    if broken := re.search("[\ufffd\x00-\x08\x0b-\x1f\x7f]", query):
        found.append(f"the character {broken.group()!r} belongs to no text")
    if not words_of(query):
        found.append("it has no word")
    return found


def _json(text: str) -> Any:
    try:
        return strict_json(text)
    except ValueError:
        return None


def _query_tool_name(settings: Validation, example: Example) -> list[str] | None:
    """Names that only a program would write: with underscores, dots or capitals inside."""
    technical = [t.name for t in example.tools if re.search(r"[_.]|[a-z][A-Z]", t.name)]
    if not technical:
        return None
    named = [name for name in technical if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", example.query)]
    return [f"the request names the tool {name}" for name in named]


def _tools_sound(settings: Validation, example: Example) -> list[str] | None:
    if not example.tools:
        return None
    counts = Counter(tool.name for tool in example.tools)
    found = [f"two tools are named {name!r}" for name, count in counts.items() if count > 1]
    return found + [problem for tool in example.tools if (problem := _tool_problem(canonical_json(asdict(tool))))]


@lru_cache(maxsize=8192)
def _tool_problem(tool_json: str) -> str:
    try:
        Tool.from_dict(strict_json(tool_json))
    except ValueError as error:
        return str(error)
    return ""


def _tool_known(settings: Validation, example: Example) -> list[str] | None:
    if not example.calls:
        return None
    known = {tool.name for tool in example.tools}
    return [f"{name!r} is not among the tools shown" for name in _names(example) if name not in known]


def _arguments_valid(settings: Validation, example: Example) -> list[str] | None:
    by_name = {tool.name: tool for tool in example.tools}
    known = [call for call in example.calls if call.name in by_name]
    return [problem for call in known for problem in call_problems(call, by_name)] if known else None


def _kind_agrees(settings: Validation, example: Example) -> list[str]:
    calls, names = len(example.calls), len(_names(example))
    wanted = {
        "single": (calls == 1, "one call"),
        "multi": (names >= 2, "calls of at least two tools"),
        "repeat": (calls >= 2 and names < calls, "several calls of one tool"),
        "no_tools": (calls == 0 and not example.tools, "neither tools nor calls"),
    }
    others = (calls == 0, "no call") if example.kind in EMPTY_KINDS else (calls >= 1, "a call")
    agrees, words = wanted.get(example.kind, others)
    return [] if agrees else [f"kind {example.kind} means {words}; there are {calls} calls of {names} tools"]


def _names(example: Example) -> list[str]:
    return list(dict.fromkeys(call.name for call in example.calls))


def _placeholder_value(settings: Validation, example: Example) -> list[str] | None:
    if not any(call.arguments for call in example.calls):
        return None
    tools = {tool.name: tool for tool in example.tools}
    return [
        f"{call.name}.{key}: {text!r} stands for a value, it is none"
        for call in example.calls
        for key, value in call.arguments.items()
        for text in _texts(value)
        if _is_placeholder(text, example.query) and not _is_member(text, tools.get(call.name), key)
    ]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child)


def _is_placeholder(text: str, query: str) -> bool:
    """Unless the request itself says it: a folder may be called "test"."""
    plain = text.strip()
    if not plain:
        return True
    if plain.casefold() not in _FILLERS and not _FILLER_FORM.fullmatch(plain):
        return False
    return not re.search(rf"(?<!\w){re.escape(plain)}(?!\w)", query, re.IGNORECASE)


def _is_member(text: str, tool: Tool | None, key: str) -> bool:
    """The schema's own enum, const or default may be "none", or empty."""

    def allowed(schema: Any) -> Iterator[Any]:
        if isinstance(schema, Mapping):
            yield from schema.get("enum", ()) if isinstance(schema.get("enum"), list | tuple) else ()
            yield from (schema[word] for word in ("const", "default") if word in schema)
            for child in schema.values():
                yield from allowed(child)
        elif isinstance(schema, list | tuple):
            for child in schema:
                yield from allowed(child)

    return tool is not None and any(values_equal(text, one) for one in allowed(tool.properties.get(key)))


def _repeated_call(settings: Validation, example: Example) -> list[str] | None:
    if len(example.calls) < 2:
        return None
    counts = Counter(call_key(call) for call in example.calls)
    first = {call_key(call): call for call in reversed(example.calls)}
    return [f"{first[key].name} is called {n} times with the same arguments" for key, n in counts.items() if n > 1]


_FORM_RULES: dict[str, Callable[[Validation, Example], list[str] | None]] = {
    "query_length": _query_length,
    "query_natural": _query_natural,
    "query_tool_name": _query_tool_name,
    "tools_sound": _tools_sound,
    "tool_known": _tool_known,
    "arguments_valid": _arguments_valid,
    "kind_agrees": _kind_agrees,
    "placeholder_value": _placeholder_value,
    "repeated_call": _repeated_call,
}


# Stage 3: agreement


def agreement_frac(example: Example, judged: Sequence[Sequence[ToolCall]]) -> float:
    """Share of the judge's samples with the answer's calls.

    Calls are compared without their order, since a judge that asks for the same things in another order does not doubt
    the answer; values as needle.metrics.matching compares them leniently. An argument that is null or states its
    schema's default is as good as none.
    """
    wanted = answer_key([_without_defaults(call, example.tools) for call in example.calls])
    agreeing = sum(answer_key([_without_defaults(c, example.tools) for c in calls]) == wanted for calls in judged)
    return agreeing / len(judged)


def _without_defaults(call: ToolCall, tools: Sequence[Tool]) -> ToolCall:
    properties = next((tool.properties for tool in tools if tool.name == call.name), {})

    def says_nothing(key: str, value: Any) -> bool:
        schema = properties.get(key)
        default = isinstance(schema, Mapping) and "default" in schema and values_equal(schema["default"], value)
        return value is None or default

    return ToolCall(call.name, {key: value for key, value in call.arguments.items() if not says_nothing(key, value)})
