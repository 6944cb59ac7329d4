"""Which of a student's parameters are matrices of its layers, whatever the architecture calls them."""

from typing import Any, NamedTuple

from torch import Tensor, nn

ATTENTION = frozenset(
    {"attention", "self_attention", "cross_attention", "SelfAttention", "EncDecAttention", "self_attn"}
)
FEED_FORWARD = frozenset({"feed_forward", "DenseReluDense", "mlp"})
QUERIES = frozenset({"query", "q", "q_proj"})
KEYS_VALUES = frozenset({"key", "value", "k", "v", "k_proj", "v_proj"})
OUTPUTS = frozenset({"output", "o", "o_proj"})


class Cut(NamedTuple):
    """`heads`: how many parts a matrix has, one after the other, in its columns (`by_column`) or its rows."""

    heads: int
    by_column: bool


def layer_matrices(network: nn.Module) -> list[str]:
    """The parameters that are matrices of attention and feed-forward layers, in the network's own order.

    Not among them: norms, gates, biases (those of distances too), embeddings and heads.
    """
    return [name for name, parameter in network.named_parameters() if parameter.ndim == 2 and _in_layer(name)]


def cut_of(name: str, *, config: Any) -> Cut:
    """How the heads of attention share the layer matrix of this name; feed-forward layers have no heads."""
    part, role = _part_role(name)
    if part in FEED_FORWARD:
        return Cut(1, by_column=False)
    return Cut(config.kv_heads if role in KEYS_VALUES else config.heads, by_column=role in OUTPUTS)


def embedding_of(network: Any) -> Tensor | None:
    """A student's one embedding, tied to the output; None for other networks."""
    found = getattr(network, "get_input_embeddings", None)
    return found().weight if found is not None else None


def _in_layer(name: str) -> bool:
    part, role = _part_role(name)
    return part in FEED_FORWARD or (part in ATTENTION and role in QUERIES | KEYS_VALUES | OUTPUTS)


def _part_role(name: str) -> tuple[str, str]:
    owner, _, role = name.removesuffix(".weight").rpartition(".")
    return owner.rpartition(".")[2], role
