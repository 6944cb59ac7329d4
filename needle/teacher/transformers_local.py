"""Any causal language model with a tool chat template as teacher, run in this process with transformers.

    python -m needle.generate role=label teacher=transformers_local teacher.model=FOLDER teacher.revision=null

It answers, samples, tells the log-probabilities of what it said, and scores texts it is given. Weights come as
safetensors, no code from the hub is run, and with HF_HUB_OFFLINE=1 nothing is fetched. An answer does not depend on
the batch it was computed in: each call draws from its own generator, seeded by its content address. Of the model's
generation_config.json only the stop tokens are used; its sampling settings and penalties are not.

Cost: no money; about 2 x parameters FLOPs a token.
"""

# B batch, L prompt and answer tokens, T answer tokens, V vocabulary, K likeliest tokens

import fnmatch
import functools
import inspect
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import llguidance
import llguidance.numpy as lln
import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from needle.artifacts import fingerprint, hash_file, hash_once
from needle.errors import ConfigError, DataError
from needle.schema import Tool, canonical_json, strict_json
from needle.teacher.answer_formats import AnswerFormat, read_calls, unfenced
from needle.teacher.base import FatalError, TeacherCall, TeacherReply, TokenLogProb, Traffic, TransientError, tools_json
from needle.teacher.microbatch import MicroBatcher
from needle.text.grammar import allowed_tokens

PROVIDER = "transformers_local"
COMMIT = re.compile(r"[0-9a-f]{40}")
# What an answer depends on in a model's folder.
IDENTITY_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
)  # fmt: skip
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
THINK, END_THINK = b"<think>", b"</think>"
Work = TypeVar("Work")
Done = TypeVar("Done")


@dataclass(frozen=True)
class TransformersTeacher:
    """Settings; conf/teacher/transformers_local.yaml says what each means. A GPU's random numbers are not a CPU's: a
    sample is another draw there, from the same distribution."""

    model: str
    revision: str | None
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    answer_format: AnswerFormat
    chat_template: Path | None
    enable_thinking: bool | None
    today: str
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    max_prompt_tokens: Annotated[int, Field(ge=1)]
    constrain_json: bool
    top_k_log_probs: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=1)]
    traffic: Traffic
    capabilities: ClassVar[frozenset[str]] = frozenset({"text", "samples", "top_k", "full_logits"})
    roles: ClassVar[frozenset[str]] = frozenset({"label", "author"})
    tokenizer: ClassVar[Literal["student", "own"]] = "own"
    key_variable: ClassVar[str | None] = None

    def __post_init__(self):
        try:
            date.fromisoformat(self.today)
        except ValueError as error:
            raise ValueError(f"today={self.today}: {error}; write YYYY-MM-DD") from None

    def identity(self) -> str:
        """Names the exact weights and tokenizer: `ORG/MODEL@COMMIT` of the hub, `TYPE@HASH` of a folder's files.

        Raises:
            ConfigError: a hub model without its commit, or a folder with one.
            DataError: a folder without weights in safetensors.
        """
        folder = Path(self.model)
        if folder.is_dir():
            if self.revision is not None:
                raise ConfigError(
                    f"teacher.revision={self.revision}: teacher.model={self.model} is a folder, which has none; "
                    "set teacher.revision=null"
                )
            return _folder_identity(folder)
        if folder.is_absolute() or self.model.startswith(".") or self.model.count("/") > 1:
            raise DataError(f"teacher.model={self.model}: no such folder; {_what_a_model_is(self.model, None)}")
        if self.revision is None or not COMMIT.fullmatch(self.revision):
            raise ConfigError(
                f"teacher.revision={'null' if self.revision is None else self.revision}: there is no folder "
                f"{self.model} here, and a hub model needs its commit (40 hexadecimal digits, on its page under Files, "
                "History), so that an answer can be traced to its weights"
            )
        return f"{self.model}@{self.revision}"

    def label_call(self, *, instruction: str, query: str, tools: Sequence[Tool], sample: int) -> TeacherCall:
        """The question which tools a request calls for.

        Raises:
            ConfigError: a second sample of greedy answers; or see `identity`.
            DataError: see `identity`.
        """
        own = {"answer_format": self.answer_format}
        return self._call("label", instruction, query, tools_json(tools), own, sample)

    def author_call(
        self, *, instruction: str, prompt: str, answer_schema: Mapping[str, Any], sample: int
    ) -> TeacherCall:
        """A question whose answer is JSON; the schema stands in the prompt, and binds where `constrain_json`. A prompt
        that opens a thinking block leaves the answer unbound, since thoughts are no JSON.

        Raises:
            ConfigError, DataError: as `label_call`.
        """
        asked = f"{prompt}\n\nAnswer with JSON alone, without a code fence, that fits this JSON Schema:\n"
        own = {"answer_schema": dict(answer_schema), "constrain_json": self.constrain_json}
        return self._call("author", instruction, asked + canonical_json(answer_schema), tools_json(()), own, sample)

    def most_usd(self, call: TeacherCall) -> float:
        return 0.0

    def connect(self) -> "LocalConnection":
        """Loads the model: seconds to minutes. Raises what `load` raises."""
        return LocalConnection(self.load())

    def load(self) -> "LocalModel":
        """The model itself, for use without asyncio.

        Raises:
            DataError: it is not there, is damaged, or is not in safetensors.
            ConfigError: no such device; a tokenizer without a chat template with tools; no stop token.
        """
        return LocalModel(self)

    def _call(
        self, role: str, instruction: str, prompt: str, tools: str, own: dict[str, Any], sample: int
    ) -> TeacherCall:
        if sample and not self.temperature:
            raise ConfigError(
                f"sample={sample}: with teacher.temperature=0 every sample is the same answer; ask for one, or set "
                "teacher.temperature above 0"
            )
        settings = {
            "dtype": self.dtype,
            "chat_template": None if self.chat_template is None else hash_once(self.chat_template),
            "enable_thinking": self.enable_thinking,
            "today": self.today,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "top_k_log_probs": self.top_k_log_probs,
            **own,
        }
        return TeacherCall(PROVIDER, self.identity(), role, instruction, prompt, tools, settings, sample)


class LocalConnection:
    """Answers concurrent calls in batches of like length, in one worker thread."""

    def __init__(self, model: "LocalModel"):
        self._model = model
        self._batches: MicroBatcher[TeacherCall, TeacherReply] = MicroBatcher(
            model.answer, batch_size=model.teacher.batch_size, size=lambda call: len(call.prompt) + len(call.tools)
        )

    async def ask(self, call: TeacherCall) -> TeacherReply:
        """Raises FatalError when this call cannot be answered, TransientError when it is interrupted by `close`."""
        return await self._batches.submit(call)

    async def close(self) -> None:
        self._model.interrupted.set()
        await self._batches.close()


@dataclass(frozen=True)
class AnswerLogProbs:
    """A model's log-probabilities, in nats at temperature 1, of the T tokens of a given answer.

    `tokens`: their bytes. `log_probs_T`: their own. `log_probs_TK`: of the likeliest K in falling order, whose ids are
    `ids_TK`; of the whole vocabulary in the order of ids where `ids_TK` is None.
    """

    token_ids_T: np.ndarray
    tokens: tuple[bytes, ...]
    log_probs_T: np.ndarray
    ids_TK: np.ndarray | None
    log_probs_TK: np.ndarray


@dataclass(frozen=True)
class _Question:
    """A call as the model reads it. `thinking`: the prompt has opened a thinking block."""

    call: TeacherCall
    ids: list[int]
    thinking: bool
    grammar: llguidance.LLMatcher | None


class LocalModel:
    """A loaded teacher. Its methods are blocking and not to be run at the same time; `interrupted` ends generation."""

    def __init__(self, teacher: TransformersTeacher):
        import llguidance.hf  # it imports transformers, which takes seconds and settings do not need

        self.teacher, self.name, self.device = teacher, teacher.identity(), _device(teacher.device)
        self.tokenizer, self.model = _from_pretrained(teacher)
        self.model.to(self.device)
        self.template = None if teacher.chat_template is None else Path(teacher.chat_template).read_text("utf-8")
        self.interrupted = threading.Event()
        self.rows_max = teacher.batch_size
        text_config = self.model.config.get_text_config()
        self.positions_max: int | None = getattr(text_config, "max_position_embeddings", None)
        self.stops = self._stop_tokens()
        try:
            self.bytes_of = llguidance.hf.from_tokenizer(
                self.tokenizer, n_vocab=max(text_config.vocab_size, len(self.tokenizer)), eos_token=self.stops
            )
        except ValueError as error:
            raise ConfigError(
                f"teacher.model={teacher.model}: its tokens cannot be read as bytes ({error}); take a model with a "
                "tokenizer.json"
            ) from error
        self._grammars: dict[str, llguidance.LLMatcher] = {}
        self._check_template()

    def answer(self, calls: Sequence[TeacherCall]) -> list[TeacherReply | Exception]:
        """One reply a call, in order; a FatalError in its place where a call cannot be answered.

        `log_probs` hold every token of the answer after its thinking, the stop token last unless it was cut off. They
        are those of the model as it is, before temperature, top_p and grammar. `latency_s` is the batch's.
        """
        replies: list[TeacherReply | Exception | None] = [None] * len(calls)
        questions: dict[int, _Question] = {}
        for i, call in enumerate(calls):
            try:
                questions[i] = self._question(call)
            except FatalError as error:
                replies[i] = error
        answered = self._in_batches(list(questions.values()), self._generate)
        for i, reply in zip(questions, answered, strict=True):
            replies[i] = reply
        return [reply for reply in replies if reply is not None]

    @torch.inference_mode()
    def log_probs(
        self, answers: Sequence[tuple[TeacherCall, str]], *, top_k: int | None, with_stop: bool
    ) -> list[AnswerLogProbs]:
        """Scores given answers to calls, token by token. `top_k` None: the whole vocabulary, 4 bytes x V a token.
        `with_stop`: the first stop token follows the answer and is scored too.

        Raises:
            FatalError: a prompt is longer than `max_prompt_tokens`, a text than the model's positions, or one alone is
                too much for the memory.
        """

        def read(call: TeacherCall, text: str) -> tuple[list[int], list[int]]:
            prompt, answer = self._question(call).ids, self.tokenizer(text, add_special_tokens=False).input_ids
            length = len(prompt) + len(answer) + 1
            if self.positions_max is not None and length > self.positions_max:
                raise FatalError(f"prompt and answer have {length} tokens, the model {self.positions_max} positions")
            return prompt, [*answer, *(self.stops[:1] if with_stop else [])]

        def score(batch: list[tuple[list[int], list[int]]]) -> list[AnswerLogProbs]:
            return list(self._score(batch, top_k))

        scored: list[AnswerLogProbs] = []
        for result in self._in_batches([read(*answer) for answer in answers], score):
            if isinstance(result, Exception):
                raise result
            scored.append(result)
        return scored

    def _stop_tokens(self) -> list[int]:
        """That of the chat template's turns first, which is the one most tokenizers name."""
        own = self.model.generation_config.eos_token_id
        found = [self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        stops = list(dict.fromkeys(stop for stop in found if stop is not None))
        if not stops:
            raise ConfigError(
                f"teacher.model={self.teacher.model}: neither tokenizer nor generation_config.json names a stop token; "
                "add eos_token_id to generation_config.json"
            )
        return stops

    def _rendered(self, call: TeacherCall) -> list[int]:
        """The prompt's ids. Control tokens inside a request or a tool are text there."""
        roles = (("system", call.instruction), ("user", call.prompt))
        tools = [{"type": "function", "function": tool} for tool in json.loads(call.tools)]
        template = self.tokenizer.get_chat_template(self.template, tools or None)
        today, thinking = date.fromisoformat(self.teacher.today), self.teacher.enable_thinking
        return self.tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in roles if text],
            tools=tools or None,
            # transformers lets no caller replace the clock that templates read.
            chat_template=_CLOCK.sub(lambda found: json.dumps(today.strftime(found[2])), template),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
            **({} if thinking is None else {"enable_thinking": thinking}),
        )

    def _check_template(self) -> None:
        """Renders a tool, and looks for it in the prompt."""
        name = "look_up_probe"
        probe = Tool(name, "Looks up.", {"type": "object", "properties": {}})
        call = TeacherCall(PROVIDER, self.name, "label", "Call tools.", "hello", tools_json([probe]), {})
        try:
            shown = name.encode() in self.bytes_of.decode_bytes(self._rendered(call))
            why = "" if shown else ": it does not show the tools"
        except Exception as error:  # Jinja's and the template's own
            why = f": {str(error).splitlines()[0]}"
        if why:
            given = f"teacher.chat_template={self.teacher.chat_template}" if self.template else "its tokenizer"
            raise ConfigError(
                f"teacher.model={self.teacher.model}: {given} has no chat template for a system message and tools"
                f"{why}; give one with teacher.chat_template=FILE (Jinja)"
            )

    def _question(self, call: TeacherCall) -> _Question:
        if call.model != self.name:
            raise FatalError(f"asked of {call.model}, but teacher.model is now {self.name}", every_call=True)
        try:
            ids = self._rendered(call)
        except Exception as error:  # Jinja's and the template's own
            raise FatalError(f"the chat template refuses this call: {error}") from error
        if len(ids) > self.teacher.max_prompt_tokens:
            limit = self.teacher.max_prompt_tokens
            raise FatalError(f"the prompt has {len(ids)} tokens, more than teacher.max_prompt_tokens={limit}")
        if self.positions_max is not None and len(ids) + self.teacher.max_new_tokens > self.positions_max:
            raise FatalError(
                f"the prompt's {len(ids)} tokens and teacher.max_new_tokens={self.teacher.max_new_tokens} exceed the "
                f"model's {self.positions_max} positions"
            )
        thinking = self.bytes_of.decode_bytes(ids[-16:]).rstrip().endswith(THINK)
        constrained = call.settings.get("constrain_json") and not thinking
        return _Question(call, ids, thinking, self._grammar(call.settings["answer_schema"]) if constrained else None)

    def _grammar(self, schema: Mapping[str, Any]) -> llguidance.LLMatcher:
        text = canonical_json(schema)
        if text not in self._grammars:
            # At most one blank between two parts: a weak model can go on with blanks for ever.
            spacing: Any = {"whitespace_pattern": "[ \\n]?"}
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=spacing)
            matcher = llguidance.LLMatcher(self.bytes_of, grammar, log_level=0)
            if matcher.is_error():
                raise FatalError(
                    f"no grammar can be built for the answer's schema: {matcher.get_error().splitlines()[0]}; "
                    "simplify it or set teacher.constrain_json=false"
                )
            self._grammars[text] = matcher
        return self._grammars[text]

    def _in_batches(self, items: list[Work], work: Callable[[list[Work]], list[Done]]) -> list[Done | Exception]:
        """`work` on batches that fit the memory; one that does not fit is halved, and so are all that follow."""
        done: list[Done | Exception] = []
        while len(done) < len(items):
            batch = items[len(done) : len(done) + self.rows_max]
            try:
                done += work(batch)
                continue
            except torch.OutOfMemoryError as error:
                problem = str(error).split(". ")[0]
            # Outside the handler, whose traceback holds the tensors of the failed attempt.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) == 1:
                done.append(FatalError(f"one prompt alone is too much for {self.device}: {problem}"))
                continue
            self.rows_max = len(batch) // 2
            notice = f"teacher: {len(batch)} rows are too many for {self.device}, going on with {self.rows_max}"
            print(notice, file=sys.stderr, flush=True)  # standard output may carry answers
        return done

    @torch.inference_mode()
    def _generate(self, batch: list[_Question]) -> list[TeacherReply]:
        from transformers import GenerationConfig, LogitsProcessorList

        start = time.perf_counter()
        longest = max(len(question.ids) for question in batch)
        ids_BL = torch.full((len(batch), longest), self.stops[0])
        mask_BL = torch.zeros_like(ids_BL)
        for row, question in enumerate(batch):
            ids_BL[row, longest - len(question.ids) :] = torch.tensor(question.ids)
            mask_BL[row, longest - len(question.ids) :] = 1
        chooser = _Chooser(batch, self)
        self.model.generate(
            ids_BL.to(self.device),
            attention_mask=mask_BL.to(self.device),
            generation_config=GenerationConfig(
                max_new_tokens=self.teacher.max_new_tokens,
                do_sample=False,
                eos_token_id=self.stops,
                pad_token_id=self.stops[0],
            ),
            logits_processor=LogitsProcessorList([chooser]),
        )
        latency_s = time.perf_counter() - start
        return [self._reply(question, tokens, latency_s) for question, tokens in chooser.answers()]

    def _reply(self, question: _Question, tokens: "list[_Token]", latency_s: float) -> TeacherReply:
        stopped = tokens[-1].id in self.stops
        pieces = [self._bytes(token.id) for token in tokens]
        whole = b"".join(pieces[:-1] if stopped else pieces)
        thoughts = _thinking_bytes(whole, opened=question.thinking)
        # A token that ends the thinking and begins the answer is the answer's.
        ends = np.cumsum([len(piece) for piece in pieces[: len(pieces) - stopped]])
        thinking_tokens = int((ends <= thoughts).sum())
        text = whole[thoughts:].decode("utf-8", "replace")
        log_probs = tuple(
            TokenLogProb(piece, token.log_prob, tuple((self._bytes(i), nats) for i, nats in token.top))
            for piece, token in zip(pieces[thinking_tokens:], tokens[thinking_tokens:], strict=True)
        )
        text, calls, status, reason = self._read(question.call, text, stopped)
        return TeacherReply(
            status=status,
            reason=reason,
            text=text,
            calls=calls,
            log_probs=log_probs,
            model_version=self.name,
            prompt_tokens=len(question.ids),
            output_tokens=len(tokens) - thinking_tokens,
            thinking_tokens=thinking_tokens,
            latency_s=latency_s,
            raw={"text": whole.decode("utf-8", "replace"), "token_ids": [token.id for token in tokens]},
        )

    def _read(
        self, call: TeacherCall, text: str, stopped: bool
    ) -> tuple[str, tuple[Mapping[str, Any], ...] | None, str, str]:
        """`(text, calls, status, reason)` of an answer without its thinking."""
        if not stopped:
            return text, None, "truncated", f"no end within teacher.max_new_tokens={self.teacher.max_new_tokens}"
        if not text.strip():
            return text, None, "empty", "the model stopped without an answer"
        try:
            if call.role == "author":
                text = unfenced(text)
                strict_json(text)
                return text, None, "ok", ""
            names = [tool["name"] for tool in json.loads(call.tools)]
            return text, read_calls(text, answer_format=self.teacher.answer_format, tool_names=names), "ok", ""
        except ValueError as error:
            return text, None, "malformed", str(error)

    def _bytes(self, token: int) -> bytes:
        return self.bytes_of.decode_bytes([token])

    def _score(self, batch: list[tuple[list[int], list[int]]], top_k: int | None) -> Iterator[AnswerLogProbs]:
        """Padded on the right: nothing that comes later changes a causal model's tokens."""
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids_BL = torch.full((len(batch), longest), self.stops[0])
        mask_BL = torch.zeros_like(ids_BL)
        for row, (prompt, answer) in enumerate(batch):
            ids_BL[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            mask_BL[row, : len(prompt) + len(answer)] = 1
        first = min(len(prompt) for prompt, _ in batch) - 1
        # Logits of prompts are large and not needed; a model that computes them all the same is cut afterwards.
        kept = {"logits_to_keep": longest - first} if _takes(self.model.forward, "logits_to_keep") else {}
        mask_BL = mask_BL.to(self.device)
        logits_BLV = self.model(ids_BL.to(self.device), attention_mask=mask_BL, use_cache=False, **kept).logits
        first = longest - logits_BLV.shape[1]
        for row, (prompt, answer) in enumerate(batch):
            begin = len(prompt) - 1 - first
            log_probs_TV = logits_BLV[row, begin : begin + len(answer)].float().log_softmax(-1)
            ids_T = torch.tensor(answer, dtype=torch.long, device=self.device)
            top = None if top_k is None else log_probs_TV.topk(min(top_k, log_probs_TV.shape[-1]), dim=-1)
            yield AnswerLogProbs(
                token_ids_T=ids_T.cpu().numpy(),
                tokens=tuple(map(self._bytes, answer)),
                log_probs_T=log_probs_TV.gather(1, ids_T[:, None])[:, 0].cpu().numpy(),
                ids_TK=None if top is None else top.indices.cpu().numpy(),
                log_probs_TK=(log_probs_TV if top is None else top.values).cpu().numpy(),
            )


@dataclass(frozen=True)
class _Token:
    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


class _Chooser:
    """A logits processor that chooses each row's next token itself and leaves `generate` no other.

    Sampling is an exponential race: the smallest E / p, E exponential, falls on a token with its probability p (the
    Gumbel-max trick). E comes from the row's own generator, one draw of the vocabulary a step, so that it depends on
    the call and the step only.
    """

    def __init__(self, batch: Sequence[_Question], model: LocalModel):
        self.batch, self.teacher, self.interrupted = batch, model.teacher, model.interrupted
        self.stops, self.pieces = frozenset(model.stops), len(model.tokenizer)
        seeds = [question.call.seed() for question in batch] if model.teacher.temperature else []
        self.generators = [torch.Generator(model.device).manual_seed(seed) for seed in seeds]
        self.matchers = [question.grammar and question.grammar.deep_copy() for question in batch]
        self.live = [True] * len(batch)
        self.steps: list[tuple[Tensor, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.interrupted.is_set():
            raise TransientError("the teacher was closed while it answered")
        log_probs_BV = scores.float().log_softmax(-1)
        chosen_B = self._chosen(log_probs_BV)
        own_B = log_probs_BV.gather(1, chosen_B[:, None])[:, 0]
        top = log_probs_BV.topk(min(self.teacher.top_k_log_probs, log_probs_BV.shape[-1]), dim=-1)
        self.steps.append((chosen_B, own_B, top.indices, top.values))
        for row, token in enumerate(chosen_B.tolist()):
            if self.live[row] and token in self.stops:
                self.live[row] = False
            matcher = self.matchers[row]
            if self.live[row] and matcher is not None:
                matcher.consume_token(token)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)

    def answers(self) -> Iterator[tuple[_Question, list[_Token]]]:
        """Each question's tokens up to its first stop token, that one included."""
        chosen, own, top_ids, top = (torch.stack(part, dim=1).tolist() for part in zip(*self.steps, strict=True))
        for row, question in enumerate(self.batch):
            length = next((t + 1 for t, token in enumerate(chosen[row]) if token in self.stops), len(chosen[row]))
            alternatives = (tuple(zip(*pair, strict=True)) for pair in zip(top_ids[row], top[row], strict=True))
            tokens = map(_Token, chosen[row][:length], own[row][:length], alternatives)
            yield question, list(tokens)

    def _chosen(self, log_probs_BV: Tensor) -> Tensor:
        scores_BV = log_probs_BV.masked_fill(~self._allowed(log_probs_BV), -torch.inf)
        if not self.teacher.temperature:
            return scores_BV.argmax(-1)
        scores_BV = (scores_BV / self.teacher.temperature).log_softmax(-1)
        if self.teacher.top_p < 1:
            sorted_BV, order_BV = scores_BV.sort(descending=True, dim=-1)
            probs_BV = sorted_BV.exp()
            outside_BV = probs_BV.cumsum(-1) - probs_BV >= self.teacher.top_p
            scores_BV = scores_BV.masked_fill(outside_BV.scatter(1, order_BV, outside_BV), -torch.inf)
        race_BV = torch.ones_like(scores_BV)
        for row, generator in enumerate(self.generators):
            if self.live[row]:
                race_BV[row].exponential_(generator=generator)
        return (scores_BV - race_BV.clamp_min(torch.finfo(race_BV.dtype).tiny).log()).argmax(-1)

    def _allowed(self, log_probs_BV: Tensor) -> Tensor:
        """Tokens of the tokenizer (the model may have more rows than it), and of the grammar where there is one."""
        rows, width = log_probs_BV.shape
        allowed_BV = torch.ones_like(log_probs_BV, dtype=torch.bool)
        allowed_BV[:, self.pieces :] = False
        for row in range(rows):
            matcher = self.matchers[row]
            if self.live[row] and matcher is not None:
                bits = lln.allocate_token_bitmask(1, width)
                lln.fill_next_token_bitmask(matcher, bits, 0)
                allowed_BV[row] &= torch.from_numpy(allowed_tokens(bits, width)[0]).to(allowed_BV.device)
        return allowed_BV


def _from_pretrained(teacher: TransformersTeacher) -> tuple[Any, Any]:
    """Tokenizer and model, in evaluation mode, without the model's own sampling settings."""
    import transformers.utils.logging
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"revision": teacher.revision or "main", "trust_remote_code": False}
    try:
        # Not AutoTokenizer: transformers 5 rebuilds some models' tokenizers from their class and overrides how
        # tokenizer.json splits text (huggingface/transformers issues 45812 and 45920).
        tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher.model, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            teacher.model,
            dtype=getattr(torch, teacher.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        model, found = loaded
    except Exception as error:  # the hub, json, safetensors and transformers each raise their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"teacher.model={teacher.model} cannot be loaded: {lines[0]}; "
            f"{_what_a_model_is(teacher.model, teacher.revision)}"
        ) from error
    wrong = sorted({*found["missing_keys"], *(str(entry) for entry in found["mismatched_keys"])})
    if wrong:  # transformers would fill them with random numbers
        raise DataError(f"teacher.model={teacher.model}: its weights do not fit its config.json, first {wrong[0]}")
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return tokenizer, model.eval()


def _what_a_model_is(model: str, revision: str | None) -> str:
    fetch = f"; to fetch one from the hub beforehand: hf download {model} --revision {revision}" if revision else ""
    return f"name a folder with config.json, *.safetensors and the tokenizer{fetch}"


def _folder_identity(folder: Path) -> str:
    """`TYPE@HASH`. Every call names it, so files are read again only when one's size or time changed."""
    files = []
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in IDENTITY_FILES) and path.is_file():
            state = path.stat()
            files.append((path.name, state.st_size, state.st_mtime_ns))
    return _read_folder_identity(folder.absolute(), tuple(files))


@functools.lru_cache(maxsize=16)
def _read_folder_identity(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    names = [name for name, _, _ in files]
    if not any(name.endswith(".safetensors") for name in names):
        raise DataError(
            f"teacher.model={folder}: no *.safetensors there (weights in other formats can hide code and are not "
            "read); save the model again with save_pretrained"
        )
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"teacher.model={folder}: no usable config.json: {error}") from error
    return f"{kind}@{fingerprint(files=[(name, hash_file(folder / name)) for name in names])}"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(f"teacher.device={name} cannot be used: {problem}; take teacher.device=cpu") from error
    return device


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _thinking_bytes(answer: bytes, *, opened: bool) -> int:
    """How many bytes of an answer are its leading <think> block; all of them where it has no end."""
    if not opened and not answer.lstrip().startswith(THINK):
        return 0
    end = answer.find(END_THINK)
    return len(answer) if end < 0 else end + len(END_THINK)
