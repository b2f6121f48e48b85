"""The form in which the local engine multiplies a model's weights, and the layout they are in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lm.kernels.cpu.native import available
from lm.model import ModelWeights, unstack
from lm.sharding import AXES, Layout, MeshShape, make_mesh, make_rules
from lm.weights import (
    NF4,
    LoRA,
    MultiLoRA,
    StructuredWeight,
    Words,
    cast,
    is_structured,
)


def serving_form(params: ModelWeights, dtype: Any, donate: bool = False) -> ModelWeights:
    """Weights unstacked, in `dtype`; on one CPU quantized ones as its kernels read them fastest.

    Weights already in this form are kept. Nothing is rounded.

    Args:
      params: weights, stacked or not.
      dtype: of compute.
      donate: delete each array as soon as its new form is made, so that at most one exists twice.
    """

    def leaf(weight: Any) -> Any:
        if isinstance(weight, LoRA | MultiLoRA):
            return dataclasses.replace(weight.cast(dtype), base=leaf(weight.base))
        if not isinstance(weight, StructuredWeight):
            return cast(jnp.asarray(weight), dtype)
        weight = cast(weight, dtype)
        if not all(map(_on_cpu, jax.tree.leaves(weight))):
            return weight
        if isinstance(weight, NF4):
            # Decoded at each step anew, scales of scales take longer than a row's whole product.
            return weight.unnested()
        words = Words.of(weight) if available("products") else None
        if words is None:
            return weight
        jax.block_until_ready(words)
        if donate:
            jax.tree.map(lambda x: x.delete(), weight)
        return words

    return jax.tree.map(leaf, unstack(params), is_leaf=is_structured)


def _on_cpu(array: jax.Array) -> bool:
    """Whether the whole array is on one CPU."""
    return isinstance(array, jax.Array) and [d.platform for d in array.devices()] == ["cpu"]


def layout_of(params: ModelWeights, layout: Layout | None = None) -> Layout:
    """The layout to compute under: the one given, or that of the weights' own devices.

    Weights on one device give a mesh of it; weights on a mesh of this project's axes give that mesh
    with the default rules. Weights that are not on a device yet count as on the default one.

    Raises:
      ValueError: the weights are not on the layout's devices, or on several without such a mesh.
    """
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    devices = {device for x in arrays for device in x.devices()} or {jax.devices()[0]}
    if layout is not None:
        if not devices <= set(layout.mesh.devices.flat):
            raise ValueError(
                f"the weights are on {_names(devices)}, the layout's mesh is of "
                f"{_names(layout.mesh.devices.flat)}; place the weights by the layout first"
            )
        return layout
    if len(devices) == 1:
        return Layout(make_mesh(MeshShape(), list(devices)), make_rules())
    meshes = {x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)}
    for mesh in meshes:
        if isinstance(mesh, Mesh) and mesh.axis_names == AXES and {*mesh.devices.flat} >= devices:
            return Layout(mesh, make_rules())
    raise ValueError(f"the weights are on {_names(devices)} without a common mesh; give a layout")


def _names(devices: Iterable[Any]) -> str:
    names = sorted(map(str, devices))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def row_multiple(layout: Layout) -> int:
    """What the rows of a batch must be a multiple of, to be split over the layout's mesh."""
    axes = layout.rules.activations.get("batch", ())
    return math.prod(layout.mesh.shape[axis] for axis in axes)
