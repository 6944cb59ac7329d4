"""Turns the split corpus into training shards: augmentation, tokenizer, tokens.

    python -m needle.prepare data=default

Writes artifacts/shards-HASH: train/ and validation/ token arrays, tokenizer.json, and validation.jsonl, test.jsonl,
unseen.jsonl, the fixed evaluation suites. Nothing of validation, test or unseen domains reaches the tokenizer or the
training arrays. With data.symbolic_examples above 0 there is symbolic/, for curricula; the tokenizer is not trained on
it, so that a curriculum does not change how the others' texts are cut.

A labelled corpus's answers.jsonl gives training examples their confidence (a judge's agreement, times the recorded
answer's share of the teacher's samples), with data.answers=all the teacher's other answers with their weights instead
of that share. What evaluates keeps its one recorded answer, weight and confidence 1.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from needle import artifacts, config
from needle.corpus.answers import ANSWERS_VERSION, read_answers
from needle.corpus.mix import Mixer, evaluation
from needle.corpus.symbolic import symbolic_examples
from needle.data.packing import pack, padding_frac
from needle.data.settings import DataSettings, TextSettings
from needle.data.shards import GOLD_TOOLS_MAX, About, Shard, ShardWriter
from needle.errors import ConfigError
from needle.generate import corpus_folder
from needle.runs import Paths
from needle.schema import EVALUATION_ONLY, EVALUATION_SPLITS, KINDS, BadLine, Example, Tool, read_examples
from needle.text.render import Span, render_calls, render_query, render_tools
from needle.text.tokenizer import TextCodec, train_tokenizer

PREPARE_VERSION = 3


class Encoded(NamedTuple):
    key: str
    source: list[int]
    target: list[int]
    spans: list[int]
    about: About


def shards_folder(paths: Paths, data: DataSettings) -> Path:
    tokenizer = artifacts.hash_file(Path(data.text.tokenizer) / "tokenizer.json") if data.text.tokenizer else None
    parts = {"corpus": corpus_folder(paths, data).name, "data": data, "tokenizer": tokenizer}
    parts["given"] = artifacts.hash_files(data.given)
    # A bought corpus is named after its examples: the same ones may come with other answers and weights.
    answers = Path(data.corpus) / "answers.jsonl"
    parts["answers"] = [ANSWERS_VERSION, artifacts.hash_file(answers)] if answers.is_file() else None
    return paths.artifacts / f"shards-{artifacts.fingerprint(version=PREPARE_VERSION, **parts)}"


@config.stage("prepare")
def main(cfg: dict[str, Any], *, data: DataSettings, paths: Paths, workers: Annotated[int, Field(ge=1)]) -> None:
    corpus = corpus_folder(paths, data)
    artifacts.require(corpus, kind="corpus", command="python -m needle.generate " + config.as_overrides(cfg, "data"))
    folder = shards_folder(paths, data)
    if folder.is_dir():
        print(f"shards are there already: {folder}")
        return
    tools = _tools(corpus)
    splits = {split: _read(corpus, split, data) for split in ("train", *EVALUATION_SPLITS)}
    if not splits["train"]:
        raise ConfigError(f"data.split.domains={data.split.domains} leave no training request")
    if data.train_requests is not None and len(splits["train"]) < data.train_requests:
        raise ConfigError(f"data.train_requests={data.train_requests}: this slice has {len(splits['train'])}")
    given, refused = _given(data, corpus)
    mixer = _mixer(data, corpus, splits["train"], tools, given)
    counts: dict[str, Any] = {"given": {"examples": len(given), "refused": len(refused)}}
    counts["answers"] = _answer_counts(mixer, corpus)
    inputs = {"corpus": corpus.name, "tokenizer": str(data.text.tokenizer), "given": ", ".join(map(str, data.given))}
    with artifacts.publish(folder, kind="shards", inputs=inputs, counts=counts) as temporary:
        codec = _codec(data, mixer)
        codec.save(temporary)
        for split in EVALUATION_SPLITS:
            # Requests of unseen domains meet every tool; the others only those that training may show.
            shown = tools if split == "unseen" else mixer.seen
            splits[split] = evaluation(splits[split], shown, data)
            text = "".join(example.to_json() + "\n" for example in splits[split])
            (temporary / f"{split}.jsonl").write_text(text, "utf-8")
            counts[split] = {"examples": len(splits[split])}
        with ProcessPoolExecutor(workers) as pool:
            parts = pool.map(partial(_encode_training, mixer, codec), _cuts(mixer.count, workers))
            counts["train"] = _write(temporary / "train", [item for part in parts for item in part], data)
            if data.symbolic_examples:
                cuts = _cuts(data.symbolic_examples, workers)
                parts = pool.map(partial(_encode_symbolic, data, codec), cuts)
                counts["symbolic"] = _write(temporary / "symbolic", [item for part in parts for item in part], data)
        encoded = [_encode(codec, example) for example in splits["validation"]]
        counts["validation"] |= _write(temporary / "validation", encoded, data)
        counts["kinds"] = dict(Counter(example.kind for example in (*splits["train"], *given)))
        (temporary / "quarantine.jsonl").write_text("".join(map(BadLine.to_json, refused)), "utf-8")
        counts["vocabulary"] = codec.vocab_size
        counts["train"]["padding_frac"] = _padding(temporary / "train", data)
    print(f"shards: {folder}\n{json.dumps(counts, indent=2)}")


def origins(split: str, *, shards: Path, paths: Paths, data: DataSettings) -> Iterator[tuple[Example, Example]]:
    """Every example of a prepared split, train or an evaluation suite, beside the one of the corpus that it is a varied
    copy of; copies of one come one after the other."""
    corpus = corpus_folder(paths, data)
    recorded = _read(corpus, split, data)
    if split == "train":
        given, _ = _given(data, corpus)
        mixer = _mixer(data, corpus, recorded, _tools(corpus), given)
        copies = ((copy, _answered(copy.id)) for copy in mixer.training())
        learnt = {example.id: mixer.answers(example) for example in (*given, *recorded)}
        by_id = {(name, n): one.example for name, answers in learnt.items() for n, one in enumerate(answers)}
    else:
        copies = ((example, (example.id, 0)) for example in _read_all(shards, split))
        by_id = {(example.id, 0): example for example in recorded}
    yield from ((copy, by_id[name]) for copy, name in sorted(copies, key=lambda pair: pair[1]))


def _answered(copy_id: str) -> tuple[str, int]:
    """The request's id and the number of the answer, of a copy's id (see Mixer.copies)."""
    name, _, copy = copy_id.rpartition("-")
    return name, int(copy.partition(".")[2] or 0)


def _mixer(
    data: DataSettings,
    corpus: Path,
    train: Sequence[Example],
    tools: Mapping[str, tuple[Tool, ...]],
    given: Sequence[Example],
) -> Mixer:
    used = {domain: of_domain for domain, of_domain in tools.items() if data.split.uses(domain)}
    return Mixer(data, train=train, tools=used, given=given, told=read_answers(corpus / "answers.jsonl"))


def _tools(corpus: Path) -> dict[str, tuple[Tool, ...]]:
    records = json.loads((corpus / "tools.json").read_text("utf-8"))
    return {domain: tuple(Tool.from_dict(tool) for tool in of_domain) for domain, of_domain in records.items()}


def _read(corpus: Path, split: str, data: DataSettings) -> list[Example]:
    """The split's requests in the slice. Unseen domains are in every slice: they are what it is not trained on."""
    used = [e for e in _read_all(corpus, split) if split == "unseen" or data.split.uses(e.domain)]
    if split != "train" or data.train_requests is None:
        return used
    # By a hash of their ids: the first n of one order, so that smaller choices lie within larger ones.
    chosen = set(sorted((artifacts.fingerprint(id=e.id), e.id) for e in used)[: data.train_requests])
    return [e for e in used if (artifacts.fingerprint(id=e.id), e.id) in chosen]


def _read_all(corpus: Path, split: str) -> list[Example]:
    path = corpus / f"{split}.jsonl"
    return read_examples(path)[0] if path.stat().st_size else []


def _given(data: DataSettings, corpus: Path) -> tuple[list[Example], list[BadLine]]:
    """The sound examples of `data.given`, and those refused: unsound, with the words of a request that some slice is
    evaluated on, or under an id that another training example has."""
    evaluated = [example for split in EVALUATION_SPLITS for example in _read_all(corpus, split)] if data.given else []
    words = {data.split.words(example.query) for example in evaluated}
    taken = {example.id for example in _read_all(corpus, "train")} if data.given else set()
    kept: list[Example] = []
    refused: list[BadLine] = []
    for path in data.given:
        examples, bad = read_examples(path)
        refused += bad
        for number, example in enumerate(examples, 1):
            if example.source.startswith(EVALUATION_ONLY):
                refused.append(BadLine(str(path), number, "is for evaluation only", example.to_json()))
            elif data.split.words(example.query) in words:
                refused.append(BadLine(str(path), number, "is an evaluated request", example.to_json()))
            elif example.id in taken:
                why = f"its id {example.id} is another training example's"
                refused.append(BadLine(str(path), number, why, example.to_json()))
            else:
                kept.append(example)
                taken.add(example.id)
    return kept, refused


def _answer_counts(mixer: Mixer, corpus: Path) -> dict[str, Any]:
    """Of the training requests: how many the teacher answered in several usable ways, how many answers are used and
    left out as unusable, and the mean confidence.

    Raises:
        ConfigError: data.answers=all, and no request has any answer but the recorded one.
    """
    told = [mixer.told[example.id] for example in mixer.train if example.id in mixer.told]
    if mixer.settings.answers == "all" and not any(one.answers for one in told):
        raise ConfigError(
            f"data.answers=all: {corpus} tells of no sampled answer to any of the {len(mixer.train):,} training "
            "requests; label them first (needle.generate role=label role.samples=8) and set data.corpus to what comes "
            "of it, or set data.answers=first"
        )
    learnt = [mixer.answers(example) for example in mixer.train]
    several = [answers for answers in learnt if len(answers) > 1]
    counts: dict[str, Any] = {"requests_with_several": len(several), "used": sum(map(len, learnt))}
    if mixer.settings.answers == "all":
        counts["left_out"] = sum(max(1, len(one.answers)) for one in told) + len(learnt) - len(told) - counts["used"]
    confidences = [answers[0].confidence for answers in learnt]
    return counts | {"confidence_mean": round(sum(confidences) / len(confidences), 6)}


def _codec(data: DataSettings, mixer: Mixer) -> TextCodec:
    if data.text.tokenizer is not None:
        codec = TextCodec.load(data.text.tokenizer)
        if codec.style != data.text.style:
            raise ConfigError(
                f"data.text.style={data.text.style}: the tokenizer in {data.text.tokenizer} was made for {codec.style}"
            )
        return codec
    return TextCodec(train_tokenizer(_texts(data, mixer), vocab_size=data.text.vocab_size), data.text.style)


def _texts(data: DataSettings, mixer: Mixer) -> Iterator[str]:
    """Each training request once, as recorded and as varied once, with its answer's names, keys and values."""
    for example in (*mixer.train, *mixer.training(range(0, mixer.count, data.copies_per_request))):
        yield render_query(example.query)
        yield render_tools(example.tools, style=data.text.style)
        yield from (text for text, span in render_calls(example.calls, example.tools) if span != Span.STRUCTURE)


def _encode(codec: TextCodec, example: Example, *, answer_weight: float = 1.0, confidence: float = 1.0) -> Encoded:
    called = {call.name for call in example.calls}
    gold = sum(1 << place for place, tool in enumerate(example.tools[:GOLD_TOOLS_MAX]) if tool.name in called)
    source = codec.encode_prompt(example.query, example.tools)
    target, spans = codec.encode_target(example.calls, example.tools)
    about = About(KINDS.index(example.kind), gold, len(example.tools), answer_weight, confidence)
    return Encoded(example.id, source, target, spans, about)


def _cuts(count: int, workers: int) -> list[range]:
    """Places of `range(count)` for so many processes, in the one order that shards have: the even ones, then the
    odd."""
    halves = [range(first, count, 2) for first in range(2)]
    size = max(1, -(-count // max(2, workers)))
    return [half[start : start + size] for half in halves for start in range(0, len(half), size)]


def _encode_training(mixer: Mixer, codec: TextCodec, places: range) -> list[Encoded]:
    text = mixer.settings.text
    encoded: list[Encoded] = []
    for answers in mixer.copies(places):
        of_copy = [
            _encode(codec, one.example, answer_weight=one.answer_weight, confidence=one.confidence) for one in answers
        ]
        # What is too long is left out, and the answers that stay share its weight.
        staying = [e.about.answer_weight for e in of_copy if not _is_too_long(e, text)]
        scale = 1 / sum(staying) if 0 < len(staying) < len(of_copy) else 1.0
        for item in of_copy:
            weight = min(1.0, item.about.answer_weight * scale)
            encoded.append(item._replace(about=item.about._replace(answer_weight=weight)))
    return encoded


def _encode_symbolic(data: DataSettings, codec: TextCodec, numbers: range) -> list[Encoded]:
    """As many tools are shown as training examples may show."""
    examples = symbolic_examples(numbers, tools_max=data.augment.tools_max, seed=data.seed)
    return [_encode(codec, example) for example in examples]


def _is_too_long(item: Encoded, text: TextSettings) -> bool:
    return len(item.source) > text.max_source_tokens or len(item.target) > text.max_target_tokens


def _write(folder: Path, encoded: Sequence[Encoded], data: DataSettings) -> dict[str, Any]:
    """Writes what fits; what is too long is counted, with the longest, so that the limits can be chosen."""
    writer = ShardWriter()
    too_long = 0
    for item in encoded:
        if _is_too_long(item, data.text):
            too_long += 1
        else:
            writer.add(*item)
    if not len(writer):
        raise ConfigError(
            f"no example has at most data.text.max_source_tokens={data.text.max_source_tokens} and "
            f"max_target_tokens={data.text.max_target_tokens} tokens"
        )
    longest = {
        "longest_source": max(len(e.source) for e in encoded),
        "longest_target": max(len(e.target) for e in encoded),
    }
    return {**writer.save(folder), "too_long": too_long, **longest}


def _padding(folder: Path, data: DataSettings) -> dict[str, float]:
    """Of the first packed window."""
    shard = Shard.open(folder)
    shape = {
        "source_row_tokens": data.packing.source_row_tokens,
        "target_row_tokens": data.packing.target_row_tokens,
    }
    window = data.packing.window_examples
    rows = pack(shard.source_lengths_N[:window], shard.target_lengths_N[:window], **shape)
    return {name: round(value, 4) for name, value in padding_frac(rows, shard, **shape).items()}


if __name__ == "__main__":
    main()
