"""Numbers, amounts with a unit, and clock times as requests say them: every reading that the words allow.

A reading is a possibility, not a choice: "two fifty" may be 2, 50, 250 or 2.5, "half seven" 7:30 or 6:30. What is asked
here is only whether a given value can be traced to the words.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property


def listed(words: str) -> list[str]:
    return words.split()


_ONES = listed("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
_ONES += listed("seventeen eighteen nineteen")
_TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")
_SMALL = {word: float(i) for i, word in enumerate(_ONES)} | {word: 10.0 * i for i, word in enumerate(_TENS, 2)}
_SMALL |= {"nil": 0.0, "nought": 0.0, "naught": 0.0, "fourty": 40.0}
_ZEROS = ("oh", "o", "zero", "nought")
_SCALES = {"thousand": 1e3, "grand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "lakh": 1e5, "crore": 1e7}
_SCALES |= {f"{word}s": value for word, value in _SCALES.items()}
_GROUPS = {"dozen": 12.0, "dozens": 12.0, "score": 20.0}
_SUFFIXES = {"k": 1e3, "m": 1e6, "mn": 1e6, "mil": 1e6, "b": 1e9, "bn": 1e9}  # only directly after digits
_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8}
_PARTS |= {"tenth": 10, "hundredth": 100, "halfway": 2}
_PARTS |= {f"{word}s": value for word, value in _PARTS.items() if word not in ("half", "halves")}
_SIGNS = {"½": 1 / 2, "¼": 1 / 4, "¾": 3 / 4, "⅓": 1 / 3, "⅔": 2 / 3, "⅛": 1 / 8}
_IRREGULAR = {"first": 1.0, "second": 2.0, "third": 3.0, "fifth": 5.0, "eighth": 8.0, "ninth": 9.0, "twelfth": 12.0}
_ORDINALS = {f"{word}th": float(i) for i, word in enumerate(_ONES)} | _IRREGULAR
_ORDINALS |= {f"{word[:-1]}ieth": 10.0 * i for i, word in enumerate(_TENS, 2)}
_NINTHS = tuple(word for word, value in _ORDINALS.items() if 0 < value < 10)
# Words that stand for a number without being one.
_COUNTS = {"once": 1, "single": 1, "a": 1, "an": 1, "another": 1, "next": 1, "last": 1, "latest": 1, "newest": 1}
_COUNTS |= dict.fromkeys(("previous", "solo", "alone"), 1)
_COUNTS |= dict.fromkeys(("twice", "double", "both", "pair", "pairs", "couple"), 2)
_COUNTS |= {"thrice": 3, "triple": 3, "trio": 3, "no": 0, "none": 0, "without": 0}
_EVERY = {"hourly": 3600.0, "daily": 86400.0, "weekly": 7 * 86400.0}

_TOKEN = re.compile(
    r"""(?<!\w)\d+(?:\.\d+)?e[-+]?\d+(?![\w.])   # 1e-4
    | \d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?(?!\d)   # 1,200.50; 12,34,000
    | \d+(?:\.\d+)? | (?<!\w)\.\d+
    | [^\W\d_]+(?:'[^\W\d_]+)*
    | [½¼¾⅓⅔⅛%°$€£¥₹:/+-]""",
    re.VERBOSE,
)

# alias -> (dimension, factor to that dimension's base unit); an alias may name several units
_UNIT_NAMES: dict[str, dict[float, str]] = {
    "time": {
        1e-3: "ms msec millisecond milliseconds",
        1: "s sec secs second seconds",
        60: "m min mins minute minutes",
        3600: "h hr hrs hour hours",
        86400: "d day days night nights",
        7 * 86400: "w wk wks week weeks",
        14 * 86400: "fortnight fortnights",
        365 * 86400 / 12: "month months mo",
        365 * 86400: "y yr yrs year years",
        3650 * 86400: "decade decades",
    },
    "length": {
        1e-3: "mm millimetre millimetres millimeter millimeters",
        1e-2: "cm centimetre centimetres centimeter centimeters",
        1: "m metre metres meter meters",
        1e3: "km kms kilometre kilometres kilometer kilometers k",
        0.0254: "in inch inches",
        0.3048: "ft foot feet",
        0.9144: "yd yard yards",
        1609.344: "mi mile miles",
    },
    "mass": {
        1e-3: "mg milligram milligrams",
        1: "g gram grams gramme grammes",
        1e3: "kg kgs kilo kilos kilogram kilograms",
        1e6: "t tonne tonnes ton tons",
        28.349523125: "oz ounce ounces",
        453.59237: "lb lbs pound pounds",
        6350.29318: "st stone",
    },
    "volume": {
        1e-3: "ml millilitre millilitres milliliter milliliters",
        1e-2: "cl centilitre centilitres",
        1: "l litre litres liter liters",
        0.236588: "cup cups",
        0.473176: "pint pints",
        3.785412: "gallon gallons",
    },
    "data": {1: "mb megabyte megabytes", 1e-3: "kb kilobyte kilobytes", 1e3: "gb gigabyte gigabytes", 1e6: "tb"},
    "money": {
        1: "dollar dollars euro euros pound pounds quid buck bucks",
        0.01: "cent cents pence penny p",
        10: "tenner",
        5: "fiver",
    },
}
UNITS: dict[str, tuple[tuple[str, float], ...]] = {}
for _dimension, _names in _UNIT_NAMES.items():
    for _factor, _aliases in _names.items():
        for _alias in _aliases.split():
            UNITS[_alias] = (*UNITS.get(_alias, ()), (_dimension, _factor))
# Every word that is a number, or part of one.
NUMBER_WORDS = frozenset({*_SMALL, *_ORDINALS, *_SCALES, "hundred", "hundreds", "dozen"})
# How number words are misheard and misspelt.
_HOMOPHONES = {"to": "two", "too": "two", "for": "four", "fore": "four", "won": "one", "ate": "eight", "haf": "half"}
_SPELLABLE = [word for word in (*_SMALL, *_ORDINALS, *_SCALES, *UNITS) if len(word) >= 5]
_SPELLING_MIN_FRAC = 0.8


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    start: int  # characters
    end: int


@dataclass(frozen=True, slots=True)
class Number:
    """One reading of the tokens from `first` to before `stop`. `how`: digits, words, part (of a whole) or count (a word
    like "twice")."""

    value: float
    first: int
    stop: int
    how: str


@dataclass(frozen=True, slots=True)
class Amount:
    """A number with the unit that it was said with."""

    value: float
    dimension: str
    factor: float
    first: int
    stop: int

    @property
    def base(self) -> float:
        return self.value * self.factor


def tokenise(text: str) -> list[Token]:
    """Words, numbers and the signs that belong to numbers, casefolded."""
    text = text.replace("’", "'")
    return [Token(match.group().casefold(), *match.span()) for match in _TOKEN.finditer(text)]


def heard(text: str) -> str:
    """A garbled text with words that sound or look like number words and units put right."""
    out = []
    for word in text.split():
        bare = word.casefold().strip(".,!?")
        if bare in _HOMOPHONES:
            word = _HOMOPHONES[bare]
        elif len(bare) >= 4 and bare.isalpha() and bare not in UNITS:
            word = next(iter(difflib.get_close_matches(bare, _SPELLABLE, 1, _SPELLING_MIN_FRAC)), word)
        out.append(word)
    return " ".join(out)


def is_digits(token: str) -> bool:
    return token[0].isdecimal() or (token[0] == "." and len(token) > 1)


def _digits(token: str) -> float:
    return float(token.replace(",", ""))


def _hour_before(hour: int) -> int:
    return 12 if hour == 1 else (hour - 1) % 24


class Said:
    """The numbers, amounts and clock times of one text."""

    def __init__(self, text: str):
        self.tokens = tokenise(text)
        self.words = [token.text for token in self.tokens]

    @cached_property
    def numbers(self) -> list[Number]:
        """Every reading, in the order of the words; not every one is meant."""
        found: dict[tuple[float, int, int], Number] = {}
        for number in self._all_numbers():
            if self._splits_word(number.first - 1) or self._splits_word(number.stop):
                continue
            found.setdefault((number.value, number.first, number.stop), number)
        return list(found.values())

    def _splits_word(self, at: int) -> bool:
        """Between the parts of "twenty-one"."""
        return self._word(at) == "-" and self._word(at - 1) in _TENS and self._word(at + 1) in (*_ONES[1:10], *_NINTHS)

    @cached_property
    def _from(self) -> dict[int, list[Number]]:
        by_first: dict[int, list[Number]] = defaultdict(list)
        for number in self.numbers:
            if number.how in ("digits", "words"):
                by_first[number.first].append(number)
        return by_first

    def _all_numbers(self) -> Iterator[Number]:
        for at, word in enumerate(self.words):
            plain = [*self._cardinals(at), *self._parts(at), *self._points(at), *self._runs(at)]
            if word in _ORDINALS:
                plain.append(Number(_ORDINALS[word], at, at + 1, "words"))
            elif word in _COUNTS:
                plain.append(Number(_COUNTS[word], at, at + 1, "count"))
            elif word in ("dozen", "dozens"):
                plain.append(Number(_GROUPS[word], at, at + 1, "words"))
            if self._is_decade(at):
                first = _digits(word) + (1900 if len(word) == 2 else 0)
                yield from (Number(year, at, at + 2, "words") for year in (first, first + 9))
            wider = [one for number in plain for one in (number, *self._continued(number))]
            yield from wider
            if self._is_minus(at - 1):
                yield from (Number(-number.value, at - 1, number.stop, number.how) for number in wider)

    def _is_decade(self, at: int) -> bool:
        """1980s, 80s."""
        word = self._word(at)
        glued = self._word(at + 1) == "s" and self.tokens[at].end == self.tokens[at + 1].start
        return glued and re.fullmatch(r"(?:1\d|20)?\d0", word) is not None

    def _is_minus(self, at: int) -> bool:
        """A hyphen between two words is none."""
        if self._word(at) == "-":
            return at == 0 or self.tokens[at - 1].end < self.tokens[at].start
        return self._word(at) in ("minus", "negative")

    def _cardinals(self, at: int) -> Iterator[Number]:
        """Digits or number words with their scales, every prefix of the longest."""
        if at and (self.words[at] == "hundred" or self.words[at] in _SCALES) and self.words[at - 1] in _SMALL:
            return
        total, group, last_scale, how = 0.0, None, float("inf"), "digits"
        i = at
        while i < len(self.words):
            word = self.words[i]
            if word in ("and", "-") and i > at:
                joins = word == "-" or group is None or group % 100 == 0
                following = self.words[i + 1] if i + 1 < len(self.words) else ""
                if not joins or not (following in _SMALL or following in _ORDINALS):
                    return
                i += 1
                continue
            if is_digits(word):
                if group is not None:
                    return
                group = _digits(word)
            elif word in _SMALL or (word in _ORDINALS and i > at):
                value = _SMALL.get(word, _ORDINALS.get(word, 0.0))
                fits = group is None or (group >= 100 and group % 100 == 0)
                fits |= group is not None and group % 100 >= 20 and group % 10 == 0 and 0 < value < 10
                if not fits:
                    return
                group, how = (group or 0.0) + value, "words"
            elif word in ("hundred", "hundreds") and (group is None or 0 < group < 100) and (i > at or total == 0):
                group, how = (1.0 if group is None else group) * 100, "words"
            elif (scale := self._scale(i, at)) and scale < last_scale and (group is not None or i == at):
                total += (1.0 if group is None else group) * scale
                group, last_scale = None, scale
                how = "digits" if word in _SUFFIXES else "words"
            else:
                return
            i += 1
            yield Number(total + (group or 0.0), at, i, how)
            if word in _ORDINALS:
                return

    def _scale(self, i: int, at: int) -> float:
        word = self.words[i]
        if word in _SCALES:
            return _SCALES[word]
        glued = i > at and is_digits(self.words[i - 1]) and self.tokens[i - 1].end == self.tokens[i].start
        return _SUFFIXES.get(word, 0.0) if glued else 0.0

    def _parts(self, at: int) -> Iterator[Number]:
        """Half, a quarter, three quarters, two thirds, 3/4, ½."""
        word = self.words[at]
        if word in _SIGNS:
            yield Number(_SIGNS[word], at, at + 1, "part")
        if word in _PARTS:
            yield Number(1 / _PARTS[word], at, at + 1, "part")
        for number in self._cardinals(at):
            stop = number.stop + (self._word(number.stop) == "-")
            if self._word(stop) in _PARTS:
                yield Number(number.value / _PARTS[self._word(stop)], at, stop + 1, "part")
            if self._word(number.stop) == "/" and is_digits(self._word(number.stop + 1) or "x"):
                below = _digits(self._word(number.stop + 1))
                if below:
                    yield Number(number.value / below, at, number.stop + 2, "part")
            if self._word(number.stop) in _SIGNS:
                yield Number(number.value + _SIGNS[self._word(number.stop)], at, number.stop + 1, "words")

    def _points(self, at: int) -> Iterator[Number]:
        """Three point one four, point five."""
        wholes = [(0.0, at)] if self.words[at] == "point" else [(n.value, n.stop) for n in self._cardinals(at)]
        for whole, point in wholes:
            if self._word(point) != "point" or whole % 1:
                continue
            behind, i = "", point + 1
            while self._word(i) in _SMALL or self._word(i) in _ZEROS or is_digits(self._word(i) or "x"):
                word = self._word(i)
                behind += word if word.isdecimal() else f"{_SMALL.get(word, 0.0):g}" if not is_digits(word) else ""
                i += 1
                if behind:
                    yield Number(float(f"{whole:.0f}.{behind}"), at, i, "words")

    def _runs(self, at: int) -> Iterator[Number]:
        """Numbers said piece by piece: nineteen eighty four, four two one, 12 000; two fifty is also 2.5."""
        text, i, pieces = "", at, 0
        while pieces < 12 and (piece := self._piece(i)):
            value, stop = piece
            if is_digits(self.words[i]) and pieces and not re.fullmatch(r"\d{3}", self.words[i]):
                return
            text, i, pieces = text + value, stop, pieces + 1
            if pieces > 1:
                yield Number(float(text), at, i, "words")
            if pieces == 2 and len(value) == 2 and not is_digits(self.words[at]):
                yield Number(float(text) / 100, at, i, "words")

    def _piece(self, i: int) -> tuple[str, int] | None:
        if self._word(i) in _ZEROS:
            return "0", i + 1
        i += self._word(i) == "-"
        if i < len(self.words) and self.words[i].isdecimal():
            return self.words[i], i + 1
        readings = [n for n in self._cardinals(i) if n.value < 100 and n.how == "words"] if i < len(self.words) else []
        return (f"{readings[-1].value:.0f}", readings[-1].stop) if readings else None

    def _continued(self, number: Number) -> Iterator[Number]:
        """With "and a half", and with a scale or dozen behind a part or a count."""
        wider = [number]
        tail = number.stop
        if self._word(tail) in ("and", "&") and number.how != "part":
            tail += 1 + (self._word(tail + 1) in ("a", "an"))
            wider += [
                Number(number.value + part.value, number.first, part.stop, "words")
                for part in (self._parts(tail) if tail < len(self.words) else ())
                if part.value < 1
            ]
        yield from wider[1:]
        for one in wider:
            tail = one.stop
            tail += self._word(tail) == "of"
            tail += self._word(tail) in ("a", "an")
            scale = _SCALES.get(self._word(tail), _GROUPS.get(self._word(tail), 0.0))
            if scale and (one.how in ("part", "count") or one is not number or self._word(tail) in _GROUPS):
                yield Number(one.value * scale, number.first, tail + 1, "words")

    def _word(self, i: int) -> str:
        return self.words[i] if 0 <= i < len(self.words) else ""

    @cached_property
    def amounts(self) -> list[Amount]:
        """Numbers with a unit, and sums of neighbours in falling units: 1 hour 20 minutes, 5 foot 11, an hour and a
        half. A unit alone is one of it: the past minute, hourly."""
        single = [amount for number in self.numbers for amount in self._amounts_of(number)]
        single += self._bare_units()
        whole = list(single)
        level, by_first = single, defaultdict(list)
        for amount in single:
            by_first[amount.first].append(amount)
        while level:
            level = [joined for left in level for joined in self._joined(left, by_first)]
            whole += level
        return whole

    def _amounts_of(self, number: Number) -> Iterator[Amount]:
        at = number.stop
        while self._word(at) in ("-", "of", "a", "an", "more", "full", "whole", "extra", "straight", "°"):
            at += 1
        for dimension, factor in UNITS.get(self._word(at).removesuffix("'s"), ()):
            if self._word(at + 1) in ("/", "per") or (self._word(at) == "s" and self._is_decade(at - 1)):
                continue
            yield Amount(number.value, dimension, factor, number.first, at + 1)
            tail = at + 1
            if self._word(tail) == "and":
                tail += 1 + (self._word(tail + 1) in ("a", "an"))
                for part in self._parts(tail) if tail < len(self.words) else ():
                    yield Amount(number.value + part.value, dimension, factor, number.first, part.stop)
        if number.first and self.words[number.first - 1] in "$€£¥₹":
            yield Amount(number.value, "money", 1.0, number.first - 1, number.stop)

    def _bare_units(self) -> Iterator[Amount]:
        counted = {number.stop for number in self.numbers}
        for at, word in enumerate(self.words):
            if word in _EVERY:
                yield Amount(1.0, "time", _EVERY[word], at, at + 1)
            for dimension, factor in UNITS.get(word.removesuffix("'s"), ()) if at not in counted else ():
                if (len(word) > 3 and word[-1] != "s") or word.endswith("'s"):
                    yield Amount(1.0, dimension, factor, at, at + 1)

    def _joined(self, left: Amount, by_first: Mapping[int, list[Amount]]) -> Iterator[Amount]:
        stop = left.stop + (self._word(left.stop) in ("and", "plus"))
        for right in by_first.get(stop, ()):
            if right.dimension == left.dimension and right.factor < left.factor:
                base = left.base + right.base
                yield Amount(base / right.factor, left.dimension, right.factor, left.first, right.stop)
        smaller = {("time", 3600.0): 60.0, ("time", 60.0): 1.0, ("length", 0.3048): 0.0254, ("money", 1.0): 0.01}
        smaller |= {("mass", 6350.29318): 453.59237, ("mass", 453.59237): 28.349523125, ("length", 1.0): 0.01}
        factor = smaller.get((left.dimension, left.factor))
        for number in self._from.get(stop, ()) if factor else ():
            if self._word(number.stop) not in UNITS:
                base = left.base + number.value * factor
                yield Amount(base / factor, left.dimension, factor, left.first, number.stop)

    @cached_property
    def times(self) -> set[tuple[int, int]]:
        """(hour, minute) on the 24-hour clock. Without a.m. or p.m. both halves of the day are possible."""
        found: set[tuple[int, int]] = set()
        for word, hours in (("noon", (12,)), ("midday", (12,)), ("lunchtime", (12,)), ("midnight", (0, 24))):
            if word in self.words:
                found |= {(hour, 0) for hour in hours}
        for number in self.numbers:
            if number.how in ("digits", "words") and number.value >= 0 and number.value % 1 == 0:
                for hour, minute, stop in self._clock(number):
                    found |= {(h, minute) for h in self._halves(hour, stop)}
            elif re.fullmatch(r"\d{1,2}\.[0-5]\d", self.words[number.first]) and number.stop == number.first + 1:
                hour, minute = map(int, self.words[number.first].split("."))
                found |= {(h, minute) for h in self._halves(hour, number.stop)}
        return found

    def _clock(self, number: Number) -> Iterator[tuple[int, int, int]]:
        """(hour as said, minute, where its words end) of every reading with `number` as the hour."""
        value, before, stop = int(number.value), number.first - 1, number.stop
        if value > 24:
            hour, minute = divmod(value, 100)
            if hour <= 24 and minute < 60 and 100 <= value <= 2400:
                yield hour, minute, stop
            return
        yield value, 0, stop
        after = stop + (self._word(stop) in (":", "h"))
        for minutes in self._from.get(after, ()):
            if minutes.value in range(60):
                written = self._word(minutes.first)
                if not is_digits(written) or len(written) == 2:
                    yield value, int(minutes.value), minutes.stop
        if self._word(stop) in ("oh", "o"):
            for minutes in self._from.get(stop + 1, ()):
                if minutes.value in range(10):
                    yield value, int(minutes.value), minutes.stop
        if self._word(before) == "half":  # British "half seven" is 7:30, elsewhere it is 6:30
            yield value, 30, stop
            yield _hour_before(value), 30, stop
        if self._word(before) in ("past", "after", "to", "before", "of", "till", "til"):
            later = self._word(before) in ("past", "after")
            for minute in self._minutes_until(before):
                yield (value, minute, stop) if later else (_hour_before(value), 60 - minute, stop)

    def _minutes_until(self, stop: int) -> Iterator[int]:
        stop -= self._word(stop - 1) in ("minute", "minutes", "mins", "min")
        if self._word(stop - 1) == "half":
            yield 30
        if self._word(stop - 1) == "quarter":
            yield 15
        for first in range(max(0, stop - 3), stop):
            for number in self._from.get(first, ()):
                if number.stop == stop and number.value in range(1, 60):
                    yield int(number.value)

    def _halves(self, hour: int, stop: int) -> set[int]:
        stop += self._word(stop) in ("o'clock", "sharp", "oclock")
        mark = self._word(stop)
        if mark in ("a", "p") and self._word(stop + 1) == "m":
            mark += "m"
        if hour > 12 or hour == 0:
            return {hour % 24}
        if mark == "am":
            return {hour % 12}
        return {hour % 12 + 12} if mark == "pm" else {hour % 12, hour % 12 + 12}
