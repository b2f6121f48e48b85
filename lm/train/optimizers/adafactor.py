"""Adafactor."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.config.fields import BelowOne, Checked, Fraction, NonNegative, Positive
from lm.train.optimizers.base import PathRule, Slots
from lm.weights import ParamSpec


@dataclasses.dataclass(frozen=True)
class Adafactor(Checked):
    """Adam's second moment as rows times columns (arXiv:1804.04235), and no first moment.

    A matrix [*stack, in, out] keeps the means of the squared gradients of each row and each column,
    for every matrix of the stack by itself; other weights keep the whole second moment.

    Attributes:
      decay_rate: the second moment decays by 1 - t^-decay_rate at update t, counted from 1.
      clip_threshold: directions are scaled down to this root mean square, matrix by matrix.
      momentum: decay of a moving mean of the directions, which costs a weight of state; None for
        none.
      relative_step: multiply a direction by the weight's root mean square, or `min_scale` where
        that is larger; the schedule is then the paper's relative step size, about 1e-2.
      min_scale: the paper's epsilon 2.
      eps: added to squared gradients, the paper's epsilon 1.
      weight_decay: of matrices, times learning rate and weight.
      rules: by path, see `PathRule`; the first that fits holds.
    """

    decay_rate: Fraction = 0.8
    clip_threshold: Positive = 1.0
    momentum: BelowOne | None = None
    relative_step: bool = False
    min_scale: NonNegative = 1e-3
    eps: Positive = 1e-30
    weight_decay: NonNegative = 0.1
    rules: tuple[PathRule, ...] = ()

    def method(self, weight: ParamSpec) -> _Adafactor:
        return _Adafactor(self, weight.kind != "vector")

    def decay(self, weight: ParamSpec) -> float:
        return 0.0 if weight.kind == "vector" else self.weight_decay


@dataclasses.dataclass(frozen=True)
class _Adafactor:
    """Adafactor of a matrix or of another weight."""

    config: Adafactor
    matrix: bool

    def slots(self, weight: ParamSpec) -> dict[str, ParamSpec]:
        shape, axes = weight.shape, weight.axes
        whole = ParamSpec(shape, axes, "zeros")
        if self.matrix:
            # What splits the columns over `tensor` alone leaves their means whole over `fsdp`.
            row = ParamSpec(shape[:-1], axes[:-1], "zeros")
            column = ParamSpec((*shape[:-2], shape[-1]), (*axes[:-2], axes[-1]), "zeros")
            slots = {"row": row, "column": column}
        else:
            slots = {"nu": whole}
        return slots if self.config.momentum is None else slots | {"mu": whole}

    def update(
        self, gradient: jax.Array, slots: Slots, weight: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        config = self.config
        decay = 1 - (count + 1).astype(jnp.float32) ** -config.decay_rate
        new = {}

        def average(name: str, x: jax.Array) -> jax.Array:
            new[name] = decay * slots[name] + (1 - decay) * x
            return new[name]

        square = jnp.square(gradient) + config.eps
        if self.matrix:
            row = average("row", jnp.mean(square, axis=-1))
            column = average("column", jnp.mean(square, axis=-2))
            row /= jnp.mean(row, axis=-1, keepdims=True)
            direction = gradient * jax.lax.rsqrt(row)[..., None]
            direction *= jax.lax.rsqrt(column)[..., None, :]
        else:
            direction = gradient * jax.lax.rsqrt(average("nu", square))
        direction /= jnp.maximum(1.0, self.rms(direction) / config.clip_threshold)
        if config.relative_step:
            direction *= jnp.maximum(self.rms(weight), config.min_scale)
        if config.momentum is not None:
            direction = config.momentum * slots["mu"] + (1 - config.momentum) * direction
            new["mu"] = direction
        return direction, new

    def rms(self, x: jax.Array) -> jax.Array:
        """Root mean square of each weight of a stack."""
        dims = (-2, -1) if self.matrix else (-1,)
        return jnp.sqrt(jnp.mean(jnp.square(x), axis=dims, keepdims=True))
