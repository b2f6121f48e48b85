"""Stacks of matrices dealt out to devices whole, for what XLA cannot split within a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lm.sharding import current_layout

Tree = Any
# Mesh axes that split stacks and matrices come before those that hold copies.
DEAL_ORDER = ("stage", "expert", "fsdp", "tensor", "slice", "data", "context")


def deal(function: Callable[..., Tree], stacks: Tree, *everywhere: Any) -> Tree:
    """`function(stacks, *everywhere)`, each matrix of the stacks computed on one device.

    XLA splits no decomposition, and would gather whole stacks for it. Of S matrices on N devices, a
    device holds and computes ceil(S / N), which costs an exchange of parts for wholes before and
    after; with fewer matrices than devices, some compute on zeros. Without a layout, or on one
    device, the function is called as it is.

    Args:
      function: of stacks, to a tree of such; it treats each matrix of a stack by itself.
      stacks: arrays [*stack, rows, columns] with one `stack`.
      everywhere: arrays that every device has.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return function(stacks, *everywhere)
    mesh, stack = layout.mesh, jax.tree.leaves(stacks)[0].shape[:-2]
    num_matrices = math.prod(stack)
    padding = ((0, -num_matrices % mesh.size), (0, 0), (0, 0))
    # Axis by axis each change is one exchange; all at once, XLA would gather everything first.
    axes = [axis for axis in DEAL_ORDER if mesh.shape[axis] > 1]
    free = PartitionSpec.UNCONSTRAINED

    def constrain(x: jax.Array, num_axes: int) -> jax.Array:
        spec = PartitionSpec(tuple(axes[:num_axes]) or None, free, free)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def flatten(x: jax.Array) -> jax.Array:
        x = jnp.pad(x.reshape(-1, *x.shape[-2:]), padding)
        for num_axes in range(1, len(axes) + 1):
            x = constrain(x, num_axes)
        return x

    def unflatten(x: jax.Array) -> jax.Array:
        for num_axes in range(len(axes) - 1, -1, -1):
            x = constrain(x, num_axes)
        return x[:num_matrices].reshape(*stack, *x.shape[-2:])

    dealt = PartitionSpec(tuple(axes) or None)
    dealt_function = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(dealt, *(PartitionSpec() for _ in everywhere)),
        out_specs=dealt,
        check_vma=False,  # jax's own loops for TPU decompositions do not pass the check
    )
    return jax.tree.map(unflatten, dealt_function(jax.tree.map(flatten, stacks), *everywhere))
