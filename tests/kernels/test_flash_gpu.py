"""Flash attention for Hopper: compiled for an H200, refusals, and which blocks it looks at.

No test of its numerics is here: they need the GPU (`python -m experiments.benchmark kernels`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.hardware import topologies
from lm.kernels.attention import Scores, View
from lm.kernels.attention.flash_gpu import TABLE, flash_attention_gpu, ranges
from lm.kernels.attention.flash_gpu_kernels import Tile
from lm.kernels.attention.reference import mask
from lm.kernels.attention.schedule import pairs
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from tests.kernels.calls import attention
from tests.refuses import refuses


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5, 20])
def test_a_tile_meets_all_blocks_it_sees_and_masks_where_it_must(packed, in_order, causal, window):
    rng = np.random.default_rng(0)
    B, T, query, key = 3, 48, 8, 4
    lengths = rng.integers(1, 20, (B, T))
    segments = np.stack([np.repeat(np.arange(T), row)[:T] for row in lengths]) + 1
    positions = np.tile(np.arange(T), (B, 1))
    if not in_order:
        positions = np.stack([rng.permutation(row) for row in positions])
    positions, segments = positions.astype(np.int32), segments.astype(np.int32)
    rows = [segments] * 2 if packed else [None] * 2
    view, scores = View(positions, positions, *rows, in_order), Scores(1.0, causal, window)
    seen = np.asarray(mask(view, scores))
    possible, whole = pairs(view, query, key, scores)
    for across in (False, True):
        if across:  # tiles of keys, blocks of queries
            possible, whole, seen = (x.swapaxes(1, 2) for x in (possible, whole, seen))
            query, key = key, query
        found = ranges(possible, whole)
        skipped = 0
        for b in range(B):
            for tile, limits in enumerate(np.asarray(found.table)[b % len(found.table)]):
                first, start, stop, end = limits * key
                mine = seen[b, tile * query : (tile + 1) * query]
                assert first <= start <= stop <= end <= T
                assert not mine[:, :first].any() and not mine[:, end:].any()
                assert mine[:, start:stop].all()
                assert found.masked_before or first == start
                assert found.masked_after or stop == end
                skipped += T - (end - first)
        assert skipped > 0 or not (causal and in_order)


def compiled(T=4096, batch=2, H=32, K=8, h=128, packed=False, devices=1, gradient=True, **options):
    """The text of attention compiled for H200s."""
    if not topologies.available("h200"):
        pytest.skip("compiling for GPUs needs jax-cuda12-plugin; `make compilers` installs it")
    shape = MeshShape(data=devices // 2 or 1, tensor=2) if devices > 1 else MeshShape()
    layout = Layout(make_mesh(shape, topologies.describe(f"h200:{devices}")), make_rules())

    def abstract(shape, dtype, *axes):
        sharding = NamedSharding(layout.mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    data, heads = ("data", "tensor") if devices > 1 else (None, None)
    rows = abstract((batch, T), jnp.int32, data)
    in_order = options.pop("in_order", True)

    def run(q, k, v, positions, segments):
        segments = segments if packed else None
        view = View(positions, positions, segments, segments, in_order=in_order)
        with use_layout(layout):
            return attention(q, k, v, view, scale=0.1, implementation="mosaic_gpu", **options)

    def loss(*arrays):
        return run(*arrays).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if gradient else run).lower(
        abstract((batch, T, H, h), jnp.bfloat16, data, None, heads),
        *[abstract((batch, T, K, h), jnp.bfloat16, data, None, heads)] * 2,
        rows, rows,
    )  # fmt: skip
    return lowered.compile({"xla_gpu_autotune_level": 0}).as_text()


def check(kernels: int, text: str) -> None:
    assert text.count('custom_call_target="mosaic_gpu') == kernels


@pytest.mark.aot
@pytest.mark.parametrize(
    ("h", "kernels"),
    [
        pytest.param(64, 3, marks=pytest.mark.slow),  # both are compiled below as well
        pytest.param(128, 3, marks=pytest.mark.slow),
        (256, 4),
    ],
)
def test_compiles_forward_and_backward(h, kernels):
    check(1, compiled(h=h, gradient=False))
    check(kernels, compiled(h=h))


@pytest.mark.aot
def test_compiles_packed_windowed_soft_capped():
    check(3, compiled(packed=True, window=1024, softcap=50.0))


@pytest.mark.aot
def test_compiles_arbitrary_positions_of_any_length_not_causal_split_over_a_mesh():
    text = compiled(
        T=1000, batch=4, H=8, K=2, h=64, packed=True, in_order=False, causal=False, window=100,
        devices=4,
    )  # fmt: skip
    check(3, text)
    assert "all-gather" not in text and "all-reduce" not in text


def given(h=128, dtype=jnp.bfloat16, value_dim=None):
    rows = np.arange(128, dtype=np.int32)[None]
    q = jnp.zeros((1, 128, 2, h), dtype)
    return q, q, jnp.zeros((1, 128, 2, value_dim or h), dtype), View(rows, rows, in_order=True)


@pytest.mark.parametrize(
    ("arrays", "tiles", "words"),
    [
        ({}, {"forward": Tile(128, 256, 2, 2)}, ["bytes of shared memory, a program has 232,448"]),
        ({}, {"dq": Tile(128, 96, 2, 2)}, ["a multiple of 64"]),
        ({"h": 96}, None, ["head sizes 64, 128, 256, got 96"]),
        ({"dtype": jnp.float32}, None, ["bfloat16 or float16"]),
        ({"value_dim": 64}, None, ["one head size, got keys 128 and values 64"]),
    ],
)
def test_refuses_what_does_not_fit_or_is_not_there(arrays, tiles, words):
    tiles = None if tiles is None else TABLE[128]._replace(**tiles)
    refuses(lambda: flash_attention_gpu(*given(**arrays), Scores(1.0), tiles=tiles), *words)


def test_refuses_another_device():
    with use_layout(Layout(make_mesh(MeshShape(), jax.devices()[:1]), make_rules())):
        call = functools.partial(attention, *given(), implementation="mosaic_gpu")
        refuses(call, "for Hopper GPUs", "'blocked'")
