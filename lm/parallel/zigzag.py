"""The balanced order of tokens for causal ring attention.

A row is cut into 2 n chunks, and device i of n holds chunks i and 2 n - 1 - i: an early one, which
sees little, and a late one, which sees as much more (arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lm.parallel.context import current_context, divisors
from lm.sharding import constrain

Batch = Mapping[str, Any]


def zigzag_order(num_tokens: int, num_shards: int) -> np.ndarray:
    """int32 [T]: which token of a row stands where.

    Raises:
      ValueError: the row does not divide into 2 x `num_shards` chunks.
    """
    if num_tokens % (2 * num_shards):
        options = divisors(num_tokens // 2, lambda d: num_tokens % (2 * d) == 0)
        remedy = f"use a context of {options}" if options else "use rows of even length"
        raise ValueError(
            f"zigzag order cuts a row into {2 * num_shards} chunks, two a device of mesh axis "
            f"'context'={num_shards}, but sequence_length={num_tokens}; {remedy}"
        )
    chunks = np.arange(num_tokens, dtype=np.int32).reshape(2 * num_shards, -1)
    held = [chunk for i in range(num_shards) for chunk in (i, 2 * num_shards - 1 - i)]
    return chunks[held].ravel()


def zigzag(batch: Batch, num_shards: int) -> dict[str, Any]:
    """The batch with its rows in zigzag order: every array [B, T, ...], T as of `ids`.

    Arrays of NumPy stay so: it may be done before or after a batch is placed.
    """
    return _reordered(batch, zigzag_order(batch["ids"].shape[1], num_shards))


def unzigzag(batch: Batch, num_shards: int) -> dict[str, Any]:
    """The inverse of `zigzag`."""
    return _reordered(batch, np.argsort(zigzag_order(batch["ids"].shape[1], num_shards)))


def _reordered(batch: Batch, order: np.ndarray) -> dict[str, Any]:
    def reordered(x: Any) -> Any:
        if x.ndim < 2 or x.shape[1] != len(order):
            return x
        x = x[:, order]
        if isinstance(x, np.ndarray):
            return x
        return constrain(x, "batch", "sequence", *(None,) * (x.ndim - 2))

    return {name: reordered(x) for name, x in batch.items()}


@dataclasses.dataclass(frozen=True)
class Zigzag:
    """An objective whose rows the model reads in zigzag order, where a layout splits the sequence.

    A loss is a sum over tokens, so only rounding changes. Inputs, targets and weights are reordered
    alike, inside the step, and the model is told that its tokens are not in order.

    Attributes:
      objective: any that reads whole rows of its batch.
    """

    objective: Any

    def inputs(self, batch: Batch) -> Any:
        """As the objective's."""
        context = current_context()
        if context is None:
            return self.objective.inputs(batch)
        tokens = self.objective.inputs(zigzag(batch, context.size))
        return dataclasses.replace(tokens, in_order=False)

    def loss(self, head: Any, hidden: jax.Array, batch: Batch, key: jax.Array) -> Any:
        """As the objective's."""
        context = current_context()
        if context is not None:
            batch = zigzag(batch, context.size)
        return self.objective.loss(head, hidden, batch, key)
