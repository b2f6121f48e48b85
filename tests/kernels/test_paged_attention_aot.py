"""Sizes of the paged attention kernel's blocks, and the kernel compiled for every TPU."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.hardware import topologies
from lm.kernels.paged_attention import make_pages
from lm.kernels.paged_attention.tpu_blocks import choose_blocks, shape_of
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from tests.kernels.calls import paged_attention, write_pages


def blocks(chip, heads, group, likely, *, head=128, dtype="bfloat16", q_dtype="bfloat16", **given):
    """(block_q, keys of a block) chosen, and the VMEM they need in MiB."""
    pages = jax.eval_shape(lambda: make_pages(2, 64, heads, head, dtype=dtype))
    q = jax.ShapeDtypeStruct((1, heads * group, head), jnp.dtype(q_dtype))
    shape = shape_of(pages, q, False)
    query, num_pages = choose_blocks(shape, chip, 128, likely=likely, **given)
    return (query, 64 * num_pages), shape.vmem(query, num_pages) / 2**20


@pytest.mark.parametrize(
    ("chip", "heads", "group", "likely", "expected"),
    [
        ("TPU v5e", 8, 4, 1, (1, 512)),
        ("TPU v4", 8, 4, 1, (1, 512)),
        (None, 1, 8, 1, (1, 1024)),
        (None, 40, 1, 1, (1, 64)),
        ("TPU v5e", 8, 4, 2048, (128, 512)),
        ("TPU v5e", 8, 4, 9, (16, 512)),
        ("TPU v5e", 40, 1, 2048, (512, 64)),
        ("TPU v5p", 40, 1, 2048, (512, 64)),
        ("TPU v5p", 64, 1, 2048, (256, 64)),
        ("TPU v4", 8, 4, 2048, (128, 256)),
        ("TPU v4", 40, 1, 2048, (64, 64)),
    ],
)
def test_blocks_are_the_largest_that_fit(chip, heads, group, likely, expected):
    chosen, vmem = blocks(chip, heads, group, likely)
    assert chosen == expected
    assert vmem <= 15 / 16 * {"TPU v5e": 128, "TPU v5p": 64}.get(chip, 16)


def test_vmem_is_what_the_compiler_needs():
    """Of 8 heads, 512 rows and keys of 128 lanes: 16.51 MiB for v4; of 32, with 128 keys, 45.07."""
    given = {"block_q": 128, "block_kv": 512}
    assert blocks("TPU v5e", 8, 4, 2048, **given)[1] == pytest.approx(16.51, rel=0.15)
    given = {"block_q": 512, "block_kv": 128}
    assert blocks("TPU v5e", 32, 1, 2048, **given)[1] == pytest.approx(45.07, rel=0.05)


def test_blocks_that_fit_nowhere_are_refused():
    with pytest.raises(ValueError, match=r"block_q=128 and block_kv=512 needs 18.* TPU v4 has 15"):
        blocks("TPU v4", 8, 4, 2048, block_q=128, block_kv=512)
    with pytest.raises(ValueError, match=r"128 key/value heads .* split the heads"):
        blocks(None, 128, 1, 2048, q_dtype="float32", dtype="float32")


@dataclasses.dataclass(frozen=True)
class Program:
    """Shapes to compile for: sequences x context, heads as in published models."""

    num_sequences: int = 64
    num_tokens: int = 64
    num_kv_heads: int = 8
    group: int = 4
    key_dim: int = 128
    value_dim: int = 128
    latent: bool = False
    page_size: int = 64
    page_dtype: str = "bfloat16"
    context: int = 8192
    window: int | None = None
    softcap: float | None = None
    max_q_len: int | None = 1


LLAMA_8B = Program()
PREFILL = {"num_sequences": 16, "num_tokens": 2048}
LLAMA_13B = Program(num_kv_heads=40, group=1, max_q_len=2048, **PREFILL)
PROGRAMS = {
    "decode": Program(page_size=16),
    "mixed": Program(num_sequences=16, num_tokens=256, context=2048, max_q_len=None),
    "latent": Program(
        num_kv_heads=1, group=16, key_dim=576, value_dim=512, latent=True, context=4096
    ),
    "int8": Program(page_dtype="int8", page_size=128),
    "fp8": Program(page_dtype="float8_e4m3fn", page_size=128),
    "llama-13b-prefill": LLAMA_13B,
    "head64": Program(key_dim=64, value_dim=64),
    "head256-window-softcap": Program(
        group=2, num_kv_heads=4, key_dim=256, value_dim=256, window=4096, softcap=50.0
    ),
    "head80-mha": Program(
        num_sequences=16, num_kv_heads=32, group=1, key_dim=80, value_dim=80, page_size=16
    ),
    "latent-int8": Program(
        num_kv_heads=1, group=128, key_dim=576, value_dim=512, latent=True, page_dtype="int8",
        page_size=128,
    ),
    "latent-mixed": Program(
        num_kv_heads=1, group=16, key_dim=576, value_dim=512, latent=True, num_tokens=1024,
        max_q_len=None,
    ),
    "mixed-8k": Program(num_tokens=2048, max_q_len=None),
    "largest-table": Program(page_size=16, context=16 * 200_000 // 64),
    "llama-13b-mixed": Program(num_kv_heads=40, group=1, max_q_len=None, **PREFILL),
    "mha64-prefill": Program(num_kv_heads=64, group=1, max_q_len=2048, **PREFILL),
    "mha32-prefill": Program(num_kv_heads=32, group=1, max_q_len=2048, **PREFILL),
    "gqa-prefill": Program(max_q_len=2048, **PREFILL),
    "mha40-int8-prefill": Program(
        num_kv_heads=40, group=1, page_dtype="int8", page_size=128, max_q_len=2048, **PREFILL
    ),
}  # fmt: skip


def compiled(program: Program, topology: str, tensor: int = 1):
    """Writing and attending, for a topology's devices; (program, bytes of the pages)."""
    mesh = make_mesh(MeshShape(tensor=tensor), topologies.describe(topology)[:tensor])
    layout = Layout(mesh, make_rules())
    B, N, K, H = (
        program.num_sequences, program.num_tokens, program.num_kv_heads,
        program.num_kv_heads * program.group,
    )  # fmt: skip
    M = program.context // program.page_size
    pages = jax.eval_shape(
        lambda: make_pages(
            min(B * M, 32768), program.page_size, K, program.key_dim, program.value_dim,
            latent=program.latent, dtype=program.page_dtype,
        )
    )  # fmt: skip

    def abstract(shape, dtype=jnp.int32, spec=()):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def run(pages, q, keys, values, table, kv_lens, cu):
        with use_layout(layout):
            how = {"max_q_len": program.max_q_len}
            values = None if program.latent else values
            pages = write_pages(pages, keys, values, table, kv_lens, cu, **how)
            how |= {"window": program.window, "softcap": program.softcap}
            return pages, paged_attention(q, pages, table, kv_lens, cu, scale=0.1, **how)

    heads = (None, "tensor")
    kv = heads if K > 1 else ()
    page_specs = dataclasses.replace(
        pages,
        data=abstract(pages.data.shape, pages.data.dtype, kv),
        scales=None if pages.scales is None else abstract(
            pages.scales.shape, pages.scales.dtype, (None, *kv)
        ),
    )  # fmt: skip
    with jax.set_mesh(mesh):  # which chip a kernel is lowered for
        lowered = jax.jit(run, donate_argnums=0).lower(
            page_specs,
            abstract((N, H, program.key_dim), jnp.bfloat16, heads),
            abstract((N, K, program.key_dim), jnp.bfloat16, kv),
            abstract((N, K, program.value_dim), jnp.bfloat16, kv),
            abstract((B, M)), abstract((B,)), abstract((B + 1,)),
        )  # fmt: skip
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
    return lowered.compile({"exec_time_optimization_effort": -1.0}), size


def check_compiles(program: Program, topology: str, tensor: int = 1) -> None:
    if not topologies.available(topology.split(":")[0]):
        pytest.skip("compiling for TPUs needs libtpu; `make compilers` installs it")
    executable, size = compiled(program, topology, tensor)
    text = executable.as_text()
    calls = text.count('custom_call_target="tpu_custom_call"')
    assert calls == (2 if program.max_q_len == 1 else 3)
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= size / (tensor if program.num_kv_heads > 1 else 1)
    assert memory.temp_size_in_bytes < 0.5 * size / tensor, "the pool is copied"
    if tensor > 1:
        assert "all-gather" not in text and "all-reduce" not in text


@pytest.mark.aot
def test_compiles_for_split_heads():
    check_compiles(LLAMA_8B, "v5e:2x2", tensor=4)


TOPOLOGIES = ("v4:1x1x1", "v5p:1x1x1", "tpu7x:1x1x1", "v5e:1x1", "v6e:1x1")
DRAWN = {
    ("decode", "v6e:1x1"), ("mixed", "v5e:1x1"), ("latent", "v5e:1x1"), ("int8", "v6e:1x1"),
    ("fp8", "v5e:1x1"), ("llama-13b-prefill", "v4:1x1x1"),  # that of the least memory
}  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        pytest.param(*pair, marks=() if pair in DRAWN else pytest.mark.slow)
        for pair in itertools.product(PROGRAMS, TOPOLOGIES)
    ],
)
def test_compiles_without_a_copy_of_the_pages(name, topology):
    check_compiles(PROGRAMS[name], topology)
