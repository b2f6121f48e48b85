"""The loop, around a step that counts."""

import itertools
import math
import time
import types

import jax.numpy as jnp
import pytest

from lm.run.goodput import Goodput, Throughput
from lm.run.loop import Intervals, RunLogger, train
from lm.run.metrics import MetricsWriter, Progress, read
from lm.run.profile import Profiler


class Run:
    """A counting step, and a record of everything the loop asked for."""

    def __init__(
        self, tmp_path, losses=None, seconds=0.0, skipped=(), stop_at=None, save_steps=(), due=None
    ):
        self.path, self.losses, self.seconds = tmp_path, losses or {}, seconds
        self.skipped, self.stop_at = set(skipped), stop_at
        self.due = dict.fromkeys(save_steps, "durable") | (due or {})
        self.in_a_row = 0
        self.batches, self.evaluated, self.saved, self.kinds = [], [], [], []
        self.goodput = Goodput()

    def step(self, state, batch):
        self.batches.append(batch)
        done = state.step + 1
        loss = self.losses.get(done, 1 / done)
        metrics = {"loss": loss, "total_loss": loss, "tokens": 10}
        metrics["learning_rate"] = 0.5 * state.step
        if self.skipped:
            self.in_a_row = (self.in_a_row + 1) * (done in self.skipped)
            metrics |= {"skipped": done in self.skipped, "spikes_in_a_row": self.in_a_row}
        metrics = {name: jnp.float32(value) for name, value in metrics.items()}
        return types.SimpleNamespace(step=done), metrics

    def evaluate(self, state):
        self.evaluated.append(state.step)
        time.sleep(self.seconds)
        return {"eval_loss": 100.0 + state.step}

    def save(self, state, done, kind, ends, spiking):
        assert state.step == done
        assert ends == (done in (self.num_steps, self.stop_at))
        assert spiking == (done in self.skipped)
        self.saved.append(done)
        self.kinds.append(kind)

    def __call__(self, num_steps, intervals, start=0, batches=None, patience=None):
        batches = itertools.count(start) if batches is None else batches
        self.num_steps = num_steps
        clock, save = self.goodput.step_clock, intervals.save
        with (
            MetricsWriter(self.path, tensorboard=False) as writer,
            Progress(num_steps, start=start, enabled=False) as progress,
        ):
            logger = RunLogger(
                writer, progress, self.goodput, Throughput(clock), Profiler(self.path, None)
            )
            return train(
                types.SimpleNamespace(step=start), self.step, batches, num_steps, intervals,
                logger, evaluate=self.evaluate, save=self.save, patience=patience,
                save_due=lambda done: self.due.get(done) or (done % save == 0 and "durable"),
                preempted=lambda done: done == self.stop_at,
            )  # fmt: skip

    @property
    def rows(self):
        return [row for row in read(self.path / "metrics.jsonl") if "event" not in row]

    @property
    def events(self):
        return [row for row in read(self.path / "metrics.jsonl") if "event" in row]


def test_everything_happens_at_its_interval_and_at_the_end(tmp_path):
    run = Run(tmp_path)
    outcome = run(11, Intervals(log=3, evaluate=4, save=5))
    assert outcome.state.step == 11 and outcome.reason == "finished"
    assert run.batches == list(range(11))
    assert run.evaluated == [4, 8, 11]
    assert run.saved == [5, 10, 11]
    assert [row["step"] for row in run.rows] == [3, 4, 6, 8, 9, 11]
    assert [row["step"] for row in run.rows if "eval_loss" in row] == [4, 8, 11]
    for row in run.rows:
        done = row["step"]
        assert row["loss"] == float(jnp.float32(1 / done))
        assert row["learning_rate"] == 0.5 * (done - 1)
        assert row["tokens_per_second"] > 0
        assert row["tokens"] == 10
        assert row["step_seconds"] <= row["seconds"]


@pytest.mark.parametrize("num_steps", [8, 5, 3])
def test_it_goes_on_from_where_the_state_is_and_a_finished_run_takes_no_step(tmp_path, num_steps):
    run = Run(tmp_path)
    outcome = run(num_steps, Intervals(log=1, evaluate=100, save=4), start=5)
    assert outcome.state.step == max(num_steps, 5) and outcome.reason == "finished"
    assert run.batches == list(range(5, num_steps))
    assert [row["step"] for row in run.rows] == list(range(6, num_steps + 1))
    assert run.saved == [8] * (num_steps == 8)


def test_data_that_ends_early_ends_the_loop_with_its_last_metrics(tmp_path):
    run = Run(tmp_path)
    outcome = run(100, Intervals(log=1), batches=range(3))
    assert outcome.state.step == outcome.done == 3
    assert [row["step"] for row in run.rows] == [1, 2, 3]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [2, 4, 5])
def test_a_loss_that_is_not_finite_stops_before_the_next_checkpoint(tmp_path, loss, bad):
    run = Run(tmp_path, {bad: loss})
    with pytest.raises(FloatingPointError, match=f"the loss of step {bad} is {loss}"):
        run(8, Intervals(log=1, evaluate=4, save=4))
    assert all(step < bad for step in run.saved)
    assert all(row["step"] < bad for row in run.rows)


def test_a_skipped_step_is_told_of_and_training_goes_on(tmp_path):
    run = Run(tmp_path, {3: math.nan}, skipped=[3])
    outcome = run(6, Intervals(log=2, evaluate=100, save=100), patience=2)
    assert outcome.reason == "finished" and outcome.done == 6
    (event,) = (row for row in run.events if row["event"] == "skipped")
    assert event["step"] == 3 and math.isnan(event["loss"])


@pytest.mark.parametrize(("save_steps", "done"), [([2], 8), ([2, 6, 7], 7)])
def test_skipped_steps_in_a_row_end_the_loop_with_no_checkpoint_among_them(
    tmp_path, save_steps, done
):
    """With one step more in flight where their metrics are read late."""
    run = Run(tmp_path, skipped=[3, 6, 7], save_steps=save_steps)
    outcome = run(20, Intervals(log=1, evaluate=100, save=100), patience=2)
    assert outcome.reason == "spikes"
    assert outcome.done == outcome.state.step == done
    assert run.saved == [2]


@pytest.mark.parametrize(
    ("due", "kinds"),
    [
        ({4: "durable"}, ["durable", "durable"]),
        ({4: "local"}, ["local", "durable"]),
        ({4: "local", 6: "durable"}, ["durable", "durable"]),
        ({4: "durable", 6: "local"}, ["durable", "durable"]),
    ],
)
def test_a_late_checkpoint_is_of_the_kind_that_was_due_or_a_durable_one_due_now(
    tmp_path, due, kinds
):
    run = Run(tmp_path, skipped=[4, 5], due=due)
    run(10, Intervals(log=1, evaluate=100, save=100), patience=3)
    assert run.saved == [6, 10] and run.kinds == kinds


def test_a_machine_that_goes_away_saves_and_stops(tmp_path):
    run = Run(tmp_path, stop_at=5, skipped=[5])
    outcome = run(20, Intervals(log=100, evaluate=100, save=100))
    assert outcome.reason == "preempted" and outcome.done == outcome.state.step == 5
    assert run.saved == [5]


@pytest.mark.parametrize(
    ("skipped", "stop_at", "reason", "saved", "good"),
    [
        ([8], None, "finished", [4, 8], 7),  # one of the last: the weights are those before it
        ([7, 8], None, "spikes", [4], 6),  # nothing is saved that would be resumed from
        ([6, 7], None, "spikes", [4], 5),
        ([5], 5, "preempted", [4, 5], 4),
        ([4, 5], 5, "preempted", [], 3),  # it would go back from here, and so it will
        ([7, 8], 8, "preempted", [4], 6),
        ([3], 5, "preempted", [4, 5], 5),
    ],
)
def test_a_spike_where_training_ends_is_not_saved_if_the_run_is_to_go_back(
    tmp_path, skipped, stop_at, reason, saved, good
):
    run = Run(tmp_path, skipped=skipped, stop_at=stop_at)
    outcome = run(8, Intervals(log=1, evaluate=100, save=4), patience=2)
    assert (outcome.reason, run.saved, outcome.good) == (reason, saved, good)


def test_evaluation_does_not_count_as_training_time(tmp_path):
    run = Run(tmp_path, seconds=0.2)
    run(8, Intervals(log=4, evaluate=2, save=100))
    # A step is far below a millisecond: with a fifth of a second for 20 tokens it would be 100.
    assert all(row["tokens_per_second"] > 150 for row in run.rows)
    assert run.goodput.seconds["evaluation"] > 0.75
