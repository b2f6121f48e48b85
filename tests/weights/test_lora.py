"""Adapters over arrays and leaves: equal to their merged matrices, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from lm.weights import (
    Int8,
    LoRA,
    MultiLoRA,
    ParamSpec,
    abstract,
    bind,
    cast,
    gather,
    grouped_linear,
    linear,
    shardings,
    specs_of,
    take,
    unembed,
)

AXES = ("layers", "embed", "heads")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASES = {"array": jnp.asarray, "int8": lambda w: Int8.quantize(jnp.asarray(w))}


def adapted(base, *stack: int, rank: int = 3, dora: bool = False, seed: int = 1) -> LoRA:
    a = jnp.asarray(noise(*stack, base.shape[-2], rank, seed=seed))
    b = jnp.asarray(noise(*stack, rank, base.shape[-1], seed=seed + 1))
    scale = jnp.asarray(np.linspace(0.5, 2.0, int(np.prod(stack)), dtype=np.float32).reshape(stack))
    length = jnp.asarray(1 + noise(*stack, base.shape[-1], seed=seed + 2) ** 2) if dora else None
    return LoRA(base, a, b, scale, length)


def merged(leaf: LoRA) -> np.ndarray:
    """W + s a b in float64, its columns of DoRA's length."""
    base = leaf.base if isinstance(leaf.base, jax.Array) else leaf.base.dequantize(jnp.float32)
    a, b, scale = (np.asarray(x, np.float64) for x in (leaf.a, leaf.b, leaf.scale))
    total = np.asarray(base, np.float64) + scale[..., None, None] * (a @ b)
    if leaf.magnitude is None:
        return total
    lengths = np.sqrt((total**2).sum(-2, keepdims=True))
    return np.asarray(leaf.magnitude)[..., None, :] * total / lengths


@pytest.fixture(params=[(kind, dora) for kind in BASES for dora in (False, True)], ids=str)
def make(request):
    """(shape) -> an adapted weight of that shape."""
    kind, dora = request.param

    def build(*shape: int) -> LoRA:
        return adapted(BASES[kind](noise(*shape, seed=9)), *shape[:-2], dora=dora)

    return build


def test_the_four_functions_are_those_of_the_merged_matrix(make):
    square, table = make(6, 4), make(9, 4)
    x = noise(3, 5, 6)
    np.testing.assert_allclose(linear(x, square), x @ merged(square), rtol=1e-4, atol=1e-4)
    ids = jnp.array([[0, 8], [3, 3]])
    np.testing.assert_allclose(
        take(table, ids, jnp.float32), merged(table)[np.asarray(ids)], rtol=1e-5, atol=1e-5
    )
    for transposed, weight, width in ((False, square, 6), (True, table, 4)):
        matrix = merged(weight).T if transposed else merged(weight)
        x = noise(2, 3, width)
        np.testing.assert_allclose(unembed(x, weight, transposed), x @ matrix, rtol=1e-4, atol=1e-4)
        half = unembed(jnp.asarray(x, jnp.bfloat16), weight, transposed)
        assert half.dtype == jnp.float32
    np.testing.assert_allclose(square.dequantize(jnp.float32), merged(square), rtol=1e-5, atol=1e-5)
    assert square.shape == (6, 4)
    assert linear(jnp.asarray(x, jnp.bfloat16), make(4, 4)).dtype == jnp.bfloat16
    assert take(table, ids, jnp.bfloat16).dtype == jnp.bfloat16


def test_experts_have_their_own(make):
    experts, x = make(3, 6, 4), noise(7, 6)
    y = grouped_linear(jnp.asarray(x), experts, jnp.array([4, 0, 3], jnp.int32))
    matrices = merged(experts)
    expected = np.concatenate([x[:4] @ matrices[0], x[4:] @ matrices[2]])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        linear(jnp.asarray(x), experts.layer(1)), x @ matrices[1], rtol=1e-4, atol=1e-4
    )


def test_gradients_follow_the_chain_rule():
    """With G = dL/dW' : da = s G b^T and db = s a^T G."""
    leaf, x, dy = adapted(jnp.asarray(noise(6, 4))), noise(5, 6, seed=3), noise(5, 4, seed=4)
    gradient = jax.grad(lambda w: jnp.sum(linear(x, w) * dy))(leaf)
    G, s = x.T @ dy, float(leaf.scale)
    np.testing.assert_allclose(gradient.a, s * G @ np.asarray(leaf.b).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient.b, s * np.asarray(leaf.a).T @ G, rtol=1e-4, atol=1e-4)


def test_dora_lengths_get_no_gradient():
    """Section 4.3: W' = m V / C with C a constant, so dm = sum(G V) / C and dV = m G / C."""
    leaf = adapted(jnp.asarray(noise(6, 4)), dora=True)
    x, dy = noise(5, 6, seed=3), noise(5, 4, seed=4)
    gradient = jax.grad(lambda w: jnp.sum(linear(x, w) * dy))(leaf)
    m, s, a, b = (np.asarray(v) for v in (leaf.magnitude, leaf.scale, leaf.a, leaf.b))
    V, G = np.asarray(leaf.base) + s * a @ b, x.T @ dy
    C = np.linalg.norm(V, axis=0)
    np.testing.assert_allclose(gradient.magnitude, (G * V).sum(0) / C, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient.a, s * (G * m / C) @ b.T, rtol=1e-4, atol=1e-4)


def test_columns_of_zeros_stay_zeros():
    """The padding of a vocabulary."""
    leaf = adapted(jnp.zeros((6, 4)), dora=True).replace(b=jnp.zeros((3, 4)))
    assert not np.any(linear(noise(5, 6), leaf)) and not np.any(leaf.dequantize(jnp.float32))


def several(kind: str, *shape: int) -> MultiLoRA:
    one, two = (adapted(BASES[kind](noise(*shape)), *shape[:-2], seed=s) for s in (1, 5))
    join = lambda name, axis: jnp.stack([getattr(w, name) for w in (one, two)], axis)  # noqa: E731
    return MultiLoRA(one.base, join("a", -3), join("b", -3), join("scale", -1))


@pytest.mark.parametrize("kind", BASES)
def test_rows_have_their_own_adapter(kind):
    """Each row is what it is alone, with the one adapter or with none."""
    leaf, rows = several(kind, 6, 6), jnp.array([1, -1, 0, 1])
    bound = bind({"w": leaf}, rows)["w"]
    x, ids = jnp.asarray(noise(4, 5, 6)), jnp.arange(8).reshape(4, 2) % 6
    for i, row in enumerate(rows):
        alone = leaf.base if row < 0 else leaf.select(int(row))
        for y, expected in (
            (linear(x, bound), linear(x[i], alone)),
            (linear(x[:, 0], bound), linear(x[i, 0], alone)),
            (take(bound, ids, jnp.float32), take(alone, ids[i], jnp.float32)),
            (unembed(x, bound, False), unembed(x[i], alone, False)),
            (unembed(x, bound, True), unembed(x[i], alone, True)),
        ):
            np.testing.assert_allclose(y[i], expected, rtol=1e-5, atol=1e-5)


def test_rows_of_stacked_layers():
    """Through a scan, rematerialized, compiled, and differentiated."""
    leaf, rows = several("array", 3, 6, 6), jnp.array([1, -1, 0])
    x = jnp.asarray(noise(3, 2, 6))

    def run(leaf, x, rows):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(linear(x, w)), None))
        return jax.lax.scan(body, x, bind(leaf, rows))[0]

    y = jax.jit(run)(leaf, x, rows)
    for i, row in enumerate(rows):
        alone = x[i]
        for layer in range(3):
            own = leaf.layer(layer)
            alone = jnp.tanh(linear(alone, own.base if row < 0 else own.select(int(row))))
        np.testing.assert_allclose(y[i], alone, rtol=1e-5, atol=1e-5)
    only = jnp.array([-1, -1, 0])
    gradient = jax.grad(lambda w: jnp.sum(run(w, x, only)), allow_int=True)(leaf)
    assert np.all(np.any(np.asarray(gradient.b[:, 0]), axis=(1, 2)))
    assert not np.any(gradient.a[:, 1]) and not np.any(gradient.b[:, 1])


def test_what_rows_cannot_do():
    leaf, x = several("array", 6, 4), jnp.asarray(noise(3, 2, 6))
    with pytest.raises(ValueError, match=r"use lm\.weights\.bind first"):
        linear(x, leaf)
    with pytest.raises(ValueError, match=r"bound to rows \[2\], the batch is \[3, 2\]"):
        linear(x, bind(leaf, jnp.array([0, 1])))
    with pytest.raises(ValueError, match="select an adapter first"):
        leaf.dequantize(jnp.float32)
    with pytest.raises(ValueError, match="adapter 2 of 2"):
        leaf.select(2)


@pytest.mark.parametrize("kind", BASES)
def test_parts_lie_by_the_axes_of_their_sides(kind):
    mesh, rules = make_mesh(MeshShape(fsdp=2, tensor=2)), make_rules()
    spec = ParamSpec((3, 6, 4), AXES)
    for leaf in (adapted(BASES[kind](noise(3, 6, 4)), 3, dora=True), several(kind, 3, 6, 4)):
        tree = {"w": leaf}
        specs = specs_of(tree, {"w": spec})
        wanted = shardings(specs, rules, mesh)
        assert jax.tree.structure(wanted) == jax.tree.structure(tree)
        assert wanted == shardings({"w": spec}, rules, mesh, tree)
        described = abstract(specs, rules, mesh)
        for x, y, where in zip(*map(jax.tree.leaves, (described, tree, wanted)), strict=True):
            assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, where)
        placed = jax.device_put(tree, wanted)["w"]
        assert placed.a.addressable_shards[0].data.shape == (*leaf.a.shape[:-2], 3, 3)
        assert placed.b.addressable_shards[0].data.shape == (*leaf.b.shape[:-2], 3, 2)
        x = jnp.asarray(noise(4, 6))

        def apply(leaf, x, spec=spec):
            with use_layout(Layout(mesh, rules)):
                used = gather({"w": leaf}, {"w": spec})["w"]
            return linear(x, bind(used, jnp.array([0, 1, -1, 0])).layer(1))

        np.testing.assert_allclose(jax.jit(apply)(placed, x), apply(leaf, x), rtol=1e-5, atol=1e-5)


def test_gather_brings_the_gradients_of_adapters_to_their_shards():
    mesh, rules = make_mesh(MeshShape(fsdp=2, tensor=2)), make_rules()
    leaf, spec = adapted(jnp.asarray(noise(6, 4))), ParamSpec((6, 4), ("embed", "heads"))
    placed = jax.device_put(leaf, shardings(leaf.specs(spec), rules, mesh))

    def step(leaf):
        with use_layout(Layout(mesh, rules)):
            loss = lambda w: jnp.sum(jnp.square(linear(jnp.ones((2, 6)), gather(w, spec))))  # noqa: E731
            return jax.grad(loss)(leaf)

    gradient, alone = jax.jit(step)(placed), step(leaf)
    for name, shape in (("a", (3, 3)), ("b", (3, 2)), ("base", (3, 2))):
        found = getattr(gradient, name)
        assert found.addressable_shards[0].data.shape == shape
        np.testing.assert_allclose(found, getattr(alone, name), rtol=1e-4, atol=1e-4)


def test_cast_keeps_formats_and_scales():
    leaf = cast(adapted(BASES["int8"](noise(6, 4)), dora=True), jnp.bfloat16)
    assert (leaf.a.dtype, leaf.b.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (leaf.scale.dtype, leaf.magnitude.dtype) == (jnp.float32, jnp.float32)
    assert leaf.base.values.dtype == jnp.int8 and leaf.base.scale.dtype == jnp.float32
    assert cast(several("array", 6, 4), jnp.bfloat16).base.dtype == jnp.bfloat16
