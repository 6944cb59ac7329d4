"""Signals of a teacher with its own tokenizer: its log-probabilities of an answer, as rows over the student's tokens.

An asked teacher's are in the ledger, bought together with its answers; a model that is run here scores the examples.
Training examples are varied copies of what was asked, so a row stands only where the copy's name, key or value is
spelled as in the teacher's answer. Structure and the stop token are the formats' own and get none.
"""

# X target tokens of all examples, K stored tokens, N examples

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from omegaconf import OmegaConf
from pydantic import Field

from needle import config
from needle.artifacts import fingerprint
from needle.data.shards import example_key
from needle.errors import ConfigError, DataError
from needle.schema import Example, ToolCall, canonical_json
from needle.teacher.answer_formats import AnswerFormat
from needle.teacher.base import AskedTeacher, FatalError, TeacherCall, TokenLogProb
from needle.teacher.ledger import Ledger
from needle.text.alignment import Aligner, PieceEnds, Pieces, Row, Stretch, StudentTokens
from needle.text.locating import Part, Place, locate, parts
from needle.text.render import Segment, Span, render_calls
from needle.text.tokenizer import EOS, TextCodec

# What is told of an answer is told at this temperature; a truncated distribution cannot be tempered afterwards.
TEMPERATURE = 1.0
SCORED_AT_ONCE = 256


@dataclass(frozen=True)
class Alignment:
    """conf/alignment says what each means."""

    method: Literal["bytes", "index"]
    top_k: Annotated[int, Field(ge=1, le=65536)]
    alternatives: Annotated[int, Field(ge=1, le=65536)]
    piece_ends: PieceEnds


class Varied(NamedTuple):
    """A training example and the request as the corpus has it, which the teacher was asked."""

    example: Example
    asked: Example


class Told(NamedTuple):
    """What a teacher wrote for a request and how likely every token was. `calls`: in the order of its answer."""

    calls: tuple[ToolCall, ...]
    log_probs: tuple[TokenLogProb, ...]


@cache
def label_instruction() -> str:
    """What every teacher is told before a request that it is to answer."""
    return OmegaConf.load(config.CONF / "generate.yaml").label_instruction


def signals_folder(teacher: Any, *, alignment: Alignment, artifacts: Path, shards: Path) -> Path:
    """Where a teacher's signals for these shards are. Named after all that they depend on: for a teacher with tokens of
    its own the alignment, and the question that its log-probabilities answer."""
    if teacher.tokenizer == "student":
        return teacher.signals_folder(artifacts, shards)
    call = teacher.label_call(instruction=label_instruction(), query="", tools=(), sample=0)
    question: dict[str, Any] = {"provider": call.provider, "model": call.model, "settings": call.settings}
    if hasattr(teacher, "load"):
        question["instruction"] = call.instruction
    return artifacts / f"signals-{fingerprint(shards=shards.name, alignment=alignment, teacher=question)}"


def stored_temperature(teacher: Any) -> float | None:
    """At which a teacher's distributions are stored; None: it gives none. That of its answers' sampling is another."""
    if "top_k" not in teacher.capabilities:
        return None
    return teacher.temperature if teacher.tokenizer == "student" else TEMPERATURE


def check_alignment(*, loss: Any, teacher: Any, alignment: Alignment) -> None:
    """Raises ConfigError where a loss would take ranks for tokens."""
    aligned = "top_k" in loss.needs and teacher.tokenizer == "own"
    if aligned and alignment.method == "index" and getattr(loss, "reads_ids", True):
        raise ConfigError(
            f"alignment=index with {type(loss).__name__}: these signals hold sorted probabilities without "
            "tokens, which only loss=uld can read; use alignment=bytes"
        )


class LedgerAnswers:
    """Answers with log-probabilities that were bought from this teacher with these very settings.

    Raises:
        ConfigError: they do not ask for log-probabilities.
        DataError: there is no ledger, or it holds no such answer.
    """

    def __init__(self, path: Path, teacher: AskedTeacher):
        call = teacher.label_call(instruction="", query="", tools=(), sample=0)
        self.name = f"{call.provider}:{call.model}"
        if not Path(path).is_file():
            raise DataError(f"{path} is not there: a ledger is one file, see conf/paths; {_how_to_buy(teacher)}")
        self._ledger = Ledger(path)
        query = (
            "SELECT lower(hex(r.key)), r.prompt, r.calls FROM replies r JOIN payloads p ON p.id = r.id WHERE "
            "r.provider=? AND r.model=? AND r.role='label' AND r.settings=? AND r.status='ok' AND "
            "r.calls IS NOT NULL AND p.log_probs IS NOT NULL ORDER BY r.sample, r.key"
        )
        wanted = (call.provider, call.model, canonical_json(call.settings))
        self._by_request: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for key, prompt, calls in self._ledger.rows(query, wanted):
            self._by_request[prompt].append((key, calls))
        if not self._by_request:
            raise DataError(
                f"{path} holds no answer of {self.name} with log-probabilities, bought with these settings; "
                f"{_how_to_buy(teacher)}"
            )
        self._last: tuple[Example | None, Told | None] = (None, None)

    def vocabulary(self) -> frozenset[bytes]:
        """Every piece that any of the answers tells of."""
        found: set[bytes] = set()
        for answers in self._by_request.values():
            for key, _ in answers:
                found |= Pieces.of(self._ledger.payload(key)[0] or ()).vocabulary()
        return frozenset(found)

    def of(self, varied: Iterable[Varied]) -> Iterator[tuple[Varied, Told | None]]:
        for one in varied:
            if one.asked is not self._last[0]:  # copies of one answer come one after the other
                told = self._told(one.asked.query, one.asked.calls) if one.asked.calls else None
                self._last = (one.asked, told)
            yield one, self._last[1]

    def close(self) -> None:
        self._ledger.close()

    def _told(self, query: str, calls: tuple[ToolCall, ...]) -> Told | None:
        """The first sample that gave these calls, in this order."""
        for key, answered in self._by_request.get(query, ()):
            if tuple(ToolCall.from_dict(call) for call in json.loads(answered)) == calls:
                log_probs = self._ledger.payload(key)[0]
                return Told(calls, log_probs) if log_probs else None
        return None


class ScoredAnswers:
    """A model that is run here reads every varied example itself: its request, the tools that it shows, its calls."""

    def __init__(self, teacher: Any, *, alternatives: int):
        self._model = teacher.load()
        self._teacher, self._alternatives = teacher, alternatives
        self.name = self._model.name

    def vocabulary(self) -> frozenset[bytes]:
        return frozenset(map(self._bytes, range(len(self._model.tokenizer))))

    def of(self, varied: Iterable[Varied]) -> Iterator[tuple[Varied, Told | None]]:
        waiting: list[Varied] = []
        for one in varied:
            waiting.append(one)
            if len(waiting) == SCORED_AT_ONCE:
                yield from self._scored(waiting)
                waiting = []
        yield from self._scored(waiting)

    def close(self) -> None:
        pass

    def _scored(self, varied: Sequence[Varied]) -> Iterator[tuple[Varied, Told | None]]:
        asked = {number: self._question(one.example) for number, one in enumerate(varied) if one.example.calls}
        try:
            scores = self._model.log_probs(list(asked.values()), top_k=self._alternatives, with_stop=True)
        except FatalError as error:
            raise ConfigError(f"teacher={self.name} cannot score the examples: {error}") from error
        told = dict(zip(asked, scores, strict=True))
        for number, one in enumerate(varied):
            yield one, Told(one.example.calls, self._log_probs(told[number])) if number in told else None

    def _question(self, example: Example) -> tuple[TeacherCall, str]:
        call = self._teacher.label_call(
            instruction=label_instruction(), query=example.query, tools=example.tools, sample=0
        )
        return call, answer_text(example.calls, self._teacher.answer_format)

    def _log_probs(self, scores: Any) -> tuple[TokenLogProb, ...]:
        return tuple(
            TokenLogProb(
                token,
                float(own),
                tuple((self._bytes(i), float(nats)) for i, nats in zip(ids_K, log_probs_K, strict=True)),
            )
            for token, own, ids_K, log_probs_K in zip(
                scores.tokens, scores.log_probs_T, scores.ids_TK.tolist(), scores.log_probs_TK, strict=True
            )
        )

    def _bytes(self, token: int) -> bytes:
        return self._model.bytes_of.decode_bytes([token])


def answer_text(calls: Sequence[ToolCall], answer_format: AnswerFormat) -> str:
    """The calls as a model with this format writes them (needle.teacher.answer_formats reads them back)."""
    if answer_format == "pythonic":
        written = (
            f"{call.name}({', '.join(f'{key}={_dumped(value)}' for key, value in call.arguments.items())})"
            for call in calls
        )
        return f"[{', '.join(written)}]"
    named = "parameters" if answer_format == "llama" else "arguments"
    records = [{"name": call.name, named: dict(call.arguments)} for call in calls]
    if answer_format == "json_list":
        return _dumped(records)
    if answer_format == "llama":
        return "; ".join(map(_dumped, records))
    return "\n".join(f"<tool_call>\n{_dumped(record)}\n</tool_call>" for record in records)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class Rows:
    """Rows of examples over the student's tokens; those of equal answers are computed once."""

    def __init__(self, codec: TextCodec, alignment: Alignment, *, known: frozenset[bytes]):
        self._codec, self._alignment = codec, alignment
        self._aligner = Aligner(StudentTokens(codec.tokenizer), known=known, piece_ends=alignment.piece_ends)
        self._last: Told | None = None
        self._pieces, self._places = Pieces.of(()), dict[Part, Place]()
        self._segments: dict[tuple[Stretch, tuple[int, ...]], list[Row]] = {}

    def of(self, varied: Varied, told: Told) -> tuple[list[int], list[Row | None]]:
        """The example's target ids and a row for each, None where the teacher says nothing."""
        example = varied.example
        segments = render_calls(example.calls, example.tools)
        ids_of = [self._codec.tokenizer.encode(segment.text, add_special_tokens=False).ids for segment in segments]
        ids = [token for piece in ids_of for token in piece] + [EOS]
        if self._alignment.method == "index":
            return ids, self._by_index(example, told, len(ids))
        if told is not self._last:  # copies of one answer come one after the other
            self._last, self._pieces, self._segments = told, Pieces.of(told.log_probs), {}
            self._places = locate(told.calls, self._pieces.text)
        rows: list[list[Row | None]] = [[None] * len(piece) for piece in ids_of]
        try:
            found = parts(example.calls, segments)
        except ValueError:  # an empty name or key has no segment
            found = {}
        for part, number in found.items():
            place = self._places.get(part)
            if place is not None and (stretch := _stretch(place, segments[number], part, example)) is not None:
                rows[number] = [*self._of_segment(stretch, tuple(ids_of[number]))]
        return ids, [row for of_segment in rows for row in of_segment] + [None]

    def _of_segment(self, stretch: Stretch, ids: tuple[int, ...]) -> list[Row]:
        if (stretch, ids) not in self._segments:
            self._segments[stretch, ids] = self._aligner.rows(self._pieces, stretch, ids)
        return self._segments[stretch, ids]

    def _by_index(self, example: Example, told: Told, length: int) -> list[Row | None]:
        """The n-th token's probabilities in falling order, under no token's name; nothing in a changed answer."""
        rows: list[Row | None] = [None] * length
        if example.calls == told.calls:
            pieces = Pieces.of(told.log_probs)
            for number, masses in enumerate(pieces.told[:length]):
                ranked = sorted(masses.values(), reverse=True)[: self._alignment.top_k]
                rows[number] = Row(dict(enumerate(ranked)), 0.0, 1 - sum(ranked), 0.0)
        return rows


def _stretch(place: Place, segment: Segment, part: Part, example: Example) -> Stretch | None:
    """None where the example spells the part otherwise than the teacher's answer."""
    text = segment.text.encode()
    lead = b" " if segment.span == Span.VALUE and _is_text(example.calls[part.call].arguments, part.steps) else b""
    return Stretch(place.start, place.body, lead, place.ends) if text == lead + place.body else None


def _is_text(value: Any, steps: Sequence[int]) -> bool:
    for step in steps:
        value = [*value.values()][step] if isinstance(value, Mapping) else value[step]
    return isinstance(value, str)


class Report:
    """What the rows hold, span by span."""

    def __init__(self) -> None:
        self._sums: dict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, span: int, label: int, row: Row | None, stored: Sequence[tuple[int, float]]) -> None:
        for sums in (self._sums[Span(span).name.lower()], self._sums["all"]):
            sums["target_tokens"] += 1
            if row is not None:
                sums["covered"] += 1
                sums["aligned"] += sum(row.masses.values())
                sums["unaligned"] += row.unaligned
                sums["untold"] += row.untold
                sums["dropped"] += row.dropped
                sums["label_stored"] += any(token == label for token, _ in stored)
                sums["label_prob"] += row.masses.get(label, 0.0)

    def summary(self, *, by_label: bool) -> dict[str, dict[str, float]]:
        """`covered_frac` of target tokens; the rest are means over covered ones. `by_label`: rows name tokens."""
        told = {}
        for span, sums in self._sums.items():
            covered = sums["covered"]
            of_span: dict[str, float] = {"target_tokens": int(sums["target_tokens"])}
            of_span["covered_frac"] = round(covered / sums["target_tokens"], 6)
            if covered:
                masses = {
                    f"{name}_mass": sums[name] / covered for name in ("aligned", "unaligned", "untold", "dropped")
                }
                if by_label:
                    masses["label_in_top_k_frac"] = sums["label_stored"] / covered
                    masses["label_prob"] = sums["label_prob"] / covered
                of_span |= {name: round(value, 6) for name, value in masses.items()}
            told[span] = of_span
        return told


class StoredSplit(NamedTuple):
    ids_XK: np.ndarray
    log_probs_XK: np.ndarray
    report: dict[str, dict[str, float]]


def store(
    rows: Rows,
    told: Iterable[tuple[Varied, Told | None]],
    *,
    index_of: Mapping[int, int],
    target: np.ndarray,
    spans: np.ndarray,
    offsets_N: np.ndarray,
    alignment: Alignment,
    progress: Callable[[int, int], None],
) -> StoredSplit:
    """Rows of a split in the order of its targets; -inf where the teacher says nothing. `index_of`: an example's number
    in the split by its key; those that were too long for it are not among them.

    Raises:
        DataError: an example's tokens are not the split's.
    """
    ids_XK = np.zeros((len(target), alignment.top_k), np.uint16)
    log_probs_XK = np.full((len(target), alignment.top_k), -np.inf, np.float32)
    report, done = Report(), 0
    for varied, answer in told:
        index = index_of.get(example_key(varied.example.id))
        if index is None:
            continue
        start, end = int(offsets_N[index]), int(offsets_N[index + 1])
        found: list[Row | None] = [None] * (end - start)
        if answer is not None:
            ids, found = rows.of(varied, answer)
            if ids != target[start:end].tolist():
                raise DataError(
                    f"example {varied.example.id} has other tokens than its shards; run needle.prepare again"
                )
        for x, row in zip(range(start, end), found, strict=True):
            stored = row.top(alignment.top_k) if row is not None else []
            for k, (token, log_prob) in enumerate(stored):
                ids_XK[x, k], log_probs_XK[x, k] = token, log_prob
            report.add(int(spans[x]), int(target[x]), row, stored)
        done += 1
        progress(done, len(index_of))
    return StoredSplit(ids_XK, log_probs_XK, report.summary(by_label=alignment.method == "bytes"))


def answers_of(teacher: Any, *, alignment: Alignment, ledger: Path) -> LedgerAnswers | ScoredAnswers:
    """Raises ConfigError, DataError: see both."""
    return (
        ScoredAnswers(teacher, alternatives=alignment.alternatives)
        if hasattr(teacher, "load")
        else LedgerAnswers(ledger, teacher)
    )


def _how_to_buy(teacher: AskedTeacher) -> str:
    setting = "response_logprobs" if hasattr(teacher, "response_logprobs") else "top_logprobs"
    return (
        f"buy some: python -m needle.generate role=label teacher=... teacher.{setting}=5, and give needle.signals and "
        f"needle.train the same teacher and the corpus that comes of it (data.corpus=...); teacher.{setting} is "
        f"{getattr(teacher, setting, 0)} here"
    )
