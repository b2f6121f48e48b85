"""Learning rates as functions of the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

KINDS = ("cosine", "wsd", "constant")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 to `peak`, then a decay to `final_fraction * peak` at the last step.

    Attributes:
      kind: "cosine" (arXiv:1608.03983, no restarts); "wsd", warm-up, stable, then linear decay
        over the last `decay_fraction` of the steps (arXiv:2404.06395); or "constant".
      peak: after the warm-up.
      warmup_steps: step `warmup_steps` is the first at `peak`; step 0 has 1 / (warmup_steps + 1).
      num_steps: of the whole run.
      final_fraction: of `peak`, reached at `num_steps`.
      decay_fraction: of the steps, for "wsd".

    Raises:
      ValueError: an unknown kind, a negative rate, or a warm-up longer than the run.
    """

    kind: str
    peak: float
    warmup_steps: int
    num_steps: int
    final_fraction: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule kind {self.kind!r} is unknown; use {', '.join(KINDS)}")
        if self.peak < 0 or not 0 <= self.final_fraction <= 1:
            raise ValueError(
                f"peak={self.peak} must not be negative, nor final_fraction={self.final_fraction} "
                "outside [0, 1]"
            )
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must lie in (0, 1]")
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must lie between 0 and num_steps="
                f"{self.num_steps}"
            )

    def __call__(self, step: Any) -> Any:
        """The learning rate of step `step`, counted from 0."""
        step = jnp.asarray(step, jnp.float32)
        warm = (step + 1) / (self.warmup_steps + 1)
        return self.peak * jnp.minimum(warm, 1.0) * self._decay(step)

    def _decay(self, step: Any) -> Any:
        if self.kind == "constant":
            return jnp.ones_like(step)
        start = self.warmup_steps
        if self.kind == "wsd":
            start = max(start, round(self.num_steps * (1 - self.decay_fraction)))
        done = jnp.clip((step - start) / max(self.num_steps - start, 1), 0.0, 1.0)
        left = 0.5 * (1 + jnp.cos(jnp.pi * done)) if self.kind == "cosine" else 1 - done
        return self.final_fraction + (1 - self.final_fraction) * left
