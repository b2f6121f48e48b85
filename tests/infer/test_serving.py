"""The serving form: the same model, in panels where that is worth while."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.infer.serving import serving_form
from lm.model import Attention, FeedForward, Layer, ModelConfig, Stack, Tokens, forward, make_head
from lm.model.params import unstack
from lm.sharding import MeshShape, make_mesh
from lm.weights import NF4, Int8, LoRA, Panels
from tests.model.drawn import weights

CONFIG = ModelConfig(61, 32, (Stack((Layer(Attention(4, 2, 8), FeedForward(96)),), 2),))


def any_panels(params) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Panels))
    return any(isinstance(x, Panels) for x in leaves)


def logits(params, config):
    ids = jnp.array([[5, 3, 8, 1], [9, 2, 60, 4]])
    hidden = forward(params, Tokens.of(ids), config).hidden
    return jax.jit(make_head(params, config).logits)(hidden)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_same_model(tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    params = weights(config)
    serving = serving_form(params, jnp.float32)
    attention = serving.stacks[0].layers[1].attention
    assert isinstance(attention.query, Panels)
    assert not isinstance(attention.key, Panels)  # 16 columns
    assert isinstance(serving.embed, Panels) == tied
    assert isinstance(serving.output, Panels) != tied
    np.testing.assert_allclose(logits(serving, config), logits(params, config), atol=1e-5)
    again = serving_form(serving, jnp.float32)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (serving, again)), strict=True))


def test_what_is_kept():
    params = weights(CONFIG)
    assert not any_panels(serving_form(params, jnp.float16))
    assert isinstance(serving_form(params, jnp.bfloat16).embed, jax.Array)
    layer = serving_form(params, jnp.float32).stacks[0].layers[0]
    gate = layer.feed_forward.gate.dequantize(jnp.float32)
    adapted = LoRA(gate, jnp.ones((32, 64)), jnp.ones((64, 96)), jnp.float32(1))
    tree = dataclasses.replace(params, output=None, embed=Int8.quantize(params.embed))
    unstacked = dataclasses.replace(
        serving_form(tree, jnp.float32).stacks[0],
        layers=(dataclasses.replace(layer, feed_forward=dataclasses.replace(
            layer.feed_forward, gate=adapted)),),
    )  # fmt: skip
    found = serving_form(dataclasses.replace(tree, stacks=(unstacked,)), jnp.float32)
    assert isinstance(found.embed, Int8)
    gate = found.stacks[0].layers[0].feed_forward.gate
    assert isinstance(gate.base, Panels)
    assert isinstance(gate.b, jax.Array)


def test_what_was_cut_may_be_given_up():
    params = unstack(weights(CONFIG))
    expected = logits(params, CONFIG)
    serving = serving_form(params, jnp.float32, donate=True)
    attention = params.stacks[0].layers[0].attention
    assert attention.query.is_deleted() and not attention.key.is_deleted()
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
    params = jax.device_put(weights(CONFIG), places)
    assert not any_panels(serving_form(params, jnp.float32))
