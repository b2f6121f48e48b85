"""A run under way: from the last good checkpoint to the end, or until the machine goes away."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from lm.config.changes import Change
from lm.config.command_line import input_errors
from lm.data.stream import Stream
from lm.distributed import PreemptionNotice
from lm.distributed.collectives import is_first_process, print_once
from lm.model import num_params, train_flops
from lm.run import loop
from lm.run.goodput import Goodput, Hardware, Throughput, table
from lm.run.loop import Outcome, RunLogger
from lm.run.metrics import MetricsWriter, Progress, read
from lm.run.parts import Run
from lm.run.profile import Profiler
from lm.run.saving import Saving
from lm.train.ema import ema_params
from lm.train.schedules import Schedule
from lm.train.stability import begin_recovery, restart_statistics
from lm.train.state import TrainState


class Training:
    """A run under way: its state, its data from here on, and the way back.

    Args:
      run: what is trained.
      goodput: the account of this process's time.
      profile: steps to trace; None for none.
    """

    def __init__(self, run: Run, goodput: Goodput, profile: range | None = None) -> None:
        self.run, self.goodput, self.profile = run, goodput, profile
        self.stream = run.stream
        self.compiled = CompiledStep(run, goodput)
        self.preemption = PreemptionNotice()

    def __call__(self, changes: Sequence[Change] = ()) -> Outcome:
        """Train to the end of the run, or until the machine goes away.

        Args:
          changes: of the configuration since the run was last started, to be recorded.

        Raises:
          FloatingPointError: the loss is not finite, or training has gone back too often.
        """
        run = self.run
        with MetricsWriter(run.workdir, enabled=is_first_process()) as self.writer:
            state = self.start(changes)
            print_once(describe(run, self.stream))
            self.preemption.install()
            while True:
                outcome = self.train(state)
                if outcome.reason != "spikes":
                    break
                state = self.go_back(outcome)
            with self.goodput.timed("checkpoint"):
                run.checkpoints.close()
            self.report_failures()
            if outcome.reason == "preempted":
                self.writer.event("preempted", step=outcome.done)
            for message in endings(outcome, run):
                print_once(message)
            self.writer.event("goodput", step=outcome.done, **self.goodput.event())
            print_once(table(self.goodput.seconds))
        return outcome

    def start(self, changes: Sequence[Change]) -> TrainState:
        """The state to begin with, of the last good checkpoint or new; the stream goes on there."""
        state, recorded = self.restore()
        if recorded is not None:
            with input_errors():
                self.stream = self.stream.resume(recorded)
        rows = read(self.writer.path) if self.writer.path.exists() else []
        done = 0 if state is None else int(state.step)
        if rows:
            self.goodput.resume(rows, done)
        self.writer.truncate_after(done if done else -1)
        if state is None:
            return self.run.new_state()
        self.writer.event("resumed", step=done)
        self.writer.event("goodput", step=done, **self.goodput.event())
        print_once(f"resumed from step {done} of {self.run.num_steps}")
        if changes:
            state = self.record(changes, done, state)
        return state

    def record(self, changes: Sequence[Change], done: int, state: TrainState) -> TrainState:
        """Log what has changed; the state, its statistics begun anew if they no longer hold."""
        rules = [(change.text, change.allowed) for change in changes if change.allowed]
        notes = [f"{text}; {rule.note}" for text, rule in rules if rule.note]
        for note in notes:
            print_once(f"changed: {note}")
        details = {"changes": [change.text for change in changes]}
        self.writer.event("changed", step=done, **details, **({"notes": notes} if notes else {}))
        if state.health is not None and any(rule.new_statistics for _, rule in rules):
            state = restart_statistics(state)
        return state

    def restore(self, up_to: int | None = None) -> tuple[TrainState | None, Any]:
        """State and data order of the last good checkpoint; (None, None) where there is none."""
        with self.goodput.timed("restore"), input_errors():
            restored = self.run.checkpoints.restore_last(self.run.abstract_state(), up_to=up_to)
        if restored is None:
            return None, None
        for message in restored.skipped:
            print_once(message)
            self.writer.event("checkpoint_skipped", step=restored.step, message=message)
        return restored.state, restored.metadata["data"]

    def train(self, state: TrainState) -> Outcome:
        """Train until the loop has a reason to stop."""
        run, rewind = self.run, self.run.rewind
        done, num_steps = int(state.step), run.num_steps
        intervals = run.intervals.fitted(num_steps)
        hardware = Hardware(
            run.layout.mesh.size,
            train_flops(run.model, self.stream.seq_len(done)),
            run.peak_flops,
        )
        saving = Saving(
            run.checkpoints, self.stream, run.saving, intervals.save, run.frozen,
            self.report_failures,
        )  # fmt: skip
        clock, first = self.goodput.step_clock, is_first_process()
        with (
            self.stream.prefetch(done, max(num_steps - done, 0), sharding=run.rows) as batches,
            Progress(num_steps, start=done, clock=clock, hardware=hardware, enabled=first) as line,
            Profiler(run.workdir / "profile", self.profile, print_once) as profiler,
        ):
            return loop.train(
                state, self.compiled, batches, num_steps, intervals,
                RunLogger(
                    self.writer, line, self.goodput, Throughput(clock, hardware), profiler
                ),
                evaluate=self.evaluate, save=saving.save, save_due=saving.due,
                preempted=self.preemption.agreed,
                patience=rewind.patience if rewind and run.stability else None,
            )  # fmt: skip

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Held-out figures of the weights, and as `ema_...` of their average."""
        found = self.run.evaluate(state.params)
        if state.ema is not None:
            averaged = self.run.evaluate(ema_params(state))
            found |= {f"ema_{name}": value for name, value in averaged.items()}
        return found

    def go_back(self, outcome: Outcome) -> TrainState:
        """To the last checkpoint before the steps that were skipped, and past their data.

        Later ones are removed: they would be resumed from.

        Raises:
          FloatingPointError: training has gone back as often as the configuration allows.
        """
        rewind, checkpoints = self.run.rewind, self.run.checkpoints
        assert rewind is not None
        if len(self.stream.skips) >= rewind.limit:
            raise FloatingPointError(
                f"{rewind.patience} steps in a row were skipped after step {outcome.good}, and "
                f"training has gone back {rewind.limit} times (rewind.limit) already; lower the "
                "learning rate or look at the data with python -m experiments.replay"
            )
        checkpoints.wait()
        state, _ = self.restore(outcome.good)  # the stream has skips since then, which stay
        state = self.run.new_state() if state is None else state
        target = int(state.step)
        checkpoints.discard_after(target)
        rows = self.stream.first_row(outcome.done) - self.stream.first_row(target)
        rows += rewind.skip_steps * self.stream.batch_size(target)
        self.stream = self.stream.skipped(target, rows)
        state = begin_recovery(state, rewind.learning_rate, rewind.recovery_steps)
        self.goodput.rewind(target)
        self.writer.truncate_after(target if target else -1)
        self.writer.event(
            "rewound", step=target, from_step=outcome.done, skipped_rows=rows,
            learning_rate=rewind.learning_rate,
        )  # fmt: skip
        self.writer.event("goodput", step=target, **self.goodput.event())
        print_once(f"{rewind.patience} steps in a row were skipped: back from step {outcome.done} "
            f"to {target}, and on with {rows} rows of data skipped")  # fmt: skip
        return state

    def report_failures(self) -> None:
        """Report checkpoints that could not be written; training has gone on."""
        for failure in self.run.checkpoints.failures():
            print_once(
                f"checkpoint of step {failure.step} not written, training goes on: {failure.error}"
            )
            self.writer.event("save_failed", step=failure.step, error=str(failure.error))


class CompiledStep:
    """The step, compiled for each shape of batch before the clock of its first use starts."""

    def __init__(self, run: Run, goodput: Goodput) -> None:
        self.step, self.inputs, self.goodput = run.step(), run.objective.inputs, goodput
        self.programs: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        key = tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))
        if key not in self.programs:
            before = time.perf_counter()
            with self.goodput.timed("compile"):
                self.programs[key] = self.step.lower(state, batch).compile()
            rows, length = jax.eval_shape(self.inputs, batch).ids.shape
            print_once(f"compiled the step for {rows} rows of {length} tokens in "
                f"{time.perf_counter() - before:.1f} s")  # fmt: skip
        return self.programs[key](state, batch)


def slips(run: Run) -> list[str]:
    """A line for each setting that is allowed and yet likely to be a slip."""
    found = []
    if run.max_grad_norm is None:
        found.append("gradients are not clipped: train.max_grad_norm is none or 0")
    warmup = run.schedule.warmup_steps if isinstance(run.schedule, Schedule) else 0
    if warmup > run.num_steps // 2:
        found.append(
            f"warm-up: learning_rate.warmup_steps={warmup} is over half of train.num_steps="
            f"{run.num_steps}"
        )
    return found


def endings(outcome: Outcome, run: Run) -> list[str]:
    """What to say of a run that has ended, if anything."""
    messages, skipped = [], outcome.done - outcome.good
    if skipped:
        messages.append(
            f"the last {skipped} steps were skipped, their loss or gradient norm being far from "
            f"the usual: the weights are those of step {outcome.good}"
        )
    if outcome.reason == "preempted":
        newest = run.checkpoints.latest()
        kept = "nothing is saved" if newest is None else f"saved at step {newest}"
        messages.append(
            f"{kept} of {run.num_steps} steps before the machine goes away; the same command "
            "goes on from there"
        )
    return messages


def describe(run: Run, stream: Stream) -> str:
    """What is about to happen, in three lines, and `slips`."""
    mesh, rules = run.layout.mesh, run.layout.rules
    zero = sum("embed" in table for table in (rules.weights, rules.gradients, rules.optimizer))
    devices = mesh.devices.flat
    axes = " x ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
    epochs = ", ".join(f"{epochs:.2f}" for epochs in stream.epochs(run.num_steps))
    return "\n".join(
        [
            f"model: {num_params(run.model):,} weights, {run.model.num_layers} layers, "
            f"vocabulary {run.model.vocab_size:,}",
            f"data: {run.data}, {stream.num_rows:,} rows of {stream.seq_len(0)} tokens; "
            f"{stream.num_tokens(run.num_steps):,.0f} tokens in {run.num_steps} steps, "
            f"{epochs} epochs",
            f"devices: {len(devices)} x {devices[0].device_kind}"
            + (f", mesh {axes}, ZeRO-{zero}" if axes else ""),
            *slips(run),
        ]
    )
