"""A teacher's log-probabilities over its own tokens, as distributions over the student's tokens.

Both write the same bytes, cut differently. At each place where the student cuts, what the teacher knows of the bytes
that come next is turned into probabilities of the student's next token:

    the student writes " minutes" where the teacher wrote the pieces "min" 0.8, then "utes" 0.9:
        P(" minutes") = 0.8 * 0.9;  the teacher's alternative "ute" 0.1 there: P(" minute") = 0.8 * 0.1
    the teacher wrote "minutes" 0.7, its alternatives were "mins" 0.2, "hours" 0.1; the student has written " min":
        P("utes") = 0.7 / (0.7 + 0.2), P("s") = 0.2 / (0.7 + 0.2)

- A student token that covers several pieces has the product of their probabilities (the chain rule); every piece on
  the way lends the mass of its alternatives to the tokens that those begin.
- A cut inside a piece leaves the pieces that agree with the bytes already written, divided by their sum; so do longer
  alternatives to earlier pieces that reach over the cut. What the teacher did not list may agree too: its whole mass
  stays in that sum, and in the tail.
- An alternative counts for the token that the student's tokenizer begins its bytes with, if no continuation could
  change that: the student's pre-tokeniser has closed the word, or the student has no longer token that begins so, or
  the teacher has longer pieces itself and so would have written them (`known`). Otherwise its mass is not aligned: it
  stays in the tail and is counted.
- An alternative in whose bytes the student would not have cut here at all speaks of another history. It leaves the sum.

Taken for granted: the teacher writes a text with the longest pieces that it has for it, and what it did not list at
the piece behind a token does not lengthen that token. So a row never holds more than 1; where the teacher tells all its
pieces, it is exact as far as it is determined; and equal tokenizers give equal distributions.

Byte by byte conditioning: Phan et al. 2024 (Exact Byte-Level Probabilities from Tokenized Language Models).
"""

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import llguidance
from tokenizers import Tokenizer

from needle.teacher.base import TokenLogProb
from needle.text.tokenizer import EOS, SPECIALS

# What comes behind a word to see whether it could go on: one of each class of the student's pre-tokeniser.
PROBES = ("a", "A", "1", " ", ".", '"', ":", ",", "[", "]", "{", "}", "\u4e2d", "\u0301")
PieceEnds = Literal["known", "trusted"]
LEAST_LOG_PROB = -30.0  # of a piece that was written


@dataclass(frozen=True)
class Pieces:
    """A teacher's answer: its bytes, where its pieces start, the probabilities told at each, and what is left."""

    text: bytes
    starts: tuple[int, ...]
    chosen: tuple[bytes, ...]
    told: tuple[Mapping[bytes, float], ...]
    untold: tuple[float, ...]

    @staticmethod
    def of(log_probs: Sequence[TokenLogProb]) -> "Pieces":
        """Probabilities told twice are added; where they are rounded to more than 1, they are scaled to it."""
        starts, told, untold, position = [], [], [], 0
        log_probs = [one for one in log_probs if one.token]
        for one in log_probs:
            masses: dict[bytes, float] = {}
            for token, log_prob in one.top:
                if token:
                    masses[token] = masses.get(token, 0.0) + math.exp(log_prob)
            # A server may tell -9999 of a piece outside of its list, whose probability must not be 0: it was written.
            masses.setdefault(one.token, math.exp(max(one.log_prob, LEAST_LOG_PROB)))
            total = math.fsum(masses.values())
            told.append({token: mass / max(1.0, total) for token, mass in masses.items()})
            untold.append(max(0.0, 1.0 - total))
            starts.append(position)
            position += len(one.token)
        chosen = tuple(one.token for one in log_probs)
        return Pieces(b"".join(chosen), tuple(starts), chosen, tuple(told), tuple(untold))

    def vocabulary(self) -> set[bytes]:
        return {piece for masses in self.told for piece in masses}


@dataclass(frozen=True)
class Row:
    """The distribution at one student token, as shares of 1: `masses` by token id; `unaligned`: of the teacher's listed
    alternatives that no single token can be told for; `untold`: not listed by the teacher. `dropped`: share of the
    teacher's mass that spoke of another history, before it was divided by the rest."""

    masses: Mapping[int, float]
    unaligned: float
    untold: float
    dropped: float

    def top(self, count: int) -> list[tuple[int, float]]:
        """`(id, log-probability)` in falling order, ties by id."""
        found = sorted(((-mass, token) for token, mass in self.masses.items() if mass > 0))[:count]
        return [(token, math.log(-mass)) for mass, token in found]


@dataclass(frozen=True)
class Stretch:
    """Bytes that teacher and student share: `start`: where they stand in the teacher's answer. `lead`: what the student
    writes before them and the teacher does not (the one space of a value). `ends`: bytes that end them in the teacher's
    text; a backslash takes a quote's meaning away."""

    start: int
    body: bytes
    lead: bytes
    ends: bytes


class StudentTokens:
    """The student's tokenizer by bytes: which token a text begins with, and whether more text could change that."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        reader = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=self.size, eos_token=EOS)
        # Control tokens stand for no bytes.
        self.bytes_of = [b"" if i < len(SPECIALS) else reader.decode_bytes([i]) for i in range(self.size)]
        self._sorted = sorted(piece for piece in self.bytes_of if piece)
        self.encode = lru_cache(maxsize=200_000)(self._encode)
        self.is_closed = lru_cache(maxsize=50_000)(self._is_closed)

    def longer(self, opening: bytes) -> Iterator[bytes]:
        """Tokens that begin with `opening` and go on."""
        at = bisect.bisect_right(self._sorted, opening)
        while at < len(self._sorted) and self._sorted[at].startswith(opening):
            yield self._sorted[at]
            at += 1

    def _encode(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Ids, their first bytes, and where the last word of the pre-tokeniser begins, which more text may change."""
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        starts, position = [], 0
        for token in ids:
            starts.append(position)
            position += len(self.bytes_of[token])
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(text)  # type: ignore[union-attr]
        return ids, tuple(starts), position - len(words[-1][0])

    def _is_closed(self, word: str) -> bool:
        split = self.tokenizer.pre_tokenizer.pre_tokenize_str  # type: ignore[union-attr]
        alone = split(word)
        return all(split(word + probe)[: len(alone)] == alone for probe in PROBES)


class Aligner:
    """`known`: pieces that the teacher's tokenizer has, as far as is known. `piece_ends`: "trusted" takes every end of
    a piece for the end of the student's token where it is one, as if the teacher had all longer ones."""

    def __init__(self, student: StudentTokens, *, known: frozenset[bytes], piece_ends: PieceEnds):
        self.student, self.known, self.piece_ends = student, known, piece_ends
        self._is_final = lru_cache(maxsize=200_000)(self._ends_token)

    def rows(self, pieces: Pieces, stretch: Stretch, ids: Sequence[int]) -> list[Row]:
        """A row for each of the student's tokens `ids`, whose bytes are the stretch with its lead.

        Raises:
            ValueError: the bytes are not those.
        """
        whole = stretch.lead + stretch.body
        if b"".join(self.student.bytes_of[token] for token in ids) != whole:
            raise ValueError(f"tokens {list(ids)} are not the bytes {whole!r}")
        if pieces.text[stretch.start : stretch.start + len(stretch.body)] != stretch.body:
            raise ValueError(f"{stretch.body!r} does not stand at byte {stretch.start} of the answer")
        found, position = [], 0
        for place in range(len(ids)):
            found.append(_Cut(self, pieces, stretch, tuple(ids[: place + 1]), position).row())
            position += len(self.student.bytes_of[ids[place]])
        return found

    def is_determined(self, text: str, at: int, opening: bytes, piece: bytes) -> bool:
        """Whether the token that begins at byte `at` of `text` is the same whatever follows; `opening`: all bytes
        from there on; `piece`: the teacher's last."""
        last = self.student.encode(text)[2]
        return at < last or self.student.is_closed(text.encode()[last:].decode()) or self._is_final(opening, piece)

    def _ends_token(self, opening: bytes, piece: bytes) -> bool:
        """Whether no token of the student goes on behind `opening`, or the teacher would have written longer pieces
        for each that does."""
        if self.piece_ends == "trusted":
            return True
        for token in self.student.longer(opening):
            more = token[len(opening) :]
            if not self.writes_longer(piece, more):
                return False
        return True

    def writes_longer(self, piece: bytes, more: bytes) -> bool:
        """Whether the teacher has a piece that begins with `piece` and goes on with a part of `more`."""
        return any(piece + more[:length] in self.known for length in range(1, len(more) + 1))


@dataclass(frozen=True)
class _Other:
    """An answer in which the student would not have cut here."""


_OTHER_HISTORY = _Other()


@dataclass
class _Cut:
    """One cut of the student: `tokens` are those before it and, last, the one that it wrote; `at` counts bytes of the
    stretch with its lead."""

    aligner: Aligner
    pieces: Pieces
    stretch: Stretch
    tokens: tuple[int, ...]
    at: int
    masses: dict[int, float] = field(default_factory=dict)
    unaligned: float = 0.0
    untold: float = 0.0
    dropped: float = 0.0

    def row(self) -> Row:
        number, inside = self._first_piece()
        weight, total = 1.0, None
        label, label_end = self.tokens[-1], self.at + len(self.aligner.student.bytes_of[self.tokens[-1]])
        while True:
            chosen, told = self.pieces.chosen[number], self.pieces.told[number]
            consumed = chosen[:inside]
            head = self._head(self.pieces.starts[number] + inside)
            agreeing = {piece: mass for piece, mass in told.items() if piece.startswith(consumed)}
            for piece, mass in agreeing.items():
                if piece != chosen:
                    self._add(self._token(head, piece, inside, is_first=total is None), mass * weight, total is None)
            if total is None:
                untold = self.pieces.untold[number]
                total = math.fsum(agreeing.values()) + untold - self.dropped + self._across(number, inside)
                self.untold += untold
            elif len(head) >= label_end:
                self._add(label, weight * self.pieces.untold[number], False)
            else:
                self.untold += weight * self.pieces.untold[number]
            weight *= told[chosen]
            text = head + chosen[inside:]
            number, inside = number + 1, 0
            over = len(text) >= label_end
            if number == len(self.pieces.chosen) or (over and self._is_told(head, chosen, text)):
                self._add(label, weight, False)
                break
        masses = {token: mass / total for token, mass in self.masses.items()}
        dropped = self.dropped / (total + self.dropped)
        return Row(masses, self.unaligned / total, self.untold / total, dropped)

    def _across(self, number: int, inside: int) -> float:
        """Adds longer alternatives to earlier pieces, which agree with all that is written and reach over the cut; what
        they weigh where the pieces before number `number` weigh 1."""
        place, weight, total = self.pieces.starts[number] + inside, 1.0, 0.0
        while number > 0 and self.pieces.starts[number] > self.stretch.start:
            number -= 1
            weight /= self.pieces.told[number][self.pieces.chosen[number]]
            start = self.pieces.starts[number]
            before = max(0, self.stretch.start - start)
            written = self.pieces.text[start:place]
            for piece, mass in self.pieces.told[number].items():
                if len(piece) > len(written) and piece.startswith(written):
                    token = self._token(self._head(start + before), piece, before, is_first=False)
                    if not isinstance(token, _Other):
                        self._add(token, mass * weight, False)
                        total += mass * weight
        return total

    def _first_piece(self) -> tuple[int, int]:
        """The piece in which the cut lies, and how many of its bytes lie before it."""
        place = self.stretch.start + max(0, self.at - len(self.stretch.lead))
        number = bisect.bisect_right(self.pieces.starts, place) - 1
        return number, place - self.pieces.starts[number]

    def _head(self, place: int) -> bytes:
        """What the student has written up to a place of the teacher's answer."""
        return self.stretch.lead + self.pieces.text[self.stretch.start : place]

    def _add(self, token: "int | _Other | None", mass: float, may_drop: bool) -> None:
        if token is None or (isinstance(token, _Other) and not may_drop):
            self.unaligned += mass
        elif isinstance(token, _Other):
            self.dropped += mass
        else:
            self.masses[token] = self.masses.get(token, 0.0) + mass

    def _is_told(self, head: bytes, piece: bytes, text: bytes) -> bool:
        """Whether the written text itself shows that the student's token ends where it does."""
        whole = len(self.stretch.lead) + len(self.stretch.body)
        if len(text) > whole or self._end(head, text) is not None:
            return True
        return isinstance(self._token(head, piece, len(piece) - (len(text) - len(head)), is_first=False), int)

    def _end(self, head: bytes, text: bytes) -> int | None:
        """Where the stretch's ending stands in `text`, behind `head`; None where it does not."""
        escaped = (len(head) - len(head.rstrip(b"\\"))) % 2 == 1
        for place in range(len(head), len(text)):
            if escaped:
                escaped = False
            elif text[place] in self.stretch.ends:
                return place
            else:
                escaped = text[place] == 0x5C
        return None

    def _token(self, head: bytes, piece: bytes, inside: int, *, is_first: bool) -> "int | _Other | None":
        """The student's token at the cut if the teacher's next piece is this one: None where that is not determined."""
        student, text = self.aligner.student, head + piece[inside:]
        end = self._end(head, text)
        text = text if end is None else text[:end]
        whole = _decoded(text)
        if whole is None or len(whole.encode()) <= self.at:
            return None
        ids, starts, _ = student.encode(whole)
        for number, start in enumerate(starts):
            if start == self.at and ids[:number] == self.tokens[:-1]:
                told = end is not None or self.aligner.is_determined(whole, start, text[start:], piece)
                return ids[number] if told else None
        return self._token_elsewhere(head, piece, inside, text, whole, ended=end is not None, is_first=is_first)

    def _token_elsewhere(
        self, head: bytes, piece: bytes, inside: int, text: bytes, whole: str, *, ended: bool, is_first: bool
    ) -> "int | _Other | None":
        """As `_token`, where the student would write this text with another cut."""
        ids, starts, _ = self.aligner.student.encode(whole)
        if is_first and inside == 0 and len(head) == self.at > len(self.stretch.lead):
            # The teacher cut here as well, although it has a longer piece: the cut is its own, and stays.
            before = self.pieces.chosen[bisect.bisect_left(self.pieces.starts, self._place()) - 1]
            rest = _decoded(text[self.at :])
            number = max(number for number, start in enumerate(starts) if start <= self.at)
            has_piece = self.aligner.student.bytes_of[ids[number]] in self.aligner.known
            if rest and (has_piece or self.aligner.writes_longer(before, text[self.at :])):
                told = ended or self.aligner.is_determined(rest, 0, text[self.at :], piece)
                return self.aligner.student.encode(rest)[0][0] if told else None
        # A token that reaches over the cut does so however the text goes on, or a still longer one does.
        return None if self.at in starts else _OTHER_HISTORY

    def _place(self) -> int:
        return self.stretch.start + self.at - len(self.stretch.lead)


def _decoded(text: bytes) -> str | None:
    """As text, without the beginning of a character at its end; None where it is none, or empty."""
    try:
        return text.decode() or None
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return None
        return text[: error.start].decode() or None
