"""Batches: how their leaves are sharded, and how they are cut into micro-batches.

Dimension 0 of every leaf counts rows or examples: [B, T], [B], and with two rows per example
[P, 2, T] or [P]. A leaf without dimensions belongs to all of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.sharding import Layout, constrain, current_layout, named_sharding
from lm.train.objective import Batch, Objective
from lm.weights import path_name


def batch_shardings(batch: Batch, layout: Layout, row_length: int | None = None) -> Any:
    """NamedShardings of a batch, leaf by leaf.

    Dimension 0 is split over `batch`, and the first other dimension that is as long as a row over
    `sequence`.

    Args:
      batch: arrays or ShapeDtypeStructs.
      layout: mesh and rules.
      row_length: tokens of a row; None for the last dimension of the leaf `ids`.

    Raises:
      ValueError: mesh axes do not divide a dimension, or nothing says how long a row is.
    """
    if row_length is None:
        if "ids" not in batch:
            raise ValueError(f"a batch of {', '.join(batch)} has no `ids`; give row_length")
        row_length = batch["ids"].shape[-1]

    def sharding(path: Any, x: Any) -> Any:
        axes: list[str | None] = ["batch", *(None,) * (len(x.shape) - 1)][: len(x.shape)]
        if row_length in x.shape[1:]:
            axes[x.shape.index(row_length, 1)] = "sequence"
        try:
            return named_sharding(layout.mesh, layout.rules.activations, axes, x.shape)
        except ValueError as error:
            raise ValueError(f"batch leaf {path_name(path)} {list(x.shape)}: {error}") from None

    return jax.tree_util.tree_map_with_path(sharding, batch)


def rows_multiple(objective: Objective, layout: Layout | None, num_micro_batches: int) -> int:
    """What the number of rows of a batch must be a multiple of, whole examples on every device."""
    shards = layout.parts("batch") if layout else 1
    return objective.rows_per_example * shards * num_micro_batches


def micro_batches(objective: Objective, batch: Batch, num: int) -> Batch:
    """Leaves [L, ...] as [num, L / num, ...], under the layout in force.

    A micro-batch is made of contiguous examples of every shard of the batch: no row moves to
    another device, and the rows of an example stay together.

    Raises:
      ValueError: `num` does not divide the examples of a shard, or a leaf counts neither rows nor
        examples.
    """
    layout, rows = current_layout(), jax.eval_shape(objective.inputs, batch).ids.shape[0]
    shards = layout.parts("batch") if layout else 1
    examples, rest = divmod(rows, objective.rows_per_example)
    if rest or examples % (shards * num):
        works = [n for n in range(1, examples + 1) if not rest and examples % (shards * n) == 0]
        multiple = rows_multiple(objective, layout, num)
        remedy = f"num_micro_batches of {', '.join(map(str, works))}, or " if works else ""
        raise ValueError(
            f"num_micro_batches={num} does not divide the batch of {rows} rows, "
            f"{objective.rows_per_example} per example, over {shards} shards; use {remedy}"
            f"a batch size that is a multiple of {multiple}"
        )

    def split(path: Any, x: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (num,))
        if x.shape[0] % examples:
            raise ValueError(
                f"batch leaf {path_name(path)} {list(x.shape)} must count {rows} rows or "
                f"{examples} examples in its first dimension"
            )
        parts = x.reshape(shards, num, -1, *x.shape[1:]).swapaxes(0, 1)
        return constrain(
            parts.reshape(num, -1, *x.shape[1:]), None, "batch", *(None,) * (x.ndim - 1)
        )

    return jax.tree_util.tree_map_with_path(split, batch)
