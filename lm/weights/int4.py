"""Four-bit integers in groups with a scale and an optional zero point: GPTQ, AWQ and kin."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.weights.blocked import BlockAxis, Blocked, Groups, nibbles


@flax.struct.dataclass
class Int4(Blocked):
    """scale (value - zero), where value is 0 to 15.

    Two values share a byte, rows 2k and 2k + 1 of the matrix in its low and high half: this is the
    order of bytes in GPTQ's words, and shards may hold any even number of rows. (`jnp.int4` would
    take a byte per number in checkpoints.) Scales keep the type of their file; the product is
    float32.

    Attributes:
      values: uint8 [*stack, K/2, R].
      scale: floating point [*stack, groups, R]; a group is K/groups consecutive rows.
      zero: uint8 [*stack, groups, R], 0 to 16; None is 8 everywhere.
      order: int32 [*stack, K], row k here is row order[k] of the matrix (GPTQ's act-order puts rows
        of like importance into one group); None is no reordering.
      block_axis: "in", or "out" for an embedding table: K is that dimension.
    """

    values: Any
    scale: Any
    zero: Any = None
    order: Any = None
    block_axis: BlockAxis = flax.struct.field(pytree_node=False, default="in")

    other_arrays = ("order",)
    values_per_byte = 2
    middle = 8  # the zero point of symmetric weights

    @classmethod
    def quantize(
        cls,
        weight: jax.Array,
        group_size: int | None = 128,
        symmetric: bool = True,
        scale_dtype: DTypeLike = jnp.float16,
        block_axis: BlockAxis = "in",
    ) -> Int4:
        """Round to nearest.

        Args:
          weight: [*stack, in, out].
          group_size: numbers along K with one scale; None is a whole column.
          symmetric: scale of 7.5 for the largest magnitude; otherwise, 15 scales from the least to
            the greatest number (zero counts as one), and a zero point.
          scale_dtype: the scale is rounded to it before the weights are.
          block_axis: which dimension is K.

        Raises:
          ValueError: groups do not divide K.
        """
        matrix = jnp.asarray(weight, jnp.float32)
        matrix = matrix if block_axis == "in" else jnp.swapaxes(matrix, -1, -2)
        *stack, K, R = matrix.shape
        size = group_size or K
        if K % size or size % 2:
            raise ValueError(
                f"groups of {size} do not divide {block_axis}={K} into even parts; use one of "
                f"{', '.join(str(g) for g in range(2, K + 1, 2) if K % g == 0)}, or None"
            )
        groups = matrix.reshape(*stack, K // size, size, R)
        least = jnp.minimum(jnp.min(groups, axis=-2), 0)
        most = jnp.maximum(jnp.max(groups, axis=-2), 0)
        width = 2 * jnp.maximum(-least, most) if symmetric else most - least
        scale = (jnp.where(width > 0, width, 15.0) / 15.0).astype(scale_dtype)
        if scale_dtype == jnp.float16:  # numbers below float16's range are nearest to zero
            scale = jnp.maximum(scale, jnp.finfo(jnp.float16).smallest_subnormal)
        step = scale.astype(jnp.float32)
        zero = None if symmetric else jnp.clip(jnp.round(-least / step), 0, 15).astype(jnp.uint8)
        offset = cls.middle if zero is None else zero[..., None, :].astype(jnp.float32)
        values = jnp.clip(jnp.round(groups / step[..., None, :]) + offset, 0, 15)
        return cls.encode(values.reshape(*stack, K, R), scale, zero, block_axis=block_axis)

    @classmethod
    def encode(
        cls,
        values: jax.Array,
        scale: jax.Array,
        zero: jax.Array | None = None,
        order: jax.Array | None = None,
        block_axis: BlockAxis = "in",
    ) -> Int4:
        """From values [*stack, K, R] of 0 to 15, K even; the other arguments are its attributes."""
        pairs = values.astype(jnp.uint8)
        packed = pairs[..., ::2, :] | pairs[..., 1::2, :] << 4
        return cls(packed, scale, zero, order, block_axis)

    def unpack(self) -> jax.Array:
        """The values given to `encode`, uint8 [*stack, K, R] of 0 to 15."""
        return nibbles(self.values)

    @property
    def size(self) -> tuple[int, int]:
        return self.values_per_byte * self.values.shape[-2], self.values.shape[-1]

    @property
    def granularity(self) -> tuple[int, int]:
        groups, unit = self.scale.shape[-2], self.values_per_byte
        return (unit if groups == 1 else math.lcm(unit, self.size[0] // groups)), 1

    def decode(self, dtype: DTypeLike) -> jax.Array:
        return self.groups().decode().astype(dtype)

    def groups(self) -> Groups:
        """The values unpacked, in their stored order."""
        zero = self.middle if self.zero is None else self.zero
        return Groups(self.unpack(), self.scale.astype(jnp.float32), zero)

    def _in_order(self) -> Self:
        return dataclasses.replace(self, order=None)

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        matrix = Blocked.dequantize(self._in_order(), dtype)
        if self.order is None:
            return matrix
        axis = -2 if self.block_axis == "in" else -1
        rows = jnp.expand_dims(jnp.argsort(self.order, axis=-1), -1 if axis == -2 else -2)
        return jnp.take_along_axis(matrix, rows, axis=axis)

    def linear(self, x: jax.Array) -> jax.Array:
        return self._ordered(x, self.block_axis == "in", lambda leaf, x: Blocked.linear(leaf, x))

    def unembed(self, x: jax.Array, transposed: bool) -> jax.Array:
        over_groups = (self.block_axis == "in") != transposed
        return self._ordered(x, over_groups, lambda leaf, x: Blocked.unembed(leaf, x, transposed))

    def _ordered(self, x: jax.Array, over_groups: bool, multiply: Any) -> jax.Array:
        """A product of the matrix in its stored order: x, or else the result, is what moves."""
        if self.order is None:
            return multiply(self, x)
        if over_groups:
            return multiply(self._in_order(), jnp.take(x, self.order, axis=-1))
        y = multiply(self._in_order(), x)
        return jnp.take(y, jnp.argsort(self.order), axis=-1)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        if self.order is None or self.block_axis == "in":
            return super().take(ids, dtype)
        rows = Blocked.take(self._in_order(), ids, dtype)
        return jnp.take(rows, jnp.argsort(self.order), axis=-1)
