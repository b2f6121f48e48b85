"""Prefill and decode through the cache equal the forward pass without one."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.infer.cache import make_cache
from lm.model import (
    Attention,
    FeedForward,
    Layer,
    ModelConfig,
    Norm,
    Rope,
    Tokens,
    forward,
    make_stacks,
    unstack,
)
from tests.model.drawn import chunk_of, weights

LENGTHS = (13, 6, 10)  # of the whole rows
CAPACITY = 16


def drawn_config(seed: int) -> ModelConfig:
    """A small model of drawn features: a local/global pattern with a remainder, or equal layers."""
    draw = random.Random(seed)
    num_heads = draw.choice([2, 4, 6])
    num_kv_heads = draw.choice([d for d in (1, 2, 3, 6) if num_heads % d == 0])
    rope = draw.choice([Rope(), Rope(theta=500.0), Rope(fraction=0.5), None])
    placement = draw.choice(["pre", "post", "both"])

    def layer(window: int | None) -> Layer:
        attention = Attention(
            num_heads,
            num_kv_heads,
            head_dim=8,
            rope=rope,
            window=window,
            softcap=draw_softcap,
            qk_norm=qk_norm,
            bias=bias,
        )
        feed_forward = FeedForward(24, gated=not bias, bias=bias)
        norm = Norm(kind="layer", bias=True) if bias else Norm(plus_one=draw_softcap is not None)
        return Layer(attention, feed_forward, norm, placement, parallel=bias)

    draw_softcap = draw.choice([None, 2.0])
    qk_norm = draw.choice([None, "head", "full"])
    bias = draw.random() < 0.3
    windows = draw.choice([(None,) * 2, (3,) * 2, (3, None, 3, None, 3), (None, 5)])
    layers = tuple(layer(window) for window in windows)
    return ModelConfig(50, 16, make_stacks(layers), tied=True, vocab_multiple=8, embed_scale=4.0)


@functools.partial(jax.jit, static_argnames="config")
def run(params, tokens, config, cache=None):
    output = forward(params, tokens, config, cache)
    return output.hidden, output.cache


@pytest.mark.parametrize("seed", [0, 1, 2, 5, 6])
def test_chunks_equal_the_whole(seed):
    """Ragged prompts, then a chunk of several tokens, then single ones; rows end one by one."""
    config = drawn_config(seed)
    params = weights(config, seed)
    if seed % 2:
        params = unstack(params)
    ids = np.random.default_rng(seed).integers(0, 50, (3, max(LENGTHS)))
    whole, _ = run(params, chunk_of(ids, [0, 0, 0], list(LENGTHS), max(LENGTHS)), config)

    cache = make_cache(config, 3, CAPACITY)
    at = [0, 0, 0]
    for sizes, width in [((7, 2, 4), 8), ((3, 1, 3), 3), *[((1, 1, 1), 1)] * 3]:
        stops = [min(a + n, end) for a, n, end in zip(at, sizes, LENGTHS, strict=True)]
        hidden, cache = run(params, chunk_of(ids, at, stops, width), config, cache)
        for b in range(3):
            np.testing.assert_allclose(
                hidden[b, : stops[b] - at[b]], whole[b, at[b] : stops[b]], rtol=2e-5, atol=2e-5
            )
        at = stops
    assert at == [13, 6, 10]
    for layer in cache:
        for b, length in enumerate(LENGTHS):
            assert np.all(layer.keys.values[b, :length].any(axis=(-1, -2)))
            assert not layer.keys.values[b, length:].any()
            assert not layer.values.values[b, length:].any()


def test_stacked_and_unstacked_weights_agree():
    config = drawn_config(1)
    params = weights(config)
    tokens = Tokens.of(jnp.arange(12).reshape(2, 6))
    for one, other in zip(
        jax.tree.leaves(run(params, tokens, config, make_cache(config, 2, 8))),
        jax.tree.leaves(run(unstack(params), tokens, config, make_cache(config, 2, 8))),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_a_used_cache_is_as_good_as_an_empty_one():
    """What a longer row left behind is never seen."""
    config = drawn_config(1)
    params = weights(config)
    _, used = run(
        params, Tokens.of(jnp.full((1, CAPACITY), 9)), config, make_cache(config, 1, CAPACITY)
    )
    short = Tokens.of(jnp.array([[3, 1, 4]]))
    again, _ = run(params, short, config, used)
    fresh, _ = run(params, short, config, make_cache(config, 1, CAPACITY))
    np.testing.assert_array_equal(again, fresh)


def test_positions_beyond_the_cache_are_not_written():
    config = drawn_config(0)
    params = weights(config)
    tokens = Tokens.of(jnp.array([[3, 1, 4, 1, 5]]))
    _, full = run(params, tokens, config, make_cache(config, 1, 5))
    _, short = run(params, tokens, config, make_cache(config, 1, 3))
    np.testing.assert_allclose(short[0].keys.values, full[0].keys.values[:, :3], rtol=1e-6)
