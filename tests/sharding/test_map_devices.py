"""Every kernel and exchange is right under `vmap(spmd_axis_name="stage")`, as pipelines call it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.kernels.attention import Scores, View, attention
from lm.kernels.cross_entropy import token_logprobs
from lm.kernels.embedding import lookup
from lm.kernels.paged_attention import PageBatch, make_pages, paged_attention, write_pages
from lm.parallel import distribute_matrices, ring_attention, ulysses_attention
from lm.sharding import Layout, MeshShape, current_layout, make_mesh, make_rules, use_layout

STAGES, B, T = 2, 4, 16


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(STAGES, *shape)).astype(np.float32)


def positions(stage_ids):
    """[B, T] of each stage, and segments: two documents in a row, cut where the stage says."""
    first = jnp.arange(T)[None] < 4 + stage_ids[:, :1]
    return jnp.where(first, jnp.arange(T), jnp.arange(T) - 4), jnp.where(first, 1, 2)


def attend(function: Any, q, k, v, ids):
    where, segments = positions(ids)
    return function(q, k, v, View(where, where, segments, segments), Scores(0.3, window=9))


def flash(*arrays):
    kernel = "flash" if current_layout() else "reference"
    return attend(functools.partial(attention, implementation=kernel), *arrays)


def cross_entropy(hidden, weight, ids):
    kernel = "fused" if current_layout() else "reference"
    options = {"transposed": False, "vocab_size": 30, "implementation": kernel}
    return sum(token_logprobs(hidden, weight, ids % 30, chunk_tokens=5, **options))


def paged(q, k, v):
    """Written to pages and read from them again: a prompt of eleven, and one token after two."""
    given = [[2, 0], [1, 3]], [11, 3], [0, 11, 12]
    batch = PageBatch(*(jnp.array(x, jnp.int32) for x in given))
    pages = make_pages(4, 8, 2, 8, dtype=jnp.float32)
    how = {"implementation": "tpu" if current_layout() else "reference", "interpret": True}
    pages = write_pages(pages, k, v, batch, **how)
    return paged_attention(q, pages, batch, Scores(0.3), **how)


def inverse(matrices):
    return distribute_matrices(lambda x: jnp.linalg.inv(x + 9.0 * jnp.eye(4)), matrices)


IDS = np.random.default_rng(0).integers(0, 32, (STAGES, B, T)).astype(np.int32)
QKV = (normal(1, B, T, 4, 8), normal(2, B, T, 4, 8), normal(3, B, T, 4, 8))
AXES = {"fsdp": 2, "tensor": 2}
# What runs, the mesh beside `stage`, and the arguments of every stage; integers have no gradient.
CASES = {
    "flash": (flash, AXES, (*QKV, IDS)),
    "ring": (functools.partial(attend, ring_attention), {"context": 2, "tensor": 2}, (*QKV, IDS)),
    "ulysses": (
        functools.partial(attend, ulysses_attention), {"context": 2, "data": 2}, (*QKV, IDS)
    ),
    "cross-entropy": (cross_entropy, AXES, (normal(4, B, T, 8), normal(5, 8, 32), IDS)),
    "lookup": (lookup, AXES, (normal(6, 32, 8), IDS)),
    "paged": (paged, AXES, (normal(7, 12, 4, 8), normal(8, 12, 2, 8), normal(9, 12, 2, 8))),
    "matrices": (inverse, AXES, (normal(10, 3, 4, 4),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_under_vmap_it_is_what_one_device_computes(name):
    """Values and, where there are gradients, those of the sum of sines of the values."""
    function, axes, arrays = CASES[name]
    layout = Layout(make_mesh(MeshShape(stage=STAGES, **axes)), make_rules())

    def over_stages(layout, *arrays):
        floats = tuple(i for i, x in enumerate(arrays) if x.dtype == jnp.float32)

        def one(*arrays):
            with use_layout(layout):
                if name == "paged":
                    return function(*arrays)
                out, pull = jax.vjp(
                    lambda *given: function(*given, *arrays[len(floats) :]), *arrays[: len(floats)]
                )
                return out, pull(jnp.cos(out))

        return jax.vmap(one, spmd_axis_name="stage" if layout else None)(*arrays)

    expected = jax.jit(functools.partial(over_stages, None))(*arrays)
    split = NamedSharding(layout.mesh, PartitionSpec("stage"))
    over_mesh = functools.partial(over_stages, layout.inside_vmap("stage"))
    traced = jax.jit(over_mesh, in_shardings=split).trace(*arrays)
    assert "shard_map" in str(traced.jaxpr)
    actual = traced.lower().compile()(*arrays)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-6 * np.max(np.abs(y)))
