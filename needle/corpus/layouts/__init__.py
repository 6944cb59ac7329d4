"""Public tool-calling data of the common layouts, read as Needle's examples.

    read("data.jsonl", "auto", split=None, limit=None)      a file: .jsonl, .json (a list, or a record a line), .parquet
    read("folder", "xlam", split="train", limit=1000)       the files of a folder, here those named train
    read("hub:Team-ACE/ToolACE@main", "toolace", split="train", limit=None)

Every record becomes one sound example, or one entry of the quarantine with its reason. Conversations give their first
request and its answer; what follows is left away. The one change ever made to an argument is 3.0 written 3 for an
integer, and it is counted. `python -c "import needle.corpus.layouts as l; help(l.LAYOUTS['xlam'])"` shows a layout.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from needle.corpus.catalogue import MANY_BAD_FRAC, Catalogue
from needle.corpus.layouts import bfcl, examples, hermes, needle_v1, openai, toolace, xlam
from needle.corpus.layouts.files import Source, sources
from needle.corpus.layouts.schemas import tidy
from needle.errors import ConfigError, DataError
from needle.schema import BadLine, Example, ToolCall, canonical_json

AUTO = "auto"
Converter = Callable[[Mapping[str, Any]], Example]
# name -> converter; its docstring names the layout, its source and its shape.
LAYOUTS: dict[str, Converter] = {
    "examples": examples.convert,
    "needle_v1": needle_v1.convert,
    "xlam": xlam.convert,
    "toolace": toolace.convert,
    "hermes": hermes.convert,
    "openai": openai.convert,
    "bfcl": bfcl.convert,
}
_FITS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "examples": examples.fits,
    "needle_v1": needle_v1.fits,
    "xlam": xlam.fits,
    "toolace": toolace.fits,
    "hermes": hermes.fits,
    "openai": openai.fits,
    "bfcl": bfcl.fits,
}
_GUESSED_FROM = 20
_KEPT_CHARACTERS = 4000  # of a bad record; the file has the rest


@dataclass
class Reading(Catalogue):
    """A catalogue without tools of its own: every example brings its own. `layout` is the one that was read;
    `coerced` counts the arguments that were written 3.0 and are now 3."""

    layout: str = ""
    coerced: int = 0


def read(path: str, layout: str, *, split: str | None, limit: int | None) -> Reading:
    """The examples of `path`, at most `limit`; reading stops there.

    Ids are hashes of request, tools and calls (examples of Needle's own layout keep theirs); a second record with the
    same id is quarantined. `source` is the layout and the name of the file.

    Raises:
        ConfigError: no such layout, or a limit below 1.
        DataError: the path cannot be read, its layout cannot be guessed, or it holds no usable record.
    """
    if layout != AUTO and layout not in LAYOUTS:
        raise ConfigError(f"layout={layout}: must be {AUTO} or one of {', '.join(LAYOUTS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: must be at least 1, or null for all records")
    found = sources(path, split)
    reading = Reading(layout=_guessed(found, path) if layout == AUTO else layout)
    seen: set[int] = set()
    for source in found:
        for number, value in _joined(source, reading):
            _take(reading, seen, source, number, value)
            if limit is not None and len(reading.examples) >= limit:
                return _checked(reading, path)
    return _checked(reading, path)


def _joined(source: Source, reading: Reading) -> Iterator[tuple[int, Any]]:
    """The records of a source, those of BFCL with their answers from the second file."""
    if reading.layout != "bfcl" or source.path is None:
        return source.records()
    joined, bad = bfcl.answers(source.path)
    reading.quarantine += bad
    return ((number, joined(value)) for number, value in source.records())


def _take(reading: Reading, seen: set[int], source: Source, number: int, value: Any) -> None:
    if isinstance(value, BadLine):
        reading.quarantine.append(value)
        return
    coerced, reasons = 0, []
    try:
        if not isinstance(value, Mapping):
            raise ValueError(f"a record must be an object, not {type(value).__name__}")
        example, coerced = _tidied(LAYOUTS[reading.layout](value))
        reasons = example.problems()
        example = example.replace(
            id=example.id or f"{reading.layout}-{_digest(example)}",
            source=example.source or f"{reading.layout}:{source.name}",
        )
        key = int.from_bytes(hashlib.sha1(example.id.encode()).digest()[:8], "big")
        if key in seen:
            reasons.append(f"repeats an earlier record (id {example.id})")
    except (ValueError, RecursionError) as error:
        reasons = [str(error) if isinstance(error, ValueError) else "nested too deep"]
    if reasons:
        name = str(source.path or source.name)
        reading.quarantine.append(BadLine(name, number, "; ".join(reasons), _shown(value)))
        return
    seen.add(key)
    reading.coerced += coerced
    reading.examples.append(example)


def _shown(value: Any) -> str:
    try:
        return canonical_json(value)[:_KEPT_CHARACTERS]
    except RecursionError:
        return "(nested too deep to be written)"


def _tidied(example: Example) -> tuple[Example, int]:
    schemas = {tool.name: tool.parameters for tool in example.tools}
    tidied = [tidy(call.arguments, schemas.get(call.name)) for call in example.calls]
    calls = tuple(ToolCall(call.name, new) for call, (new, _) in zip(example.calls, tidied, strict=True))
    return example.replace(calls=calls), sum(count for _, count in tidied)


def _digest(example: Example) -> str:
    parts = [example.query, [asdict(tool) for tool in example.tools], [asdict(call) for call in example.calls]]
    return hashlib.sha1(canonical_json(parts).encode()).hexdigest()[:16]


def _guessed(found: list[Source], path: str) -> str:
    """The layout that fits most of the first records; two that fit equally many are not decided between."""
    counts: Counter[str] = Counter()
    records = (value for source in found for _, value in source.records() if isinstance(value, Mapping))
    first: list[Mapping[str, Any]] = list(islice(records, _GUESSED_FROM))
    for record in first:
        counts.update(name for name, fits in _FITS.items() if fits(record))
    best = [name for name in LAYOUTS if counts[name] == max(counts.values(), default=0) and counts[name]]
    if not best:
        keys = f" (the first record has {', '.join(map(str, first[0]))})" if first else " (it has no records)"
        raise DataError(f"{path} looks like no known layout{keys}; choose one of {', '.join(LAYOUTS)} with layout=")
    if len(best) > 1:
        raise DataError(f"{path} may be of layout {' or '.join(best)}: choose one with layout=")
    return best[0]


def _checked(reading: Reading, path: str) -> Reading:
    bad, usable = reading.quarantine, len(reading.examples)
    if not usable:
        why = f"; first reason: record {bad[0].line_number}: {bad[0].reason}" if bad else " (there are no records)"
        raise DataError(f"{path} holds no usable record of layout {reading.layout}{why}")
    if len(bad) > MANY_BAD_FRAC * (usable + len(bad)):
        print(
            f"warning: {len(bad)} of {usable + len(bad)} records are quarantined; first: {bad[0].reason}",
            file=sys.stderr,
        )
    return reading
