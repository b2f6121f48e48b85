"""Latent attention of DeepSeek-V2's head sizes compiled for TPUs: it trains, prefills, decodes."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lm.formats.families import make_config
from lm.hardware import topologies
from lm.infer.cache import make_cache
from lm.model import Latent, ModelConfig, Tokens, check_layout, forward, make_head, param_specs
from lm.model.latent import expands
from lm.model.params import unstacked_specs
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, named_sharding, use_layout
from lm.weights import abstract

pytestmark = pytest.mark.aot
HEADS, CACHED, ROWS = 16, 4096, 4


def options(topology: str) -> dict[str, Any]:
    """What makes compilers quick."""
    if topology.startswith("h200"):
        return {"xla_gpu_autotune_level": 0}
    quick: dict[str, Any] = {"exec_time_optimization_effort": -1.0}
    if topology.startswith("tpu7x"):
        # libtpu 0.0.42 aborts the process on all-reduces between two chips, compiled quickly.
        quick["xla_tpu_enable_sparse_core_collective_offload_all_reduce"] = "false"
    return quick


def model() -> ModelConfig:
    """Two layers of DeepSeek-V2 Lite's attention."""
    return make_config(
        "deepseek_v2", vocab_size=1024, embed_dim=512, hidden_dim=1024, num_layers=2,
        num_heads=HEADS, max_length=CACHED, latent=Latent(512, 128, 64, 128),
    )  # fmt: skip


def layout_of(topology: str, zero: int) -> Layout:
    if not topologies.available(topology.split(":")[0]):
        pytest.skip(f"no compiler for {topology} here; `make compilers` installs it")
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2), topologies.describe(topology))
    layout = Layout(mesh, make_rules(zero=zero))
    check_layout(model(), layout)
    return layout


def tokens_of(layout: Layout, T: int) -> Tokens:
    axes = ("batch", None)
    sharding = named_sharding(layout.mesh, layout.rules.activations, axes, (ROWS, T))
    ids = jax.ShapeDtypeStruct((ROWS, T), jnp.int32, sharding=sharding)
    return Tokens(ids, ids, in_order=True)


@functools.cache
def served(topology: str, T: int) -> Any:
    """A step of T tokens a row over a cache."""
    config, layout = model(), layout_of(topology, 0)
    rules, mesh = layout.rules, layout.mesh

    def step(params, tokens, cache):
        with use_layout(layout):
            output = forward(params, tokens, config, cache, dtype=jnp.bfloat16)
            return make_head(params, config).logits(output.hidden[:, -1:]), output.cache

    def placed(x):
        axes = ("batch", *[None] * (x.ndim - 1))
        sharding = named_sharding(mesh, rules.activations, axes, x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    cache = jax.eval_shape(lambda: make_cache(config, ROWS, CACHED, jnp.bfloat16))
    params = abstract(unstacked_specs(config), rules, mesh)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), params
    )
    arguments = params, tokens_of(layout, T), jax.tree.map(placed, cache)
    return (
        jax.jit(step, donate_argnums=2)
        .lower(*arguments)
        .compile(compiler_options=options(topology))
    )


def chips(*quick: str) -> list[Any]:
    """Topologies of four devices, those not named for the slow suite."""
    every = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:1x2x1", "h200:4")
    return [t if t in quick else pytest.param(t, marks=pytest.mark.slow) for t in every]


@pytest.mark.parametrize("topology", chips("v5e:2x2", "h200:4"))
def test_a_decoding_step_holds_no_head_of_the_cache(topology):
    """Beyond weights and cache a device holds less than one layer's keys and values would take."""
    assert not expands(1, model().layers[0].attention)
    memory = served(topology, 1).memory_analysis()
    latents = 2 * ROWS // 2 * CACHED * (512 + 64) * 2
    assert memory.alias_size_in_bytes >= latents
    expanded = ROWS // 2 * CACHED * HEADS // 2 * (128 + 64 + 128) * 2
    assert memory.temp_size_in_bytes < expanded


@pytest.mark.parametrize("T", [64, 512])
def test_prompts(T):
    """Short ones in latent space, long ones expanded, through the flash kernel."""
    assert expands(T, model().layers[0].attention) == (T == 512)
    assert ("tpu_custom_call" in served("v5e:2x2", T).as_text()) == (T == 512)


@pytest.mark.parametrize("topology", chips("v5e:2x2"))
def test_gradients_hold_no_scores(topology):
    config, layout = model(), layout_of(topology, 3)

    def loss(params, tokens, targets):
        with use_layout(layout):
            hidden = forward(params, tokens, config, dtype=jnp.bfloat16, remat="full").hidden
            return -make_head(params, config).logprobs(hidden, targets)[0].mean()

    tokens = tokens_of(layout, 768)
    arguments = abstract(param_specs(config), layout.rules, layout.mesh), tokens, tokens.ids
    compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile(compiler_options=options(topology))
    text = compiled.as_text()
    assert ("tpu_custom_call" in text) == (topology != "h200:4")
    assert not re.search(r"\[[\d,]*768,768[,\]]", text)
