"""Every quantized format: products, rows, gradients, stacks and shards are those of its matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoints import Checkpoints, open_checkpoint
from lm.files import ggml
from lm.model import Tokens, forward, param_specs
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from lm.train.state import TrainState, partition
from lm.weights import (
    NF4,
    Fp8,
    GGUFBlocks,
    Int4,
    Int8,
    StructuredWeight,
    blocked,
    grouped_linear,
    linear,
    rtn,
    shardings,
    take,
    unembed,
)
from tests.train.tiny import UNTIED

K, R = 256, 128


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def blocks(weight, kind: str, block_axis="in") -> GGUFBlocks:
    """Random blocks with scales of a sensible size, for types that have no quantizer."""
    rows = weight.swapaxes(-1, -2) if block_axis == "in" else weight
    layout = ggml.TYPES[kind]
    rng = np.random.default_rng(0)
    drawn = np.frombuffer(rng.bytes(rows.size // layout.block * layout.nbytes), layout.dtype).copy()
    for name in {"d", "dmin"} & set(drawn.dtype.names):
        drawn[name] = rng.uniform(0.001, 0.002, drawn[name].shape)
    leaf = GGUFBlocks.from_bytes(drawn.view(np.uint8), kind, rows.shape, block_axis)
    return jax.tree.map(jnp.asarray, leaf)


def act_order(weight) -> Int4:
    """Groups of rows that do not lie together."""
    order = np.random.default_rng(1).permutation(weight.shape[-2])
    leaf = Int4.quantize(weight[..., order, :], 64, symmetric=False)
    order = np.broadcast_to(order, (*weight.shape[:-2], len(order)))
    return dataclasses.replace(leaf, order=jnp.asarray(order, jnp.int32))


make = functools.partial
# Name -> how to quantize, bits a weight at 256 x 128, and the largest relative error (Frobenius) of
# normal weights, or None where the numbers are drawn.
FORMATS = {
    "int8": (Int8.quantize, 8 + 32 / K, 0.01),
    "int4": (make(Int4.quantize, group_size=64), 4 + 16 / 64, 0.12),
    "int4 column": (make(Int4.quantize, group_size=None, scale_dtype=jnp.bfloat16), 4.0625, 0.15),
    "int4 zeros": (make(Int4.quantize, group_size=32, symmetric=False), 4 + 24 / 32, 0.1),
    "int4 act-order": (act_order, 4 + 24 / 64 + 32 / R, 0.12),
    # The figures of QLoRA's own arithmetic, one float32 a matrix (the mean scale) above.
    "nf4": (NF4.quantize, 4 + 8 / 64 + 32 / (64 * 256) + 32 / (K * R), 0.093),
    "nf4 single": (make(NF4.quantize, double=False), 4.5, 0.093),
    "nf4 embedding": (make(NF4.quantize, double=False, block_axis="out", block=32), 5, 0.09),
    "fp4": (make(NF4.quantize, kind="fp4"), 4 + 8 / 64 + 32 / (64 * 256) + 32 / (K * R), 0.13),
    "fp8 column": (Fp8.quantize, 8 + 32 / K, 0.03),
    "fp8 tensor": (make(Fp8.quantize, per_channel=False), 8 + 32 / (K * R), 0.03),
    "fp8 e5m2": (make(Fp8.quantize, dtype=jnp.float8_e5m2, block=64), 8 + 32 / 64**2, 0.06),
    "Q4_0": (make(GGUFBlocks.quantize, kind="Q4_0"), 4.5, 0.1),
    "Q5_1 embedding": (make(GGUFBlocks.quantize, kind="Q5_1", block_axis="out"), 6, 0.05),
    "Q8_0": (make(GGUFBlocks.quantize, kind="Q8_0"), 8.5, 0.01),
    "Q4_K": (make(blocks, kind="Q4_K"), 4.5, None),
    "Q6_K": (make(blocks, kind="Q6_K"), 6.5625, None),
}


@jax.jit
def everything(leaf, x, narrow, dy, ids):
    """All that is asked of a matrix, and its gradients."""

    def total(x):
        return jnp.sum(linear(x, leaf) * dy)

    return {
        "linear": linear(x, leaf),
        "bfloat16": linear(narrow, leaf),
        "gradient": jax.grad(total)(x),
        "logits": unembed(x, leaf, False),
        "tied logits": unembed(dy, leaf, True),
        "tied gradient": jax.grad(lambda dy: jnp.sum(unembed(dy, leaf, True) * x))(dy),
        "rows": take(leaf, ids, jnp.float32),
    }


@pytest.mark.parametrize("name", FORMATS)
def test_size_and_error(name):
    quantize, bits, error = FORMATS[name]
    weight = normal(K, R)
    leaf = quantize(jnp.asarray(weight))
    assert leaf.shape == (K, R)
    assert leaf.bits_per_weight == pytest.approx(bits)
    w = np.asarray(leaf.dequantize(jnp.float32))
    if error is not None:
        assert np.linalg.norm(w - weight) < error * np.linalg.norm(weight)
    y = linear(jnp.ones((2, K)), leaf)
    np.testing.assert_allclose(y[1], w.sum(0), rtol=1e-4, atol=1e-3 * np.abs(w).max())


# Each a way of its own through the code.
DISTINCT = ("int8", "int4 zeros", "int4 act-order", "nf4", "nf4 embedding", "fp8 e5m2", "Q4_K")


@pytest.mark.parametrize("name", DISTINCT)
def test_products_rows_and_gradients_are_those_of_the_matrix(name, monkeypatch):
    """Against float64; on one device, so that the matrix is decoded in parts, in a loop."""
    monkeypatch.setattr(blocked, "TILE", K * 64)
    leaf = FORMATS[name][0](jnp.asarray(normal(K, R)))
    w = np.asarray(leaf.dequantize(jnp.float32), float)
    x, dy, ids = normal(2, 3, K, seed=1), normal(2, 3, R, seed=2), np.array([[0, K - 1], [7, 7]])
    found = everything(leaf, x, jnp.asarray(x, jnp.bfloat16), dy, ids)
    expected = {
        "linear": x @ w,
        "gradient": dy @ w.T,
        "logits": x @ w,
        "tied logits": dy @ w.T,
        "tied gradient": x @ w,
    }
    for key, value in expected.items():
        atol = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=atol, err_msg=key)
    np.testing.assert_allclose(found["rows"], w[ids], rtol=1e-6)
    assert found["bfloat16"].dtype == jnp.bfloat16
    assert found["logits"].dtype == found["tied logits"].dtype == jnp.float32
    # Rounding of x, of the weight, and of the result, to 8 bits each; sums are not rounded.
    difference = np.asarray(found["bfloat16"], float) - x @ w
    assert np.linalg.norm(difference) < 2**-8 * np.linalg.norm(x @ w)
    np.testing.assert_array_equal(leaf.dequantize(jnp.bfloat16), w.astype(jnp.bfloat16))


def test_whole_numbers_times_whole_numbers():
    """W8A8 is exactly the product of the rounded activations, whose error is small; its gradient
    is that of the weights."""
    leaf = Int8.quantize(jnp.asarray(normal(64, 48)), dynamic=True)
    w = np.asarray(leaf.dequantize(jnp.float32), float)
    for rows in (1, 5):
        x = normal(rows, 64, seed=rows) * np.logspace(-3, 3, rows)[:, None].astype(np.float32)
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        y = np.asarray(linear(jnp.asarray(x), leaf))
        np.testing.assert_allclose(y, np.rint(x / scale).astype(float) * scale @ w, rtol=1e-5)
        assert np.linalg.norm(y - x @ w) < 0.02 * np.linalg.norm(x @ w)
    assert not np.asarray(linear(jnp.zeros((2, 64)), leaf)).any()
    gradient = jax.grad(lambda x: jnp.sum(linear(x, leaf)))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.broadcast_to(w.sum(1), x.shape), rtol=1e-4, atol=1e-4)


STACKED = ("int4 act-order", "nf4", "fp8 e5m2", "Q6_K")


@pytest.mark.parametrize("name", STACKED)
def test_stacked(name):
    """A stack is its layers: for `layer`, for a scan, for experts."""
    weight = jnp.asarray(normal(3, K, R))
    leaf = FORMATS[name][0](weight)
    assert leaf.shape == weight.shape
    w = np.asarray(leaf.dequantize(jnp.float32))
    if name != "Q6_K":
        alone = FORMATS[name][0](weight[1])
        np.testing.assert_array_equal(alone.dequantize(jnp.float32), w[1])
    np.testing.assert_array_equal(leaf.layer(1).dequantize(jnp.float32), w[1])
    x = normal(7, K, seed=1)

    @jax.jit
    def run(leaf, x):
        _, scanned = jax.lax.scan(lambda carry, one: (carry, linear(carry, one)), x, leaf)
        sizes = jnp.array([4, 0, 3], jnp.int32)
        experts, back = jax.vjp(lambda x: grouped_linear(x, leaf, sizes), x)
        return scanned, experts, back(experts)[0]

    scanned, experts, gradient = run(leaf, jnp.asarray(x))
    np.testing.assert_allclose(scanned, x @ w, rtol=1e-4, atol=1e-4 * np.abs(w).max() * 16)
    expected = np.concatenate([x[:4] @ w[0], x[4:] @ w[2]])
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(experts, expected, rtol=1e-4, atol=atol)
    expected = np.concatenate([expected[:4] @ w[0].T, expected[4:] @ w[2].T])
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_backward_pass_keeps_the_blocks_and_not_the_matrix():
    """What a gradient saves of a layer is as large as its blocks (QLoRA's memory)."""
    leaf = NF4.quantize(jnp.asarray(normal(K, R)))
    x = jnp.ones((2, K))
    _, back = jax.vjp(lambda x: linear(x, leaf), x)
    saved = sum(a.nbytes for a in jax.tree.leaves(back) if hasattr(a, "nbytes"))
    assert saved < 2 * leaf.nbytes < 4 * K * R / 2


SHARDED = ("int8", "int4 act-order", "nf4", "fp8 e5m2", "Q6_K")


def test_sharded_as_on_one_device():
    """A tree of many formats over eight devices: two parts along `in`, four along `out`."""
    layout = Layout(make_mesh(MeshShape(fsdp=2, tensor=4)), make_rules())
    weight = jnp.asarray(normal(2 * K, 4 * 64))
    tree = {name: FORMATS[name][0](weight) for name in SHARDED}
    table = {name: FORMATS[name][0](weight) for name in ("nf4 embedding", "Q5_1 embedding")}
    place = lambda leaf, *axes: jax.device_put(  # noqa: E731
        leaf, leaf.shardings(axes, layout.rules, layout.mesh)
    )
    placed = {name: place(leaf, "embed", "ffn") for name, leaf in tree.items()}
    # A table's rows are over `tensor`, its blocks over `fsdp`.
    placed_table = {name: place(leaf, "vocab", "embed") for name, leaf in table.items()}
    for name, leaf in (placed | placed_table).items():
        stored = [(a.nbytes, a.addressable_shards[0].data.nbytes) for a in jax.tree.leaves(leaf)]
        largest, shard = max(stored)
        assert largest == 8 * shard, name

    def run(tree, table, x, h, ids, layout):
        with use_layout(layout):
            return (
                {name: linear(x, leaf) for name, leaf in tree.items()},
                {
                    n: (take(leaf, ids, x.dtype), unembed(h, leaf, True))
                    for n, leaf in table.items()
                },
            )

    x, h, ids = normal(5, 2 * K, seed=1), normal(5, 4 * 64, seed=2), np.array([3, 500, 3])
    alone = jax.jit(functools.partial(run, layout=None))(tree, table, x, h, ids)
    together = jax.jit(functools.partial(run, layout=layout))(placed, placed_table, x, h, ids)
    for a, b in zip(*map(jax.tree.leaves, (alone, together)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(np.abs(a).max()))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (
            lambda w: Int4.quantize(w, 64),
            r"'fsdp'=8 does not divide Int4 \[256, 128\]: number of blocks of 64 along embed=4; "
            "use 1, 2 or 4",
        ),
        (
            lambda w: GGUFBlocks.quantize(w, "Q5_0"),
            None,
        ),
        (
            lambda w: blocks(w, "Q4_K"),
            r"GGUFBlocks Q4_K \[256, 128\]: number of blocks of 256 along embed=1; use 1",
        ),
        (
            lambda w: NF4.quantize(w[:160]),
            r"NF4 \[160, 128\]: number of blocks of 160 along embed=1; use 1",
        ),
        (
            lambda w: Fp8.quantize(w[:200], block=128),
            r"Fp8 \[200, 128\]: number of blocks of 200 along embed=1; use 1",
        ),
        (
            lambda w: Int8.quantize(w[:4]),
            "mesh axis 'fsdp'=8 does not divide embed=4; use 1, 2 or 4",
        ),
    ],
)
def test_a_shard_ends_where_a_block_does(leaf, message):
    mesh, leaf = make_mesh(MeshShape(fsdp=8)), leaf(jnp.asarray(normal(K, R)))
    if message is None:
        leaf.shardings(("embed", "ffn"), make_rules(), mesh)
        return
    with pytest.raises(ValueError, match=message):
        leaf.shardings(("embed", "ffn"), make_rules(), mesh)


MIXED = {
    "*/query": make(Int4.quantize, group_size=16, symmetric=False),
    "*/key": make(NF4.quantize, block=16),
    "*/value": "w8a8",
    "*/attention/out": make(Fp8.quantize, block=16),
    "*/up": make(GGUFBlocks.quantize, kind="Q8_0"),
    "*/down": "q4_1",
    "output": "fp8",
}


def is_leaf(x) -> bool:
    return isinstance(x, StructuredWeight)


def test_a_model_of_many_formats_saved_on_two_devices_opened_on_four(tmp_path):
    specs = param_specs(UNTIED)
    shape = lambda spec: normal(*spec.shape, seed=len(spec.axes)) * 0.1  # noqa: E731
    params = rtn(jax.tree.map(shape, specs, is_leaf=lambda s: hasattr(s, "axes")), MIXED)

    def place(params, **axes):
        layout = Layout(make_mesh(MeshShape(**axes)), make_rules())
        return jax.device_put(params, shardings(specs, layout.rules, layout.mesh, params)), layout

    # `up` has one block along `embed`: two shards of that would cut it.
    two, _ = place(params, tensor=2)
    trainable, frozen = partition(two, lambda path: "norm" in path)
    with Checkpoints(tmp_path, config=UNTIED) as checkpoints:
        checkpoints.save(1, TrainState(jnp.int32(1), trainable, frozen, {}), {}, wait=True)
    layout = Layout(make_mesh(MeshShape(tensor=2, data=2)), make_rules())
    opened, config = open_checkpoint(tmp_path, layout)
    assert jax.tree.structure(opened) == jax.tree.structure(params)
    for a, b in zip(*map(jax.tree.leaves, (opened, params)), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert len(opened.stacks[0].layers[0].feed_forward.up.fields["qs"].sharding.device_set) == 4

    tokens = Tokens.of(jnp.arange(12).reshape(2, 6))
    dense = jax.tree.map(
        lambda w: w.dequantize(jnp.float32) if is_leaf(w) and not isinstance(w, Int8) else w,
        params,
        is_leaf=is_leaf,
    )

    def run(layout, params):
        with use_layout(layout):
            return forward(params, tokens, config).hidden

    found = jax.jit(functools.partial(run, layout))(opened)
    expected = jax.jit(functools.partial(run, None))(dense)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * float(jnp.abs(found).max()))


def test_round_to_nearest_by_path():
    params = {"up": normal(2, 64, 32), "up_bias": normal(2, 32), "norm": normal(2, 32)}
    tree = rtn({"a": params, "b": params}, {"b/up": "nf4", "*": "int8"})
    assert isinstance(tree["a"]["up"], Int8) and isinstance(tree["b"]["up"], NF4)
    assert tree["a"]["up_bias"] is params["up_bias"] and tree["b"]["norm"] is params["norm"]
    assert rtn(tree, {})["b"]["up"] is tree["b"]["up"]
    with pytest.raises(ValueError, match=r"no matrix matches '\*/down'; paths here are as a/norm"):
        rtn({"a": params}, {"*/down": "int4"})
    with pytest.raises(ValueError, match="no format 'int5'; use one of int8, "):
        rtn(params, {"*": "int5"})
    with pytest.raises(ValueError, match=r"up \[2, 64, 32\]: groups of 128 .* use one of 2, 4, 8"):
        rtn(params, {"*": "int4"})
