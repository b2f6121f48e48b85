"""What a weight may be, and the only four functions that touch one.

A weight is a matrix `[*stack, in, out]`, held as an array or as a `StructuredWeight`: a small tree
of arrays that knows how to multiply by itself. Heads are a reshape of activations, not of weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeGuard

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from lm.kernels.matmul import dot, matmul
from lm.sharding import Rules


class StructuredWeight:
    """A weight that is more than an array. Subclasses are `flax.struct.dataclass` trees.

    `renamed_fields` maps the names that older checkpoints have for static fields to today's.
    """

    renamed_fields: ClassVar[Mapping[str, str]] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix it stands for, `[*stack, in, out]`."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        arrays = jax.tree.leaves(self)
        return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in arrays)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / math.prod(self.shape)

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The matrix itself, as an array of `dtype`."""
        raise NotImplementedError

    def linear(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out] of x's dtype."""
        return linear(x, self.dequantize(x.dtype))

    def grouped_linear(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """x [N, in], rows sorted by group, times the group's own matrix -> [N, out]."""
        return grouped_linear(x, self.dequantize(x.dtype), group_sizes)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Rows of the matrix: ids [...] -> [..., out]."""
        return take(self.dequantize(dtype), ids, dtype)

    def unembed(self, x: jax.Array, transposed: bool) -> jax.Array:
        """x [..., in] -> float32 [..., out]; `transposed` reads the matrix as `[out, in]`."""
        return unembed(x, self.dequantize(x.dtype), transposed)

    def layer(self, index: int | jax.Array) -> Self:
        """The leaf of one layer out of a stack."""
        return jax.tree.map(lambda a: a[index], self)

    def cast(self, dtype: DTypeLike) -> Self:
        """The leaf with what is held in floating point for computing in `dtype`; others as is."""
        return self

    def specs(self, spec: Any) -> Any:
        """The specs of what the leaf holds; by default one, of the matrix, that knows the leaf."""
        shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self)
        return dataclasses.replace(spec, leaf=shape)

    def shardings(self, axes: tuple[str | None, ...], rules: Rules, mesh: Mesh) -> Self:
        """A tree like this leaf, of NamedShardings, for a matrix with these logical axes."""
        raise NotImplementedError


def is_structured(x: Any) -> TypeGuard[StructuredWeight]:
    """As `is_leaf` of tree functions, to stop at structured weights."""
    return isinstance(x, StructuredWeight)


Weight = jax.Array | StructuredWeight
Shardings = NamedSharding | StructuredWeight


def linear(x: jax.Array, weight: Weight, bias: jax.Array | None = None) -> jax.Array:
    """x [..., in] times weight [in, out], plus bias [out] -> [..., out], in x's dtype."""
    if isinstance(weight, StructuredWeight):
        y = weight.linear(x)
    else:
        y = matmul(x, weight.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)


def grouped_linear(x: jax.Array, weight: Weight, group_sizes: jax.Array) -> jax.Array:
    """Each group of rows times its own matrix.

    Args:
      x: [N, in], rows sorted by group.
      weight: [groups, in, out].
      group_sizes: int32 [groups], rows of each; their sum is at most N.
    """
    if isinstance(weight, StructuredWeight):
        return weight.grouped_linear(x, group_sizes)
    return jax.lax.ragged_dot(x, weight.astype(x.dtype), group_sizes)


def take(weight: Weight, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Embedding rows: weight [in, out], ids int [...] -> [..., out] of `dtype`."""
    if isinstance(weight, StructuredWeight):
        return weight.take(ids, dtype)
    return jnp.take(weight, ids, axis=0, mode="clip").astype(dtype)


def unembed(x: jax.Array, weight: Weight, transposed: bool) -> jax.Array:
    """Logits: x [..., D] -> float32 [..., V].

    Args:
      x: hidden states.
      weight: [D, V], or [V, D] where `transposed` (output tied to the embedding).
      transposed: which of the two.
    """
    if isinstance(weight, StructuredWeight):
        return weight.unembed(x, transposed)
    return dot(x, weight.astype(x.dtype), transpose_y=transposed, out_dtype=jnp.float32)
