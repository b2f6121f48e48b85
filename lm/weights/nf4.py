"""Four-bit NormalFloat with double quantization (QLoRA, arXiv:2305.14314), as bitsandbytes has it.

bitsandbytes flattens a matrix `[out, in]` row by row into blocks of 64 with the largest magnitude
of each, and packs two codes into a byte, the first into its high half. Here the same bytes and
scales are transposed: a block is 64 numbers along `in`, wherever 64 divides it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.weights.blocked import BlockAxis, Blocked, lookup, nibbles, spread

_F32 = np.float32
# Quantiles of the normal distribution, scaled to [-1, 1] with an exact zero (appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent and one of fraction, over the largest.
FP4_LEVELS = tuple(s * v / 12 for s in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
NESTED_BLOCK = 256  # scales with one scale of their own
_GRID = 1 << 16


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 levels for scales: seven decades of both signs, each twice as fine as the one below
    (arXiv:1511.04561): float32, ascending."""
    levels = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade
        i = np.arange(steps + 1)
        width = float((_F32(1) - _F32(0.1)) / _F32(steps))
        # From the nearer end, as torch.linspace does, so that every bit is the same.
        edges = np.where(
            i < (steps + 1) // 2, float(_F32(0.1)) + width * i, 1 - width * (steps - i)
        )
        edges = edges.astype(_F32)
        means = _F32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / _F32(2))
        levels += [*means, *-means]
    return np.sort(np.array(levels, _F32))


@functools.cache
def _nearest_on_grid() -> np.ndarray:
    """The nearest of `dynamic_map` for 2^16 numbers from -1 to 1."""
    levels = dynamic_map().astype(np.float64)
    grid = np.arange(_GRID) / ((_GRID - 1) / 2) - 1
    return np.searchsorted((levels[:-1] + levels[1:]) / 2, grid, side="left").astype(np.uint8)


@flax.struct.dataclass
class NF4(Blocked):
    """level[code] * absmax, where absmax is one of 64 numbers, or is itself quantized.

    Sharding: a shard along K holds whole blocks; where the block does not divide K, blocks run on
    from row to row and the matrix cannot be split.

    Attributes:
      codes: uint8 [*stack, K/2, R]; of two codes along K, the first in the high half.
      absmax: of each block, [*stack, K/64, R]; flat, [*stack, 1, ceil(K R / 64)], where 64 does not
        divide K. float32, or with double quantization uint8: codes of `dynamic_map`.
      nested: float32 [*stack, ceil(blocks / 256)], the scale of 256 absmax in bitsandbytes' order,
        or None.
      offset: float32 [*stack], the mean absmax, or None.
      kind: "nf4" or "fp4".
      block: numbers with one absmax.
      block_axis: "in", or "out" for an embedding table: K is that dimension.
    """

    codes: Any
    absmax: Any
    nested: Any = None
    offset: Any = None
    kind: Literal["nf4", "fp4"] = flax.struct.field(pytree_node=False, default="nf4")
    block: int = flax.struct.field(pytree_node=False, default=64)
    block_axis: BlockAxis = flax.struct.field(pytree_node=False, default="in")

    other_arrays = ("nested", "offset")

    @classmethod
    def quantize(
        cls,
        weight: jax.Array,
        double: bool = True,
        kind: Literal["nf4", "fp4"] = "nf4",
        block: int = 64,
        block_axis: BlockAxis = "in",
    ) -> NF4:
        """As bitsandbytes' `quantize_4bit` (`double` is its `compress_statistics`) on a CPU.

        The mean absmax may differ in its last bit: the order of that sum is torch's own.

        Args:
          weight: [*stack, in, out].
          double: quantize the scales too, 4.127 bits per weight instead of 4.5.
          kind: which levels.
          block: numbers with one scale.
          block_axis: which dimension is cut into blocks.

        Raises:
          ValueError: that dimension is odd.
        """
        rows = jnp.asarray(weight, jnp.float32)
        rows = jnp.swapaxes(rows, -1, -2) if block_axis == "in" else rows
        *stack, R, K = rows.shape
        if K % 2:
            raise ValueError(f"two codes share a byte: {block_axis}={K} must be even")
        blocks = _pad(rows.reshape(*stack, R * K), block)
        absmax = jnp.max(jnp.abs(blocks), axis=-1)
        codes = _encode(blocks, absmax, kind).reshape(*stack, -1)[..., : R * K]
        packed = codes[..., ::2] << 4 | codes[..., 1::2]
        nested = offset = None
        if double:
            absmax, nested, offset = _quantize_scales(absmax)
        return cls.from_bytes(packed, absmax, nested, offset, (R, K), kind, block, block_axis)

    @classmethod
    def from_bytes(
        cls,
        codes: Any,
        absmax: Any,
        nested: Any,
        offset: Any,
        shape: tuple[int, int],
        kind: Literal["nf4", "fp4"] = "nf4",
        block: int = 64,
        block_axis: BlockAxis = "in",
    ) -> NF4:
        """From bitsandbytes' arrays: codes uint8 [*stack, R K / 2], absmax [*stack, blocks].

        NumPy arrays stay such: `jax.device_put` them where they belong.

        `shape` is the matrix's (R, K) as torch has it, `[out, in]` or, for an embedding table with
        `block_axis="out"`, `[vocab, embed]`; `nested` and `offset` are attributes.
        """
        R, K = shape
        stack = codes.shape[:-1]
        codes = codes.reshape(*stack, R, K // 2).swapaxes(-1, -2)
        absmax = absmax.reshape(*stack, 1, -1)
        if K % block == 0:
            absmax = absmax.reshape(*stack, R, K // block).swapaxes(-1, -2)
        return cls(codes, absmax, nested, offset, kind, block, block_axis)

    def to_bytes(self) -> tuple[jax.Array, jax.Array]:
        """bitsandbytes' codes uint8 [*stack, R K / 2] and absmax [*stack, blocks]."""
        codes = jnp.swapaxes(self.codes, -1, -2).reshape(*self.stack, -1)
        return codes, self._flat_absmax()

    @property
    def size(self) -> tuple[int, int]:
        return 2 * self.codes.shape[-2], self.codes.shape[-1]

    @property
    def granularity(self) -> tuple[int, int]:
        K, R = self.size
        return (self.block, 1) if K % self.block == 0 else (K, R)

    def _flat_absmax(self) -> jax.Array:
        fits = self.size[0] % self.block == 0
        absmax = jnp.swapaxes(self.absmax, -1, -2) if fits else self.absmax
        return absmax.reshape(*self.stack, -1)

    def canonical(self) -> Self:
        """With a float32 absmax for each block, or each number where blocks cross rows."""
        K, R = self.size
        leaf = self.unnested()
        if K % self.block == 0:
            return leaf
        flat = jnp.repeat(leaf.absmax, self.block, axis=-1)[..., : K * R]
        return dataclasses.replace(
            leaf, absmax=jnp.swapaxes(flat.reshape(*self.stack, R, K), -1, -2)
        )

    def unnested(self) -> Self:
        """The same numbers from float32 scales: 4.5 bits per weight, without a table lookup."""
        if self.nested is None:
            return self
        flat = self._flat_absmax()
        scale = jnp.repeat(self.nested, NESTED_BLOCK, axis=-1)[..., : flat.shape[-1]]
        scaled = jnp.asarray(dynamic_map())[flat] * scale
        # Rounded twice, as bitsandbytes does; fused into one operation it would not be.
        absmax = jax.lax.optimization_barrier(scaled) + self.offset[..., None]
        absmax = absmax.reshape(self.absmax.shape[:-2] + (1, -1))
        K, R = self.size
        if K % self.block == 0:
            absmax = jnp.swapaxes(absmax.reshape(*self.stack, R, -1), -1, -2)
        return dataclasses.replace(self, absmax=absmax, nested=None, offset=None)

    def decode(self, dtype: DTypeLike) -> jax.Array:
        K = self.size[0]
        leaf = self.canonical()
        codes = nibbles(leaf.codes, high_first=True)
        return (lookup(codes, LEVELS[self.kind]) * spread(leaf.absmax, K)).astype(dtype)


def _pad(flat: jax.Array, block: int) -> jax.Array:
    """[..., n] as [..., ceil(n / block), block], with zeros."""
    padding = [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % block)]
    return jnp.pad(flat, padding).reshape(*flat.shape[:-1], -1, block)


@functools.partial(jax.jit, static_argnames="kind")
def _encode(blocks: jax.Array, absmax: jax.Array, kind: str) -> jax.Array:
    levels = np.array(LEVELS[kind], _F32)
    order = np.argsort(levels, kind="stable").astype(np.uint8)
    ordered = levels[order]
    middles = (ordered[:-1] + ordered[1:]) / _F32(2)
    inverse = jax.lax.optimization_barrier(1 / jnp.maximum(absmax, 1e-38))
    scaled = jnp.clip(blocks * inverse[..., None], -1, 1)
    # The number of middles below, one after another: memory for one comparison at a time.
    rank = jnp.zeros(scaled.shape, jnp.uint8)
    for middle in middles:
        rank += scaled > middle
    return rank if kind == "nf4" else jnp.asarray(order)[rank]


def _quantize_scales(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """absmax [*stack, blocks] as codes of `dynamic_map`, their scales, and the mean taken off."""
    offset = jnp.mean(absmax, axis=-1)
    count = absmax.shape[-1]
    blocks = _pad(absmax - offset[..., None], NESTED_BLOCK)
    nested = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks / jnp.where(nested > 0, nested, 1)[..., None]
    # bitsandbytes rounds to a grid first, and then to the level nearest to that.
    grid = jnp.clip((scaled + 1) * ((_GRID - 1) / 2) + 0.5, 0, _GRID - 1).astype(jnp.int32)
    codes = jnp.where(nested[..., None] > 0, jnp.asarray(_nearest_on_grid())[grid], 0)
    return codes.reshape(*absmax.shape[:-1], -1)[..., :count], nested, offset
