"""Masks and positions of packed rows, in which attention never leaves an example.

Segments number a row's examples from 1; 0 is padding. A target's example is the source's of the same number.
"""

# B batch, S source tokens, T target tokens, L tokens of either

import torch
import torch.nn.functional as F
from torch import Tensor


def segments_of(ids_BS: Tensor, attention_mask: Tensor | None, segments_BS: Tensor | None) -> Tensor:
    """[B, S]: the segments given, or one example a row: all of it, or what the mask (1 token, 0 padding) shows."""
    if segments_BS is not None:
        return segments_BS
    return torch.ones_like(ids_BS) if attention_mask is None else attention_mask.to(ids_BS.dtype)


def same_segment(queries_BT: Tensor, keys_BS: Tensor) -> Tensor:
    """[B, 1, T, S]: True within one example. Padding queries see everything, since a row without any key is NaN."""
    same = queries_BT[:, :, None] == keys_BS[:, None, :]
    return (same | (queries_BT == 0)[:, :, None]).unsqueeze(1)


def causal(segments_BT: Tensor) -> Tensor:
    """[B, 1, T, T]: True from a token to those of its example that are not after it."""
    return same_segment(segments_BT, segments_BT).tril()


def positions_in_segment(segments_BL: Tensor) -> Tensor:
    """[B, L]: how many tokens of its own segment stand before a token. Segments are contiguous."""
    place_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    begins_BL = F.pad(segments_BL[:, 1:] != segments_BL[:, :-1], (1, 0), value=True)
    return place_L - torch.where(begins_BL, place_L, 0).cummax(dim=1).values


def lengths_at(source_segments_BS: Tensor, target_segments_BT: Tensor) -> Tensor:
    """[B, T]: the number of source tokens of the example that a target token belongs to."""
    same_BTS = target_segments_BT[:, :, None] == source_segments_BS[:, None, :]
    return same_BTS.sum(dim=-1)


def continued(
    source_segments_BS: Tensor, target_segments_BT: Tensor | None, *, steps: int, past_tokens: int
) -> tuple[Tensor, Tensor]:
    """How a target goes on where its source ends, as one sequence whose source was read before.

    Args:
        target_segments_BT: None: one example a row, of which `past_tokens` target tokens were read before these
            `steps`.

    Returns:
        The mask [B, 1, T, S + past + T] over source, earlier and own target tokens, and positions [B, T].
    """
    segments_BT = target_segments_BT
    if segments_BT is None:
        segments_BT = source_segments_BS.new_ones((len(source_segments_BS), past_tokens + steps))
    to_source, to_target = same_segment(segments_BT, source_segments_BS), causal(segments_BT)
    positions = lengths_at(source_segments_BS, segments_BT) + positions_in_segment(segments_BT)
    mask = torch.cat((to_source, to_target), dim=-1)
    return mask[:, :, -steps:], positions[:, -steps:]
