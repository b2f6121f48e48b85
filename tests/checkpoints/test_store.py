"""Checkpoints come back exactly, on any mesh, or say what is wrong."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.checkpoints import store
from lm.checkpoints.store import CheckpointError, Checkpoints, from_names, to_names
from lm.model import FeedForward, Stack, param_specs
from lm.sharding import MeshShape
from lm.train.state import abstract_state, init_state
from tests.train.tiny import LAYER, UNTIED, Case

ADAM = optax.adamw(1e-3)
SPECS = param_specs(UNTIED)
FSDP = Case(MeshShape(fsdp=8), 3).layout


def make_state(layout=FSDP):
    """A state whose every leaf differs."""
    state = init_state(SPECS, ADAM, jax.random.key(7), layout)
    leaves, structure = jax.tree.flatten(state)
    shift = lambda i, x: (x + jnp.asarray(i, x.dtype)).astype(x.dtype)  # noqa: E731
    moved = [jax.device_put(shift(i, x), x.sharding) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with one checkpoint, and the state in it."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"))
    state = make_state()
    checkpoints.save(3, state, {"rows": 12, "config": {"name": "tiny"}})
    yield checkpoints, jax.device_get(state)
    checkpoints.close()


@pytest.mark.parametrize(
    "case",
    [
        Case(MeshShape(fsdp=8), 3),
        Case(MeshShape(fsdp=8), 1),
        Case(MeshShape(data=2, tensor=4)),
        Case(MeshShape(data=2, fsdp=2, tensor=2), 2),
        Case(),
    ],
    ids=str,
)
def test_a_state_comes_back_exactly_on_any_mesh(saved, case):
    checkpoints, state = saved
    like = abstract_state(SPECS, ADAM, case.layout)
    restored = checkpoints.restore(3, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for x, y, z in zip(*map(jax.tree.leaves, (restored, state, like)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == z.dtype
        assert x.sharding.is_equivalent_to(z.sharding, x.ndim)


def test_metadata_and_steps(saved):
    checkpoints, _ = saved
    assert checkpoints.steps() == [3] and checkpoints.latest() == 3
    assert checkpoints.metadata(3) == {"version": 1, "rows": 12, "config": {"name": "tiny"}}
    again = Checkpoints(checkpoints.directory)
    assert again.latest() == 3 and again.metadata(3)["rows"] == 12
    again.close()


def test_misfits_are_named(saved):
    checkpoints, _ = saved
    wide = dataclasses.replace(LAYER, feed_forward=FeedForward(128, bias=True, gated=False))
    other = dataclasses.replace(UNTIED, stacks=(Stack((wide,), 2),))
    like = abstract_state(param_specs(other), optax.sgd(0.1), Case().layout)
    with pytest.raises(CheckpointError, match="does not fit this model") as error:
        checkpoints.restore(3, like)
    for fault in (
        "feed_forward/up_bias is missing",
        "feed_forward/up is [2, 32, 64], the model wants [2, 32, 128]",
        "opt_state/0/count is not in this model",
        "more. Use the configuration it was written with",
    ):
        assert fault in str(error.value)
    narrow = dataclasses.replace(UNTIED, vocab_size=200)
    with pytest.raises(
        CheckpointError, match=r"trainable/embed is \[512, 32\], the model wants \[256, 32\]"
    ):
        checkpoints.restore(3, abstract_state(param_specs(narrow), ADAM, Case().layout))


def test_a_step_that_is_not_there(saved):
    checkpoints, _ = saved
    like = abstract_state(SPECS, ADAM, Case().layout)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 4; it has 3"):
        checkpoints.restore(4, like)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 4"):
        checkpoints.metadata(4)


def test_only_the_last_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "run", keep=2)
    assert checkpoints.latest() is None and checkpoints.steps() == []
    for step in (1, 5, 9):
        checkpoints.save(step, {"x": jnp.full((2,), step)}, {})
    assert checkpoints.steps() == [5, 9]
    restored = checkpoints.restore(5, {"x": jax.ShapeDtypeStruct((2,), jnp.int32)})
    np.testing.assert_array_equal(restored["x"], [5, 5])
    checkpoints.close()


def test_another_version_is_refused(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(store, "VERSION", 99)
    checkpoints.save(1, {"x": jnp.zeros(2)}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format version 99; this code reads version 1"):
        checkpoints.metadata(1)
    checkpoints.close()


def test_a_save_cut_short_is_no_checkpoint(saved, tmp_path):
    checkpoints, _ = saved
    shutil.copytree(checkpoints.directory / "3", tmp_path / "3")
    shutil.copytree(checkpoints.directory / "3", tmp_path / "7.orbax-checkpoint-tmp")
    other = Checkpoints(tmp_path)
    assert other.steps() == [3] and other.latest() == 3
    other.close()


def test_names_are_paths_and_come_back():
    state = jax.device_get(make_state(Case().layout))
    named = to_names(state)
    assert named["trainable"]["stacks"]["0"]["layers"]["0"]["attention"]["query"].shape == (
        2,
        32,
        32,
    )
    assert "frozen" not in named  # nothing is frozen, nothing is stored
    back = from_names(named, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x is y, back, state)))
