"""The CPU's own kernels: equal to float64 and to plain JAX; and whatever a compiler does."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.files.ggml import block_type
from lm.files.gguf_blocks import QUANTIZERS
from lm.kernels.attention import Scores
from lm.kernels.cpu import native, products
from lm.kernels.paged_attention import make_pages, paged_attention
from lm.kernels.paged_attention.pages import PageBatch
from lm.weights import GGUFBlocks, Int4, Int8Groups
from lm.weights.gguf import KINDS
from lm.weights.words import LEVELS, Words

K, R = 512, 72  # the last panel is half full


@pytest.fixture
def compiled(monkeypatch):
    for name in ("products", "paged"):
        if not native.available(name):
            pytest.skip(f"{name}.cc cannot be compiled here")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def groups(make, zero=None):
    values = np.random.default_rng(0).integers(0, 256, (K, R), np.uint8)
    scale = np.abs(random(K // 128, R)).astype(np.float16)
    return make.encode(jnp.asarray(values), jnp.asarray(scale), zero)


MATRICES = {
    **{
        kind: lambda kind=kind: GGUFBlocks.quantize(random(K, R), kind)
        for kind in sorted({*KINDS} & {*QUANTIZERS} - {"MXFP4"})
    },
    "Int4": lambda: Int4.quantize(random(K, R)),
    "Int4, zero points": lambda: Int4.quantize(random(K, R), 64, symmetric=False),
    "Int4, whole columns": lambda: Int4.quantize(random(K, R), None),
    "Int4, embedding": lambda: Int4.quantize(random(R, K), 32, block_axis="out"),
    "Int8Groups": lambda: groups(Int8Groups),
    "Int8Groups, zero points": lambda: groups(
        Int8Groups, jnp.asarray(np.random.default_rng(1).integers(0, 257, (K // 128, R), np.uint16))
    ),
}


@pytest.mark.parametrize("name", MATRICES)
def test_products_are_exact(name, compiled, monkeypatch):
    """Within 1e-5 of float64, for 1 to 17 rows; the numbers are the format's, bit for bit."""
    leaf = MATRICES[name]()
    words = Words.of(leaf)
    matrix = np.asarray(leaf.dequantize(jnp.float32))
    np.testing.assert_array_equal(words.dequantize(jnp.float32), matrix)
    matrix = matrix if leaf.block_axis == "in" else matrix.T
    x = random(17, K, seed=1)
    exact = x.astype(np.float64) @ matrix.astype(np.float64)
    product = jax.jit(lambda x: words.unembed(x, leaf.block_axis == "out"))
    for rows in range(1, 18):
        error = np.abs(product(jnp.asarray(x[:rows])) - exact[:rows]).max()
        assert error < 1e-5 * np.abs(exact).max(), (rows, error)
    monkeypatch.setattr(products, "available", lambda name: False)
    plain = words.unembed(jnp.asarray(x), leaf.block_axis == "out")
    np.testing.assert_allclose(plain, exact, atol=1e-5 * np.abs(exact).max())


def test_rows_of_an_embedding(compiled):
    leaf = Int4.quantize(random(R, K), 32, symmetric=False, block_axis="out")
    ids = jnp.array([[3, 0, 71], [3, 500, -1]])  # as for arrays, those out of range are clipped
    rows = Words.of(leaf).take(ids, jnp.float32)
    np.testing.assert_array_equal(rows, leaf.take(ids, jnp.float32))


def test_what_has_no_form_is_left_alone():
    assert Words.of(random(K, R)) is None
    for kind in KINDS:
        raw = np.zeros(block_type(kind).row_bytes(K) * R, np.uint8)
        words = Words.of(jax.device_put(GGUFBlocks.from_bytes(raw, kind, (R, K))))
        assert (words is None) == (kind in LEVELS), kind
    assert Words.of(Int4.quantize(random(K, R), 8)) is None  # groups shorter than a vector
    assert Words.of(Int4.quantize(random(2, K, R))) is None  # a stack of layers
    values = jnp.zeros((K, R), jnp.uint8)
    ordered = Int4.encode(values, jnp.ones((4, R)), order=jnp.arange(K, dtype=jnp.int32))
    assert Words.of(ordered) is None


def drawn_pages(seed: int):
    """Queries, pages, a batch, scores and sinks: the last new tokens of ragged sequences."""
    rng = np.random.default_rng(seed)
    dtype = ("float32", "bfloat16", "int8")[seed % 3]
    B, heads, G, M = (int(rng.integers(1, n)) for n in (5, 4, 6, 12))
    page, key_dim, value_dim = (int(rng.choice([16, 32, 64])) for _ in range(3))
    latent = seed % 6 == 1
    if latent:
        heads, key_dim, value_dim = 1, 48, 32
    T, num_pages = int(rng.integers(1, 9)), B * M + 3
    pages = make_pages(num_pages, page, heads, key_dim, value_dim, latent=latent, dtype=dtype)
    if dtype == "int8":
        data = jnp.asarray(rng.integers(-127, 128, pages.data.shape), jnp.int8)
        scales = jnp.asarray(rng.random(pages.scales.shape) / 50, jnp.float32)
        pages = dataclasses.replace(pages, data=data, scales=scales)
    else:
        data = jnp.asarray(rng.normal(size=pages.data.shape), dtype)
        pages = dataclasses.replace(pages, data=data)
    total = rng.integers(0, M * page + 1, B)
    lens = np.minimum(rng.integers(0, T + 1, B), total)
    table = rng.permutation(num_pages)[: B * M].reshape(B, M)
    starts = np.concatenate([[0], np.cumsum(lens)])
    batch = PageBatch(*(jnp.asarray(x, jnp.int32) for x in (table, total, starts, lens)), T)
    q = jnp.asarray(rng.normal(size=(int(lens.sum()) + 2, heads * G, key_dim)), jnp.float32)
    window = int(rng.integers(1, 200)) if seed % 2 else None
    softcap = float(rng.uniform(1, 30)) if seed % 4 > 1 else None
    sinks = jnp.asarray(rng.normal(size=heads * G), jnp.float32) if seed % 5 > 2 else None
    return (q, pages, batch, Scores(key_dim**-0.5, window=window, softcap=softcap)), sinks


@pytest.mark.parametrize("seed", range(12))
def test_attention_to_pages(seed, compiled):
    arguments, sinks = drawn_pages(seed)
    plain, own = (
        paged_attention(*arguments, sinks=sinks, implementation=name)
        for name in ("reference", "cpu")
    )
    np.testing.assert_allclose(own, plain, atol=1e-5)


def test_what_is_not_seen_may_be_anything(compiled):
    """Pages before a window are gone, and slots behind a sequence hold NaN."""
    pages = make_pages(4, 16, 1, 16, dtype="float32")
    data = jnp.asarray(random(*pages.data.shape)).at[2, :, 5:].set(jnp.nan).at[3].set(jnp.nan)
    pages = dataclasses.replace(pages, data=data)
    table, kv_lens, starts = (jnp.array(x, jnp.int32) for x in ([[-1, 1, 2]], [37], [0, 1]))
    batch = PageBatch(table, kv_lens, starts, max_q_len=1)
    given = jnp.asarray(random(1, 2, 16)), pages, batch, Scores(0.25, window=18)
    own = paged_attention(*given, implementation="cpu")
    assert np.isfinite(own).all()
    np.testing.assert_allclose(own, paged_attention(*given, implementation="reference"), atol=1e-5)


# -- The compiler. --------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache directory of the test's own, and nothing registered; gives `compiler(script)`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "available", native.available.__wrapped__)

    def compiler(script: str) -> None:
        path = tmp_path / "c++"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return compiler


COMPILERS = {
    "missing": (None, "no C++ compiler"),
    "failing": ("echo 'lanes.h: no such thing' >&2; exit 1", "lanes.h: no such thing"),
    "hanging": ("sleep 60", "did not end"),
    "making nothing": ("exit 0", "No such file"),
    "making nonsense": ('for last; do :; done; echo nonsense > "$last"', ".so: "),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_whatever_the_compiler_does_there_is_one_line(name, fresh, monkeypatch, caplog):
    script, words = COMPILERS[name]
    monkeypatch.setattr(native, "TIMEOUT", 0.5 if name == "hanging" else 30)
    if script is None:
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        fresh(script)
    for _ in range(2):  # the second time from the cache, or not at all
        with caplog.at_level(logging.WARNING):
            assert not native.available("products")
        (record,) = caplog.records
        assert words in record.getMessage() or "did not compile before" in record.getMessage()
        caplog.clear()


def test_turned_off(fresh, monkeypatch, caplog):
    monkeypatch.setenv("LM_NATIVE", "0")
    assert not native.available("products") and not caplog.records


def test_a_cache_that_cannot_be_written_is_done_without(fresh, monkeypatch, tmp_path):
    fresh('for last; do :; done; cp "$0" "$last"')
    (tmp_path / "cache").write_text("a file where the directory should be")
    made = native.built("products")
    assert made.is_file() and tmp_path not in made.parents


def test_several_build_at_once(fresh):
    fresh('for last; do :; done; echo half > "$last"; sleep 0.3; echo whole > "$last"')
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(native.built("products").read_text()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["whole\n"] * 4
    assert [path.suffix for path in native.cache_directory().iterdir()] == [".so"]


def test_another_source_is_another_library(fresh, monkeypatch, tmp_path):
    fresh('for last; do :; done; echo made > "$last"')
    first = native.built("products")
    copied = tmp_path / "sources"
    copied.mkdir()
    for path in pathlib.Path(native.__file__).parent.glob("*.[ch]*"):
        (copied / path.name).write_bytes(path.read_bytes() + b"\n")
    monkeypatch.setattr(native, "FOLDER", copied)
    assert native.built("products") != first
