"""Packed rows, and attention over them on one device or split over a layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.attention import View, attention
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from tests.kernels.calls import scores_of


class Rows(NamedTuple):
    """Queries, keys, values, a gradient of the result, and where the tokens stand."""

    q: Any
    k: Any
    v: Any
    dout: Any
    positions: Any
    segments: Any


def draw_documents(rng: np.random.Generator, num_rows: int, length: int) -> tuple[Any, Any]:
    """(positions, segments), int32: documents of drawn lengths, then padding."""
    positions, segments = np.zeros((2, num_rows, length), np.int32)
    for row in range(num_rows):
        start, segment, end = 0, 1, length - int(rng.integers(0, length // 4))
        while start < end:
            stop = min(end, start + int(rng.integers(2, length)))
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = segment
            start, segment = stop, segment + 1
    return positions, segments


def draw(num_rows: int, length: int, num_heads: int, num_kv_heads: int, packed: bool) -> Rows:
    rng = np.random.default_rng(num_rows + length)
    positions, segments = draw_documents(rng, num_rows, length)
    if not packed:
        positions, segments = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1)), None

    def normal(heads: int, size: int) -> np.ndarray:
        return rng.normal(0, 1.5, (num_rows, length, heads, size)).astype(np.float32)

    dout = normal(num_heads, 8)
    if segments is not None:
        dout *= (segments > 0)[..., None, None]  # padding, whose results mean nothing
    return Rows(
        normal(num_heads, 16), normal(num_kv_heads, 16), normal(num_kv_heads, 8), dout,
        positions, segments,
    )  # fmt: skip


def make_layout(**axes: int) -> Layout:
    return Layout(make_mesh(MeshShape(**axes)), make_rules(3))


def jitted(function: Any, layout: Layout | None, in_order: bool, options: dict[str, Any]) -> Any:
    """Rows -> the result and the gradients of q, k and v."""
    scores, rest = scores_of({"scale": 0.25} | options)

    def compute(rows: Rows) -> list[jax.Array]:
        with use_layout(layout):
            tokens = rows.positions, rows.positions, rows.segments, rows.segments
            view = View(*tokens, in_order=in_order)
            out, pull = jax.vjp(lambda q, k, v: function(q, k, v, view, scores, **rest), *rows[:3])
            gradients = pull(jnp.asarray(rows.dout, out.dtype))
            if rows.segments is not None:
                out *= (rows.segments > 0)[..., None, None]
            return [out, *gradients]

    return jax.jit(compute)


def on_one_device(rows: Rows, options: dict[str, Any]) -> list[jax.Array]:
    """The same by the reference."""
    return jitted(attention, None, False, options | {"implementation": "reference"})(rows)


def reordered(rows: Any, order: np.ndarray) -> Any:
    """Every array with its tokens in another order."""
    return jax.tree.map(lambda x: x[:, order], rows)
