"""Eight-bit integers in groups with a scale, as GPTQ and compressed-tensors store them."""

from __future__ import annotations

import flax.struct
import jax

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

    values_per_byte = 1
    middle = 128

    @classmethod
    def encode(cls, values, scale, zero=None, order=None, block_axis="in") -> Int8Groups:
        """From values [*stack, K, R] of 0 to 255; the other arguments are its attributes."""
        return cls(values, scale, zero, order, block_axis)

    def unpack(self) -> jax.Array:
        return self.values
