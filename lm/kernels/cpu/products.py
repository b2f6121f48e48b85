"""Rows times a matrix of small integers in scaled groups: the C++ kernel, and the same in JAX.

The matrix [K, R] is cut into panels of 16 columns, R padded to a multiple of them. Shape suffixes:
B rows, P panels, G groups along K.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.cpu.native import available

LANES = 16
MANY_ROWS = 256  # from these on, numbers are decoded once for all, and XLA multiplies faster
SMALLEST_GROUP = 16  # numbers of a group are a multiple of it


@flax.struct.dataclass
class GroupPanels:
    """A matrix [K, 16 P] of integers of `bits` bits in groups along K.

    A number is scale (q - zero); plus the group's minimum, or less its zero point, where there are
    offsets.

    Attributes:
      words: uint32 [P, K field / 32, 16]; the first of a word's numbers in its lowest bits.
      scales: float32 [P, G, 16].
      offsets: float32 [P, G, 16]; or [0], for none.
      bits: that numbers have, up to 8.
      zero: a zero point of all groups.
      minimums: whether the offsets are minimums, or zero points.
    """

    words: jax.Array
    scales: jax.Array
    offsets: jax.Array
    bits: int = flax.struct.field(pytree_node=False, default=4)
    zero: int = flax.struct.field(pytree_node=False, default=0)
    minimums: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def field(self) -> int:
        """Bits of a word that hold a number: 4 or 8."""
        return field_of(self.bits)

    @property
    def size(self) -> tuple[int, int]:
        """K and 16 P."""
        return self.words.shape[1] * 32 // self.field, self.words.shape[0] * LANES

    def decode(self) -> jax.Array:
        """float32 [P, K, 16]."""
        P, G, _ = self.scales.shape
        shifts = jnp.arange(0, 32, self.field, dtype=jnp.uint32)[:, None]
        quants = self.words[:, :, None] >> shifts & (2**self.field - 1)
        quants = quants.astype(jnp.int32).reshape(P, G, -1, LANES).astype(jnp.float32)
        offsets = self.offsets[:, :, None] if self.offsets.size else 0.0
        if self.minimums:
            numbers = self.scales[:, :, None] * (quants - self.zero) + offsets
        else:
            numbers = self.scales[:, :, None] * (quants - (self.zero + offsets))
        return numbers.reshape(P, -1, LANES)


def field_of(bits: int) -> int:
    """The smaller of 4 and 8 that holds so many bits."""
    return 4 if bits <= 4 else 8


def product(x: jax.Array, panels: GroupPanels) -> jax.Array:
    """x float32 [B, K] times the matrix -> float32 [B, 16 P]."""
    K, R = panels.size
    if len(x) >= MANY_ROWS or not available("products"):
        matrix = jax.lax.optimization_barrier(panels.decode().swapaxes(0, 1).reshape(K, R))
        return x @ matrix
    call = jax.ffi.ffi_call("lm_products", jax.ShapeDtypeStruct((len(x), R), jnp.float32))
    return call(
        x, panels.words, panels.scales, panels.offsets,
        bits=np.int64(panels.bits), zero=np.float32(panels.zero),
        minimums=np.bool_(panels.minimums),
    )  # fmt: skip
