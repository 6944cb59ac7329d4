"""On-policy distillation: steps in which the student learns from what it wrote itself, as the teacher scores it.

    python -m needle.train rollouts=on_policy loss=reverse_kl teacher=checkpoint
    python -m needle.train rollouts=replay loss=skew_reverse_kl teacher=checkpoint

A step is on-policy with probability `frac` (lambda of GKD, Agarwal et al. 2024). Its requests are then answered by the
student, sampled in evaluation mode and without gradients, and the teacher's network scores those answers. Labels are
the student's own tokens: they say where the loss is taken, and nothing is learnt from them. With `source: replay`
answers are kept and used again while they are young, since sampling costs more than training (Ko et al. 2024,
DistiLLM). Reverse KL, its skewed form and the Jensen-Shannon divergence are the usual losses.

Every draw depends on (seed, step, rank) and on the student, so a resumed run repeats what it would have done.

Cost: an on-policy step adds the student's encoder and a decoder step for each token of the longest answer, and a pass
of the teacher.
"""

# R rows, T target tokens, V vocabulary, K teacher tokens

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from needle.data.packing import collate, network_inputs, pack
from needle.data.shards import ABOUT_TYPES, Shard
from needle.decode import Decoder
from needle.errors import ConfigError, DataError
from needle.loss.base import IGNORE
from needle.loss.objective import DISTRIBUTIONS, covered
from needle.loss.schedule import Fraction, Schedule
from needle.schema import Tool
from needle.teacher.base import Teacher
from needle.text.prompt_reader import tools_of_prompt
from needle.text.render import Span, parse_calls
from needle.text.tokenizer import EOS, TextCodec

Count = Annotated[int, Field(ge=1)]
STREAM = 0x6F6E  # keeps these draws apart from others made from the same seed
SCORED_WITH = DISTRIBUTIONS | {"live", "features"}  # what a teacher's network can say of any answer


@dataclass(frozen=True)
class RolloutSettings:
    """What conf/rollouts states.

    Each time that the labels cost `raise_above_nats` more at a validation than at the one before, `raise_frac` is added
    to `frac`, up to 1, and stays (DistiLLM's adaptive scheduler). Not by the loss itself, which may change while the
    student stands still, as TAID's or a mixture's does.
    """

    frac: Schedule
    raise_frac: Fraction
    raise_above_nats: Annotated[float, Field(ge=0)]
    source: Literal["fresh", "replay"]
    refresh_frac: Schedule
    buffer_examples: Count
    max_age_steps: Count
    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    constrained: bool
    max_new_tokens: Count
    max_calls: Count
    batch_size: Count

    def __post_init__(self) -> None:
        for name in ("frac", "refresh_frac"):
            schedule = getattr(self, name)
            for end in ("start", "end"):
                if getattr(schedule, end) > 1:
                    raise ValueError(f"{name}.{end}={getattr(schedule, end)}: a probability is at most 1")

    @property
    def on(self) -> bool:
        return self.raise_frac > 0 or not self.frac.is_always(0.0)


class _Asks(Protocol):
    @property
    def needs(self) -> frozenset[str]: ...


def check_legal(*, settings: RolloutSettings, teacher: Teacher, loss: _Asks, target_row_tokens: int) -> None:
    """Raises ConfigError, with the legal routes, where nobody could score what the student writes, or where the loss
    would have to learn from the student's own tokens."""
    if not settings.on:
        return
    teacher_name, loss_name = type(teacher).__name__, type(loss).__name__
    if "live" not in teacher.capabilities or teacher.tokenizer != "student":
        raise ConfigError(
            f"rollouts need a teacher that scores the student's own answers while it trains (live), over the student's "
            f"tokens; teacher={teacher_name} gives {', '.join(sorted(teacher.capabilities))} over the "
            f"{teacher.tokenizer} tokenizer: use teacher=checkpoint, or rollouts=off"
        )
    if not loss.needs & DISTRIBUTIONS or loss.needs - SCORED_WITH:
        raise ConfigError(
            f"rollouts have no true answers, and loss={loss_name} learns from answers (it needs "
            f"{', '.join(sorted(loss.needs))}): use a loss over the teacher's distributions, such as loss=reverse_kl, "
            "skew_reverse_kl or jensen_shannon, or rollouts=off"
        )
    if settings.max_new_tokens > target_row_tokens:
        raise ConfigError(
            f"rollouts.max_new_tokens={settings.max_new_tokens}: a target row holds {target_row_tokens} tokens; set at "
            "most that many, or raise data.packing.target_row_tokens"
        )


class Request(NamedTuple):
    """An example of a batch: its prompt, the teacher's answer, and what a loss may want to know of it (see About)."""

    source: np.ndarray
    target: np.ndarray
    kind: int
    gold_tools: int
    answer_weight: float
    confidence: float


class Rollout(NamedTuple):
    """A request with the student's answer as target. `valid`: it ended and is calls in JSON. `exact`: it is the
    teacher's answer, token by token. One that does not end with `<eos>` was cut off, and its stop is not learnt."""

    source: np.ndarray
    target: np.ndarray
    spans: np.ndarray
    kind: int
    gold_tools: int
    answer_weight: float
    confidence: float
    made_step: int
    valid: bool
    exact: bool


ARRAYS = ("source", "target", "spans")
NUMBERS = tuple(name for name in Rollout._fields if name not in ARRAYS)


def unpack(batch: Mapping[str, Tensor]) -> list[Request]:
    """A packed batch's examples, row by row in the order of their segments."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in batch.items() if not name.startswith("teacher_")}
    requests = []
    for r, segments_S in enumerate(arrays["source_segments_RS"]):
        for segment in range(1, int(segments_S.max(initial=0)) + 1):
            at_S, at_T = segments_S == segment, arrays["target_segments_RT"][r] == segment
            requests.append(
                Request(
                    source=arrays["source_ids_RS"][r, at_S],
                    target=arrays["labels_RT"][r, at_T],
                    kind=int(arrays["kinds_RT"][r, at_T][0]),
                    gold_tools=int(arrays["gold_tools_RS"][r, at_S][0]),
                    answer_weight=float(arrays["answer_weights_RT"][r, at_T][0]),
                    confidence=float(arrays["confidences_RT"][r, at_T][0]),
                )
            )
    return requests


def rows_of(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """Which of the examples that `unpack` gives lie in each row."""
    ends = batch["source_segments_RS"].amax(dim=1).cumsum(dim=0).tolist()
    return [list(range(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def refit(
    rows: Sequence[Sequence[int]], target_lengths_N: np.ndarray, source_lengths_N: np.ndarray, **row_tokens: int
) -> list[list[int]]:
    """Rows whose targets have got other lengths: what no longer fits its row goes to the first that has room, or to a
    new one. Packing so few examples anew would seldom find as few rows as a whole window gave."""
    lengths_N2 = np.stack([source_lengths_N, target_lengths_N], axis=1)
    limits_2 = np.array([row_tokens["source_row_tokens"], row_tokens["target_row_tokens"]])
    kept: list[list[int]] = [[] for _ in rows]
    over = []
    for own, row in zip(kept, rows, strict=True):
        for i in row:
            (own if (lengths_N2[[*own, i]].sum(axis=0) <= limits_2).all() else over).append(i)
    for i in over:
        fitting = (row for row in kept if (lengths_N2[[*row, i]].sum(axis=0) <= limits_2).all())
        place = next(fitting, None)
        if place is None:
            kept.append([i])
        else:
            place.append(i)
    return kept


def lay_out(
    rollouts: Sequence[Rollout],
    *,
    rows: Sequence[Sequence[int]] | None,
    source_row_tokens: int,
    target_row_tokens: int,
    rows_multiple: int,
) -> dict[str, Tensor]:
    """A packed batch (see `collate`) of all of them, in as many rows as they take, and empty ones up to a multiple.
    `rows`: where the requests lay; None: anywhere."""
    fields = {name: [getattr(rollout, name) for rollout in rollouts] for name in Rollout._fields}
    sources, targets = ([len(part) for part in fields[name]] for name in ("source", "target"))
    # A batch does not tell all that a shard holds of an example; what it does not, no loss reads.
    about = {name: np.array(fields.get(name, [0] * len(rollouts)), kind) for name, kind in ABOUT_TYPES.items()}
    shard = Shard(
        **{name: np.concatenate(fields[name]) for name in ARRAYS},
        source_offsets=np.cumsum([0, *sources]),
        target_offsets=np.cumsum([0, *targets]),
        **about,
    )
    shape = {"source_row_tokens": source_row_tokens, "target_row_tokens": target_row_tokens}
    lengths = {"source_lengths_N": shard.source_lengths_N, "target_lengths_N": shard.target_lengths_N}
    filled = pack(**lengths, **shape) if rows is None else refit(rows, **lengths, **shape)
    filled += [[] for _ in range(-len(filled) % rows_multiple)]
    return collate(shard, filled, **shape)


def with_rows(batch: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The batch with empty rows up to `rows`, as processes that train together need equally many."""
    fillings = {"labels_RT": IGNORE}
    return {
        name: torch.cat([tensor, tensor.new_full((rows - len(tensor), *tensor.shape[1:]), fillings.get(name, 0))])
        for name, tensor in batch.items()
    }


def spans_of(target: Sequence[int], codec: TextCodec) -> tuple[np.ndarray, bool]:
    """The span of every token of an answer, and whether it is valid.

    They are those of the same calls written by the codec, with arguments in the answer's own order. An answer that the
    codec would write otherwise (cut off, no JSON, tokens cut elsewhere) is all structure, but for its stop.
    """
    spans = np.full(len(target), int(Span.STRUCTURE), np.uint8)
    if target[-1] != EOS:
        return spans, False
    spans[-1] = int(Span.STOP)
    try:
        calls = parse_calls(codec.decode(target))
    except ValueError:
        return spans, False
    ids, own = codec.encode_target(calls, ())
    return (np.array(own, np.uint8) if ids == list(target) else spans), True


class Buffer:
    """The newest `examples` rollouts, none older than `max_age_steps`."""

    def __init__(self, *, examples: int, max_age_steps: int):
        self.max_age_steps = max_age_steps
        self._kept: deque[Rollout] = deque(maxlen=examples)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, rollouts: Iterable[Rollout]) -> None:
        self._kept.extend(rollouts)

    def draw(self, count: int, *, step: int, rng: np.random.Generator) -> list[Rollout]:
        """Up to `count` different rollouts, each with the same probability; what is too old is dropped first."""
        while self._kept and step - self._kept[0].made_step > self.max_age_steps:
            self._kept.popleft()
        return [self._kept[int(i)] for i in rng.permutation(len(self._kept))[:count]]

    def state(self) -> dict[str, Tensor]:
        """Flat tensors: of each array all tokens and their lengths, of everything else one number a rollout."""
        state = {}
        for name in ARRAYS:
            parts = [np.asarray(getattr(rollout, name), np.int32) for rollout in self._kept]
            state[name] = torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *parts]))
            state[f"{name}_lengths"] = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        for name in NUMBERS:
            numbers = [getattr(rollout, name) for rollout in self._kept]
            kind = torch.float64 if Rollout.__annotations__[name] is float else torch.int64
            state[name] = torch.tensor(numbers, dtype=kind)
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        columns: dict[str, list[Any]] = {}
        for name in ARRAYS:
            parts = state[name].split(state[f"{name}_lengths"].tolist()) if len(state[f"{name}_lengths"]) else ()
            columns[name] = [part.numpy() for part in parts]
        for name in NUMBERS:
            columns[name] = list(map(Rollout.__annotations__[name], state[name].tolist()))
        self._kept.clear()
        self._kept.extend(
            Rollout(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
        )


class Scorer:
    """A teacher's network as the source of stored distributions: the `top_k` likeliest tokens at `temperature`."""

    def __init__(self, network: torch.nn.Module, *, top_k: int, temperature: float):
        self.network, self.top_k, self.temperature = network, top_k, temperature

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with teacher_ids_RTK and teacher_log_probs_RTK. Where they say nothing the label is ignored, so
        that nothing is learnt from it."""
        logits_RTV = self.network(**network_inputs(batch)).logits.float()
        top = (logits_RTV / self.temperature).log_softmax(dim=-1).topk(self.top_k, dim=-1)
        labels = batch["labels_RT"].masked_fill(~covered(top.values), IGNORE)
        return {**batch, "labels_RT": labels, "teacher_ids_RTK": top.indices, "teacher_log_probs_RTK": top.values}


TALLIED = (
    "steps", "on_policy_steps", "rollouts", "age_steps", "valid", "exact", "length_tokens", "truncated", "unread",
)  # fmt: skip
NUMBERS_KEPT = ("raised_frac", "validation_nats", "generated_tokens", "read_tokens")


class Rollouts:
    """Replaces batches while a student trains. `scorer`: None where the loss reads the teacher's logits, which the
    objective then has itself."""

    def __init__(
        self,
        settings: RolloutSettings,
        *,
        student: torch.nn.Module,
        codec: TextCodec,
        scorer: Scorer | None,
        source_row_tokens: int,
        target_row_tokens: int,
        rows_multiple: int,
        seed: int,
    ):
        self.settings, self.student, self.codec, self.scorer, self.seed = settings, student, codec, scorer, seed
        self.shape = {"source_row_tokens": source_row_tokens, "target_row_tokens": target_row_tokens}
        self.rows_multiple = rows_multiple
        self.buffer = Buffer(examples=settings.buffer_examples, max_age_steps=settings.max_age_steps)
        self.raised_frac, self.validation_nats = 0.0, float("inf")
        self.generated_tokens = self.read_tokens = 0
        self._tally = dict.fromkeys(TALLIED, 0)

    @cached_property
    def decoder(self) -> Decoder:
        limits = {"max_new_tokens": self.settings.max_new_tokens, "max_calls": self.settings.max_calls}
        return Decoder(self.student, self.codec, constrained=self.settings.constrained, **limits)

    def frac(self, progress: float) -> float:
        return min(1.0, self.settings.frac.at(progress) + self.raised_frac)

    def replace(
        self, batch: dict[str, Tensor], *, step: int, progress: float, rank: int
    ) -> tuple[dict[str, Tensor], bool]:
        """The batch of a step, and whether it is on-policy. All ranks choose alike; each answers its own requests."""
        together = np.random.default_rng([self.seed, step, STREAM])
        self._tally["steps"] += 1
        if together.random() >= self.frac(progress):
            return batch, False
        replays = self.settings.source == "replay" and together.random() >= self.settings.refresh_frac.at(progress)
        own = np.random.default_rng([self.seed, step, STREAM, rank])
        requests = unpack(batch)
        drawn = self.buffer.draw(len(requests), step=step, rng=own) if replays else []
        # What the buffer cannot give is asked now.
        missing = sorted(own.permutation(len(requests))[: len(requests) - len(drawn)])
        fresh = self._answered([requests[i] for i in missing], step=step, seed=int(own.integers(2**62)))
        if self.settings.source == "replay":
            self.buffer.add(fresh)
        rollouts = [*drawn, *fresh]
        self._count(rollouts, step)
        rows = None if drawn else rows_of(batch)
        laid = lay_out(rollouts, rows=rows, **self.shape, rows_multiple=self.rows_multiple)
        laid = {name: tensor.to(batch["labels_RT"].device) for name, tensor in laid.items()}
        return (self.scorer(laid) if self.scorer is not None else laid), True

    def validated(self, label_nats: float) -> None:
        """Tells what the labels of the validation cost, by which the share of on-policy steps is raised."""
        if label_nats > self.validation_nats + self.settings.raise_above_nats:
            self.raised_frac = min(1.0, self.raised_frac + self.settings.raise_frac)
        self.validation_nats = label_nats

    def record(self) -> dict[str, float]:
        """Since it was last asked: the share of on-policy steps, and of the answers learnt from their mean age and
        length and how good they were. Tokens that this rank read and wrote while sampling are counted from the
        beginning, for comparisons at equal compute; those trained on are not among them."""
        tally, self._tally = self._tally, dict.fromkeys(TALLIED, 0)
        record: dict[str, float] = {
            "rollout_frac": tally["on_policy_steps"] / max(tally["steps"], 1),
            "rollout_generated_tokens": self.generated_tokens,
            "rollout_read_tokens": self.read_tokens,
        }
        if tally["rollouts"]:
            means = {"valid": "valid_frac", "exact": "exact_frac", "age_steps": "age_steps"}
            means["length_tokens"] = "length_tokens"
            record |= {f"rollout_{key}": tally[name] / tally["rollouts"] for name, key in means.items()}
            record |= {f"rollout_{name}_count": tally[name] for name in ("truncated", "unread")}
        return record

    def state(self) -> dict[str, Any]:
        """Tensors and numbers, for a checkpoint."""
        numbers = {name: getattr(self, name) for name in NUMBERS_KEPT}
        return {**numbers, "tally": dict(self._tally), "buffer": self.buffer.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name in NUMBERS_KEPT:
            setattr(self, name, state[name])
        self._tally = dict(state["tally"])
        self.buffer.load(state["buffer"])

    def _answered(self, requests: Sequence[Request], *, step: int, seed: int) -> list[Rollout]:
        """In the order of the requests."""
        generator = torch.Generator().manual_seed(seed)
        # Alike in length, so that little of a batch is padding.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].source))
        answers: dict[int, list[int]] = {}
        for start in range(0, len(order), self.settings.batch_size):
            chosen = order[start : start + self.settings.batch_size]
            answers |= zip(chosen, self._sample([requests[i] for i in chosen], generator), strict=True)
        rollouts = []
        for i, request in enumerate(requests):
            spans, valid = spans_of(answers[i], self.codec)
            told = request._asdict() | {"target": np.array(answers[i]), "spans": spans, "made_step": step}
            rollouts.append(Rollout(**told, valid=valid, exact=answers[i] == request.target.tolist()))
        self.read_tokens += sum(len(rollout.source) for rollout in rollouts)
        self.generated_tokens += sum(len(rollout.target) for rollout in rollouts)
        return rollouts

    def _sample(self, asked: Sequence[Request], generator: torch.Generator) -> list[list[int]]:
        prompts = [request.source.tolist() for request in asked]
        drawn = {"temperature": self.settings.temperature, "top_p": self.settings.top_p, "generator": generator}
        device = next(self.student.parameters()).device.type
        was_training = self.student.training  # a decoder that is made ends it
        decoder = self.decoder
        self.student.eval()
        try:
            tools = [self._tools(prompt) for prompt in prompts]
            # Weights that autocast narrows without gradients must not be kept for the pass that trains them.
            with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
                return decoder.sample(prompts, tools, **drawn)
        finally:
            self.student.train(was_training)

    def _tools(self, prompt: Sequence[int]) -> list[Tool] | None:
        """The tools shown, for the grammar; None, and counted, where they cannot be read: the answer is then free."""
        grammar = self.decoder.grammar
        if grammar is None:
            return None
        try:
            tools = tools_of_prompt(prompt, self.codec)
            grammar.matcher(tools)
            return tools
        except DataError:
            self._tally["unread"] += 1
            return None

    def _count(self, rollouts: Sequence[Rollout], step: int) -> None:
        counts = {
            "on_policy_steps": 1,
            "rollouts": len(rollouts),
            "age_steps": sum(step - rollout.made_step for rollout in rollouts),
            "valid": sum(rollout.valid for rollout in rollouts),
            "exact": sum(rollout.exact for rollout in rollouts),
            "length_tokens": sum(len(rollout.target) for rollout in rollouts),
            "truncated": sum(int(rollout.target[-1] != EOS) for rollout in rollouts),
        }
        for name, count in counts.items():
            self._tally[name] += count
