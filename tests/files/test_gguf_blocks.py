"""Blocks: the same bits as ggml gives, from any bytes, whatever version of `gguf` is installed."""

import ctypes
import importlib.util
import pathlib
import zlib

import gguf
import numpy as np
import pytest

from lm.files import ggml
from lm.files.gguf_blocks import QUANTIZERS, dequantize, quantize
from tests.files.samples import GGML_TYPES
from tests.refuses import refuses

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def checks(table):
    """A CRC-32 by type."""
    return {name: int(crc, 16) for name, crc in (entry.split() for entry in table.split(", "))}


# CRC-32 of the numbers (NaN as zero) of `random_bytes`, by an implementation of its own that gave
# the bits of both gguf 0.19 and ggml.
NUMBERS = checks(
    "Q4_0 6f020251, Q4_1 2a4b979b, Q5_0 bef6721d, Q5_1 43c58e94, Q8_0 0ca1c2f0, "
    "Q8_1 7a646d05, Q2_K 9bf15247, Q3_K 28868913, Q4_K 4bd58808, Q5_K 0d7205ff, "
    "Q6_K 163135a8, Q8_K af45db5b, IQ2_XXS 5e2dafb3, IQ2_XS 4b9ce809, IQ3_XXS 651491f0, "
    "IQ1_S f056c418, IQ4_NL 8af6c495, IQ3_S 33a9ead7, IQ2_S 207a8af3, IQ4_XS fc7c82f0, "
    "IQ1_M f204c3cc, BF16 1a623682, TQ1_0 0b1b111b, TQ2_0 da04162a, MXFP4 01786957, "
    "NVFP4 cea8ca74, Q1_0 71129f56, Q2_0 dbdcc061"
)
# Likewise of the bytes of `hard_rows`.
BYTES = checks(
    "BF16 bcba7425, Q4_0 469d31d2, Q4_1 f5a2bd37, Q5_0 ccc54061, Q5_1 5a4f205d, "
    "Q8_0 ddbc47bc, TQ1_0 79c14b3d, TQ2_0 8e5af07f, MXFP4 ee5efaf2"
)


def same_bits(a, b):
    """Equal to the bit, whatever kind of NaN."""
    assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
    nan = np.isnan(a)
    np.testing.assert_array_equal(nan, np.isnan(b))
    np.testing.assert_array_equal(
        np.where(nan, 0, a.view(np.uint32)), np.where(nan, 0, b.view(np.uint32))
    )


def random_bytes(name, rows=8, blocks=16):
    """Any bits at all, and the shape they are of."""
    _, block, nbytes = GGML_TYPES[name]
    raw = np.random.default_rng(len(name)).integers(0, 256, (rows, blocks * nbytes), np.uint8)
    return raw, (rows, blocks * block)


@pytest.fixture(scope="module")
def llama_cpp():
    """ggml's own code, in a wheel of llama.cpp."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps xllamacpp")
    (file,) = pathlib.Path(spec.origin).parent.glob("xllamacpp.abi3.so")
    library = ctypes.PyDLL(str(file))
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    return library


def call(function, source, target, count):
    function(
        source.ctypes.data_as(ctypes.c_void_p),
        target.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(count),
    )
    return target


def row_function(library, verb, name, suffix=""):
    name = f"{name[:-2].lower()}_K" if name.endswith("_K") else name.lower()
    return getattr(library, f"{verb}_row_{name}{suffix}", None)


def test_every_type_is_here():
    assert {k: (t.code, t.block, t.nbytes) for k, t in ggml.TYPES.items()} == GGML_TYPES
    for kind in ggml.TYPES.values():
        assert kind.dtype.itemsize == kind.nbytes
        assert {n: o for n, (_, o) in kind.dtype.fields.items()} == kind.offsets
        # Every bit of a field that holds quants is in one plane.
        for field in {plane.field for plane in kind.planes}:
            bits = sum(p.bits for p in kind.planes if p.field == field)
            nbytes = next(f.nbytes for f in kind.fields if f.name == field)
            assert bits * kind.block == 8 * nbytes


@pytest.mark.oracle
def test_sizes_are_those_of_ggml(llama_cpp):
    for code, block, nbytes in GGML_TYPES.values():
        assert (llama_cpp.ggml_blck_size(code), llama_cpp.ggml_type_size(code)) == (block, nbytes)
    for code in ggml.REMOVED:
        assert llama_cpp.ggml_type_size(code) == 0


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_recorded(name):
    raw, shape = random_bytes(name)
    numbers = dequantize(raw.reshape(-1), name, shape)
    assert numbers.dtype == np.float32 and numbers.shape == shape
    assert (
        zlib.crc32(np.where(np.isnan(numbers), np.float32(0), numbers).tobytes()) == NUMBERS[name]
    )


@pytest.mark.oracle
def test_numbers_are_those_of_ggml(llama_cpp):
    checked = set()
    for name in GGML_TYPES:
        function = row_function(llama_cpp, "dequantize", name)
        if function:
            raw, shape = random_bytes(name)
            expected = call(function, raw, np.empty(shape, np.float32), shape[0] * shape[1])
            same_bits(dequantize(raw, name, shape), expected)
            checked.add(name)
    assert checked >= {"Q8_K", "Q1_0", "Q2_0", "IQ1_M", "Q6_K", "NVFP4"}


def test_memory_is_bounded(monkeypatch):
    """A tensor is decoded and encoded chunk by chunk, with the same result."""
    raw, shape = random_bytes("Q4_K")
    whole = dequantize(raw, "Q4_K", shape)
    x = hard_rows(1.0)
    encoded = quantize(x, "Q5_1")
    seen = []
    for verb in ("dequantize", "quantize"):
        original = getattr(gguf.quants, verb)
        monkeypatch.setattr(
            gguf.quants, verb, lambda a, t, call=original: seen.append(a.size) or call(a, t)
        )
    monkeypatch.setattr("lm.files.gguf_blocks.CHUNK", 1024)
    same_bits(dequantize(raw, "Q4_K", shape), whole)
    np.testing.assert_array_equal(quantize(x, "Q5_1"), encoded)
    assert len(seen) > 2 and max(seen) <= 1024


def test_plain_types():
    x = np.array([[0, 1, -2], [3, 100, -128]])
    for name, dtype in (("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8")):
        raw = x.astype(dtype).reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(dequantize(raw, name, (2, 3)), x.astype(np.float32))
    raw = np.array([1e300, 0.1]).view(np.uint8)
    np.testing.assert_array_equal(dequantize(raw, "F64", (2,)), np.float32([np.inf, 0.1]))


def hard_rows(scale):
    """Normal numbers, and rows that are zero, have ties for the largest, or halves to round."""
    x = np.random.default_rng(5).standard_normal((64, 512)).astype(np.float32) * np.float32(scale)
    x[0] = 0
    x[1, ::2] = -x[1, 1::2]
    x[2] = np.round(x[2] * 4) / 4
    x[3] = 1
    x[4, :256] = 0
    return x


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_recorded(name):
    data = quantize(hard_rows(1.0), name)
    assert data.shape == (64, ggml.TYPES[name].row_bytes(512)) and data.dtype == np.uint8
    assert zlib.crc32(data.tobytes()) == BYTES[name]


@pytest.mark.oracle
def test_quantizes_to_the_bits_of_ggml(llama_cpp):
    """At a scale of one, where the fused multiply-add of ggml's build makes no difference."""
    checked = set()
    for name in QUANTIZERS:
        function = row_function(llama_cpp, "quantize", name, "_ref")
        if function:
            x = hard_rows(1.0)
            ours = quantize(x, name)
            np.testing.assert_array_equal(ours, call(function, x, np.zeros_like(ours), x.size))
            checked.add(name)
    assert checked >= {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "MXFP4"}


def test_bfloat16_rounds_as_ml_dtypes():
    import ml_dtypes

    bits = np.random.default_rng(6).integers(0, 2**32, 100_000, np.uint32)
    x = bits.view(np.float32)[np.isfinite(bits.view(np.float32))]
    x = np.concatenate([x, np.float32([np.inf, -np.inf, 0.0, -0.0, 3.4e38])])
    expected = x.astype(ml_dtypes.bfloat16).view(np.uint8)
    np.testing.assert_array_equal(quantize(x, "BF16"), expected)
    assert np.isnan(dequantize(quantize(np.float32([np.nan]), "BF16"), "BF16", (1,)))


@pytest.mark.parametrize("name", sorted(BYTES.keys() - {"BF16"}))
def test_blocks_hold_no_infinities(name):
    x = np.zeros((2, 256), np.float32)
    for bad in (np.inf, np.nan):
        x[1, 7] = bad
        refuses(lambda: quantize(x, name), "infinities or NaN")


def test_refuses_what_does_not_fit():
    block = np.zeros(18, np.uint8)
    refuses(lambda: dequantize(block, "Q4_L", (32,)), "no ggml type 'Q4_L'")
    refuses(lambda: dequantize(block, "Q4_0", (33,)), "multiple of 32")
    refuses(lambda: dequantize(block, "Q4_0", (2, 32)), "which is 36 of uint8")
    refuses(lambda: quantize(np.zeros(256, np.float32), "Q4_K"), "no quantizer for 'Q4_K'")
    refuses(lambda: quantize(np.zeros(40, np.float32), "Q8_0"), "40 is not a multiple", "of 32")


def test_shapes_without_numbers_and_with_many_dimensions():
    assert dequantize(np.zeros(0, np.uint8), "Q4_0", (0, 32)).shape == (0, 32)
    raw, _ = random_bytes("Q5_1", rows=6, blocks=2)
    flat = dequantize(raw, "Q5_1", (6, 64))
    np.testing.assert_array_equal(dequantize(raw, "Q5_1", (2, 3, 64)), flat.reshape(2, 3, 64))
