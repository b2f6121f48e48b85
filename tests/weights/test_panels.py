"""A matrix in panels is the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.weights import Panels, linear, take, unembed

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2**-8}


def matrix(rows, columns, dtype):
    return jax.random.normal(jax.random.key(0), (rows, columns)).astype(dtype)


def assert_near(found, exact, dtype):
    np.testing.assert_allclose(
        np.asarray(found, np.float64), exact, atol=TOLERANCE[dtype] * np.abs(exact).max()
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "width"), [(128, 64), (96, 32)])
@pytest.mark.parametrize("leading", [(), (1, 1), (3, 1), (2, 5)], ids=str)
def test_products(dtype, size, width, leading):
    weight, x = matrix(24, size, dtype), jax.random.normal(jax.random.key(1), (*leading, 24), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    panels = Panels.of(weight)
    assert panels.panels.shape == (size // width, 24, width)
    assert panels.shape == (24, size)
    assert panels.nbytes == weight.nbytes
    y = jax.jit(linear)(x, panels)
    assert y.dtype == dtype
    assert_near(y, exact, dtype)
    table = Panels.of(weight.T, "in")
    assert table.shape == (size, 24)
    for logits in (unembed(x, panels, False), unembed(x, table, True)):
        assert logits.dtype == jnp.float32
        assert_near(logits, exact, jnp.float32)


def test_rows_and_the_whole():
    weight = matrix(96, 24, jnp.float32)
    table, panels = Panels.of(weight, "in"), Panels.of(weight.T)
    ids = jnp.array([[0, 31, 32], [95, 96, -1]])
    np.testing.assert_array_equal(take(table, ids, jnp.float32), take(weight, ids, jnp.float32))
    np.testing.assert_array_equal(
        take(panels, ids % 24, jnp.bfloat16), take(weight.T, ids % 24, jnp.bfloat16)
    )
    np.testing.assert_array_equal(table.dequantize(jnp.float32), weight)
    np.testing.assert_array_equal(panels.dequantize(jnp.float32), weight.T)
    x = jnp.ones((2, 96))
    assert_near(linear(x, table), np.asarray(x @ weight, np.float64), jnp.float32)


def test_a_size_that_no_panel_divides():
    with pytest.raises(ValueError, match=r"out=24 is not a multiple of 32; keep the matrix whole"):
        Panels.of(jnp.zeros((64, 24)))
