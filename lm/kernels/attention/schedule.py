"""Which blocks of keys each block of queries has to look at, in the order a kernel visits them.

A kernel's grid runs over this list and over nothing else: a pair of blocks of which no query sees a
key costs neither a step nor a copy. Packing, windows, chunks and zigzag rings differ only in the
positions and segments the list is made from.

One visit is one int32: the block of queries << 17 | the block of keys << 4 | flags.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.attention.reference import View
from lm.kernels.attention.scores import Scores

RUN, MASKED, FIRST, LAST = 1, 2, 4, 8  # flags: FIRST and LAST of a block of queries
KEY_BITS, FLAG_BITS = 13, 4
QUERY_SHIFT = KEY_BITS + FLAG_BITS
MAX_BLOCKS = 1 << KEY_BITS
MAX_VISITS = 1 << 17  # 512 KiB of scalar memory, of 1 MiB
PADDING_POSITION = 1 << 30
PADDING_SEGMENT = -(1 << 31)
_UNLISTED = 1 << 30


class Schedule(NamedTuple):
    """Visits, one list a batch row, or one for all of them.

    Attributes:
      visits: int32 [B or 1, P].
      count: how many of the P are to be made: an int, or an int32 scalar found at run time.
    """

    visits: Any
    count: Any


def query_block(visit: Any) -> Any:
    """The block of queries of a visit."""
    return visit >> QUERY_SHIFT


def key_block(visit: Any) -> Any:
    """The block of keys of a visit."""
    return (visit >> FLAG_BITS) & (MAX_BLOCKS - 1)


def schedule(view: View, query: int, key: int, scores: Scores) -> Schedule:
    """The visits of attention with blocks of `query` and `key` tokens.

    Args:
      view: of lengths that are multiples of the blocks. In order without segments, the list is
        known at trace time, and is a NumPy array.
      query, key: tokens of a block.
      scores: of which `causal` and `window` count here.

    Raises:
      ValueError: there are more blocks than the list can hold.
    """
    B, T = view.query_positions.shape
    num_queries, num_keys = T // query, view.key_positions.shape[1] // key
    if num_queries > MAX_BLOCKS or num_keys > MAX_BLOCKS:
        raise ValueError(_too_long(T, view.key_positions.shape[1]))
    possible, whole = pairs(view, query, key, scores)
    if view.in_order and view.query_segments is None:
        visits, count = _listed(np, possible, whole)
        return Schedule(visits[:, : int(count)], int(count))
    if B * num_queries * num_keys > MAX_VISITS:
        possible, whole = possible.any(0, keepdims=True), whole.all(0, keepdims=True)
        if num_queries * num_keys > MAX_VISITS:
            raise ValueError(_too_long(T, view.key_positions.shape[1]))
    return Schedule(*_listed(jnp, possible, whole))


def pairs(view: View, query: int, key: int, scores: Scores) -> tuple[Any, Any]:
    """bool [B or 1, num_queries, num_keys] twice: may a query see a key; do all see all.

    NumPy arrays where in order without segments, else JAX ones. Arguments as `schedule`.
    """
    T, S = view.query_positions.shape[1], view.key_positions.shape[1]
    possible, whole = _by_index(T // query, S // key, query, key, scores, view.in_order)
    if view.in_order and view.query_segments is None:
        return possible[None], whole[None]
    dynamic_possible, dynamic_whole = _by_value(view, query, key, scores)
    return dynamic_possible & possible, dynamic_whole


def _too_long(T: int, S: int) -> str:
    return (
        f"attention of {T} queries to {S} keys has too many blocks for one device; "
        "split the sequence over a `context` axis, or use larger blocks"
    )


def _by_index(num_queries, num_keys, query, key, scores: Scores, in_order: bool):
    """bool [num_queries, num_keys] twice: may any query see a key; do all see all. By index."""
    if not in_order:
        return np.ones((num_queries, num_keys), bool), np.ones((num_queries, num_keys), bool)
    first_q, first_k = np.arange(num_queries)[:, None] * query, np.arange(num_keys)[None] * key
    return _bounded(first_q, first_q + query - 1, first_k, first_k + key - 1, scores)


def _bounded(q_min, q_max, k_min, k_max, scores: Scores):
    causal, window = scores.causal, scores.window
    possible = (q_max >= k_min) if causal else (q_max >= k_min) | True
    whole = (q_min >= k_max) if causal else (q_max >= k_min) | True
    if window is not None:
        possible, whole = possible & (q_min - k_max < window), whole & (q_max - k_min < window)
        if not causal:
            possible, whole = possible & (k_min - q_max < window), whole & (k_max - q_min < window)
    return possible, whole


def _by_value(view: View, query: int, key: int, scores: Scores):
    """As `_by_index`, bool [B, num_queries, num_keys], by the least and largest of each block."""

    def ends(x: jax.Array, block: int, axis: int) -> tuple[jax.Array, jax.Array]:
        blocks = x.reshape(x.shape[0], -1, block)
        return tuple(jnp.expand_dims(f(blocks, axis=2), axis) for f in (jnp.min, jnp.max))  # type: ignore

    q_min, q_max = ends(view.query_positions, query, 2)
    k_min, k_max = ends(view.key_positions, key, 1)
    possible, whole = _bounded(q_min, q_max, k_min, k_max, scores)
    if view.query_segments is not None:
        q_min, q_max = ends(view.query_segments, query, 2)
        k_min, k_max = ends(view.key_segments, key, 1)
        possible &= (q_max >= k_min) & (k_max >= q_min)
        whole &= (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
    return possible, whole


def _listed(xp: Any, possible: Any, whole: Any) -> tuple[Any, Any]:
    """(visits [B, P], count) from bool [B, num_queries, num_keys]. `xp` is numpy or jax.numpy.

    A block of queries that sees nothing is still visited once, without RUN, to write its zeros.
    Shorter lists are filled up with a repetition of their last visit, without flags.
    """
    B, num_queries, num_keys = possible.shape
    place = (np.arange(num_queries)[:, None] << QUERY_SHIFT) | (np.arange(num_keys) << FLAG_BITS)
    blind = ~possible.any(2, keepdims=True) & (np.arange(num_keys) == 0)
    code = xp.where(possible, RUN, 0) | xp.where(possible & ~whole, MASKED, 0) | place
    code = xp.where(possible | blind, code, code | _UNLISTED).astype(np.int32)
    visits = xp.sort(code.reshape(B, -1), axis=1)
    listed = visits < _UNLISTED
    block = xp.where(listed, visits >> QUERY_SHIFT, -1)
    edge = xp.ones((B, 1), bool)
    change = block[:, 1:] != block[:, :-1]
    visits = visits | xp.where(xp.concatenate([edge, change], 1), FIRST, 0)
    visits = visits | xp.where(xp.concatenate([change, edge], 1), LAST, 0)
    counts = listed.sum(1)
    last = xp.take_along_axis(visits, counts[:, None] - 1, axis=1)
    filled = xp.where(listed, visits, last >> FLAG_BITS << FLAG_BITS)
    return filled.astype(np.int32), counts.max().astype(np.int32)
