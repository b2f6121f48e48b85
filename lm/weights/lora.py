"""Low-rank adapters over any weight: LoRA (arXiv:2106.09685), DoRA, and several chosen by row.

`y = x W + scale (x a) b`, with `a` [in, r] and `b` [r, out]. The base is an array or a leaf, whose
own functions multiply it, so that an adapter over a quantized weight (QLoRA) is nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lm.kernels.matmul import matmul
from lm.sharding import Rules
from lm.weights.leaf import (
    StructuredWeight,
    Weight,
    grouped_linear,
    is_structured,
    linear,
    take,
    unembed,
)
from lm.weights.specs import Kind, ParamSpec, cast, shardings

Tree = Any


def _dense(base: Weight, dtype: DTypeLike) -> jax.Array:
    return base.dequantize(dtype) if isinstance(base, StructuredWeight) else base.astype(dtype)


def _base_specs(base: Any, spec: ParamSpec) -> Any:
    """The specs of a base, by its kind."""
    if isinstance(base, StructuredWeight):
        return base.specs(spec)
    return None if base is None else dataclasses.replace(spec, dtype=base.dtype)


def _spec(array: Any, axes: tuple[str | None, ...], kind: Kind = "vector") -> ParamSpec | None:
    if array is None:
        return None
    return ParamSpec(array.shape, axes, "zeros", dtype=array.dtype, kind=kind)


class Adapted(StructuredWeight):
    """What `LoRA` and `MultiLoRA` share."""

    base: Any
    a: Any
    b: Any
    scale: Any

    def scaled_b(self, dtype: DTypeLike) -> jax.Array:
        """scale b, shaped like `b`."""
        return (self.b.astype(jnp.float32) * self.scale[..., None, None]).astype(dtype)

    def cast(self, dtype: DTypeLike) -> Self:
        """The base, `a` and `b` in `dtype`; scale and magnitude stay float32."""
        base, a, b = cast((self.base, self.a, self.b), dtype)
        return dataclasses.replace(self, base=base, a=a, b=b)  # type: ignore[type-var]

    def shardings(self, axes: tuple[str | None, ...], rules: Rules, mesh: Mesh) -> Self:
        return shardings(self.specs(ParamSpec(self.shape, axes)), rules, mesh)


@flax.struct.dataclass
class LoRA(Adapted):
    """A weight and what is added to it.

    For training it is a node of the tree, not one weight: each part trains or is frozen by its own
    path (`.../query/a`), and in the one half of a partitioned tree the parts of the other are None.

    Attributes:
      base: the weight beneath, [*stack, in, out].
      a: [*stack, in, r].
      b: [*stack, r, out].
      scale: float32 [*stack]; alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
      magnitude: float32 [*stack, out], or None. With it each column of the sum has this length
        (DoRA, arXiv:2402.09353); the length it is divided by gets no gradient, as in section 4.3.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    magnitude: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.a.shape[:-1], self.b.shape[-1]) if self.base is None else self.base.shape

    def _sum(self) -> jax.Array:
        a, b = self.a.astype(jnp.float32), self.scaled_b(jnp.float32)
        return _dense(self.base, jnp.float32) + jnp.einsum("...ir,...ro->...io", a, b)

    def column_scale(self, total: jax.Array | None = None) -> jax.Array | None:
        """What DoRA multiplies each column of the sum by, float32 [*stack, out]; None without."""
        if self.magnitude is None:
            return None
        norm = jnp.linalg.norm(self._sum() if total is None else total, axis=-2)
        # Padding of the vocabulary has columns of zeros.
        norm = jax.lax.stop_gradient(jnp.where(norm > 0, norm, 1.0))
        return self.magnitude.astype(jnp.float32) / norm

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The merged matrix, added up in float32."""
        total = self._sum()
        columns = self.column_scale(total)
        return (total if columns is None else total * columns[..., None, :]).astype(dtype)

    def linear(self, x: jax.Array) -> jax.Array:
        delta = matmul(matmul(x, self.a.astype(x.dtype)), self.scaled_b(x.dtype))
        return self._scale_columns(linear(x, self.base) + delta)

    def grouped_linear(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        inner = jax.lax.ragged_dot(x, self.a.astype(x.dtype), group_sizes)
        delta = jax.lax.ragged_dot(inner, self.scaled_b(x.dtype), group_sizes)
        y = grouped_linear(x, self.base, group_sizes) + delta
        columns = self.column_scale()
        if columns is None:
            return y
        rows = jnp.repeat(columns, group_sizes, axis=0, total_repeat_length=x.shape[0])
        return (y * rows).astype(x.dtype)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        delta = take(self.a, ids, dtype) @ self.scaled_b(dtype)
        return self._scale_columns(take(self.base, ids, dtype) + delta)

    def unembed(self, x: jax.Array, transposed: bool) -> jax.Array:
        a, b = self.a.astype(x.dtype), self.scaled_b(x.dtype)
        if transposed:
            x = self._scale_columns(x)
            inner = jnp.einsum("...d,rd->...r", x, b)
            return unembed(x, self.base, True) + unembed(inner, a, True)
        return self._scale_columns(unembed(x, self.base, False) + unembed(matmul(x, a), b, False))

    def _scale_columns(self, y: jax.Array) -> jax.Array:
        columns = self.column_scale()
        return y if columns is None else (y * columns).astype(y.dtype)

    def specs(self, spec: ParamSpec) -> Self:
        """A tree like this one, of specs: `a` is split by the axis of `in`, `b` by `out`'s."""
        *stack, rows, columns = spec.axes
        return type(self)(
            _base_specs(self.base, spec),
            _spec(self.a, (*stack, rows, None), spec.kind),
            _spec(self.b, (*stack, None, columns), spec.kind),
            _spec(self.scale, tuple(stack)),
            _spec(self.magnitude, (*stack, columns)),
        )


@flax.struct.dataclass
class MultiLoRA(Adapted):
    """A weight and several adapters, of which every row of the batch has its own or none.

    Which row has which adapter is data: `bind` stores the indices beside the adapters before the
    model runs, as an array that layers, scans and `jit` carry like any other. All n adapters are
    multiplied, as one of rank n r, and those that are not a row's own are masked in between: dense
    products without gathered copies, efficient while n r is small beside `in` and `out`.

    Attributes:
      base: the weight beneath, [*stack, in, out].
      a: [*stack, n, in, r]; an adapter of a smaller rank has zeros.
      b: [*stack, n, r, out].
      scale: float32 [*stack, n].
      rows: int32 [*stack, B], the adapter of each row, -1 for none; of shape [*stack, N] for a flat
        batch. None until `bind`.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    rows: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def num_adapters(self) -> int:
        return self.a.shape[-3]

    def select(self, index: int) -> LoRA:
        """Adapter `index` alone.

        Raises:
          ValueError: there is no such adapter.
        """
        if not 0 <= index < self.num_adapters:
            raise ValueError(f"adapter {index} of {self.num_adapters}; they count from 0")
        return LoRA(
            self.base, self.a[..., index, :, :], self.b[..., index, :, :], self.scale[..., index]
        )

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        raise ValueError(
            f"a weight with {self.num_adapters} adapters is not one matrix; select an adapter first"
        )

    def _own(self, inner: jax.Array) -> jax.Array:
        """inner [B, ..., n, r] with zeros for the adapters that are not the row's."""
        rows = self.rows
        if rows is None:
            raise ValueError("the rows of these adapters are not known; use lm.weights.bind first")
        if rows.shape != inner.shape[: rows.ndim]:
            raise ValueError(
                f"adapters are bound to rows {list(rows.shape)}, the batch is "
                f"{list(inner.shape[:-2])}"
            )
        own = rows[..., None] == jnp.arange(self.num_adapters)
        between = (1,) * (inner.ndim - rows.ndim - 2)
        return jnp.where(own.reshape(*rows.shape, *between, -1, 1), inner, 0)

    def linear(self, x: jax.Array) -> jax.Array:
        inner = self._own(jnp.einsum("...i,nir->...nr", x, self.a.astype(x.dtype)))
        return linear(x, self.base) + jnp.einsum("...nr,nro->...o", inner, self.scaled_b(x.dtype))

    def grouped_linear(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        raise ValueError("experts with several adapters are not supported; select an adapter")

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        inner = jnp.moveaxis(jnp.take(self.a, ids, axis=1, mode="clip"), 0, -2).astype(dtype)
        delta = jnp.einsum("...nr,nro->...o", self._own(inner), self.scaled_b(dtype))
        return take(self.base, ids, dtype) + delta

    def unembed(self, x: jax.Array, transposed: bool) -> jax.Array:
        a, b = self.a.astype(x.dtype), self.scaled_b(x.dtype)
        first, second = ("nro->...nr", "nir->...i") if transposed else ("nir->...nr", "nro->...o")
        variable = "o" if transposed else "i"
        inner = self._own(jnp.einsum(f"...{variable},{first}", x, b if transposed else a))
        delta = jnp.einsum(
            f"...nr,{second}", inner, a if transposed else b, preferred_element_type=jnp.float32
        )
        return unembed(x, self.base, transposed) + delta

    def specs(self, spec: ParamSpec) -> Self:
        *stack, rows, columns = spec.axes
        return type(self)(
            _base_specs(self.base, spec),
            _spec(self.a, (*stack, None, rows, None), spec.kind),
            _spec(self.b, (*stack, None, None, columns), spec.kind),
            _spec(self.scale, (*stack, None)),
            _spec(self.rows, (*stack, None)),
        )


def num_adapters(params: Tree) -> int:
    """Number of adapters that rows choose from; 0 where no weight has several."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, MultiLoRA))
    return next((x.num_adapters for x in leaves if isinstance(x, MultiLoRA)), 0)


def bind(params: Tree, rows: jax.Array) -> Tree:
    """`params` with the rows' adapters in every `MultiLoRA`: int32 [B], -1 for none.

    Call it inside the function that is compiled, before `forward` and `make_head`.
    """

    def leaf(weight: Any) -> Any:
        if not isinstance(weight, MultiLoRA):
            return weight
        shape = (*weight.a.shape[:-3], *rows.shape)
        return dataclasses.replace(weight, rows=jnp.broadcast_to(rows, shape))

    return jax.tree.map(leaf, params, is_leaf=is_structured)
