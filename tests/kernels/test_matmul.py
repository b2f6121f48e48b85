"""The matrix product with a gradient of its own equals the one JAX differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.matmul import matmul


@pytest.mark.parametrize("leading", [(), (5,), (3, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients(leading, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*leading, 24), dtype)
    weight = jax.random.normal(keys[1], (24, 40), dtype)
    dy = jax.random.normal(keys[2], (*leading, 40), dtype)

    y, pull = jax.vjp(jax.jit(matmul), x, weight)
    found = (y, *pull(dy))
    assert all(a.dtype == dtype for a in found)

    exact = [np.asarray(a, np.float64) for a in (x, weight, dy)]
    rows, drows = exact[0].reshape(-1, 24), exact[2].reshape(-1, 40)
    wanted = (exact[0] @ exact[1], exact[2] @ exact[1].T, rows.T @ drows)
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-8  # half a unit in bfloat16's last place
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * np.abs(b).max()
        )


def test_inside_scan_and_vmap():
    weights = jax.random.normal(jax.random.key(0), (3, 8, 8)) / 8**0.5
    x = jax.random.normal(jax.random.key(1), (4, 8))

    def loss(product, weights, x):
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x, weights)
        return jnp.sum(out**2)

    found = jax.jit(jax.grad(lambda w: loss(matmul, w, x)))(weights)
    wanted = jax.jit(jax.grad(lambda w: loss(jnp.matmul, w, x)))(weights)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    batched = jax.vmap(matmul)(jnp.broadcast_to(x, (3, 4, 8)), weights)
    np.testing.assert_allclose(batched, jnp.matmul(x, weights), atol=1e-5)
