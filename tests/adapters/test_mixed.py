"""A model whose every matrix is of another format, with LoRA over it: trained, saved, served."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.adapters import add_lora, count, linear_layers, merge, remove, trains
from lm.checkpoints import Checkpoints, open_checkpoint
from lm.infer.generate import LocalSampler
from lm.infer.requests import Request
from lm.model import (
    Attention,
    FeedForward,
    Layer,
    ModelConfig,
    Stack,
    Tokens,
    forward,
    param_specs,
    unstack,
)  # fmt: skip
from lm.model.params import specs_for
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from lm.train.accumulation import Accumulation
from lm.train.state import TrainState, partition, state_shardings
from lm.weights import (
    NF4,
    Fp8,
    Int4,
    Int8,
    Int8Groups,
    LoRA,
    StructuredWeight,
    initialize,
    path_name,
    specs_of,
)  # fmt: skip
from tests.train.tiny import OBJECTIVE, make_batch

CONFIG = ModelConfig(500, 128, (Stack((Layer(Attention(4, 4, 32), FeedForward(128)),), 2),))
KEY = jax.random.key(0)
OPTIMIZER = optax.adam(1e-2)


def grouped(weight):
    """int8 in groups of 32."""
    parts = weight.reshape(*weight.shape[:-2], -1, 32, weight.shape[-1])
    scale = jnp.max(jnp.abs(parts), -2) / 127
    codes = jnp.round(parts / scale[..., None, :]) + 128
    return Int8Groups.encode(codes.reshape(weight.shape).astype(jnp.uint8), scale)


FORMATS = {
    "query": lambda w: Int4.quantize(w, 32, symmetric=False),
    "key": NF4.quantize,
    "value": Int8.quantize,
    "out": Fp8.quantize,
    "up": lambda w: NF4.quantize(w, double=False),
    "gate": grouped,
    "output": lambda w: Int4.quantize(w, 64),
}


def mixed():
    """Each matrix in a format of its own, but for `down`; adapters with noise on all of them."""

    def leaf(path, weight):
        return FORMATS.get(path_name(path).rsplit("/", 1)[-1], lambda w: w)(weight)

    params = jax.tree_util.tree_map_with_path(leaf, initialize(param_specs(CONFIG), KEY))
    params = add_lora(params, CONFIG, KEY, rank=4, targets=lambda p: not re.search("key|up", p)
                      and linear_layers(CONFIG)(p), dora=True)  # fmt: skip
    params = add_lora(params, CONFIG, KEY, rank=2, targets=lambda p: re.search("key", p))
    noise = iter(range(1000))

    def move(path, x):
        shake = 0.05 * jax.random.normal(jax.random.key(next(noise)), x.shape)
        return x + shake if path_name(path).endswith("/b") else x

    return jax.tree_util.tree_map_with_path(move, params)


@functools.cache
def model(form: str):
    return jax.jit(mixed)() if form == "stacked" else unstack(model("stacked"))


def layout(**axes: int) -> Layout:
    return Layout(make_mesh(MeshShape(**axes)), make_rules())


def placed(params, where: Layout):
    specs = specs_of(params, specs_for(params, CONFIG))
    wanted = state_shardings(specs, OPTIMIZER, where, trains)
    trainable, frozen = partition(params, trains)
    step = jnp.zeros((), jnp.int32)
    state = TrainState(step, trainable, frozen, OPTIMIZER.init(trainable))
    return jax.device_put(state, wanted), wanted


def generate(params) -> list[tuple[int, ...]]:
    sampler = LocalSampler(params, CONFIG, max_length=32)
    requests = [Request(prompt=p, max_new_tokens=12, temperature=0.0) for p in ((5, 9, 2), (77,))]
    return [sample.token_ids for sample in sampler.sample(requests)]


@pytest.mark.parametrize("form", [pytest.param("stacked", marks=pytest.mark.slow), "unstacked"])
def test_saved_on_two_devices_served_from_four(form, tmp_path):
    params = model(form)
    expected = generate(params)
    state, _ = placed(params, layout(tensor=2))
    query = state.frozen.stacks[0].layers[0].attention.query
    assert isinstance(query, LoRA) and isinstance(query.base, Int4) and query.a is None
    assert query.base.values.addressable_shards[0].data.shape[-1] == 64
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(3, state, {}, wait=True)
        assert not checkpoints.failures()
        four, wanted = placed(params, layout(fsdp=2, tensor=2))
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), four, wanted
        )
        restored = checkpoints.restore(3, like)
    for where in (None, layout(fsdp=2, tensor=2)):
        opened, config = open_checkpoint(tmp_path, where)
        assert config == CONFIG
        assert jax.tree.structure(opened) == jax.tree.structure(params)
        for x, y in zip(jax.tree.leaves(opened), jax.tree.leaves(params), strict=True):
            assert x.dtype == y.dtype and bool(jnp.all(x == y))
        assert generate(opened) == expected
    for x, y in zip(jax.tree.leaves(restored.params), jax.tree.leaves(opened), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim) and bool(jnp.all(x == y))
    assert len(x.sharding.device_set) == 4


@pytest.mark.slow
def test_a_step_over_every_format():
    """Sharded four ways: the adapters' gradients are those of the dense model beneath them."""
    params, where = model("stacked"), layout(fsdp=2, tensor=2)
    gradient, batch = Accumulation(CONFIG), make_batch(num_rows=8)
    is_base = lambda x: isinstance(x, StructuredWeight) and not isinstance(x, LoRA)  # noqa: E731
    dense = jax.tree.map(
        lambda w: w.dequantize(jnp.float32) if is_base(w) else w, params, is_leaf=is_base
    )
    trainable, frozen = partition(dense, trains)
    expected, terms, _ = jax.jit(functools.partial(gradient, OBJECTIVE))(
        trainable, frozen, batch, KEY
    )
    state, wanted = placed(params, where)

    def step(state, batch):
        with use_layout(where):
            found = gradient(OBJECTIVE, state.trainable, state.frozen, batch, KEY)
        updates, opt_state = OPTIMIZER.update(found[0], state.opt_state)
        train = optax.apply_updates(state.trainable, updates)
        return dataclasses.replace(state, trainable=train, opt_state=opt_state), found

    after, (found, same, _) = jax.jit(step, out_shardings=(wanted, None))(state, batch)
    np.testing.assert_allclose(same["loss"].sum, terms["loss"].sum, rtol=1e-5)
    assert sum(x.size for x in jax.tree.leaves(found)) == count(params)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())
        assert np.abs(y).max() > 0
    for x, y in zip(*map(jax.tree.leaves, (after.frozen, state.frozen)), strict=True):
        assert x.dtype == y.dtype and bool(jnp.all(x == y))
    for x, y in zip(*map(jax.tree.leaves, (after.trainable, state.trainable)), strict=True):
        assert bool(jnp.all(x != y) if x.ndim > 1 else jnp.any(x != y))


def test_merging_every_format():
    ids = jnp.arange(14).reshape(2, 7)
    run = jax.jit(lambda p: forward(p, Tokens.of(ids), CONFIG).hidden)
    params = model("stacked")
    assert jnp.abs(run(remove(params)) - run(params)).max() > 0.1
    np.testing.assert_allclose(run(merge(params)), run(params), rtol=0, atol=1e-4)
