"""The loop around the step: metrics, evaluation, checkpoints, each at its own interval."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from lm.config.fields import Checked, Count, PositiveFraction, Whole
from lm.run.goodput import Goodput, Throughput
from lm.run.metrics import MetricsWriter, Progress, memory
from lm.run.profile import Profiler
from lm.train.state import TrainState

Values = dict[str, float]
Kind = Literal["durable", "local"]  # of a checkpoint: on the shared disk, or on each host's own
Metrics = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Intervals(Checked):
    """When things happen, in steps; each also happens at the last step.

    Attributes:
      log: a row of metrics.
      evaluate: held-out loss.
      save: a checkpoint.
    """

    log: Count = 10
    evaluate: Count = 100
    save: Count = 100

    def fitted(self, num_steps: int) -> Intervals:
        """These, shortened for a short run: 20 rows and 10 checkpoints at least."""
        log, save = (max(1, num_steps // count) for count in (20, 10))
        return dataclasses.replace(self, log=min(self.log, log), save=min(self.save, save))


@dataclasses.dataclass(frozen=True)
class Rewind(Checked):
    """What to do when the device skips step after step (see `lm.train.stability`).

    Training goes back to the last checkpoint made before the first of these steps, and on with
    the data after them (as PaLM's did by hand, arXiv:2204.02311, section 5.1).

    Attributes:
      patience: steps skipped in a row that make it go back.
      skip_steps: batches passed over beyond those that were read.
      learning_rate: times the schedule's, for the next `recovery_steps` steps.
      recovery_steps: how many.
      limit: rewinds of a run; one more ends it.
    """

    patience: Count = 3
    skip_steps: Whole = 0
    learning_rate: PositiveFraction = 1.0
    recovery_steps: Count = 100
    limit: Whole = 10


@dataclasses.dataclass
class RunLogger:
    """Everything that records or shows a run.

    Attributes:
      writer: of metrics and events.
      progress: the line a person reads.
      goodput: where the time goes.
      throughput: tokens over the time of steps.
      profiler: traces some steps.
    """

    writer: MetricsWriter
    progress: Progress
    goodput: Goodput
    throughput: Throughput
    profiler: Profiler

    def fetch(self, done: int, metrics: Metrics) -> Values:
        """The metrics of step `done`, once it has been taken.

        `loss` is the objective's term of that name, or what it minimizes where it has none.

        Raises:
          FloatingPointError: the loss is not finite, and the step was not skipped.
        """
        with self.goodput.timed("step"):
            values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        total = values.pop("total_loss")
        values.setdefault("loss", total)
        if not np.isfinite(total) and not values.get("skipped"):
            raise FloatingPointError(
                f"the loss of step {done} is {total}; lower the learning rate, or go on "
                "from the last checkpoint with another seed"
            )
        self.throughput.add(_num_tokens(values))
        self.goodput.done(done)
        return values

    @contextlib.contextmanager
    def saving(self, done: int) -> Iterator[None]:
        """Around the save of a checkpoint: timed, and the time spent so far is an event."""
        with self.goodput.timed("checkpoint"):
            yield
        self.writer.event("goodput", done, **self.goodput.event())

    def log_step(self, done: int, values: Values, row_is_due: bool, extra: Values) -> None:
        """Show a step's metrics, write a row of them if one is due, and an event if it was skipped.

        A row holds `step` (steps done), the step's metrics and `extra` in full precision, rates
        since the row before, memory, and the seconds of the run.
        """
        seen = memory(jax.local_devices()) if row_is_due else {}
        shown = {name: values[name] for name in ("grad_norm", "learning_rate") if name in values}
        shown |= {"skipped_steps": values.get("skipped_total", 0.0)} | seen
        self.progress.update(done, loss=values["loss"], num_tokens=_num_tokens(values), **shown)
        if row_is_due:
            rates = self.throughput.read()
            self.writer.write(done, values | rates | seen | self.goodput.row() | extra)
        if values.get("skipped"):
            details = {name: values[name] for name in ("loss", "grad_norm") if name in values}
            self.writer.event("skipped", done, **details)


def strongest(*kinds: Kind | None) -> Kind | None:
    """The strongest of the checkpoints that are due: the one that makes the others needless."""
    return "durable" if "durable" in kinds else "local" if "local" in kinds else None


def _in_a_row(values: Values) -> int:
    """Steps skipped in a row, up to the one of these metrics."""
    return int(values.get("spikes_in_a_row", 0))


def _num_tokens(values: Values) -> int:
    """Tokens of a step; 0 where bad data has made even their count not a number."""
    return int(values["tokens"]) if np.isfinite(values["tokens"]) else 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes:
      state: after the last step taken.
      reason: all steps were done, the machine is going away, or steps were skipped in a row.
      done: steps done, the skipped ones included.
      good: steps done before those skipped in a row at the end; `done` if none were.
    """

    state: TrainState
    reason: Literal["finished", "preempted", "spikes"]
    done: int
    good: int


def train(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Iterable[Any],
    num_steps: int,
    intervals: Intervals,
    logger: RunLogger,
    *,
    evaluate: Callable[[TrainState], Values],
    save: Callable[[TrainState, int, Kind, bool, bool], None],
    save_due: Callable[[int], Kind | None],
    preempted: Callable[[int], bool] = lambda done: False,
    patience: int | None = None,
) -> Outcome:
    """Step until `num_steps` have been done, or until something calls for the caller.

    Metrics are read one step late, so that the device always has a step to do. Between skipped
    steps no checkpoint is made, but where training ends there with fewer than `patience` of them:
    they changed no weight, and their count is saved.

    Args:
      state: `state.step` steps are done already; donated.
      step: the compiled step.
      batches: from step `state.step` on.
      num_steps: when to stop.
      intervals: of rows and evaluations.
      logger: records and shows the steps.
      evaluate: state -> metrics to add to the row.
      save: writes a checkpoint, given the state, the steps done, the kind, whether training ends
        here, and whether it is between skipped steps.
      save_due: the kind of checkpoint due after so many steps, asked each time; the last step makes
        a durable one anyway.
      preempted: whether all hosts have agreed to stop here, given the steps done.
      patience: steps skipped in a row that end the loop; None for any number.

    Raises:
      FloatingPointError: the loss of a step that was not skipped is not finite.
    """
    goodput, log_step = logger.goodput, logger.log_step
    done, too_many = int(state.step), patience or np.inf
    if done >= num_steps:
        return Outcome(state, "finished", done, done)
    in_a_row = 0
    pending: tuple[int, Mapping[str, Any]] | None = None
    late: Kind | None = None  # a checkpoint that steps skipped in a row have held up

    def is_busy() -> bool:
        return pending is not None and not pending[1]["total_loss"].is_ready()

    for batch in goodput.waiting(batches, busy=is_busy):
        with goodput.timed("step"):
            with logger.profiler.at(done, pending and pending[1]):
                state, metrics = step(state, batch)
            values = logger.fetch(*pending) if pending else None
            if values:
                log_step(done, values, done % intervals.log == 0, {})
        done += 1
        last, stopping = done == num_steps, preempted(done)
        evaluating = done % intervals.evaluate == 0 or last
        kind = strongest(late, save_due(done), "durable" if stopping or last else None)
        pending = (done, metrics)
        in_a_row = _in_a_row(values) if values else in_a_row
        if (evaluating or kind) and in_a_row < too_many:
            values, pending = logger.fetch(*pending), None
            with goodput.timed("evaluation") if evaluating else contextlib.nullcontext():
                extra = dict(evaluate(state)) if evaluating else {}
            log_step(done, values, done % intervals.log == 0 or last or evaluating, extra)
            in_a_row = _in_a_row(values)
            if kind and (not in_a_row or ((stopping or last) and in_a_row < too_many)):
                with logger.saving(done):
                    save(state, done, kind, stopping or last, in_a_row > 0)
            late = kind if in_a_row else None
        good = done - (pending is not None) - in_a_row
        if in_a_row >= too_many:
            return Outcome(state, "preempted" if stopping else "spikes", done, good)
        if stopping or last:
            return Outcome(state, "finished" if last else "preempted", done, good)
    if pending is not None:
        log_step(done, logger.fetch(*pending), True, {})
    return Outcome(state, "finished", done, done)
