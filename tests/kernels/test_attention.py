"""Attention against a float64 loop and against JAX's own; other implementations against it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.kernels.attention import Scores, View, default_implementation, mask
from tests.kernels.calls import attention, attention_backward
from tests.refuses import refuses

B, T, S, H, h = 2, 5, 9, 4, 8
FLAGS = ("scale", "causal", "window", "softcap", "return_lse", "implementation")


@functools.partial(jax.jit, static_argnames=FLAGS)
def run(q, k, v, view, **kwargs):
    return attention(q, k, v, view, **kwargs)


def drawn_arrays(seed: int, num_kv_heads: int):
    rng = np.random.default_rng(seed)
    q = rng.normal(0, 2, (B, T, H, h)).astype(np.float32)
    k, v = rng.normal(0, 2, (2, B, S, num_kv_heads, h)).astype(np.float32)
    return q, k, v


def by_loop(q, k, v, view, scale, causal, window, softcap, sinks):
    """Output, log-sum-exp and number of visible keys, in float64, one score at a time."""
    G = H // k.shape[2]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    visible = np.zeros(q.shape[:3], int)
    for b, t, n in np.ndindex(*q.shape[:3]):
        terms = [] if sinks is None else [(float(sinks[n]), np.zeros(h))]
        for s in range(k.shape[1]):
            distance = int(view.query_positions[b, t]) - int(view.key_positions[b, s])
            if causal and distance < 0:
                continue
            if window is not None and not -window < distance < window:
                continue
            if (
                view.query_segments is not None
                and view.query_segments[b, t] != view.key_segments[b, s]
            ):
                continue
            score = scale * float(np.dot(q[b, t, n].astype(float), k[b, s, n // G].astype(float)))
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            terms.append((score, v[b, s, n // G].astype(float)))
            visible[b, t, n] += 1
        if terms:
            top = max(score for score, _ in terms)
            total = sum(math.exp(score - top) for score, _ in terms)
            out[b, t, n] = sum(math.exp(score - top) * value for score, value in terms) / total
            lse[b, t, n] = top + math.log(total)
    return out, lse, visible


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3, 5]),
    softcap=st.sampled_from([None, 3.0]),
    with_sinks=st.booleans(),
    with_segments=st.booleans(),
    in_order=st.booleans(),
)
def test_equals_a_loop(
    seed, num_kv_heads, causal, window, softcap, with_sinks, with_segments, in_order
):
    q, k, v = drawn_arrays(seed, num_kv_heads)
    rng = np.random.default_rng(seed + 1)
    if in_order:
        query_positions, key_positions = np.arange(S - T, S), np.arange(S)
    else:  # as in a zigzag ring or a cache: any positions, some queries before every key
        query_positions, key_positions = rng.integers(0, 9, (B, T)), rng.integers(2, 9, (B, S))
    segments = (rng.integers(0, 3, (B, T)), rng.integers(0, 3, (B, S))) if with_segments else ()
    view = View(
        np.broadcast_to(query_positions, (B, T)), np.broadcast_to(key_positions, (B, S)), *segments
    )
    sinks = rng.normal(0, 2, H).astype(np.float32) if with_sinks else None
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    out, lse = run(q, k, v, view, scale=0.3, causal=causal, return_lse=True, **options)
    expected, expected_lse, visible = by_loop(q, k, v, view, 0.3, causal, **options)
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(lse))
    defined = np.ones(visible.shape, bool) if with_sinks else visible > 0
    np.testing.assert_allclose(out[defined], expected[defined], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse[defined], expected_lse[defined], rtol=1e-5, atol=1e-5)
    assert not np.any(out[~defined]) and np.all(lse[~defined] < -1e37)
    seen = np.asarray(mask(view, Scores(1.0, causal, window))).sum(-1)
    np.testing.assert_array_equal(seen, visible[:, :, 0])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_jax(num_kv_heads, window, packed):
    q, k, v = drawn_arrays(3, num_kv_heads)
    k, v = k[:, :T], v[:, :T]
    # Positions run on across segments, so that JAX's window, over indices, is the same.
    positions = np.broadcast_to(np.arange(T), (B, T))
    segments = np.array([[1, 1, 2, 2, 2], [1, 2, 2, 0, 0]])
    out = run(
        q, k, v, View(positions, positions, *((segments, segments) if packed else ())),
        scale=0.25, window=window,
    )  # fmt: skip
    expected = jax.nn.dot_product_attention(
        q, k, v, scale=0.25, is_causal=True,
        mask=(segments[:, :, None] == segments[:, None, :])[:, None] if packed else None,
        local_window_size=None if window is None else (window - 1, 0), implementation="xla",
    )  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_rows_without_keys_give_finite_gradients():
    q, k, v = drawn_arrays(0, 2)
    view = View(np.zeros((B, T), int), np.ones((B, S), int))
    assert not mask(view, Scores(1.0)).any()

    def total(q, k, v):
        out, lse = attention(q, k, v, view, scale=0.3, return_lse=True)
        return jnp.sum(jnp.square(out)) + jnp.sum(1e-30 * lse)

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize(
    ("num_kv_heads", "window", "softcap", "packed"),
    [(1, None, None, True), (2, 5, 3.0, True), (4, 70, None, False), (2, 1, None, True),
     (4, None, 3.0, False)],
)  # fmt: skip
def test_blocked_equals_reference(num_kv_heads, window, softcap, packed):
    """Outputs and gradients, over two blocks and a part of one; segments end within blocks."""
    T, rng = 150, np.random.default_rng(0)
    q = rng.normal(0, 2, (B, T, H, h)).astype(np.float32)
    k, v = rng.normal(0, 2, (2, B, T, num_kv_heads, h)).astype(np.float32)
    lengths = [[30, 80, 40], [100, 10, 40]] if packed else [[T], [T]]
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    segments = np.stack([np.repeat(np.arange(len(row)) + 1, row) for row in lengths])
    view = View(positions, positions, *([segments, segments] if packed else [None] * 2), True)
    weight = rng.normal(size=q.shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(q, k, v, implementation):
        def total(q, k, v):
            out = attention(
                q, k, v, view, scale=0.3, window=window, softcap=softcap,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(weight * out), out

        (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    names = ("out", "dq", "dk", "dv")
    pairs = zip(names, run(q, k, v, "blocked"), run(q, k, v, "reference"), strict=True)
    for name, one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("window", [None, 3])
def test_parts_combine_by_lse(window):
    """Attention over each half of the keys, weighted by its log-sum-exp, is attention over all."""
    q, k, v = drawn_arrays(5, 2)
    queries = np.broadcast_to(np.array([0, 3, 4, 6, 8]), (B, T))
    keys = np.broadcast_to(np.arange(S), (B, S))
    options = {"scale": 0.3, "window": window, "return_lse": True}
    whole, whole_lse = run(q, k, v, View(queries, keys), **options)
    halves = [slice(0, 5), slice(5, S)]  # the first three queries see no key of the second
    parts = [run(q, k[:, i], v[:, i], View(queries, keys[:, i]), **options) for i in halves]
    (out_1, lse_1), (out_2, lse_2) = parts
    lse = jnp.logaddexp(lse_1, lse_2)
    out = out_1 * jnp.exp(lse_1 - lse)[..., None] + out_2 * jnp.exp(lse_2 - lse)[..., None]
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-6)


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


def test_values_may_have_another_size():
    q, k, v = drawn_arrays(1, 1)
    view = View(np.full((B, T), S), np.broadcast_to(np.arange(S), (B, S)))
    out = run(q, k, v, view, scale=0.3)
    np.testing.assert_allclose(run(q, k, v[..., :3], view, scale=0.3), out[..., :3], rtol=1e-5)


def test_bfloat16_stays_close():
    q, k, v = drawn_arrays(2, 2)
    view = View(np.full((B, T), S), np.broadcast_to(np.arange(S), (B, S)))
    exact = run(q, k, v, view, scale=0.1)
    out = run(*(x.astype(jnp.bfloat16) for x in (q, k, v)), view, scale=0.1)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, ["window=0; use 1 or more, or None"]),
        ({"softcap": 0.0}, ["softcap=0.0; use more than 0, or None"]),
        ({"softcap": math.nan}, ["softcap=nan; use more than 0"]),
        ({"kv_heads": 3}, ["num_kv_heads=3 of k does not divide num_heads=4 of q"]),
        ({"kv_heads": 0}, ["num_kv_heads=0 of k does not divide"]),
        ({"view": {"query_segments": np.ones((B, T), int)}}, ["key_segments, both or neither"]),
        ({"view": {"key_positions": np.zeros((B, T), int)}}, ["key_positions", "give [2, 9]"]),
        ({"q": np.zeros((B, T, H))}, ["give [B, T, H, h], [B, S, K, h] and"]),
        ({"q": np.zeros((B, T, H, h + 1))}, ["k (2, 9, 2, 8)", "give k [2, S, K, 9]"]),
        ({"v": np.zeros((B, T, 2, h))}, ["v (2, 5, 2, 8) do not go with q", "same B, S and K"]),
        ({"sinks": np.zeros(2)}, ["sinks has shape (2,); give one per query head, [4]"]),
    ],
)
def test_bad_arguments_are_refused(change, words):
    change = dict(change)
    q, k, v = drawn_arrays(0, change.pop("kv_heads", 2))
    positions = {"query_positions": np.zeros((B, T), int), "key_positions": np.zeros((B, S), int)}
    view = View(**positions | change.pop("view", {}))
    arrays = [change.pop(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    refuses(lambda: attention(*arrays, view, **change), *words)
    if "sinks" not in change:
        rest = (np.zeros((B, T, H, h)), np.zeros((B, T, H)), np.zeros((B, T, H, h)))
        refuses(lambda: attention_backward(*arrays, view, *rest, **change), *words)


@pytest.mark.parametrize(
    ("implementation", "positions", "options", "words"),
    [
        ("quick", "any", {}, "attention implementation 'quick' is unknown; use reference, "),
        ("blocked", "any", {}, "cannot do arbitrary positions; use implementation='reference'"),
        ("blocked", "in order", {"causal": False}, "cannot do causal=False; use"),
        ("blocked", "in order", {"sinks": np.zeros(H)}, "cannot do sinks; use"),
        ("blocked", "in order", {"return_lse": True}, "cannot do log-sum-exp (return_lse); use"),
        ("cudnn", "any", {}, "cannot do arbitrary positions; use implementation='reference'"),
        ("cudnn", "any", {"sinks": np.zeros(H)}, "cannot do sinks; use"),
        ("cudnn", "any", {"return_lse": True}, "cannot do log-sum-exp (return_lse); use"),
        ("cudnn", "in order", {"softcap": 2.0}, "cannot do softcap; use"),
        ("cudnn", "packed", {}, "cannot do packed segments; use"),
    ],
)
def test_what_an_implementation_cannot_do_is_refused(implementation, positions, options, words):
    q, k, v = drawn_arrays(0, 2)
    rows = [np.zeros((B, T), int)] * (4 if positions == "packed" else 2)
    view = View(*rows, in_order=positions != "any")
    call = functools.partial(attention, q, k[:, :T], v[:, :T], view, **options)
    refuses(lambda: call(implementation=implementation), implementation, words)


def test_the_default_by_platform():
    """Of shapes alone: cuDNN on GPUs only where it is right, in training as in inference."""
    rows = np.tile(np.arange(64), (2, 1))
    in_order, packed = View(rows, rows, in_order=True), View(rows, rows, rows, rows, True)

    def chosen(platform="gpu", view=in_order, plain=True, dtype=None, h=None, one="qkv", **scores):
        arrays = {name: jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16) for name in "qkv"}
        for name in one:
            arrays[name] = jax.ShapeDtypeStruct((2, 64, 4, h or 64), dtype or jnp.bfloat16)
        scores = Scores(0.1, **scores)
        return default_implementation(platform, *arrays.values(), view, scores, plain)

    for case in ({}, {"dtype": jnp.float16}, {"window": 9}, {"causal": False}, {"h": 128}):
        assert chosen(**case) == "cudnn", case
    for case in (
        {"dtype": jnp.float32}, {"h": 256}, {"h": 60}, {"softcap": 3.0}, {"view": packed},
        {"one": "v", "h": 128}, {"one": "k", "dtype": jnp.float16}, {"platform": "cpu"},
        {"platform": None},
    ):  # fmt: skip
        assert chosen(**case) == "blocked", case
    for case in ({"plain": False}, {"view": View(rows, rows)}, {"softcap": 3.0, "causal": False}):
        assert chosen(**case) == "reference", case
    assert chosen("tpu") == chosen("tpu", plain=False) == chosen("tpu", View(rows, rows)) == "flash"
    short = [jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.bfloat16)] * 3
    assert default_implementation("tpu", *short, View(0, 0), Scores(1.0), True) == "reference"
