"""Eight-bit floating point with a scale for the tensor, each column, or each 128 x 128 block."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.weights.blocked import Blocked

DTYPES = ("float8_e4m3fn", "float8_e5m2")


@flax.struct.dataclass
class Fp8(Blocked):
    """values * scale, as DeepSeek-V3 (arXiv:2412.19437) and compressed-tensors store weights.

    Their files hold the transposed matrix and, for blocks, the transposed scales.

    Attributes:
      values: float8_e4m3fn or float8_e5m2 [*stack, in, out].
      scale: floating point [*stack, 1, 1], [*stack, 1, out], or of blocks, the last of which may be
        shorter: [*stack, ceil(in / block), ceil(out / block)].
      block: rows and columns with one scale; None is one of the other two.
    """

    values: Any
    scale: Any
    block: int | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def quantize(
        cls,
        weight: jax.Array,
        dtype: DTypeLike = jnp.float8_e4m3fn,
        block: int | None = None,
        per_channel: bool = True,
    ) -> Fp8:
        """Round to nearest, the largest magnitude of each scale becoming the dtype's largest.

        Args:
          weight: [*stack, in, out].
          dtype: float8_e4m3fn or float8_e5m2.
          block: a scale for each block of so many rows and columns, 128 in DeepSeek's files.
          per_channel: without `block`, a scale for each column; otherwise one for the matrix.

        Raises:
          ValueError: another dtype.
        """
        if jnp.dtype(dtype).name not in DTYPES:
            raise ValueError(f"{jnp.dtype(dtype).name} is none of {', '.join(DTYPES)}")
        weight = jnp.asarray(weight, jnp.float32)
        if block is None:
            axes = -2 if per_channel else (-2, -1)
            largest = jnp.max(jnp.abs(weight), axis=axes, keepdims=True)
        else:
            padding = [(0, 0)] * (weight.ndim - 2) + [(0, -n % block) for n in weight.shape[-2:]]
            padded = jnp.pad(jnp.abs(weight), padding)
            rows, columns = (n // block for n in padded.shape[-2:])
            parts = padded.reshape(*weight.shape[:-2], rows, block, columns, block)
            largest = jnp.max(parts, axis=(-3, -1))
        top = float(jnp.finfo(dtype).max)
        scale = jnp.where(largest > 0, largest / top, 1.0)
        # A conversion beyond the largest would be NaN: rounding of the scale may lead there.
        scaled = jnp.clip(weight / _spread_to(scale, weight.shape, block), -top, top)
        return cls(scaled.astype(dtype), scale, block)

    @property
    def size(self) -> tuple[int, int]:
        return self.values.shape[-2:]

    @property
    def granularity(self) -> tuple[int, int]:
        if self.block is None:
            return 1, 1
        # A short last block is an uneven part: such a dimension stays whole.
        K, R = (n if n % self.block else self.block for n in self.size)
        return K, R

    @property
    def output_scale(self) -> jax.Array | None:
        if self.block is not None:
            return None
        shape = (*self.scale.shape[:-1], self.values.shape[-1])
        return jnp.broadcast_to(self.scale.astype(jnp.float32), shape)

    def decode(self, dtype: DTypeLike) -> jax.Array:
        if self.block is None:
            return self.values.astype(dtype)
        scale = _spread_to(self.scale.astype(jnp.float32), self.values.shape, self.block)
        return (self.values.astype(jnp.float32) * scale).astype(dtype)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        ids = jnp.clip(ids, 0, self.size[0] - 1)
        rows = jnp.take(self.values, ids, axis=0).astype(jnp.float32)
        if self.block is None:
            return (rows * self.scale.astype(jnp.float32)[0]).astype(dtype)
        scale = jnp.take(self.scale, ids // self.block, axis=0).astype(jnp.float32)
        scale = jnp.repeat(scale, self.block, axis=-1)[..., : self.size[1]]
        return (rows * scale).astype(dtype)


def _spread_to(scale: jax.Array, shape: tuple[int, ...], block: int | None) -> jax.Array:
    """Scales of blocks for each number; others broadcast as they are."""
    if block is None:
        return scale
    for axis in (-2, -1):
        scale = jnp.repeat(scale, block, axis=axis)
    return scale[..., : shape[-2], : shape[-1]]
