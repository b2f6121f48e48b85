"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.config.fields import BelowOne, Checked, Count, NonNegative, Positive, Whole
from lm.parallel import distribute_matrices
from lm.train.optimizers.adamw import AdamW, adam_direction
from lm.train.optimizers.base import PathRule, Slots, refuse_rules
from lm.weights import ParamSpec

SIDES = ("left", "right")
FIRST_ITERATIONS = 10


@dataclasses.dataclass(frozen=True)
class Soap(Checked):
    """Adam in Shampoo's eigenbasis (arXiv:2409.11321) for the matrices of the layers.

    A matrix G [in, out] of gradients has the statistics L of G G^T and R of G^T G, and Adam's
    second moment is kept of Q_L^T G Q_R, where Q_L and Q_R are their eigenvectors. The first update
    finds them, roughly, and moves nothing; afterwards one step of power iteration and a QR
    decomposition refresh them. The authors' code begins with `eigh`; this begins with steps of the
    same iteration, since `eigh` of large matrices compiles for minutes on TPU. A dimension above
    `max_precond_dim` is not rotated; a matrix with both above, and every other weight, has AdamW.

    Attributes:
      b1, b2: decay of the first and second moments.
      eps: added to the root of the second moment.
      stats_decay: of L and R.
      frequency: updates between refreshes of the eigenvectors.
      max_precond_dim: the largest dimension to rotate.
      weight_decay: of matrices, times learning rate and weight.
      adam: for embedding, output, norms and biases.
      rules: by path, see `PathRule`; the first that fits holds.

    Raises:
      ValueError: rules within `adam`.
    """

    b1: BelowOne = 0.95
    b2: BelowOne = 0.95
    eps: Positive = 1e-8
    stats_decay: BelowOne = 0.95
    frequency: Count = 10
    max_precond_dim: Whole = 10_000
    weight_decay: NonNegative = 0.1
    adam: AdamW = AdamW()
    rules: tuple[PathRule, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_rules(self.adam)

    def method(self, weight: ParamSpec) -> Soap | AdamW:
        return self if weight.kind == "matrix" and self.sides(weight.shape) else self.adam

    def decay(self, weight: ParamSpec) -> float:
        return self.weight_decay if weight.kind == "matrix" else self.adam.decay(weight)

    def sides(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The sides of a matrix [*stack, in, out] that are rotated."""
        pairs = zip(SIDES, shape[-2:], strict=True)
        return tuple(side for side, size in pairs if size <= self.max_precond_dim)

    def slots(self, weight: ParamSpec) -> dict[str, ParamSpec]:
        stack, (rows, columns) = weight.axes[:-2], weight.axes[-2:]
        moment = ParamSpec(weight.shape, weight.axes, "zeros")
        slots = {"mu": moment, "nu": moment}
        for side in self.sides(weight.shape):
            # Split in as many parts as the weight, whichever of its axes the mesh splits.
            size = weight.shape[-2 if side == "left" else -1]
            axes = (rows, columns) if side == "left" else (columns, rows)
            square = ParamSpec((*weight.shape[:-2], size, size), (*stack, *axes), "zeros")
            slots |= {f"{side}_stats": square, f"{side}_basis": square}
        return slots

    def update(
        self, gradient: jax.Array, slots: Slots, weight: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        return distribute_matrices(self._update, (gradient, slots), count)

    def _update(self, stacks: tuple[jax.Array, Slots], count: jax.Array) -> tuple[jax.Array, Slots]:
        """The update of whole matrices [*stack, in, out], from gradients and slots."""
        gradient, slots = stacks
        bases = {side: slots[f"{side}_basis"] for side in self.sides(gradient.shape)}
        mu = self.b1 * slots["mu"] + (1 - self.b1) * jnp.where(count == 0, 0.0, gradient)
        nu = self.b2 * slots["nu"] + (1 - self.b2) * jnp.square(rotate(gradient, bases))
        updates = jnp.maximum(count, 1)
        direction = adam_direction(rotate(mu, bases), nu, self.b1, self.b2, self.eps, updates)
        new = {"mu": mu, "nu": nu}
        for side, basis in bases.items():
            stats = self._stats(side, slots[f"{side}_stats"], gradient)
            new |= {f"{side}_stats": stats, f"{side}_basis": self._refresh(stats, basis, count)}
        return rotate_back(direction, bases), new

    def _stats(self, side: str, stats: jax.Array, gradient: jax.Array) -> jax.Array:
        g = gradient if side == "left" else gradient.swapaxes(-1, -2)
        gram = jnp.matmul(g, g.swapaxes(-1, -2), precision="highest")
        return self.stats_decay * stats + (1 - self.stats_decay) * gram

    def _refresh(self, stats: jax.Array, basis: jax.Array, count: jax.Array) -> jax.Array:
        first = count == 0
        due = (count % self.frequency == 0).astype(jnp.int32)
        start = jnp.where(first, jnp.eye(basis.shape[-1]), basis)
        rounds = jnp.where(first, FIRST_ITERATIONS, due)
        return jax.lax.fori_loop(0, rounds, lambda _, basis: power_iteration(stats, basis), start)


def rotate(x: jax.Array, bases: Slots) -> jax.Array:
    """Q_L^T x Q_R, [*stack, in, out]; a side without a basis stays."""
    if "left" in bases:
        x = bases["left"].swapaxes(-1, -2) @ x
    return x @ bases["right"] if "right" in bases else x


def rotate_back(x: jax.Array, bases: Slots) -> jax.Array:
    """Q_L x Q_R^T: what `rotate` undoes."""
    if "left" in bases:
        x = bases["left"] @ x
    return x @ bases["right"].swapaxes(-1, -2) if "right" in bases else x


def power_iteration(stats: jax.Array, basis: jax.Array) -> jax.Array:
    """One step of orthogonal iteration from `basis` (arXiv:2409.11321, algorithm 4)."""
    # Neither the scale nor a multiple of the identity changes eigenvectors, and with them no column
    # of the product vanishes, even where all gradients were zero.
    mean = jnp.trace(stats, axis1=-2, axis2=-1)[..., None, None] / stats.shape[-1]
    product = jnp.matmul(stats / (mean + 1e-30), basis, precision="highest")
    return orthonormal(product + 1e-6 * basis)


def orthonormal(x: jax.Array, panel: int = 128) -> jax.Array:
    """Q of the QR decomposition of square matrices [*stack, n, n], up to the columns' signs.

    Block Gram-Schmidt over panels of columns, with other columns for those that depend on earlier
    ones: on TPU jax's decomposition of large matrices compiles for minutes.
    """
    n = x.shape[-1]
    if n <= panel:
        return jnp.linalg.qr(x)[0]

    def add_panel(i: jax.Array, done: jax.Array) -> jax.Array:
        start = jnp.minimum(i * panel, n - panel)  # the last one may overlap the one before
        before = jnp.where(jnp.arange(n) < start, done, 0.0)
        random = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (n, panel))

        def clean(_: jax.Array, columns: jax.Array) -> jax.Array:
            return gram_schmidt(leave_out(before, columns, random), random)

        columns = jax.lax.dynamic_slice_in_dim(x, start, panel, axis=-1)
        columns = jax.lax.fori_loop(0, 3, clean, columns)
        return jax.lax.dynamic_update_slice_in_dim(done, columns, start, axis=-1)

    return jax.lax.fori_loop(0, -(-n // panel), add_panel, jnp.zeros_like(x))


def gram_schmidt(columns: jax.Array, random: jax.Array) -> jax.Array:
    """Columns [*stack, n, k] made orthonormal one after another; random ones [n, k] for lost."""

    def add_column(j: jax.Array, done: jax.Array) -> jax.Array:
        column, other = (jax.lax.dynamic_slice_in_dim(x, j, 1, axis=-1) for x in (columns, random))
        for _ in range(2):
            column = leave_out(done, column, other)
            column /= jnp.linalg.norm(column, axis=-2, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(done, column, j, axis=-1)

    return jax.lax.fori_loop(0, columns.shape[-1], add_column, jnp.zeros_like(columns))


def leave_out(basis: jax.Array, x: jax.Array, random: jax.Array) -> jax.Array:
    """Columns of x without their parts in the span of a basis; `random`'s where nothing is left.

    The basis is orthonormal, but for columns of zeros.
    """
    parts = jnp.matmul(basis.swapaxes(-1, -2), x, precision="highest")
    rest = x - jnp.matmul(basis, parts, precision="highest")
    norm, before = (jnp.linalg.norm(y, axis=-2, keepdims=True) for y in (rest, x))
    return jnp.where(norm <= 1e-5 * before, random, rest)
