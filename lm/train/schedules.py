"""Learning rates and batch sizes as functions of the step.

Not optax's schedules: they round differently (by up to 4e-6 of the rate), and a resumed run would
change.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp

from lm.config.fields import Checked, Fraction, NonNegative, Positive, Whole

Kind = Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"]
Cooldown = Literal["linear", "1-sqrt"]


@dataclasses.dataclass(frozen=True)
class Schedule(Checked):
    """Linear warm-up from 0 to `peak`, then a decay that ends at step `num_steps`.

    Kinds, with x from 0 at the end of the warm-up to 1 at `num_steps`:

    - "cosine": half a period, arXiv:1608.03983 without restarts.
    - "linear": 1 - x.
    - "wsd": stays at the peak, then cools down (warm-up, stable, decay, arXiv:2404.06395).
    - "inverse_sqrt": 1 / sqrt(1 + steps since the warm-up / time_scale), then cools down. With
      `time_scale = warmup_steps` it is the Transformer's (arXiv:1706.03762).
    - "constant": stays at the peak.

    The first two fall to `final_fraction` of the peak. A cool-down multiplies what the rate would
    be by a factor that falls from 1 to `final_fraction` over the last `decay_fraction` of the
    steps. After `num_steps` the factor stays.

    Attributes:
      kind: one of the above.
      peak: after the warm-up.
      warmup_steps: step `warmup_steps` is the first at `peak`, if the run is that long; step k
        before it has (k + 1) / (warmup_steps + 1) of it.
      num_steps: of the whole run.
      final_fraction: reached at `num_steps`; of no effect on "constant".
      decay_fraction: share of the steps that the cool-down of "wsd" and "inverse_sqrt" takes; 0
        for none.
      cooldown: "linear", 1 - x, or "1-sqrt", 1 - sqrt(x) (arXiv:2405.18392), with x from 0 to 1
        over the cool-down.
      time_scale: of "inverse_sqrt", in steps.
    """

    kind: Kind
    peak: NonNegative
    warmup_steps: Whole
    num_steps: Whole
    final_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.2
    cooldown: Cooldown = "linear"
    time_scale: Positive = 10_000.0

    def __call__(self, step: Any) -> Any:
        """The learning rate of step `step`, counted from 0: a float32 scalar, traceable."""
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum((step + 1) / (self.warmup_steps + 1), 1.0)
        if self.kind == "constant":
            return self.peak * warm
        if self.kind in ("cosine", "linear"):
            done = self._done(step, self.warmup_steps)
            left = 0.5 * (1 + jnp.cos(jnp.pi * done)) if self.kind == "cosine" else 1 - done
            return self.peak * warm * self._above_final(left)
        if self.kind == "inverse_sqrt":
            since = jnp.maximum(step - self.warmup_steps, 0)
            warm *= 1 / jnp.sqrt(1 + since / self.time_scale)
        if self.decay_fraction == 0:
            return self.peak * warm
        start = max(self.warmup_steps, round(self.num_steps * (1 - self.decay_fraction)))
        done = self._done(step, start)
        left = 1 - done if self.cooldown == "linear" else 1 - jnp.sqrt(done)
        return self.peak * warm * self._above_final(left)

    def _done(self, step: Any, start: int) -> Any:
        """0 up to step `start`, 1 from `num_steps` on, linear between."""
        return jnp.clip((step - start) / max(self.num_steps - start, 1), 0.0, 1.0)

    def _above_final(self, left: Any) -> Any:
        return self.final_fraction + (1 - self.final_fraction) * left


@dataclasses.dataclass(frozen=True)
class BatchStage:
    """Steps of one batch size.

    Attributes:
      first_step: of the stage; it lasts until the next stage begins.
      batch_size: rows of a step.
    """

    first_step: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class BatchRamp:
    """The batch size as a function of the step, in stages.

    A batch size is a shape, so each one is compiled for: few stages are better than many.

    Attributes:
      stages: in order; the first begins at step 0.
      divisor: of every batch size: shards of the batch times micro-batches.

    Raises:
      ValueError: no stages, a first one that is not at step 0, steps that do not grow, or a size
        that `divisor` does not divide.
    """

    stages: tuple[BatchStage, ...]
    divisor: int = 1

    def __post_init__(self) -> None:
        if self.divisor < 1:
            raise ValueError(f"divisor={self.divisor} must be at least 1")
        if not self.stages or self.stages[0].first_step != 0:
            raise ValueError(f"a batch ramp begins at step 0, unlike stages={self.stages}")
        for before, stage in zip(self.stages, self.stages[1:], strict=False):
            if stage.first_step <= before.first_step:
                raise ValueError(
                    f"the stage at step {stage.first_step} must begin after the one at step "
                    f"{before.first_step}"
                )
        for stage in self.stages:
            if stage.batch_size < 1 or stage.batch_size % self.divisor:
                below = stage.batch_size // self.divisor * self.divisor
                options = [str(n) for n in (below, below + self.divisor) if n > 0]
                raise ValueError(
                    f"batch_size={stage.batch_size} at step {stage.first_step} is not a positive "
                    f"multiple of {self.divisor}; use {' or '.join(options)}"
                )

    def __call__(self, step: int) -> int:
        """The batch size of step `step`, counted from 0."""
        firsts = [stage.first_step for stage in self.stages]
        return self.stages[bisect.bisect_right(firsts, step) - 1].batch_size

    def rows_before(self, step: int) -> int:
        """Rows that the steps before `step` have read."""
        ends = [stage.first_step for stage in self.stages[1:]] + [step]
        return sum(
            stage.batch_size * max(0, min(end, step) - stage.first_step)
            for stage, end in zip(self.stages, ends, strict=True)
        )


def ramp_by_tokens(
    stages: Sequence[tuple[float, int]],
    last: int,
    sequence_length: int,
    divisor: int = 1,
) -> BatchRamp:
    """A ramp whose stages end once a number of tokens has been read.

    Args:
      stages: (tokens read since step 0 at the end of the stage, batch size), in order.
      last: batch size after the last of them.
      sequence_length: tokens of a row.
      divisor: of every batch size.

    Raises:
      ValueError: the tokens do not grow by a step at least, or as `BatchRamp`.
    """
    step, rows, made = 0, 0, []
    for tokens, batch_size in stages:
        made.append(BatchStage(step, batch_size))
        missing = tokens / sequence_length - rows
        if missing <= 0:
            raise ValueError(
                f"the stage until {tokens:,.0f} tokens would be empty: {rows * sequence_length:,} "
                "have been read before it"
            )
        num_steps = -int(-missing // max(batch_size, 1))
        step, rows = step + num_steps, rows + num_steps * batch_size
    return BatchRamp((*made, BatchStage(step, last)), divisor)


def linear_ramp(
    first: int, last: int, num_stages: int, num_steps: int, divisor: int = 1
) -> BatchRamp:
    """From `first` rows to `last` in `num_stages` equal steps up over `num_steps` steps.

    The sizes are `num_stages` points of the line between, rounded to multiples of `divisor`; equal
    neighbours are one stage. `last` begins at step `num_steps`, or where the line rounds to it.

    Raises:
      ValueError: fewer than two stages, too few steps for them, or as `BatchRamp`.
    """
    if not 2 <= num_stages <= num_steps + 1:
        raise ValueError(
            f"num_stages={num_stages} must be at least 2 and at most num_steps + 1 = "
            f"{num_steps + 1}"
        )
    stages: list[BatchStage] = []
    for i in range(num_stages):
        size = first + (last - first) * i / (num_stages - 1)
        ends = i in (0, num_stages - 1)  # given, so to be refused rather than rounded
        size = round(size) if ends else max(divisor, round(size / divisor) * divisor)
        if not stages or stages[-1].batch_size != size:
            stages.append(BatchStage(num_steps * i // (num_stages - 1), size))
    return BatchRamp(tuple(stages), divisor)
