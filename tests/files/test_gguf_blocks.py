"""Blocks: the same bits as gguf-py and ggml give, from any bytes."""

import ctypes
import importlib.util
import pathlib

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from lm.files import ggml
from lm.files.codebooks import CODEBOOKS
from lm.files.gguf_blocks import QUANTIZERS, dequantize, quantize
from tests.files.samples import GGML_TYPES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NOT_IN_PEER = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0", "Q2_0"}


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


@pytest.mark.parametrize("name", sorted(set(GGML_TYPES) - {"Q8_1", "Q2_0"}))
def test_sizes_are_those_of_gguf_py(name):
    assert gguf.GGML_QUANT_SIZES[T[name]] == GGML_TYPES[name][1:]
    assert T[name].value == GGML_TYPES[name][0]


@pytest.mark.oracle
def test_sizes_are_those_of_ggml(llama_cpp):
    for code, block, nbytes in GGML_TYPES.values():
        assert (llama_cpp.ggml_blck_size(code), llama_cpp.ggml_type_size(code)) == (block, nbytes)
    for code in ggml.REMOVED:
        assert llama_cpp.ggml_type_size(code) == 0


@pytest.mark.parametrize("name", sorted(set(GGML_TYPES) - NOT_IN_PEER))
def test_numbers_are_those_of_gguf_py(name):
    raw, shape = random_bytes(name)
    same_bits(dequantize(raw.reshape(-1), name, shape), gguf.quants.dequantize(raw, T[name]))


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


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("Q8_1", {"d": 0.5, "s": 9, "qs": [3] * 32}, 1.5),
        ("Q8_K", {"d": 0.5, "qs": [-3] * 256, "bsums": [7] * 16}, -1.5),
        ("Q1_0", {"d": 0.5, "qs": [0] * 16}, -0.5),
        ("Q2_0", {"d": 0.5, "qs": [0b11111111] * 16}, 1.0),
    ],
)
def test_types_that_gguf_py_lacks(name, fields, expected):
    block = np.zeros(1, ggml.TYPES[name].dtype)
    for field, value in fields.items():
        block[field] = value
    shape = (GGML_TYPES[name][1],)
    np.testing.assert_array_equal(
        dequantize(block.view(np.uint8), name, shape), np.full(shape, expected, np.float32)
    )


def test_plain_types():
    x = np.array([[0, 1, -2], [3, 100, -128]])
    for name, dtype in (("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8")):
        raw = x.astype(dtype).reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(dequantize(raw, name, (2, 3)), x.astype(np.float32))
    raw = np.array([1e300, 0.1]).view(np.uint8)
    np.testing.assert_array_equal(dequantize(raw, "F64", (2,)), np.float32([np.inf, 0.1]))


@pytest.mark.parametrize("name", [t.name for t in ggml.TYPES.values() if t.planes])
def test_pack_is_the_inverse_of_unpack(name):
    kind = ggml.TYPES[name]
    raw, _ = random_bytes(name)
    blocks = raw.reshape(-1).view(kind.dtype)
    quants = ggml.unpack(blocks, kind)
    assert len(np.unique(quants)) == 1 << sum(plane.bits for plane in kind.planes)
    again = np.zeros_like(blocks)
    ggml.pack(quants, kind, again)
    for field in {plane.field for plane in kind.planes}:
        np.testing.assert_array_equal(again[field], blocks[field])


def test_codebooks_are_those_of_gguf_py():
    for name, book in CODEBOOKS.items():
        peer = getattr(gguf.quants, "IQ1_S" if name == "IQ1" else name)
        peer.init_grid()
        np.testing.assert_array_equal(book.table, peer.grid.reshape(peer.grid_shape))


def hard_rows(scale):
    """Normal numbers, and rows that are zero, have ties for the largest, or halves to round."""
    x = np.random.default_rng(5).standard_normal((64, 512)).astype(np.float32) * np.float32(scale)
    x[0] = 0
    x[1, ::2] = -x[1, 1::2]
    x[2] = np.round(x[2] * 4) / 4
    x[3] = 1
    x[4, :256] = 0
    return x


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0, 1e-7])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizes_to_the_bits_of_gguf_py(name, scale):
    x = hard_rows(scale)
    expected = gguf.quants.quantize(x, T[name])
    ours = quantize(x, name)
    assert ours.shape == (64, ggml.TYPES[name].row_bytes(512)) and ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, expected.view(np.uint8).reshape(ours.shape))


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


@pytest.mark.parametrize("name", [n for n in QUANTIZERS if n not in ("F32", "F16", "BF16")])
def test_blocks_hold_no_infinities(name):
    x = np.zeros((2, 256), np.float32)
    for bad in (np.inf, np.nan):
        x[1, 7] = bad
        with pytest.raises(ValueError, match="infinities or NaN"):
            quantize(x, name)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="no ggml type 'Q4_L'"):
        dequantize(np.zeros(18, np.uint8), "Q4_L", (32,))
    with pytest.raises(ValueError, match="multiple of 32"):
        dequantize(np.zeros(18, np.uint8), "Q4_0", (33,))
    with pytest.raises(ValueError, match="which is 36 of uint8"):
        dequantize(np.zeros(18, np.uint8), "Q4_0", (2, 32))
    with pytest.raises(ValueError, match="no quantizer for 'Q4_K'"):
        quantize(np.zeros(256, np.float32), "Q4_K")


def test_shapes_without_numbers_and_with_many_dimensions():
    assert dequantize(np.zeros(0, np.uint8), "Q4_0", (0, 32)).shape == (0, 32)
    raw, _ = random_bytes("Q5_1", rows=6, blocks=2)
    flat = dequantize(raw, "Q5_1", (6, 64))
    np.testing.assert_array_equal(dequantize(raw, "Q5_1", (2, 3, 64)), flat.reshape(2, 3, 64))
