"""Paged attention: the reference against plain attention, the TPU kernels against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lm.infer.cache.contiguous import Slots
from lm.kernels.paged_attention import Pages, check_tables, make_pages, quantize
from lm.kernels.paged_attention.reference import gather_pages
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from tests.kernels.calls import paged_attention, write_pages
from tests.refuses import refuses


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences with (tokens already there, new tokens), and what they are attended with."""

    sequences: tuple[tuple[int, int], ...] = ((0, 21), (37, 1), (30, 1), (3, 0), (19, 9))
    num_kv_heads: int = 2
    group: int = 2
    key_dim: int = 64
    value_dim: int = 64
    latent: bool = False
    page_size: int = 16
    dtype: str = "float32"
    page_dtype: str | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    max_q_len: int | None = None
    block_q: int | None = None
    block_kv: int | None = 32
    cores: int = 1

    @property
    def features(self):
        return {"window": self.window, "softcap": self.softcap, "max_q_len": self.max_q_len}

    @property
    def num_heads(self):
        return self.num_kv_heads * self.group

    @property
    def scale(self):
        return 1.5 * self.key_dim**-0.5


DECODE = ((37, 1), (15, 1), (0, 1), (60, 1))
CASES = {
    "mixed": Case(),
    "decode": Case(DECODE, group=4, max_q_len=1),
    "window-softcap": Case(num_kv_heads=1, window=10, softcap=2.0, block_q=4),
    "decode-window-sinks": Case(DECODE, window=17, sinks=True, max_q_len=1, group=3),
    "head128-bf16": Case(
        num_kv_heads=1, key_dim=128, value_dim=128, dtype="bfloat16", block_q=8, block_kv=48
    ),
    "two-cores": Case(((0, 9), (30, 1), (3, 0), (19, 2), (5, 1), (4, 4)), block_q=4, cores=2),
    "many-heads": Case(DECODE[:2], num_kv_heads=10, group=1, key_dim=32, value_dim=48, max_q_len=1),
    "latent": Case(num_kv_heads=1, group=4, key_dim=48, value_dim=32, latent=True, block_q=8),
    "int8": Case(
        ((0, 5), (130, 1), (100, 40)), num_kv_heads=1, page_dtype="int8", page_size=128,
        block_kv=128,
    ),
    "fp8-head128": Case(
        ((0, 1), (200, 1)), num_kv_heads=1, key_dim=128, value_dim=128,
        page_dtype="float8_e4m3fn", page_size=128, max_q_len=1, block_kv=256,
    ),
    "latent-int8": Case(
        ((128, 1), (140, 3)), num_kv_heads=1, group=4, key_dim=192, value_dim=128, latent=True,
        page_dtype="int8", page_size=128, block_kv=128,
    ),
}  # fmt: skip


SLOW = ("decode", "two-cores", "many-heads", "latent")
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]


@dataclasses.dataclass
class Drawn:
    """A case's values; keys and values [row][position, K, h] are all of a sequence's."""

    case: Case
    q: jax.Array
    keys: list[np.ndarray]
    values: list[np.ndarray]
    table: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    sinks: jax.Array | None
    empty: Pages

    @property
    def tables(self):
        return self.table, self.kv_lens, self.cu_q_lens

    def new(self):
        """Keys and values of the new tokens, [N, K, h]."""
        parts = [slice(a, a + n) for a, n in self.case.sequences]
        keys, values = (
            jnp.asarray(np.concatenate([x[part] for x, part in zip(xs, parts, strict=True)]))
            for xs in (self.keys, self.values)
        )
        return keys, None if self.case.latent else values

    def pages(self, with_new: bool) -> Pages:
        """The pages after the new tokens or before them, filled here; elsewhere they are NaN."""
        case, empty = self.case, self.empty
        data = np.full(empty.data.shape, np.nan if empty.scales is None else 1, empty.data.dtype)
        scales = None if empty.scales is None else np.full(empty.scales.shape, np.nan, np.float32)
        for row, (start, new) in enumerate(case.sequences):
            keys, values = self.keys[row], self.values[row]
            lanes = np.zeros((len(keys), case.num_kv_heads, data.shape[-1]), np.float32)
            if not case.latent:
                lanes[..., case.key_dim : case.key_dim + case.value_dim] = values
            lanes[..., : case.key_dim] = keys
            for position in range(start + new if with_new else start):
                page = self.table[row, position // case.page_size]
                slot, token = position % case.page_size, lanes[position]
                if scales is not None:
                    for i, half in enumerate((slice(0, empty.split), slice(empty.split, None))):
                        part, scale = quantize(token[:, half], data.dtype)
                        data[page, :, slot, half], scales[page, i, :, slot] = part, scale
                else:
                    data[page, :, slot] = token.astype(data.dtype)
        return dataclasses.replace(
            empty, data=jnp.asarray(data), scales=None if scales is None else jnp.asarray(scales)
        )


def int32(x):
    return jnp.asarray(x, jnp.int32)


def drawn(case: Case, seed: int = 0) -> Drawn:
    rng = np.random.default_rng(seed)
    lens = np.array([a + n for a, n in case.sequences])
    new = np.array([n for _, n in case.sequences])
    M = -(-lens.max() // case.page_size) + 1
    pool = len(lens) * M + 3
    K, H = case.num_kv_heads, case.num_heads
    keys, values = (
        [rng.normal(size=(n, K, h)).astype(case.dtype).astype(np.float32) for n in lens]
        for h in (case.key_dim, case.value_dim)
    )
    if case.latent:
        values = [k[..., : case.value_dim] for k in keys]
    q = rng.normal(size=(new.sum() + 2, H, case.key_dim))
    dtype = case.page_dtype or case.dtype
    empty = make_pages(
        int(pool), case.page_size, K, case.key_dim, case.value_dim, latent=case.latent, dtype=dtype
    )
    return Drawn(
        case, jnp.asarray(q, case.dtype), keys, values,
        int32(rng.permutation(pool)[: len(lens) * M].reshape(len(lens), M)), int32(lens),
        int32(np.concatenate([[0], np.cumsum(new)])),
        jnp.asarray(rng.normal(size=H), jnp.float32) if case.sinks else None, empty,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("max_q_len", "implementation"))
def write(implementation, max_q_len, pages, keys, values, table, lens, cu, q_lens=None):
    return write_pages(
        pages, keys, values, table, lens, cu, q_lens=q_lens, max_q_len=max_q_len,
        implementation=implementation, interpret=True,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("case", "implementation"))
def attend(case: Case, implementation, q, pages, table, kv_lens, cu_q_lens, sinks):
    blocks = {"block_kv": case.block_kv, "cores": case.cores}
    if case.block_q is not None:
        blocks["block_q"] = case.block_q
    return paged_attention(
        q, pages, table, kv_lens, cu_q_lens, scale=case.scale, sinks=sinks,
        implementation=implementation, interpret=True, **case.features, **blocks,
    )  # fmt: skip


def plain(d: Drawn) -> np.ndarray:
    """The formula in float64, token by token."""
    case, outs = d.case, []
    q = np.asarray(d.q.astype(jnp.float32), np.float64)
    q = q.reshape(len(q), case.num_kv_heads, case.group, case.key_dim)
    for row, (start, new) in enumerate(case.sequences):
        for i in range(new):
            stop = start + i + 1
            seen = slice(max(0, stop - (case.window or stop)), stop)
            scores = np.einsum("kgh,skh->kgs", q[len(outs)], d.keys[row][seen]) * case.scale
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            weights = np.exp(scores)
            total = weights.sum(axis=-1, keepdims=True)
            if d.sinks is not None:
                total += np.exp(np.asarray(d.sinks).reshape(case.num_kv_heads, case.group, 1))
            out = np.einsum("kgs,skh->kgh", weights / total, d.values[row][seen])
            outs.append(out.reshape(case.num_heads, case.value_dim))
    return np.stack(outs)


# Largest difference from attention over the exact keys and values, which are normal and of size 1.
ERRORS = {None: 3e-6, "int8": 0.03, "float8_e4m3fn": 0.12}


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_the_formula(name):
    d = drawn(CASES[name])
    out = attend(d.case, "reference", d.q, d.pages(True), *d.tables, d.sinks)
    expected = plain(d)
    atol = 0.02 if d.case.dtype == "bfloat16" else ERRORS[d.case.page_dtype]
    np.testing.assert_allclose(out[: len(expected)], expected, atol=atol)
    assert not np.any(out[len(expected) :])


@pytest.mark.parametrize("implementation", ["reference", "tpu"])
@pytest.mark.parametrize("name", ["mixed", "decode", "head128-bf16", "latent-int8"])
def test_new_tokens_are_written_and_nothing_else(name, implementation):
    d = drawn(CASES[name])
    pages = write(implementation, d.case.max_q_len, d.pages(False), *d.new(), *d.tables)
    for one, other in zip(jax.tree.leaves(pages), jax.tree.leaves(d.pages(True)), strict=True):
        if one.dtype == jnp.int8:  # the last bit of a scale may round a value otherwise
            assert np.abs(one.astype(np.int32) - other.astype(np.int32)).max() <= 1
        else:
            one, other = (x.astype(np.float32) for x in (one, other))
            np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_tpu_kernel_equals_the_reference(name):
    d = drawn(CASES[name])
    pages = d.pages(True)
    out, expected = (
        attend(d.case, implementation, d.q, pages, *d.tables, d.sinks).astype(np.float32)
        for implementation in ("tpu", "reference")
    )
    tolerance = 0.02 if d.case.dtype == "bfloat16" else 3e-6
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


def test_bfloat16_is_as_near_to_exact_as_the_reference():
    """Accumulated in float32: rounding of inputs and output only."""
    d = drawn(CASES["head128-bf16"])
    pages, expected = d.pages(True), plain(d)
    errors = {}
    for implementation in ("tpu", "reference"):
        out = attend(d.case, implementation, d.q, pages, *d.tables, d.sinks)
        errors[implementation] = np.abs(out[: len(expected)].astype(np.float32) - expected).max()
    assert errors["tpu"] < 1.2 * errors["reference"] < 0.02


RACES = {
    "small": Case(((20, 1), (5, 3)), page_size=8, block_kv=16, num_kv_heads=1),
    "latent-int8": CASES["latent-int8"],
}


@pytest.mark.parametrize("name", ["small", pytest.param("latent-int8", marks=pytest.mark.slow)])
def test_no_copy_races_with_another(name, capfd):
    """Copies, semaphores and memory simulated: nothing is read before it has come."""
    d = drawn(RACES[name])
    simulate = pltpu.InterpretParams(detect_races=True)
    pages = write_pages(
        d.pages(False), *d.new(), *d.tables, implementation="tpu", interpret=simulate
    )
    out = paged_attention(
        d.q, pages, *d.tables, scale=d.case.scale, implementation="tpu", interpret=simulate,
        block_kv=d.case.block_kv, block_q=8,
    )  # fmt: skip
    expected = attend(d.case, "reference", d.q, pages, *d.tables, d.sinks)
    np.testing.assert_allclose(out, expected, rtol=3e-6, atol=3e-6)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_pages_before_the_window_may_be_gone():
    d = drawn(CASES["decode-window-sinks"])
    expected = attend(d.case, "tpu", d.q, d.pages(True), *d.tables, d.sinks)
    behind = (d.kv_lens - d.case.window) // d.case.page_size
    table = jnp.where(jnp.arange(d.table.shape[1]) < behind[:, None], -1, d.table)
    assert np.sum(table < 0) > 2
    out = attend(d.case, "tpu", d.q, d.pages(True), table, *d.tables[1:], d.sinks)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("implementation", ["reference", "tpu"])
def test_padding_and_positions_without_a_page_are_written_nowhere(implementation):
    d = drawn(Case(((0, 16), (0, 40))))
    pages = dataclasses.replace(d.empty, data=jnp.zeros_like(d.empty.data))
    table = d.table.at[0, 0].set(-1).at[1, 1].set(-1)
    lens = d.kv_lens - int32([0, 1])
    pages = write(implementation, None, pages, *d.new(), table, lens, d.cu_q_lens, q_lens=lens)
    written = np.asarray(jnp.any(pages.data != 0, axis=(1, 3)))
    expected = np.zeros(written.shape, bool)
    expected[table[1, 0]] = True
    expected[table[1, 2], :7] = True
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("name", ["mixed", pytest.param("latent", marks=pytest.mark.slow)])
def test_sharded_heads_equal_one_device(name):
    case = dataclasses.replace(CASES[name], sinks=True)
    d = drawn(case)
    layout = Layout(make_mesh(MeshShape(fsdp=2, tensor=2), jax.devices()[:4]), make_rules())

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(keys, values, q, implementation=None):
        with use_layout(layout):
            how = {"implementation": implementation, "interpret": True}
            pages = write_pages(before, keys, values, *d.tables, **how)
            return paged_attention(q, pages, *d.tables, scale=case.scale, sinks=d.sinks, **how)

    before = d.pages(False)
    expected = attend(case, "reference", d.q, d.pages(True), *d.tables, d.sinks)
    for implementation in ("tpu", None):
        out = run(*d.new(), d.q, implementation)
        np.testing.assert_allclose(out, expected, rtol=3e-6, atol=3e-6)


def test_heads_that_the_mesh_does_not_divide_are_refused():
    d = drawn(Case(num_kv_heads=6, group=1))
    layout = Layout(make_mesh(MeshShape(tensor=4), jax.devices()[:4]), make_rules())
    call = functools.partial(paged_attention, d.q, d.empty, *d.tables, implementation="tpu")
    with use_layout(layout):
        refuses(call, "'tensor'=4 does not divide num_kv_heads=6; use 1, 2, 3")


def test_quantization_error_is_half_a_step():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3, 64)), jnp.float32).at[0].set(0)
    values, scales = quantize(x, jnp.int8)
    error = jnp.abs(values * scales[..., None] - x)
    assert jnp.all(error <= 0.5001 * scales[..., None])
    assert jnp.max(jnp.abs(values)) == 127
    values, scales = quantize(x, jnp.float8_e4m3fn)
    error = jnp.abs(values.astype(jnp.float32) * scales[..., None] - x)
    smallest = 2.0**-10 * scales[..., None]  # half the spacing of subnormal numbers
    assert jnp.all(error <= jnp.maximum(jnp.abs(x) / 16, 1.001 * smallest))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", ["slots", "pages"])
def test_dequantized_values_are_rounded_once(kind, dtype):
    """Within half a unit in the last of bfloat16's eight bits of the exact product."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 256, 2, 64)), jnp.float32)
    if kind == "slots":
        slots = Slots.empty((1, 2, 256, 64), dtype).write(x, jnp.arange(256)[None])
        values, scales, read = slots.values, slots.scales, slots.read(jnp.bfloat16)
    else:
        pages, table = make_pages(2, 128, 2, 64, dtype=dtype), int32([[1, 0]])
        pages = write_pages(pages, x[0], x[0], table, int32([256]), int32([0, 256]))
        values = pages.data[table[0], :, :, :64].swapaxes(1, 2)
        scales = pages.scales[table[0], 0].swapaxes(1, 2)
        read = gather_pages(pages, table, jnp.bfloat16)[..., :64].swapaxes(1, 2)
    values, scales, read = (
        np.asarray(a, np.float32).astype(np.float64) for a in (values, scales, read)
    )
    exact = values * scales[..., None]
    read = read.reshape(exact.shape)
    half = 2.0 ** (np.frexp(exact)[1] - 9)
    assert np.all(np.abs(read - exact) <= 1.0001 * half)


@pytest.mark.parametrize(
    ("table", "lens", "words"),
    [
        ([[0, 1, 2], [3, 9, 9]], [48, 17], "page_table[1, 1]=9 is not a page; there are 0..3"),
        ([[0, 1, -1], [3, 9, 9]], [48, 16], "page_table[0, 2]=-1 is not a page"),
        ([[0, 1, 2], [3, 9, 9]], [49, 17], "kv_lens[0]=49 is outside 0..48, what 3 pages of 16"),
        ([[0, 1, 2], [3, 9, 9]], [1, -1], "kv_lens[1]=-1 is outside"),
        ([0, 1, 2], [48, 16], "give [B, M] and [B]"),
    ],
)
def test_hostile_tables_are_refused(table, lens, words):
    check_tables(np.array([[0, 1, 2], [3, 9, 9]]), np.array([48, 16]), 4, 16)
    refuses(lambda: check_tables(np.array(table), np.array(lens), 4, 16), words)


def call(name: str, **change):
    """`write_pages` or `paged_attention` of two sequences, some arguments changed."""
    given = {
        "x": jnp.zeros((4, 4 if name == "attend" else 2, 64)), "values": jnp.zeros((4, 2, 64)),
        "pages": make_pages(4, 16, 2, 64), "page_table": int32(np.zeros((2, 3))),
        "kv_lens": int32([0, 0]), "cu_q_lens": int32([0, 0, 0]), "implementation": "tpu",
    } | change  # fmt: skip
    x, values, pages = (given.pop(key) for key in ("x", "values", "pages"))
    if name == "attend":
        return paged_attention(x, pages, **given)
    return write_pages(pages, x, values, **given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": jnp.zeros((4, 4, 32))}, ["q is [tokens, heads, 64]"]),
        ({"x": jnp.zeros((4, 5, 64))}, ["num_kv_heads=2 of the pages does not divide num_heads=5"]),
        ({"causal": False}, ["paged attention is causal; give Scores with causal=True"]),
        ({"sinks": jnp.zeros(2)}, ["sinks has shape (2,); give one per query head, [4]"]),
        ({"implementation": "paged"}, ["'paged' is unknown; use reference, tpu"]),
        ({"pages": make_pages(4, 8, 2, 64)}, ["page_size=8 of bfloat16", "multiple of 16"]),
        ({"pages": make_pages(4, 64, 2, 64, dtype="int8")}, ["page_size=64 of int8", "of 128"]),
        ({"pages": make_pages(1, 32768, 2, 64)}, ["use pages of 8192"]),
        ({"page_table": int32(np.zeros((2, 100_001)))}, ["scalar memory holds", "pages of 32"]),
    ],
)
def test_bad_arguments_are_refused(change, words):
    refuses(lambda: call("attend", **change), *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_table": int32([0, 0])}, ["page_table (2,), ", "give [B, M]"]),
        ({"kv_lens": int32([[0], [0]])}, ["kv_lens (2, 1), ", "give [B, M], [B]"]),
        ({"kv_lens": jnp.zeros(2)}, ["kv_lens is float32; give int32"]),
        ({"cu_q_lens": int32([0, 0])}, ["cu_q_lens (2,); give", "[B + 1] of one B"]),
        ({"q_lens": int32([0, 0, 0])}, ["q_lens has shape (3,); give one per sequence, [2]"]),
    ],
)
def test_sequences_that_disagree_are_refused(change, words):
    for name in ("attend", "write"):
        refuses(lambda name=name: call(name, **change), *words)


def test_bad_pages_are_refused():
    refuses(lambda: make_pages(4, 0, 2, 64), "page_size=0; use 1 or more")
    refuses(lambda: make_pages(4, 16, 2, 64, 32, latent=True), "latent attention has one head")
    refuses(lambda: call("write", values=None), "are [tokens, 2, 128] for these pages")
    wrong = jnp.zeros((3, 2, 64))
    refuses(lambda: call("write", values=wrong), "keys (4, 2, 64) and values (3, 2, 64); give")
