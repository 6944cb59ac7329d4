"""A student in the style of Llama: transformers' own decoder-only network behind the interface of every student.

    python -m needle.train student=llama_style_nano

Rotary positions, RMSNorm before every sublayer, SwiGLU, grouped-query attention, plain residuals (Touvron et al. 2023),
and one tied embedding, as small ones of its kind have. No copy head, no QK-norm, nothing of the Simple Attention
Network: the comparison that shows what those bring. Weights are saved under the names of transformers'
LlamaForCausalLM.

Source and target are one sequence, read in two parts as in needle.student.decoder_only.
Cost: every token passes all layers; see `python -m needle.bench`.
"""

# B batch, S source tokens, T target tokens, N layers, G key/value heads, E head width, D model width, V vocabulary

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import Seq2SeqLMOutput

from needle.student.architecture import Architecture, Offer, check_heads
from needle.student.decoder_only import SourceRead, stacked, unstacked
from needle.student.segments import causal, continued, positions_in_segment, segments_of
from needle.text.tokenizer import BOS, EOS, PAD, TextCodec


class LlamaStyleConfig(LlamaConfig):
    """What `config.json` holds: transformers' names, to which the names of conf/student lead too."""

    model_type = "needle_llama_style"
    attribute_map: ClassVar[dict[str, str]] = {
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "layers": "num_hidden_layers",
        "ffn_width": "intermediate_size",
        "norm_epsilon": "rms_norm_eps",
    }

    @property
    def rope_theta(self) -> float:
        stated: Any = self.rope_parameters
        return stated["rope_theta"]


@dataclass(frozen=True)
class LlamaStyleNetwork(Architecture):
    """`initializer_range`: standard deviation of every matrix and of the embedding at the start."""

    name: str
    width: Annotated[int, Field(ge=16)]
    heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    layers: Annotated[int, Field(ge=1)]
    ffn_width: Annotated[int, Field(ge=1)]
    rope_theta: Annotated[float, Field(gt=0)]
    norm_epsilon: Annotated[float, Field(gt=0)]
    initializer_range: Annotated[float, Field(gt=0, le=1)]
    retrieval_width: ClassVar[int] = 0
    offers: ClassVar[frozenset[Offer]] = frozenset()

    def __post_init__(self) -> None:
        check_heads(width=self.width, heads=self.heads, kv_heads=self.kv_heads)

    def build(self, codec: TextCodec) -> "LlamaStyle":
        return LlamaStyle(
            LlamaStyleConfig(
                vocab_size=codec.vocab_size,
                hidden_size=self.width,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                num_hidden_layers=self.layers,
                intermediate_size=self.ffn_width,
                rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
                rms_norm_eps=self.norm_epsilon,
                initializer_range=self.initializer_range,
                tie_word_embeddings=True,
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
            )
        )


class LlamaStyle(LlamaForCausalLM):
    """The student. Its logits are those of the vocabulary. `generate` is not for it: needle.decode answers."""

    config_class = LlamaStyleConfig

    def get_encoder(self, *_: Any, **__: Any) -> Any:
        return self.read

    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, source_segments_BS: Tensor | None = None
    ) -> SourceRead:
        """The source alone, for targets that go on from it."""
        cache = DynamicCache()
        states = self._read(input_ids, segments_of(input_ids, attention_mask, source_segments_BS), cache)
        return SourceRead(last_hidden_state=states, source_ids=input_ids, **stacked(cache))

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
    ) -> Seq2SeqLMOutput:
        """Logits [B, T, V] for the tokens after `decoder_input_ids`; arguments as DecoderOnlySAN's."""
        if decoder_input_ids is None or (input_ids is None and encoder_outputs is None):
            raise ValueError("the student needs decoder_input_ids, and input_ids or encoder_outputs")
        found: Any = encoder_outputs
        source_ids = input_ids if found is None else found.source_ids
        source_segments = segments_of(source_ids, attention_mask, source_segments_BS)
        cache = past_key_values
        if found is None:
            cache = DynamicCache()
            states = self._read(input_ids, source_segments, cache)
        else:
            states = found.last_hidden_state
            cache = cache if cache is not None else unstacked(found.keys, found.values)
        steps, past_tokens = decoder_input_ids.shape[1], cache.get_seq_length() - source_ids.shape[1]
        mask, positions = continued(source_segments, target_segments_BT, steps=steps, past_tokens=past_tokens)
        return Seq2SeqLMOutput(
            logits=self.lm_head(self._through(decoder_input_ids, mask, positions, cache)),
            past_key_values=cache if use_cache else None,
            encoder_last_hidden_state=states,
        )

    def _read(self, input_ids: Tensor, segments_BS: Tensor, cache: DynamicCache) -> Tensor:
        return self._through(input_ids, causal(segments_BS), positions_in_segment(segments_BS), cache)

    def _through(self, ids_BT: Tensor, mask: Tensor, positions_BT: Tensor, cache: DynamicCache) -> Tensor:
        """Every layer's keys and values join the cache. A mask of four dimensions is taken as it is."""
        read = self.model(
            input_ids=ids_BT, attention_mask=mask, position_ids=positions_BT, past_key_values=cache, use_cache=True
        )
        return read.last_hidden_state
