"""Muon."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm.config.fields import BelowOne, Checked, Count, NonNegative
from lm.parallel import distribute_matrices
from lm.train.optimizers.adamw import AdamW
from lm.train.optimizers.base import PathRule, Slots, refuse_rules
from lm.weights import ParamSpec

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclasses.dataclass(frozen=True)
class Muon(Checked):
    """Momentum, orthogonalized, for the matrices of the layers; AdamW for everything else.

    K. Jordan, "Muon: an optimizer for hidden layers", 2024; updates are scaled by
    0.2 sqrt(max(in, out)) (arXiv:2502.16982), so that AdamW's learning rate serves both.

    Attributes:
      momentum: of the gradients, Nesterov's.
      steps: of the Newton-Schulz iteration.
      dtype: it is computed in.
      weight_decay: of matrices, times the learning rate.
      adam: for embedding, output, norms and biases.
      rules: by path, see `PathRule`; the first that fits holds.
    """

    momentum: BelowOne = 0.95
    steps: Count = 5
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    weight_decay: NonNegative = 0.1
    adam: AdamW = AdamW()
    rules: tuple[PathRule, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_rules(self.adam)

    def method(self, weight: ParamSpec) -> Muon | AdamW:
        return self if weight.kind == "matrix" else self.adam

    def decay(self, weight: ParamSpec) -> float:
        return self.weight_decay if weight.kind == "matrix" else self.adam.decay(weight)

    def slots(self, weight: ParamSpec) -> dict[str, ParamSpec]:
        return {"momentum": ParamSpec(weight.shape, weight.axes, "zeros")}

    def update(
        self, gradient: jax.Array, slots: Slots, weight: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        momentum = self.momentum * slots["momentum"] + (1 - self.momentum) * gradient
        nesterov = self.momentum * momentum + (1 - self.momentum) * gradient
        scale = 0.2 * max(gradient.shape[-2:]) ** 0.5
        # Split within matrices, each of the iteration's products would gather its operands.
        orthogonal = distribute_matrices(
            lambda x: orthogonalize(x, self.steps, jnp.dtype(self.dtype)), nesterov
        )
        return scale * orthogonal.astype(jnp.float32), {"momentum": momentum}


def orthogonalize(matrix: jax.Array, steps: int = 5, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Nearly U V^T of matrix = U S V^T, [*stack, in, out]: singular values near 1.

    A quintic Newton-Schulz iteration whose coefficients trade exactness for speed, so that singular
    values end between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.swapaxes(-1, -2) if tall else matrix).astype(jnp.float32)
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7
    x = x.astype(dtype)
    for _ in range(steps):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if tall else x
