"""The layout in force while a step is traced: a mesh and the rules to read logical axes by."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lm.sharding.rules import Rules, Table, mesh_axes, partition_spec, without


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that map logical axes onto it.

    Attributes:
      mesh: the devices.
      rules: which mesh axes split which logical axis.
      mapped: mesh axes that an enclosing `jax.vmap(spmd_axis_name=...)` has taken.
    """

    mesh: Mesh
    rules: Rules
    mapped: tuple[str, ...] = ()

    def parts(self, name: str) -> int:
        """Number of parts that a logical axis of activations is split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.activations.get(name, ()))

    def inside_vmap(self, axis: str) -> Layout:
        """The layout to use in a function under `jax.vmap(..., spmd_axis_name=axis)`.

        JAX adds `axis` to every constraint and `shard_map` in there, so no rule may name it.
        """
        return Layout(self.mesh, self.rules.without((axis,)), (*self.mapped, axis))


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


def is_local(mesh: Mesh | AbstractMesh) -> bool:
    """Whether arrays are one device's already: a mesh of one, or the inside of a `shard_map`."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return all(size == 1 or axis in manual for axis, size in mesh.shape.items())


def map_devices(
    function: Callable[..., Any], in_specs: Any, out_specs: Any, mesh: Mesh | None
) -> Callable[..., Any]:
    """`function` of each device's own part of its arrays, as a function of the whole arrays.

    Every `shard_map` of the library is made here. It may be called under
    `jax.vmap(..., spmd_axis_name=axis)`, in the layout `Layout.inside_vmap(axis)`, and inside
    another `shard_map`, whose axes the specs then lose.

    Args:
      function: of local arrays. It may use collectives over mesh axes of more than one device; what
        it returns as replicated, it has to make so.
      in_specs, out_specs: PartitionSpecs, a tree prefix of the arguments and of the result.
      mesh: the layout's; None, or a mesh of one device, gives `function` itself.
    """
    if mesh is None or mesh.size == 1:
        return function
    around, layout = jax.sharding.get_abstract_mesh(), current_layout()
    taken = {*around.manual_axes, *(layout.mapped if layout else ())}
    # Named as well, or JAX would sum gradients over them: a collective of one device each.
    single = [axis for axis, size in mesh.shape.items() if size == 1 and axis not in taken]

    def local(spec: PartitionSpec) -> PartitionSpec:
        entries = [[a for a in mesh_axes(entry) if a not in taken] for entry in spec]
        if entries:
            entries[0] += [axis for axis in single if not any(axis in e for e in entries)]
        return PartitionSpec(*(tuple(entry) or None for entry in entries))

    specs = jax.tree.map(
        local, (in_specs, out_specs), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return jax.shard_map(
        function,
        mesh=around if around.manual_axes else mesh,
        axis_names={axis for axis in mesh.axis_names if axis not in around.manual_axes},
        in_specs=specs[0],
        out_specs=specs[1],
        check_vma=False,  # scans and platform_dependent inside do not pass it
    )


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
    """A weight as products need it: whole along `Rules.gathered`, split along its other axes.

    So ZeRO's splits are undone; those over `tensor`, and of experts over `expert`, stay. One mesh
    axis at a time, the last of a dimension first. On the way back the gradient goes to the
    `gradients` table, the first axis first: a reduce-scatter under ZeRO-2 and -3, an all-reduce
    otherwise, over the batch axes that do not split the weight itself. Nothing without a layout.
    """
    layout = current_layout()
    if layout is None:
        return x
    mesh, rules = layout.mesh, layout.rules
    whole = [name for name in rules.gathered if name in logical_axes]
    split = [
        a for table in (rules.weights, rules.gradients) for n in whole for a in table.get(n, ())
    ]
    shared = [a for a in dict.fromkeys(split) if mesh.shape[a] > 1]
    for i in reversed(range(max(1, len(shared)))):
        forward = named_sharding(mesh, without(rules.weights, shared[i:], whole), logical_axes)
        back = named_sharding(mesh, without(rules.gradients, shared[i + 1 :], whole), logical_axes)
        x = reshard(x, forward, back)
    return x
