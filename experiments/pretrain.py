"""Pre-train a language model on text.

    python -m experiments.pretrain --config=quicktest --workdir=runs/quicktest

Makes a tokenizer and a packed data set from text (Python's own documentation and source, or
--config.data.files='dir/**/*.txt'), trains, evaluates on held-out text in bits per byte, samples,
and writes a report. The same command resumes, on as many hosts as it is started on (see
`lm.distributed.start` for how they find each other). The workdir receives `config.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/<step>`, `data/`, `summary.json` and `report.html`.

SIGTERM saves and ends the run; `--profile_steps=10:15` traces steps into `<workdir>/profile`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging

from experiments.assemble import Run, assemble
from experiments.configs import pretrain as configs
from experiments.configs.pretrain import Pretrain
from experiments.summary import summarize
from lm import distributed
from lm.checkpoints import SaveInterval
from lm.config import codec, program
from lm.config.command_line import ConfigError, input_errors
from lm.data.batches import Batches
from lm.distributed.collectives import is_first_process, print_once
from lm.hardware.chips import peak_flops
from lm.model import num_params, train_flops
from lm.run.goodput import Goodput, Hardware, Throughput, process_age, table
from lm.run.loop import Instruments, Intervals, Outcome, train
from lm.run.metrics import MetricsWriter, Progress
from lm.run.metrics import read as read_metrics
from lm.run.process import keep_freed_memory
from lm.run.profile import Profiler, parse_steps
from lm.train.ema import ema_params
from lm.train.stability import begin_recovery, restart_statistics
from lm.train.state import TrainState

# What may differ between the first start of a run and a later one.
MAY_CHANGE = (
    "mesh.",
    "sharding.",
    "intervals.",
    "sampling.",
    "rewind.",
    "data.directory",
    "data.sources.",
    "train.num_steps",
    "train.batch_size",
    "train.num_micro_batches",
    "train.remat",
    "train.unroll",
    "train.attention",
    "train.peak_tflops",
    "checkpoints.",
)

CONFIGS = {
    "quicktest": configs.quicktest,
    "demo": configs.demo,
    "twenty_minutes": configs.twenty_minutes,
}
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "Steps to trace, such as 10:15.")


def main(config: Pretrain, workdir: pathlib.Path) -> None:
    goodput = Goodput(already=process_age())
    keep_freed_memory()
    if logging.get_verbosity() == logging.INFO:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail of every save
    with contextlib.ExitStack() as stack:
        with input_errors():
            stack.enter_context(distributed.start())
        stack.enter_context(goodput.watch_compilation())
        changes = claim_workdir(config, workdir)
        run = assemble(config, workdir)
        if is_first_process():
            workdir.mkdir(parents=True, exist_ok=True)
            codec.save(config, workdir / "config.json")
        outcome = Training(run, goodput)(changes)
        if outcome.reason == "finished":
            params = outcome.state.params
            if jax.process_count() > 1 and config.sampling.prompts:
                params = distributed.fetch(params)
            if is_first_process():
                summarize(run, params)
    if outcome.reason == "preempted":
        sys.exit(distributed.PreemptionNotice.EXIT)


class Training:
    """A run under way: its state, its data from here on, and the way back."""

    def __init__(self, run: Run, goodput: Goodput) -> None:
        self.run, self.goodput = run, goodput
        self.stream = run.stream
        self.compiled = CompiledStep(run, goodput)
        self.preemption = distributed.PreemptionNotice()
        self.steps = parse_profile(run.config)

    def __call__(self, changes: list[str]) -> Outcome:
        """Train to the end of the run, or until the machine goes away.

        Args:
          changes: of the configuration since the run was last started, to be recorded.

        Raises:
          FloatingPointError: the loss is not finite, or training has gone back too often.
        """
        run, config = self.run, self.run.config
        with MetricsWriter(run.workdir, enabled=is_first_process()) as self.writer:
            state = self.start(changes)
            print_once(describe(run, self.stream))
            self.preemption.install()
            while True:
                outcome = self.train(state)
                if outcome.reason != "spikes":
                    break
                state = self.go_back(outcome)
            with self.goodput.spend("checkpoint"):
                run.checkpoints.close()
            self.tell_failures()
            if outcome.reason == "preempted":
                self.writer.event("preempted", step=outcome.done)
                print_once(f"saved at step {outcome.done} of {config.train.num_steps} before the "
                    "machine goes away; the same command goes on from there")  # fmt: skip
            self.writer.event("goodput", step=outcome.done, **self.goodput.event())
            print_once(table(self.goodput.seconds))
        return outcome

    def start(self, changes: list[str]) -> TrainState:
        """The state to begin with, of the last good checkpoint or new; the stream goes on there."""
        state, recorded = self.restore()
        if recorded is not None:
            with input_errors():
                self.stream = self.stream.resume(recorded)
        rows = read_metrics(self.writer.path) if self.writer.path.exists() else []
        done = 0 if state is None else int(state.step)
        if rows:
            self.goodput.resume(rows, done)
        self.writer.truncate_after(done if done else -1)
        if state is None:
            return self.run.new_state()
        self.writer.event("resumed", step=done)
        self.writer.event("goodput", step=done, **self.goodput.event())
        if changes:
            self.writer.event("changed", step=done, changes=changes)
            if state.health is not None:
                state = restart_statistics(state)
        print_once(f"resumed from step {done} of {self.run.config.train.num_steps}")
        return state

    def restore(self) -> tuple[TrainState | None, Any]:
        """State and data order of the last good checkpoint; (None, None) where there is none."""
        with self.goodput.spend("restore"), input_errors():
            restored = self.run.checkpoints.restore_last(self.run.abstract_state())
        if restored is None:
            return None, None
        for message in restored.skipped:
            print_once(message)
            self.writer.event("checkpoint_skipped", step=restored.step, message=message)
        return restored.state, restored.metadata["data"]

    def train(self, state: TrainState) -> Outcome:
        """Train until the loop has a reason to stop."""
        run, config = self.run, self.run.config
        done, num_steps = int(state.step), config.train.num_steps
        intervals, rewind = fit_intervals(config), config.rewind
        devices = run.layout.mesh.devices.flat
        hardware = Hardware(
            len(devices),
            train_flops(config.model, config.train.sequence_length),
            config.train.peak_tflops * 1e12 or peak_flops(devices[0].device_kind),
        )
        saving = Saving(run, self.stream, intervals, self.tell_failures)
        clock = self.goodput.step_clock
        with (
            self.stream.prefetch(done, max(num_steps - done, 0), sharding=run.rows) as batches,
            Progress(
                num_steps, start=done, clock=clock, hardware=hardware, enabled=is_first_process()
            ) as progress,
            Profiler(run.workdir / "profile", self.steps, print_once) as profiler,
        ):
            return train(
                state, self.compiled, batches, num_steps, intervals,
                Instruments(
                    self.writer, progress, self.goodput, Throughput(clock, hardware), profiler
                ),
                evaluate=self.evaluate, save=saving.save, save_due=saving.due,
                preempted=self.preemption.agreed,
                patience=rewind.patience if rewind and config.stability else None,
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

        Raises:
          FloatingPointError: training has gone back as often as the configuration allows.
        """
        rewind = self.run.config.rewind
        assert rewind is not None
        self.run.checkpoints.wait()
        state, _ = self.restore()  # the stream has skips since then, which stay
        state = self.run.new_state() if state is None else state
        target = int(state.step)
        if len(self.stream.skips) >= rewind.limit:
            raise FloatingPointError(
                f"{rewind.patience} steps in a row were skipped before step {outcome.done}, and "
                f"training has gone back {rewind.limit} times (rewind.limit) already; lower the "
                "learning rate or look at the data with python -m experiments.replay"
            )
        rows = self.stream.first_row(outcome.done) - self.stream.first_row(target)
        rows += rewind.skip_steps * self.stream.batch_size(target)
        self.stream = self.stream.skipped(target, rows)
        if rewind.learning_rate < 1:
            state = begin_recovery(state, rewind.learning_rate, rewind.recovery_steps)
        self.goodput.rewind(target)
        self.writer.truncate_after(target if target else -1)
        self.writer.event(
            "rewound", step=target, from_step=outcome.done, skipped_rows=rows,
            learning_rate=rewind.learning_rate,
        )  # fmt: skip
        self.writer.event("goodput", step=target, **self.goodput.event())
        print_once(f"{rewind.patience} steps in a row were skipped: back from step "
            f"{outcome.done} to {target}, and on with {rows} rows of data skipped")  # fmt: skip
        return state

    def tell_failures(self) -> None:
        """Report checkpoints that could not be written; training has gone on."""
        for failure in self.run.checkpoints.failures():
            print_once(
                f"checkpoint of step {failure.step} not written, training goes on: {failure.error}"
            )
            self.writer.event("save_failed", step=failure.step, error=str(failure.error))


class Saving:
    """When a checkpoint is due, and which."""

    def __init__(
        self, run: Run, stream: Batches, intervals: Intervals, tell_failures: Callable[[], None]
    ) -> None:
        c = run.config.checkpoints
        self.checkpoints, self.stream, self.tell_failures = run.checkpoints, stream, tell_failures
        self.interval = SaveInterval(intervals.save, c.save_minutes)
        self.local_steps = c.local_steps if c.local else None
        self.last = time.monotonic()
        self.is_local = False

    def due(self, done: int) -> bool:
        """Whether one is due after `done` steps. Equal on all hosts."""
        durable = self.interval.due(done, time.monotonic(), self.last)
        local = self.local_steps is not None and done % self.local_steps == 0
        self.is_local = local and not durable
        return durable or local

    def save(self, state: TrainState, done: int, ends: bool) -> None:
        """Write the one that is due; the last one of all is waited for."""
        self.tell_failures()
        metadata = {"data": self.stream.state(done)}
        if self.is_local and not ends:
            self.checkpoints.save_local(done, state, metadata)
        else:
            self.checkpoints.save(done, state, metadata, wait=ends)
            self.last = time.monotonic()


class CompiledStep:
    """The step, compiled for each shape of batch before the clock of its first use starts."""

    def __init__(self, run: Run, goodput: Goodput) -> None:
        self.step, self.goodput = run.step(), goodput
        self.programs: dict[tuple[int, ...], Callable[..., Any]] = {}

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        shape = batch["ids"].shape
        if shape not in self.programs:
            before = time.perf_counter()
            with self.goodput.spend("compile"):
                self.programs[shape] = self.step.lower(state, batch).compile()
            rows, length = shape
            print_once(f"compiled the step for {rows} rows of {length} tokens in "
                f"{time.perf_counter() - before:.1f} s")  # fmt: skip
        return self.programs[shape](state, batch)


def claim_workdir(config: Pretrain, workdir: pathlib.Path) -> list[str]:
    """Check that the run begun here, if any, is this one. What changed since, of what may.

    Raises:
      ConfigError: `workdir` is no path, or the folder holds a run with another configuration; every
        difference is named.
    """
    if re.match(r"\w+:/", str(workdir)):
        raise ConfigError(
            f"workdir {workdir} is an address, and a run writes to a file system: mount the bucket "
            "(gcsfuse, s3fs) and give the path below it"
        )
    path = workdir / "config.json"
    if not any((workdir / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        return []
    if not path.exists():
        raise ConfigError(
            f"{workdir} holds metrics or checkpoints but no config.json, so it is not known "
            "whose they are; give another --workdir"
        )
    changed = codec.difference(codec.load(path, Pretrain), config)
    other = [line for line in changed if not line.startswith(MAY_CHANGE)]
    if other:
        raise ConfigError(
            f"{workdir} holds another run: {'; '.join(other[:8])}. Give another --workdir, "
            "or the configuration it began with"
        )
    return changed


def parse_profile(config: Pretrain) -> range | None:
    """The steps that `--profile_steps` names."""
    text = PROFILE_STEPS.value if flags.FLAGS.is_parsed() else None
    with input_errors():
        return None if text is None else parse_steps(text, config.train.num_steps)


def fit_intervals(config: Pretrain) -> Intervals:
    """The intervals, shortened for a short run: 20 rows and 10 checkpoints at least."""
    num_steps, every = config.train.num_steps, config.intervals
    return dataclasses.replace(
        every,
        log=min(every.log, max(1, num_steps // 20)),
        save=min(every.save, max(1, num_steps // 10)),
    )


def describe(run: Run, stream: Batches) -> str:
    """What is about to happen, in three lines."""
    config, t = run.config, run.config.train
    devices = run.layout.mesh.devices.flat
    axes = " x ".join(f"{axis}={n}" for axis, n in run.layout.mesh.shape.items() if n > 1)
    epochs = ", ".join(f"{epochs:.2f}" for epochs in stream.epochs(t.num_steps))
    return "\n".join(
        [
            f"model: {num_params(config.model):,} weights, {config.model.num_layers} layers, "
            f"vocabulary {config.model.vocab_size:,}",
            f"data: {run.text.directory}, {stream.num_rows:,} rows of {t.sequence_length} tokens; "
            f"{stream.num_tokens(t.num_steps):,.0f} tokens in {t.num_steps} steps, "
            f"{epochs} epochs",
            f"devices: {len(devices)} x {devices[0].device_kind}"
            + (f", mesh {axes}, ZeRO-{config.sharding.zero}" if axes else ""),
        ]
    )


if __name__ == "__main__":
    program.run(main, configs=CONFIGS, workdir=True)
