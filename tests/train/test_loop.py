"""The loop, around a step that counts."""

import itertools
import math
import time
import types

import jax.numpy as jnp
import pytest

from lm.train.loop import Intervals, train
from lm.train.metrics import MetricsWriter, Progress, read


class Run:
    """A counting step, and a record of everything the loop asked for."""

    def __init__(self, tmp_path, losses=None, seconds=0.0):
        self.path, self.losses, self.seconds = tmp_path, losses or {}, seconds
        self.batches, self.evaluated, self.saved = [], [], []

    def step(self, state, batch):
        self.batches.append(batch)
        done = state.step + 1
        metrics = {"loss": jnp.float32(self.losses.get(done, 1 / done)), "tokens": jnp.float32(10)}
        metrics["learning_rate"] = jnp.float32(0.5 * state.step)
        return types.SimpleNamespace(step=done), metrics

    def evaluate(self, state):
        self.evaluated.append(state.step)
        time.sleep(self.seconds)
        return {"eval_loss": 100.0 + state.step}

    def save(self, state, done):
        assert state.step == done
        self.saved.append(done)

    def __call__(self, num_steps, intervals, start=0, batches=None):
        batches = itertools.count(start) if batches is None else batches
        with (
            MetricsWriter(self.path, tensorboard=False) as writer,
            Progress(num_steps, start=start, enabled=False) as progress,
        ):
            state = train(
                types.SimpleNamespace(step=start), self.step, batches, num_steps, intervals,
                writer=writer, progress=progress, evaluate=self.evaluate, save=self.save,
            )  # fmt: skip
        return state

    @property
    def rows(self):
        return read(self.path / "metrics.jsonl")


def test_everything_happens_at_its_interval_and_at_the_end(tmp_path):
    run = Run(tmp_path)
    state = run(11, Intervals(log=3, evaluate=4, save=5))
    assert state.step == 11
    assert run.batches == list(range(11))
    assert run.evaluated == [4, 8, 11]
    assert run.saved == [5, 10, 11]
    rows = run.rows
    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 11]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 11]
    for row in rows:
        done = row["step"]
        assert row["loss"] == float(jnp.float32(1 / done))
        assert row["learning_rate"] == 0.5 * (done - 1)
        assert row["tokens_per_second"] > 0
        assert row["tokens"] == 10


def test_it_goes_on_from_where_the_state_is(tmp_path):
    run = Run(tmp_path)
    run(8, Intervals(log=1, evaluate=100, save=4), start=5)
    assert run.batches == [5, 6, 7]
    assert [row["step"] for row in run.rows] == [6, 7, 8]
    assert run.saved == [8]


@pytest.mark.parametrize("num_steps", [5, 3, 0])
def test_a_finished_run_takes_no_step(tmp_path, num_steps):
    run = Run(tmp_path)
    state = run(num_steps, Intervals(), start=5)
    assert state.step == 5 and not run.batches and not run.saved and not run.rows


def test_data_that_ends_early_ends_the_loop_with_its_last_metrics(tmp_path):
    run = Run(tmp_path)
    state = run(100, Intervals(log=1), batches=range(3))
    assert state.step == 3
    assert [row["step"] for row in run.rows] == [1, 2, 3]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [2, 4, 5])
def test_a_loss_that_is_not_finite_stops_before_the_next_checkpoint(tmp_path, loss, bad):
    run = Run(tmp_path, {bad: loss})
    with pytest.raises(FloatingPointError, match=f"the loss of step {bad} is {loss}"):
        run(8, Intervals(log=1, evaluate=4, save=4))
    assert all(step < bad for step in run.saved)
    assert all(row["step"] < bad for row in run.rows)


def test_evaluation_does_not_count_as_training_time(tmp_path):
    run = Run(tmp_path, seconds=0.2)
    run(8, Intervals(log=4, evaluate=2, save=100))
    # A step is far below a millisecond: with a fifth of a second for 20 tokens it would be 100.
    assert all(row["tokens_per_second"] > 150 for row in run.rows)


@pytest.mark.parametrize("name", ["log", "evaluate", "save"])
def test_intervals_are_at_least_a_step(name):
    with pytest.raises(ValueError, match=f"{name} interval must be at least 1 step, got 0"):
        Intervals(**{name: 0})
