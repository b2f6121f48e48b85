"""Fp8: scales as DeepSeek's files have them, values as torch rounds them."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lm.weights import Fp8


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("block", [None, 16])
def test_against_numpy(dtype, block):
    """W = values * scale, one scale for 16 x 16 weights, the last blocks shorter; no NaN, though
    the largest of each block lies on the edge of the type's range."""
    weight = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
    weight[:16, :16] = 0
    leaf = Fp8.quantize(jnp.asarray(weight), jnp.dtype(dtype), block)
    top = float(ml_dtypes.finfo(dtype).max)
    if block is None:
        assert leaf.scale.shape == (1, 24)
        scale = np.broadcast_to(np.abs(weight).max(0) / top, weight.shape)
    else:
        assert leaf.scale.shape == (3, 2)
        scale = np.ones_like(weight)
        for i in range(0, 40, 16):
            for j in range(0, 24, 16):
                part = np.abs(weight[i : i + 16, j : j + 16]).max()
                scale[i : i + 16, j : j + 16] = part / top if part else 1
    w = np.asarray(leaf.dequantize(jnp.float32))
    relative = 2.0 ** -(ml_dtypes.finfo(dtype).nmant + 1)
    least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    assert np.all(np.abs(w - weight) <= np.abs(weight) * relative * 1.001 + scale * least / 2)
    np.testing.assert_allclose(np.abs(w).max(), np.abs(weight).max(), rtol=1e-6)
    rows = leaf.take(jnp.array([39, 0, 17]), jnp.float32)
    np.testing.assert_array_equal(rows, w[[39, 0, 17]])


def test_another_dtype():
    with pytest.raises(ValueError, match="bfloat16 is none of float8_e4m3fn, float8_e5m2"):
        Fp8.quantize(jnp.zeros((2, 2)), jnp.bfloat16)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_values_are_those_of_torch(dtype):
    """Of the same scales: the bytes of a checkpoint."""
    torch = pytest.importorskip("torch")
    weight = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    leaf = Fp8.quantize(jnp.asarray(weight), jnp.dtype(dtype))
    scaled = torch.from_numpy(weight) / torch.from_numpy(np.array(leaf.scale))
    top = torch.finfo(getattr(torch, dtype)).max
    expected = scaled.clamp(-top, top).to(getattr(torch, dtype)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(np.asarray(leaf.values).view(np.uint8), expected)
