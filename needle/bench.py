"""Measures where time goes on this machine: matrix product, training step, decoding.

    python -m needle.bench student=san_base            # make bench
    python -m needle.bench loss=reverse_kl auxiliary=[z_loss] student@teacher_student=san_large

Every figure is the median of several measurements after a warm-up, and is printed with the machine's own sgemm rate,
since a rate without that says little about the code. A loss that reads a teacher is given random distributions, or
runs a random network of `teacher_student`'s size: time and memory do not depend on what they say.
"""

import random
import resource
import statistics
import string
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from needle import config
from needle.artifacts import write_json_atomic
from needle.loss import Loss, Mixing, Weighting
from needle.loss.balance import Balance
from needle.loss.objective import NETWORK, Objective, needs_of
from needle.optim import OptimSettings
from needle.schema import Tool
from needle.student import Architecture
from needle.text.tokenizer import BOS, QUERY, SPECIALS, TOOLS, TextCodec, train_tokenizer

Count = Annotated[int, Field(ge=1)]
HALFWAY = 0.5  # of the training, where schedules are read


@dataclass(frozen=True)
class BenchShape:
    """The batch that is timed: `rows` packed rows, all slots filled, `examples_per_row` examples in each."""

    rows: Count
    source_tokens: Count
    target_tokens: Count
    examples_per_row: Count


def median_seconds(work: Callable[[], Any], *, warmup: int, repeats: int) -> float:
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def sgemm_gflops(repeats: int) -> float:
    """Rate of a 1024 x 1024 x 1024 float32 product at the current number of threads, in GFLOP/s."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / median_seconds(lambda: a @ b, warmup=3, repeats=repeats) / 1e9


def made_up_texts(count: int) -> list[str]:
    """Words of random letters, each twice, which hold enough repeated pairs for a tokenizer of any usual size."""
    letters = random.Random(0)
    words = ["".join(letters.choices(string.ascii_lowercase, k=letters.randint(3, 9))) for _ in range(count)]
    return [f"{word} {word}" for word in words]


def packed_batch(shape: BenchShape, *, vocab_size: int, separator_id: int, top_k: int) -> dict[str, torch.Tensor]:
    """Random tokens in the layout of `needle.data.packing.collate`, without padding, with a teacher's distributions."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(len(SPECIALS), vocab_size, (shape.rows, length), generator=generator)

    def segments(length: int) -> torch.Tensor:
        return (torch.arange(length) * shape.examples_per_row // length + 1).expand(shape.rows, -1).contiguous()

    labels = ids(shape.target_tokens)
    source, length = ids(shape.source_tokens), shape.source_tokens // shape.examples_per_row
    for start in range(0, shape.source_tokens - length + 1, length):  # three tools, then the request
        source[:, start], source[:, start + 3 * length // 4] = TOOLS, QUERY
        source[:, [start + length // 4, start + length // 2]] = separator_id
    teacher = torch.randn(*labels.shape, vocab_size, generator=generator).log_softmax(dim=-1).topk(top_k, dim=-1)
    return {
        "source_ids_RS": source,
        "source_segments_RS": segments(shape.source_tokens),
        "decoder_ids_RT": ids(shape.target_tokens),
        "target_segments_RT": segments(shape.target_tokens),
        "labels_RT": labels,
        "spans_RT": torch.randint(0, 5, labels.shape, generator=generator),
        "kinds_RT": torch.zeros_like(labels),
        "answer_weights_RT": torch.ones(labels.shape),
        "confidences_RT": torch.ones(labels.shape),
        "gold_tools_RS": torch.ones(shape.rows, shape.source_tokens, dtype=torch.int64),
        "teacher_ids_RTK": teacher.indices,
        "teacher_log_probs_RTK": teacher.values,
    }


def training_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, objective: Objective, *, compiled: bool
) -> dict[str, Callable[[dict[str, torch.Tensor]], None]]:
    """The parts of a step, as the trainer does them: forward and backward, and the optimizer."""

    share = torch.tensor(objective.mixing.at(HALFWAY))

    def sums(batch: dict[str, torch.Tensor], progress: torch.Tensor) -> dict[str, torch.Tensor]:
        return objective.measure(batch, student=model, progress=progress, share=share).sums

    measure = torch.compile(sums) if compiled else sums

    def gradients(batch: dict[str, torch.Tensor]) -> None:
        counts = objective.counts(batch)
        measured = measure(batch, torch.tensor(HALFWAY))
        objective.total(measured, counts, progress=HALFWAY, part_frac=1.0).backward()

    def update(_: dict[str, torch.Tensor]) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients(batch)
        update(batch)

    return {"forward_backward": gradients, "optimizer": update, "whole_step": step}


def time_by_operation(step: Callable[[], Any], *, shown: int) -> dict[str, float]:
    """Share of one step's CPU time spent in each of the `shown` costliest operations themselves, and in the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    seconds = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profiler.key_averages()}
    whole = sum(seconds.values())
    costliest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:shown]
    shares = {name: round(seconds[name] / whole, 4) for name in costliest}
    return {**shares, "all others": round(1 - sum(shares.values()), 4)}


def decoding_rate(model: torch.nn.Module, codec: TextCodec, *, new_tokens: int, repeats: int) -> float:
    """Tokens a second of one request answered with the KV cache, one token a step, without a grammar.

    `model` has random weights, so it does not stop by itself: exactly `new_tokens` steps are timed, prompt included.
    """
    prompt = codec.encode_prompt(BENCH_REQUEST, BENCH_TOOLS)
    source = torch.tensor([prompt])

    @torch.inference_mode()
    def answer() -> None:
        encoded = model.get_encoder()(input_ids=source)
        token, cache = torch.tensor([[BOS]]), None
        for _ in range(new_tokens):
            step = model(decoder_input_ids=token, encoder_outputs=encoded, past_key_values=cache, use_cache=True)
            token, cache = step.logits[:, -1:].argmax(dim=-1), step.past_key_values

    return new_tokens / median_seconds(answer, warmup=2, repeats=repeats)


BENCH_TOOLS = tuple(
    Tool(
        f"set_{thing}",
        f"Sets the {thing} of a room to a level that the user names.",
        {
            "type": "object",
            "properties": {"room": {"type": "string"}, "level": {"type": "integer"}},
            "required": ["room"],
        },
    )
    for thing in ("light", "heating", "volume", "blind")
)
BENCH_REQUEST = "turn the heating in the upstairs bathroom to 21 and dim the light in the hall"


@config.stage("bench")
def main(
    cfg: dict[str, Any],
    *,
    student: Architecture,
    teacher_student: Architecture,
    loss: Loss,
    mixing: Mixing,
    weighting: Weighting,
    balance: Balance,
    auxiliaries: Mapping[str, Any],
    optim: OptimSettings,
    batch: BenchShape,
    top_k: Count,
    vocab_size: Count,
    threads: Count | None,
    compile: bool,
    warmup: Count,
    repeats: Count,
    decode_tokens: Annotated[int, Field(ge=0)],
    operations: Annotated[int, Field(ge=0)],
    output: Path | None,
) -> None:
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    codec = TextCodec(train_tokenizer(made_up_texts(vocab_size), vocab_size=vocab_size), "signature")
    model = student.build(codec)
    figures: dict[str, Any] = {
        "student": student.name,
        "vocabulary": codec.vocab_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "compiled": compile,
        "sgemm_gflop_per_s": round(sgemm_gflops(repeats=20), 1),
    }
    data = packed_batch(batch, vocab_size=codec.vocab_size, separator_id=codec.separator_id, top_k=top_k)
    tokens = batch.rows * (batch.source_tokens + batch.target_tokens)
    needs = needs_of(loss, auxiliaries)
    if "top_k" not in needs:
        data = {name: tensor for name, tensor in data.items() if not name.startswith("teacher_")}
    objective = Objective(
        loss=loss,
        mixing=mixing,
        weighting=weighting,
        balance=balance,
        auxiliaries=auxiliaries,
        student=model,
        teacher=teacher_student.build(codec).eval().requires_grad_(False) if needs & NETWORK else None,
    )
    optimizer = optim.build(model, beside=objective)
    parts = training_step(model, optimizer, objective, compiled=compile)
    for name, part in parts.items():
        seconds = median_seconds(partial(part, data), warmup=warmup, repeats=repeats)
        figures[f"{name}_s"] = round(seconds, 4)
    figures["training_tokens_per_s"] = round(tokens / figures["whole_step_s"], 1)
    # Of the whole process so far, torch itself included: differences between losses are what it is good for.
    figures["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    shares = time_by_operation(lambda: parts["whole_step"](data), shown=operations) if operations else {}
    if decode_tokens:
        rate = decoding_rate(model.eval(), codec, new_tokens=decode_tokens, repeats=repeats)
        figures["decoding_tokens_per_s"] = round(rate, 1)
    for name, value in figures.items():
        print(f"{name:28} {value}")
    if shares:
        print("\nwhere a step's time goes:")
    for name, share in shares.items():
        print(f"  {name:44} {share:6.1%}")
    if output is not None:
        write_json_atomic(output, {**figures, **({"step_time_share": shares} if shares else {})})


if __name__ == "__main__":
    main()
