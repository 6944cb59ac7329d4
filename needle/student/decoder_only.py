"""The Simple Attention Network as a decoder only: source and target are one sequence, read by the same layers.

    python -m needle.train student=san_nano_decoder_only

The parts are those of needle.student.san, switches and copy head included, so that what differs from the
encoder-decoder is the arrangement alone. The source's tokens are read first and leave their keys and values of every
layer behind; the target's go on from there. That is the one sequence exactly, since no source token sees the target,
and gives the decoder its cache, the copy head its source states and the losses logits at target tokens only.

Cost: at equal parameters every token passes all layers, where an encoder-decoder's source passes the encoder's only:
about twice the FLOPs of a training step at san_nano's size.
"""

# B batch, S source tokens, T target tokens, N layers, G key/value heads, E head width, D model width, V vocabulary

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from needle.student.architecture import Architecture, Offer, check_heads
from needle.student.san import (
    Attention,
    CopyHead,
    FeedForward,
    LexicalMatch,
    Residual,
    RMSNorm,
    SANOutput,
    SANPreTrainedModel,
    SelectiveRead,
    rotary_angles,
)
from needle.student.segments import causal, positions_in_segment, same_segment
from needle.student.source_first import SourceFirst, SourceRead
from needle.text.tokenizer import BOS, EOS, PAD, TextCodec


class DecoderOnlySANConfig(PreTrainedConfig):
    """What `config.json` holds. Built from conf/student by `DecoderOnlyNetwork`, which has no defaults."""

    model_type = "needle_san_decoder_only"

    def __init__(
        self,
        vocab_size: int = 8192,
        width: int = 512,
        heads: int = 8,
        kv_heads: int = 4,
        layers: int = 28,
        bidirectional_source: bool = False,
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
        dropout_frac: float = 0.0,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.layers = layers
        self.bidirectional_source = bidirectional_source
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
        self.dropout_frac = dropout_frac
        super().__init__(**{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **kwargs})


@dataclass(frozen=True)
class DecoderOnlyNetwork(Architecture):
    """`bidirectional_source`: source tokens see all of the source, as an encoder's do (a prefix language model, Raffel
    et al. 2020); false: only what stands before them, so that tools are read without the request behind them."""

    name: str
    width: Annotated[int, Field(ge=16)]
    heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    layers: Annotated[int, Field(ge=1)]
    bidirectional_source: bool
    ffn_width: Annotated[int, Field(ge=0)]
    rope_theta: Annotated[float, Field(gt=0)]
    gated: bool
    qk_norm: bool
    sandwich_norm: bool
    copy: bool
    copy_width: Annotated[int, Field(ge=8)]
    lexical_match: bool
    selective_read: bool
    dropout_frac: Annotated[float, Field(ge=0, lt=1)]
    retrieval_width: ClassVar[int] = 0
    offers: ClassVar[frozenset[Offer]] = frozenset()

    def __post_init__(self) -> None:
        check_heads(width=self.width, heads=self.heads, kv_heads=self.kv_heads)

    def build(self, codec: TextCodec) -> "DecoderOnlySAN":
        settings = {key: value for key, value in vars(self).items() if key != "name"}
        config = DecoderOnlySANConfig(vocab_size=codec.vocab_size, separator_id=codec.separator_id, **settings)
        model = DecoderOnlySAN(config)
        if model.lexical_match is not None:
            model.lexical_match.start(codec.texts())
        return model


class Layer(nn.Module):
    """Attention to what was read before and, where wanted, a feed-forward part."""

    def __init__(self, config: DecoderOnlySANConfig, index: int):
        super().__init__()
        self.index = index
        self.attention, self.attention_residual = Attention(config), Residual(config)
        self.feed_forward = FeedForward(config) if config.ffn_width else None
        self.feed_forward_residual = Residual(config) if config.ffn_width else None

    def forward(self, x_BTD: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor], cache: DynamicCache) -> Tensor:
        normed = self.attention_residual.norm(x_BTD)
        keys, values = cache.update(*self.attention.keys_values(normed, angles), self.index)
        x = self.attention_residual.add(x_BTD, self.attention(normed, keys, values, mask, angles))
        if self.feed_forward is not None and self.feed_forward_residual is not None:
            x = self.feed_forward_residual.add(x, self.feed_forward(self.feed_forward_residual.norm(x)))
        return x


class DecoderOnlySAN(SourceFirst, SANPreTrainedModel):
    """The student. Logits are log-probabilities when the copy head is on, so every loss may treat them alike."""

    config_class = DecoderOnlySANConfig

    def __init__(self, config: DecoderOnlySANConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.dropout = nn.Dropout(config.dropout_frac)
        self.copy_head = CopyHead(config) if config.copy else None
        self.lexical_match = LexicalMatch(config) if config.copy and config.lexical_match else None
        self.selective_read = SelectiveRead(config) if config.selective_read else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> None:
        return None  # the output projection *is* the input embedding: there is no second matrix to tie

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: SourceRead | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
        source_segments_BS: Tensor | None = None,
        target_segments_BT: Tensor | None = None,
        **_: Any,
    ) -> SANOutput:
        """Logits [B, T, V] for the tokens after `decoder_input_ids`; arguments as the encoder-decoder's.

        `past_key_values` holds the source too: a cache that this method gave back. `use_cache` gives one back.
        """
        if decoder_input_ids is None:
            raise ValueError("the student needs decoder_input_ids")
        begun = self._begun(input_ids, attention_mask, source_segments_BS, encoder_outputs, past_key_values)
        found, cache, source_ids = begun.source, begun.cache, begun.source.source_ids
        mask, positions = begun.continued(target_segments_BT, steps=decoder_input_ids.shape[1])
        to_source_BTS = mask[:, 0, :, : source_ids.shape[1]]
        x = self.embedding(decoder_input_ids) * math.sqrt(self.config.width)
        if self.selective_read is not None:
            x = x + self.selective_read(decoder_input_ids, found.last_hidden_state, source_ids, to_source_BTS)
        x = self._through(x, mask, positions, cache)
        logits = vocabulary_logits = F.linear(x, self.embedding.weight)
        if self.copy_head is not None:
            bias = self.lexical_match.bias(x, found.tool_scores) if self.lexical_match is not None else None
            logits = self.copy_head(x, logits, found.copy_keys, source_ids, to_source_BTS, bias)
        return SANOutput(
            logits=logits,
            past_key_values=cache if use_cache else None,
            encoder_last_hidden_state=found.last_hidden_state,
            vocabulary_logits=vocabulary_logits,
        )

    def _read(self, input_ids: Tensor, segments_BS: Tensor, cache: DynamicCache) -> dict[str, Any]:
        embedded = self.embedding(input_ids) * math.sqrt(self.config.width)
        x, scores = embedded, None
        if self.lexical_match is not None:
            # Tells a tool whether the request behind it shares its words, also where attention cannot look ahead.
            scores = self.lexical_match.scores(input_ids, segments_BS)
            x = x + self.lexical_match.embed(scores, segments_BS)
        whole = self.config.bidirectional_source
        mask = same_segment(segments_BS, segments_BS) if whole else causal(segments_BS)
        x = self._through(x, mask, positions_in_segment(segments_BS), cache)
        keys = self.copy_head.keys(x, embedded, segments_BS) if self.copy_head is not None else None
        return {"last_hidden_state": x, "tool_scores": scores, "copy_keys": keys, "source_ids": input_ids}

    def _through(self, x_BTD: Tensor, mask: Tensor, positions_BT: Tensor, cache: DynamicCache) -> Tensor:
        """All layers and the last norm."""
        cos, sin = rotary_angles(positions_BT, self.config.width // self.config.heads, self.config.rope_theta)
        angles = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for every head
        x = self.dropout(x_BTD)
        for layer in self.layers:
            x = layer(x, mask, angles, cache)
        return self.norm(x)
