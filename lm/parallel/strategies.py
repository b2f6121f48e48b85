"""Strategies to split rows along the sequence, by name, as configurations choose them.

strategy = choose_strategy(None, layout)               # None where nothing is split
check_context(strategy, layout, 131072, [(32, 8)])     # before anything is computed
attention = context_attention(strategy)                # for the forward
reorder = reorder_for(strategy)                        # for what calls the forward
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax

from lm.kernels.attention import attention
from lm.parallel.context import current_context
from lm.parallel.ring import ring_attention
from lm.parallel.ulysses import check_heads, ulysses_attention
from lm.parallel.zigzag import Zigzag, zigzag_order
from lm.sharding import Layout, check_divides, use_layout

STRATEGIES = {"ring": ring_attention, "zigzag": ring_attention, "ulysses": ulysses_attention}


def choose_strategy(strategy: str | None, layout: Layout) -> str | None:
    """The strategy to use under a layout: None where it splits no sequence.

    Args:
      strategy: a name; None for "zigzag".
      layout: mesh and rules.

    Raises:
      ValueError: there is no such strategy.
    """
    _check_name(strategy)
    with use_layout(layout):
        return None if current_context() is None else strategy or "zigzag"


def context_attention(
    strategy: str | None, implementation: str | None = None
) -> Callable[..., jax.Array]:
    """The attention function of that name. See `lm.parallel.context` for which to choose.

    Args:
      strategy: "ring", its balanced form "zigzag" (which also needs `reorder_for`), "ulysses", or
        None for attention within a device.
      implementation: of the attention inside; None for the platform's.

    Raises:
      ValueError: there is no such strategy.
    """
    _check_name(strategy)
    function = attention if strategy is None else STRATEGIES[strategy]
    return functools.partial(function, implementation=implementation)


def reorder_for(strategy: str | None) -> Zigzag | None:
    """The order of tokens that a strategy wants, or None for that of the batch.

    Raises:
      ValueError: there is no such strategy.
    """
    _check_name(strategy)
    return Zigzag() if strategy == "zigzag" else None


def check_context(
    strategy: str | None, layout: Layout, sequence_length: int, heads: Iterable[tuple[int, int]]
) -> None:
    """Whether rows can be split by this strategy.

    Args:
      strategy, layout, sequence_length: of the step.
      heads: (query heads, key/value heads) of every kind of layer.

    Raises:
      ValueError: there is no such strategy, or the mesh does not divide the row or the heads.
    """
    strategy = choose_strategy(strategy, layout)
    with use_layout(layout):
        context = current_context()
    if context is None:
        return
    check_divides(context.mesh, context.axes, "sequence_length", sequence_length)
    if strategy == "zigzag":
        zigzag_order(sequence_length, context.size)
    if strategy == "ulysses":
        for num_heads, num_kv_heads in heads:
            check_heads(context, num_heads, num_kv_heads)


def _check_name(strategy: str | None) -> None:
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(
            f"context parallelism {strategy!r} is unknown; use {', '.join(STRATEGIES)}"
        )
