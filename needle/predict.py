"""Answers requests from a file with a trained student.

    python -m needle.predict checkpoint=RUN_OR_FOLDER input=in.jsonl output=out.jsonl

A line `{"id", "query", "tools"}` becomes `{"id", "calls", "confidence"}`, in the same order; a line that cannot be
answered becomes `{"id", "error"}`, and the exit status is 1 when there was one. Tools are JSON Schema, bare or in
OpenAI's wrapping. `-` is standard input or output. The output appears under its name when it is whole.

`confidence`, 0 to 1, is how likely the answer is to be right as a whole where needle.calibrate has fitted a head to the
student. Without a head, and with constrained=false (heads are fitted on constrained answers), it is the student's own
probability of the answer: it ranks answers, but it is calibrated to nothing.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
from pydantic import Field

from needle import config
from needle.decode import Decoder
from needle.errors import DataError
from needle.progress import Progress
from needle.schema import BadLine, Tool, call_problems, read_stream
from needle.student import load

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Request:
    """One input line: either a request, or the reason why it is none."""

    id: Any
    query: str = ""
    tools: tuple[Tool, ...] = ()
    error: str | None = None


@config.stage("predict")
def main(
    cfg: dict[str, Any],
    *,
    checkpoint: Path,
    input: Path,
    output: Path,
    constrained: bool,
    batch_size: Count,
    max_new_tokens: Count,
    max_calls: Count,
    max_source_tokens: Count,
    threads: Count | None,
    device: str,
) -> None:
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
    folder = checkpoint / "model" if (checkpoint / "model").is_dir() else checkpoint
    model, codec = load(folder)
    limits = {"max_new_tokens": max_new_tokens, "max_calls": max_calls, "max_source_tokens": max_source_tokens}
    decoder = Decoder(model.to(device), codec, constrained=constrained, **limits)
    lines, total = _lines(input)
    partial = output.with_name(f".{output.name}.{os.getpid()}.part")
    stream = sys.stdout if str(output) == "-" else _open(partial)
    failed = answered = 0
    try:
        with Progress("answers") as progress:
            requests = (_request(number, value) for number, value in lines)
            while batch := list(islice(requests, batch_size)):
                for record in _answers(decoder, batch):
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                    failed += "error" in record
                    answered += 1
                stream.flush()
                progress.update(answered, max(total, answered))
        if not answered:
            raise DataError(f"{input} is empty: there is nothing to answer")
        if stream is not sys.stdout:
            stream.close()
            partial.replace(output)
    finally:
        if stream is not sys.stdout:
            stream.close()
            partial.unlink(missing_ok=True)
    if failed:
        print(f"needle.predict: {failed} of {answered} lines have an error", file=sys.stderr)
        raise SystemExit(1)


def _lines(path: Path) -> tuple[Iterator[tuple[int, Any]], int]:
    """The lines, and how many there are (0: unknown) for the progress bar."""
    if str(path) == "-":
        return read_stream(sys.stdin.buffer, "standard input"), 0
    try:
        with path.open("rb") as stream:
            total = sum(1 for _ in stream)
        return read_stream(path.open("rb"), str(path)), total
    except OSError as error:
        raise DataError(f"cannot read input={path}: {error.strerror}") from error


def _open(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write into {path.parent}: {error.strerror}") from error


def _request(number: int, value: Any) -> Request:
    if isinstance(value, BadLine):
        return Request(number, error=value.reason)
    if not isinstance(value, dict):
        return Request(number, error=f"a line must be an object, not {type(value).__name__}")
    identity = value.get("id", number)
    query, tools = value.get("query"), value.get("tools")
    if not isinstance(query, str) or not query.strip():
        return Request(identity, error="query is missing or empty")
    if not isinstance(tools, list):
        return Request(identity, error="tools must be a list (it may be empty)")
    try:
        read = tuple(Tool.from_dict(tool) for tool in tools)
    except ValueError as error:
        return Request(identity, error=str(error))
    names = [tool.name for tool in read]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        return Request(identity, error=f"two tools are named {twice[0]!r}")
    return Request(identity, query, read)


def _answers(decoder: Decoder, batch: Sequence[Request]) -> Iterator[dict[str, Any]]:
    sound = [request for request in batch if request.error is None]
    decoded = iter(decoder.decode([(request.query, request.tools) for request in sound]))
    for request in batch:
        if request.error is not None:
            yield {"id": request.id, "error": request.error}
            continue
        answer = next(decoded)
        if answer.calls is None:
            yield {"id": request.id, "error": answer.error}
            continue
        calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in answer.calls]
        record = {"id": request.id, "calls": calls, "confidence": round(answer.confidence or 0.0, 6)}
        by_name = {tool.name: tool for tool in request.tools}
        problems = [problem for call in answer.calls for problem in call_problems(call, by_name)]
        yield {**record, "problems": problems} if problems else record


if __name__ == "__main__":
    main()
