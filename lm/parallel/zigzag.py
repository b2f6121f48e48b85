"""The balanced order of tokens for causal ring attention.

A row is cut into 2 n chunks, and device i of n holds chunks i and 2 n - 1 - i: an early one, which
sees little, and a late one, which sees as much more (arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel.context import Context, current_context
from lm.sharding import constrain, map_devices, sizes


def zigzag_order(num_tokens: int, num_shards: int) -> np.ndarray:
    """int32 [T]: which token of a row stands where.

    Raises:
      ValueError: the row does not divide into 2 x `num_shards` chunks.
    """
    if num_tokens % (2 * num_shards):
        options = sizes(num_tokens // 2, lambda d: num_tokens % (2 * d) == 0)
        remedy = f"use a context of {options}" if options else "use rows of even length"
        raise ValueError(
            f"zigzag order cuts a row into {2 * num_shards} chunks, two per device of mesh axis "
            f"'context'={num_shards}, but sequence_length={num_tokens}; {remedy}"
        )
    chunks = np.arange(num_tokens, dtype=np.int32).reshape(2 * num_shards, -1)
    held = [chunk for i in range(num_shards) for chunk in (i, 2 * num_shards - 1 - i)]
    return chunks[held].ravel()


@dataclasses.dataclass(frozen=True)
class Zigzag:
    """Rows that the model reads in zigzag order, where the layout in force splits the sequence.

    Tokens are reordered on their way in and hidden states on their way out, so that an objective
    and its batch know nothing of it.
    """

    def tokens(self, tokens: Any) -> Any:
        """`Tokens` in zigzag order: every array [B, T] of them, and `in_order` False."""
        context = current_context()
        if context is None:
            return tokens
        order = zigzag_order(tokens.ids.shape[1], context.size)

        def reordered(x: jax.Array) -> jax.Array:
            if x.ndim < 2 or x.shape[1] != len(order):
                return x
            return constrain(x[:, order], "batch", "sequence", *(None,) * (x.ndim - 2))

        return dataclasses.replace(jax.tree.map(reordered, tokens), in_order=False)

    def restore(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] of those tokens in the order of the batch.

        Every device sends what it holds, and receives as much, once; nothing is gathered.
        """
        context = current_context()
        return hidden if context is None else _restore(hidden, context)


def _restore(hidden: jax.Array, context: Context) -> jax.Array:
    mesh, T = context.mesh, hidden.shape[1]
    order = zigzag_order(T, context.size)
    spec = context.spec(hidden.shape, "batch", "residual_sequence", None)
    axes = (spec[1],) if isinstance(spec[1], str) else tuple(spec[1])
    num_devices = math.prod(mesh.shape[a] for a in axes)
    # A device holds one piece of a chunk, or its two chunks whole, of which one has an even number.
    pieces = 1 if num_devices % (2 * context.size) == 0 else 2
    size = T // (num_devices * pieces)
    if num_devices * pieces % (2 * context.size) or axes[: len(context.axes)] != context.axes:
        return constrain(hidden[:, np.argsort(order)], "batch", "sequence", None)
    held = (order[::size] // size).reshape(num_devices, pieces)  # numbers of pieces
    even_first = held[:, 0] % 2 == 0
    evens, odds = (np.where(first, held[:, 0], held[:, -1]) for first in (even_first, ~even_first))

    def send(x: jax.Array, numbers: np.ndarray, back: bool) -> jax.Array:
        pairs = [(i, int(number) // pieces) for i, number in enumerate(numbers)]
        return jax.lax.ppermute(x, axes, [pair[::-1] for pair in pairs] if back else pairs)

    def local(x: jax.Array, back: bool) -> jax.Array:
        if pieces == 1:
            return send(x, held[:, 0], back)
        straight = jnp.asarray(even_first)[jax.lax.axis_index(axes)]
        halves = jnp.stack([x[:, :size], x[:, size:]])
        halves = halves if back else jnp.where(straight, halves, halves[::-1])
        halves = jnp.stack([send(halves[0], evens, back), send(halves[1], odds, back)])
        halves = jnp.where(straight, halves, halves[::-1]) if back else halves
        return jnp.concatenate([halves[0], halves[1]], axis=1)

    def moved(x: jax.Array, back: bool = False) -> jax.Array:
        return map_devices(functools.partial(local, back=back), spec, spec, mesh)(x)

    restore = jax.custom_vjp(moved, nondiff_argnums=(1,))
    restore.defvjp(lambda x, back: (moved(x), None), lambda back, _, g: (moved(g, True),))
    return restore(hidden, False)
