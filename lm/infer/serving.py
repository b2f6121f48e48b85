"""The form of a model's weights in which the local engine multiplies them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.model import ModelWeights, unstack
from lm.weights import NF4, Leaf, LoRA, MultiLoRA, Panels, cast, path_name
from lm.weights.panels import panel_width

PANELED = (jnp.float32, jnp.bfloat16)
# Of latent attention: this one is not only multiplied by.
WHOLE = ("key_value_up",)


def serving_form(params: ModelWeights, dtype: Any, donate: bool = False) -> ModelWeights:
    """Weights unstacked, in `dtype`; on a CPU arrays are cut into panels, and NF4 has plain scales.

    What is so already is kept. Weights that are split over devices are not cut.

    Args:
      params: weights, stacked or not.
      dtype: of compute.
      donate: delete an array that was cut at once, so that no more than one is there twice.
    """
    tied = params.output is None

    def leaf(path: tuple[Any, ...], weight: Any) -> Any:
        if isinstance(weight, LoRA | MultiLoRA):
            return dataclasses.replace(weight.cast(dtype), base=leaf(path, weight.base))
        weight = cast(weight if isinstance(weight, Leaf) else jnp.asarray(weight), dtype)
        name = path_name(path)
        if isinstance(weight, NF4) and _on_cpu(weight.codes):
            # Decoded at each step anew, scales of scales take longer than a row's whole product.
            return weight.unnested()
        if isinstance(weight, Leaf) or name.rsplit("/")[-1] in WHOLE or not _cuttable(weight):
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

    return jax.tree_util.tree_map_with_path(
        leaf, unstack(params), is_leaf=lambda x: isinstance(x, Leaf)
    )


def _cuttable(weight: jax.Array) -> bool:
    return weight.ndim == 2 and weight.dtype in PANELED and _on_cpu(weight)


def _on_cpu(array: jax.Array) -> bool:
    """Whether it lies on one CPU, whole."""
    return [device.platform for device in array.devices()] == ["cpu"]
