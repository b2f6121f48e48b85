"""QLoRA (arXiv:2305.14314) through the training step: adapters train over a four-bit base."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lm.adapters import add_lora, count, linear_layers, trains
from lm.checkpoints import Checkpoints, Reference
from lm.checkpoints.opening import model_of
from lm.model import Attention, FeedForward, Layer, ModelConfig, Stack, param_specs
from lm.sharding import Layout, MeshShape, make_mesh, make_rules
from lm.train.accumulation import Accumulation
from lm.train.optimizers import AdamW, make_optimizer
from lm.train.state import bytes_per_device, state_of
from lm.train.step import make_train_step
from lm.weights import NF4, initialize, path_name, specs_of
from tests.train.tiny import OBJECTIVE, make_batch

D, RANK, LAYERS, STEPS = 256, 4, 2, 4
CONFIG = ModelConfig(500, D, (Stack((Layer(Attention(4, 4, 64), FeedForward(D)),), LAYERS),))
OPTIMIZER = make_optimizer(AdamW())
KEY = jax.random.key(0)
MATRICES = 7 * LAYERS * D * D


@functools.cache
def host_model():
    """Every matrix of every layer in NF4 with double quantization, with an adapter."""

    def make():
        params = initialize(param_specs(CONFIG), KEY)
        params = jax.tree_util.tree_map_with_path(
            lambda path, w: NF4.quantize(w) if linear_layers(CONFIG)(path_name(path)) else w, params
        )
        return add_lora(params, CONFIG, KEY, rank=RANK)

    return jax.device_get(jax.jit(make)())


@functools.cache
def training(**axes: int):
    """A step, and a function that makes the state before the first."""
    devices = jax.devices()[: math.prod(axes.values())]
    layout = Layout(make_mesh(MeshShape(**axes), devices), make_rules())
    specs = specs_of(host_model(), param_specs(CONFIG))
    gradient = Accumulation(CONFIG, num_micro_batches=2, specs=specs)
    step = make_train_step(OBJECTIVE, OPTIMIZER, lambda step: 1e-2, layout, gradient, trains=trains)
    return step, lambda: state_of(host_model(), specs, OPTIMIZER, layout, trains)


def train(step, state, steps, batch):
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def sharded():
    """(losses, the state after them) on fsdp 4 x tensor 2."""
    step, begin = training(fsdp=4, tensor=2)
    state, losses = train(step, begin(), STEPS, make_batch())
    return losses, state


def test_adapters_alone_train(sharded):
    losses, state = sharded
    assert losses[-1] < losses[0] - 0.05
    _, begin = training(fsdp=4, tensor=2)
    first = begin()
    assert_same_bits(jax.device_get(state.frozen), jax.device_get(first.frozen))
    for x, y in zip(*map(jax.tree.leaves, (state.trainable, first.trainable)), strict=True):
        assert x.sharding == y.sharding
        assert bool(jnp.any(x != y))


def test_as_on_one_device(sharded):
    losses, state = sharded
    step, begin = training(fsdp=1)
    alone, expected = train(step, begin(), STEPS, make_batch())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for x, y in zip(*map(jax.tree.leaves, (state.trainable, alone.trainable)), strict=True):
        # Adam's first steps are as large for a tiny gradient as for a large one.
        assert np.mean(np.abs(np.asarray(x) - np.asarray(y)) > 1e-3) < 0.01


def test_memory(sharded):
    """4.127 bits a weight of the base; 4 bytes, and 8 of AdamW, for each that trains."""
    _, state = sharded
    trainable = 7 * LAYERS * 2 * D * RANK
    assert count(state.params) == trainable
    base = MATRICES // 2 + MATRICES // 64 + 4 * (MATRICES // 64 // 256 + 7 * LAYERS)
    others = 4 * (2 * CONFIG.padded_vocab_size * D + (2 * LAYERS + 1) * D + 7 * LAYERS)
    assert sum(x.nbytes for x in jax.tree.leaves(state.frozen)) == base + others
    assert base * 8 / MATRICES == pytest.approx(4.127, abs=2e-3)
    assert sum(x.nbytes for x in jax.tree.leaves(state.trainable)) == 4 * trainable
    assert sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) == 8 * trainable + 4
    # What has no dimension to be split: scales of scales, offsets, factors, norms, counters.
    whole = 4 * (MATRICES // 64 // 256 + 14 * LAYERS + (2 * LAYERS + 1) * D) + 8
    exact = (base + others + 12 * trainable) / 8
    for held in bytes_per_device(state).values():
        # The rank is on every device: a is split by `in` alone, b by `out` alone.
        assert exact <= held <= exact + whole + 12 * trainable / 2


def test_a_checkpoint_refers_to_the_base(sharded, tmp_path):
    """It holds what trains, and resumes bit for bit."""
    _, ended = sharded
    step, begin = training(fsdp=4, tensor=2)
    with Checkpoints(tmp_path / "base", config=CONFIG) as checkpoints:
        checkpoints.save(0, begin(), {}, wait=True)
    half, _ = train(step, begin(), STEPS // 2, make_batch())
    base = Reference.of("../../base/0", half.frozen)
    with Checkpoints(tmp_path / "run", config=CONFIG) as checkpoints:
        checkpoints.save(STEPS // 2, half, {}, frozen=base, wait=True)
        assert not checkpoints.failures()
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half
        )
        restored = checkpoints.restore_last(like).state
    stored = model_of(epath.Path(tmp_path / "run" / str(STEPS // 2))).arrays
    roots = {name.split("/")[0] for name in stored}
    assert {"trainable", "opt_state"} <= roots and "frozen" not in roots
    resumed, _ = train(step, restored, STEPS - STEPS // 2, make_batch())
    assert_same_bits(jax.device_get(resumed), jax.device_get(ended))
