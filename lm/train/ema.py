"""An exponential moving average of the weights that train, for evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.config.fields import BelowOne, Checked
from lm.train.state import TrainState, merge

Tree = Any


@dataclasses.dataclass(frozen=True)
class Ema(Checked):
    """After each step taken, `average += (1 - decay) * (weights - average)`, in float32.

    Attributes:
      decay: 1 / (1 - decay) is about how many steps it looks back.
      warmup: the decay of update t, from 0, is at most (1 + t) / (10 + t), so that the average
        soon forgets the initial weights (as in TensorFlow's ExponentialMovingAverage).
    """

    decay: BelowOne = 0.999
    warmup: bool = True

    def update(self, average: Tree, weights: Tree, num_updates: jax.Array) -> Tree:
        """The average after one more update, of which there were `num_updates` before."""
        decay = jnp.float32(self.decay)
        if self.warmup:
            t = num_updates.astype(jnp.float32)
            decay = jnp.minimum(decay, (1 + t) / (10 + t))
        return jax.tree.map(
            lambda a, w: a + (1 - decay) * (w.astype(jnp.float32) - a), average, weights
        )


def num_updates(state: TrainState) -> jax.Array:
    """Steps that changed weights: all but the skipped ones."""
    return state.step if state.health is None else state.step - state.health.skipped


def ema_params(state: TrainState) -> Tree:
    """The whole model with averaged weights, float32, where weights train.

    Raises:
      ValueError: the state has no average.
    """
    if state.ema is None:
        raise ValueError("the state has no average of its weights; make it with an Ema")
    return merge(state.ema, state.frozen)
