"""A trained student as teacher: it re-scores the recorded answers of a shard, token by token, and answers requests.

The student it teaches token by token must share its tokenizer, since the stored distributions are over its pieces; any
student can learn from its answers. It decodes under the grammar of the tools shown, greedily or by sampling.
"""

# R rows, T target tokens, V vocabulary, K stored tokens, X target tokens of all examples

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from needle.artifacts import fingerprint, hash_file, hash_once
from needle.data.packing import collate, network_inputs, pack
from needle.data.shards import Shard
from needle.errors import ConfigError, DataError
from needle.schema import Tool
from needle.teacher.base import FatalError, TeacherCall, TeacherReply, Traffic, tools_json
from needle.teacher.microbatch import MicroBatcher
from needle.text.tokenizer import EOS

if TYPE_CHECKING:  # the decoder brings transformers, which settings must not wait for
    from needle.decode import Choose, Decoded, Decoder

PROVIDER = "checkpoint"
# What a student's answer depends on in its folder.
IDENTITY_FILES = ("config.json", "model.safetensors", "needle_text.json", "tokenizer.json")


@dataclass(frozen=True)
class CheckpointTeacher:
    """`checkpoint`: a student's folder. `top_k` and `temperature` are those of the stored distributions; the rest says
    how it answers requests."""

    checkpoint: Path
    top_k: Annotated[int, Field(ge=1, le=65536)]
    temperature: Annotated[float, Field(gt=0)]
    answer_temperature: Annotated[float, Field(ge=0)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    max_calls: Annotated[int, Field(ge=1)]
    max_source_tokens: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    device: str
    traffic: Traffic
    capabilities: ClassVar[frozenset[str]] = frozenset({"text", "samples", "top_k", "full_logits", "live", "features"})
    roles: ClassVar[frozenset[str]] = frozenset({"label"})
    tokenizer: ClassVar[Literal["student", "own"]] = "student"
    key_variable: ClassVar[str | None] = None

    def model_folder(self) -> Path:
        folder = Path(self.checkpoint)
        return folder / "model" if (folder / "model").is_dir() else folder

    def identity(self) -> str:
        """Hash of what the signals depend on besides the shards."""
        return fingerprint(weights=hash_file(self._weights()), top_k=self.top_k, temperature=self.temperature)

    def student_identity(self) -> str:
        """Names the exact student: hash of its weights, configuration and tokenizer.

        Raises:
            DataError: a file is missing, or the configuration is none.
        """
        paths = {name: self._weights().with_name(name) for name in IDENTITY_FILES}
        name = fingerprint(files=[(name, hash_once(path)) for name, path in paths.items()])
        try:
            return f"{json.loads(paths['config.json'].read_bytes())['model_type']}@{name}"
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{paths['config.json']} describes no student: {error}") from error

    def _weights(self) -> Path:
        weights = self.model_folder() / "model.safetensors"
        if not weights.is_file():
            raise DataError(
                f"teacher.checkpoint={self.checkpoint}: no model.safetensors there; train one "
                "(`make teacher`) or name a student's folder"
            )
        return weights

    def signals_folder(self, artifacts: Path, shards: Path) -> Path:
        return artifacts / f"signals-{fingerprint(shards=shards.name, teacher=self.identity())}"

    def check_tokenizer(self, shards: Path) -> None:
        """Raises DataError when the shards were written with another tokenizer."""
        if hash_file(self.model_folder() / "tokenizer.json") != hash_file(shards / "tokenizer.json"):
            raise DataError(
                f"{shards} were written with another tokenizer than the teacher's; prepare them with "
                f"data.text.tokenizer={self.model_folder()}"
            )

    def network(self) -> torch.nn.Module:
        """The student itself, frozen, in evaluation mode, on its device: what live losses score with.

        Raises:
            DataError: it is not there, or damaged.
        """
        from needle.student import load

        model, _ = load(self.model_folder())
        return model.requires_grad_(False).to(self.device)

    @torch.no_grad()
    def top_log_probs(
        self,
        model: torch.nn.Module,
        shard: Shard,
        *,
        rows_per_batch: int,
        source_row_tokens: int,
        target_row_tokens: int,
        progress: Callable[[int, int], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (uint16) and log-probabilities in nats (float32) of the top_k tokens at every target token: [X, K]
        each.

        Raises:
            ConfigError: the teacher has fewer tokens than `top_k`.
        """
        pieces = model.config.vocab_size
        if self.top_k > pieces:
            raise ConfigError(
                f"teacher.top_k={self.top_k}: the teacher's tokenizer has {pieces} pieces; choose at most that many"
            )
        shape = {"source_row_tokens": source_row_tokens, "target_row_tokens": target_row_tokens}
        rows = pack(shard.source_lengths_N, shard.target_lengths_N, **shape)
        ids_XK = np.zeros((len(shard.target), self.top_k), np.uint16)
        log_probs_XK = np.zeros((len(shard.target), self.top_k), np.float32)
        for start in range(0, len(rows), rows_per_batch):
            chosen = rows[start : start + rows_per_batch]
            batch = collate(shard, chosen, **shape)
            logits_RTV = model(**network_inputs(batch)).logits
            top = (logits_RTV.float() / self.temperature).log_softmax(dim=-1).topk(self.top_k, dim=-1)
            for r, row in enumerate(chosen):
                t = 0
                for index in row:
                    place = slice(*shard.target_offsets[index : index + 2])
                    end = t + place.stop - place.start
                    ids_XK[place], log_probs_XK[place] = top.indices[r, t:end], top.values[r, t:end]
                    t = end
            progress(min(start + rows_per_batch, len(rows)), len(rows))
        return ids_XK, log_probs_XK

    def label_call(self, *, instruction: str, query: str, tools: Sequence[Tool], sample: int) -> TeacherCall:
        """The question which tools a request calls for. Students read no instruction, so the call holds none.

        Raises:
            ConfigError: a second sample of greedy answers, which are all the same.
            DataError: the checkpoint is not there.
        """
        if sample and not self.answer_temperature:
            raise ConfigError(
                f"sample={sample}: with teacher.answer_temperature=0 every sample is the same answer; ask for one, or "
                "set teacher.answer_temperature above 0"
            )
        own = {name: getattr(self, name) for name in ("answer_temperature", "max_new_tokens", "max_calls")}
        return TeacherCall(PROVIDER, self.student_identity(), "label", "", query, tools_json(tools), own, sample)

    def author_call(
        self, *, instruction: str, prompt: str, answer_schema: Mapping[str, Any], sample: int
    ) -> TeacherCall:
        """Raises ConfigError always: a student writes calls and nothing else."""
        raise ConfigError(
            "teacher=checkpoint is a student that only writes calls: it cannot author requests or tools; take "
            "teacher=transformers_local or a hosted teacher for that"
        )

    def most_usd(self, call: TeacherCall) -> float:
        return 0.0

    def connect(self) -> "CheckpointConnection":
        """Loads the student.

        Raises:
            DataError: the checkpoint is not there or is damaged.
            ConfigError: no such device.
        """
        from needle.decode import Decoder
        from needle.student import load

        name = self.student_identity()
        model, codec = load(self.model_folder())
        try:
            model = model.to(self.device)
        except (RuntimeError, AssertionError) as error:
            problem = str(error).splitlines()[0]
            raise ConfigError(f"teacher.device={self.device} cannot be used: {problem}; take cpu") from error
        limits = {"max_new_tokens": self.max_new_tokens, "max_calls": self.max_calls}
        decoder = Decoder(model, codec, constrained=True, max_source_tokens=self.max_source_tokens, **limits)
        return CheckpointConnection(decoder, name=name, temperature=self.answer_temperature, batch_size=self.batch_size)


class CheckpointConnection:
    """A loaded student that answers concurrent calls in batches of like length, in one worker thread. A sampled answer
    draws from a generator of its own, seeded by its question's address: it is the same in any batch."""

    def __init__(self, decoder: "Decoder", *, name: str, temperature: float, batch_size: int):
        self._decoder, self._name, self._temperature = decoder, name, temperature
        self._batches: MicroBatcher[TeacherCall, TeacherReply] = MicroBatcher(
            self._answer, batch_size=batch_size, size=lambda call: len(call.prompt) + len(call.tools)
        )

    async def ask(self, call: TeacherCall) -> TeacherReply:
        """Raises FatalError when the prompt is too long or its tools give no grammar."""
        return await self._batches.submit(call)

    async def close(self) -> None:
        await self._batches.close()

    def _answer(self, calls: list[TeacherCall]) -> list[TeacherReply | Exception]:
        strange = {call.model for call in calls} - {self._name}
        if strange:
            raise FatalError(f"asked of {strange.pop()}, but teacher.checkpoint is now {self._name}", every_call=True)
        start = time.perf_counter()
        requests = [(call.prompt, tuple(map(Tool.from_dict, json.loads(call.tools)))) for call in calls]
        decoded = self._decoder.decode(requests, choose=self._choosers(calls))
        latency_s = time.perf_counter() - start
        return [self._reply(*pair, latency_s) for pair in zip(requests, decoded, strict=True)]

    def _choosers(self, calls: list[TeacherCall]) -> "list[Choose] | None":
        if not self._temperature:
            return None
        from needle.decode import drawer

        generators = [torch.Generator().manual_seed(call.seed()) for call in calls]
        return [drawer(temperature=self._temperature, top_p=1.0, generator=one) for one in generators]

    def _reply(
        self, request: tuple[str, tuple[Tool, ...]], answer: "Decoded", latency_s: float
    ) -> TeacherReply | Exception:
        if not answer.token_ids:  # it was refused before a token was written
            return FatalError(str(answer.error))
        unread = "malformed" if answer.token_ids[-1] == EOS else "truncated"
        calls = answer.calls
        return TeacherReply(
            status=unread if calls is None else "ok",
            reason=answer.error or "",
            text=answer.text,
            calls=None if calls is None else tuple({"name": c.name, "arguments": c.arguments} for c in calls),
            model_version=self._name,
            prompt_tokens=len(self._decoder.codec.encode_prompt(*request)),
            output_tokens=len(answer.token_ids),
            latency_s=latency_s,
            raw={"text": answer.text, "token_ids": answer.token_ids, "confidence": answer.confidence},
        )
