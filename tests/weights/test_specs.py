"""Every tree that follows from the specs agrees with every other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from lm.weights import (
    Int8,
    ParamSpec,
    abstract,
    cast,
    count,
    gather,
    initialize,
    path_name,
    shard_like,
    shardings,
)

SPECS = {
    "up": ParamSpec((2, 8, 12), ("layers", "embed", "ffn"), scale=0.5),
    "gate": ParamSpec((2, 8, 12), ("layers", "embed", "ffn"), scale=0.5),
    "norm": ParamSpec((8,), ("norm",), "ones"),
    "inner": ({"bias": ParamSpec((12,), ("ffn",), "zeros")}, None),
}
RULES = make_rules()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshShape(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def weights():
    return initialize(SPECS, jax.random.key(0))


def test_abstract_initialize_and_shardings_agree(mesh, weights):
    described = abstract(SPECS, RULES, mesh)
    placed_at = shardings(SPECS, RULES, mesh)
    placed = jax.jit(lambda key: initialize(SPECS, key), out_shardings=placed_at)(jax.random.key(0))
    for tree in (described, placed_at, placed, abstract(SPECS)):
        assert jax.tree.structure(tree) == jax.tree.structure(weights)
    for wanted, array, alone in zip(
        *map(jax.tree.leaves, (described, placed, weights)), strict=True
    ):
        assert (
            (wanted.shape, wanted.dtype) == (array.shape, array.dtype) == (alone.shape, alone.dtype)
        )
        assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim)
        np.testing.assert_allclose(array, alone, rtol=1e-6)
    assert placed["up"].addressable_shards[0].data.shape == (2, 4, 6)
    assert count(SPECS) == sum(array.size for array in jax.tree.leaves(weights))


def test_initial_distributions(weights):
    assert np.all(weights["norm"] == 1)
    assert not weights["inner"][0]["bias"].any()
    assert 0.4 < float(jnp.std(weights["up"])) < 0.6
    assert not np.allclose(weights["up"], weights["gate"])


def test_another_weight_changes_none(weights):
    more = {"added": SPECS["up"], "up_bias": SPECS["norm"], **SPECS}
    again = initialize(more, jax.random.key(0))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(jnp.all(a == b)), {k: again[k] for k in SPECS}, weights)
    )
    other = initialize(SPECS, jax.random.key(1))
    assert not np.allclose(other["up"], weights["up"])


def test_shardings_name_the_weight():
    mesh = make_mesh(MeshShape(tensor=8))
    with pytest.raises(
        ValueError, match=r"gate \[2, 8, 12\]: mesh axis 'tensor'=8 does not divide"
    ):
        shardings(SPECS, RULES, mesh)


def test_specs_must_name_every_dimension():
    with pytest.raises(ValueError, match="differ in length"):
        ParamSpec((2, 3), ("embed",))


def test_path_names(weights):
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    assert names == ["gate", "inner/0/bias", "norm", "up"]


def test_cast_leaves_formats_alone(weights):
    leaf = Int8.quantize(weights["up"])
    tree = cast({"a": weights["norm"], "b": leaf, "c": jnp.arange(3)}, jnp.bfloat16)
    assert tree["a"].dtype == jnp.bfloat16
    assert (tree["b"].values.dtype, tree["b"].scale.dtype) == (jnp.int8, jnp.float32)
    assert tree["c"].dtype == jnp.int32


def test_a_leaf_is_sharded_as_it_says(mesh, weights):
    tree = {**weights, "up": Int8.quantize(weights["up"])}
    placed = jax.device_put(tree, shardings(SPECS, RULES, mesh, tree))
    assert placed["up"].values.addressable_shards[0].data.shape == (2, 4, 6)
    assert placed["up"].scale.addressable_shards[0].data.shape == (2, 1, 6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gather_shards_weights_and_gradients_as_the_rules_say(mesh, weights, zero):
    """Used over `tensor` alone, gradients as their table says; the value is not touched."""
    rules = make_rules(zero)
    assert gather(weights, SPECS) is weights

    def loss(tree):
        used = gather(tree, SPECS)
        return jnp.sum(jnp.square(used["up"])), used

    def step(tree):
        with use_layout(Layout(mesh, rules)):
            (_, used), gradients = jax.value_and_grad(loss, has_aux=True)(tree)
            return used["up"], gradients["up"], shard_like(gradients, SPECS, "optimizer")["up"]

    placed = jax.device_put(weights, shardings(SPECS, rules, mesh))
    used, gradient, for_optimizer = jax.jit(step)(placed)
    np.testing.assert_array_equal(used, weights["up"])
    np.testing.assert_allclose(gradient, 2 * weights["up"], rtol=1e-6)

    def shard(array):
        return array.addressable_shards[0].data.shape

    assert shard(placed["up"]) == (2, 4 if zero >= 3 else 8, 6)
    assert shard(used) == (2, 8, 6)
    assert shard(gradient) == (2, 4 if zero >= 2 else 8, 6)
    assert shard(for_optimizer) == (2, 4 if zero >= 1 else 8, 6)
