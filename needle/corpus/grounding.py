"""Whether each argument value of an answer can be traced to the request, and how.

A value is grounded when the request says it, in the same or other words, or when the schema leaves no other choice:
members of an enum, booleans, null, defaults. The rules follow the corpus's conventions (data/README.md): free text is
the part of the request that carries it, numbers are in the unit that the schema names, and dates and times stay in the
user's words unless the schema asks for a format.
"""

import datetime
import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from needle.corpus.number_words import UNITS, Number, Said, heard, listed
from needle.metrics.matching import values_equal
from needle.schema import Example

# How a value was traced.
HOW = (
    "verbatim",  # it stands in the request; case, punctuation, articles, possessives and word joints aside
    "number word",  # the same number in other words or digits
    "converted",  # the same amount in the unit that the parameter names, or a part in percent
    "format",  # a date, a clock time or a spelled-out sign in the form that the schema demands
    "relative date",  # a date in the demanded form that follows only with today's date
    "enum",  # a member of the schema's enum, or its const or default
    "boolean",
    "null",
    "implied",  # a number that a word implies: 1 for "next", 2 for "both"
    "documented",  # a number that the parameter's schema explains or bounds
    "partial",  # enough of its words, in any order and inflection
)
_ARTICLES = frozenset({"a", "an", "the"})
_STOP = _ARTICLES | frozenset(
    listed(
        "i i'm me my mine we us our you your he him his she her it its they them their this that these those is are "
        "was were be been am do does did have has had will would can could should shall may might must not and or but "
        "if so to of in on at by for from with about as into than then there here up out off over just please"
    )
)
_SELF = frozenset(listed("i i'm i've i'll i'd me my mine myself"))
# Words that a speller says for signs.
_SIGNS = frozenset(
    listed("dot point slash dash hyphen underscore colon at plus hash hashtag equals space percent star")
)
_SUFFIXES = ("ations", "ation", "ings", "ing", "ies", "ied", "ers", "er", "ed", "es", "ly", "s", "e", "y")
_MONTHS = listed("january february march april may june july august september october november december")
# Words that make a date depend on today's.
_RELATIVE = frozenset(
    listed(
        "today tonight tomorrow yesterday now next last this coming previous past ago week weekend month year day days "
        "weeks months years morning noon afternoon evening night monday tuesday wednesday thursday friday saturday "
        "sunday mon tue tues wed thu thur thurs fri sat sun christmas easter eve birthday anniversary spring summer "
        "autumn fall winter end start beginning since until tmrw tmr tomorow tonite"
    )
)
_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)|(\d\d?)[/.](\d\d?)[/.](\d{4})")
_TIME = re.compile(r"(?:^|[T ])(\d\d?):(\d\d)(?::\d\d)?")
_STAMP = re.compile(rf"(?:{_DATE.pattern})?(?:(?:^|[T ])\d\d?:\d\d(?::\d\d(?:\.\d+)?)?)?(?:Z|[+-]\d\d:?\d\d)?")
_DEMANDS = re.compile(r"yyyy|hh:?mm|\biso\b|24-hour|rfc ?3339|\d{4}-\d\d-\d\d", re.IGNORECASE)
_MONEY = frozenset(listed("money price amount cost costs fee budget salary pay payment balance"))
_MAX_NUMBER = 1e300  # beyond it floats overflow
_WITHOUT_SPACES = re.compile("[\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")


@dataclass(frozen=True)
class Traced:
    """`path` leads to the value: call, parameter, and further keys or positions. `how` is one of HOW, or empty with a
    `reason`."""

    path: str
    value: Any
    how: str
    reason: str = ""
    spans: tuple[tuple[int, int], ...] = ()  # the request's tokens that say a number

    @property
    def is_text(self) -> bool:
        return isinstance(self.value, str)


class Request:
    """What a request says, read once for all of an answer's values."""

    def __init__(self, query: str, *, garbled: bool):
        self.query, self.garbled = query, garbled
        self.said = Said(query)
        self.words = words_of(query)
        self.plain = _joined(self.words)
        self.without_articles = _joined(word for word in self.words if word not in _ARTICLES)

    @cached_property
    def hearings(self) -> tuple[Said, ...]:
        return (self.said, Said(heard(self.query))) if self.garbled else (self.said,)

    @cached_property
    def bag(self) -> frozenset[str]:
        """Every word, its stem, and every number that the words may mean."""
        numbers = {f"{number.value:g}" for number in self.said.numbers if number.how != "count"}
        return frozenset({*self.words, *map(_stem, self.words), *numbers})

    @cached_property
    def digits(self) -> str:
        return _joined(_in_digits(self.said))

    @cached_property
    def squeezed(self) -> "_Squeezed":
        return _Squeezed(self.words)

    @cached_property
    def spelled(self) -> "_Squeezed":
        """With words for signs left out, as "john at mail dot com"."""
        return _Squeezed([word for word in self.words if word not in _SIGNS])


class _Squeezed:
    """A text without spaces that remembers where its words begin and end."""

    def __init__(self, words: Sequence[str]):
        self.text = "".join(words)
        ends = [0]
        for word in words:
            ends.append(ends[-1] + len(word))
        self.joints = frozenset(ends)

    def holds(self, text: str) -> bool:
        at = self.text.find(text)
        while at >= 0:
            if at in self.joints and at + len(text) in self.joints:
                return True
            at = self.text.find(text, at + 1)
        return False


def words_of(text: str) -> list[str]:
    """Casefolded words without accents, punctuation and possessive 's."""
    text = unicodedata.normalize("NFKD", text.replace("’", "'").casefold())
    text = "".join(character for character in text if not unicodedata.combining(character))
    text = re.sub(r"(?<=\w)'s?\b", lambda match: "" if match.group() == "'s" else "'", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text)


def _joined(words: Iterator[str] | Sequence[str]) -> str:
    return f" {' '.join(words)} "


def _stem(word: str) -> str:
    """Without an inflection; at least three letters stay. It need not be a word, only the same for a word's forms."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word.removesuffix(suffix)
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def _in_digits(said: Said) -> list[str]:
    """The words with the longest number readings in digits."""
    longest: dict[int, tuple[int, float]] = {}
    for number in said.numbers:
        if number.how in ("digits", "words") and number.stop >= longest.get(number.first, (0, 0.0))[0]:
            longest[number.first] = (number.stop, number.value)
    out, i = [], 0
    while i < len(said.words):
        stop, value = longest.get(i, (0, 0.0))
        if stop:
            out.append(f"{value:.10g}")
            i = stop
        else:
            out += words_of(said.words[i])
            i += 1
    return [word for word in out if word not in _ARTICLES]


@dataclass(frozen=True)
class Grounding:
    """`words_min_frac`: of the content words of a free text, those that the request must hold. `garbled_min_frac`:
    similarity (difflib's ratio) from which a misspelt word of a garbled request counts as the value's word."""

    words_min_frac: Annotated[float, Field(gt=0, le=1)]
    garbled_min_frac: Annotated[float, Field(gt=0, le=1)]

    def trace(self, example: Example) -> list[Traced]:
        """Every value of every call, lists and objects taken apart, in the order of the answer."""
        request = Request(example.query, garbled=example.kind == "garbled")
        tools = {tool.name: tool for tool in example.tools}
        found: list[Traced] = []
        for call in example.calls:
            schema = tools[call.name].parameters if call.name in tools else {}
            for key, value in call.arguments.items():
                found += self._trace(request, value, _property(schema, schema, key), schema, f"{call.name}.{key}")
        return _without_guesses(found, request, example.kind)

    def _trace(
        self, request: Request, value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], path: str
    ) -> Iterator[Traced]:
        schema = _resolved(schema, root)
        if value is None or isinstance(value, bool):
            yield Traced(path, value, "null" if value is None else "boolean")
        elif any(values_equal(value, one) for one in _allowed(schema, root)):
            yield Traced(path, value, "enum")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                child = _with_context(_property(schema, root, key), schema)
                yield from self._trace(request, item, child, root, f"{path}.{key}")
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                child = _with_context(_items(schema, root, i), schema)
                yield from self._trace(request, item, child, root, f"{path}.{i}")
        elif isinstance(value, str):
            yield self._trace_text(request, value, schema, path)
        else:
            yield _trace_number(request, value, schema, path)

    def _trace_text(self, request: Request, value: str, schema: Mapping[str, Any], path: str) -> Traced:
        how = _text_as_said(request, value) or _in_other_form(request, value, schema)
        if not how and not _STAMP.fullmatch(value.strip()):
            how = _text_in_signs(request, value)
        if how:
            return Traced(path, value, how)
        if _STAMP.fullmatch(value.strip()):
            return Traced(path, value, "", "the request does not say this date or time, or not in a form to change")
        if value.casefold() in _SELF and _SELF & set(request.words):
            return Traced(path, value, "partial")
        wanted = [word for word in words_of(value) if word not in _STOP] or words_of(value)
        if not wanted:
            return Traced(path, value, "", "it has no word to look for")
        lacking = [word for word in wanted if not self._has_word(request, word)]
        share = 1 - len(lacking) / len(wanted)
        # A number in a text is copied or it is wrong; other words may be put differently.
        if share >= self.words_min_frac and not any(word[0].isdecimal() for word in lacking):
            return Traced(path, value, "partial")
        if request.garbled and self._alike(request, value):
            return Traced(path, value, "partial")
        shown = ", ".join(repr(word) for word in lacking[:4])
        return Traced(path, value, "", f"the request does not say {shown} ({share:.0%} of its words are there)")

    def _has_word(self, request: Request, word: str) -> bool:
        if word in request.bag or (not word[0].isdecimal() and _stem(word) in request.bag):
            return True
        if request.squeezed.holds(word):
            return True
        return request.garbled and any(
            _similar(word, other) >= self.garbled_min_frac for other in _pieces(request.words, 2)
        )

    def _alike(self, request: Request, value: str) -> bool:
        """As many words of the request as the value has, one more or less, are spelled about like it."""
        wanted = words_of(value)
        text = "".join(wanted)
        sizes = {max(1, len(wanted) + change) for change in (-1, 0, 1)}
        runs = (
            "".join(request.words[i : i + size]) for size in sizes for i in range(max(0, len(request.words) - size + 1))
        )
        return any(_similar(text, run) >= self.garbled_min_frac for run in runs)


def _pieces(words: Sequence[str], longest: int) -> Iterator[str]:
    for size in range(1, longest + 1):
        for i in range(len(words) - size + 1):
            yield "".join(words[i : i + size])


def _similar(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right, autojunk=False).ratio()


def _text_as_said(request: Request, value: str) -> str:
    words = words_of(value)
    bare = [word for word in words if word not in _ARTICLES]
    if not words:
        return "verbatim" if value.strip() and value.strip() in request.query else ""
    if _joined(words) in request.plain or (bare and _joined(bare) in request.without_articles):
        return "verbatim"
    if _WITHOUT_SPACES.search(value) and value.casefold() in request.query.casefold():
        return "verbatim"
    return "verbatim" if request.squeezed.holds("".join(words)) else ""


def _text_in_signs(request: Request, value: str) -> str:
    """In digits where the request has words, or with signs that it spells out."""
    digits = _in_digits(Said(value))
    if digits and _joined(digits) in request.digits:
        return "number word"
    bare = "".join(word for word in words_of(value) if word not in _SIGNS)
    return "format" if bare and request.spelled.holds(bare) else ""


def _in_other_form(request: Request, value: str, schema: Mapping[str, Any]) -> str:
    """A date or a clock time. One that needs today's date is only allowed where the schema asks for a form."""
    date, time = _DATE.search(value), _TIME.search(value)
    demanded = schema.get("format") in ("date", "time", "date-time") or "pattern" in schema
    demanded = demanded or bool(_DEMANDS.search(str(schema.get("description", ""))))
    hows = [_date_as_said(request, value, *parts) for parts in _readings(date)] if date else []
    how = next((one for wanted in ("verbatim", "format", "relative date") for one in hows if one == wanted), "")
    if how == "relative date" and not demanded:
        how = ""
    if time and (how or not date):
        clock = (int(time.group(1)), int(time.group(2)))
        # A date-time without a clock time in the request is the day's beginning or end.
        whole_day = bool(date) and clock in ((0, 0), (23, 59))
        how = (how or "format") if clock in request.said.times or whole_day else ""
    return how


def _readings(date: re.Match) -> list[tuple[int, int, int]]:
    """(year, month, day); 4/5/2025 may be the 4th of May or the 5th of April."""
    if date.group(1):
        return [(int(date.group(1)), int(date.group(2)), int(date.group(3)))]
    left, right, year = int(date.group(4)), int(date.group(5)), int(date.group(6))
    return [(year, left, right), (year, right, left)]


def _date_as_said(request: Request, value: str, year: int, month: int, day: int) -> str:
    try:
        datetime.date(year, month, day)
    except ValueError:
        return ""
    names = [name for name in request.words if any(_is_month(name, month_name) for month_name in _MONTHS)]
    said = {number.value for number in request.said.numbers if number.how != "count"}
    years = {int(word) for word in request.words if re.fullmatch(r"(?:19|20)\d\d", word)}
    if value in request.query:
        return "verbatim"
    if names:
        month_said = any(_is_month(name, _MONTHS[month - 1]) for name in names)
        day_said = (
            day in said or f"{day}th" in request.words or bool({f"{day}st", f"{day}nd", f"{day}rd"} & request.bag)
        )
        whole_month = day in (1, 28, 29, 30, 31) and not any(1 <= n <= 31 and n % 1 == 0 for n in said - {year})
        return "format" if month_said and (day_said or whole_month) and (not years or year in years) else ""
    if {day, month} <= said and (year in said or year % 100 in said or not years):
        return "format"
    return "relative date" if _RELATIVE & set(request.words) or day in said else ""


def _is_month(word: str, month: str) -> bool:
    return word == month or (len(word) >= 3 and month.startswith(word)) or (word == "sept" and month == "september")


# Numbers


def _trace_number(request: Request, value: float, schema: Mapping[str, Any], path: str) -> Traced:
    name = [word.casefold() for word in _name_words(path.rpartition(".")[2])]
    description = str(schema.get("description", ""))
    if abs(value) > _MAX_NUMBER:
        said_so = str(value) in request.query
        return Traced(path, value, "verbatim" if said_so else "", "" if said_so else "no request says such a number")
    for said in request.hearings:
        how, spans = _number_as_said(said, value, name, description)
        if how:
            return Traced(path, value, how, spans=spans if said is request.said else ())
    if name[-1:] == ["month"] and any(_is_month(word, month) for word in request.words for month in _months(value)):
        return Traced(path, value, "format")
    if value < 0 and "negative" in description.casefold():
        turned = _trace_number(request, -value, schema, path)
        return replace(turned, value=value)
    if any(number.how == "count" and number.value == value for number in request.said.numbers):
        return Traced(path, value, "implied")
    if value in _documented(schema, description):
        return Traced(path, value, "documented")
    return Traced(path, value, "", f"the request says {_numbers_shown(request)}")


def _numbers_shown(request: Request) -> str:
    readings = sorted({number.value for number in request.said.numbers if number.how != "count"})
    return ", ".join(f"{reading:g}" for reading in readings[:8]) or "no number"


def _number_as_said(said: Said, value: float, name: Sequence[str], description: str) -> tuple[str, tuple]:
    """How, and the (first, stop) tokens of the request that say it."""
    targets = _units_of(name, description)
    spoken = [number for number in said.numbers if number.how != "count" and _same(number.value, value)]
    # "Two hours" does not say 2 where minutes are asked for.
    other_unit = {
        (amount.first, amount.stop)
        for amount in said.amounts
        for dimension, _ in targets
        if amount.dimension == dimension and (dimension, amount.factor) not in targets
    }
    spoken = [number for number in spoken if not _is_inside((number.first, number.stop), other_unit)]
    spans = tuple((number.first, number.stop) for number in spoken)
    converted = _converted(said, value, targets) or _part_of_whole(said, value, name, description)
    if spoken:
        return ("verbatim" if any(number.how == "digits" for number in spoken) else "number word"), spans + converted
    if converted:
        return "converted", converted
    if _is_clock(said, value, name, description):
        return "format", ()
    return "", ()


def _same(said: float, value: float) -> bool:
    """Equal, or equal after rounding to the decimals that the value has."""
    if said == value:
        return True
    return said % 1 != 0 and value != 0 and abs(said - value) <= 1e-9 + 0.5 * 10.0 ** -_decimals(value)


def _decimals(value: float) -> int:
    text = f"{value:.10f}".rstrip("0")
    return min(6, len(text.partition(".")[2])) if "." in text else 0


def _is_inside(span: tuple[int, int], spans: Iterable[tuple[int, int]]) -> bool:
    return any(left <= span[0] and span[1] <= right for left, right in spans)


def _months(value: float) -> list[str]:
    return [month for i, month in enumerate(_MONTHS, 1) if i == value]


def _name_words(name: str) -> list[str]:
    return re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)


def _units_of(name: Sequence[str], description: str) -> set[tuple[str, float]]:
    """(dimension, factor) of the units that the parameter's name gives, else of those in its description."""
    named = {unit for word in name for unit in UNITS.get(word, ())}
    if named:
        return named
    # "Second side" and "each day" name no unit.
    text = re.sub(r"\b(?:second|in|(?:each|per|every|a|an) \w+)\b", " ", description.casefold())
    found = {unit for word in re.findall(r"[a-z]{2,}", text) for unit in UNITS.get(word, ())}
    return found | ({("money", 1.0)} if _MONEY & {*name, *re.findall("[a-z]+", text)} else set())


def _converted(said: Said, value: float, targets: set[tuple[str, float]]) -> tuple:
    """The amounts that come to `value` in a target unit, rounded as it is."""
    spans = []
    for amount in said.amounts:
        for dimension, factor in targets:
            exact = amount.base / factor
            close = abs(exact - value) <= 1e-6 * max(1.0, abs(value)) or (exact >= 1 and _same(exact, value))
            if amount.dimension == dimension and close:
                spans.append((amount.first, amount.stop))
    return tuple(spans)


def _part_of_whole(said: Said, value: float, name: Sequence[str], description: str) -> tuple:
    """Half as 50 where the parameter is in percent; 20% as 0.2 where it is a share."""
    percent = "percent" in name or re.search(r"percent|\b0\b.*to 100", description, re.IGNORECASE)
    spans = []
    for number in said.numbers:
        multiple = number.how == "part" or number.value % 1 or said.words[number.first] in ("double", "twice", "triple")
        if percent and multiple and number.value <= 4 and _same(100 * number.value, value):
            spans.append((number.first, number.stop))
        behind = said.words[number.stop] if number.stop < len(said.words) else ""
        if not percent and behind in ("%", "percent") and _same(number.value / 100, value):
            spans.append((number.first, number.stop))
    return tuple(spans)


def _is_clock(said: Said, value: float, name: Sequence[str], description: str) -> bool:
    if "hour" in name and re.search(r"clock|0 to 23|24-hour", description):
        return any(hour == value for hour, _ in said.times)
    return "minute" in name and any(minute == value for _, minute in said.times)


def _documented(schema: Mapping[str, Any], description: str) -> set[float]:
    numbers = {number.value for number in Said(description).numbers if number.how in ("digits", "words")}
    return numbers | {float(schema[key]) for key in ("minimum", "maximum") if isinstance(schema.get(key), int | float)}


def _without_guesses(found: list[Traced], request: Request, kind: str) -> list[Traced]:
    """Where the request says a number that no value of the answer took up, two kinds of number are ungrounded after
    all: those that were only implied or documented, and those that the answer has more often than the request."""
    taken = {i for one in found for first, stop in one.spans for i in range(first, stop)}
    texts = {word for one in found if isinstance(one.value, str) for word in words_of(one.value)}
    free = [number for number in request.said.numbers if _is_free(request, number, taken, texts)]
    if not free:
        return found
    left = f"and {free[0].value:g} is no value of the answer"
    guessed = f"the request says {_numbers_shown(request)}, {left}"
    found = [replace(one, how="", reason=guessed) if one.how in ("implied", "documented") else one for one in found]
    if kind in ("disfluent", "garbled"):  # a corrected number is left over too
        return found
    uses = Counter(one.spans for one in found if _is_alone(one))
    scarce = {spans for spans, n in uses.items() if n > len({first for first, _ in spans})}
    reason = f"the answer has it more often than the request, {left}"
    return [replace(one, how="", reason=reason) if _is_alone(one) and one.spans in scarce else one for one in found]


def _is_alone(one: Traced) -> bool:
    """A number that is no list's item: lists may be used twice."""
    return bool(one.spans) and not one.path.rpartition(".")[2].isdecimal()


def _is_free(request: Request, number: Number, taken: set[int], texts: set[str]) -> bool:
    words = request.said.words[number.first : number.stop]
    if number.how == "count" or words in (["one"], ["second"], ["quarter"], ["quarters"]):
        return False
    return not taken & set(range(number.first, number.stop)) and not texts & set(words)


# Schemas


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follows a local $ref; what lies beside it stays."""
    for _ in range(8):
        if not isinstance(schema, Mapping):
            return {}
        target = schema.get("$ref")
        if not isinstance(target, str) or not target.startswith("#/"):
            return schema
        found: Any = root
        for step in target[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step, {}) if isinstance(found, Mapping) else {}
        rest = {key: child for key, child in schema.items() if key != "$ref"}
        schema = {**found, **rest} if isinstance(found, Mapping) else rest
    return schema


def _branches(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    schema = _resolved(schema, root)
    yield schema
    for key in ("anyOf", "oneOf", "allOf") if depth < 4 else ():
        for branch in schema.get(key, ()):
            yield from _branches(branch, root, depth + 1)


def _allowed(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[Any]:
    for branch in _branches(schema, root):
        yield from branch.get("enum", ())
        yield from (branch[key] for key in ("const", "default") if key in branch)


def _property(schema: Mapping[str, Any], root: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    for branch in _branches(schema, root):
        child = branch.get("properties", {}).get(key)
        if isinstance(child, Mapping):
            return child
    extra = schema.get("additionalProperties")
    return extra if isinstance(extra, Mapping) else {}


def _items(schema: Mapping[str, Any], root: Mapping[str, Any], at: int) -> Mapping[str, Any]:
    for branch in _branches(schema, root):
        prefix = branch.get("prefixItems", ())
        if at < len(prefix):
            return prefix[at] if isinstance(prefix[at], Mapping) else {}
        if isinstance(branch.get("items"), Mapping):
            return branch["items"]
    return {}


def _with_context(child: Mapping[str, Any], parent: Mapping[str, Any]) -> Mapping[str, Any]:
    """A list's description speaks for its items too."""
    description = f"{parent.get('description', '')} {child.get('description', '')}".strip()
    return {**child, "description": description}
