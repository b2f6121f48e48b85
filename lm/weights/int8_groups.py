"""Eight-bit whole numbers in groups with a scale, as GPTQ and compressed-tensors store them."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.weights.int4 import Int4


@flax.struct.dataclass
class Int8Groups(Int4):
    """scale (value - zero), where value is 0 to 255; all else as `Int4`.

    Attributes:
      values: uint8 [*stack, K, R].
      scale: floating point [*stack, groups, R].
      zero: uint16 [*stack, groups, R], 0 to 256; None is 128 everywhere.
      order: int32 [*stack, K], or None.
      block_axis: "in" or "out".
    """

    @classmethod
    def encode(cls, values, scale, zero=None, order=None, block_axis="in") -> Int8Groups:
        """From values [*stack, K, R] of 0 to 255; the other arguments are its attributes."""
        return cls(values, scale, zero, order, block_axis)

    def unpack(self) -> jax.Array:
        return self.values

    @property
    def size(self) -> tuple[int, int]:
        return self.values.shape[-2:]

    @property
    def granularity(self) -> tuple[int, int]:
        groups = self.scale.shape[-2]
        return (1 if groups == 1 else self.size[0] // groups), 1

    def decode(self, dtype: DTypeLike) -> jax.Array:
        K, R = self.size
        groups = self.scale.shape[-2]
        values = self.values.reshape(*self.stack, groups, K // groups, R).astype(jnp.float32)
        zero = 128 if self.zero is None else self.zero[..., None, :].astype(jnp.float32)
        matrix = (values - zero) * self.scale.astype(jnp.float32)[..., None, :]
        return matrix.astype(dtype).reshape(*self.stack, K, R)
