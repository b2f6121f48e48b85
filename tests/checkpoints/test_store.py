"""Checkpoints come back exactly, on any mesh, or say what is wrong."""

import dataclasses
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoints import CheckpointError, Checkpoints, SaveInterval, arrays, model_json, store
from lm.checkpoints.names import flatten, unflatten
from lm.checkpoints.paths import absolute
from lm.model import FeedForward, Stack, param_specs
from lm.train.state import abstract_state
from tests.checkpoints.processes import refuse
from tests.checkpoints.states import (
    ADAM,
    SPECS,
    assert_same_bits,
    every_dtype,
    layout,
    make_state,
    structs,
)
from tests.refuses import refuses
from tests.train.tiny import LAYER, UNTIED


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with one checkpoint, and the state in it."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"))
    state = make_state(layout(fsdp=8), ema=True)
    checkpoints.save(3, state, {"rows": 12, "config": {"name": "tiny"}}, wait=True)
    assert checkpoints.failures() == []
    yield checkpoints, jax.device_get(state)
    checkpoints.close()


@pytest.mark.parametrize(
    "where",
    [
        layout(3, fsdp=8),
        layout(1, fsdp=8),
        layout(data=2, tensor=4),
        layout(2, data=2, fsdp=2, tensor=2),
        layout(),
    ],
    ids=["fsdp8-zero3", "fsdp8-zero1", "data2-tensor4", "data2-fsdp2-tensor2-zero2", "one"],
)
def test_a_state_comes_back_exactly_on_any_mesh(saved, where):
    checkpoints, state = saved
    like = abstract_state(SPECS, ADAM, where, ema=True)
    restored = checkpoints.restore(3, like)
    assert_same_bits(restored, state)
    for x, y in zip(*map(jax.tree.leaves, (restored, like)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_every_dtype_keeps_its_bits(tmp_path, num_devices):
    state = every_dtype(num_devices)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        assert checkpoints.failures() == []
        assert_same_bits(checkpoints.restore(1, structs(state)), state)
        assert_same_bits(checkpoints.restore(1, structs(every_dtype(2))), state)


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda y: y * 2 + 1, x), donate_argnums=0)
    state = {"x": jnp.arange(1 << 22, dtype=jnp.float32), "y": jnp.ones((1 << 20,), jnp.bfloat16)}
    expected = []
    with Checkpoints(tmp_path, local=tmp_path / "local", keep_local=9) as checkpoints:
        for i in range(3):
            expected.append(jax.tree.map(lambda y: np.array(y, copy=True), state))
            checkpoints.save(i, state, {})
            checkpoints.save_local(i, state, {})
            for _ in range(3):
                state = step(state)
        checkpoints.wait()
        for i in range(3):
            assert_same_bits(checkpoints.restore(i, expected[i]), expected[i])
            assert_same_bits(checkpoints.local.read(i, flatten(expected[i]))[0], expected[i])


def test_metadata_and_steps(saved):
    checkpoints, _ = saved
    assert checkpoints.steps() == [3] and checkpoints.latest() == 3
    assert checkpoints.metadata(3) == {"rows": 12, "config": {"name": "tiny"}}
    again = Checkpoints(checkpoints.directory)
    assert again.latest() == 3 and again.metadata(3)["rows"] == 12
    with pytest.raises(TypeError):
        again.save(4, {"x": jnp.zeros(1)}, {"not JSON": object()})
    assert again.latest() == 3


def test_misfits_are_named(saved):
    checkpoints, _ = saved
    wide = dataclasses.replace(LAYER, feed_forward=FeedForward(128, bias=True, gated=False))
    other = dataclasses.replace(UNTIED, stacks=(Stack((wide,), 2),))
    like = abstract_state(param_specs(other), ADAM, layout())
    refuses(
        lambda: checkpoints.restore(3, like),
        "does not fit this model",
        "feed_forward/up_bias is missing",
        "feed_forward/up is float32[2,32,64], the model wants float32[2,32,128]",
        "more. Use the configuration it was written with",
        error=CheckpointError,
    )
    short = abstract_state(SPECS, ADAM, layout(), ema=True)
    short = dataclasses.replace(short, step=jax.ShapeDtypeStruct((), jnp.int8))
    refuses(lambda: checkpoints.restore(3, short), "step is int32[], the model wants int8[]")


def test_optional_parts_may_be_ignored(saved, tmp_path):
    checkpoints, state = saved
    without = abstract_state(SPECS, ADAM, layout())
    words = "is not in this model", "ignore ['ema']"
    refuses(lambda: checkpoints.restore(3, without), *words, error=CheckpointError)
    restored = checkpoints.restore(3, without, ignore=["ema"])
    assert restored.ema is None
    assert_same_bits(restored.trainable, state.trainable)
    wanted = abstract_state(SPECS, ADAM, layout(), ema=True)
    with Checkpoints(tmp_path) as other:
        other.save(1, dataclasses.replace(state, ema=None), {}, wait=True)
        refuses(lambda: other.restore(1, wanted), "ema/embed is missing", "ignore ['ema']")
        partly = other.restore(1, wanted, ignore=["ema"])
    assert partly.ema is wanted.ema or jax.tree.leaves(partly.ema) == jax.tree.leaves(wanted.ema)
    assert_same_bits(partly.opt_state, state.opt_state)


def test_a_step_that_is_not_there(saved):
    checkpoints, _ = saved
    like = abstract_state(SPECS, ADAM, layout())
    for read in (lambda: checkpoints.restore(4, like), lambda: checkpoints.metadata(4)):
        refuses(read, "has no checkpoint of step 4; it has 3", error=CheckpointError)


def fill(checkpoints, steps):
    for step in steps:
        checkpoints.save(step, {"x": jnp.full((2,), step)}, {})
    checkpoints.wait()
    assert checkpoints.failures() == []


LIKE = {"x": jax.ShapeDtypeStruct((2,), jnp.int32)}


def test_the_last_are_kept_and_every_tenth(tmp_path):
    with Checkpoints(tmp_path / "new" / "run", keep=2, keep_every=10) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.restore_last(LIKE) is None
        assert not (tmp_path / "new").exists()
        fill(checkpoints, (1, 10, 15, 20, 25, 27))
        assert checkpoints.steps() == [10, 20, 25, 27]
        np.testing.assert_array_equal(checkpoints.restore(20, LIKE)["x"], [20, 20])
        # A new course from step 20: the old one's later steps neither count nor go, until told.
        fill(checkpoints, (22, 23, 24))
        assert checkpoints.steps() == [10, 20, 23, 24, 25, 27]
        checkpoints.discard_after(24)
        assert checkpoints.steps() == [10, 20, 23, 24]


def test_a_step_of_another_course_is_written_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        fill(checkpoints, (1, 2))
        checkpoints.save(2, {"x": jnp.full((2,), 7)}, {}, wait=True)  # this course's own: kept
        np.testing.assert_array_equal(checkpoints.restore(2, LIKE)["x"], [2, 2])
        checkpoints.restore(1, LIKE)
        checkpoints.save(2, {"x": jnp.full((2,), 7)}, {}, wait=True)
        np.testing.assert_array_equal(checkpoints.restore(2, LIKE)["x"], [7, 7])


@pytest.mark.parametrize("name", ["[1]", "run[lr=3e-4]", "a*b?", "a b, {c}", "50%41#x:y@z"])
def test_any_name_of_a_folder_and_relative_paths(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for directory in (tmp_path / name / "absolute", f"{name}/relative"):
        with Checkpoints(directory, local=f"{directory}.local") as checkpoints:
            fill(checkpoints, (1,))
            checkpoints.save_local(2, {"x": jnp.full((2,), 2)}, {})
        with (
            Checkpoints(directory) as durable,
            Checkpoints(directory, local=f"{directory}.local") as both,
        ):
            np.testing.assert_array_equal(durable.restore_last(LIKE).state["x"], [1, 1])
            np.testing.assert_array_equal(both.restore_last(LIKE).state["x"], [2, 2])


def test_a_save_that_could_not_be_opened_again_has_failed(tmp_path, monkeypatch):
    """As where Orbax finds no parts to join."""
    monkeypatch.setattr(type(absolute(tmp_path)), "glob", lambda *_: iter(()))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)}, {}, wait=True)
        (failure,) = checkpoints.failures()
        assert failure.step == 1 and "manifest.ocdbt" in failure.error
        assert checkpoints.steps() == []


def test_hosts_report_what_a_save_would_wait_for(tmp_path, monkeypatch):
    """Their coming to it, and the end of their part, be it a failure; a failure names the late."""
    points = []
    for module in (store, arrays):
        monkeypatch.setattr(module, "reached", points.append)
    monkeypatch.setattr(store, "waits", lambda point: f"{point} waits for host 1 of 2")
    with Checkpoints(tmp_path) as checkpoints:
        fill(checkpoints, (1,))
        monkeypatch.setattr(arrays.Handler, "_seal", refuse)
        checkpoints.save(2, {"x": jnp.zeros(2)}, {}, wait=True)
        (failure,) = checkpoints.failures()
    assert points == [
        f"{what} of step {step}" for step in (1, 2) for what in ("the save", "the end of the save")
    ]
    assert failure.error.endswith(
        "No space left on device; the end of the save of step 2 waits for host 1 of 2"
    )


def test_an_urgent_save_waits_for_the_one_under_way(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros((1 << 22,))}, {})
        checkpoints.save(2, {"x": jnp.full((2,), 2)}, {}, wait=True)
        assert checkpoints.steps() == [1, 2]
        np.testing.assert_array_equal(checkpoints.restore_last(LIKE).state["x"], [2, 2])


def test_another_version_is_refused_not_passed_over(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        fill(checkpoints, [1])
        monkeypatch.setattr(model_json, "VERSION", 99)
        fill(checkpoints, [2])
        monkeypatch.undo()
        words = "format version 99; this code reads version"
        refuses(lambda: checkpoints.restore_last(LIKE), words, error=CheckpointError)


KILLED = """
import sys, jax.numpy as jnp, numpy as np
from lm.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = {f"x{i}": np.full((1 << 18,), 1.0, np.float32) for i in range(24)}
checkpoints.save(1, state, {}, wait=True)
print("saving", flush=True)
for step in range(2, 1000):
    checkpoints.save(step, {k: v * step for k, v in state.items()}, {})
"""


def test_killed_at_any_moment_the_last_good_one_stays(tmp_path):
    like = {f"x{i}": jax.ShapeDtypeStruct((1 << 18,), jnp.float32) for i in range(24)}
    partial = 0
    for delay in (None, 0.07, 0.17):  # None: as soon as a save is under way
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout.readline() == "saving\n"
            while delay is None and not any("tmp" in path.name for path in tmp_path.iterdir()):
                assert process.poll() is None
            time.sleep(delay or 0)
        finally:
            process.kill()
            process.wait(100)
        partial += any("tmp" in path.name for path in tmp_path.iterdir())
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            restored = checkpoints.restore_last(like)
            assert restored.skipped == () and restored.step == checkpoints.latest()
            assert all((np.asarray(x) == restored.step).all() for x in restored.state.values())
            checkpoints.save(2000, {"x": jnp.zeros(1)}, {}, wait=True)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["2000"]
        shutil.rmtree(tmp_path / "2000")
    assert partial, "no kill hit a save; the test shows nothing"


def test_when_to_save():
    every = SaveInterval(steps=10, minutes=5)
    assert [step for step in range(1, 31) if every.due(step, 0.0, 0.0)] == [10, 20, 30]
    assert every.due(3, 1000.0, 700.0) and not every.due(3, 999.9, 700.0)
    assert not SaveInterval().due(10, 1e9, 0.0)
    with pytest.raises(ValueError, match="minutes=0"):
        SaveInterval(minutes=0)


def test_names_are_paths_and_come_back(saved):
    state = dataclasses.replace(saved[1], ema=None)
    named = flatten(state)
    assert named["trainable/stacks/0/layers/0/attention/query"].shape == (2, 32, 32)
    assert not any(name.startswith(("frozen", "ema")) for name in named)
    back = unflatten(named, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x is y, back, state)))
