"""Cross-entropy: the reference against float64, the fused one against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lm.kernels.cross_entropy import token_logprobs
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, partition_spec, use_layout

D, V, PADDED = 16, 115, 128


def make_inputs(shape=(4, 8), transposed=False, dtype=jnp.float32, scale=1.0, padded=PADDED):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = scale * jax.random.normal(keys[0], (*shape, D))
    weight = jax.random.normal(keys[1], (padded, D) if transposed else (D, padded))
    targets = jax.random.randint(keys[2], shape, 0, V)
    cotangents = jax.random.normal(keys[3], (2, *shape))
    return hidden.astype(dtype), weight.astype(dtype), targets, cotangents


def run(inputs, layout=None, **options):
    """(log-probabilities, log-sum-exps, gradients of hidden and weight), through both outputs."""
    hidden, weight, targets, cotangents = inputs

    @jax.jit
    def both(hidden, weight):
        with use_layout(layout):
            outputs, pull = jax.vjp(
                lambda h, w: token_logprobs(h, w, targets, vocab_size=V, **options), hidden, weight
            )
            return (*outputs, *pull((cotangents[0], cotangents[1])))

    if layout is not None:
        axes = ("vocab", "embed") if options["transposed"] else ("embed", "vocab")
        at_rest = partition_spec(layout.rules.weights, axes, layout.mesh)
        weight = jax.device_put(weight, NamedSharding(layout.mesh, at_rest))
    return both(hidden, weight)


def exact(inputs, transposed, softcap=None):
    """The same, in float64 NumPy."""
    hidden, weight, targets, (a, b) = (np.asarray(x, np.float64) for x in inputs)
    weight = weight.T if transposed else weight
    raw = hidden @ weight[:, :V]
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    top = logits.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
    onehot = np.eye(V)[targets.astype(int)]
    d = (b - a)[..., None] * np.exp(logits - lse[..., None]) + a[..., None] * onehot
    if softcap is not None:
        d *= 1 - (logits / softcap) ** 2
    d_weight = np.zeros(weight.shape)
    d_weight[:, :V] = hidden.reshape(-1, D).T @ d.reshape(-1, V)
    logprobs = (logits * onehot).sum(-1) - lse
    return logprobs, lse, d @ weight[:, :V].T, d_weight.T if transposed else d_weight


def assert_close(found, wanted, tolerance=1e-5):
    for name, x, y in zip(("logprobs", "lse", "hidden", "weight"), found, wanted, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), (name, np.abs(x - y).max())


@pytest.mark.parametrize("shape", [(4, 8), (3, 7), (13,), (1,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_equals_float64(implementation, transposed, shape):
    inputs = make_inputs(shape, transposed)
    options = {"chunk_tokens": 5} if implementation == "fused" else {}
    found = run(inputs, transposed=transposed, implementation=implementation, **options)
    assert_close(found, exact(inputs, transposed))


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_softcap_equals_float64(implementation, softcap):
    inputs = make_inputs((3, 7))
    found = run(inputs, transposed=False, implementation=implementation, softcap=softcap)
    assert_close(found, exact(inputs, False, softcap))


MESHES = {
    "tensor2": MeshShape(tensor=2),
    "tensor4": MeshShape(tensor=4),
    "tensor8": MeshShape(tensor=8),
    "data4": MeshShape(data=4),
    "fsdp4": MeshShape(fsdp=4),
    "fsdp2-tensor4": MeshShape(fsdp=2, tensor=4),
    "data2-fsdp2-tensor2": MeshShape(data=2, fsdp=2, tensor=2),
    "context2-tensor2": MeshShape(context=2, tensor=2),
    "data2-context2-fsdp2": MeshShape(data=2, context=2, fsdp=2),
}
LAYOUTS = [
    *[(mesh, 3, False) for mesh in MESHES],
    *[("fsdp4", zero, False) for zero in (0, 1, 2)],
    *[("fsdp2-tensor4", zero, zero > 0) for zero in (0, 1, 2)],
    *[(mesh, 3, True) for mesh in ("tensor8", "data2-fsdp2-tensor2", "context2-tensor2")],
]


@functools.cache
def one_device(transposed, softcap):
    return run(
        make_inputs(transposed=transposed),
        transposed=transposed, softcap=softcap, implementation="reference",
    )  # fmt: skip


@pytest.mark.parametrize(("mesh", "zero", "sequence_parallel"), LAYOUTS)
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_a_mesh_equals_one_device(implementation, mesh, zero, sequence_parallel):
    transposed = zero == 2 or mesh.startswith(("tensor", "data2"))
    softcap = 4.0 if sequence_parallel else None
    layout = Layout(make_mesh(MESHES[mesh]), make_rules(zero, sequence_parallel))
    options = {"chunk_tokens": 3} if implementation == "fused" else {}
    found = run(
        make_inputs(transposed=transposed), layout,
        transposed=transposed, softcap=softcap, implementation=implementation, **options,
    )  # fmt: skip
    assert_close(found, one_device(transposed, softcap))


@pytest.mark.parametrize("mesh", [None, "data2-fsdp2-tensor2"])
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_bfloat16_is_close_to_float64_of_the_same_inputs(implementation, mesh):
    inputs = make_inputs(dtype=jnp.bfloat16)
    layout = None if mesh is None else Layout(make_mesh(MESHES[mesh]), make_rules(3))
    found = run(inputs, layout, transposed=False, implementation=implementation)
    assert [x.dtype for x in found] == [jnp.float32] * 2 + [jnp.bfloat16] * 2
    wanted = exact(inputs, False)
    assert_close(found, wanted, 2e-2)
    # Products of bfloat16 are exact in float32: only gradients are rounded.
    for x, y in zip(found[:2], wanted[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, "tensor8"])
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_padding_takes_no_part(implementation, mesh):
    """Its columns get a gradient of exactly zero, whatever they hold; a shard may hold no other."""
    padded = 8 * 64  # V=115: six of eight shards hold nothing but padding
    hidden, weight, targets, cotangents = make_inputs(padded=padded)
    layout = None if mesh is None else Layout(make_mesh(MESHES[mesh]), make_rules(3))
    huge = weight.at[:, V:].set(1e6)
    inputs = hidden, huge, targets, cotangents
    found = run(inputs, layout, transposed=False, implementation=implementation)
    assert not np.any(found[3][:, V:])
    wanted = exact((hidden, weight, targets, cotangents), False)
    assert_close(found, wanted)


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_large_logits_are_finite(implementation):
    hidden, weight, targets, cotangents = make_inputs(scale=2000.0)
    assert np.abs(hidden @ weight).max() > 1e4
    inputs = hidden, weight, targets, cotangents
    found = run(inputs, transposed=False, implementation=implementation)
    assert all(np.isfinite(x).all() for x in found)
    wanted = exact(inputs, False)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)


def compiled(implementation, num_tokens=2048, vocab=4096, **options):
    def loss(hidden, weight, targets):
        logprobs, _ = token_logprobs(
            hidden, weight, targets,
            transposed=False, vocab_size=vocab, implementation=implementation, **options,
        )  # fmt: skip
        return -jnp.mean(logprobs)

    shapes = (
        jax.ShapeDtypeStruct((num_tokens, D), jnp.float32),
        jax.ShapeDtypeStruct((D, vocab), jnp.float32),
        jax.ShapeDtypeStruct((num_tokens,), jnp.int32),
    )
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()


def temporary_bytes(*args, **kwargs) -> int:
    return compiled(*args, **kwargs).memory_analysis().temp_size_in_bytes


def test_fused_never_holds_the_logits():
    logits = 4 * 2048 * 4096
    assert temporary_bytes("reference") > logits
    assert temporary_bytes("fused", chunk_tokens=128) < logits / 4


def test_size_chooses():
    logits = 4 * 2048 * 4096
    reference = temporary_bytes(None, max_logit_bytes=logits)
    fused = temporary_bytes(None, max_logit_bytes=logits - 1, chunk_tokens=128)
    assert reference > logits > 4 * fused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "magic"}, "'magic' is unknown; use reference, fused"),
        ({"transposed": True}, "does not match an output weight"),
        ({"vocab_size": 0}, r"vocab_size=0 is outside 1\.\.128"),
        ({"vocab_size": 129}, "vocab_size=129 is outside"),
        ({"softcap": 0.0}, "softcap=0.0; use a positive number"),
        ({"chunk_tokens": 0}, "chunk_tokens=0; use a positive number"),
        ({"targets": jnp.zeros((4, 7), int)}, r"targets \[4, 7\] do not match"),
    ],
)
def test_bad_arguments(change, message):
    hidden, weight, targets, _ = make_inputs()
    options = {"targets": targets, "transposed": False, "vocab_size": V} | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(hidden, weight, **options)


def test_a_mesh_that_does_not_divide_is_named():
    layout = Layout(make_mesh(MeshShape(tensor=3)), make_rules(3))
    with (
        pytest.raises(ValueError, match="'tensor'=3 does not divide vocab=128"),
        use_layout(layout),
    ):
        token_logprobs(*make_inputs()[:3], transposed=False, vocab_size=V)
