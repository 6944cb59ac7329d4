"""A student's answers: greedy or sampled, with the KV cache, held to the grammar of the tools shown or left free.

A step whose mask leaves one token needs no model to be decided; such forced tokens are gathered and fed to the decoder
together. Under a grammar the last quarter of `max_new_tokens` closes
what is open, so that a student that repeats itself still gives valid calls. Answers do not depend on what else is in
the batch.
"""

# B rows still decoding, S source tokens, D width of the encoder, V vocabulary

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import llguidance.numpy as lln
import numpy as np
import torch

from needle.errors import DataError
from needle.schema import Tool, ToolCall
from needle.student.confidence import ConfidenceHead, Evidence
from needle.text.grammar import AnswerGrammar, allowed_tokens
from needle.text.render import parse_calls
from needle.text.tokenizer import BOS, EOS, PAD, TextCodec

CLOSING_FRAC = 0.25  # of max_new_tokens
Request = tuple[str, Sequence[Tool]]
Choose = Callable[[np.ndarray], int]  # a token by the scores of all [V]


@dataclass(frozen=True)
class Decoded:
    """`calls` is None when there is no usable answer; `error` says why.

    `probability`: the student's, of the tokens that it wrote. `confidence`: how likely the answer is to be right. Where
    the student has a confidence head that was fitted on answers decoded like this one, it is the head's, and 0 for an
    answer that is unusable; elsewhere it is the probability. `evidence` is what a head reads.
    """

    calls: list[ToolCall] | None
    text: str
    token_ids: list[int]
    confidence: float | None
    error: str | None
    probability: float | None = None
    evidence: Evidence | None = field(default=None, compare=False, repr=False)


def likeliest(scores_V: np.ndarray) -> int:
    return int(scores_V.argmax())


def draw(scores_V: np.ndarray, *, temperature: float, top_p: float, uniform: float) -> int:
    """The token of softmax(scores / temperature) in which the cumulated probability passes `uniform`, 0 to below 1.

    With `top_p` below 1 only the fewest of the likeliest tokens whose probabilities reach it are drawn from, renormed
    (nucleus sampling, Holtzman et al. 2020). Scores of -inf are never drawn; float64.
    """
    tempered_V = scores_V.astype(np.float64) / temperature
    p_V = np.exp(tempered_V - tempered_V.max())
    p_V /= p_V.sum()
    order_V = np.argsort(-p_V, kind="stable") if top_p < 1 else np.arange(len(p_V))
    if top_p < 1:
        order_V = order_V[: int(np.searchsorted(p_V[order_V].cumsum(), top_p)) + 1]
    cumulated_V = p_V[order_V].cumsum()
    place = int(np.searchsorted(cumulated_V, uniform * cumulated_V[-1], side="right"))
    # Rounding may carry the product to the sum itself, behind which there is no token.
    return int(order_V[min(place, int(np.searchsorted(cumulated_V, cumulated_V[-1])))])


def drawer(*, temperature: float, top_p: float, generator: torch.Generator) -> Choose:
    """Picks by `draw`, its uniform numbers from `generator`."""

    def choose(scores_V: np.ndarray) -> int:
        uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
        return draw(scores_V, temperature=temperature, top_p=top_p, uniform=uniform)

    return choose


@dataclass
class _Row:
    """One request while it is decoded. `fed` tokens are in the cache; `pending` are decided and not yet fed. `choose`
    picks a token by its score, -inf for those that the grammar forbids."""

    index: int
    matcher: Any
    choose: Choose = likeliest
    pending: list[int] = field(default_factory=lambda: [BOS])
    answer: list[int] = field(default_factory=list)
    token_log_probs: list[float] = field(default_factory=list)
    prompt_state_D: np.ndarray | None = None
    done: bool = False


class Decoder:
    """Answers requests with one student. `max_source_tokens` limits prompts; None: whatever fits memory."""

    def __init__(
        self,
        model: torch.nn.Module,
        codec: TextCodec,
        *,
        constrained: bool,
        max_new_tokens: int,
        max_calls: int,
        max_source_tokens: int | None = None,
    ):
        self.model, self.codec = model.eval(), codec
        head: ConfidenceHead | None = getattr(model, "confidence_head", None)
        self.confidence_head = head if head is not None and head.fits(constrained=constrained) else None
        self.grammar = AnswerGrammar(codec.tokenizer, max_calls=max_calls) if constrained else None
        self.max_new_tokens, self.max_source_tokens = max_new_tokens, max_source_tokens
        self.closing_after = max_new_tokens - int(CLOSING_FRAC * max_new_tokens)
        texts = codec.texts()
        closers = [text if not text.strip('"}]') else "" for text in texts]
        self.closes_string_V = np.array([text.startswith('"') for text in closers])
        self.closes_structure_V = np.array([text.startswith(("}", "]")) for text in closers])
        self.closes_structure_V[EOS] = True
        self.ends_number_V = np.array([text.startswith(",") for text in texts])

    @torch.inference_mode()
    def decode(self, batch: Sequence[Request], *, choose: Sequence[Choose] | None = None) -> list[Decoded]:
        """Answers in the order of the requests; `choose`: how each picks its tokens, None: the likeliest."""
        answers: dict[int, Decoded] = {}
        rows: list[_Row] = []
        prompts: dict[int, list[int]] = {}
        for index, (query, tools) in enumerate(batch):
            prompt = self.codec.encode_prompt(query, tools)
            if self.max_source_tokens is not None and len(prompt) > self.max_source_tokens:
                reason = (
                    f"the prompt has {len(prompt)} tokens, at most {self.max_source_tokens} are read: show fewer tools"
                )
                answers[index] = Decoded(None, "", [], None, reason)
                continue
            try:
                matcher = self.grammar.matcher(tools) if self.grammar else None
            except DataError as error:
                answers[index] = Decoded(None, "", [], None, str(error))
                continue
            prompts[index] = prompt
            rows.append(_Row(index, matcher, likeliest if choose is None else choose[index]))
        if rows:
            self._run(rows, [prompts[row.index] for row in rows])
        finished = [self._finished(row, batch[row.index]) for row in rows]
        answers |= zip((row.index for row in rows), self._with_confidence(finished), strict=True)
        return [answers[index] for index in range(len(batch))]

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        tools: Sequence[Sequence[Tool] | None],
        *,
        temperature: float,
        top_p: float,
        generator: torch.Generator,
    ) -> list[list[int]]:
        """Token ids drawn from the student for encoded prompts, `<eos>` last unless `max_new_tokens` cut them off.

        Each answer draws from a generator of its own, seeded in turn by `generator`: how prompts are put into batches
        changes no answer. Where the decoder is constrained, an answer keeps to the grammar of its `tools`; None leaves
        it free.

        Raises:
            DataError: tools give no grammar.
        """
        seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
        rows = []
        for index, (shown, seed) in enumerate(zip(tools, seeds, strict=True)):
            matcher = self.grammar.matcher(shown) if self.grammar is not None and shown is not None else None
            own = torch.Generator().manual_seed(seed)
            rows.append(_Row(index, matcher, drawer(temperature=temperature, top_p=top_p, generator=own)))
        if rows:
            self._run(rows, [list(prompt) for prompt in prompts])
        return [row.answer for row in rows]

    def _run(self, rows: list[_Row], prompts: list[list[int]]) -> None:
        device = next(self.model.parameters()).device
        longest = max(map(len, prompts))
        source = torch.full((len(rows), longest), PAD, device=device)
        mask = torch.zeros_like(source)
        for i, prompt in enumerate(prompts):
            source[i, : len(prompt)] = torch.tensor(prompt)
            mask[i, : len(prompt)] = 1
        encoded = self.model.get_encoder()(input_ids=source, attention_mask=mask)
        for row, state_D in zip(rows, _pooled(encoded.last_hidden_state, mask), strict=True):
            row.prompt_state_D = state_D
        cache: Any = None
        live = list(rows)
        while live:
            # Rows are fed equally many tokens a step: in a batch forced tokens go one by one, alone all at once.
            width = min(len(row.pending) for row in live)
            tokens = torch.tensor([row.pending[:width] for row in live], device=device)
            step = self.model(
                decoder_input_ids=tokens,
                encoder_outputs=encoded,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
            cache = step.past_key_values
            log_probs_BTV = step.logits.float().log_softmax(dim=-1)
            last_BV = log_probs_BTV[:, -1].cpu().numpy()
            decided = [i for i, row in enumerate(live) if len(row.pending) == width]
            for i, row in enumerate(live):
                following = row.pending[1 : width + 1]
                if following:
                    positions = torch.arange(len(following), device=device)
                    fed = torch.tensor(following, device=device)
                    row.token_log_probs += log_probs_BTV[i, positions, fed].tolist()
                row.pending = row.pending[width:]
            self._choose(live, decided, last_BV)
            kept = [i for i, row in enumerate(live) if not row.done]
            if len(kept) < len(live):
                live = [live[i] for i in kept]
                if live:
                    chosen = torch.tensor(kept, device=device)
                    cache.batch_select_indices(chosen)
                    encoded = type(encoded)(**{name: value[chosen] for name, value in encoded.items()})
                    mask = mask[chosen]

    def _choose(self, live: list[_Row], decided: list[int], log_probs_BV: np.ndarray) -> None:
        """Appends the chosen allowed token of each decided row, and the tokens that it forces."""
        if not decided:
            return
        scores = log_probs_BV[decided]
        held = [j for j, i in enumerate(decided) if live[i].matcher is not None]
        if held:
            masks = lln.allocate_token_bitmask(len(decided), scores.shape[1])
            for j in held:
                lln.fill_next_token_bitmask(live[decided[j]].matcher, masks, j)
            allowed = allowed_tokens(masks, scores.shape[1])
            for j, i in enumerate(decided):
                if live[i].matcher is None:
                    allowed[j] = True
                elif len(live[i].answer) >= self.closing_after:
                    preferred = (allowed[j] & closers_V for closers_V in self._closers(live[i]))
                    allowed[j] = next((mask for mask in preferred if mask.any()), allowed[j])
            scores = np.where(allowed, scores, -np.inf)
        for j, i in enumerate(decided):
            row = live[i]
            token = row.choose(scores[j])
            row.token_log_probs.append(float(log_probs_BV[i, token]))
            self._append(row, token)
            if not row.done and row.matcher is not None:
                self._append_forced(row)

    def _closers(self, row: _Row) -> tuple[np.ndarray, ...]:
        """The tokens that close what the answer has open, best first: a string where its quotes are odd; else brackets,
        or a number that required parameters follow."""
        quotes = re.sub(r"\\.", "", self.codec.decode(row.answer)).count('"')
        return (self.closes_string_V,) if quotes % 2 else (self.closes_structure_V, self.ends_number_V)

    def _append(self, row: _Row, token: int) -> None:
        row.answer.append(token)
        row.pending.append(token)
        if row.matcher is not None and token != EOS:
            row.matcher.consume_token(token)
        row.done = token == EOS or len(row.answer) >= self.max_new_tokens

    def _append_forced(self, row: _Row) -> None:
        """Tokens that the grammar leaves no choice about. A forced stop is left to the model's step, as any last
        token."""
        mask = lln.allocate_token_bitmask(1, self.codec.vocab_size)
        while not row.done:
            lln.fill_next_token_bitmask(row.matcher, mask, 0)
            only = np.flatnonzero(allowed_tokens(mask, self.codec.vocab_size)[0])
            if len(only) != 1 or only[0] == EOS:
                return
            self._append(row, int(only[0]))

    def _finished(self, row: _Row, request: Request) -> Decoded:
        """The answer, with the student's probability as its confidence."""
        text = self.codec.decode(row.answer)
        calls, error = None, None
        if row.answer[-1] != EOS:
            error = f"the answer is longer than max_new_tokens={self.max_new_tokens}"
        else:
            try:
                calls = parse_calls(text)
            except ValueError as problem:
                error = str(problem)
        probability = math.exp(min(sum(row.token_log_probs), 0.0))
        evidence = Evidence(row.prompt_state_D, tuple(row.token_log_probs), len(calls or ()), len(request[1]))
        return Decoded(calls, text, row.answer, probability, error, probability, evidence)

    def _with_confidence(self, answers: list[Decoded]) -> list[Decoded]:
        if self.confidence_head is None:
            return answers
        judged = self.confidence_head.confidences([answer.evidence for answer in answers])
        return [
            replace(answer, confidence=0.0 if answer.calls is None else confidence)
            for answer, confidence in zip(answers, judged, strict=True)
        ]


def _pooled(states_BSD: torch.Tensor, mask_BS: torch.Tensor) -> np.ndarray:
    """[B, D]: the mean encoder state of each prompt."""
    weights_BS1 = mask_BS.unsqueeze(-1).to(states_BSD.dtype)
    return ((states_BSD * weights_BS1).sum(dim=1) / weights_BS1.sum(dim=1)).float().cpu().numpy()
