"""Int8 weights with one scale per output channel: the smallest leaf that is not an array."""

from __future__ import annotations

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm.sharding import Rules, named_sharding
from lm.weights.leaf import Leaf, unembed


@flax.struct.dataclass
class Int8(Leaf):
    """Symmetric round-to-nearest int8.

    Attributes:
      values: int8 [*stack, in, out].
      scale: float32 [*stack, 1, out]; the matrix is `values * scale`.
    """

    values: Any
    scale: Any

    @classmethod
    def quantize(cls, weight: jax.Array) -> Int8:
        """The nearest Int8 to `weight` [*stack, in, out]; a column of zeros gets scale 1."""
        weight = weight.astype(jnp.float32)
        largest = jnp.max(jnp.abs(weight), axis=-2, keepdims=True)
        scale = jnp.where(largest > 0, largest / 127.0, 1.0)
        return cls(jnp.round(weight / scale).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self, dtype: Any) -> jax.Array:
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)

    def linear(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum(
            "...i,io->...o", x, self.values.astype(x.dtype), preferred_element_type=jnp.float32
        )
        return (y * self.scale[0]).astype(x.dtype)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        rows = jnp.take(self.values, ids, axis=0, mode="clip").astype(jnp.float32)
        return (rows * self.scale[0]).astype(dtype)

    def unembed(self, x: jax.Array, transposed: bool) -> jax.Array:
        if not transposed:
            return unembed(x, self.values, False) * self.scale[0]
        return unembed((x * self.scale[0]).astype(x.dtype), self.values, True)

    def shardings(self, axes: tuple[str | None, ...], rules: Rules, mesh: Mesh) -> Self:
        scale_axes = (*axes[:-2], None, axes[-1])
        return type(self)(
            named_sharding(mesh, rules.weights, axes, self.values.shape),
            named_sharding(mesh, rules.weights, scale_axes),
        )
