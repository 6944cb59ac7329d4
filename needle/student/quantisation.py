"""Weights in few bits: whole numbers times a scale, symmetric around 0. Mathematics only; needle.quantise trains."""

# O outputs, I inputs, N groups, G inputs of a group

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from needle.student.matrices import embedding_of, layer_matrices


class Quantised(NamedTuple):
    """weight[o, i] = codes[o, n, g] * scales[o, n, 1] with i = n * G + g. Where G does not divide the inputs, the last
    group is filled up with zeros."""

    codes_ONG: Tensor
    scales_ON1: Tensor


def quantise(weight_OI: Tensor, *, bits: int, group: int | None) -> Quantised:
    """Every group of `group` inputs of one output has a scale of its own; None: all inputs of an output share one.

    scale = max |weight| / L and code = round(weight / scale), from -L to L with L = 2^(bits-1) - 1 (7 for 4 bits, 127
    for 8), so that the error is at most scale / 2 and 0 is exact. A group of zeros has scale 0. The last group is
    shorter where `group` does not divide the inputs. Codes are float32, whole.
    """
    limit = 2 ** (bits - 1) - 1
    outputs, inputs = weight_OI.shape
    width = inputs if group is None else min(group, inputs)
    groups_ONG = F.pad(weight_OI.float(), (0, -inputs % width)).view(outputs, -1, width)
    scales_ON1 = groups_ONG.abs().amax(dim=-1, keepdim=True) / limit
    codes_ONG = (groups_ONG / scales_ON1.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return Quantised(codes_ONG, scales_ON1)


def fake_quantise(weight_OI: Tensor, *, bits: int, group: int | None) -> Tensor:
    """The weight after a way to `bits` and back, in its own type."""
    codes_ONG, scales_ON1 = quantise(weight_OI, bits=bits, group=group)
    restored_OI = (codes_ONG * scales_ON1).flatten(1)
    return restored_OI[:, : weight_OI.shape[1]].to(weight_OI.dtype)


def quantisable(student: nn.Module, *, embedding: bool) -> dict[str, nn.Parameter]:
    """The matrices of attention and feed-forward layers, and the embedding where wanted, by name; tied ones once.

    Norms, gates and biases stay as they are, and so do the matrices of the heads, which are few and narrow.

    Raises:
        ValueError: the student has none.
    """
    layers, embedded = set(layer_matrices(student)), embedding_of(student) if embedding else None
    found = {name: p for name, p in student.named_parameters() if name in layers or p is embedded}
    if not found:
        raise ValueError(f"{type(student).__name__} has no matrices of attention or feed-forward layers to quantise")
    return found
