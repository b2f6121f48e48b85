"""Runs a per-matrix function (Newton-Schulz, QR) with each matrix whole on one device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lm.sharding import current_layout, map_devices

Tree = Any
# Mesh axes that split stacks and matrices come before those that hold copies.
ORDER = ("stage", "expert", "fsdp", "tensor", "slice", "data", "context")


def distribute_matrices(function: Callable[..., Tree], stacks: Tree, *everywhere: Any) -> Tree:
    """`function(stacks, *everywhere)`, with the stack sharded and each matrix whole on one device.

    XLA splits no decomposition: left to itself, it gathers whole stacks for it. Of S matrices on N
    devices, a device holds and computes ceil(S / N), at the price of one exchange before and one
    after; with fewer matrices than devices, some compute on zeros. Without a layout, or on one
    device, the function is called as it is.

    Args:
      function: from stacks to a tree of stacks; it treats each matrix by itself.
      stacks: arrays [*stack, rows, columns] of one `stack`.
      everywhere: arrays that every device has.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return function(stacks, *everywhere)
    mesh, stack = layout.mesh, jax.tree.leaves(stacks)[0].shape[:-2]
    axes = [axis for axis in ORDER if mesh.shape[axis] > 1 and axis not in layout.mapped]
    num_matrices = math.prod(stack)
    num_devices = math.prod(mesh.shape[axis] for axis in axes)
    padding = ((0, -num_matrices % num_devices), (0, 0), (0, 0))
    free = PartitionSpec.UNCONSTRAINED

    def constrain(x: jax.Array, num_axes: int) -> jax.Array:
        spec = PartitionSpec(tuple(axes[:num_axes]) or None, free, free)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    # Axis by axis each change is one exchange; all at once, XLA would gather everything first.
    def flatten(x: jax.Array) -> jax.Array:
        x = jnp.pad(x.reshape(-1, *x.shape[-2:]), padding)
        for num_axes in range(1, len(axes) + 1):
            x = constrain(x, num_axes)
        return x

    def unflatten(x: jax.Array) -> jax.Array:
        for num_axes in range(len(axes) - 1, -1, -1):
            x = constrain(x, num_axes)
        return x[:num_matrices].reshape(*stack, *x.shape[-2:])

    split = PartitionSpec(tuple(axes) or None)
    specs = (split, *(PartitionSpec() for _ in everywhere))
    results = map_devices(function, specs, split, mesh)(jax.tree.map(flatten, stacks), *everywhere)
    return jax.tree.map(unflatten, results)
