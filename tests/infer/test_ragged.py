"""Flat batches of several sequences through paged caches equal each sequence by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.infer.cache import make_cache, make_page_table
from lm.kernels.paged_attention import PageBatch
from lm.model import Attention, Latent, Tokens, forward
from tests.model.drawn import config_of, weights

DENSE = Attention(4, 2, 16)
LAYERS = {
    "dense": (DENSE, dataclasses.replace(DENSE, sinks=True)),
    "windowed": (dataclasses.replace(DENSE, window=6, softcap=5.0), DENSE),
    "latent": (Attention(4, 4, 24, latent=Latent(32, nope_dim=16, rope_dim=8, value_dim=16)),),
}
PAGE, WIDTH, POOL = 8, 5, 24
LENGTHS = (35, 3, 17, 26)
# New tokens of each sequence in each batch: a long chunk, a short prompt, and single tokens.
BATCHES = ((20, 3, 0, 25), (15, 0, 16, 1), (0, 0, 1, 0))


@pytest.mark.parametrize("name", LAYERS)
def test_a_flat_batch_equals_its_sequences(name):
    """Prompts in chunks, short prompts and decoding mixed, with padding at the end; pages anywhere.
    The page table and lengths are given once, for all layers."""
    config = config_of(*LAYERS[name])
    params, rng = weights(config, matrices=3.0, others=0.3), np.random.default_rng(1)
    texts = [rng.integers(0, 50, n) for n in LENGTHS]
    pages = rng.permutation(POOL)[: WIDTH * len(texts)].reshape(len(texts), WIDTH)
    table = jnp.asarray(make_page_table(pages.tolist(), WIDTH))
    step = jax.jit(functools.partial(forward, config=config))
    cache = make_cache(config, 1, 1, kind="paged", page_size=PAGE, num_pages=POOL)
    at, found = np.zeros(len(texts), int), [[] for _ in texts]
    for sizes in BATCHES:
        stops = at + sizes
        spans = [np.arange(a, b) for a, b in zip(at, stops, strict=True)]
        ids = np.concatenate([text[span] for text, span in zip(texts, spans, strict=True)])
        flat = (np.pad(x, (0, 48 - len(x)))[None] for x in (ids, np.concatenate(spans)))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        batch = PageBatch(table, *(jnp.asarray(x, jnp.int32) for x in (stops, starts)))
        tokens = Tokens(*(jnp.asarray(x, jnp.int32) for x in flat), pages=batch)
        output = step(params, tokens, cache=cache)
        cache = output.cache
        for i, (start, size) in enumerate(zip(starts, sizes, strict=False)):
            found[i].append(np.asarray(output.hidden[0, start : start + size]))
        at = stops
    assert tuple(at) == LENGTHS
    for text, parts in zip(texts, found, strict=True):
        expected = step(params, Tokens.of(jnp.asarray(text[None], jnp.int32))).hidden[0]
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=2e-5, atol=2e-5)
