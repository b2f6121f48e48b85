"""Ways to split rows along the sequence, by name, as configurations choose them.

attention = context_attention("zigzag")              # for the forward
objective = in_order_of("zigzag", NextToken())       # for the step
check_context("zigzag", layout, 131072, [(32, 8)])   # before anything is computed
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lm.parallel.context import current_context
from lm.parallel.ring import ring_attention
from lm.parallel.ulysses import check_heads, ulysses_attention
from lm.parallel.zigzag import Zigzag, zigzag_order
from lm.sharding import Layout, check_divides, use_layout

WAYS = {"ring": ring_attention, "zigzag": ring_attention, "ulysses": ulysses_attention}


def context_attention(way: str, implementation: str | None = None) -> Callable[..., jax.Array]:
    """The attention function of that name. See `lm.parallel.context` for which to choose.

    Args:
      way: "ring", its balanced form "zigzag" (which also needs `in_order_of`), or "ulysses".
      implementation: of the attention inside; None for the platform's.

    Raises:
      ValueError: there is no such way.
    """
    _check_name(way)
    return functools.partial(WAYS[way], implementation=implementation)


def in_order_of(way: str, objective: Any) -> Any:
    """The objective, its rows in the order of tokens that this way wants.

    Raises:
      ValueError: there is no such way.
    """
    _check_name(way)
    return Zigzag(objective) if way == "zigzag" else objective


def check_context(
    way: str, layout: Layout, sequence_length: int, heads: Iterable[tuple[int, int]]
) -> None:
    """Whether rows can be split this way.

    Args:
      way, layout, sequence_length: of the step.
      heads: (query heads, key/value heads) of every kind of layer.

    Raises:
      ValueError: there is no such way, or the mesh does not divide the row or the heads.
    """
    _check_name(way)
    with use_layout(layout):
        context = current_context()
    if context is None:
        return
    check_divides(context.mesh, context.axes, "sequence_length", sequence_length)
    if way == "zigzag":
        zigzag_order(sequence_length, context.size)
    if way == "ulysses":
        for num_heads, num_kv_heads in heads:
            check_heads(context, num_heads, num_kv_heads)


def _check_name(way: str) -> None:
    if way not in WAYS:
        raise ValueError(f"context parallelism {way!r} is unknown; use {', '.join(WAYS)}")
