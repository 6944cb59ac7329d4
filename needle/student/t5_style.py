"""A student in the style of T5: transformers' own encoder-decoder behind the interface of every student.

    python -m needle.train student=t5_style_nano

Relative position biases, RMSNorm before every sublayer, attention without scaling, gated GELU (T5 1.1) and one tied
embedding whose logits are scaled by 1/sqrt(width) (Raffel et al. 2020). No copy head, nothing of the Simple Attention
Network: the comparison that shows what those bring. Weights are saved under the names of transformers'
T5ForConditionalGeneration.

Packed rows need masks alone: a bias depends on how far apart two tokens are, which packing leaves as it is inside an
example, and attention to the source has none.
Cost: see `python -m needle.bench`; the bias, added to every score, keeps attention from its fastest kernels.
"""

# B batch, S source tokens, T target tokens, V vocabulary

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from needle.student.architecture import Architecture, Offer
from needle.student.segments import causal, same_segment
from needle.text.tokenizer import BOS, EOS, PAD, TextCodec


class T5StyleConfig(T5Config):
    """What `config.json` holds: transformers' names, to which the names of conf/student lead too."""

    model_type = "needle_t5_style"
    attribute_map: ClassVar[dict[str, str]] = {
        **T5Config.attribute_map,
        "width": "d_model",
        "heads": "num_heads",
        "kv_heads": "num_heads",
        "encoder_layers": "num_layers",
        "decoder_layers": "num_decoder_layers",
        "ffn_width": "d_ff",
        "distance_buckets": "relative_attention_num_buckets",
        "distance_max": "relative_attention_max_distance",
        "norm_epsilon": "layer_norm_epsilon",
        "dropout_frac": "dropout_rate",
    }


@dataclass(frozen=True)
class T5StyleNetwork(Architecture):
    """`distance_buckets` biases a head for distances up to `distance_max` tokens, one for all that are longer;
    `initializer_factor` multiplies the published starting scales of all matrices."""

    name: str
    width: Annotated[int, Field(ge=16)]
    heads: Annotated[int, Field(ge=1)]
    encoder_layers: Annotated[int, Field(ge=1)]
    decoder_layers: Annotated[int, Field(ge=1)]
    ffn_width: Annotated[int, Field(ge=1)]
    distance_buckets: Annotated[int, Field(ge=4, multiple_of=2)]
    distance_max: Annotated[int, Field(ge=2)]
    norm_epsilon: Annotated[float, Field(gt=0)]
    initializer_factor: Annotated[float, Field(gt=0)]
    dropout_frac: Annotated[float, Field(ge=0, lt=1)]
    retrieval_width: ClassVar[int] = 0
    offers: ClassVar[frozenset[Offer]] = frozenset()

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} heads={self.heads}: width must divide into heads")
        if self.distance_max <= self.distance_buckets:
            raise ValueError(
                f"distance_max={self.distance_max} distance_buckets={self.distance_buckets}: the nearest distances "
                "have a bucket each; distance_max must be larger"
            )

    def build(self, codec: TextCodec) -> "T5Style":
        return T5Style(
            T5StyleConfig(
                vocab_size=codec.vocab_size,
                d_model=self.width,
                d_kv=self.width // self.heads,
                num_heads=self.heads,
                num_layers=self.encoder_layers,
                num_decoder_layers=self.decoder_layers,
                d_ff=self.ffn_width,
                feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=self.distance_buckets,
                relative_attention_max_distance=self.distance_max,
                layer_norm_epsilon=self.norm_epsilon,
                initializer_factor=self.initializer_factor,
                dropout_rate=self.dropout_frac,
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
                decoder_start_token_id=BOS,
            )
        )


class T5Style(T5ForConditionalGeneration):
    """The student. Its logits are those of the vocabulary."""

    config_class = T5StyleConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        source_segments_BS: Tensor | None = None,
        target_segments_BT: Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits [B, T, V] for the tokens after `decoder_input_ids`; arguments as SANForConditionalGeneration's, and
        transformers' own. A mask of four dimensions is taken as it is."""
        if source_segments_BS is not None and target_segments_BT is not None:
            if encoder_outputs is None:
                own = same_segment(source_segments_BS, source_segments_BS)
                encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=own)
            attention_mask = same_segment(target_segments_BT, source_segments_BS)
            kwargs["decoder_attention_mask"] = causal(target_segments_BT)
            use_cache = False
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
