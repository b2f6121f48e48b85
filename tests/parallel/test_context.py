"""Rows split along the sequence: ring attention and Ulysses give what one device gives."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.attention import Scores, View, mask
from lm.model import Tokens
from lm.parallel import (
    STRATEGIES,
    Zigzag,
    check_context,
    choose_strategy,
    context_attention,
    reorder_for,
    ring,
    ring_attention,
    ulysses_attention,
    zigzag_order,
)
from lm.sharding import Layout, constrain, make_rules, named_sharding, use_layout
from tests.parallel.rows import (
    draw,
    draw_documents,
    jitted,
    make_layout,
    on_one_device,
    reordered,
)
from tests.train.hlo import collectives

GEMMA = {"window": 9, "softcap": 2.0}
# way, mesh, query and key/value heads, packed, options
SLOW = [
    ("ring", {"fsdp": 2, "context": 2, "tensor": 2}, (4, 2), False, {}),
    ("zigzag", {"context": 8}, (4, 1), True, {}),
    ("ulysses", {"context": 4, "tensor": 2}, (8, 8), False, {}),
]
CASES = [
    ("ring", {"context": 8}, (4, 2), True, GEMMA),
    ("zigzag", {"data": 2, "context": 4}, (4, 2), False, GEMMA),
    ("zigzag", {"fsdp": 2, "context": 2, "tensor": 2}, (4, 2), True, GEMMA),
    ("ulysses", {"context": 8}, (16, 2), True, GEMMA),
    ("ulysses", {"fsdp": 2, "context": 2, "tensor": 2}, (8, 2), True, {}),
]


def split(way, axes, rows, options):
    """Result and gradients in the rows' own order, and the compiled program."""
    layout = make_layout(**axes)
    order = np.arange(rows.q.shape[1])
    if way == "zigzag":
        order = zigzag_order(len(order), axes["context"])
    function = ulysses_attention if way == "ulysses" else ring_attention
    rows = reordered(rows, order)
    compiled = jitted(function, layout, way != "zigzag", options).lower(rows).compile()
    return reordered(compiled(rows), np.argsort(order)), collectives(
        compiled.as_text(), layout.mesh
    )


def name(case):
    way, axes, heads, packed, options = case
    parts = [way, *(f"{a}{n}" for a, n in axes.items()), "{}of{}".format(*heads)]
    return "-".join([*parts, *(["packed"] if packed else []), *options])


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)], ids=name
)
def test_equals_one_device(case):
    way, axes, heads, packed, options = case
    rows = draw(4, 64, *heads, packed)
    actual, talk = split(way, axes, rows, options)
    for x, y in zip(actual, on_one_device(rows, options), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.max(np.abs(y)))
    talk = [c for c in talk if c.axes]
    assert {c.axes for c in talk} == {("context",)}
    large = {c.op for c in talk if len(c.shape) > 3}
    assert large == {"all-to-all" if way == "ulysses" else "collective-permute"}, talk


@pytest.mark.parametrize("way", ["zigzag", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_bfloat16_is_as_exact_as_on_one_device(way):
    """Merging rounded results costs less than a bfloat16's last digit, 2 ** -8, of the largest."""
    rows = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16 if x.dtype == np.float32 else x.dtype),
        draw(2, 64, 4, 2, True),
    )
    exact = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype == jnp.bfloat16 else x.dtype), rows
    )
    actual, _ = split(way, {"context": 2}, rows, GEMMA)
    for x, y in zip(actual, on_one_device(exact, GEMMA), strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.max(np.abs(np.float32(x) - y)) < 2**-7 * np.max(np.abs(y))


def test_a_window_over_rows_in_order_asks_neighbours_only():
    layout = make_layout(context=8)

    def sent_in_loops(in_order):
        def forward(rows):
            with use_layout(layout):
                tokens = rows.positions, rows.positions
                view = View(*tokens, in_order=in_order)
                return ring_attention(*rows[:3], view, Scores(1.0, window=9))

        compiled = jax.jit(forward).lower(draw(1, 64, 1, 1, False)).compile()
        return [c.loops for c in collectives(compiled.as_text(), layout.mesh) if c.loops]

    assert not sent_in_loops(True)
    assert sent_in_loops(False)


def seen_by_halves(view, parts, window):
    """bool [queries' halves, keys' halves] by the mask itself."""
    seen = np.asarray(mask(view, Scores(1.0, window=window))).any(0)
    return seen.reshape(parts, len(seen) // parts, parts, -1).any((1, 3))


def judged_by_halves(view, parts, window):
    def ranges(positions, segments):
        def halves(x):
            return jnp.moveaxis(x.reshape(x.shape[0], parts, -1), 1, 0)

        return ring.ranges(halves(positions), halves(segments))

    queries = ranges(view.query_positions, view.query_segments)
    keys = ranges(view.key_positions, view.key_segments)
    return np.asarray(ring.may_see(queries, keys, Scores(1.0, window=window)))


@pytest.mark.parametrize("window", [None, 3])
def test_nothing_that_is_seen_is_skipped(window):
    """Whatever the order: tokens of drawn documents are shuffled here."""
    rng = np.random.default_rng(0)
    skipped = 0
    for _ in range(20):
        fields = [x[:, rng.permutation(24)] for x in draw_documents(rng, 1, 24)]
        fields[1] = np.where(rng.random((1, 24)) < 0.5, 1 + np.arange(24) // 6, fields[1])
        view = View(fields[0], fields[0], fields[1], fields[1])
        seen, judged = seen_by_halves(view, 6, window), judged_by_halves(view, 6, window)
        assert np.all(judged | ~seen)
        skipped += np.sum(~judged)
    assert skipped > 0


def test_all_that_is_not_seen_is_skipped_of_documents_in_order():
    rng = np.random.default_rng(1)
    for _ in range(20):
        positions, segments = draw_documents(rng, 1, 64)
        view = View(positions, positions, segments, segments)
        seen, judged = seen_by_halves(view, 8, None), judged_by_halves(view, 8, None)
        np.testing.assert_array_equal(judged, seen)


def pairs_computed(monkeypatch, order, n):
    """How many pairs of halves each device computes, counted as they are computed."""
    counts = collections.Counter()
    attention = ring.attention

    def counted(*args, **kwargs):
        jax.debug.callback(lambda i: counts.update([int(i)]), jax.lax.axis_index("context"))
        return attention(*args, **kwargs)

    monkeypatch.setattr(ring, "attention", counted)
    rows = reordered(draw(1, 64, 1, 1, False), order)
    layout = make_layout(context=n)

    def forward(rows):
        with use_layout(layout):
            view = View(rows.positions, rows.positions)
            return ring_attention(rows.q, rows.k, rows.v, view, Scores(1.0))

    jax.block_until_ready(jax.jit(forward)(rows))
    jax.effects_barrier()
    return [counts[i] for i in range(n)]


def test_zigzag_gives_every_device_the_same_work(monkeypatch):
    n = 4
    balanced = pairs_computed(monkeypatch, zigzag_order(64, n), n)
    assert balanced == [2 * n + 1] * n
    assert pairs_computed(monkeypatch, np.arange(64), n) == [4 * i + 3 for i in range(n)]


@pytest.mark.parametrize("n", [2, 8, 64])
def test_queries_of_every_device_see_as_many_keys(n):
    T = 16 * n
    seen = np.tril(np.ones((T, T))).sum(1)  # of a causal row
    work = seen[zigzag_order(T, n)].reshape(n, -1).sum(1)
    assert np.ptp(work) == 0
    contiguous = seen.reshape(n, -1).sum(1)
    assert contiguous.max() > 1.4 * contiguous.mean()


@pytest.mark.parametrize(
    "axes",
    [{"context": 2}, {"context": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}],
    ids=lambda axes: "-".join(f"{a}{n}" for a, n in axes.items()),
)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_zigzag_reorders_tokens_and_hidden_states_back(axes, sequence_parallel):
    """Every device sends what it holds, and no more; the gradient comes back the same way."""
    layout = make_layout(**axes)
    layout = Layout(layout.mesh, make_rules(3, sequence_parallel))
    n, ids = axes["context"], np.random.default_rng(0).integers(0, 99, (2, 32)).astype(np.int32)
    weights = np.random.default_rng(1).normal(size=(2, 32, 4)).astype(np.float32)

    def there_and_back(ids, weights):
        with use_layout(layout):
            tokens = Zigzag().tokens(Tokens(ids, ids + 1))
            assert tokens.segment_ids is None and not tokens.in_order
            hidden = tokens.ids[..., None] * jnp.ones(4)
            return tokens, Zigzag().restore(constrain(hidden, "batch", "residual_sequence", None))

    def value(hidden):
        with use_layout(layout):
            return jnp.sum(Zigzag().restore(hidden) * weights)

    (tokens, restored), order = jax.jit(there_and_back)(ids, weights), zigzag_order(32, n)
    np.testing.assert_array_equal(tokens.ids, ids[:, order])
    np.testing.assert_array_equal(tokens.positions, ids[:, order] + 1)
    first = np.c_[ids[:, : 16 // n], ids[:, -16 // n :]]  # two of 2 n chunks
    np.testing.assert_array_equal(tokens.ids[:, : 32 // n], first)
    np.testing.assert_array_equal(restored, np.repeat(ids[..., None], 4, -1))
    names = ("batch", "residual_sequence", None)
    where = named_sharding(layout.mesh, layout.rules.activations, names)
    gradient = jax.jit(jax.grad(value), in_shardings=where, out_shardings=where)
    compiled = gradient.lower(weights).compile()
    np.testing.assert_array_equal(compiled(jax.device_put(weights, where)), weights[:, order])
    talk = [c for c in collectives(compiled.as_text(), layout.mesh) if c.axes]
    assert {c.op for c in talk} <= {"collective-permute"}, talk


def test_errors_name_what_would_work():
    with pytest.raises(
        ValueError, match="sequence_length=24; use a context of 1, 2, 3, 4, 6 or 12"
    ):
        zigzag_order(24, 8)
    with pytest.raises(ValueError, match="even length"):
        zigzag_order(25, 8)

    def trace(function, layout, length, heads, kv_heads):
        rows = draw(2, length, heads, kv_heads, False)
        jax.eval_shape(jitted(function, layout, True, {}), rows)

    context = make_layout(context=8)
    with pytest.raises(ValueError, match=r"12 query and 4 .*'context'=8; use .* 1, 2, 4 or 12,"):
        trace(ulysses_attention, context, 16, 12, 4)
    with pytest.raises(ValueError, match=r"6 query and 3 .*'context'=2; use .* 1, 3 or 6"):
        trace(ulysses_attention, make_layout(context=2, tensor=4), 16, 24, 12)
    with pytest.raises(ValueError, match=r"'context'=8 does not divide sequence=12; use 1, 2, 3"):
        trace(ring_attention, context, 12, 4, 4)


@pytest.mark.parametrize("way", ["zigzag", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_the_flash_kernel_runs_inside(way):
    rows = draw(1, 64, 4, 2, True)
    actual, _ = split(way, {"context": 2}, rows, GEMMA | {"implementation": "flash"})
    for x, y in zip(actual, on_one_device(rows, GEMMA), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.max(np.abs(y)))


def test_strategies_are_checked_by_name_before_anything_is_computed():
    layout = make_layout(context=4, tensor=2)
    for way in (None, *STRATEGIES):
        check_context(way, layout, 64, [(32, 8), (8, 2)])
        check_context(way, make_layout(tensor=2), 33, [(6, 6)])  # nothing is split
        assert choose_strategy(way, make_layout(tensor=2)) is None
        assert choose_strategy(way, layout) == (way or "zigzag")
        assert (reorder_for(way) is None) == (way != "zigzag")
    with pytest.raises(ValueError, match="unknown; use ring, zigzag, ulysses"):
        context_attention("striped")
    with pytest.raises(ValueError, match="'context'=4 does not divide sequence_length=42"):
        check_context("ring", layout, 42, [])
    check_context("ring", layout, 44, [])
    with pytest.raises(ValueError, match="use a context of 1, 2, 11 or 22"):
        check_context("zigzag", layout, 44, [])
    with pytest.raises(ValueError, match="6 query and 3 key/value heads of a device"):
        check_context("ulysses", layout, 64, [(32, 8), (12, 6)])


def test_plain_jax_holds_the_scores_of_small_parts_only(monkeypatch):
    monkeypatch.setattr(ring, "LONGEST_PLAIN", 4)
    rows = draw(1, 64, 2, 1, True)
    actual, _ = split("zigzag", {"context": 2}, rows, GEMMA)  # 8 parts a device
    for x, y in zip(actual, on_one_device(rows, GEMMA), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.max(np.abs(y)))
