"""The layout in force while a step is traced: a mesh and the rules to read logical axes by."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from lm.sharding.rules import REPLICAS, Rules, Table, partition_spec, without


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that map logical axes onto it."""

    mesh: Mesh
    rules: Rules


_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout | None) -> Iterator[None]:
    """Make `layout` the one `constrain` and kernels read. Enter it inside the traced function."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def current_layout() -> Layout | None:
    """The layout in force, or None: one device, no constraints."""
    return _current.get()


def named_sharding(
    mesh: Mesh, table: Table, logical_axes: Sequence[str | None], shape: Sequence[int] | None = None
) -> NamedSharding:
    """The NamedSharding of an array with these logical axes. Errors as `partition_spec`."""
    return NamedSharding(mesh, partition_spec(table, logical_axes, mesh, shape))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """State the sharding of an activation here, by its logical axes; nothing without a layout."""
    layout = current_layout()
    if layout is None:
        return x
    sharding = named_sharding(layout.mesh, layout.rules.activations, logical_axes, x.shape)
    return jax.lax.with_sharding_constraint(x, sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reshard(x: jax.Array, forward: NamedSharding, backward: NamedSharding) -> jax.Array:
    """x laid out as `forward`; its gradient as `backward`, which need not be the same."""
    return jax.lax.with_sharding_constraint(x, forward)


def _reshard_forward(x, forward, backward):
    return reshard(x, forward, backward), None


def _reshard_backward(forward, backward, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, backward),)


reshard.defvjp(_reshard_forward, _reshard_backward)


def constrain_both(
    x: jax.Array, forward: Sequence[str | None], backward: Sequence[str | None]
) -> jax.Array:
    """`constrain` by the logical axes `forward`, and its gradient by `backward`."""
    layout = current_layout()
    if layout is None:
        return x
    mesh, table = layout.mesh, layout.rules.activations
    wanted = (named_sharding(mesh, table, axes, x.shape) for axes in (forward, backward))
    return reshard(x, *wanted)


def gather_weight(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """A weight as matrices multiply it: gathered over the axes of tokens, split over `tensor`.

    One mesh axis at a time, the last of a dimension first. On the way back the gradient goes to the
    `gradients` table, the first axis first: a reduce-scatter under ZeRO-2 and -3, an all-reduce
    otherwise. Nothing without a layout.
    """
    layout = current_layout()
    if layout is None:
        return x
    mesh, rules = layout.mesh, layout.rules
    split = [
        a
        for axes in (*rules.weights.values(), *rules.gradients.values())
        for a in axes
        if a in REPLICAS
    ]
    shared = [a for a in dict.fromkeys(split) if mesh.shape[a] > 1]
    for i in reversed(range(max(1, len(shared)))):
        forward = named_sharding(mesh, without(rules.weights, shared[i:]), logical_axes)
        backward = named_sharding(mesh, without(rules.gradients, shared[i + 1 :]), logical_axes)
        x = reshard(x, forward, backward)
    return x
