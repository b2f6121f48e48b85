"""The state: what trains, and how many bytes of it a device holds under each ZeRO stage."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.model import param_specs
from lm.sharding import MeshShape
from lm.train.optimizers import Muon, make_optimizer
from lm.train.state import (
    abstract_state,
    bytes_per_device,
    init_state,
    merge,
    partition,
    state_shardings,
)
from lm.weights import ParamSpec, is_spec, path_name
from tests.train.hlo import loop_carries
from tests.train.tiny import UNTIED, Case, compiled_step

SPECS = param_specs(UNTIED)
ADAM = optax.adamw(1e-3)


def num_bytes(tree, wanted) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(x.nbytes for path, x in leaves if wanted(path_name(path)))


def is_norm(path: str) -> bool:
    return path.endswith("scale")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_divides_the_bytes_of_each_device(zero):
    layout = Case(MeshShape(fsdp=8), zero).layout
    state = init_state(SPECS, ADAM, jax.random.key(0), layout, ema=True)
    norms = num_bytes(state.params, is_norm)
    weights = num_bytes(state.params, lambda path: not is_norm(path))
    assert 0 < norms < 0.02 * weights
    held = bytes_per_device(state.params)
    # Norms are replicated at every stage; every other weight is split evenly, or not at all.
    assert set(held.values()) == {norms + (weights // 8 if zero == 3 else weights)}
    assert len(held) == 8
    held = bytes_per_device(state.opt_state)
    count = 4
    parts = 8 if zero >= 1 else 1
    assert set(held.values()) == {2 * (norms + weights // parts) + count}
    assert set(bytes_per_device(state.ema).values()) == {norms + weights // parts}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_step_keeps_the_bytes(zero):
    """What comes out of the compiled step lies as what went in."""
    compiled = compiled_step(Case(MeshShape(fsdp=8), zero))
    inputs, outputs = compiled.input_shardings[0][0], compiled.output_shardings[0]
    shapes = abstract_state(SPECS, optax.identity(), Case().layout).trainable
    for x, a, b in zip(
        *map(jax.tree.leaves, (shapes, inputs.trainable, outputs.trainable)), strict=True
    ):
        assert a.is_equivalent_to(b, len(x.shape))
        assert a.shard_shape(x.shape) == b.shard_shape(x.shape)


def test_zero_2_accumulates_an_eighth_of_the_gradients():
    """The loop over micro-batches carries the sum of gradients: whole, or a part under ZeRO-2.

    XLA gives ZeRO-1's accumulator, about which the rules say nothing, the optimizer's sharding.
    """
    carried = {}
    for zero in (0, 1, 2):
        compiled = compiled_step(Case(MeshShape(fsdp=8), zero, num_micro_batches=2))
        (carried[zero],) = loop_carries(compiled.as_text())
    shapes = abstract_state(SPECS, optax.identity(), Case().layout).trainable
    matrices = sum(4 * x.size for x in jax.tree.leaves(shapes)) - 5 * 4 * UNTIED.embed_dim
    # Loops also carry scalars, one more or less.
    assert abs(carried[0] - carried[2] - matrices * 7 // 8) <= 64
    assert carried[2] <= carried[1] <= carried[0]


def test_muon_state_lies_as_the_weights_do():
    layout = Case(MeshShape(fsdp=4, tensor=2)).layout
    optimizer = make_optimizer(Muon())
    shardings = state_shardings(SPECS, optimizer, layout)
    weights = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(shardings.trainable)}
    state = jax.tree_util.tree_leaves_with_path(shardings.opt_state)
    matched = [
        (weights[name], s)
        for path, s in state
        for name in weights
        if ("/" + path_name(path)).endswith("/" + name)
    ]
    # One momentum for each of 7 matrices; two moments for embedding, output and 3 norms.
    assert len(matched) == 7 + 2 * 5
    assert all(a.spec == b.spec for a, b in matched)


def test_an_optimizer_may_say_how_its_state_lies():
    """Sums over rows have no weight's shape: left to itself, such a state is replicated."""

    class RowSums(optax.GradientTransformation):
        def specs(self, specs):
            return jax.tree.map(
                lambda s: ParamSpec(s.shape[:-1], s.axes[:-1]), specs, is_leaf=is_spec
            )

    init = lambda params: jax.tree.map(lambda x: jnp.zeros(x.shape[:-1]), params)  # noqa: E731
    update = lambda updates, state, params=None: (updates, state)  # noqa: E731
    layout = Case(MeshShape(fsdp=4, tensor=2)).layout
    state = state_shardings(SPECS, RowSums(init, update), layout)
    for sums, weight, spec in zip(
        *map(jax.tree.leaves, (state.opt_state, state.trainable, SPECS)), strict=True
    ):
        axes = (*weight.spec, *(None,) * (len(spec.shape) - len(weight.spec)))[:-1]
        expected = NamedSharding(layout.mesh, PartitionSpec(*axes))
        assert sums.is_equivalent_to(expected, len(spec.shape) - 1)
    assert sum(not x.is_fully_replicated for x in jax.tree.leaves(state.opt_state)) >= 7
    plain = state_shardings(SPECS, optax.GradientTransformation(init, update), layout)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(plain.opt_state))


def test_abstract_state_is_the_state():
    layout = Case(MeshShape(fsdp=8), 2).layout
    parts = {"ema": True, "health": True}
    state = init_state(SPECS, ADAM, jax.random.key(0), layout, **parts)
    expected = abstract_state(SPECS, ADAM, layout, **parts)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)


def test_initial_weights_do_not_depend_on_the_mesh():
    cases = Case(), Case(MeshShape(data=2, fsdp=2, tensor=2))
    one, many = (init_state(SPECS, ADAM, jax.random.key(1), case.layout) for case in cases)
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_partition_and_merge_are_inverse():
    params = init_state(SPECS, optax.identity(), jax.random.key(0), Case().layout).params
    trainable, frozen = partition(params, lambda path: "attention" in path)
    assert trainable.embed is None and frozen.stacks[0].layers[0].attention.query is None
    count = len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen))
    assert count == len(jax.tree.leaves(params))
    merged = merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x is y, merged, params)))


def test_a_mesh_that_does_not_divide_names_weight_and_axis():
    with pytest.raises(ValueError, match=r"embed \[512, 32\].*'fsdp'=3 does not divide embed=32"):
        state_shardings(SPECS, ADAM, Case(MeshShape(fsdp=3)).layout)


def test_bytes_per_device_counts_replicas():
    x = jax.device_put(jnp.zeros((8, 2)), Case(MeshShape(data=8)).layout.mesh.devices.ravel()[3])
    assert bytes_per_device({"x": x, "y": None}) == {3: 64}
