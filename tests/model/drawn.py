"""Small models and tokens that tests of the forward pass and of caches share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm.infer.cache import Cache, make_cache
from lm.model import (
    Attention,
    FeedForward,
    Layer,
    ModelConfig,
    ModelWeights,
    Tokens,
    forward,
    make_stacks,
    param_specs,
)
from lm.weights import ParamSpec, is_spec, is_structured


def config_of(*attentions: Attention) -> ModelConfig:
    """A small tied model of these layers."""
    layers = tuple(Layer(a, FeedForward(24)) for a in attentions)
    return ModelConfig(50, 16, make_stacks(layers), tied=True, vocab_multiple=8)


def weights(
    config: ModelConfig, seed: int = 0, *, matrices: float = 1.0, others: float = 0.2
) -> ModelWeights:
    """Random weights, norms and biases too, by NumPy: compiling an initializer takes seconds.

    Args:
      config: the model.
      seed: of the draw.
      matrices: scale of matrices, relative to their initial one.
      others: scale of the rest.
    """
    rng = np.random.default_rng(seed)
    mean = {"ones": 1.0, "zeros": 0.0, "normal": 0.0}

    def draw(spec: ParamSpec) -> jax.Array:
        scale = matrices * spec.scale if spec.init == "normal" else others
        return jnp.asarray(rng.normal(mean[spec.init], scale, spec.shape), jnp.float32)

    return jax.tree.map(draw, param_specs(config), is_leaf=is_spec)


def dequantize(params: ModelWeights) -> ModelWeights:
    """With float32 arrays for quantized weights."""
    return jax.tree.map(
        lambda w: w.dequantize(jnp.float32) if is_structured(w) else w, params,
        is_leaf=is_structured,
    )  # fmt: skip


def chunk_of(ids: np.ndarray, starts, stops, width: int) -> Tokens:
    """Tokens [start, stop) of each row, padded on the right with nonsense to `width`."""
    chunk, positions = np.full((len(ids), width), 7), np.full((len(ids), width), 2)
    segments = np.zeros((len(ids), width), np.int32)
    for b, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        n = stop - start
        chunk[b, :n], positions[b, :n] = ids[b, start:stop], np.arange(start, stop)
        segments[b, :n] = 1
    return Tokens(*(jnp.asarray(x, jnp.int32) for x in (chunk, positions, segments)))


@functools.partial(jax.jit, static_argnames="config")
def hidden_and_cache(params, tokens: Tokens, config: ModelConfig, cache=None):
    output = forward(params, tokens, config, cache)
    return output.hidden, output.cache


def assert_chunks_equal_the_whole(
    params: ModelWeights, config: ModelConfig, lengths, chunks, capacity: int
) -> tuple[Cache, ...]:
    """Rows of `lengths` read through a cache in chunks, (new tokens of each row, width), equal the
    whole rows without one. Exactly the slots of real tokens are written. Returns the cache."""
    rows, longest = len(lengths), max(lengths)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (rows, longest))
    whole, _ = hidden_and_cache(params, chunk_of(ids, [0] * rows, lengths, longest), config)
    cache, at = make_cache(config, rows, capacity), [0] * rows
    for sizes, width in chunks:
        stops = [min(a + n, end) for a, n, end in zip(at, sizes, lengths, strict=True)]
        hidden, cache = hidden_and_cache(params, chunk_of(ids, at, stops, width), config, cache)
        for b, (start, stop) in enumerate(zip(at, stops, strict=True)):
            np.testing.assert_allclose(
                hidden[b, : stop - start], whole[b, start:stop], rtol=2e-5, atol=2e-5
            )
        at = stops
    assert at == list(lengths)
    for slots in jax.tree.leaves(cache):
        for b, length in enumerate(lengths):
            assert np.all(slots[b, :, :length].any(axis=(0, 2)))
            assert not slots[b, :, length:].any()
    return cache
