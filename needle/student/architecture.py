"""What conf/student states: an architecture with its size, of which `build` makes a network for a tokenizer.

Every network that is built answers to the same call, so that losses, weightings, teachers and the decoder know of no
architecture:

    network(input_ids, source_segments_BS, decoder_input_ids, target_segments_BT)      packed rows: .logits [B, T, V]
    encoded = network.get_encoder()(input_ids, attention_mask)                         once a source
    network(decoder_input_ids, encoder_outputs=encoded, attention_mask, past_key_values, use_cache)    step by step

Logits stand at target tokens only, also where source and target are one sequence. `encoded` holds tensors whose first
dimension is the batch, `last_hidden_state` [B, S, D] among them; `network.config` has vocab_size, width, heads and
kv_heads.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from needle.text.tokenizer import TextCodec

# retrieval: a head that tells which tools a request may want. taps: inner layers that needle.student.taps can read.
Offer = Literal["retrieval", "taps"]


class Architecture(ABC):
    """Base of the classes that conf/student names; they are frozen dataclasses.

    `offers`: what terms beside the loss may ask of the network. `retrieval_width`: 0 where it has no retrieval head.
    """

    name: str
    retrieval_width: int
    offers: ClassVar[frozenset[Offer]] = frozenset()

    @abstractmethod
    def build(self, codec: TextCodec) -> PreTrainedModel:
        """A freshly initialised network for a tokenizer; seed torch before."""


def check_heads(*, width: int, heads: int, kv_heads: int) -> None:
    """Raises ValueError when attention with rotary positions cannot be cut so."""
    if width % heads or heads % kv_heads or (width // heads) % 2:
        raise ValueError(
            f"width={width} heads={heads} kv_heads={kv_heads}: width must divide into heads of even width, and heads "
            "into kv_heads"
        )
