"""Int8 weights with one scale per output channel, for activations as they are or in int8 too."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.weights.blocked import Blocked, product


@flax.struct.dataclass
class Int8(Blocked):
    """Symmetric round-to-nearest int8.

    Attributes:
      values: int8 [*stack, in, out].
      scale: float32 [*stack, 1, out]; the matrix is `values * scale`.
      dynamic: `linear` also rounds each row of activations to int8, with the scale of its largest
        (W8A8), and multiplies whole numbers. Its gradient is that of the weights alone.
    """

    values: Any
    scale: Any
    dynamic: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def quantize(cls, weight: jax.Array, dynamic: bool = False) -> Int8:
        """The nearest Int8 to `weight` [*stack, in, out]; a column of zeros gets scale 1."""
        weight = jnp.asarray(weight, jnp.float32)
        values, scale = round_rows(jnp.swapaxes(weight, -1, -2))
        return cls(jnp.swapaxes(values, -1, -2), jnp.swapaxes(scale, -1, -2), dynamic)

    @property
    def size(self) -> tuple[int, int]:
        return self.values.shape[-2:]

    @property
    def granularity(self) -> tuple[int, int]:
        return 1, 1

    @property
    def output_scale(self) -> jax.Array:
        return self.scale

    def decode(self, dtype: DTypeLike) -> jax.Array:
        return self.values.astype(dtype)

    def linear(self, x: jax.Array) -> jax.Array:
        return _dynamic(x, self) if self.dynamic else super().linear(x)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        rows = jnp.take(self.values, ids, axis=0, mode="clip").astype(jnp.float32)
        return (rows * self.scale[0]).astype(dtype)


def round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x float32 [..., n] as int8 [..., n] and its scale [..., 1]; zeros get scale 1."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127.0, 1.0)
    return jnp.round(x / scale).astype(jnp.int8), scale


@jax.custom_vjp
def _dynamic(x: jax.Array, leaf: Int8) -> jax.Array:
    rows, scale = round_rows(x.astype(jnp.float32))

    def multiply(rows: jax.Array, values: jax.Array) -> jax.Array:
        dims = (((rows.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(rows, values, dims, preferred_element_type=jnp.int32)

    def cpu(rows: jax.Array, values: jax.Array) -> jax.Array:
        # One row alone goes to a loop that is twenty times slower than two rows.
        flat = rows.reshape(-1, rows.shape[-1])
        pair = flat if len(flat) > 1 else jnp.pad(flat, ((0, 1), (0, 0)))
        y = multiply(jax.lax.optimization_barrier(pair), values)
        return y[: len(flat)].reshape(*rows.shape[:-1], -1)

    y = jax.lax.platform_dependent(rows, leaf.values, cpu=cpu, default=multiply)
    return (y.astype(jnp.float32) * scale * leaf.scale[0]).astype(x.dtype)


def _dynamic_forward(x, leaf):
    return _dynamic(x, leaf), (leaf, jnp.zeros((0,), x.dtype))


def _dynamic_backward(saved, dy):
    leaf, like = saved
    return product(dy, leaf, True, like.dtype), None


_dynamic.defvjp(_dynamic_forward, _dynamic_backward)
