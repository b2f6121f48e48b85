"""Latent attention: its two forms are one function, whatever the leaves, caches and meshes."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.formats import from_huggingface, to_huggingface
from lm.infer.cache import make_cache
from lm.infer.cache.latent import LatentCache
from lm.model import (
    Attention,
    FeedForward,
    Latent,
    Layer,
    ModelConfig,
    Rope,
    RopeScaling,
    Stack,
    Tokens,
    check_layout,
    forward,
    unstack,
)
from lm.model.latent import expands
from lm.model.params import unstacked_specs
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from lm.weights import Int8, LoRA, path_name, shardings
from tests.model import drawn
from tests.model.drawn import assert_chunks_equal_the_whole
from tests.refuses import refuses
from tests.train.tiny import Case, assert_same, run

YARN = RopeScaling("yarn", 4.0, 8, mscale=0.7, mscale_all_dim=0.4)
SIZES = Latent(kv_rank=8, nope_dim=3, rope_dim=4, value_dim=5, query_rank=6)


def model(latent: Latent = SIZES, num_heads: int = 4, **attention) -> ModelConfig:
    attention = {"rope": Rope(scaling=YARN)} | attention
    size = latent.nope_dim + latent.rope_dim
    attention = Attention(num_heads, num_heads, size, latent=latent, **attention)
    return ModelConfig(50, 16, (Stack((Layer(attention, FeedForward(24)),), 2),), vocab_multiple=8)


weights = functools.partial(drawn.weights, matrices=1.5)
CONFIGS = {
    "query latent": model(),
    "plain queries": model(dataclasses.replace(SIZES, query_rank=None), rope=Rope()),
    "windowed": model(window=3, softcap=2.0, bias=True, out_bias=True),
    "no positions": model(rope=None, scale=0.5),
}


def assert_chunks_equal(params, config: ModelConfig) -> None:
    """Ragged prompts, then chunks on either side of where the expanded form pays, then tokens."""
    widths = (10, 3, 10, 1, 1)
    chunks = zip([(9, 2, 4), (3, 1, 3), (3, 8, 9), *[(1, 1, 1)] * 2], widths, strict=True)
    cache = assert_chunks_equal_the_whole(params, config, (17, 8, 13), chunks, 20)
    attention = config.layers[0].attention
    assert [expands(width, attention) for width in widths] == [True, False, True, False, False]
    for layer in cache:
        assert isinstance(layer, LatentCache) and layer.latents.values.shape == (3, 1, 20, 8 + 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_absorbed_decode_equal_the_whole(name):
    config = CONFIGS[name]
    params = weights(config)
    assert_chunks_equal(unstack(params) if name == "windowed" else params, config)


def test_adapters_over_quantized_matrices():
    """QLoRA of every matrix: the absorbed form decodes and merges, and is the same function."""
    config = CONFIGS["query latent"]
    rng = np.random.default_rng(3)

    def leaf(path, w):
        name = path_name(path)
        if "/attention/" not in name or "norm" in name:
            return w
        *stack, rows, columns = w.shape
        a, b = (0.2 * rng.normal(size=(*stack, *s)) for s in ((rows, 2), (2, columns)))
        a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        return LoRA(Int8.quantize(jnp.asarray(w)), a, b, jnp.ones(stack))

    params = jax.tree_util.tree_map_with_path(leaf, weights(config))
    attention = params.stacks[0].layers[0].attention
    assert sum(isinstance(w, LoRA) for w in vars(attention).values()) == 5
    assert_chunks_equal(params, config)


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of every value on the way, in inner computations too."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.shape for v in equation.outvars}
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found |= shapes_in(inner) if hasattr(inner, "eqns") else set()
    return found


def test_an_absorbed_step_expands_nothing():
    """No value of a decoding step is as long as the cache and as wide as heads make it."""
    config, S = CONFIGS["query latent"], 1009
    cache = jax.eval_shape(lambda: make_cache(config, 1, S))
    params = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, weights(config)))

    def widest(T: int) -> int:
        tokens = Tokens(*[jnp.zeros((1, T), jnp.int32)] * 2)  # a chunk, not a prompt by itself
        traced = jax.make_jaxpr(lambda p, c: forward(p, tokens, config, c).hidden)(params, cache)
        return max(math.prod(s) // S for s in shapes_in(traced.jaxpr) if S in s)

    attention = config.layers[0].attention
    assert not expands(1, attention) and expands(16, attention)
    assert widest(1) == 8 + 4
    assert widest(16) >= 4 * (3 + 5)


# The batch and objective of `tests.train.tiny` want this vocabulary.
SHARDED = dataclasses.replace(
    model(Latent(16, 4, 4, 6, 24), num_heads=8), vocab_size=500, embed_dim=32, vocab_multiple=128
)
MESHES = [
    Case(MeshShape(tensor=8), config=SHARDED),
    Case(MeshShape(fsdp=4, tensor=2), sequence_parallel=True, remat="full", config=SHARDED),
]


@pytest.mark.parametrize("case", MESHES, ids=str)
def test_the_step_equals_one_device(case):
    assert_same(run(case), run(Case(config=SHARDED, loss="reference")), 2e-5)


def test_decoding_over_tensor_equals_one_device():
    config = model(Latent(16, 4, 4, 6, 24), num_heads=8)
    params = unstack(weights(config))
    layout = Layout(make_mesh(MeshShape(data=2, tensor=4)), make_rules(zero=0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 7)), jnp.int32)

    def run_two(params, layout=None):
        with use_layout(layout):
            cache = make_cache(config, 2, 16)
            output = forward(params, Tokens.of(ids[:, :-1]), config, cache)
            last = Tokens(ids[:, -1:], jnp.full((2, 1), 6, jnp.int32))
            return forward(params, last, config, output.cache).hidden

    placed_at = shardings(unstacked_specs(config), layout.rules, layout.mesh)
    placed = jax.device_put(params, placed_at)
    attention = placed.stacks[0].layers[0].attention
    assert attention.key_value_up.addressable_shards[0].data.shape == (16, 8 * (4 + 6) // 4)
    assert attention.key_value_down.addressable_shards[0].data.shape == (16, 16 + 4)
    split = jax.jit(functools.partial(run_two, layout=layout))(placed)
    np.testing.assert_allclose(split, jax.jit(run_two)(params), rtol=1e-5, atol=1e-5)


def test_layouts_must_divide_the_latents():
    split = Layout(make_mesh(MeshShape(fsdp=8)), make_rules())
    check_layout(SHARDED, split)
    for name, latent in (
        (("key_value_up ", "embed=12"), Latent(12, 4, 4, 6, 24)),
        (("query_up ", "embed=6"), Latent(16, 4, 4, 6, 6)),
    ):
        attention = model(latent, num_heads=8)
        other = dataclasses.replace(attention, vocab_size=512, embed_dim=32)
        refuses(lambda config=other: check_layout(config, split), *name, "; use 1, 2")
    tensor = Layout(make_mesh(MeshShape(tensor=8)), make_rules())
    refuses(lambda: check_layout(model(), tensor), "'tensor'=8 does not divide num_kv_heads=4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 2}, "num_kv_heads=2 does not fit latent attention .* use 4"),
        ({"head_dim": 8}, "head_dim=8 does not fit .* nope_dim=3 and rope_dim=4; use 7"),
        ({"qk_norm": "head"}, "qk_norm='head' does not fit latent attention"),
    ],
)
def test_sizes_must_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        Attention(**({"num_heads": 4, "num_kv_heads": 4, "head_dim": 7, "latent": SIZES} | changes))


# Of DeepSeek-V3's published config.json, what speaks of the shape.
V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3, "n_routed_experts": 256,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "moe_layer_freq": 1, "topk_method": "noaux_tc", "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "n_routed_experts=256 experts from layer first_k_dense_replace=3 on; .* dense"),
        ({"first_k_dense_replace": 61, "rope_interleave": False}, "'rope_interleave' is false"),
        ({"first_k_dense_replace": 61, "kv_lora_rank": 0}, "'kv_lora_rank' is 0"),
        ({"first_k_dense_replace": 61, "num_key_value_heads": 8}, "num_kv_heads=8 does not fit"),
        ({"first_k_dense_replace": 61, "kv_norm": 1}, "'kv_norm'=1, which is not supported"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        from_huggingface(V3 | changes)


@pytest.mark.parametrize("dense", [{"first_k_dense_replace": 61}, {"n_routed_experts": None}])
def test_dense_layers_are_read_and_written(dense):
    config = from_huggingface(V3 | dense)
    (layer,) = set(config.layers)
    assert layer.attention.latent == Latent(512, 128, 64, 128, 1536)
    data = to_huggingface(config)
    assert from_huggingface(data) == config
    published = {k: v for k, v in V3["rope_scaling"].items() if k != "type"}
    assert data["rope_scaling"].items() >= published.items()
    latent = dataclasses.replace(layer.attention.latent, eps=1e-5)
    attention = dataclasses.replace(layer.attention, latent=latent)
    stack = Stack((dataclasses.replace(layer, attention=attention),), 61)
    with pytest.raises(ValueError, match=r"attention/latent/eps=1e-05 .* read as 1e-06"):
        to_huggingface(dataclasses.replace(config, stacks=(stack,)))
