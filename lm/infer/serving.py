"""The form in which the local engine multiplies a model's weights, and the layout they are in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lm.model import ModelWeights, unstack
from lm.sharding import AXES, Layout, MeshShape, make_mesh, make_rules
from lm.weights import (
    NF4,
    LoRA,
    MultiLoRA,
    Panels,
    StructuredWeight,
    cast,
    is_structured,
    path_name,
)
from lm.weights.panels import panel_width

PANELED = (jnp.float32, jnp.bfloat16)
# Latent attention also reads this one as a matrix.
WHOLE = ("key_value_up",)


def serving_form(params: ModelWeights, dtype: Any, donate: bool = False) -> ModelWeights:
    """Weights unstacked, in `dtype`; on a CPU arrays are cut into panels, and NF4 has plain scales.

    Weights already in this form are kept. Weights sharded over devices are not cut.

    Args:
      params: weights, stacked or not.
      dtype: of compute.
      donate: delete each array as soon as it is cut, so that at most one exists twice.
    """
    tied = params.output is None

    def leaf(path: tuple[Any, ...], weight: Any) -> Any:
        if isinstance(weight, LoRA | MultiLoRA):
            return dataclasses.replace(weight.cast(dtype), base=leaf(path, weight.base))
        weight = cast(
            weight if isinstance(weight, StructuredWeight) else jnp.asarray(weight), dtype
        )
        name = path_name(path)
        if isinstance(weight, NF4) and _on_cpu(weight.codes):
            # Decoded at each step anew, scales of scales take longer than a row's whole product.
            return weight.unnested()
        structured = isinstance(weight, StructuredWeight)
        if structured or name.rsplit("/")[-1] in WHOLE or not _cuttable(weight):
            return weight
        embedding = name == "embed"
        # The many panels of a vocabulary are slow in bfloat16.
        whole = embedding and not (tied and weight.dtype == jnp.float32)
        if whole or not panel_width(weight.shape[0 if embedding else 1]):
            return weight
        panels = jax.block_until_ready(Panels.of(weight, "in" if embedding else "out"))
        if donate:
            weight.delete()
        return panels

    return jax.tree_util.tree_map_with_path(leaf, unstack(params), is_leaf=is_structured)


def _cuttable(weight: jax.Array) -> bool:
    return weight.ndim == 2 and weight.dtype in PANELED and _on_cpu(weight)


def _on_cpu(array: jax.Array) -> bool:
    """Whether the whole array is on one CPU."""
    return [device.platform for device in array.devices()] == ["cpu"]


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
