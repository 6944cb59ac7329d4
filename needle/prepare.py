"""Turns the split corpus into training shards: augmentation, tokenizer, tokens.

    python -m needle.prepare data=default

Writes artifacts/shards-HASH: train/ and validation/ token arrays, tokenizer.json, and validation.jsonl, test.jsonl,
unseen.jsonl, the fixed evaluation suites. Nothing of validation, test or unseen domains reaches the tokenizer or the
training arrays.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from needle import artifacts, config
from needle.corpus.mix import Mixer, evaluation
from needle.data.packing import pack, padding_frac
from needle.data.settings import DataSettings
from needle.data.shards import GOLD_TOOLS_MAX, About, Shard, ShardWriter
from needle.errors import ConfigError
from needle.generate import corpus_folder
from needle.runs import Paths
from needle.schema import EVALUATION_ONLY, KINDS, BadLine, Example, Tool, read_examples
from needle.text.render import Span, render_calls, render_query, render_tools
from needle.text.tokenizer import TextCodec, train_tokenizer

PREPARE_VERSION = 2
EVALUATION_SPLITS = ("validation", "test", "unseen")


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
    given, refused = _given(data, corpus)
    used = {domain: of_domain for domain, of_domain in tools.items() if data.split.uses(domain)}
    mixer = Mixer(data, train=splits["train"], tools=used, given=given)
    counts: dict[str, Any] = {"given": {"examples": len(given), "refused": len(refused)}}
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
            parts = pool.map(partial(_encode_training, mixer, codec, workers), range(workers))
            counts["train"] = _write(temporary / "train", [item for part in parts for item in part], data)
        encoded = [_encode(codec, example) for example in splits["validation"]]
        counts["validation"] |= _write(temporary / "validation", encoded, data)
        counts["kinds"] = dict(Counter(example.kind for example in (*splits["train"], *given)))
        (temporary / "quarantine.jsonl").write_text("".join(map(BadLine.to_json, refused)), "utf-8")
        counts["vocabulary"] = codec.vocab_size
        counts["train"]["padding_frac"] = _padding(temporary / "train", data)
    print(f"shards: {folder}\n{json.dumps(counts, indent=2)}")


def _tools(corpus: Path) -> dict[str, tuple[Tool, ...]]:
    records = json.loads((corpus / "tools.json").read_text("utf-8"))
    return {domain: tuple(Tool.from_dict(tool) for tool in of_domain) for domain, of_domain in records.items()}


def _read(corpus: Path, split: str, data: DataSettings) -> list[Example]:
    """The split's requests in the slice. Unseen domains are in every slice: they are what it is not trained on."""
    return [e for e in _read_all(corpus, split) if split == "unseen" or data.split.uses(e.domain)]


def _read_all(corpus: Path, split: str) -> list[Example]:
    path = corpus / f"{split}.jsonl"
    return read_examples(path)[0] if path.stat().st_size else []


def _given(data: DataSettings, corpus: Path) -> tuple[list[Example], list[BadLine]]:
    """The sound examples of `data.given`, and those refused: unsound, or with the words of a request that some slice
    is evaluated on."""
    evaluated = [example for split in EVALUATION_SPLITS for example in _read_all(corpus, split)] if data.given else []
    words = {data.split.words(example.query) for example in evaluated}
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
            else:
                kept.append(example)
    return kept, refused


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
    for example in (*mixer.train, *mixer.training(0, data.copies_per_request)):
        yield render_query(example.query)
        yield render_tools(example.tools, style=data.text.style)
        yield from (text for text, span in render_calls(example.calls, example.tools) if span != Span.STRUCTURE)


def _encode(codec: TextCodec, example: Example) -> Encoded:
    called = {call.name for call in example.calls}
    gold = sum(1 << place for place, tool in enumerate(example.tools[:GOLD_TOOLS_MAX]) if tool.name in called)
    source = codec.encode_prompt(example.query, example.tools)
    target, spans = codec.encode_target(example.calls, example.tools)
    return Encoded(example.id, source, target, spans, About(KINDS.index(example.kind), gold))


def _encode_training(mixer: Mixer, codec: TextCodec, parts: int, part: int) -> list[Encoded]:
    return [_encode(codec, example) for example in mixer.training(part, parts)]


def _write(folder: Path, encoded: Sequence[Encoded], data: DataSettings) -> dict[str, Any]:
    """Writes what fits; what is too long is counted, with the longest, so that the limits can be chosen."""
    writer = ShardWriter()
    limit_S, limit_T = data.text.max_source_tokens, data.text.max_target_tokens
    too_long = 0
    for item in encoded:
        if len(item.source) > limit_S or len(item.target) > limit_T:
            too_long += 1
        else:
            writer.add(*item)
    if not len(writer):
        raise ConfigError(
            f"no example has at most data.text.max_source_tokens={limit_S} and max_target_tokens={limit_T} tokens"
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
