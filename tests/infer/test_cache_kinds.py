"""Sliding, paged and quantized caches: chunks through them equal attention over whole rows."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.hardware import topologies
from lm.infer.cache import (
    OutOfPages,
    PageAllocator,
    PagedCache,
    SlidingCache,
    copy_pages,
    in_pages,
    make_cache,
    make_page_table,
    own_page_table,
)
from lm.infer.generate import LocalSampler
from lm.infer.requests import Request
from lm.kernels.attention import View, reference_attention
from lm.model import (
    Attention,
    FeedForward,
    Latent,
    Layer,
    ModelConfig,
    Tokens,
    forward,
    make_stacks,
    param_specs,
)
from lm.model.decoder import scores_of
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, named_sharding, use_layout
from lm.weights import abstract, is_spec
from tests.model.drawn import chunk_of, config_of, weights
from tests.refuses import refuses

LENGTHS = (43, 20, 31)
WINDOW = 6
GLOBAL = Attention(4, 2, 16, softcap=5.0)
LOCAL = dataclasses.replace(GLOBAL, window=WINDOW)
LATENT = Attention(4, 4, 24, latent=Latent(kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16))

# (attention, kind, dtype) -> largest error; keys and values are normal and of size 1.
KINDS = {
    "contiguous": (GLOBAL, "contiguous", "float32", 1e-5),
    "contiguous-int8": (GLOBAL, "contiguous", "int8", 0.04),
    "contiguous-fp8": (GLOBAL, "contiguous", "float8_e4m3fn", 0.15),
    "sliding": (LOCAL, "sliding", "float32", 1e-5),
    "sliding-int8": (LOCAL, "sliding", "int8", 0.04),
    "paged": (GLOBAL, "paged", "float32", 1e-5),
    "paged-window": (LOCAL, "paged", "float32", 1e-5),
    "paged-int8": (GLOBAL, "paged", "int8", 0.04),
    "paged-fp8": (GLOBAL, "paged", "float8_e4m3fn", 0.15),
    "paged-latent": (LATENT, "paged", "float32", 1e-5),
    "paged-latent-int8": (LATENT, "paged", "int8", 0.04),
}


SLOW = ("contiguous", "contiguous-fp8", "sliding-int8", "paged-fp8", "paged-latent-int8")
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in KINDS]


@functools.partial(jax.jit, static_argnames="spec")
def attend(cache, q, k, v, tokens, spec, table=None):
    """With a cache of pages, rows of its own, or those of a table."""
    if isinstance(cache, PagedCache):
        table = own_page_table([cache], len(q)) if table is None else table
        tokens = in_pages(tokens, table)
    return cache.attend(q, k, v, tokens, scores_of(spec))


def drawn(spec: Attention, seed: int = 0):
    """Queries, keys and values of whole rows, as a cache is given them."""
    rng = np.random.default_rng(seed)
    heads, k_dim = spec.num_kv_heads, spec.head_dim
    if spec.latent is not None:
        heads, k_dim = 1, spec.latent.kv_rank + spec.latent.rope_dim
    shape = (len(LENGTHS), max(LENGTHS))
    q, k, v = (
        jnp.asarray(rng.normal(size=(*shape, n, k_dim)), jnp.float32)
        for n in (spec.num_heads, heads, heads)
    )
    return q, k, v if spec.latent is None else k[..., : spec.latent.kv_rank]


def whole(q, k, v, spec: Attention):
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return reference_attention(q, k, v, View(positions, positions), scores_of(spec))


def chunk(arrays, starts, stops, width):
    """Tokens [start, stop) of each row, and padding: NaN, at the wrong place."""
    parts = [np.full((len(starts), width, *x.shape[2:]), np.nan, np.float32) for x in arrays]
    parts[0][:] = 7.0  # queries of padding are multiplied
    for b, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        for part, x in zip(parts, arrays, strict=True):
            part[b, : stop - start] = x[b, start:stop]
    ids = np.zeros((len(starts), max(stops)), np.int32)
    return [jnp.asarray(part) for part in parts], chunk_of(ids, starts, stops, width)


def through(cache, arrays, spec):
    """Ragged prompts, chunks of several tokens, single ones; rows end one by one."""
    at, outs = [0, 0, 0], [[] for _ in LENGTHS]
    widths = [((17, 2, 9), 18), ((18, 9, 0), 18), *[((1, 1, 5), 18)] * 4, *[((1, 1, 1), 1)] * 5]
    for sizes, width in widths:
        stops = [min(a + n, end) for a, n, end in zip(at, sizes, LENGTHS, strict=True)]
        parts, tokens = chunk(arrays, at, stops, width)
        out, cache = attend(cache, *parts, tokens, spec)
        for b in range(3):
            outs[b].append(np.asarray(out[b, : stops[b] - at[b]]))
        at = stops
    assert at == [43, 20, 31]
    return [np.concatenate(out) for out in outs], cache


def check(outs, expected, tolerance):
    for out, row, length in zip(outs, expected, LENGTHS, strict=True):
        np.testing.assert_allclose(out, row[:length], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_equal_the_whole(name):
    spec, kind, dtype, tolerance = KINDS[name]
    options = {"page_size": 16} if kind == "paged" else {}
    (cache,) = make_cache(config_of(spec), 3, 48, dtype, kind=kind, **options)
    arrays = drawn(spec)
    outs, cache = through(cache, arrays, spec)
    check(outs, whole(*arrays, spec), tolerance)
    # Other rows in the same cache, begun anew.
    arrays = drawn(spec, seed=1)
    check(through(cache, arrays, spec)[0], whole(*arrays, spec), tolerance)


def test_a_sliding_cache_is_as_long_as_the_window():
    caches = make_cache(config_of(LOCAL, GLOBAL, LOCAL), 3, 48, kind="sliding")
    assert [cache.keys.values.shape[2] for cache in caches] == [WINDOW, 48, WINDOW]
    (short,) = make_cache(config_of(LOCAL), 3, WINDOW, kind="sliding")
    assert not isinstance(short, SlidingCache)
    q, k, v = drawn(GLOBAL)
    tokens = Tokens.of(jnp.zeros(q.shape[:2], jnp.int32))
    words = "sliding cache of 6 positions cannot serve window=None"
    refuses(lambda: caches[0].attend(q, k, v, tokens, scores_of(GLOBAL)), words)


def test_forked_sequences_share_full_pages_only():
    """Two continuations of one prompt, in shared pages, equal each alone."""
    spec = GLOBAL
    pool = PageAllocator(num_pages=12, page_size=8)
    q, k, v = (x[:2] for x in drawn(spec))
    k, v = (x.at[1, :20].set(x[0, :20]) for x in (k, v))
    first = pool.allocate(pool.pages_for(20))
    second, copied = pool.fork(first, 20)
    assert second[:2] == first[:2] and second[2] != first[2] and copied == (first[2], second[2])
    assert [pool.holders(page) for page in first] == [2, 2, 1]
    for pages in (first, second):
        pages += pool.allocate(pool.pages_for(28) - len(pages))

    tables = [jnp.asarray(make_page_table(rows, 5)) for rows in ([first, []], [first, second])]
    (cache,) = make_cache(config_of(spec), 2, 40, kind="paged", page_size=8, num_pages=12)
    parts, tokens = chunk((q, k, v), [0, 0], [20, 0], 20)
    _, cache = attend(cache, *parts, tokens, spec, tables[0])
    pages = copy_pages(cache.pages, *(jnp.asarray([page]) for page in copied))
    cache = dataclasses.replace(cache, pages=pages)
    parts, tokens = chunk((q, k, v), [20, 20], [28, 28], 8)
    out, _ = attend(cache, *parts, tokens, spec, tables[1])
    np.testing.assert_allclose(out, whole(q, k, v, spec)[:, 20:28], rtol=1e-5, atol=1e-5)

    pool.free(first)
    assert pool.num_free == 12 - len(second)
    pool.free(second)
    assert pool.num_free == 12


def test_allocator_refuses_and_keeps_what_it_has():
    pool = PageAllocator(4, 16)
    pages = pool.allocate(3)
    free = "2 pages of 16 tokens wanted, 1 of 4 are free"
    refuses(lambda: pool.allocate(2), free, error=OutOfPages)
    assert pool.num_free == 1 and len(set(pages) | set(pool.allocate(1))) == 4
    refuses(lambda: pool.fork(pages, 20), "1 pages", error=OutOfPages)
    assert [pool.holders(page) for page in pages] == [1, 1, 1]
    refuses(lambda: pool.free([pages[0], pages[1], pages[0]]), "freed more often")
    assert [pool.holders(page) for page in pages] == [1, 1, 1]
    pool.free(pages)
    for call, words in (
        (lambda: pool.free(pages[:1]), "freed more often"),
        (lambda: pool.fork(pages, 20), "is free; it has nothing to share"),
        (lambda: pool.free([4]), "page 4 does not exist; there are 0..3"),
        (lambda: pool.fork(pages, 49), "num_tokens=49 of 3 pages of 16"),
        (lambda: PageAllocator(4, 0), "page_size=0; use 1 or more"),
        (lambda: pool.allocate(-1), "num=-1 pages"),
        (lambda: make_page_table([[0], [1, 2, 3]], 2), "1 has 3 pages; the table is 2 wide"),
    ):
        refuses(call, words)


def test_bad_caches_are_refused():
    config, tokens = config_of(GLOBAL), Tokens.of(jnp.zeros((1, 4), jnp.int32))
    paged = in_pages(tokens, jnp.zeros((1, 1), jnp.int32))

    def run(tokens, kind):
        cache = make_cache(config, 1, 48, kind=kind)
        jax.eval_shape(lambda p: forward(p, tokens, config, cache), abstract(param_specs(config)))

    for call, words in (
        (lambda: make_cache(config, 3, 48, kind="ring"), "unknown; use contiguous, sliding, paged"),
        (
            lambda: make_cache(config_of(LATENT), 3, 48, "int8"),
            "not kept in int8; use kind='paged'",
        ),
        (lambda: run(tokens, "paged"), "a paged cache needs Tokens.pages; make them with in_pages"),
        (lambda: run(paged, "contiguous"), "tokens with pages go into paged caches"),
    ):
        refuses(call, words)


@pytest.fixture(scope="module")
def model():
    config = config_of(LOCAL, GLOBAL)
    return weights(config, matrices=1.2, others=0.1), config


@pytest.fixture(scope="module")
def expected(model):
    return LocalSampler(*model, cache_kind="sliding").sample(requests())


def requests():
    rng = np.random.default_rng(1)
    return [
        Request(prompt=rng.integers(0, 50, n).tolist(), max_new_tokens=new, logprobs=True)
        for n, new in ((9, 40), (3, 50), (14, 5))
    ]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_samples_do_not_depend_on_the_kind_of_cache(model, expected, kind):
    samples = LocalSampler(*model, cache_kind=kind).sample(requests())
    for one, other in zip(samples, expected, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert len(set(samples[0].token_ids)) > 5


@pytest.mark.slow
def test_samples_from_quantized_caches_are_near(model, expected):
    samples = LocalSampler(*model, cache_kind="paged", cache_dtype="int8").sample(requests())
    first = [[sample.logprobs[0] for sample in some] for some in (samples, expected)]
    np.testing.assert_allclose(*first, atol=0.05)


@pytest.mark.aot
def test_decoding_through_pages_compiles_for_split_heads():
    """Pages are neither copied nor gathered; two reductions a layer and the embedding's are all."""
    if not topologies.available("v5e"):
        pytest.skip("compiling for TPUs needs libtpu; `make compilers` installs it")
    mesh = make_mesh(MeshShape(tensor=4), topologies.describe("v5e:2x2"))
    layout = Layout(mesh, make_rules())
    spec = Attention(16, 4, 128)
    layers = (
        Layer(spec, FeedForward(1024)),
        Layer(dataclasses.replace(spec, window=512), FeedForward(1024)),
    )
    config = ModelConfig(512, 512, make_stacks(layers), vocab_multiple=512)

    def sharded(spec):
        sharding = named_sharding(mesh, layout.rules.weights, spec.axes, spec.shape)
        return jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=sharding)

    def placed(x, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def place(cache):
        data = placed(cache.pages.data, None, "tensor")
        scales = placed(cache.pages.scales, None, None, "tensor")
        pages = dataclasses.replace(cache.pages, data=data, scales=scales)
        return dataclasses.replace(cache, pages=pages)

    B = 32
    caches = jax.eval_shape(lambda: make_cache(config, B, 4096, "int8", kind="paged"))
    ids = placed(jax.ShapeDtypeStruct((B, 1), jnp.int32))

    def run(params, caches, ids, positions):
        def step(_, carry):
            caches, positions = carry
            tokens = in_pages(Tokens(ids, positions), own_page_table(caches, B))
            output = forward(params, tokens, config, caches, dtype=jnp.bfloat16)
            return output.cache, positions + (output.hidden[..., 0] < 9)

        with use_layout(layout):
            return jax.lax.fori_loop(0, 8, step, (caches, positions))

    lowered = jax.jit(run, donate_argnums=1).lower(
        jax.tree.map(sharded, param_specs(config), is_leaf=is_spec), tuple(map(place, caches)),
        ids, ids,
    )  # fmt: skip
    executable = lowered.compile({"exec_time_optimization_effort": -1.0})
    text, memory = executable.as_text(), executable.memory_analysis()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * len(caches)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches)) / 4
    assert memory.alias_size_in_bytes > 0.99 * size
    assert memory.temp_size_in_bytes < 0.2 * size
    assert "all-gather" not in text and len(re.findall(r"all-reduce(-start)?\(", text)) <= 5
