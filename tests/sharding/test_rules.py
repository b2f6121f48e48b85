"""Meshes and rules: what each ZeRO stage shards, and what each mistake is told."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lm.sharding import (
    AXES,
    Layout,
    MeshShape,
    check_divides,
    constrain,
    current_layout,
    gather_weight,
    make_mesh,
    make_rules,
    named_sharding,
    partition_spec,
    use_layout,
)


def fake_mesh(**sizes: int) -> types.SimpleNamespace:
    """Sizes alone: rules ask nothing else of a mesh."""
    return types.SimpleNamespace(shape={axis: sizes.get(axis, 1) for axis in AXES})


def test_a_mesh_has_every_axis_of_type_auto():
    mesh = make_mesh(MeshShape(data=2, tensor=-1))
    assert dict(mesh.shape) == {axis: {"data": 2, "tensor": 4}.get(axis, 1) for axis in AXES}
    assert mesh.axis_types == (AxisType.Auto,) * len(AXES)
    assert len(set(mesh.devices.ravel())) == 8


def test_a_small_mesh_takes_the_first_devices():
    mesh = make_mesh(MeshShape(fsdp=2))
    assert mesh.devices.ravel().tolist() == jax.devices()[:2]
    assert make_mesh(MeshShape(), jax.devices()[3:4]).devices.item() == jax.devices()[3]


def test_accelerators_are_not_left_idle(monkeypatch):
    gpus = [types.SimpleNamespace(platform="gpu", id=i) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: gpus)
    with pytest.raises(ValueError, match=r"fsdp=2 needs 2 devices, 8 present; .* one to -1"):
        make_mesh(MeshShape(fsdp=2))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="cpu")] * 8)
    with pytest.raises(ValueError, match="needs 2 devices, 8 present"):
        make_mesh(MeshShape(fsdp=2))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(data=-1, fsdp=-1), "mesh axes 'data' and 'fsdp' are both -1"),
        (MeshShape(tensor=3, data=-1), "fixes 3 devices, which does not divide the 8 present"),
        (MeshShape(tensor=16), "the mesh tensor=16 needs 16 devices, 8 present; change an axis"),
    ],
)
def test_bad_meshes(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_stages_shard_what_they_promise(zero):
    rules = make_rules(zero)
    split = [table.get("embed") == ("fsdp",) for table in (rules.optimizer, rules.gradients)]
    split.append(rules.weights.get("embed") == ("fsdp",))
    assert split == [zero >= 1, zero >= 2, zero >= 3]
    for table in (rules.weights, rules.gradients, rules.optimizer):
        assert table["heads"] == table["ffn"] == table["vocab"] == ("tensor",)
    assert "embed" not in rules.activations
    assert rules.activations["batch"] == ("slice", "data", "fsdp", "expert")


def test_unknown_zero_stage():
    with pytest.raises(ValueError, match="ZeRO stage 4 does not exist; use 0, 1, 2 or 3"):
        make_rules(4)


def test_sequence_parallelism_splits_only_between_blocks():
    plain, split = make_rules().activations, make_rules(sequence_parallel=True).activations
    assert split["residual_sequence"] == ("context", "tensor")
    assert plain["residual_sequence"] == plain["sequence"] == split["sequence"] == ("context",)


def test_partition_spec():
    mesh = fake_mesh(data=2, fsdp=4, tensor=2)
    table = make_rules().activations
    spec = partition_spec(table, ("batch", "sequence", "heads", None), mesh, (16, 5, 4, 3))
    assert spec == PartitionSpec(("data", "fsdp"), None, "tensor", None)
    assert partition_spec(table, ("batch", "unknown"), fake_mesh()) == PartitionSpec(None, None)


def test_partition_spec_errors():
    table = make_rules().weights
    with pytest.raises(
        ValueError,
        match=r"axis 'tensor' would split both 'heads' and 'ffn' of .*; give one of them",
    ):
        partition_spec(table, ("heads", "ffn"), fake_mesh(tensor=2))
    partition_spec(table, ("heads", "ffn"), fake_mesh(fsdp=2))  # 'tensor' is of size 1
    with pytest.raises(ValueError, match=r"mesh axis 'fsdp'=4 does not divide embed=6; use 1, 2"):
        partition_spec(table, ("embed", "heads"), fake_mesh(fsdp=4), (6, 8))


@pytest.mark.parametrize(
    ("axes", "size", "message"),
    [
        ("tensor", 8, "mesh axis 'tensor'=3 does not divide num_heads=8; use 1, 2, 4 or 8"),
        (("data", "tensor"), 1, "axes 'data'=2 x 'tensor'=3 do not divide num_heads=1; use 1"),
        (("fsdp", "tensor"), 5, "mesh axis 'tensor'=3 does not divide num_heads=5; use 1 or 5"),
    ],
)
def test_check_divides_names_the_divisors(axes, size, message):
    mesh = fake_mesh(tensor=3, data=2)
    with pytest.raises(ValueError, match=message):
        check_divides(mesh, axes, "num_heads", size)
    check_divides(mesh, axes, "num_heads", 6 * size)


def test_constrain_follows_the_layout_in_force():
    x = jnp.arange(64.0).reshape(8, 8)
    layout = Layout(make_mesh(MeshShape(data=4, tensor=2)), make_rules())

    def double(x):
        return constrain(2 * x, "batch", "ffn")

    assert current_layout() is None
    assert len(jax.jit(double)(x).devices()) == 1

    def with_layout(x):
        with use_layout(layout):
            assert current_layout() is layout
            return double(x)

    y = jax.jit(with_layout)(x)
    assert current_layout() is None
    wanted = named_sharding(layout.mesh, layout.rules.activations, ("batch", "ffn"))
    assert y.sharding.is_equivalent_to(wanted, 2)
    assert y.addressable_shards[0].data.shape == (2, 4)
    np.testing.assert_array_equal(y, 2 * x)


def shards(x: jax.Array) -> tuple[int, ...]:
    """In how many parts each dimension is split."""
    return tuple(n // k for n, k in zip(x.shape, x.sharding.shard_shape(x.shape), strict=True))


def test_a_weight_is_gathered_over_what_zero_splits_alone():
    """Experts stay on their devices, and dense layers use all batch axes."""
    layout = Layout(make_mesh(MeshShape(fsdp=2, expert=2, tensor=2)), make_rules())
    mesh, rules = layout.mesh, layout.rules
    axes = ("experts", "expert_embed", "ffn")
    at_rest = named_sharding(mesh, rules.weights, axes)
    assert at_rest.spec == PartitionSpec("expert", "fsdp", "tensor")

    def loss(experts, dense, x):
        gathered = gather_weight(experts, *axes), gather_weight(dense, "embed", "ffn")
        x = constrain(x, "batch", None)
        y = jnp.einsum("bd,edf->bf", x, gathered[0]) + x @ gathered[1]
        return jnp.sum(jnp.sin(y)), gathered

    def under_layout(*arrays):
        with use_layout(layout):
            return jax.grad(loss, argnums=(0, 1), has_aux=True)(*arrays)

    arrays = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((4, 8, 16), (8, 16))))
    arrays = (*arrays, jax.random.normal(jax.random.key(9), (8, 8)))
    places = (
        at_rest,
        *(
            named_sharding(mesh, table, a)
            for table, a in (
                (rules.weights, ("embed", "ffn")),
                (rules.activations, ("batch", None)),
            )
        ),
    )
    gradients, gathered = jax.jit(under_layout, in_shardings=places)(*arrays)
    assert [shards(x) for x in gathered] == [(2, 1, 2), (1, 2)]
    assert [shards(x) for x in gradients] == [(2, 2, 2), (2, 2)]
    assert shards(jax.device_put(arrays[2], places[2])) == (4, 1)
    expected, _ = jax.grad(loss, argnums=(0, 1), has_aux=True)(*arrays)
    for x, y in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_dense_weights_may_share_the_axis_of_experts():
    table = make_rules(zero_axes=("fsdp", "expert")).weights
    mesh = fake_mesh(fsdp=2, expert=4)
    assert partition_spec(table, ("embed", "ffn"), mesh) == PartitionSpec(("fsdp", "expert"), None)
    experts = partition_spec(table, ("experts", "expert_embed", "ffn"), mesh)
    assert experts == PartitionSpec("expert", "fsdp", None)


def test_constrain_refuses_what_does_not_divide():
    layout = Layout(make_mesh(MeshShape(tensor=8)), make_rules())
    with use_layout(layout), pytest.raises(ValueError, match="'tensor'=8 does not divide heads=4"):
        constrain(jnp.zeros((2, 4)), "batch", "heads")
