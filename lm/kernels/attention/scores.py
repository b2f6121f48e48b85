"""What attention's scores mean: one value from the model's configuration down to every kernel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys, and which of them count.

    Sinks, the scores of a key without a value, are weights and so an argument of their own.

    Attributes:
      scale: multiplies the products of queries and keys.
      causal: a query sees no later position.
      window: positions a query sees, itself included (and as many ahead, where not causal); None
        for all.
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2); None for scores as they
        are.

    Raises:
      ValueError: the window or the soft-cap is not positive.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}; use 1 or more, or None to see all positions")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(
                f"softcap={self.softcap}; use more than 0, or None for scores as they are"
            )

    @property
    def unit(self) -> float:
        """The scores are this times `capped` products."""
        return self.scale if self.softcap is None else self.softcap

    def capped(self, products: jax.Array) -> jax.Array:
        """Scores divided by `unit`."""
        if self.softcap is None:
            return products
        return jnp.tanh(products * (self.scale / self.softcap))

    def of(self, products: jax.Array) -> jax.Array:
        """Scores of the products of queries and keys."""
        scores = products * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)
