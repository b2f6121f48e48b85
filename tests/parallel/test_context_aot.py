"""Ring attention and Ulysses compiled for TPU pods: who sends what to whom, and what is held."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lm.hardware import topologies
from lm.hardware.hlo import arrays, parse
from lm.hardware.hlo_cost import program_cost
from lm.kernels.attention import Scores, View
from lm.parallel import ring_attention, ulysses_attention
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, named_sharding, use_layout

pytestmark = pytest.mark.aot
# Asked before JAX starts: it looks for GPU compilers only then.
HERE = {chip: topologies.available(chip) for chip in (*topologies.TPUS, *topologies.GPUS)}
HEAD = 128
MIB = 1 << 20
QUICK = {"exec_time_optimization_effort": -1.0}


@functools.cache
def compiled(
    way: str, topology: str, context: int, length: int, num_heads: int, num_kv_heads: int,
    quick: bool = True, implementation: str | None = None,
) -> Any:  # fmt: skip
    """Attention and its gradients, packed, bfloat16, one row for each device of `data`."""
    if not HERE[topology.split(":")[0]]:
        pytest.skip(f"no compiler for {topology} here; `make compilers` installs it")
    mesh = make_mesh(MeshShape(data=-1, context=context), topologies.describe(topology))
    layout = Layout(mesh, make_rules())
    rows = mesh.shape["data"]

    def function(q, k, v, dout, positions, segments):
        with use_layout(layout):
            view = View(positions, positions, segments, segments, in_order=way != "zigzag")
            attend = ulysses_attention if way == "ulysses" else ring_attention
            options = {"scores": Scores(0.1), "implementation": implementation}
            out, pull = jax.vjp(lambda *qkv: attend(*qkv, view, **options), q, k, v)
            return out, pull(dout)

    def array(dtype: Any, *dims: Any) -> jax.ShapeDtypeStruct:
        shape, axes = zip(*((rows, "batch"), (length, "sequence"), *dims), strict=True)
        sharding = named_sharding(mesh, layout.rules.activations, axes, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q = array(jnp.bfloat16, (num_heads, "heads"), (HEAD, None))
    k = array(jnp.bfloat16, (num_kv_heads, "kv_heads"), (HEAD, None))
    tokens = array(jnp.int32)
    lowered = jax.jit(function).lower(q, k, k, q, tokens, tokens)
    options: Any = {"xla_gpu_autotune_level": 0} if "h200" in topology else QUICK
    return lowered.compile(compiler_options=options if quick else None), mesh


def check_ring(
    program: Any, mesh: Any, context: int, length: int, H: int, K: int, scores: int = 0
) -> None:
    """Keys and values, with positions and segments, travel as `lm.parallel.context` says."""
    found = program_cost(program.as_text(), mesh)
    assert {(c.op, c.axes) for c in found.collectives} == {("collective-permute", ("context",))}
    chunk = length // context
    keys = 2 * chunk * K * HEAD
    # There and back; their gradients in float32, but for the last step home.
    expected = (context - 1) * 2 * (keys * 2 + 2 * chunk * 4)
    expected += (context - 1) * keys * 4 + keys * 2
    assert expected <= found.wire_bytes <= 1.01 * (expected + 2 * keys)
    # Nothing held is larger than the queries' own gradient in float32, or a pair of parts' scores.
    computations, _ = parse(program.as_text())
    largest = max(
        array.bytes
        for computation in computations.values()
        for instruction in computation.instructions.values()
        for array in arrays(instruction.type)
    )
    assert largest <= max(4 * chunk * H * HEAD, scores)


@pytest.mark.parametrize(
    "topology",
    ["v5e:2x2", *(pytest.param(t, marks=pytest.mark.slow) for t in
      ("h200:4", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x1x1"))],
)  # fmt: skip
def test_a_ring_sends_keys_round_and_gathers_nothing(topology):
    # As many heads of keys as of queries: all chunks together would be larger than anything held.
    program, mesh = compiled("zigzag", topology, 4, 16384, 8, 8)
    plain = "h200" in topology
    check_ring(program, mesh, 4, 16384, 8, 8, scores=4 * 8 * 1024**2 if plain else 0)
    assert plain or "flash_attention_forward" in program.as_text()


def test_a_ring_of_hopper_kernels_sends_the_same():
    program, mesh = compiled("zigzag", "h200:4", 4, 16384, 8, 8, implementation="mosaic_gpu")
    check_ring(program, mesh, 4, 16384, 8, 8)
    assert "mosaic_gpu" in program.as_text()


@pytest.mark.parametrize("implementation", ["splash", "blocked", "cudnn"])
def test_a_ring_of_what_cannot_be_merged_is_refused(implementation):
    with pytest.raises(ValueError, match=f"'{implementation}' does not give the log-sum-exp"):
        compiled("zigzag", "h200:4", 4, 16384, 8, 8, implementation=implementation)


def test_ulysses_exchanges_heads_for_rows():
    context, length, H, K = 4, 8192, 16, 4
    program, mesh = compiled("ulysses", "v6e:2x2", context, length, H, K)
    found = program_cost(program.as_text(), mesh)
    talk = [c for c in found.collectives if c.axes]
    assert {c.axes for c in talk} == {("context",)}
    wire = {c.op: c.wire_bytes for c in talk}
    # q, k, v and the result, then their gradients, in bfloat16.
    expected = (context - 1) / context * length // context * HEAD * 2 * 4 * (H + K)
    assert wire.pop("all-to-all") == pytest.approx(expected, rel=0.01)
    assert wire.pop("all-gather") <= 2 * 4 * length  # positions and segments
    assert not wire


@pytest.mark.slow
def test_a_chunk_travels_while_another_is_computed():
    """As the compiler orders the loops at its full effort: sends begin before the kernels' loop."""
    program, _ = compiled("zigzag", "v5e:2x2", 4, 16384, 8, 8, quick=False)
    computations, _ = parse(program.as_text())
    overlapping = 0
    for computation in computations.values():
        ops = [i.op for i in computation.instructions.values()]
        if "collective-permute-start" in ops and "while" in ops and "parameter" in ops:
            before = ops[: ops.index("while")].count("collective-permute-start")
            overlapping += before - ops[: ops.index("while")].count("collective-permute-done") >= 4
    assert overlapping >= 2  # the loops of both rings


@pytest.mark.slow
def test_what_is_held_does_not_grow_with_the_ring():
    """As many tokens on a device, of rows of 8 or of 64 devices."""
    held = [
        compiled("zigzag", "v5p:4x4x4", n, n * 4096, 8, 8)[0].memory_analysis().temp_size_in_bytes
        for n in (8, 64)
    ]
    assert held[1] < 1.02 * held[0]


@pytest.mark.slow
def test_a_million_tokens_of_llama_3_8b():
    """One layer's attention over 1,048,576 tokens on 64 chips, forward and backward."""
    program, mesh = compiled("zigzag", "v5p:4x4x4", 64, 1 << 20, 32, 8)
    check_ring(program, mesh, 64, 1 << 20, 32, 8)
    temporary = program.memory_analysis().temp_size_in_bytes
    print(f"1M tokens, one layer of Llama 3 8B: {temporary / MIB:.0f} MiB beside its operands")
    assert temporary < 2200 * MIB
