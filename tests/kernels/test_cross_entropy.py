"""Token log-probabilities: both implementations against float64 NumPy and against each other."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.cross_entropy import fused_token_logprobs, token_logprobs
from lm.model import Attention, FeedForward, Head, Layer, ModelConfig, make_stacks
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, named_sharding, use_layout
from lm.weights import Int4
from tests.refuses import refuses

B, T, D, V, VOCAB = 4, 8, 8, 48, 43


def make_inputs(batch=B, length=T, transposed=False, dtype=jnp.float32, scale=0.5, seed=0):
    """hidden, weight, targets, and a cotangent for each output."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(batch, length, D)), dtype)
    weight = jnp.asarray(scale * rng.normal(size=(V, D) if transposed else (D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (batch, length)), jnp.int32)
    cotangents = tuple(jnp.asarray(rng.normal(size=(batch, length)), jnp.float32) for _ in "ab")
    return hidden, weight, targets, cotangents


def value_and_gradients(
    hidden, weight, targets, cotangents, layout=None, rests=True, transposed=False, **options
):
    """Outputs, and gradients through both, under jit; arrays laid out as they would rest."""
    options |= {"transposed": transposed, "vocab_size": VOCAB}

    def run(hidden, weight, targets, cotangents):
        with use_layout(layout):
            outputs, pull = jax.vjp(
                lambda h, w: token_logprobs(h, w, targets, **options), hidden, weight
            )
            return outputs, pull(cotangents)

    if layout is not None and rests:
        mesh, rules = layout.mesh, layout.rules
        axes = ("vocab", "embed") if transposed else ("embed", "vocab")
        residual = named_sharding(mesh, rules.activations, ("batch", "residual_sequence", None))
        hidden = jax.device_put(hidden, residual)
        weight = jax.device_put(weight, named_sharding(mesh, rules.weights, axes))
    return jax.jit(run)(hidden, weight, targets, cotangents)


def numpy_value_and_gradients(hidden, weight, targets, cotangents, transposed=False, softcap=None):
    """The same in float64, from the definition of softmax and its Jacobian."""
    h, w, t = np.asarray(hidden, np.float64), np.asarray(weight, np.float64), np.asarray(targets)
    w = w.T if transposed else w
    raw = h @ w[:, :VOCAB]
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    top = logits.max(-1, keepdims=True)
    logsumexp = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
    one_hot = np.eye(VOCAB)[t]
    logprobs = (logits * one_hot).sum(-1) - logsumexp
    probs = np.exp(logits - logsumexp[..., None])
    of_logprobs, of_logsumexp = (np.asarray(c, np.float64)[..., None] for c in cotangents)
    d_raw = of_logprobs * (one_hot - probs) + of_logsumexp * probs
    if softcap is not None:
        d_raw *= 1 - np.tanh(raw / softcap) ** 2
    d_weight = np.zeros_like(w)
    d_weight[:, :VOCAB] = np.einsum("btd,btv->dv", h, d_raw)
    return (logprobs, logsumexp), (
        d_raw @ w[:, :VOCAB].T,
        d_weight.T if transposed else d_weight,
    )


def assert_close(found, wanted, atol=2e-5):
    for name, a, b in zip(
        ("logprobs", "logsumexp", "d_hidden", "d_weight"),
        jax.tree.leaves(found),
        jax.tree.leaves(wanted),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=atol, rtol=atol, err_msg=name)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_values_and_gradients_equal_float64(implementation, transposed, softcap):
    inputs = make_inputs(3, 7, transposed)
    found = value_and_gradients(
        *inputs, transposed=transposed, softcap=softcap, implementation=implementation
    )
    assert_close(found, numpy_value_and_gradients(*inputs, transposed, softcap))


@pytest.mark.parametrize("mesh", [None, MeshShape(fsdp=2, tensor=4)], ids=["one", "mesh"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_entropy_and_its_gradients_equal_float64s(softcap, mesh):
    hidden, weight, targets, _ = make_inputs(seed=3)
    layout = mesh and Layout(make_mesh(mesh), make_rules())
    cotangent = np.random.default_rng(4).normal(size=targets.shape).astype(np.float32)

    def run(implementation):
        def entropies(hidden, weight):
            with use_layout(layout):
                results = token_logprobs(
                    hidden, weight, targets, transposed=False, vocab_size=VOCAB, softcap=softcap,
                    implementation=implementation, chunk_tokens=5, entropy=True,
                )  # fmt: skip
            return jnp.sum(results[2] * cotangent), results

        return jax.jit(jax.grad(entropies, (0, 1), has_aux=True))(hidden, weight)

    (d_fused, fused), (d_plain, plain) = run("fused"), run("reference")
    raw = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)[:, :VOCAB]
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    logs = np.log(probs)
    expected = -(probs * logs).sum(-1)
    d_raw = -probs * (logs + expected[..., None]) * cotangent[..., None]
    d_raw *= 1 if softcap is None else 1 - np.tanh(raw / softcap) ** 2
    d_hidden = d_raw @ np.asarray(weight, np.float64)[:, :VOCAB].T
    for (d_h, d_w), results in ((d_fused, fused), (d_plain, plain)):
        np.testing.assert_allclose(results[2], expected, atol=2e-5)
        np.testing.assert_allclose(d_h, d_hidden, atol=2e-5)
        np.testing.assert_allclose(d_w, d_plain[1], atol=2e-5)
        for x, y in zip(results, plain, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_output_matrix_is_not_decoded_whole(tied):
    """Log-probabilities, entropy and gradients are those of the decoded matrix, in parts."""
    shape, block_axis = ((1024, 64), "out") if tied else ((64, 1024), "in")
    matrix = jax.random.normal(jax.random.key(0), shape)
    leaf = Int4.quantize(matrix, 32, block_axis=block_axis)
    stacks = make_stacks((Layer(Attention(1, 1, 8), FeedForward(8)),))
    config = ModelConfig(1000, 64, stacks, tied=tied, logit_softcap=3.0)
    hidden = jax.random.normal(jax.random.key(1), (2, 1030, 64))
    targets = jax.random.randint(jax.random.key(2), (2, 1030), 0, 1000)

    def value(hidden, weight):
        results = Head(weight, config).logprobs_and_entropy(hidden, targets)
        return sum(jnp.sum(x * jnp.sin(jnp.arange(1030.0))) for x in results), results

    run = jax.jit(jax.value_and_grad(value, has_aux=True))
    expected = run(hidden, leaf.dequantize(jnp.float32))
    for x, y in zip(jax.tree.leaves(run(hidden, leaf)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-3 * np.abs(y).max())
    text = str(jax.make_jaxpr(lambda x, w: value(x, w)[0])(hidden, leaf))
    assert "f32[2,1030,1024]" not in text and "f32[2,344,1024]" in text


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 20, 21, 1000])
def test_any_chunk_gives_the_same(chunk_tokens):
    inputs = make_inputs(3, 7)
    found = value_and_gradients(*inputs, implementation="fused", chunk_tokens=chunk_tokens)
    assert_close(found, numpy_value_and_gradients(*inputs))


def test_the_chunk_of_the_platform_gives_the_same():
    inputs = make_inputs(3, 257)  # more than one chunk, the last of them filled up
    found = value_and_gradients(*inputs, implementation="fused")
    assert_close(found, numpy_value_and_gradients(*inputs), atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_padding_columns_take_no_part(implementation, transposed):
    hidden, weight, targets, cotangents = make_inputs(transposed=transposed)
    padding = (slice(VOCAB, None), slice(None)) if transposed else (slice(None), slice(VOCAB, None))
    options = {"transposed": transposed, "implementation": implementation, "chunk_tokens": 5}
    before, (_, d_weight) = value_and_gradients(hidden, weight, targets, cotangents, **options)
    assert not np.any(d_weight[padding])
    weight = weight.at[padding].set(100.0)
    after, _ = value_and_gradients(hidden, weight, targets, cotangents, **options)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits_are_finite(implementation, softcap):
    inputs = make_inputs(scale=1e4)
    found = value_and_gradients(*inputs, softcap=softcap, implementation=implementation)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
    wanted = numpy_value_and_gradients(*inputs, False, softcap)
    np.testing.assert_allclose(found[0][1], wanted[0][1], rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_bfloat16_keeps_float32_logits_and_the_dtypes_of_its_inputs(implementation):
    hidden, weight, targets, cotangents = make_inputs(dtype=jnp.bfloat16)
    weight = weight.astype(jnp.bfloat16).astype(jnp.float32)  # nothing lost by the cast inside
    inputs = hidden, weight, targets, cotangents
    outputs, gradients = value_and_gradients(*inputs, implementation=implementation)
    assert [x.dtype for x in outputs] == [jnp.float32] * 2
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32]
    wanted = numpy_value_and_gradients(*inputs)
    for found, true in zip(outputs, wanted[0], strict=True):
        np.testing.assert_allclose(found, true, atol=1e-5)
    for found, true in zip(gradients, wanted[1], strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), true, atol=0.1, rtol=0.02)


MESHES = {
    "fsdp=2 expert=2": (MeshShape(fsdp=2, expert=2), {}),
    "zero over expert": (MeshShape(fsdp=2, expert=2, tensor=2), {"zero_axes": ("fsdp", "expert")}),
    "tensor=8": (MeshShape(tensor=8), {}),
    "data=4": (MeshShape(data=4), {"zero": 0}),
    "fsdp=4 zero=0": (MeshShape(fsdp=4), {"zero": 0}),
    "fsdp=4 zero=1": (MeshShape(fsdp=4), {"zero": 1}),
    "fsdp=4 zero=2": (MeshShape(fsdp=4), {"zero": 2}),
    "fsdp=4 zero=3": (MeshShape(fsdp=4), {"zero": 3}),
    "data=2 fsdp=2 tensor=2": (MeshShape(data=2, fsdp=2, tensor=2), {}),
    "fsdp=2 tensor=4 sequence": (MeshShape(fsdp=2, tensor=4), {"sequence_parallel": True}),
    "context=2 tensor=2 sequence": (
        MeshShape(fsdp=2, context=2, tensor=2),
        {"zero": 2, "sequence_parallel": True},
    ),
    "slice=2 data=2 context=2": (MeshShape(slice=2, data=2, context=2), {"zero": 1}),
}


def make_layout(name):
    shape, rules = MESHES[name]
    return Layout(make_mesh(shape), make_rules(**rules))


@pytest.mark.parametrize(
    ("name", "transposed"),
    [
        pytest.param(name, transposed, marks=() if (i + transposed) % 2 else pytest.mark.slow)
        for i, name in enumerate(MESHES)
        for transposed in (False, True)
    ],
)
def test_fused_on_a_mesh_equals_float64(name, transposed):
    inputs = make_inputs(transposed=transposed)
    options = {"softcap": 2.0, "implementation": "fused", "chunk_tokens": 3}
    found = value_and_gradients(*inputs, make_layout(name), transposed=transposed, **options)
    assert_close(found, numpy_value_and_gradients(*inputs, transposed, 2.0))


@pytest.mark.parametrize("name", ["fsdp=4 zero=2", "fsdp=2 tensor=4 sequence"])
def test_reference_on_a_mesh_equals_float64(name):
    inputs = make_inputs()
    found = value_and_gradients(*inputs, make_layout(name), implementation="reference")
    assert_close(found, numpy_value_and_gradients(*inputs))


def test_a_device_of_padding_columns_alone():
    hidden, weight, targets, _ = make_inputs()
    with use_layout(Layout(make_mesh(MeshShape(tensor=8)), make_rules())):
        run = jax.jit(
            lambda h, w: fused_token_logprobs(h, w, targets % 6, transposed=False, vocab_size=6)
        )
        found = run(hidden, weight)
    alone = fused_token_logprobs(hidden, weight[:, :6], targets % 6, transposed=False, vocab_size=6)
    for a, b in zip(found, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_sequence_that_sequence_parallelism_does_not_divide():
    inputs, layout = make_inputs(4, 7), make_layout("fsdp=2 tensor=4 sequence")
    found = value_and_gradients(*inputs, layout, rests=False, implementation="fused")
    assert_close(found, numpy_value_and_gradients(*inputs))


@pytest.mark.parametrize("name", ["fsdp=4 zero=3", "data=2 fsdp=2 tensor=2"])
def test_flat_tokens_on_a_mesh(name):
    hidden, weight, targets, cotangents = make_inputs()
    flat = [hidden.reshape(-1, D), weight, targets.reshape(-1)]
    flat.append(tuple(c.reshape(-1) for c in cotangents))
    outputs, (d_hidden, d_weight) = value_and_gradients(
        *flat, make_layout(name), rests=False, implementation="fused", chunk_tokens=3
    )
    found = [x.reshape(B, T) for x in outputs], (d_hidden.reshape(B, T, D), d_weight)
    assert_close(found, numpy_value_and_gradients(hidden, weight, targets, cotangents))


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_the_weights_gradient_is_left_as_the_gradients_table_says(implementation):
    inputs = make_inputs()
    layout = make_layout("data=2 fsdp=2 tensor=2")
    _, (_, d_weight) = value_and_gradients(*inputs, layout, implementation=implementation)
    wanted = named_sharding(layout.mesh, layout.rules.gradients, ("embed", "vocab"))
    assert d_weight.sharding.is_equivalent_to(wanted, 2)


def test_zero_3_scatters_the_gradient_and_sums_nothing_of_its_size_twice():
    layout, (hidden, weight, targets, cotangents) = make_layout("fsdp=4 zero=3"), make_inputs()

    def run(hidden, weight):
        with use_layout(layout):
            function = functools.partial(
                fused_token_logprobs, targets=targets, transposed=False, vocab_size=VOCAB
            )
            return jax.vjp(function, hidden, weight)[1](cotangents)

    mesh, rules = layout.mesh, layout.rules
    shardings = (
        named_sharding(mesh, rules.activations, ("batch", "residual_sequence", None)),
        named_sharding(mesh, rules.weights, ("embed", "vocab")),
    )
    text = jax.jit(run, in_shardings=shardings).lower(hidden, weight).compile().as_text()
    assert len(re.findall(r" reduce-scatter\(", text)) == 1
    assert " all-reduce(" not in text


def test_accumulation_inside_a_scan():
    hidden, weight, targets, _ = make_inputs(16, T)
    layout = make_layout("data=2 fsdp=2 tensor=2")

    def total(weight, hidden, targets, implementation):
        logprobs, logsumexp = token_logprobs(
            hidden, weight, targets, transposed=False, vocab_size=VOCAB, chunk_tokens=3,
            implementation=implementation,
        )  # fmt: skip
        return -logprobs.sum() + 0.1 * (logsumexp**2).sum()

    def accumulate(weight, hidden, targets):
        with use_layout(layout):

            def step(gradient, micro):
                return gradient + jax.grad(total)(weight, *micro, "fused"), None

            split = (hidden.reshape(4, 4, T, D), targets.reshape(4, 4, T))
            return jax.lax.scan(step, jnp.zeros_like(weight), split)[0]

    found = jax.jit(accumulate)(weight, hidden, targets)
    np.testing.assert_allclose(
        found, jax.grad(total)(weight, hidden, targets, "reference"), atol=1e-4, rtol=1e-4
    )


def test_memory_is_that_of_a_chunk():
    tokens, vocab = 1024, 4096

    def bytes_held(implementation):
        def loss(hidden, weight):
            logprobs, _ = token_logprobs(
                hidden, weight, jnp.zeros(tokens, jnp.int32), transposed=False, vocab_size=vocab,
                implementation=implementation, chunk_tokens=64,
            )  # fmt: skip
            return -logprobs.mean()

        shapes = (
            jax.ShapeDtypeStruct((tokens, D), jnp.float32),
            jax.ShapeDtypeStruct((D, vocab), jnp.float32),
        )
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()

    whole = 4 * tokens * vocab
    held, text = bytes_held("fused")
    assert held < whole / 3, (held, whole)
    assert f"{tokens},{vocab}]" not in text
    held, text = bytes_held("reference")
    assert held >= whole
    assert f"{tokens},{vocab}]" in text


def test_the_size_of_the_logits_chooses():
    hidden, weight, targets, _ = make_inputs()

    def chunked(max_logit_bytes, layout=None):
        def run(hidden, weight):
            with use_layout(layout):
                return token_logprobs(
                    hidden, weight, targets, transposed=False, vocab_size=VOCAB,
                    max_logit_bytes=max_logit_bytes,
                )  # fmt: skip

        text = str(jax.make_jaxpr(run)(hidden, weight))
        return "custom_vjp_call" in text and "scan" in text

    whole = 4 * B * T * V
    assert not chunked(whole)
    assert chunked(whole - 1)
    layout = make_layout("data=2 fsdp=2 tensor=2")  # an eighth of it on each device
    assert not chunked(whole // 8, layout)
    assert chunked(whole // 8 - 1, layout)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"implementation": "fast"}, ["'fast' is unknown; use reference, fused"]),
        ({"transposed": True}, ["hidden size 8 does not match", "[D, V], transposed=False"]),
        ({"vocab_size": V + 1}, ["vocab_size=49 is outside 1..48"]),
        ({"softcap": 0.0}, ["softcap=0.0; use a positive number"]),
        ({"chunk_tokens": 0}, ["chunk_tokens=0; use a positive number"]),
        ({"targets": np.zeros((4, 7), int)}, ["targets [4, 7] do not match", "[4, 8, 8]"]),
        ({"mesh": 5}, ["'tensor'=5 does not divide vocab=48; use 1, 2, 3, 4"]),
    ],
)
def test_bad_options_and_shapes_are_named(changes, words):
    hidden, weight, targets, _ = make_inputs()
    options = {"targets": targets, "transposed": False, "vocab_size": VOCAB} | changes
    with use_layout(Layout(make_mesh(MeshShape(tensor=options.pop("mesh", 1))), make_rules())):
        refuses(lambda: token_logprobs(hidden, weight, **options), *words)


@pytest.mark.oracle
def test_equals_torch_cross_entropy():
    torch = pytest.importorskip("torch")
    hidden, weight, targets, _ = make_inputs()

    def loss(hidden, weight):
        logprobs, _ = token_logprobs(
            hidden, weight[:, :VOCAB], targets, transposed=False, vocab_size=VOCAB,
            implementation="fused", chunk_tokens=5,
        )  # fmt: skip
        return -logprobs.mean()

    value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, weight)
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (hidden, weight)]
    logits = (leaves[0] @ leaves[1][:, :VOCAB]).reshape(-1, VOCAB)
    wanted = torch.nn.functional.cross_entropy(
        logits, torch.tensor(np.asarray(targets)).reshape(-1).long()
    )
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), rel=1e-6)
    for found, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(found, leaf.grad, atol=1e-6)
