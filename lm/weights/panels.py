"""Matrices cut into narrow panels, as CPUs multiply few rows by them fastest.

A product of few rows takes as long as reading the matrix. XLA's CPU backend copies a matrix
`[in, out]` into panels at each multiplication; panels stored that way from the start it reads once,
nearly as fast as memory gives them.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.kernels.matmul import FEWEST_ROWS
from lm.weights.blocked import RENAMED_FIELDS, BlockAxis
from lm.weights.leaf import StructuredWeight

WIDTHS = (64, 32)  # of a panel, the better first


@flax.struct.dataclass
class Panels(StructuredWeight):
    """A matrix multiplied by, cut along `out`; or an embedding table, cut along the vocabulary.

    Attributes:
      panels: [n, K, width]; K is `in`, or the embedding's size.
      block_axis: the dimension that is cut, "out" or, for an embedding table, "in".
    """

    renamed_fields = RENAMED_FIELDS
    panels: Any
    block_axis: BlockAxis = flax.struct.field(pytree_node=False, default="out")

    @classmethod
    def of(cls, matrix: jax.Array, block_axis: BlockAxis = "out") -> Panels:
        """Raises ValueError where no width of a panel divides the dimension to be cut."""
        if block_axis == "in":
            matrix = matrix.T
        K, size = matrix.shape
        width = panel_width(size)
        if width is None:
            raise ValueError(
                f"{block_axis}={size} is not a multiple of {WIDTHS[-1]}; keep the matrix whole"
            )
        return cls(matrix.reshape(K, -1, width).swapaxes(0, 1), block_axis)

    @property
    def shape(self) -> tuple[int, ...]:
        n, K, width = self.panels.shape
        return (K, n * width) if self.block_axis == "out" else (n * width, K)

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        n, K, width = self.panels.shape
        matrix = self.panels.astype(dtype).swapaxes(0, 1).reshape(K, n * width)
        return matrix if self.block_axis == "out" else matrix.T

    def linear(self, x: jax.Array) -> jax.Array:
        return self._product(x).astype(x.dtype) if self.block_axis == "out" else super().linear(x)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        if self.block_axis == "out":
            return super().take(ids, dtype)
        width = self.panels.shape[-1]
        ids = jnp.clip(ids, 0, self.shape[0] - 1)
        return self.panels[ids // width, :, ids % width].astype(dtype)

    def unembed(self, x: jax.Array, transposed: bool) -> jax.Array:
        if transposed == (self.block_axis == "in"):
            return self._product(x)
        return super().unembed(x, transposed)

    def cast(self, dtype: DTypeLike) -> Panels:
        return Panels(self.panels.astype(dtype), self.block_axis)

    def _product(self, x: jax.Array) -> jax.Array:
        """x [..., K] by the panels -> float32 [..., n width]."""
        n, K, width = self.panels.shape
        rows = x.reshape(-1, K)
        count = len(rows)
        if count < FEWEST_ROWS:
            rows = jnp.pad(rows, ((0, FEWEST_ROWS - count), (0, 0)))
        y = jax.lax.dot_general(
            jnp.broadcast_to(rows, (n, *rows.shape)),
            self.panels.astype(x.dtype),
            (((2,), (1,)), ((0,), (0,))),
            preferred_element_type=jnp.float32,
        )
        return y.swapaxes(0, 1).reshape(len(rows), -1)[:count].reshape(*x.shape[:-1], n * width)


def panel_width(size: int) -> int | None:
    """Width of the panels that a dimension of `size` is cut into; None where it cannot be."""
    return next((width for width in WIDTHS if size % width == 0), None)
