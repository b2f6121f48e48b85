"""Prefill and decode through the cache equal the forward pass without one."""

import dataclasses
import random

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
    make_stacks,
    unstack,
)
from tests.model.drawn import assert_chunks_equal_the_whole, hidden_and_cache, weights

CAPACITY = 16


def drawn_config(seed: int) -> ModelConfig:
    """A small model of drawn features: a local/global pattern with a remainder, or equal layers."""
    draw = random.Random(seed)
    num_heads = draw.choice([2, 4, 6])
    num_kv_heads = draw.choice([d for d in (1, 2, 3, 6) if num_heads % d == 0])
    rope = draw.choice([Rope(), Rope(theta=500.0), Rope(fraction=0.5), None])
    placement = draw.choice(["pre", "post", "both"])

    softcap = draw.choice([None, 2.0])
    qk_norm = draw.choice([None, "head", "full"])
    bias = draw.random() < 0.3
    windows = draw.choice([(None,) * 2, (3,) * 2, (3, None, 3, None, 3), (None, 5)])
    attention = Attention(num_heads, num_kv_heads, 8, rope, softcap=softcap, bias=bias,
                          qk_norm=qk_norm)  # fmt: skip
    norm = Norm(kind="layer", bias=True) if bias else Norm(plus_one=softcap is not None)
    layer = Layer(attention, FeedForward(24, gated=not bias, bias=bias), norm, placement, bias)
    layers = tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(attention, window=window))
        for window in windows
    )
    return ModelConfig(50, 16, make_stacks(layers), tied=True, vocab_multiple=8, embed_scale=4.0)


@pytest.mark.parametrize(
    "seed", [0, 2, 6, *[pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 5)]]
)
def test_chunks_equal_the_whole(seed):
    """Ragged prompts, then a chunk of several tokens, then single ones; rows end one by one.
    Weights are stacked or not."""
    config = drawn_config(seed)
    params = weights(config, seed)
    chunks = [((7, 2, 4), 8), ((3, 1, 3), 3), *[((1, 1, 1), 1)] * 3]
    params = unstack(params) if seed % 2 else params
    assert_chunks_equal_the_whole(params, config, (13, 6, 10), chunks, CAPACITY)


def test_a_used_cache_is_as_good_as_an_empty_one():
    """What a longer row left behind is never seen."""
    config = drawn_config(1)
    params = weights(config)
    _, used = hidden_and_cache(
        params, Tokens.of(jnp.full((1, CAPACITY), 9)), config, make_cache(config, 1, CAPACITY)
    )
    short = Tokens.of(jnp.array([[3, 1, 4]]))
    again, _ = hidden_and_cache(params, short, config, used)
    fresh, _ = hidden_and_cache(params, short, config, make_cache(config, 1, CAPACITY))
    np.testing.assert_array_equal(again, fresh)


def test_positions_beyond_the_cache_are_not_written():
    config = drawn_config(0)
    params = weights(config)
    tokens = Tokens.of(jnp.array([[3, 1, 4, 1, 5]]))
    _, full = hidden_and_cache(params, tokens, config, make_cache(config, 1, 5))
    _, short = hidden_and_cache(params, tokens, config, make_cache(config, 1, 3))
    np.testing.assert_allclose(short[0].keys.values, full[0].keys.values[:, :, :3], rtol=1e-6)
