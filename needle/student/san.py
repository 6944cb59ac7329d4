"""The Simple Attention Network: an encoder-decoder of attention layers only, as a transformers model.

Grouped-query attention with rotary positions and QK-norm, zero-centred RMSNorm, gated residuals, one tied embedding,
and (switchable) a copy head that mixes the vocabulary's distribution with one over the source tokens. With `ffn_width
> 0` every layer gets a SwiGLU feed-forward part, for ablation. Sizes: conf/student/.

Cost: base (26.2M) trains at about 7 x parameters FLOPs a token; see `python -m needle.bench`.
"""

# B batch, S source tokens, T target tokens, H query heads, G key/value heads, E head width, D model width,
# C copy width, V vocabulary

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from needle.student.architecture import Architecture, Offer, check_heads
from needle.student.retrieval import RetrievalHead
from needle.student.segments import same_segment, segments_of
from needle.text.tokenizer import BOS, EOS, PAD, QUERY, TOOLS, TextCodec

NORM_EPSILON = 1e-6
SHORTEST_WORD = 3  # letters; shorter words (a, to, of) never match
STEM_LETTERS = 4  # words match by their first letters: remind, reminder, reminders
LETTER_BITS = 15  # STEM_LETTERS of them fit into an int64
INITIAL_IMPORTANCE = 0.2  # a letter: long words are rare words, as good as inverse document frequency here
INITIAL_STRENGTH = 4.0
PROBABILITY_FLOOR = 1e-30  # keeps the logarithm finite where float32 probabilities underflow


class SANConfig(PreTrainedConfig):
    """What `config.json` holds. Built from conf/student by `SimpleAttentionNetwork`, which has no defaults."""

    model_type = "needle_san"

    def __init__(
        self,
        vocab_size: int = 8192,
        width: int = 512,
        heads: int = 8,
        kv_heads: int = 4,
        encoder_layers: int = 12,
        decoder_layers: int = 8,
        ffn_width: int = 0,
        rope_theta: float = 10000.0,
        gated: bool = True,
        qk_norm: bool = True,
        sandwich_norm: bool = False,
        copy: bool = True,
        copy_width: int = 128,
        lexical_match: bool = False,
        separator_id: int = -1,
        selective_read: bool = False,
        retrieval_width: int = 0,
        dropout_frac: float = 0.0,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.encoder_layers = encoder_layers
        self.decoder_layers = decoder_layers
        self.ffn_width = ffn_width
        self.rope_theta = rope_theta
        self.gated = gated
        self.qk_norm = qk_norm
        self.sandwich_norm = sandwich_norm
        self.copy = copy
        self.copy_width = copy_width
        self.lexical_match = lexical_match
        self.separator_id = separator_id
        self.selective_read = selective_read
        self.retrieval_width = retrieval_width
        self.dropout_frac = dropout_frac
        # Names that transformers' cache and generation code look for.
        self.hidden_size = width
        self.num_hidden_layers = decoder_layers
        kwargs = {
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "decoder_start_token_id": BOS,
            **kwargs,
        }
        super().__init__(**kwargs)


@dataclass(frozen=True)
class SimpleAttentionNetwork(Architecture):
    """The encoder-decoder. With `ffn_width` above 0 it is no longer attention only."""

    name: str
    width: Annotated[int, Field(ge=16)]
    heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    encoder_layers: Annotated[int, Field(ge=1)]
    decoder_layers: Annotated[int, Field(ge=1)]
    ffn_width: Annotated[int, Field(ge=0)]
    rope_theta: Annotated[float, Field(gt=0)]
    gated: bool
    qk_norm: bool
    sandwich_norm: bool
    copy: bool
    copy_width: Annotated[int, Field(ge=8)]
    lexical_match: bool
    selective_read: bool
    retrieval_width: Annotated[int, Field(ge=0)]
    dropout_frac: Annotated[float, Field(ge=0, lt=1)]
    offers: ClassVar[frozenset[Offer]] = frozenset({"retrieval", "taps"})

    def __post_init__(self) -> None:
        check_heads(width=self.width, heads=self.heads, kv_heads=self.kv_heads)

    def build(self, codec: TextCodec) -> "SANForConditionalGeneration":
        settings = {key: value for key, value in vars(self).items() if key != "name"}
        config = SANConfig(vocab_size=codec.vocab_size, separator_id=codec.separator_id, **settings)
        model = SANForConditionalGeneration(config)
        if model.lexical_match is not None:
            model.lexical_match.start(codec.texts())
        return model


class RMSNorm(nn.Module):
    """(1 + g) * x / rms(x): zero-centred, so that weight decay pulls towards the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), 1.0 + self.weight, NORM_EPSILON)


def rotary_angles(positions_T: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [T, E/2] (Su et al. 2021); of positions [B, T] each [B, T, E/2]."""
    frequencies = theta ** (
        -torch.arange(0, head_width, 2, device=positions_T.device, dtype=torch.float32) / head_width
    )
    angles = positions_T.float()[..., None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (angle.to(x_BHTE.dtype) for angle in angles)
    first, second = x_BHTE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention, self or cross, with QK-norm; `mask` is boolean, True where attention is allowed."""

    def __init__(self, config: SANConfig):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = config.width // config.heads
        kv_width = self.kv_heads * self.head_width
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.query_norm = RMSNorm(self.head_width) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_width) if config.qk_norm else nn.Identity()

    def keys_values(self, x_BSD: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        batch, length, _ = x_BSD.shape
        keys = self.key_norm(self.key(x_BSD).view(batch, length, self.kv_heads, self.head_width)).transpose(1, 2)
        values = self.value(x_BSD).view(batch, length, self.kv_heads, self.head_width).transpose(1, 2)
        return (rotate(keys, angles) if angles else keys), values

    def forward(
        self,
        x_BTD: Tensor,
        keys_BGSE: Tensor,
        values_BGSE: Tensor,
        mask: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        batch, length, width = x_BTD.shape
        queries = self.query_norm(self.query(x_BTD).view(batch, length, self.heads, self.head_width)).transpose(1, 2)
        queries = rotate(queries, angles) if angles else queries
        groups = self.heads // self.kv_heads
        keys, values = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (keys_BGSE, values_BGSE))
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.output(attended.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020); absent from the standard student."""

    def __init__(self, config: SANConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.output = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.silu(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    """x + sigmoid(gate) * dropout(norm?(f(norm(x)))): the wrapping of every sublayer."""

    def __init__(self, config: SANConfig):
        super().__init__()
        self.norm = RMSNorm(config.width)
        self.after = RMSNorm(config.width) if config.sandwich_norm else nn.Identity()
        self.gate = nn.Parameter(torch.zeros(())) if config.gated else None
        self.dropout = nn.Dropout(config.dropout_frac)

    def add(self, x: Tensor, change: Tensor) -> Tensor:
        change = self.dropout(self.after(change))
        return x + (change if self.gate is None else torch.sigmoid(self.gate) * change)


class EncoderLayer(nn.Module):
    def __init__(self, config: SANConfig):
        super().__init__()
        self.attention, self.attention_residual = Attention(config), Residual(config)
        self.feed_forward = FeedForward(config) if config.ffn_width else None
        self.feed_forward_residual = Residual(config) if config.ffn_width else None

    def forward(self, x: Tensor, mask: Tensor | None, angles: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.attention_residual.norm(x)
        keys, values = self.attention.keys_values(normed, angles)
        x = self.attention_residual.add(x, self.attention(normed, keys, values, mask, angles))
        if self.feed_forward is not None:
            x = self.feed_forward_residual.add(x, self.feed_forward(self.feed_forward_residual.norm(x)))
        return x


class DecoderLayer(nn.Module):
    def __init__(self, config: SANConfig, index: int):
        super().__init__()
        self.index = index
        self.self_attention, self.self_residual = Attention(config), Residual(config)
        self.cross_attention, self.cross_residual = Attention(config), Residual(config)
        self.feed_forward = FeedForward(config) if config.ffn_width else None
        self.feed_forward_residual = Residual(config) if config.ffn_width else None

    def forward(
        self,
        x: Tensor,
        memory_BSD: Tensor,
        self_mask: Tensor | None,
        cross_mask: Tensor | None,
        angles: tuple[Tensor, Tensor],
        cache: EncoderDecoderCache | None,
    ) -> Tensor:
        normed = self.self_residual.norm(x)
        keys, values = self.self_attention.keys_values(normed, angles)
        if cache is not None:
            keys, values = cache.self_attention_cache.update(keys, values, self.index)
        x = self.self_residual.add(x, self.self_attention(normed, keys, values, self_mask, angles))
        if cache is not None and cache.is_updated.get(self.index):
            layer = cache.cross_attention_cache.layers[self.index]
            keys, values = layer.keys, layer.values
        else:
            keys, values = self.cross_attention.keys_values(memory_BSD, None)
            if cache is not None:
                keys, values = cache.cross_attention_cache.update(keys, values, self.index)
                cache.is_updated[self.index] = True
        x = self.cross_residual.add(
            x, self.cross_attention(self.cross_residual.norm(x), keys, values, cross_mask, None)
        )
        if self.feed_forward is not None:
            x = self.feed_forward_residual.add(x, self.feed_forward(self.feed_forward_residual.norm(x)))
        return x


@dataclass
class SANEncoderOutput(BaseModelOutput):
    """Encoder states with what the copy head reads, so that decoding steps need nothing else from the source."""

    last_hidden_state: torch.FloatTensor | None = None
    tool_scores: torch.FloatTensor | None = None
    copy_keys: torch.FloatTensor | None = None
    source_ids: torch.LongTensor | None = None


@dataclass
class SANOutput(Seq2SeqLMOutput):
    """`vocabulary_logits` [B, T, V]: the logits before the copy head's mixture; `logits` themselves without one."""

    vocabulary_logits: torch.FloatTensor | None = None


class CopyHead(nn.Module):
    """Pointer-generator mixture (See et al. 2017): log(g * p_vocabulary + (1 - g) * p_copy).

    A source position's key carries the embedding of the token *before* it, so that "what followed this token in the
    source" is found in one step instead of having to be composed by two layers.
    """

    def __init__(self, config: SANConfig):
        super().__init__()
        self.query = nn.Linear(config.width, config.copy_width, bias=False)
        self.state_key = nn.Linear(config.width, config.copy_width, bias=False)
        self.previous_key = nn.Linear(config.width, config.copy_width, bias=False)
        self.gate = nn.Linear(config.width, 1)
        self.scale = config.copy_width**-0.5

    def keys(self, memory_BSD: Tensor, embedded_BSD: Tensor, segments_BS: Tensor) -> Tensor:
        same_example = (segments_BS[:, 1:] == segments_BS[:, :-1]).unsqueeze(-1)
        previous = F.pad(embedded_BSD[:, :-1] * same_example, (0, 0, 1, 0))
        return self.state_key(memory_BSD) + self.previous_key(previous)

    def forward(
        self,
        state_BTD: Tensor,
        logits_BTV: Tensor,
        keys_BSC: Tensor,
        source_ids_BS: Tensor,
        mask_BTS: Tensor,
        tool_bias_BTS: Tensor | None,
    ) -> Tensor:
        scores_BTS = (self.query(state_BTD) @ keys_BSC.transpose(1, 2)).float() * self.scale
        if tool_bias_BTS is not None:
            scores_BTS = scores_BTS + tool_bias_BTS
        attention_BTS = scores_BTS.masked_fill(~mask_BTS, -1e9).softmax(dim=-1)
        gate_BT1 = torch.sigmoid(self.gate(state_BTD).float())
        index_BTS = source_ids_BS.unsqueeze(1).expand_as(attention_BTS)
        mixture_BTV = gate_BT1 * logits_BTV.float().softmax(dim=-1)
        mixture_BTV = mixture_BTV.scatter_add(2, index_BTS, (1 - gate_BT1) * attention_BTS)
        return (mixture_BTV + PROBABILITY_FLOOR).log()


class LexicalMatch(nn.Module):
    """Which tool shares words with the request, as an encoder input and as a bias on the copy head's scores.

    A tool's score is the summed importance of the tokens of its words that the request holds too, over the square root
    of its length. Words are put together from their tokens, so that rare words match however they were cut, and match
    by their first letters. Importances are learned per token and start at the number of letters, so that matching words
    count from the first step; without this a small student still picks tools at random long after it can copy.
    """

    def __init__(self, config: SANConfig):
        super().__init__()
        self.separator_id = config.separator_id
        self.register_buffer("letters", torch.zeros(config.vocab_size, dtype=torch.long))
        self.register_buffer("starts_word", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.register_buffer("stems", torch.zeros(config.vocab_size, STEM_LETTERS + 1, dtype=torch.long))
        self.importance = nn.Parameter(torch.zeros(config.vocab_size))
        self.feature = nn.Parameter(torch.zeros(2, config.width))
        self.strength = nn.Linear(config.width, 1)

    @torch.no_grad()
    def start(self, texts: Sequence[str]) -> None:
        """`texts`: every token's text, with its leading space."""
        words = [text.strip() if text.strip().isalpha() else "" for text in texts]
        # A capital opens a word too: camelCase names are several.
        opens = [bool(word) and (text[0] == " " or word[0].isupper()) for text, word in zip(texts, words, strict=True)]
        self.letters.copy_(torch.tensor([len(word) for word in words]))
        self.starts_word.copy_(torch.tensor(opens))
        self.stems.copy_(
            torch.tensor([[_stem(word.lower()[:length]) for length in range(STEM_LETTERS + 1)] for word in words])
        )
        self.importance.copy_(INITIAL_IMPORTANCE * self.letters)
        self.strength.bias.fill_(INITIAL_STRENGTH)

    def word_stems(self, ids_BS: Tensor) -> Tensor:
        """[B, S]: for every token the stem of the word it is part of; negative and unlike all others without one."""
        letters_BS = self.letters[ids_BS]
        in_word_BS = letters_BS > 0
        follows_word_BS = F.pad(in_word_BS[:, :-1], (1, 0))
        starts_BS = ~in_word_BS | ~follows_word_BS | self.starts_word[ids_BS]
        before_BS = letters_BS.cumsum(dim=1) - letters_BS
        before_BS = before_BS - torch.where(starts_BS, before_BS, 0).cummax(dim=1).values
        shift_BS = before_BS.clamp_max(STEM_LETTERS)
        part_BS = self.stems[ids_BS, STEM_LETTERS - shift_BS] << (LETTER_BITS * shift_BS.clamp_max(STEM_LETTERS - 1))
        word_BS = starts_BS.cumsum(dim=1) - 1
        stem_BS = torch.zeros_like(ids_BS).scatter_add(1, word_BS, part_BS).gather(1, word_BS)
        length_BS = torch.zeros_like(ids_BS).scatter_add(1, word_BS, letters_BS).gather(1, word_BS)
        nothing_BS = -1 - torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        return torch.where(length_BS >= SHORTEST_WORD, stem_BS, nothing_BS)

    def scores(self, ids_BS: Tensor, segments_BS: Tensor) -> Tensor:
        """[B, S]: for every token of a tool that tool's score; 0 for the request."""
        markers = (ids_BS == TOOLS) | (ids_BS == QUERY)
        positions = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        last_marker_BS = torch.where(markers, positions, 0).cummax(dim=1).values
        in_request_BS = ids_BS.gather(1, last_marker_BS) == QUERY
        part_BS = (markers | (ids_BS == self.separator_id)).cumsum(dim=1)
        same_part_BSS = (part_BS[:, :, None] == part_BS[:, None, :]).float()
        stems_BS = self.word_stems(ids_BS)
        same_word_BSS = (stems_BS[:, :, None] == stems_BS[:, None, :]) & in_request_BS[:, None, :]
        matched_BS = (same_word_BSS & (segments_BS[:, :, None] == segments_BS[:, None, :])).any(dim=-1)
        weight_BS = self.importance[ids_BS] * (matched_BS & ~in_request_BS)
        return (same_part_BSS @ weight_BS.unsqueeze(-1)).squeeze(-1) / same_part_BSS.sum(dim=-1).sqrt()

    def embed(self, scores_BS: Tensor, segments_BS: Tensor) -> Tensor:
        """[B, S, D] for the encoder: a tool's score, and how far it stays behind the example's best."""
        best_BS = torch.zeros_like(scores_BS).scatter_reduce(1, segments_BS, scores_BS, "amax")
        behind_BS = best_BS.gather(1, segments_BS) - scores_BS
        return torch.stack((scores_BS, behind_BS), dim=-1) @ self.feature

    def bias(self, state_BTD: Tensor, scores_BS: Tensor) -> Tensor:
        """[B, T, S], as strong as the decoder's state wants it."""
        return F.softplus(self.strength(state_BTD).float()) * scores_BS.unsqueeze(1)


class SelectiveRead(nn.Module):
    """Adds to a decoder input what the encoder knows of the source places that hold the same token (Gu et al. 2016).

    The token just written was mostly copied; where a value ends is known to the encoder's state of that place. The mean
    over all places of the token is read; a token that the source does not hold reads nothing.
    """

    def __init__(self, config: SANConfig):
        super().__init__()
        self.project = nn.Linear(config.width, config.width, bias=False)

    def forward(self, decoder_ids_BT: Tensor, memory_BSD: Tensor, source_ids_BS: Tensor, mask_BTS: Tensor) -> Tensor:
        same_BTS = ((decoder_ids_BT[:, :, None] == source_ids_BS[:, None, :]) & mask_BTS).to(memory_BSD.dtype)
        read_BTD = (same_BTS @ memory_BSD) / same_BTS.sum(dim=-1, keepdim=True).clamp_min(1.0)
        return self.project(read_BTD)


class SANPreTrainedModel(PreTrainedModel):
    config_class = SANConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, RMSNorm):
            nn.init.zeros_(module.weight)
        elif isinstance(module, LexicalMatch):
            for parameter in (module.importance, module.feature):
                nn.init.zeros_(parameter)
        elif isinstance(module, Residual) and module.gate is not None:
            nn.init.zeros_(module.gate)
        elif isinstance(module, RetrievalHead):
            module.start()


class SANEncoder(SANPreTrainedModel):
    main_input_name = "input_ids"

    def __init__(self, config: SANConfig, embedding: nn.Embedding):
        super().__init__(config)
        self.embedding = embedding
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = RMSNorm(config.width)
        self.dropout = nn.Dropout(config.dropout_frac)
        # The model's own, set by it, so that their keys are computed once a source.
        self.copy_head: CopyHead | None = None
        self.lexical_match: LexicalMatch | None = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        source_segments_BS: Tensor | None = None,
        **_: Any,
    ) -> SANEncoderOutput:
        segments = segments_of(input_ids, attention_mask, source_segments_BS)
        embedded = self.embedding(input_ids) * math.sqrt(self.config.width)
        mask = same_segment(segments, segments)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = rotary_angles(positions, self.config.width // self.config.heads, self.config.rope_theta)
        x, scores = embedded, None
        if self.lexical_match is not None:
            scores = self.lexical_match.scores(input_ids, segments)
            x = x + self.lexical_match.embed(scores, segments)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, mask, angles)
        x = self.norm(x)
        keys = self.copy_head.keys(x, embedded, segments) if self.copy_head is not None else None
        return SANEncoderOutput(last_hidden_state=x, tool_scores=scores, copy_keys=keys, source_ids=input_ids)


class SANForConditionalGeneration(SANPreTrainedModel, GenerationMixin):
    """The student. Logits are log-probabilities when the copy head is on, so every loss may treat them alike."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"encoder.embedding.weight": "embedding.weight"}

    def __init__(self, config: SANConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = SANEncoder(config, self.embedding)
        self.decoder_layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.decoder_layers))
        self.norm = RMSNorm(config.width)
        self.dropout = nn.Dropout(config.dropout_frac)
        self.copy_head = CopyHead(config) if config.copy else None
        self.lexical_match = LexicalMatch(config) if config.copy and config.lexical_match else None
        self.selective_read = SelectiveRead(config) if config.selective_read else None
        self.retrieval_head = None
        if config.retrieval_width:
            # Last, and on a copy of the random state: the other weights are then those of a student without it.
            with torch.random.fork_rng(devices=[]):
                self.retrieval_head = RetrievalHead(width=config.width, retrieval_width=config.retrieval_width)
        self._share_heads()
        self.post_init()

    def _share_heads(self) -> None:
        # Bypasses nn.Module registration: the parameters belong to the model, the encoder only calls them.
        object.__setattr__(self.encoder, "copy_head", self.copy_head)
        object.__setattr__(self.encoder, "lexical_match", self.lexical_match)

    def get_encoder(self, *_: Any, **__: Any) -> SANEncoder:
        return self.encoder

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value
        self.encoder.embedding = value

    def get_output_embeddings(self) -> None:
        return None  # the output projection *is* the input embedding: there is no second matrix to tie

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: SANEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        source_segments_BS: Tensor | None = None,
        target_segments_BT: Tensor | None = None,
        **_: Any,
    ) -> SANOutput:
        """Logits [B, T, V] for the tokens after `decoder_input_ids`.

        Args:
            input_ids: [B, S] source tokens.
            attention_mask: [B, S], 1 for tokens and 0 for padding; all ones if absent. Not with segments.
            decoder_input_ids: [B, T]; with a cache, only those not fed before.
            source_segments_BS, target_segments_BT: for packed rows, the number of the example that each token belongs
                to (from 1; 0 is padding). Attention never leaves an example.
            labels: [B, T], -100 ignored; gives `loss`, the mean cross-entropy in nats.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("the student needs decoder_input_ids or labels")
            shifted = labels.new_full(labels.shape, BOS)
            shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)
            decoder_input_ids = shifted
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, source_segments_BS)
        memory = encoder_outputs.last_hidden_state
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        past = past_key_values.get_seq_length() if past_key_values is not None else 0

        source_segments = segments_of(encoder_outputs.source_ids, attention_mask, source_segments_BS)
        length = decoder_input_ids.shape[1]
        if target_segments_BT is None:
            target_segments = source_segments.new_ones(decoder_input_ids.shape)
        else:
            target_segments = target_segments_BT
        positions = torch.arange(past, past + length, device=memory.device)
        causal = positions[:, None] >= torch.arange(past + length, device=memory.device)
        self_mask = (
            causal[None, None]
            if target_segments_BT is None
            else causal & same_segment(target_segments, target_segments)
        )
        cross_mask = same_segment(target_segments, source_segments)

        angles = rotary_angles(positions, self.config.width // self.config.heads, self.config.rope_theta)
        x = self.embedding(decoder_input_ids) * math.sqrt(self.config.width)
        if self.selective_read is not None:
            x = x + self.selective_read(decoder_input_ids, memory, encoder_outputs.source_ids, cross_mask.squeeze(1))
        x = self.dropout(x)
        for layer in self.decoder_layers:
            x = layer(x, memory, self_mask, cross_mask, angles, past_key_values)
        x = self.norm(x)
        logits = vocabulary_logits = F.linear(x, self.embedding.weight)
        if self.copy_head is not None:
            bias = None
            if self.lexical_match is not None:
                bias = self.lexical_match.bias(x, encoder_outputs.tool_scores)
            logits = self.copy_head(
                x, logits, encoder_outputs.copy_keys, encoder_outputs.source_ids, cross_mask.squeeze(1), bias
            )
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100)
        return SANOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            encoder_last_hidden_state=memory,
            vocabulary_logits=vocabulary_logits,
        )


def _stem(letters: str) -> int:
    return sum(min(ord(letter), 2**LETTER_BITS - 1) << (LETTER_BITS * place) for place, letter in enumerate(letters))
