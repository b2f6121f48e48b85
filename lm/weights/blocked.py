"""What formats of scaled blocks share: products without the whole matrix, gradients, sharding.

Such a leaf stands for a matrix that is cut into blocks along one of its dimensions, K; the other
is R. Every array of it is `[*stack, K times a ratio, R]`, or has 1 in place of either. R is last
because the numbers of a block are then in different vectors, not in different lanes of one:
unpacking is four times faster on CPU, and fills the lanes of a TPU.

Blocks run along `in` for a matrix that is multiplied by, so K = in and R = out. An embedding table
`[vocab, embed]`, of which rows are taken, has them along `out`: K = out and R = in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from lm.kernels.matmul import dot
from lm.sharding import Rules, check_divides, current_layout, named_sharding
from lm.weights import leaf as leaves
from lm.weights.leaf import StructuredWeight

BlockAxis = Literal["in", "out"]
RENAMED_FIELDS = {"along": "block_axis"}  # as older checkpoints store it
# On CPU: numbers decoded at a time, so that they stay in its caches.
TILE = 1 << 20


class Blocked(StructuredWeight):
    """A matrix in scaled blocks. Its arrays are frozen: they get no gradient.

    Attributes:
      block_axis: the dimension that is cut into blocks, "in" or "out"; a static field.
    """

    block_axis: Any = "in"
    renamed_fields = RENAMED_FIELDS
    # Arrays of another shape than `[*stack, K times a ratio, R]`; sharded over the stack alone.
    other_arrays = ()

    # -- What a format says. ----------------------------------------------------------------------

    @property
    def size(self) -> tuple[int, int]:
        """K and R."""
        raise NotImplementedError

    @property
    def granularity(self) -> tuple[int, int]:
        """How many numbers along K, and along R, cannot be parted."""
        raise NotImplementedError

    def decode(self, dtype: DTypeLike) -> jax.Array:
        """The matrix as [*stack, K, R], without the factor `output_scale`."""
        raise NotImplementedError

    @property
    def output_scale(self) -> jax.Array | None:
        """A factor of each column, float32 [*stack, 1, R], for after a product."""
        return None

    def canonical(self) -> Self:
        """The same matrix with every array `[*stack, K times a ratio, R]`."""
        return self

    # -- What follows from it. --------------------------------------------------------------------

    @property
    def stack(self) -> tuple[int, ...]:
        return jax.tree.leaves(self)[0].shape[:-2]

    @property
    def shape(self) -> tuple[int, ...]:
        K, R = self.size
        return (*self.stack, K, R) if self.block_axis == "in" else (*self.stack, R, K)

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        matrix = self.decode(jnp.float32)
        if self.output_scale is not None:
            matrix = matrix * self.output_scale
        matrix = matrix.astype(dtype)
        return matrix if self.block_axis == "in" else jnp.swapaxes(matrix, -1, -2)

    def linear(self, x: jax.Array) -> jax.Array:
        return product(x, self.canonical(), self.block_axis == "out", x.dtype)

    def grouped_linear(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        def multiply(x: jax.Array, leaf: Self) -> jax.Array:
            return leaves.grouped_linear(x, leaf.dequantize(x.dtype), group_sizes)

        # Keeps the blocks for the backward pass, not the matrices.
        return jax.checkpoint(multiply)(x, jax.lax.stop_gradient(self))

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        if self.block_axis == "in":
            return leaves.take(self.dequantize(dtype), ids, dtype)
        K, R = self.size
        ids = jnp.clip(ids, 0, R - 1)

        def columns(a: jax.Array) -> jax.Array:
            last = a.shape[-1]
            return a if last == 1 else jnp.take(a, ids.reshape(-1) // (R // last), axis=-1)

        rows = jax.tree.map(columns, self.canonical()).dequantize(dtype)
        return rows.reshape(*ids.shape, K)

    def unembed(self, x: jax.Array, transposed: bool) -> jax.Array:
        over_blocks = (self.block_axis == "in") != transposed
        return product(x, self.canonical(), not over_blocks, jnp.float32)

    def shardings(self, axes: tuple[str | None, ...], rules: Rules, mesh: Mesh) -> Self:
        """Shardings at rest, for a matrix with these logical axes.

        Raises:
          ValueError: a shard would end inside a block; the message has the number of shards that
            would not.
        """
        K_axis, R_axis = axes[-2:] if self.block_axis == "in" else axes[:-3:-1]
        for axis, size, unit in zip((K_axis, R_axis), self.size, self.granularity, strict=True):
            if split := rules.weights.get(axis or "", ()):
                blocks = f"{self} {list(self.shape)}: number of blocks of {unit} along {axis}"
                check_divides(mesh, split, str(axis) if unit == 1 else blocks, size // unit)

        def sharding(a: Any) -> NamedSharding:
            k, r = a.shape[-2:]
            own = (*axes[:-2], None if k == 1 else K_axis, None if r == 1 else R_axis)
            return named_sharding(mesh, rules.weights, own, a.shape)

        def over_stack(a: Any) -> NamedSharding:
            own = (*axes[:-2], *[None] * (a.ndim - len(axes) + 2)) if a.ndim else ()
            return named_sharding(mesh, rules.weights, own, a.shape)

        others = {name: getattr(self, name) for name in self.other_arrays}
        placed = jax.tree.map(sharding, dataclasses.replace(self, **dict.fromkeys(others)))  # type: ignore[type-var]
        return dataclasses.replace(placed, **jax.tree.map(over_stack, others))

    def __str__(self) -> str:
        return type(self).__name__


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, leaf: Blocked, transpose: bool, out_dtype: DTypeLike) -> jax.Array:
    """x [..., K] times the matrix [K, R], or, with `transpose`, x [..., R] times its transpose.

    Added up in float32. The backward pass decodes the blocks again instead of keeping the matrix.
    """
    scale = leaf.output_scale
    if transpose and scale is not None:
        x = (x.astype(jnp.float32) * scale[0]).astype(x.dtype)
    wide = jnp.float32 if scale is not None or x.dtype == jnp.float32 else out_dtype

    def whole(x: jax.Array, leaf: Blocked) -> jax.Array:
        return dot(x, leaf.decode(x.dtype), transpose_y=transpose, out_dtype=wide)

    def tiles(x: jax.Array, leaf: Blocked) -> jax.Array:
        return _by_tiles(x, leaf, transpose, wide)

    # Elsewhere the compiler reads blocks as it multiplies; split over devices, tiles would move.
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        y = jax.lax.platform_dependent(x, leaf, cpu=tiles, default=whole)
    else:
        y = whole(x, leaf)
    if not transpose and scale is not None:
        y = y * scale[0]
    return y.astype(out_dtype)


def _product_forward(x, leaf, transpose, out_dtype):
    return product(x, leaf, transpose, out_dtype), (leaf, jnp.zeros((0,), x.dtype))


def _product_backward(transpose, out_dtype, saved, dy):
    leaf, like = saved
    return product(dy, leaf, not transpose, like.dtype), None


product.defvjp(_product_forward, _product_backward)


def _by_tiles(x: jax.Array, leaf: Blocked, transpose: bool, dtype: DTypeLike) -> jax.Array:
    """The product, decoding a part of the matrix at a time.

    The barriers keep decoding out of the product, where XLA's CPU backend would do it one number
    at a time, for each row of x again.
    """
    axis, tile = _tile(leaf.size, leaf.granularity)
    size = leaf.size[axis]
    if tile == size:
        matrix = jax.lax.optimization_barrier(_not_before(x, leaf).decode(x.dtype))
        return dot(x, matrix, transpose_y=transpose, out_dtype=dtype)
    rows = x.reshape(-1, x.shape[-1])
    summed = (axis == -1) == transpose
    result = leaf.size[0] if transpose else leaf.size[1]

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        def cut(a: jax.Array) -> jax.Array:
            return a if a.shape[axis] == 1 else _part(a, i, tile * a.shape[axis] // size, axis)

        matrix = jax.lax.optimization_barrier(jax.tree.map(cut, leaf).decode(x.dtype))
        if summed:
            x_tile = _part(rows, i, tile, -1)
            return y + dot(x_tile, matrix, transpose_y=transpose, out_dtype=jnp.float32)
        y_tile = dot(rows, matrix, transpose_y=transpose, out_dtype=dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, y_tile, i * tile, -1)

    start = jnp.zeros((len(rows), result), jnp.float32 if summed else dtype)
    y = jax.lax.fori_loop(0, size // tile, step, start)
    return y.reshape(*x.shape[:-1], result).astype(dtype)


def _not_before(x: jax.Array, leaf: Blocked) -> Blocked:
    """The leaf, but not to be decoded until x is there: all of a model's would be at once.

    Barriers are gone when the compiler orders operations, so this is a condition on x that never
    holds, which it cannot know.
    """
    if x.size == 0:
        return leaf
    never = x.reshape(-1)[0].astype(jnp.float32) > jnp.inf
    arrays, tree = jax.tree.flatten(leaf)
    largest = max(range(len(arrays)), key=lambda i: arrays[i].nbytes)
    arrays[largest] = jnp.where(never, jnp.zeros((), arrays[largest].dtype), arrays[largest])
    return jax.tree.unflatten(tree, arrays)


def _part(a: jax.Array, i: jax.Array, size: int, axis: int) -> jax.Array:
    """The i-th part of `size` along an axis."""
    return jax.lax.dynamic_slice_in_dim(a, i * size, size, axis)


def _tile(size: tuple[int, int], unit: tuple[int, int]) -> tuple[int, int]:
    """The axis to cut, -1 (R) where that will do, and the length of a part: the largest divisor
    with which a part is small enough, or else the whole."""
    for axis in (-1, -2):
        n, other = size[axis], math.prod(size) // size[axis]
        fits = [t for t in range(unit[axis], n + 1, unit[axis]) if n % t == 0 and other * t <= TILE]
        if fits and fits[-1] >= min(n, 64):
            return axis, fits[-1]
    return -1, size[-1]


class Groups(NamedTuple):
    """Numbers scale (quant - zero) + minimum, in groups along K that share scale and minimum.

    Attributes:
      quants: [..., n, R]: integers of at most 8 bits, or float32 levels.
      scale: float32 [..., groups, R]; `groups` divides n.
      zero: of all groups, an int, or [..., groups, R].
      minimum: float32 [..., groups, R], or None for 0.
    """

    quants: jax.Array
    scale: jax.Array
    zero: int | jax.Array = 0
    minimum: jax.Array | None = None

    def decode(self) -> jax.Array:
        """The numbers, float32 [..., n, R]."""
        *stack, n, R = self.quants.shape
        groups = self.scale.shape[-2]
        quants = self.quants.reshape(*stack, groups, n // groups, R).astype(jnp.float32)
        zero = (
            self.zero if isinstance(self.zero, int) else self.zero[..., None, :].astype(jnp.float32)
        )
        numbers = self.scale[..., None, :] * (quants - zero)
        if self.minimum is not None:
            numbers = numbers + self.minimum[..., None, :]
        return numbers.reshape(*stack, n, R)


def nibbles(packed: jax.Array, high_first: bool = False) -> jax.Array:
    """The halves of bytes [..., k, R], one after another along k: [..., 2k, R]."""
    shifts = jnp.array([4, 0] if high_first else [0, 4], jnp.uint8)[:, None]
    halves = packed[..., None, :] >> shifts & 15
    return halves.reshape(*packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1])


def lookup(codes: jax.Array, table: Sequence[float]) -> jax.Array:
    """float32 table[codes], codes being of fewer bits than 8.

    A tree of selections on bits: vector units have no fast table in memory.
    """
    codes = codes.astype(jnp.int32)  # as wide as what is chosen
    values = [jnp.float32(value) for value in table]
    bit = 0
    while len(values) > 1:
        chosen = (codes >> bit & 1).astype(bool)
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(chosen, high, low) for low, high in pairs]
        bit += 1
    return values[0]


def spread(blocks: jax.Array, size: int, axis: int = -2) -> jax.Array:
    """Each number repeated along `axis` until it has `size`; 1 stays, as it broadcasts."""
    count = blocks.shape[axis]
    return blocks if count in (1, size) else jnp.repeat(blocks, size // count, axis=axis)
