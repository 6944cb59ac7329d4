"""One sequence in two parts: a decoder-only student reads the source alone, once, and targets go on from what it left
behind. That is what decoding needs, and gives every student one interface.
"""

# B batch, S source tokens, T target tokens, N layers, G key/value heads, E head width

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from needle.student.segments import continued, segments_of


@dataclass
class SourceRead(BaseModelOutput):
    """A source, read: states, every layer's keys and values [B, N, G, S, E], and what the copy head reads."""

    last_hidden_state: torch.FloatTensor | None = None
    keys: torch.FloatTensor | None = None
    values: torch.FloatTensor | None = None
    tool_scores: torch.FloatTensor | None = None
    copy_keys: torch.FloatTensor | None = None
    source_ids: torch.LongTensor | None = None


def stacked(cache: DynamicCache) -> dict[str, Tensor]:
    """`keys` and `values` of a cache, [B, N, G, S, E] each."""
    return {
        "keys": torch.stack([layer.keys for layer in cache.layers], dim=1),
        "values": torch.stack([layer.values for layer in cache.layers], dim=1),
    }


def unstacked(keys: Tensor, values: Tensor) -> DynamicCache:
    """A cache of their own tensors, which it adds to without changing them."""
    cache = DynamicCache()
    for index, pair in enumerate(zip(keys.unbind(dim=1), values.unbind(dim=1), strict=True)):
        cache.update(*pair, index)
    return cache


@dataclass(frozen=True)
class Begun:
    """A source that was read, as a forward pass over targets finds it, and the cache to go on from."""

    source: Any
    segments_BS: Tensor
    cache: DynamicCache

    def continued(self, target_segments_BT: Tensor | None, *, steps: int) -> tuple[Tensor, Tensor]:
        """Mask and positions of the `steps` target tokens that come now; see needle.student.segments."""
        past_tokens = self.cache.get_seq_length() - self.segments_BS.shape[1]
        return continued(self.segments_BS, target_segments_BT, steps=steps, past_tokens=past_tokens)


class SourceFirst:
    """What decoder-only students share: a source is read alone, once, and targets go on from what it left behind. Goes
    before the network's own class."""

    def _read(self, input_ids: Tensor, segments_BS: Tensor, cache: DynamicCache) -> dict[str, Any]:
        """The fields of SourceRead that the network knows; every layer's keys and values join the cache."""
        raise NotImplementedError

    def get_encoder(self, *_: Any, **__: Any) -> Any:
        return self.read

    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, source_segments_BS: Tensor | None = None
    ) -> SourceRead:
        """The source alone, for targets that go on from it."""
        cache = DynamicCache()
        found = self._read(input_ids, segments_of(input_ids, attention_mask, source_segments_BS), cache)
        return SourceRead(**found, **stacked(cache))

    def _begun(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        source_segments_BS: Tensor | None,
        source: Any,
        cache: DynamicCache | None,
    ) -> Begun:
        """The source as `source` has it, a SourceRead, or read now from `input_ids`.

        Raises:
            ValueError: there is neither.
        """
        if input_ids is None and source is None:
            raise ValueError("the student needs input_ids or encoder_outputs")
        ids = input_ids if source is None else source.source_ids
        segments = segments_of(ids, attention_mask, source_segments_BS)
        if source is None:
            cache = DynamicCache()
            source = SourceRead(**self._read(ids, segments, cache))
        elif cache is None:
            cache = unstacked(source.keys, source.values)
        return Begun(source, segments, cache)
