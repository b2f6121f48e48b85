"""Properties every decoder must have, whatever its features."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.infer.cache import make_cache
from lm.model import (
    Attention,
    FeedForward,
    Layer,
    ModelConfig,
    Norm,
    Rope,
    Tokens,
    check_layout,
    forward,
    make_head,
    make_stacks,
    param_specs,
    stack,
    unstack,
)
from lm.sharding import Layout, MeshShape, make_mesh, make_rules
from lm.weights import Int8, abstract, initialize, path_name, shardings
from tests.model import drawn
from tests.refuses import refuses


def gemma_like(*windows: int | None) -> ModelConfig:
    """Norms on both sides, soft-caps, tied output, local and global layers."""
    norm = Norm(plus_one=True)
    attention = Attention(4, 2, 8, Rope(theta=100.0), softcap=5.0, qk_norm="head")
    layers = tuple(
        Layer(dataclasses.replace(attention, window=w), FeedForward(24, "gelu_tanh"), norm, "both")
        for w in windows
    )
    return ModelConfig(40, 16, make_stacks(layers), norm, True, 4.0, 30.0, vocab_multiple=16)


def neox_like() -> ModelConfig:
    """LayerNorm and biases, parallel blocks, a part of each head rotated, untied output."""
    norm = Norm("layer", bias=True)
    attention = Attention(4, 4, 8, Rope(fraction=0.5), bias=True, out_bias=True)
    layer = Layer(attention, FeedForward(24, "gelu", False, True), norm, parallel=True)
    return ModelConfig(40, 16, make_stacks((layer,) * 2), norm, vocab_multiple=16)


weights = functools.partial(drawn.weights, matrices=1.5)
CONFIGS = {"gemma": gemma_like(3, None, 3, None), "neox": neox_like()}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def hidden_states(params, tokens, config, remat="none"):
    return forward(params, tokens, config, remat=remat).hidden


@functools.partial(jax.jit, static_argnames=("config", "remat", "unroll"))
def loss_and_gradients(params, tokens, targets, counted, config, remat="none", unroll=False):
    """Sum of the cross-entropy of the targets that count."""

    def loss(params):
        hidden = forward(params, tokens, config, remat=remat, unroll=unroll).hidden
        logprobs, _ = make_head(params, config).logprobs(hidden, targets)
        return -jnp.sum(logprobs * counted)

    return jax.value_and_grad(loss)(params)


def assert_trees_close(one, other, rtol, atol):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    flat = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, a), b in flat:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path_name(path))


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40, shape)


TOKENS = Tokens.of(random_ids(2, 12).astype(np.int32))
BATCH = TOKENS, random_ids(2, 12, seed=1), np.ones((2, 12), np.float32)


def test_packed_documents_are_as_if_apart(config):
    """Three documents and padding in one row, against a row each: hidden states and gradients."""
    params, lengths, T = weights(config), (40, 33, 9), 88
    longest, total = max(lengths), sum(lengths)
    # Rows apart have no segments; what follows a document in its row, causality keeps out.
    ids, targets = random_ids(3, longest), random_ids(3, longest, seed=1)
    counted = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.float32)
    apart = Tokens.of(jnp.asarray(ids))

    def pack(rows, padding):
        documents = [row[:n] for row, n in zip(rows, lengths, strict=True)]
        return np.concatenate([*documents, np.full(T - total, padding)])[None]

    packed = Tokens(
        pack(ids, 3),
        pack(np.broadcast_to(np.arange(longest), (3, longest)), 0),
        pack(np.broadcast_to(np.arange(1, 4)[:, None], (3, longest)), 0),
    )
    one = hidden_states(params, apart, config)
    other = hidden_states(params, packed, config)[0]
    np.testing.assert_allclose(
        other[:total], np.concatenate([h[:n] for h, n in zip(one, lengths, strict=True)]),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    loss, gradients = loss_and_gradients(params, apart, targets, counted, config)
    packed_loss, packed_gradients = loss_and_gradients(
        params, packed, pack(targets, 0), pack(counted, 0.0), config
    )
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    assert_trees_close(packed_gradients, gradients, 1e-3, 1e-3)


@pytest.mark.parametrize("windows", [(3,), (2, None), (2, 3, 2), None])
def test_causality_by_gradients(windows):
    """d hidden[t] / d embedding[s] is exactly 0 unless the layers' masks lead from s to t."""
    config = neox_like() if windows is None else gemma_like(*windows)
    segments = np.array([1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    positions = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2])
    T, params = len(segments), weights(config)
    tokens = Tokens(jnp.arange(T)[None], jnp.asarray(positions)[None], jnp.asarray(segments)[None])

    direction = np.random.default_rng(1).normal(size=config.embed_dim).astype(np.float32)

    def along(rows, t):  # each token's id is its own row of the embedding
        embed = params.embed.at[:T].set(rows)
        return forward(params.replace(embed=embed), tokens, config).hidden[0, t] @ direction

    # One gradient after another: some versions of XLA's CPU backend miscompile RMSNorm's backward
    # pass under vmap, and so jacrev.
    gradients = jax.jit(lambda x: jax.lax.map(lambda t: jax.grad(along)(x, t), jnp.arange(T)))
    influence = np.abs(gradients(params.embed[:T])).max(axis=-1)  # [t, s]

    reached = np.eye(T, dtype=bool)
    for layer in config.layers:
        window = layer.attention.window or T
        sees = [
            [segments[s] == segments[t] and s <= t and t - s < window for s in range(T)]
            for t in range(T)
        ]
        reached = np.array(sees, bool) @ reached
    np.testing.assert_array_equal(influence[~reached], 0.0)
    assert np.all(influence[reached] > 0)
    assert reached.sum() < T * T / 2


@pytest.mark.parametrize(
    ("config", "form", "policies"),
    [
        (gemma_like(3, None), lambda p: p, ("full", "matmuls", "save:query,key,attention")),
        (gemma_like(3, None), unstack, ("save:value,gate",)),
        (neox_like(), lambda p: p, ("save:up", "offload:input")),
        (gemma_like(3, None), lambda p: p, ("save:attention+offload:input,query",)),
    ],
    ids=["pattern", "unstacked", "parallel", "offload"],
)
def test_remat_changes_memory_alone(config, form, policies):
    params = form(weights(config))
    loss, gradients = loss_and_gradients(params, *BATCH, config)
    for remat in policies:
        again = loss_and_gradients(params, *BATCH, config, remat)
        np.testing.assert_allclose(again[0], loss, rtol=1e-6)
        assert_trees_close(again[1], gradients, 1e-4, 1e-4)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolled_layers_are_the_same_layers(remat):
    """Also that remat is not undone by merging both computations where there is no loop."""
    arguments = weights(CONFIGS["neox"]), *BATCH, CONFIGS["neox"]
    loss, gradients = loss_and_gradients(*arguments)
    lowered = loss_and_gradients.lower(*arguments, remat, unroll=True)
    assert "while" not in lowered.as_text()
    compiled = lowered.compile()
    again = compiled(*arguments[:-1])
    np.testing.assert_allclose(again[0], loss, rtol=1e-6)
    assert_trees_close(again[1], gradients, 1e-4, 1e-4)
    merged = loss_and_gradients.lower(*arguments, "none", unroll=True).compile()
    more_work = compiled.cost_analysis()["flops"] / merged.cost_analysis()["flops"]
    assert (more_work > 1.1) == (remat == "full")


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_remat_keeps_what_it_says(form):
    """Floats kept for the backward pass, weights left out: each policy keeps less, or some more."""
    config = gemma_like(None, None)
    params = weights(config) if form == "stacked" else unstack(weights(config))

    def kept(remat):
        def residuals(params):
            return jax.vjp(lambda p: forward(p, TOKENS, config, remat=remat).hidden, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params))
        return sum(leaf.size for leaf in leaves if leaf.dtype == jnp.float32)

    sizes = {r: kept(r) for r in ("none", "matmuls", "save:query,up", "save:up", "full")}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True), sizes
    tokens_and_layers = 2 * 12 * 2
    assert sizes["save:up"] - sizes["full"] == tokens_and_layers * 24, sizes
    assert sizes["save:query,up"] - sizes["save:up"] == tokens_and_layers * 4 * 8, sizes


def test_tokens_may_stand_in_any_order_unless_said_otherwise(config):
    """Order is a promise that `Tokens.of` makes and `Tokens` by itself does not."""
    ids, order = random_ids(1, 20), np.random.default_rng(0).permutation(20)
    in_order, params = Tokens.of(jnp.asarray(ids)), weights(config)
    shuffled = Tokens(in_order.ids[:, order], in_order.positions[:, order])
    assert in_order.in_order and not shuffled.in_order
    expected = hidden_states(params, in_order, config)[:, order]
    np.testing.assert_allclose(
        hidden_states(params, shuffled, config), expected, rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("remat", ["some", "save:", "save:query,nothing", "save:up+offload:up"])
def test_unknown_remat(remat):
    message = f"remat='{remat}' is unknown; use none, full, matmuls"
    config = CONFIGS["neox"]
    refuses(lambda: forward(weights(config), TOKENS, config, remat=remat), message)


def test_stacked_equals_unstacked(config):
    params = weights(config)
    apart = unstack(params)
    again = stack(apart, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    loss, gradients = loss_and_gradients(params, *BATCH, config)
    loss_apart, gradients_apart = loss_and_gradients(apart, *BATCH, config)
    np.testing.assert_allclose(loss_apart, loss, rtol=1e-6)
    assert_trees_close(stack(gradients_apart, config), gradients, 1e-4, 1e-4)


@jax.jit
def int8_logits(params, tokens):
    config = CONFIGS["gemma"] if params.output is None else CONFIGS["neox"]
    return make_head(params, config).logits(forward(params, tokens, config).hidden)


MATRICES = ("embed", "query", "key", "value", "attention/out", "up", "gate", "down", "output")


def quantize(params, *names: str):
    """(params with the matrices of these names as Int8, the same with their arrays)."""

    def is_named(path) -> bool:
        return any(f"/{path_name(path)}".endswith(f"/{name}") for name in names)

    def leaf(path, w):
        return Int8.quantize(w) if is_named(path) else w

    quantized = jax.tree_util.tree_map_with_path(leaf, params)
    return quantized, drawn.dequantize(quantized)


ALONE = ("embed", "value", "attention/out", "gate", "output")  # the others are of their kinds


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ALONE else pytest.mark.slow) for n in MATRICES]
)
def test_any_matrix_may_be_int8(name):
    """Through the scan: as its dequantized array, and not as the array it came from."""
    params = weights(CONFIGS["neox" if name == "output" else "gemma"])
    quantized, dense = quantize(params, name)
    logits, expected = int8_logits(quantized, TOKENS), int8_logits(dense, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - int8_logits(params, TOKENS)).max() > 1e-3


def test_int8_unstacked_and_through_a_cache(config):
    params = unstack(weights(config))
    quantized, dense = quantize(params, *MATRICES)
    # One layer keeps its arrays: what is unstacked may differ from layer to layer.
    first = dense.stacks[0].layers[0]
    mixed_stack = quantized.stacks[0].replace(layers=(first, *quantized.stacks[0].layers[1:]))
    mixed = quantized.replace(stacks=(mixed_stack, *quantized.stacks[1:]))
    expected = hidden_states(dense, TOKENS, config)
    for some in (quantized, mixed):
        np.testing.assert_allclose(hidden_states(some, TOKENS, config), expected, atol=1e-4)

    step = jax.jit(lambda params, tokens, cache: forward(params, tokens, config, cache))
    output = step(mixed, jax.tree.map(lambda x: x[:, :11], TOKENS), make_cache(config, 2, 16))
    last = step(mixed, Tokens(TOKENS.ids[:, 11:], TOKENS.positions[:, 11:]), output.cache)
    np.testing.assert_allclose(output.hidden, expected[:, :11], atol=1e-4)
    np.testing.assert_allclose(last.hidden, expected[:, 11:], atol=1e-4)

    assert jax.tree.all(jax.tree.map(np.array_equal, unstack(stack(quantized, config)), quantized))
    with pytest.raises(ValueError, match=r"stacks/0: layer \d differs from layer 0 in leaf types"):
        stack(mixed, config)


def test_initial_values_belong_to_their_path():
    """More features, the same values where the path is the same."""
    plain = make_stacks((Layer(Attention(2, 1, 4), FeedForward(8, gated=False)),) * 2)
    rich = make_stacks((Layer(Attention(2, 1, 4, bias=True, qk_norm="head"), FeedForward(8)),) * 2)
    key = jax.random.key(3)
    trees = [
        initialize(param_specs(ModelConfig(8, 8, stacks, tied=tied, vocab_multiple=8)), key)
        for stacks, tied in ((plain, True), (rich, False))
    ]
    fewer, more = (
        {path_name(path): w for path, w in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in trees
    )
    added = {name.removeprefix("stacks/0/layers/0/") for name in set(more) - set(fewer)}
    assert added == {
        "output", "feed_forward/gate", "attention/query_bias", "attention/key_bias",
        "attention/value_bias", "attention/query_norm", "attention/key_norm",
    }  # fmt: skip
    for name, value in fewer.items():
        np.testing.assert_array_equal(more[name], value, err_msg=name)
    assert not np.allclose(more["stacks/0/layers/0/feed_forward/gate"],
                           more["stacks/0/layers/0/feed_forward/up"])  # fmt: skip


def test_abstract_shardings_and_initial_weights_agree(config):
    mesh, rules = make_mesh(MeshShape(fsdp=2, tensor=2)), make_rules()
    specs = param_specs(config)
    check_layout(config, Layout(mesh, rules))
    described, placed_at = abstract(specs, rules, mesh), shardings(specs, rules, mesh)
    made = jax.eval_shape(lambda key: initialize(specs, key), jax.random.key(0))
    placed = jax.device_put(weights(config), placed_at)
    for tree in (described, placed_at, made):
        assert jax.tree.structure(tree) == jax.tree.structure(placed)
    leaves = zip(*map(jax.tree.leaves, (described, made, placed)), strict=True)
    for wanted, shape, array in leaves:
        assert (wanted.shape, wanted.dtype) == (shape.shape, shape.dtype)
        assert (wanted.shape, wanted.dtype) == (array.shape, array.dtype)
        assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim)
    embed = placed.embed.addressable_shards[0].data.shape
    assert embed == (config.padded_vocab_size // 2, config.embed_dim // 2)


def test_sizes_that_cannot_be():
    for kv_heads, words in ((3, " does not divide num_heads=8"), (0, " is not an int in [1, ")):
        refuses(lambda n=kv_heads: Attention(8, n, 16), f"num_kv_heads={kv_heads}{words}")
    config, ids = CONFIGS["neox"], jnp.zeros(3, int)
    words = "ids must be [batch, tokens], got shape (3,)"
    refuses(lambda: forward(weights(config), Tokens(ids, ids), config), words)


TWO_AXES = make_rules(zero_axes=("fsdp", "data"))


@pytest.mark.parametrize(
    ("sizes", "mesh", "rules", "message"),
    [
        ((48, 8, 8, 48, 48), MeshShape(tensor=3), make_rules(),
         "mesh axis 'tensor'=3 does not divide num_kv_heads=8; use 1, 2, 4 or 8"),
        ((48, 8, 2, 48, 48), MeshShape(tensor=4), make_rules(), "does not divide num_kv_heads=2"),
        ((48, 8, 8, 50, 48), MeshShape(tensor=4), make_rules(),
         r"0/feed_forward/up \[1, 48, 50\]: mesh axis 'tensor'=4 does not divide ffn=50; use 1, 2"),
        ((42, 8, 8, 48, 48), MeshShape(fsdp=4), make_rules(1), "'fsdp'=4 does not divide embed=42"),
        ((42, 8, 8, 48, 48), MeshShape(fsdp=4), make_rules(0), None),
        ((48, 8, 8, 48, 48), MeshShape(fsdp=2, data=4), make_rules(), None),
        ((44, 8, 8, 48, 48), MeshShape(fsdp=2, data=4), TWO_AXES, "do not divide embed=44"),
        ((48, 8, 8, 48, 50), MeshShape(tensor=4), make_rules(), r"embed \[50, 48\].*vocab=50"),
        ((48, 8, 8, 48, 48), MeshShape(stage=2), make_rules(), "'stage'=2: the model has no pipe"),
        ((48, 8, 8, 48, 48), MeshShape(expert=2), make_rules(), "'expert'=2: the model has no mix"),
    ],
)  # fmt: skip
def test_layouts_must_divide_the_model(sizes, mesh, rules, message):
    embed_dim, num_heads, num_kv_heads, hidden_dim, vocab_size = sizes
    layer = Layer(Attention(num_heads, num_kv_heads, 4), FeedForward(hidden_dim))
    config = ModelConfig(vocab_size, embed_dim, make_stacks((layer,)), vocab_multiple=1)
    layout = Layout(make_mesh(mesh), rules)
    if message is None:
        return check_layout(config, layout)
    with pytest.raises(ValueError, match=message):
        check_layout(config, layout)


def test_stages_must_divide_the_repeats():
    layer = Layer(Attention(2, 2, 4), FeedForward(16))
    layout = Layout(make_mesh(MeshShape(stage=2)), make_rules())
    four, three = (ModelConfig(48, 16, make_stacks((layer,) * n)) for n in (4, 3))
    check_layout(four, layout, pipeline=True)
    words = "'stage'=2 does not divide layers=3; use 1 or 3"
    refuses(lambda: check_layout(three, layout, pipeline=True), words)
