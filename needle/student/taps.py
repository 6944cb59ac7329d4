"""Reads what a student computes inside, without a change to it: hooks that a term beside the loss attaches.

What a forward pass computed is handed over with its outputs, so several passes (micro-batches, a second pass of another
term, decoding) never mix, and nothing outlives the outputs. Cost: references to tensors, no copies.
"""

# B batch, T tokens of the source or the target, H query heads, G key/value heads, E head width, D model width

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from needle.errors import ConfigError

Part = Literal["encoder", "decoder", "cross"]
What = Literal["states", "queries", "keys", "values"]
ATTENTION = {"encoder": "attention", "decoder": "self_attention", "cross": "cross_attention"}
# After QK-norm and before rotation: position is the same for every network, and head widths rotate it differently.
PROJECTION = {"queries": "query_norm", "keys": "key_norm", "values": "value"}


class Point(NamedTuple):
    """A place in a network. `part` cross is the decoder's attention to the source; layers count from 1.

    states   [B, T, D], a layer's output, which the next layer reads (of encoder and decoder)
    queries  [B, T, H * E], after QK-norm, before rotation, heads side by side
    keys     [B, T, G * E], the same; cross: of the source tokens
    values   [B, T, G * E]; cross: of the source tokens
    """

    part: Part
    layer: int
    what: What


class Taps:
    """Collects the tensors at `points` in every forward pass of `network`, with their graph where there is one.

    Raises:
        ValueError: the network has no such point.
    """

    def __init__(self, network: nn.Module, points: Iterable[Point]):
        self.points = tuple(dict.fromkeys(points))
        modules = [_module(network, point) for point in self.points]
        self._found: dict[Point, Tensor] | None = None  # of the pass that is under way
        # Partials of bound methods, so that a deep copy of the network collects for itself.
        self._handles = [network.register_forward_pre_hook(self._begin), network.register_forward_hook(self._end)]
        self._handles += [
            module.register_forward_hook(partial(self._keep, point))
            for point, module in zip(self.points, modules, strict=True)
        ]

    def of(self, outputs: Any) -> dict[Point, Tensor]:
        """What the forward pass that gave `outputs` computed at every point.

        Raises:
            ValueError: that pass was not tapped, or did not reach a point (decoding reuses the encoder's outputs).
        """
        found: Mapping[Point, Tensor] = getattr(outputs, "tapped", {})
        for point in self.points:
            if point not in found:
                raise ValueError(f"these outputs carry nothing of {point}: they come from no whole tapped forward pass")
        return {point: found[point] for point in self.points}

    def remove(self) -> None:
        """Takes the hooks off the network again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, *_: Any) -> None:
        self._found = {}

    def _keep(self, point: Point, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._found is not None:  # None: an encoder that is run alone
            self._found[point] = output.flatten(2)

    def _end(self, _network: nn.Module, _inputs: Any, outputs: Any) -> None:
        # Several taps on one network share the place.
        outputs.tapped = {**getattr(outputs, "tapped", {}), **(self._found or {})}
        self._found = None


def depths(network: Any) -> dict[Part, int]:
    """Number of layers of each part.

    Raises:
        ConfigError: the network is none whose layers can be read.
    """
    if not hasattr(network, "decoder_layers"):
        raise ConfigError(
            f"{type(network).__name__} has no layers that needle.student.taps reads: compare inner layers of "
            "encoder-decoders, student=san_nano to san_large and a teacher of that kind, or leave out "
            "auxiliary=[hidden_states,attention_relations]"
        )
    encoder, decoder = len(network.encoder.layers), len(network.decoder_layers)
    return {"encoder": encoder, "decoder": decoder, "cross": decoder}


def width(network: nn.Module, point: Point) -> int:
    """Of the tensor at a point."""
    module = _module(network, point)
    if isinstance(module, nn.Linear):
        return module.out_features
    config: Any = network.config
    if point.what == "keys":
        return config.kv_heads * config.width // config.heads
    return config.width


def _module(network: Any, point: Point) -> nn.Module:
    layers = network.encoder.layers if point.part == "encoder" else network.decoder_layers
    if not 1 <= point.layer <= len(layers) or (point.part, point.what) == ("cross", "states"):
        raise ValueError(f"there is no {point} in a network of {depths(network)} layers")
    layer = layers[point.layer - 1]
    if point.what == "states":
        return layer
    return layer.get_submodule(f"{ATTENTION[point.part]}.{PROJECTION[point.what]}")
