"""A student in the style of Llama: transformers' own decoder-only network behind the interface of every student.

    python -m needle.train student=llama_style_nano

Rotary positions, RMSNorm before every sublayer, SwiGLU, grouped-query attention, plain residuals (Touvron et al. 2023),
and one tied embedding, as small ones of its kind have. No copy head, no QK-norm, nothing of the Simple Attention
Network: the comparison that shows what those bring. Weights are saved under the names of transformers'
LlamaForCausalLM.

Source and target are one sequence, read in two parts: needle.student.source_first.
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
from needle.student.segments import causal, positions_in_segment
from needle.student.source_first import SourceFirst, SourceRead
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


class LlamaStyle(SourceFirst, LlamaForCausalLM):
    """The student. Its logits are those of the vocabulary. `generate` is not for it: needle.decode answers."""

    config_class = LlamaStyleConfig

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
        if decoder_input_ids is None:
            raise ValueError("the student needs decoder_input_ids")
        begun = self._begun(input_ids, attention_mask, source_segments_BS, encoder_outputs, past_key_values)
        mask, positions = begun.continued(target_segments_BT, steps=decoder_input_ids.shape[1])
        return Seq2SeqLMOutput(
            logits=self.lm_head(self._through(decoder_input_ids, mask, positions, begun.cache)),
            past_key_values=begun.cache if use_cache else None,
            encoder_last_hidden_state=begun.source.last_hidden_state,
        )

    def _read(self, input_ids: Tensor, segments_BS: Tensor, cache: DynamicCache) -> dict[str, Any]:
        states = self._through(input_ids, causal(segments_BS), positions_in_segment(segments_BS), cache)
        return {"last_hidden_state": states, "source_ids": input_ids}

    def _through(self, ids_BT: Tensor, mask: Tensor, positions_BT: Tensor, cache: DynamicCache) -> Tensor:
        """Every layer's keys and values join the cache. A mask of four dimensions is taken as it is."""
        read = self.model(
            input_ids=ids_BT, attention_mask=mask, position_ids=positions_BT, past_key_values=cache, use_cache=True
        )
        return read.last_hidden_state
