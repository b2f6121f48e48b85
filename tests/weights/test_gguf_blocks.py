"""GGUF blocks as leaves: any bytes of a file there and back, and the numbers of gguf-py."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.files import ggml
from lm.weights import GGUFBlocks
from lm.weights.gguf import KINDS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_every_type(kind):
    """Any bytes at all, scales of infinity and NaN among them; compiled, in a stack."""
    layout = ggml.TYPES[kind]
    shape = (2, 5, 3 * layout.block)
    rng = np.random.default_rng(len(kind))
    raw = rng.integers(0, 256, (2, 5, 3 * layout.nbytes), np.uint8)
    if kind == "MXFP4":  # XLA takes numbers below the normal range for zero
        raw[..., :: layout.nbytes] |= 8
    leaf = GGUFBlocks.from_bytes(raw, kind, shape)
    assert leaf.shape == (2, 3 * layout.block, 5)
    assert leaf.nbytes == raw.size
    np.testing.assert_array_equal(leaf.to_bytes(), raw)
    leaf = jax.tree.map(jnp.asarray, leaf)
    found = np.asarray(jax.jit(lambda leaf: leaf.dequantize(jnp.float32))(leaf))
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).swapaxes(-1, -2)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    same = found.view(np.uint32) == np.ascontiguousarray(expected).view(np.uint32)
    assert np.all(same | nan)
    assert not nan.all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("block_axis", ["in", "out"])
def test_quantized_as_gguf_py_does(kind, block_axis):
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    leaf = GGUFBlocks.quantize(jnp.asarray(weight), kind, block_axis)
    rows = weight.T if block_axis == "in" else weight
    expected = gguf.quants.quantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(leaf.to_bytes(), expected)
    assert leaf.shape == weight.shape


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="no products on 'IQ2_XXS' blocks; those of Q4_0, "):
        GGUFBlocks.from_bytes(np.zeros(66, np.uint8), "IQ2_XXS", (1, 256))
    with pytest.raises(ValueError, match=r"17 bytes given as Q4_0 \[1, 32\], which is 18"):
        GGUFBlocks.from_bytes(np.zeros(17, np.uint8), "Q4_0", (1, 32))
    with pytest.raises(ValueError, match="40 is not a multiple of Q8_0"):
        GGUFBlocks.quantize(jnp.zeros((40, 4)), "Q8_0")
