"""Lion."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.config.fields import BelowOne, Checked, NonNegative
from lm.train.optimizers.base import PathRule, Slots
from lm.weights import ParamSpec


@dataclasses.dataclass(frozen=True)
class Lion(Checked):
    """The sign of a momentum (arXiv:2302.06675): half of Adam's state.

    Every weight moves by the whole learning rate, so that it wants a rate 3 to 10 times below
    AdamW's, and a weight decay as many times above.

    Attributes:
      b1: weight of the momentum against the gradient in the direction.
      b2: decay of the momentum.
      weight_decay: of matrices, times learning rate and weight.
      rules: by path, see `PathRule`; the first that fits holds.
    """

    b1: BelowOne = 0.9
    b2: BelowOne = 0.99
    weight_decay: NonNegative = 0.5
    rules: tuple[PathRule, ...] = ()

    def method(self, weight: ParamSpec) -> Lion:
        return self

    def decay(self, weight: ParamSpec) -> float:
        return 0.0 if weight.kind == "vector" else self.weight_decay

    def slots(self, weight: ParamSpec) -> dict[str, ParamSpec]:
        return {"mu": ParamSpec(weight.shape, weight.axes, "zeros")}

    def update(
        self, gradient: jax.Array, slots: Slots, weight: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        mu = slots["mu"]
        direction = jnp.sign(self.b1 * mu + (1 - self.b1) * gradient)
        return direction, {"mu": self.b2 * mu + (1 - self.b2) * gradient}
