"""Records of a file, a folder of files, or a data set of the Hugging Face hub, one at a time.

JSONL, parquet and hub data sets are streamed; a .json list is held as text while it is read.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from needle.corpus.layouts.literals import json_value
from needle.errors import ConfigError, DataError
from needle.schema import BadLine, read_lines, strict_json

HUB = "hub:"
SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_PATH = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
_BATCH_ROWS = 256
_SPACE = re.compile(r"\s*")
Records = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class Source:
    """`name`: what an example's source says. `path`: the file, or None for a hub data set. `records()` yields
    `(line or record number, JSON value or BadLine)`, and may be called again."""

    name: str
    path: Path | None
    records: Callable[[], Records]


def sources(path: str, split: str | None) -> list[Source]:
    """The sources of `path`, in order of their names.

    `split` picks those files of a folder that are named so (`train.jsonl`, `train-00000-of-00002.parquet`), or the
    split of a hub data set.

    Raises:
        ConfigError: the path cannot be read as one.
        DataError: there is nothing to read.
    """
    if path.startswith(HUB):
        return [_hub(path, split)]
    root = Path(path)
    if root.is_dir():
        files = sorted(p for p in root.iterdir() if p.suffix in SUFFIXES and p.is_file() and p.name[0] != ".")
    elif root.is_file() and root.suffix in SUFFIXES:
        files = [root]
    else:
        what = "is neither a file nor a folder" if not root.exists() else f"is not one of {', '.join(SUFFIXES)}"
        raise DataError(f"{path} {what}; give a file, a folder of files, or hub:OWNER/NAME[:CONFIG][@REVISION]")
    chosen = [p for p in files if split is None or re.match(rf"{re.escape(split)}(?:[-_.]|$)", p.stem)]
    if not chosen:
        names = ", ".join(p.name for p in files[:5]) or f"no {', '.join(SUFFIXES)} file"
        wish = f" named {split}" if split is not None else ""
        raise DataError(f"{path} holds no file{wish}; it holds {names}")
    return [Source(p.name, p, partial(file_records, p)) for p in chosen]


def file_records(path: Path) -> Records:
    """The records of one file.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".json":
        return _json(path)
    return read_lines(path)


def from_arrow(row: Mapping[str, Any]) -> Any:
    """A row as JSON has it. Arrow fills every field that one row has with null in all others: nulls are left out.

    Raises:
        ValueError: it holds what JSON has not, such as a date.
    """
    return json_value(_without_nulls(row))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json(path: Path) -> Records:
    """A list of records, or, as in BFCL, a record a line."""
    try:
        with path.open("rb") as stream:
            first = next((line.strip() for line in stream if line.strip()), b"")
        first = first.removeprefix(b"\xef\xbb\xbf")
        if first.startswith(b"{") and first != b"{":
            yield from read_lines(path)
            return
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from error
    yield from _listed(text, str(path))


def _listed(text: str, name: str) -> Records:
    """The items of a JSON list. Nothing after a broken item can be read: where it ends is not known."""
    position = _after_space(text, 0)
    if not text.startswith("[", position):
        if text.strip():
            yield 1, BadLine(name, 1, "holds neither a list of records nor a record a line", text[:200])
        return
    decoder = json.JSONDecoder()
    number, position = 1, _after_space(text, position + 1)
    if text.startswith("]", position):
        return
    while True:
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else f"not JSON: {error}"
            reason = f"{why}; nothing after it can be read (was the file cut off?)"
            yield number, BadLine(name, number, reason, text[position:][:2000])
            return
        try:
            yield number, strict_json(text[position:end])
        except ValueError as error:
            yield number, BadLine(name, number, f"not JSON: {error}", text[position:end])
        position = _after_space(text, end)
        if not text.startswith(",", position):
            if not text.startswith("]", position):
                reason = (
                    "neither , nor ] follows the record before; nothing after it can be read (was the file cut off?)"
                )
                yield number + 1, BadLine(name, number + 1, reason, text[position:][:2000])
            return
        number, position = number + 1, _after_space(text, position + 1)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (
                row
                for batch in file.iter_batches(batch_size=_BATCH_ROWS)
                for row in batch.to_pylist(maps_as_pydicts="strict")
            )
            yield from _rows(rows, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as parquet: {str(error)[:200]}") from error


def _rows(rows: Iterator[Mapping[str, Any]], name: str) -> Records:
    for number, row in enumerate(rows, 1):
        try:
            value = from_arrow(row)
        except ValueError as error:
            value = BadLine(name, number, str(error), repr(row)[:2000])
        yield number, value


def _hub(path: str, split: str | None) -> Source:
    match = _HUB_PATH.fullmatch(path)
    if match is None:
        raise ConfigError(f"{path!r} is not of the form hub:OWNER/NAME[:CONFIG][@REVISION]")
    import datasets  # takes seconds to import

    try:
        loaded = datasets.load_dataset(match["name"], match["config"], revision=match["revision"], split=split)
    except Exception as error:  # whatever datasets, huggingface_hub and the network below them raise
        raise DataError(
            f"cannot load {path}, split={split}: {type(error).__name__}: {str(error)[:300]}. Check the name and the "
            "network; a gated data set needs its terms accepted and HF_TOKEN set; or download its files and give "
            "their folder instead"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise DataError(f"{path} has the splits {', '.join(loaded)}: choose one with split=")
        loaded = next(iter(loaded.values()))
    return Source(path, None, lambda: _rows(iter(loaded), path))
