"""The loop around the step: metrics, evaluation, checkpoints, each at its own interval."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lm.train.metrics import MetricsWriter, Progress
from lm.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Intervals:
    """When things happen, in steps; each also happens at the last step.

    Attributes:
      log: a row of metrics.
      evaluate: held-out loss.
      save: a checkpoint.
    """

    log: int = 10
    evaluate: int = 100
    save: int = 100

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"every {name} interval must be at least 1 step, got {value}")


class Throughput:
    """Tokens per second since the last reading, time in `pause` left out."""

    def __init__(self) -> None:
        self.tokens = 0.0
        self.start = time.perf_counter()

    def read(self) -> float:
        now = time.perf_counter()
        rate = self.tokens / max(now - self.start, 1e-9)
        self.tokens, self.start = 0.0, now
        return rate

    def skip(self, seconds: float) -> None:
        self.start += seconds


def train(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]],
    batches: Iterable[Any],
    num_steps: int,
    intervals: Intervals,
    *,
    writer: MetricsWriter,
    progress: Progress,
    evaluate: Callable[[TrainState], Mapping[str, float]],
    save: Callable[[TrainState, int], None],
) -> TrainState:
    """Step until `num_steps` have been done.

    Metrics are read one step late, so that the device always has a step to do. A row holds `step`
    (steps done), the step's metrics in full precision, and `tokens_per_second` since the row
    before, evaluation and checkpoints left out.

    Args:
      state: `state.step` steps are done already; donated.
      step: the compiled step.
      batches: from step `state.step` on.
      num_steps: when to stop.
      intervals: of the rest.
      writer, progress: where metrics go.
      evaluate: state -> metrics to add to the row.
      save: writes a checkpoint.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    throughput = Throughput()
    pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def finish(done: int, metrics: Mapping[str, jax.Array], extra: Mapping[str, float]) -> None:
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        throughput.tokens += values["tokens"]
        if not np.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss of step {done} is {values['loss']}; lower the learning rate, or go on "
                "from the last checkpoint with another seed"
            )
        progress.update(done, loss=values["loss"], num_tokens=int(values["tokens"]))
        if done % intervals.log == 0 or done == num_steps or extra:
            rate = {"tokens_per_second": throughput.read()}
            writer.write(done, values | rate | dict(extra))

    done = int(state.step)
    if done >= num_steps:
        return state
    for batch in batches:
        state, metrics = step(state, batch)
        if pending is not None:
            finish(*pending, {})
            pending = None
        done += 1
        last = done == num_steps
        evaluating = done % intervals.evaluate == 0 or last
        saving = done % intervals.save == 0 or last
        if not (evaluating or saving):
            pending = (done, metrics)
            continue
        jax.block_until_ready(metrics)
        before = time.perf_counter()
        with progress.pause():
            extra = evaluate(state) if evaluating else {}
        throughput.skip(time.perf_counter() - before)
        finish(done, metrics, extra)
        before = time.perf_counter()
        if saving:
            writer.flush()
            with progress.pause():
                save(state, done)
        throughput.skip(time.perf_counter() - before)
        if last:
            break
    if pending is not None:
        finish(*pending, {})
    return state
