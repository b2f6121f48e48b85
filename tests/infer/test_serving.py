"""The serving form: the same model, quantized weights as the CPU reads them fastest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.infer.serving import serving_form
from lm.kernels.cpu.native import available
from lm.model import Attention, FeedForward, Layer, ModelConfig, Stack, Tokens, forward, make_head
from lm.model.params import unstack
from lm.sharding import MeshShape, make_mesh
from lm.weights import NF4, Int4, Int8, LoRA, Words, is_structured
from tests.model.drawn import weights

CONFIG = ModelConfig(61, 32, (Stack((Layer(Attention(4, 2, 8), FeedForward(96)),), 2),))


def any_words(params) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=is_structured)
    return any(isinstance(x, Words) for x in leaves)


def quantized(params):
    return jax.tree.map(lambda x: Int4.quantize(x, 32) if x.ndim == 2 else x, unstack(params))


def logits(params, config):
    ids = jnp.array([[5, 3, 8, 1], [9, 2, 60, 4]])
    hidden = forward(params, Tokens.of(ids), config).hidden
    return jax.jit(make_head(params, config).logits)(hidden)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_same_model(tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    params = quantized(weights(config))
    serving = serving_form(params, jnp.float32)
    attention = serving.stacks[0].layers[1].attention
    native = available("products")
    assert isinstance(attention.query, Words) == native
    assert isinstance(serving.embed, Words) == native
    np.testing.assert_allclose(logits(serving, config), logits(params, config), atol=1e-5)
    again = serving_form(serving, jnp.float32)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (serving, again)), strict=True))


def test_what_is_kept():
    params = weights(CONFIG)
    assert not any_words(serving_form(params, jnp.float32))
    layer = unstack(params).stacks[0].layers[0]
    base = Int4.quantize(layer.feed_forward.gate, 32)
    adapted = LoRA(base, jnp.ones((32, 64)), jnp.ones((64, 96)), jnp.float32(1))
    tree = dataclasses.replace(params, output=None, embed=Int8.quantize(params.embed))
    unstacked = dataclasses.replace(
        unstack(params).stacks[0],
        layers=(dataclasses.replace(layer, feed_forward=dataclasses.replace(
            layer.feed_forward, gate=adapted)),),
    )  # fmt: skip
    found = serving_form(dataclasses.replace(tree, stacks=(unstacked,)), jnp.float32)
    assert isinstance(found.embed, Int8)
    gate = found.stacks[0].layers[0].feed_forward.gate
    assert isinstance(gate.base, Words) == available("products")
    assert isinstance(gate.b, jax.Array)


def test_what_has_a_new_form_may_be_given_up():
    if not available("products"):
        pytest.skip("no C++ compiler")
    params = quantized(weights(CONFIG))
    expected = logits(params, CONFIG)
    serving = serving_form(params, jnp.float32, donate=True)
    assert params.stacks[0].layers[0].attention.query.values.is_deleted()
    np.testing.assert_allclose(logits(serving, CONFIG), expected, atol=1e-5)


def test_scales_of_scales_are_decoded_once():
    nested = NF4.quantize(jax.random.normal(jax.random.key(0), (128, 96)))
    params = dataclasses.replace(weights(CONFIG), embed=nested)
    plain = serving_form(params, jnp.float32).embed
    assert plain.nested is None and plain.absmax.dtype == jnp.float32
    assert plain.bits_per_weight == 4.5
    np.testing.assert_array_equal(plain.dequantize(jnp.float32), nested.dequantize(jnp.float32))


def test_weights_on_several_devices_stay_whole():
    mesh = make_mesh(MeshShape(tensor=2), jax.devices()[:2])
    places = jax.NamedSharding(mesh, jax.P())
    params = jax.device_put(quantized(weights(CONFIG)), places)
    assert not any_words(serving_form(params, jnp.float32))
