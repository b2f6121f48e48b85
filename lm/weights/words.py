"""Quantized matrices as CPUs multiply few rows by them fastest: integers in panels of 32-bit words.

Made for serving from formats of scaled groups, without rounding anything; never stored.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.files.ggml import block_type
from lm.kernels.cpu.native import available
from lm.kernels.cpu.products import LANES, SMALLEST_GROUP, GroupPanels, field_of, product
from lm.weights.blocked import BlockAxis, Groups
from lm.weights.gguf import KINDS, GGUFBlocks
from lm.weights.int4 import Int4
from lm.weights.leaf import StructuredWeight

LEVELS = frozenset({"IQ4_NL", "IQ4_XS", "MXFP4"})  # types whose numbers are not scaled integers


def native_kinds() -> frozenset[str]:
    """The types of ggml whose blocks this machine multiplies faster than decoded ones; or none."""
    is_native = jax.default_backend() == "cpu" and available("products")
    return frozenset(KINDS) - LEVELS if is_native else frozenset()


@flax.struct.dataclass
class Words(StructuredWeight):
    """A matrix of GGUF blocks or of integers in groups, on one CPU. Forward only.

    Attributes:
      panels: [K, R], R padded.
      columns: R.
      block_axis: the dimension that is K, "in" or "out".
    """

    panels: Any
    columns: int = flax.struct.field(pytree_node=False, default=0)
    block_axis: BlockAxis = flax.struct.field(pytree_node=False, default="in")

    @classmethod
    def of(cls, weight: Any) -> Words | None:
        """The same matrix, bit for bit; None for what the kernel has no form for."""
        if not isinstance(weight, GGUFBlocks | Int4) or weight.stack:
            return None
        if getattr(weight, "order", None) is not None:
            return None
        if isinstance(weight, Int4):
            bits = 8 // weight.values_per_byte
        else:
            planes = block_type(weight.kind).planes
            bits = max((plane.bits + plane.shift for plane in planes), default=8)
        panels = _panels(weight.groups(), *weight.size, bits)
        return None if panels is None else cls(panels, weight.size[1], weight.block_axis)

    @property
    def shape(self) -> tuple[int, ...]:
        K = self.panels.size[0]
        return (K, self.columns) if self.block_axis == "in" else (self.columns, K)

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        K, R = self.panels.size
        matrix = self.panels.decode().swapaxes(0, 1).reshape(K, R)[:, : self.columns].astype(dtype)
        return matrix if self.block_axis == "in" else matrix.T

    def linear(self, x: jax.Array) -> jax.Array:
        return self._product(x).astype(x.dtype) if self.block_axis == "in" else super().linear(x)

    def unembed(self, x: jax.Array, transposed: bool) -> jax.Array:
        if transposed == (self.block_axis == "out"):
            return self._product(x)
        return super().unembed(x, transposed)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        if self.block_axis == "in":
            return super().take(ids, dtype)
        flat = jnp.clip(ids.reshape(-1), 0, self.columns - 1)

        def lane(a: jax.Array) -> jax.Array:
            return a[flat // LANES, :, flat % LANES, None] if a.size else a

        rows = jax.tree.map(lane, self.panels).decode()
        return rows.reshape(*ids.shape, -1).astype(dtype)

    def _product(self, x: jax.Array) -> jax.Array:
        """x [..., K] -> float32 [..., R]."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        return product(rows, self.panels)[:, : self.columns].reshape(*x.shape[:-1], self.columns)


def _panels(groups: Groups, K: int, R: int, bits: int) -> GroupPanels | None:
    """The groups of a matrix [K, R] in panels; None for levels, and groups of other sizes."""
    quants, zero = groups.quants.reshape(K, R), groups.zero
    scale = groups.scale.reshape(-1, R)
    size = K // len(scale)
    if not jnp.issubdtype(quants.dtype, jnp.integer) or size % SMALLEST_GROUP:
        return None
    if jnp.issubdtype(quants.dtype, jnp.signedinteger):
        quants = (quants.astype(jnp.int32) + 128).astype(jnp.uint8)
        zero = zero + 128
    field = field_of(bits)
    quants = quants.astype(jnp.uint32).reshape(-1, 32 // field, R)
    shifts = jnp.arange(0, 32, field, dtype=jnp.uint32)[:, None]
    offsets, constant = groups.minimum, 0
    if isinstance(zero, int):
        constant = zero
    elif offsets is None:
        offsets = zero.astype(jnp.float32)
    else:
        return None

    def cut(a: jax.Array) -> jax.Array:
        """[n, R] as [P, n, 16]."""
        a = jnp.pad(a, ((0, 0), (0, -R % LANES)))
        return a.reshape(len(a), -1, LANES).swapaxes(0, 1)

    return GroupPanels(
        words=cut(jnp.sum(quants << shifts, axis=1, dtype=jnp.uint32)),
        scales=cut(scale),
        offsets=jnp.zeros(0) if offsets is None else cut(offsets.reshape(-1, R)),
        bits=bits,
        zero=constant,
        minimums=groups.minimum is not None,
    )
