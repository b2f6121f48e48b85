"""Steps that would do harm, skipped on the device, and the learning rate after a rewind.

Whether a step is taken is decided inside it, from scalars every device has: no host round trip,
and one decision on all devices. The host reads `spikes_in_a_row`, and may go back to an earlier
checkpoint with `begin_recovery`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config.fields import Checked, Positive, Several
from lm.train.state import Health, TrainState

# Sigma is at least this fraction of the mean: a loss that stands still has no spikes of rounding.
FLOOR = 1e-3


@dataclasses.dataclass(frozen=True)
class Stability(Checked):
    """Which steps are skipped: those whose loss or gradient norm is not finite, or far too high.

    Too high is more than `sigmas` standard deviations above the running mean, once `warmup` steps
    have been taken. Mean and variance are exact over the first `window` steps taken, exponential
    after that, with 1 / `window` for the newest. Skipped steps do not enter them; so a loss that
    has risen for good is skipped for good, until the host rewinds or calls `restart_statistics`.

    Attributes:
      sigmas: standard deviations above the mean.
      window: steps that the statistics look back.
      warmup: steps taken before anything finite counts as a spike.
    """

    sigmas: Positive = 6.0
    window: Several = 128  # one step alone has no deviation
    warmup: Several = 128

    def is_healthy(self, health: Health, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
        """Whether a step with this loss and gradient norm is to be taken: a boolean scalar."""

        def is_usual(value: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
            sigma = jnp.maximum(jnp.sqrt(variance), FLOOR * jnp.abs(mean))
            return value <= mean + self.sigmas * sigma

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        usual = is_usual(loss, health.loss_mean, health.loss_variance)
        usual &= is_usual(grad_norm, health.grad_norm_mean, health.grad_norm_variance)
        return finite & (usual | (health.count < self.warmup))

    def observe(self, health: Health, loss: jax.Array, grad_norm: jax.Array) -> Health:
        """The statistics with one more step in them (D. H. D. West's weighted update, 1979)."""
        count = health.count + 1
        newest = jnp.maximum(1 / count.astype(jnp.float32), 1 / self.window)

        def update(mean: jax.Array, variance: jax.Array, value: jax.Array) -> Any:
            away = value - mean
            return mean + newest * away, (1 - newest) * (variance + newest * jnp.square(away))

        loss_mean, loss_variance = update(health.loss_mean, health.loss_variance, loss)
        norm_mean, norm_variance = update(
            health.grad_norm_mean, health.grad_norm_variance, grad_norm
        )
        return dataclasses.replace(health,
            count=count,
            loss_mean=loss_mean, loss_variance=loss_variance,
            grad_norm_mean=norm_mean, grad_norm_variance=norm_variance,
        )  # fmt: skip

    def guard(
        self, before: TrainState, after: TrainState, loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """`after` if its step is healthy; else all of `before` but the step and the counters.

        Returns:
          The state, and float32 metrics: `skipped` (0 or 1), `skipped_total`, `spikes_in_a_row`,
          and mean and standard deviation of the steps taken, as `loss_mean`, `loss_sigma`,
          `grad_norm_mean` and `grad_norm_sigma`.
        """
        health = before.health
        assert health is not None, "make the state with `health`"
        healthy = self.is_healthy(health, loss, grad_norm)
        select = functools.partial(jnp.where, healthy)
        skipped = 1 - healthy.astype(jnp.int32)
        observed = jax.tree.map(select, self.observe(health, loss, grad_norm), health)
        health = dataclasses.replace(
            observed, skipped=health.skipped + skipped, in_a_row=(health.in_a_row + 1) * skipped
        )
        kept = jax.tree.map(lambda x, y: x if x is y else select(x, y), after, before)
        metrics = {
            "skipped": skipped,
            "skipped_total": health.skipped,
            "spikes_in_a_row": health.in_a_row,
            "loss_mean": health.loss_mean,
            "loss_sigma": jnp.sqrt(health.loss_variance),
            "grad_norm_mean": health.grad_norm_mean,
            "grad_norm_sigma": jnp.sqrt(health.grad_norm_variance),
        }
        state = dataclasses.replace(kept, step=after.step, health=health)
        return state, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def learning_rate(schedule: Callable[[Any], Any], state: TrainState) -> jax.Array:
    """The rate of the step that `state` is about to take: the schedule's, lowered in recovery."""
    rate = jnp.asarray(schedule(state.step), jnp.float32)
    if state.health is None:
        return rate
    recovering = state.step < state.health.recovery_until
    return rate * jnp.where(recovering, state.health.recovery_scale, 1.0)


def begin_recovery(state: TrainState, scale: float, num_steps: int) -> TrainState:
    """The state with its next `num_steps` steps at `scale` times the schedule's learning rate.

    The count of skipped steps in a row starts again.

    Raises:
      ValueError: a scale outside (0, 1], no steps, or a state without `health`.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale={scale} of the learning rate must be in (0, 1]")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} of recovery must be at least 1")
    until = int(state.step) + num_steps
    return _with_health(state, recovery_scale=scale, recovery_until=until, in_a_row=0)


def restart_statistics(state: TrainState) -> TrainState:
    """The state with statistics and warm-up begun anew: for data or a batch unlike those before.

    Raises:
      ValueError: a state without `health`.
    """
    names = ("count", "loss_mean", "loss_variance", "grad_norm_mean", "grad_norm_variance")
    return _with_health(state, **dict.fromkeys(names, 0), in_a_row=0)


def _with_health(state: TrainState, **values: float) -> TrainState:
    """The state with these scalars of its health, each where the old one lay."""
    if state.health is None:
        raise ValueError("the state has no health; make it and the step with a Stability")
    old = {name: getattr(state.health, name) for name in values}
    new = {
        name: jax.device_put(np.asarray(value, old[name].dtype), old[name].sharding)
        for name, value in values.items()
    }
    return dataclasses.replace(state, health=dataclasses.replace(state.health, **new))
