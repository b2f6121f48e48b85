"""AdamW."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.config.fields import BelowOne, Checked, NonNegative, Positive
from lm.train.optimizers.base import PathRule, Slots
from lm.weights import ParamSpec


@dataclasses.dataclass(frozen=True)
class AdamW(Checked):
    """Adam with decoupled weight decay (arXiv:1711.05101), on matrices only.

    Attributes:
      b1, b2: decay of the first and second moments.
      eps: added to the root of the second moment.
      weight_decay: times learning rate and weight; norms and biases have none.
      rules: by path, see `PathRule`; the first that fits holds.
    """

    b1: BelowOne = 0.9
    b2: BelowOne = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    rules: tuple[PathRule, ...] = ()

    def method(self, weight: ParamSpec) -> AdamW:
        return self

    def decay(self, weight: ParamSpec) -> float:
        return 0.0 if weight.kind == "vector" else self.weight_decay

    def slots(self, weight: ParamSpec) -> dict[str, ParamSpec]:
        moment = ParamSpec(weight.shape, weight.axes, "zeros")
        return {"mu": moment, "nu": moment}

    def update(
        self, gradient: jax.Array, slots: Slots, weight: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        mu = self.b1 * slots["mu"] + (1 - self.b1) * gradient
        nu = self.b2 * slots["nu"] + (1 - self.b2) * jnp.square(gradient)
        return adam_direction(mu, nu, self.b1, self.b2, self.eps, count + 1), {"mu": mu, "nu": nu}


def adam_direction(
    mu: jax.Array, nu: jax.Array, b1: float, b2: float, eps: float, count: jax.Array
) -> jax.Array:
    """Adam's (arXiv:1412.6980) direction from its moments after `count` updates, bias corrected."""
    root = jnp.sqrt(nu / (1 - jnp.float32(b2) ** count))
    return mu / (1 - jnp.float32(b1) ** count) / (root + eps)
