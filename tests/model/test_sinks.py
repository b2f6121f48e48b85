"""Attention sinks: a learned score per head that takes weight and has no value (GPT-OSS)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.infer.cache import in_pages, make_cache, own_page_table
from lm.model import Attention, FeedForward, Layer, ModelConfig, Stack, Tokens, forward
from lm.parallel import context_attention
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from tests.model.drawn import weights

SINKS = Attention(4, 2, 16, rope=None, sinks=True)
CONFIG = ModelConfig(50, 16, (Stack((Layer(SINKS, FeedForward(24)),), 1),), vocab_multiple=8)
IDS = np.random.default_rng(2).integers(0, 50, (2, 12))


@pytest.fixture(scope="module")
def params():
    return weights(CONFIG, matrices=3.0, others=1.0)


def rms(x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5)


def in_float64(params, window=None):
    """The formula: softmax over [scores, sink], the sink's column dropped."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layer = jax.tree.map(lambda x: x[0], w.stacks[0].layers[0])
    a, f = layer.attention, layer.feed_forward
    x = w.embed[IDS]
    B, T, _ = x.shape
    y = rms(x) * layer.attention_norm.scale
    q, k, v = ((y @ m).reshape(B, T, -1, 16) for m in (a.query, a.key, a.value))
    k, v = (np.repeat(z, 2, axis=2) for z in (k, v))
    scores = np.einsum("bthx,bshx->bhts", q, k) / 4
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance < (window or T))
    scores = np.where(seen, scores, -np.inf)
    sinks = np.broadcast_to(a.sinks[:, None, None], (B, 4, T, 1))
    weights = np.exp(np.concatenate([scores, sinks], -1))
    weights = (weights / weights.sum(-1, keepdims=True))[..., :-1]
    x = x + np.einsum("bhts,bshx->bthx", weights, v).reshape(B, T, -1) @ a.out
    y = rms(x) * layer.feed_forward_norm.scale
    gate = y @ f.gate
    x = x + (gate / (1 + np.exp(-gate)) * (y @ f.up)) @ f.down
    return rms(x) * w.norm.scale


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", [None, "contiguous", "sliding", "paged"])
def test_equals_the_formula(params, kind, window):
    """Whole rows, and two chunks and single tokens through every cache."""
    layer = Layer(dataclasses.replace(SINKS, window=window), FeedForward(24))
    config = dataclasses.replace(CONFIG, stacks=(Stack((layer,), 1),))
    ids = jnp.asarray(IDS, jnp.int32)
    if kind is None:
        found = forward(params, Tokens.of(ids), config).hidden
    else:
        step = jax.jit(lambda tokens, cache: forward(params, tokens, config, cache))
        cache, parts = make_cache(config, 2, 12, kind=kind), []
        for start, stop in ((0, 7), (7, 10), (10, 11), (11, 12)):
            positions = jnp.tile(jnp.arange(start, stop, dtype=jnp.int32), (2, 1))
            tokens = Tokens(ids[:, start:stop], positions)
            if kind == "paged":
                tokens = in_pages(tokens, own_page_table(cache, 2))
            output = step(tokens, cache)
            cache = output.cache
            parts.append(output.hidden)
        found = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(found, in_float64(params, window), rtol=2e-4, atol=2e-4)


def test_over_a_split_sequence(params):
    """Ulysses gives each device its heads' sinks; a ring refuses them."""
    layout = Layout(make_mesh(MeshShape(context=2, tensor=2), jax.devices()[:4]), make_rules())

    def run(way):
        with use_layout(layout):
            attention = context_attention(way, "reference")
            tokens = Tokens.of(jnp.asarray(IDS, jnp.int32))
            return forward(params, tokens, CONFIG, attention=attention).hidden

    found = jax.jit(run, static_argnums=0)("ulysses")
    np.testing.assert_allclose(found, in_float64(params), rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="ring attention has no sinks; use context='ulysses'"):
        run("ring")


def test_they_learn(params):
    """The gradient of a sink is that of finite differences."""

    def loss(sinks):
        layer = params.stacks[0].layers[0]
        attention = dataclasses.replace(layer.attention, sinks=sinks)
        layers = (dataclasses.replace(layer, attention=attention),)
        stacks = (dataclasses.replace(params.stacks[0], layers=layers),)
        changed = dataclasses.replace(params, stacks=stacks)
        hidden = forward(changed, Tokens.of(jnp.asarray(IDS, jnp.int32)), CONFIG).hidden
        return jnp.sum(hidden[..., :5])

    sinks = params.stacks[0].layers[0].attention.sinks
    found = np.asarray(jax.jit(jax.grad(loss))(sinks))
    value = jax.jit(loss)
    for head in range(4):
        step = 0.02 * jax.nn.one_hot(head, 4)[None]
        slope = (value(sinks + step) - value(sinks - step)) / 0.04
        np.testing.assert_allclose(found[0, head], slope, rtol=0.02, atol=0.02)
