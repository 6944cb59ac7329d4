"""Taps read what the network computes, pass by pass, and change nothing."""

# B batch, S source tokens, T target tokens, D model width

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from needle.student import SANConfig, SANForConditionalGeneration
from needle.student.taps import Point, Taps, width

STATES = [Point("encoder", 1, "states"), Point("encoder", 2, "states"), Point("decoder", 1, "states")]
VECTORS = [Point(part, 1, what) for part in ("encoder", "decoder", "cross") for what in ("queries", "keys", "values")]


@pytest.fixture
def network() -> SANForConditionalGeneration:
    torch.manual_seed(0)
    config = SANConfig(
        vocab_size=64, width=16, heads=4, kv_heads=2, encoder_layers=2, decoder_layers=1, copy=False, qk_norm=True
    )
    return SANForConditionalGeneration(config)


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(8, 64, (2, 7), generator=generator),
        "source_segments_BS": torch.tensor([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 2]]),
        "decoder_input_ids": torch.randint(8, 64, (2, 5), generator=generator),
        "target_segments_BT": torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 2, 2]]),
    }


def test_states_are_what_the_next_layer_reads(network):
    taps = Taps(network, STATES)
    outputs = network(**inputs())
    found = taps.of(outputs)
    assert torch.equal(network.encoder.norm(found[STATES[1]]), outputs.encoder_last_hidden_state)
    assert torch.equal(network.norm(found[STATES[2]]) @ network.embedding.weight.T, outputs.logits)


def test_vectors_are_those_of_the_attention_before_rotation(network):
    taps = Taps(network, [*VECTORS, *STATES])
    outputs = network(**inputs())
    found, layer = taps.of(outputs), network.decoder_layers[0]
    embedded_BSD = network.embedding(inputs()["input_ids"]) * math.sqrt(16)
    normed_BSD = network.encoder.layers[0].attention_residual.norm(embedded_BSD)
    attention, memory_BSD = network.encoder.layers[0].attention, outputs.encoder_last_hidden_state
    expected = {
        Point("encoder", 1, "queries"): attention.query_norm(attention.query(normed_BSD).unflatten(-1, (4, 4))),
        Point("encoder", 1, "keys"): attention.key_norm(attention.key(normed_BSD).unflatten(-1, (2, 4))),
        Point("encoder", 1, "values"): attention.value(normed_BSD),
        Point("cross", 1, "keys"): layer.cross_attention.key_norm(
            layer.cross_attention.key(memory_BSD).unflatten(-1, (2, 4))
        ),
        Point("cross", 1, "values"): layer.cross_attention.value(memory_BSD),
    }
    for point, tensor in expected.items():
        assert torch.equal(found[point], tensor.flatten(2)), point
    # The decoder's self-attention: first tokens see themselves alone, so what comes out is their own values.
    first_B2D = found[Point("decoder", 1, "values")][:, :1].unflatten(-1, (2, 4)).repeat_interleave(2, dim=2).flatten(2)
    captured: list[Tensor] = []
    handle = layer.self_attention.output.register_forward_pre_hook(lambda _, given: captured.append(given[0]))
    network(**inputs())
    handle.remove()
    assert torch.allclose(captured[0][:, :1], first_B2D)
    for point in VECTORS:
        length = 7 if point.part == "encoder" or (point.part == "cross" and point.what != "queries") else 5
        assert found[point].shape == (2, length, width(network, point)), point


def test_every_pass_carries_its_own(network):
    taps, others = Taps(network, STATES), Taps(network, VECTORS[:2])
    passes = [network(**inputs(seed)) for seed in (0, 1)]
    with torch.no_grad():
        network(**inputs(2))
    states = [taps.of(outputs)[STATES[1]] for outputs in passes]
    for outputs, state in zip(passes, states, strict=True):
        assert torch.equal(network.encoder.norm(state), outputs.encoder_last_hidden_state)
        assert state.grad_fn is not None
        assert set(others.of(outputs)) == set(VECTORS[:2])
    assert not torch.allclose(*states)
    with torch.no_grad():
        assert not taps.of(network(**inputs()))[STATES[0]].requires_grad


def test_taps_change_nothing_and_go_away(network):
    before, keys = network(**inputs()).logits, list(network.state_dict())
    taps = Taps(network, [*STATES, *VECTORS])
    assert torch.equal(network(**inputs()).logits, before)
    assert list(network.state_dict()) == keys
    taps.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with pytest.raises(ValueError, match="no whole tapped forward pass"):
        taps.of(network(**inputs()))


def test_nothing_outlives_the_outputs(network):
    taps = Taps(network, STATES)
    outputs = network(**inputs())
    state = weakref.ref(taps.of(outputs)[STATES[0]])
    assert state() is not None
    del outputs
    gc.collect()
    assert state() is None


def test_a_copy_of_the_network_collects_for_itself(network):
    taps = Taps(network, STATES)
    network(**inputs())
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.embedding.weight.mul_(2)
    outputs = network(**inputs())
    twin(**inputs(1))
    assert torch.equal(network.encoder.norm(taps.of(outputs)[STATES[1]]), outputs.encoder_last_hidden_state)


def test_decoding_goes_on_and_its_steps_are_refused(network):
    taps = Taps(network.eval(), STATES)
    encoded = network.get_encoder()(input_ids=inputs()["input_ids"])
    step: Any = network(decoder_input_ids=inputs()["decoder_input_ids"], encoder_outputs=encoded, use_cache=True)
    step = network(
        decoder_input_ids=inputs()["decoder_input_ids"][:, :1],
        encoder_outputs=encoded,
        past_key_values=step.past_key_values,
        use_cache=True,
    )
    assert step.logits.shape == (2, 1, 64)
    with pytest.raises(ValueError, match="no whole tapped forward pass"):
        taps.of(step)


@pytest.mark.parametrize(
    "point", [Point("encoder", 3, "states"), Point("decoder", 0, "keys"), Point("cross", 1, "states")]
)
def test_places_that_are_not_there_are_refused(network, point):
    with pytest.raises(ValueError, match=r"there is no Point.*'encoder': 2, 'decoder': 1"):
        Taps(network, [point])
    assert not network._forward_hooks


def test_a_compiled_step_reads_the_same_in_one_graph(network):
    taps, given = Taps(network, [STATES[1], VECTORS[0]]), inputs()

    def squares() -> Tensor:
        return torch.stack([tensor.square().sum() for tensor in taps.of(network(**given)).values()]).sum()

    expected = squares()
    compiled = torch.compile(squares, backend="eager", fullgraph=True)()
    assert torch.allclose(compiled, expected)
    weight = network.encoder.layers[0].attention.query.weight
    assert torch.allclose(*(torch.autograd.grad(value, weight)[0] for value in (compiled, expected)))
