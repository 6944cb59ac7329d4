"""What an authored corpus should be made of, which requests to ask for next, and what it has come to be.

A `Plan` gives each axis of diversity (kind, tools shown, length, persona, ...) target shares. Before each round the
plan compares them with what was accepted so far (`Realised`) and deals out `Brief`s, one authoring call each, whose
quotas close the gaps. Briefs follow from the plan, the pools of tools and what earlier rounds brought, nothing else, so
a corpus that was cut off asks the same questions again.

Quotas are exact for each axis by itself: largest remainders (Hamilton's method) turn deficits into numbers of briefs,
and each axis is then dealt out in a random order of its own. Iterative proportional fitting of a joint table was not
taken: with nine axes the table has far more cells than there are briefs, nearly every cell would be a fraction, and
rounding them would break the very margins that were fitted. What a fitted table would bring, combinations that cannot
be, is kept by dealing to the most demanding briefs first (see `_deal`).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from needle.corpus.distractors import ToolPool
from needle.corpus.mix import generator
from needle.errors import DataError
from needle.schema import EMPTY_KINDS, KINDS, Example, Tool, kind_of_calls

Shares = Mapping[str, Annotated[float, Field(ge=0, le=1)]]

AXES = (
    "kind",
    "tools_shown",
    "near_frac",
    "tool_source",
    "words",
    "persona",
    "scenario",
    "register",
    "language",
)
# What an example itself does not tell; only the brief knows it.
BELIEVED = ("near_frac", "tool_source", "persona", "scenario", "register", "language")
LONG_VALUES = "long_values"
AUTHOR_KINDS = (*KINDS, LONG_VALUES)
# Their calls decide which of them an example is, whatever was asked for.
COUNTED_KINDS = frozenset({"single", "multi", "repeat", LONG_VALUES})
SOURCES = ("catalogue", "invented")
UNKNOWN, OTHER = "unknown", "other"
SUM_TOLERANCE = 1e-6
OPENING_WORDS = 3
NUMBERS_A_ROUND = 1_000_000
# Fewer words cannot hold two wishes, a slip and its correction, or a hint.
WORDS_MIN = {"multi": 5, "repeat": 5, "disfluent": 5, "implicit": 5}
LONG_VALUE_FRAME_WORDS = 3  # around a long value


@dataclass(frozen=True)
class Wording:
    """What the author is told. `instruction` precedes every question for requests, `tools_instruction` every question
    for tools; `kinds` explains each kind to the author."""

    instruction: str
    tools_instruction: str
    kinds: Mapping[str, str]


@dataclass(frozen=True)
class Invention:
    """Tool lists that the author invents, one for each area. A tool whose cosine with one of another domain (TF-IDF of
    name and description, see needle.corpus.distractors) is `same_tool_cosine` or more is refused as a double."""

    areas: tuple[str, ...]
    tools_min: Annotated[int, Field(ge=1)]
    tools_max: Annotated[int, Field(ge=1, le=64)]
    same_tool_cosine: Annotated[float, Field(gt=0, le=1)]

    def __post_init__(self):
        if self.tools_min > self.tools_max:
            raise ValueError(f"tools_min={self.tools_min} is more than tools_max={self.tools_max}; lower it")
        doubles = sorted(area for area, times in Counter(self.areas).items() if times > 1)
        if doubles:
            raise ValueError(f"areas names {doubles[0]!r} twice; a domain is invented once for each")


class Pools:
    """The tools that briefs may show, by source and domain. Leave domains out that are held out for evaluation."""

    def __init__(self, *, catalogue: Mapping[str, Sequence[Tool]], invented: Mapping[str, Sequence[Tool]]):
        doubles = sorted(catalogue.keys() & invented.keys())
        if doubles:
            raise DataError(f"domain {doubles[0]!r} is in the catalogue and among the invented ones; rename one")
        every = {**catalogue, **invented}
        empty = sorted(domain for domain, tools in every.items() if not tools)
        if empty or not every:
            raise DataError(f"domain {empty[0]!r} has no tool" if empty else "there is no domain whose tools to show")
        self.by_source: Mapping[str, Mapping[str, Sequence[Tool]]] = {"catalogue": catalogue, "invented": invented}
        self.tools = ToolPool(every)

    def of(self, domain: str) -> Sequence[Tool]:
        return next(domains[domain] for domains in self.by_source.values() if domain in domains)


@dataclass(frozen=True)
class Brief:
    """One authoring call: `count` requests of one kind, for the tools shown.

    `focus` names the shown tool that most calls should be of. `hidden` are the domain's other tools: the author must
    know them, so that no answer is wrong once they stand beside the shown ones. `near_frac` is of what is shown.
    """

    id: str
    number: int  # unique in the plan, so that two equal questions are independent draws
    count: int
    domain: str
    tools: tuple[Tool, ...]
    hidden: tuple[Tool, ...]
    focus: str
    kind: str
    tools_shown: str
    near_frac: str
    tool_source: str
    words: str
    persona: str
    scenario: str
    register: str
    language: str

    @property
    def is_empty(self) -> bool:
        """Whether its requests are answered without a call."""
        return self.kind in EMPTY_KINDS

    def values(self) -> dict[str, str]:
        """Axis -> value; an axis that does not apply (near tools where one is shown) is left out."""
        return {axis: getattr(self, axis) for axis in AXES if getattr(self, axis)}


class Row(NamedTuple):
    """A value of an axis. Shares are of what applies and is known; None where the plan, or the corpus, says nothing."""

    axis: str
    value: str
    planned_frac: float | None
    realised_frac: float | None
    difference: float | None
    accepted: int
    rejected: int


@dataclass(frozen=True)
class Plan:
    """Shares of an axis sum to 1. Those of `tools_shown` are of the requests that are shown a tool, those of
    `near_frac` of the requests that are shown two or more; keys of both `tools_shown` and `words` are bands, "7-10" or
    "1"; keys of `near_frac` are fractions: of the shown tools but one, so many are its domain's most similar ones to
    that one.

    `overask_max`: of a value that the author seldom gets accepted, at most so many times its quota is asked for.
    """

    seed: int
    requests: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1)]
    requests_per_call: Annotated[int, Field(ge=1, le=50)]
    overask_max: Annotated[float, Field(ge=1)]
    long_value_words: Annotated[int, Field(ge=2)]
    openings_max: Annotated[int, Field(ge=0)]
    kind: Shares
    tools_shown: Shares
    near_frac: Shares
    tool_source: Shares
    words: Shares
    persona: Shares
    scenario: Shares
    register: Shares
    language: Shares
    invention: Invention
    wording: Wording

    def __post_init__(self):
        for axis in AXES:
            _check_shares(axis, getattr(self, axis))
        _check_known("kind", self.kind, AUTHOR_KINDS)
        _check_known("tool_source", self.tool_source, SOURCES)
        for axis in ("tools_shown", "words"):
            _check_bands(axis, getattr(self, axis))
        for text in self.near_frac:
            if not _is_fraction(text):
                raise ValueError(f"near_frac: {text!r} is not a fraction from 0 to 1, like 0.5")
        untold = [kind for kind, share in self.kind.items() if share and not self.wording.kinds.get(kind, "").strip()]
        if untold:
            raise ValueError(f"wording.kinds does not say what {untold[0]!r} means; the plan asks for it")
        if self.tool_source.get("invented") and not self.invention.areas:
            raise ValueError(
                "tool_source asks for invented tools, but invention.areas is empty; name areas or set it 0"
            )
        self._check_room("tools_shown", tools_floor)
        self._check_room("words", self.words_floor)

    def _check_room(self, axis: str, floor: Any) -> None:
        """Raises ValueError where kinds that need many tools or words have a larger share than the bands that reach so
        far. Floors and bands are ordered, so comparing them at each floor is enough (Hall's condition)."""
        shares: Mapping[str, float] = getattr(self, axis)
        shown = {kind: share for kind, share in self.kind.items() if axis == "words" or kind != "no_tools"}
        for least in sorted({floor(kind) for kind in shown}):
            needing = [kind for kind, share in shown.items() if share and floor(kind) >= least]
            wanted = sum(shown[kind] for kind in needing) / max(sum(shown.values()), SUM_TOLERANCE)
            room = sum(share for band, share in shares.items() if band_of(band)[1] >= least)
            if wanted > room + SUM_TOLERANCE:
                raise ValueError(
                    f"{axis}: {', '.join(needing)} need {least} or more, {wanted:.3g} of the requests, but only "
                    f"{room:.3g} of them get so many; raise the shares of larger bands or lower those kinds"
                )

    def words_floor(self, kind: str) -> int:
        """How many words a request of this kind has at least."""
        return self.long_value_words + LONG_VALUE_FRAME_WORDS if kind == LONG_VALUES else WORDS_MIN.get(kind, 1)

    def measure(self, example: Example, brief: Brief | None = None) -> dict[str, str]:
        """Axis -> value of an example: counted where it can be, else as its brief said, "unknown" without a brief."""
        believed = dict.fromkeys(BELIEVED, UNKNOWN) if brief is None else brief.values()
        measured = {axis: believed[axis] for axis in BELIEVED if axis in believed}
        measured["kind"] = kind_of(example, long_value_words=self.long_value_words)
        measured["words"] = _band(count_words(example.query), self.words)
        if example.tools:
            measured["tools_shown"] = _band(len(example.tools), self.tools_shown)
        if len(example.tools) < 2:
            measured.pop("near_frac", None)
        return measured

    def briefs(self, round: int, realised: "Realised", pools: Pools) -> list[Brief]:
        """The calls of a round, 0 to `rounds` - 1; none where enough was accepted already.

        After round r the corpus should hold (r + 1) / rounds of `requests`. What was refused so far makes more of its
        like be asked for.
        """
        lacking = math.ceil(self.requests * (round + 1) / self.rounds) - realised.requests
        if lacking <= 0:
            return []
        count = math.ceil(lacking / self._yield(realised.requests, realised.asked_requests) / self.requests_per_call)
        rng = generator(self.seed, "briefs", round)
        every = range(count)
        kinds = self._dealt("kind", every, realised, rng)
        shown = [seat for seat in every if kinds[seat] != "no_tools"]
        bands = self._dealt(
            "tools_shown", shown, realised, rng, floors={seat: tools_floor(kinds[seat]) for seat in shown}
        )
        words = self._dealt(
            "words", every, realised, rng, floors={seat: self.words_floor(kinds[seat]) for seat in every}
        )
        several = [seat for seat in shown if _shows_several(bands[seat], kinds[seat])]
        near = self._dealt("near_frac", several, realised, rng)
        sources = self._dealt("tool_source", every, realised, rng, only=[s for s in SOURCES if pools.by_source[s]])
        others = {
            axis: self._dealt(axis, every, realised, rng) for axis in ("persona", "scenario", "register", "language")
        }
        scene = _Scene(self, pools, realised)
        found = []
        for seat in every:
            domain, focus, tools, near_frac = scene.set_up(
                kind=kinds[seat], band=bands.get(seat), near=near.get(seat), source=sources[seat], rng=rng
            )
            found.append(
                Brief(
                    id=f"round-{round}-brief-{seat}",
                    number=round * NUMBERS_A_ROUND + seat,
                    count=self.requests_per_call,
                    domain=domain,
                    tools=tools,
                    hidden=tuple(tool for tool in pools.of(domain) if tool not in tools),
                    focus=focus,
                    kind=kinds[seat],
                    tools_shown=_band(len(tools), self.tools_shown) if tools else "",
                    near_frac=near_frac,
                    tool_source=sources[seat],
                    words=words[seat],
                    **{axis: dealt[seat] for axis, dealt in others.items()},
                )
            )
        return found

    def _yield(self, accepted: int, asked: int) -> float:
        """How much of what is asked for is accepted, 1 as long as nothing is known, never below 1 / overask_max. One
        call's worth of prior keeps the first few refusals from being taken for a rule."""
        prior = self.requests_per_call
        return float(np.clip((accepted + prior) / (asked + prior), 1 / self.overask_max, 1))

    def _dealt(
        self,
        axis: str,
        seats: Sequence[int],
        realised: "Realised",
        rng: np.random.Generator,
        *,
        floors: Mapping[int, int] | None = None,
        only: Sequence[str] | None = None,
    ) -> dict[int, str]:
        """Seat -> value of an axis: quotas by deficit, handed out at random.

        A value's deficit is what it lacks of its share of the corpus as it will be after this round, over the rate at
        which the author gets it accepted.
        """
        shares: Mapping[str, float] = {v: s for v, s in getattr(self, axis).items() if only is None or v in only}
        if not sum(shares.values()):  # the only pool there is has no share: better that than nothing
            shares = dict.fromkeys(only or shares, 1.0)
        total = sum(shares.values())
        have, asked = realised.accepted[axis], realised.asked[axis]
        known = have.total() - have[UNKNOWN]
        overall = self._yield(realised.requests, realised.asked_requests)
        will_be = known + overall * len(seats) * self.requests_per_call
        wanted = {
            value: max(0.0, share / total * will_be - have[value]) / self._yield(have[value], asked[value])
            for value, share in shares.items()
        }
        tops = {value: band_of(value)[1] if floors else 0 for value in shares}
        return _deal(apportion(wanted, len(seats)), seats, floors or {}, tops, rng)


class _Scene:
    """Chooses domains and tools for the briefs of one round: first what was served least, earlier rounds included."""

    def __init__(self, plan: Plan, pools: Pools, realised: "Realised"):
        self.plan, self.pools = plan, pools
        self.domains, self.calls = Counter(realised.domains), Counter(realised.calls)

    def set_up(
        self, *, kind: str, band: str | None, near: str | None, source: str, rng: np.random.Generator
    ) -> tuple[str, str, tuple[Tool, ...], str]:
        """The domain, the focus, the tools shown in random order, and the share of near ones among them ("" where it
        does not apply)."""
        low, high = band_of(band) if band else (0, 0)
        low = max(low, tools_floor(kind))
        domains = self.pools.by_source[source]
        able = [name for name, tools in domains.items() if len(tools) >= low and any(_suits(t, kind) for t in tools)]
        domain = _least(able or list(domains), self.domains, rng)
        self.domains[domain] += self.plan.requests_per_call
        if not band:
            return domain, "", (), ""
        home = domains[domain]
        fit = [tool for tool in home if _suits(tool, kind)] or home
        chosen = _least([f"{domain}/{tool.name}" for tool in fit], self.calls, rng)
        self.calls[chosen] += self.plan.requests_per_call
        focus = chosen.removeprefix(f"{domain}/")
        count = min(int(rng.integers(low, max(low, high) + 1)), len(home))
        wanted = float(near) if near else 0.0
        tools, frac = show_near(self.pools.tools, domain=domain, focus=focus, count=count, near_frac=wanted, rng=rng)
        if frac is None:
            return domain, focus, tools, ""
        return domain, focus, tools, min(self.plan.near_frac, key=lambda label: abs(float(label) - frac))


def show_near(
    pool: ToolPool, *, domain: str, focus: str, count: int, near_frac: float, rng: np.random.Generator
) -> tuple[tuple[Tool, ...], float | None]:
    """`focus` and `count` - 1 other tools of its domain, shuffled, and the share of near ones among the others.

    Near are the count - 1 most similar ones; of them `near_frac` are shown, the most similar first. The rest is drawn
    from beyond them while the domain has such tools, then from the least similar of the near ones. Only the own domain
    is drawn from: a tool of another that is as similar may serve the same request (distractors.TOO_SIMILAR), and the
    answer would be arbitrary.
    """
    at = pool.index[domain, focus]
    home = pool.of_domain[domain]
    others = home[home != at]
    others = others[np.argsort(-pool.similarity[at, others], kind="stable")]
    near_count = math.floor(near_frac * (count - 1) + 0.5)
    beyond = rng.permutation(others[count - 1 :])[: count - 1 - near_count]
    missing = count - 1 - near_count - len(beyond)
    filling = others[near_count : count - 1][::-1][:missing]
    shown = [at, *others[:near_count], *beyond, *filling]
    frac = (near_count + len(filling)) / (count - 1) if count > 1 else None
    return tuple(pool.tools[shown[i]] for i in rng.permutation(len(shown))), frac


@dataclass
class Realised:
    """What came of the calls so far: counts by axis and value, JSON-serialisable.

    `asked` and `rejected` go by what the brief said, `accepted` by what the examples are. `domains` and `calls`
    (keys DOMAIN/TOOL) count accepted requests and calls, `openings` their first words by domain.
    """

    requests: int = 0
    asked_requests: int = 0
    briefs: int = 0
    asked: dict[str, Counter[str]] = field(default_factory=lambda: {axis: Counter() for axis in AXES})
    accepted: dict[str, Counter[str]] = field(default_factory=lambda: {axis: Counter() for axis in AXES})
    rejected: dict[str, Counter[str]] = field(default_factory=lambda: {axis: Counter() for axis in AXES})
    domains: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    openings: dict[str, Counter[str]] = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan, examples: Iterable[Example]) -> "Realised":
        """Of any corpus, whoever wrote it; what only a brief would know is "unknown"."""
        realised = Realised()
        for example in examples:
            realised._accept(plan, example, None)
        return realised

    def add(self, plan: Plan, brief: Brief, accepted: Sequence[Example]) -> None:
        """One call's outcome. What was asked for and is not among `accepted` counts as rejected: refused by a check, or
        never written."""
        self.briefs += 1
        self.asked_requests += brief.count
        lost = max(0, brief.count - len(accepted))
        for axis, value in brief.values().items():
            self.asked[axis][value] += brief.count
            if lost:
                self.rejected[axis][value] += lost
        for example in accepted:
            self._accept(plan, example, brief)

    def _accept(self, plan: Plan, example: Example, brief: Brief | None) -> None:
        self.requests += 1
        for axis, value in plan.measure(example, brief).items():
            self.accepted[axis][value] += 1
        self.domains[example.domain] += 1
        self.calls.update(f"{example.domain}/{call.name}" for call in example.calls)
        words = example.query.lower().split()
        if len(words) > OPENING_WORDS:  # never a whole request
            self.openings.setdefault(example.domain, Counter())[" ".join(words[:OPENING_WORDS])] += 1

    def openings_of(self, domain: str, most: int) -> list[str]:
        """The commonest openings of a domain's accepted requests."""
        counted = self.openings.get(domain, Counter())
        return sorted(counted, key=lambda opening: (-counted[opening], opening))[:most]

    def table(self, plan: Plan) -> list[Row]:
        """Every planned value, then what else the corpus holds."""
        rows = []
        for axis in AXES:
            planned: Mapping[str, float] = getattr(plan, axis)
            accepted, rejected = self.accepted[axis], self.rejected[axis]
            known = sum(times for value, times in accepted.items() if value != UNKNOWN)
            for value in [*planned, *sorted(value for value in accepted if value not in planned)]:
                share = None if value == UNKNOWN else planned.get(value, 0.0)
                realised = accepted[value] / known if known and value != UNKNOWN else None
                difference = None if share is None or realised is None else realised - share
                rows.append(Row(axis, value, share, realised, difference, accepted[value], rejected[value]))
        return rows

    def distances(self, plan: Plan) -> dict[str, float | None]:
        """Total variation distance between corpus and plan, by axis: half the sum over values of |realised - planned|,
        0 (equal) to 1 (disjoint); None where the corpus says nothing."""
        gaps: dict[str, list[float]] = {axis: [] for axis in AXES}
        for row in self.table(plan):
            if row.difference is not None:
                gaps[row.axis].append(abs(row.difference))
        return {axis: sum(of_axis) / 2 if of_axis else None for axis, of_axis in gaps.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON values; not dataclasses.asdict, which would count a Counter's items anew."""
        return {
            name: {key: dict(one) if isinstance(one, Counter) else one for key, one in value.items()}
            if isinstance(value, dict)
            else value
            for name, value in vars(self).items()
        }

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> "Realised":
        by_axis = {
            name: {axis: Counter(record[name][axis]) for axis in AXES} for name in ("asked", "accepted", "rejected")
        }
        return Realised(
            **{name: record[name] for name in ("requests", "asked_requests", "briefs")},
            **by_axis,
            domains=Counter(record["domains"]),
            calls=Counter(record["calls"]),
            openings={domain: Counter(counted) for domain, counted in record["openings"].items()},
        )


def apportion(wanted: Mapping[str, float], seats: int) -> dict[str, int]:
    """Whole numbers in proportion to `wanted`, `seats` in all, by largest remainders; ties go to what stands first.
    Where nothing is wanted, every value is wanted alike."""
    total = sum(wanted.values())
    exact = {value: seats * (amount / total if total else 1 / len(wanted)) for value, amount in wanted.items()}
    counts = {value: math.floor(amount) for value, amount in exact.items()}
    by_remainder = sorted(exact, key=lambda value: counts[value] - exact[value])
    for value in by_remainder[: seats - sum(counts.values())]:
        counts[value] += 1
    return counts


def _deal(
    counts: Mapping[str, int],
    seats: Sequence[int],
    floors: Mapping[int, int],
    tops: Mapping[str, int],
    rng: np.random.Generator,
) -> dict[int, str]:
    """Hands every seat one value, `counts[value]` times each, at random among those whose top reaches the seat's floor.

    The highest floor draws first. Since a value that reaches a floor reaches every lower one, this finds a deal
    whenever there is one; where there is none, a seat takes the highest value that is left.
    """
    left = {value: count for value, count in counts.items() if count}
    dealt = {}
    shuffled = [seats[i] for i in rng.permutation(len(seats))]
    for seat in sorted(shuffled, key=lambda seat: -floors.get(seat, 0)):
        legal = [value for value in left if tops[value] >= floors.get(seat, 0)] or [max(left, key=lambda v: tops[v])]
        weights = np.array([left[value] for value in legal], dtype=float)
        value = legal[int(rng.choice(len(legal), p=weights / weights.sum()))]
        dealt[seat] = value
        left[value] -= 1
        if not left[value]:
            del left[value]
    return dealt


def kind_of(example: Example, *, long_value_words: int) -> str:
    """The kind that an example's calls show, where they can; else the one that it says it is."""
    if not example.calls or example.kind not in COUNTED_KINDS:
        return example.kind
    values = [value for call in example.calls for value in call.arguments.values() if isinstance(value, str)]
    if any(count_words(value) >= long_value_words for value in values):
        return LONG_VALUES
    return kind_of_calls(example.calls)


def count_words(text: str) -> int:
    """Words between spaces. Scripts written without spaces (Han, kana, Thai, Lao, Khmer, Burmese) count two characters
    a word, about what Chinese words have on average."""
    unspaced = sum(map(_is_unspaced, text))
    spaced = "".join(" " if _is_unspaced(character) else character for character in text)
    return sum(any(map(str.isalnum, word)) for word in spaced.split()) + math.ceil(unspaced / 2)


def tools_floor(kind: str) -> int:
    """How many tools a request of this kind is shown at least."""
    return {"no_tools": 0, "multi": 2}.get(kind, 1)


def _suits(tool: Tool, kind: str) -> bool:
    """Whether a request of this kind can be about the tool: one without parameters is not called twice, one without a
    free text takes no long value."""
    if kind == "repeat":
        return bool(tool.properties)
    if kind == LONG_VALUES:
        return any(schema.get("type") == "string" and "enum" not in schema for schema in tool.properties.values())
    return True


def band_of(text: str) -> tuple[int, int]:
    """(7, 10) of "7-10", (1, 1) of "1".

    Raises:
        ValueError: it is neither.
    """
    low, _, high = str(text).partition("-")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise ValueError(f"{text!r} is not a band; write 1 or 7-10, from 1 on, the smaller number first")
    return found


def _band(number: int, bands: Iterable[str]) -> str:
    """Which band a number falls in; "other" where none."""
    return next((band for band in bands if band_of(band)[0] <= number <= band_of(band)[1]), OTHER)


def _shows_several(band: str, kind: str) -> bool:
    return max(band_of(band)[0], tools_floor(kind)) > 1


def _least(names: Sequence[str], served: Counter[str], rng: np.random.Generator) -> str:
    """The one served least, at random among equals."""
    least = min(served[name] for name in names)
    equals = [name for name in names if served[name] == least]
    return equals[int(rng.integers(len(equals)))]


def _is_unspaced(character: str) -> bool:
    code = ord(character)
    return (
        0x0E00 <= code <= 0x0EFF  # Thai, Lao
        or 0x1000 <= code <= 0x109F  # Burmese
        or 0x1780 <= code <= 0x17FF  # Khmer
        or 0x3040 <= code <= 0x30FF  # kana
        or 0x3400 <= code <= 0x9FFF  # Han
        or 0xF900 <= code <= 0xFAFF
        or 0x20000 <= code <= 0x3FFFF
    )


def _is_fraction(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _check_shares(axis: str, shares: Mapping[str, float]) -> None:
    if not shares:
        raise ValueError(f"{axis} is empty; give its values shares that sum to 1")
    for value, share in shares.items():
        if not isinstance(value, str):
            raise ValueError(f'{axis}: {value!r} is not text; put it in quotes, "{value}"')
        if value in (UNKNOWN, OTHER, ""):
            raise ValueError(f"{axis}: {value!r} cannot be planned; name what it stands for")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"{axis}.{value}={share!r} is not a share; give a number from 0 to 1")
    total = math.fsum(shares.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"the shares of {axis} sum to {total:.8g}; they must sum to 1 (within {SUM_TOLERANCE:g})")


def _check_known(axis: str, shares: Mapping[str, float], known: Sequence[str]) -> None:
    unknown = [value for value in shares if value not in known]
    if unknown:
        raise ValueError(f"{axis} {unknown[0]!r} is unknown; there are {', '.join(known)}")


def _check_bands(axis: str, shares: Mapping[str, float]) -> None:
    try:
        bands = sorted((*band_of(text), text) for text in shares)
    except ValueError as error:
        raise ValueError(f"{axis}: {error}") from None
    for (_, high, first), (low, _, second) in pairwise(bands):
        if low <= high:
            raise ValueError(f"{axis}: bands {first} and {second} overlap; let each number fall in one")
