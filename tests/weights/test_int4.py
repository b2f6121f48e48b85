"""Int4: files of GPTQ and AWQ are the same values repacked; errors stay within half a step."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.weights import Int4

IN, OUT, GROUP = 64, 24, 16


def nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """Eight 4-bit fields of each word, lowest first, along `axis`."""
    fields = [words >> (4 * i) & 15 for i in range(8)]
    return np.stack(fields, axis=axis + 1).reshape(
        *(n * 8 if i == axis else n for i, n in enumerate(words.shape))
    )


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(act_order):
    """W[i, o] = scales[g_idx[i], o] (q[i, o] - zeros[g_idx[i], o]), with q from words along `in`,
    zeros from words along `out` less one (the first format), in any order of rows."""
    rng = np.random.default_rng(0)
    qweight = rng.integers(0, 2**32, (IN // 8, OUT), np.uint32)
    qzeros = rng.integers(0, 2**32, (IN // GROUP, OUT // 8), np.uint32)
    scales = rng.uniform(0.01, 0.1, (IN // GROUP, OUT)).astype(np.float16)
    g_idx = np.arange(IN) // GROUP
    g_idx = rng.permutation(g_idx) if act_order else g_idx
    q, zeros = nibbles(qweight, 0), nibbles(qzeros, 1) + 1
    expected = scales[g_idx].astype(float) * (q.astype(float) - zeros[g_idx])

    zeros = jnp.asarray(zeros.astype(np.uint8))
    if act_order:
        order = np.argsort(g_idx, kind="stable")
        leaf = Int4.encode(jnp.asarray(q[order]), jnp.asarray(scales), zeros, jnp.asarray(order))
    else:
        # The file's words are the leaf's bytes: the low byte of a word holds its first two rows.
        words = qweight.astype("<u4")[..., None].view(np.uint8)
        packed = words.transpose(0, 2, 1).reshape(IN // 2, OUT)
        leaf = Int4(jnp.asarray(packed), jnp.asarray(scales), zeros)
        np.testing.assert_array_equal(leaf.unpack(), q)
    # A 16-bit scale times a whole number of 5 bits is exact in float32.
    np.testing.assert_array_equal(leaf.dequantize(jnp.float32), expected)
    x = rng.normal(size=(3, IN)).astype(np.float32)
    np.testing.assert_allclose(leaf.linear(jnp.asarray(x)), x @ expected, rtol=1e-4, atol=1e-4)


def test_awq():
    """W = (q - z) s, with words along `out` whose fields are columns 0, 2, 4, 6, 1, 3, 5, 7."""
    rng = np.random.default_rng(1)
    qweight = rng.integers(0, 2**32, (IN, OUT // 8), np.uint32)
    qzeros = rng.integers(0, 2**32, (IN // GROUP, OUT // 8), np.uint32)
    scales = rng.uniform(0.01, 0.1, (IN // GROUP, OUT)).astype(np.float16)

    def columns(words):
        fields = nibbles(words, 1).reshape(len(words), -1, 8)
        return fields[..., np.argsort([0, 2, 4, 6, 1, 3, 5, 7])].reshape(len(words), OUT)

    # Column 8c + 1 stands in the fifth field of word c.
    np.testing.assert_array_equal(columns(qweight)[:, 1::8], qweight >> 16 & 15)
    q, zeros = columns(qweight), columns(qzeros)
    leaf = Int4.encode(jnp.asarray(q), jnp.asarray(scales), jnp.asarray(zeros.astype(np.uint8)))
    expected = (q.astype(float) - zeros.repeat(GROUP, 0)) * scales.repeat(GROUP, 0).astype(float)
    np.testing.assert_array_equal(leaf.dequantize(jnp.float32), expected)


@settings(max_examples=8, deadline=None, database=None)
@given(
    groups=st.sampled_from([1, 3]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([jnp.float16, jnp.bfloat16]),
    shift=st.sampled_from([-100.0, -1.0, 0.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_rounds_to_the_nearest(groups, symmetric, scale_dtype, shift, seed):
    """Within half a scale; half a scale more where the zero point, or the scale, was rounded."""
    weight = np.random.default_rng(seed).normal(size=(8 * groups, 4)).astype(np.float32) + shift
    weight[:, 1] = 0
    weight[:8, 2] *= 1e-9
    leaf = Int4.quantize(jnp.asarray(weight), 8, symmetric, scale_dtype)
    assert leaf.scale.dtype == scale_dtype and leaf.shape == weight.shape
    scale = np.asarray(leaf.scale, np.float32).repeat(8, 0)
    # Rounding of the scale moves the ends, 7.5 or 15 scales away, by so much of a scale.
    slack = 15 * float(jnp.finfo(scale_dtype).eps) / 2 + 1e-4
    error = np.abs(np.asarray(leaf.dequantize(jnp.float32)) - weight)
    assert np.all(error <= scale * ((0.5 if symmetric else 1.0) + slack))
    assert not np.asarray(leaf.dequantize(jnp.float32))[:, 1].any()


def test_groups_that_do_not_fit():
    with pytest.raises(
        ValueError, match="groups of 7 do not divide in=12 into even parts; use one "
    ):
        Int4.quantize(jnp.zeros((12, 4)), 7)
    with pytest.raises(ValueError, match=r"groups of 8 do not divide out=4 .*; use one of 2, 4"):
        Int4.quantize(jnp.zeros((8, 4)), 8, block_axis="out")
