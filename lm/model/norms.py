"""RMSNorm and LayerNorm, in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.model.config import Norm
from lm.model.params import NormWeights


def normalize(x: jax.Array, weights: NormWeights, norm: Norm) -> jax.Array:
    """RMSNorm or LayerNorm over the last dimension, in float32, back to x's dtype."""
    return elementwise(_normalize, norm)(x, weights)


def _normalize(norm: Norm, x: jax.Array, weights: NormWeights) -> jax.Array:
    y = x.astype(jnp.float32)
    if norm.kind == "layer":
        y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + norm.eps)
    scale = weights.scale.astype(jnp.float32)
    y *= 1.0 + scale if norm.plus_one else scale
    if weights.bias is not None:
        y += weights.bias.astype(jnp.float32)
    return y.astype(x.dtype)


def elementwise(f: Callable[..., jax.Array], *fixed: Any) -> Callable[..., jax.Array]:
    """`f` whose backward pass keeps its arguments, not the float32 values on the way."""
    return jax.checkpoint(functools.partial(f, *fixed), prevent_cse=False)
