"""The programs of `generate` and `perplexity` compiled for TPUs: they run the kernels."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from lm.formats.families import make_config
from lm.hardware import topologies
from lm.infer.programs import CacheConfig, SamplingParams, decode, prefill
from lm.infer.score import logprobs
from lm.model.params import unstacked_specs
from lm.sharding import Layout, MeshShape, make_mesh, make_rules
from lm.weights import abstract

pytestmark = pytest.mark.aot
ROWS, T, S = 4, 256, 512
CONFIG = make_config(
    "llama", vocab_size=512, embed_dim=256, hidden_dim=512, num_layers=1, num_heads=4,
    num_kv_heads=2, max_length=S,
)  # fmt: skip


def kernels(program, *arguments) -> set[str]:
    """Names of the kernels a program calls on a TPU."""
    options = {"exec_time_optimization_effort": -1.0}
    text = program.lower(*arguments).compile(compiler_options=options).as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    known = r"flash_attention_forward|paged_attention_prefill|paged_attention_decode|write_pages"
    return {name for line in calls for name in re.findall(known, line)}


@pytest.mark.parametrize(
    ("kind", "reads", "decodes"),
    [
        ("sliding", {"flash_attention_forward"}, set()),
        (
            "paged",
            {"flash_attention_forward", "write_pages"},
            {"paged_attention_decode", "write_pages"},
        ),
    ],
)
def test_inference_on_tpus_runs_the_kernels(kind, reads, decodes):
    if not topologies.available("v5e"):
        pytest.skip("no compiler for v5e here; `make compilers` installs it")
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2), topologies.describe("v5e:2x2"))
    layout, dtype = Layout(mesh, make_rules(0)), jnp.dtype(jnp.bfloat16)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
        abstract(unstacked_specs(CONFIG), layout.rules, mesh),
    )
    ids, ints = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((ROWS, T), (ROWS,)))
    floats = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    stops = jax.ShapeDtypeStruct((ROWS, 4), jnp.int32)
    seeds = jax.ShapeDtypeStruct((ROWS,), jnp.uint32)
    sampling = SamplingParams(seeds, floats, ints, floats, floats, stops, ints)
    read = (params, ids, ints, sampling, CONFIG, layout, S, dtype, CacheConfig(kind, dtype))
    assert kernels(prefill, *read) == reads
    state = jax.eval_shape(lambda *x: prefill(*x, *read[4:]), *read[:4])
    assert kernels(decode, params, state, sampling, 1, CONFIG, layout, dtype) == decodes
    if kind == "sliding":
        assert kernels(logprobs, params, ids, CONFIG, layout, dtype) == {"flash_attention_forward"}
