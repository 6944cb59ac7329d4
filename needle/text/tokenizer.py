"""Text <-> tokens: a byte-level BPE in which digits and JSON structure are single tokens, and spans carried along.

Structure strings such as `","arguments":{"` are ordinary vocabulary entries that the pre-tokeniser isolates, so a call
costs few steps and a grammar sees plain text. Control tokens exist only as ids that this module places itself: typed
inside a request they are text.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from needle.artifacts import write_json_atomic
from needle.errors import DataError
from needle.schema import Tool, ToolCall
from needle.text.render import Span, render_calls, render_query, render_tools

SPECIALS = ("<pad>", "<bos>", "<eos>", "<tools>", "<query>")
PAD, BOS, EOS, TOOLS, QUERY = range(len(SPECIALS))

# What render_calls puts between names, keys and values. A value's own quote may be followed by any of the closers.
STRUCTURES = (
    '[{"name":"', '","arguments":{"', '","arguments":{}}]', '","arguments":{}},{"name":"', '":"', '":', '":["', '":[',
    '":{"', '","', ',"', '"}}]', '"}},{"name":"', '}}]', '}},{"name":"', '"]}}]', '"]}},{"name":"', ']}}]',
    ']}},{"name":"', '"}}}]', '"}}},{"name":"', '}}}]', '}}},{"name":"', '":[{"', '"],"', '],"', '"},"', '},"', '"}]',
    '"},{"', '},{"', "[]",
)  # fmt: skip
# Splits camelCase humps, keeps one leading space on a word, isolates digits, punctuation and whitespace one by one.
_WORDS = r" ?\p{Lu}?\p{Ll}+| ?\p{Lu}+(?!\p{Ll})| ?\p{L}| ?[^\s\p{L}\p{N}]|\p{N}|\s"


def _pattern() -> Regex:
    structures = sorted(STRUCTURES, key=len, reverse=True)
    escaped = ("".join("\\" + c if c in r"[]{}()|.*+?^$\"" else c for c in s) for s in structures)
    return Regex("|".join([*escaped, _WORDS]))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` entries (fewer only when the texts hold too few repeated pairs).

    Args:
        texts: prompts, names, keys and values of the train split only. Structure needs no text: it is given.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    given = [*SPECIALS, *(piece for piece in STRUCTURES if len(piece) > 1)]
    learner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(_pattern(), behavior="isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    ranked = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    entries = list(dict.fromkeys([*given, *ranked]))[:vocab_size]
    kept = set(entries)
    merges = [(left, right) for left, right in learned["merges"] if {left, right, left + right} <= kept]
    # ignore_merges: a pre-token that is an entry is used whole, which is what makes the structures single tokens.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(entries)}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


class TextCodec:
    """Requests, tools and calls to token ids and back, in one prompt style."""

    def __init__(self, tokenizer: Tokenizer, style: str):
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.style = style
        self._segment_ids: dict[str, tuple[int, ...]] = {}

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def separator_id(self) -> int:
        """The token between two tools of a prompt; it stands nowhere else."""
        number = self.tokenizer.token_to_id("\u010a")  # the byte-level alphabet's line break
        if number is None:
            raise DataError("the tokenizer has no token for a line break: it is not byte-level")
        return number

    def texts(self) -> list[str]:
        """Every token's text, by id."""
        return [self.tokenizer.decode([number], skip_special_tokens=False) for number in range(self.vocab_size)]

    def encode_prompt(self, query: str, tools: Sequence[Tool]) -> list[int]:
        """`<tools>` tools `<query>` request, as ids."""
        lines = self._ids(render_tools(tools, style=self.style))
        return [TOOLS, *lines, QUERY, *self._ids(render_query(query))]

    def encode_target(self, calls: Sequence[ToolCall], tools: Sequence[Tool]) -> tuple[list[int], list[int]]:
        """`(ids, spans)` of equal length; the last id is `<eos>` with span STOP."""
        ids: list[int] = []
        spans: list[int] = []
        for text, span in render_calls(calls, tools):
            piece = self._ids(text)
            ids += piece
            spans += [int(span)] * len(piece)
        return [*ids, EOS], [*spans, int(Span.STOP)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids up to the first `<eos>`; control tokens have no text."""
        kept = []
        for token in ids:
            if token == EOS:
                break
            if token >= len(SPECIALS):
                kept.append(int(token))
        return self.tokenizer.decode(kept, skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(Path(folder) / "tokenizer.json"))
        write_json_atomic(Path(folder) / "needle_text.json", {"style": self.style})

    @staticmethod
    def load(folder: Path) -> "TextCodec":
        """Raises DataError when a file is missing or unreadable."""
        folder = Path(folder)
        try:
            style = json.loads((folder / "needle_text.json").read_text("utf-8"))["style"]
            return TextCodec(Tokenizer.from_file(str(folder / "tokenizer.json")), style)
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"no usable tokenizer in {folder} (tokenizer.json, needle_text.json): {error}") from error

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self._segment_ids.get(text)
        if ids is None:
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
            if len(self._segment_ids) < 200_000:
                self._segment_ids[text] = ids
        return ids
