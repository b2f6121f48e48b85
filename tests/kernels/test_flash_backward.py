"""Gradients of attention computed part by part against automatic differentiation of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.attention import View
from tests.kernels.calls import attention, attention_backward


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "softcap", "with_sinks"), [(None, None, True), (6, 3.0, False)])
def test_parts_add_up(causal, window, softcap, with_sinks):
    """Positions are drawn, so that queries see all, some and no keys of a part, or of any."""
    rng = np.random.default_rng(0)
    B, T, S, H, K, h, hv = 2, 7, 12, 4, 2, 8, 6

    def draw(*shape):
        return jnp.asarray(rng.normal(0, 1.5, shape), jnp.float32)

    q, k, v = draw(B, T, H, h), draw(B, S, K, h), draw(B, S, K, hv)
    sinks = draw(H) if with_sinks else None
    view = View(
        rng.integers(0, 12, (B, T)), rng.integers(1, 12, (B, S)),
        rng.integers(1, 3, (B, T)), rng.integers(1, 3, (B, S)),
    )  # fmt: skip
    options = {"scale": 0.4, "causal": causal, "window": window, "softcap": softcap}
    dout, dlse = draw(B, T, H, hv), draw(B, T, H)

    def whole(q, k, v):
        return attention(q, k, v, view, sinks=sinks, return_lse=True, **options)

    (out, lse), pull = jax.vjp(whole, q, k, v)
    blind = lse < -1e37
    assert blind.any() == (causal and not with_sinks)
    assert not out[blind].any()
    dlse = jnp.where(blind, 0, dlse)
    expected = pull((dout, dlse))
    dq, dks, dvs = jnp.zeros_like(q), [], []
    for keys in (slice(0, 5), slice(5, 12)):
        part = View(
            view.query_positions, view.key_positions[:, keys],
            view.query_segments, view.key_segments[:, keys],
        )  # fmt: skip
        dq_part, dk, dv = attention_backward(
            q, k[:, keys], v[:, keys], part, out, lse, dout, dlse=dlse, **options
        )
        dq, dks, dvs = dq + dq_part, [*dks, dk], [*dvs, dv]
    actual = (dq, jnp.concatenate(dks, 1), jnp.concatenate(dvs, 1))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_merging_parts_without_keys_gives_no_nan():
    q = k = v = jnp.ones((1, 2, 1, 4))
    view = View(np.zeros((1, 2), int), np.ones((1, 2), int))
    out, lse = attention(q, k, v, view, scale=1.0, return_lse=True)
    top = jnp.maximum(lse, lse)
    assert not out.any()
    assert np.isfinite(jnp.logaddexp(lse, lse)).all()
    assert np.isfinite(jnp.exp(lse - top)).all()
