from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.order import block_counts, block_pattern, derive_key, epoch_row, permute
from tests.refuses import refuses

WEIGHTS = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers())
def test_permutation_is_a_bijection(size, key):
    values = permute(np.arange(size), size, key)
    np.testing.assert_array_equal(np.sort(values), np.arange(size))


@given(st.integers(1, (1 << 62) - 1), st.integers(0, 1 << 64), st.data())
def test_permutation_of_a_huge_range_needs_no_memory(size, key, data):
    index = data.draw(st.lists(st.integers(0, size - 1), max_size=20, unique=True))
    values = permute(index, size, key)
    assert len({v for v in values.tolist() if 0 <= v < size}) == len(index)
    for i, v in zip(index, values.tolist(), strict=True):
        assert permute(i, size, key) == v


def test_keys_give_unrelated_orders():
    size = 1009
    orders = [permute(np.arange(size), size, derive_key(seed)) for seed in range(30)]
    fixed = [np.mean(a == b) * size for i, a in enumerate(orders) for b in orders[:i]]
    assert 0.8 < np.mean(fixed) < 1.2  # two random permutations agree in one place on average
    # Neighbours scatter: a random permutation's mean step is size / 3.
    steps = [np.abs(np.diff(order)).mean() for order in orders]
    assert abs(np.mean(steps) / (size / 3) - 1) < 0.03


@pytest.mark.parametrize("size", [2, 3, 5])
def test_small_permutations_all_occur(size):
    seen = {tuple(permute(np.arange(size), size, derive_key(k)).tolist()) for k in range(2000)}
    assert len(seen) == np.prod(np.arange(1, size + 1))


@settings(deadline=None)
@given(WEIGHTS, st.integers(50, 2000))
def test_block_counts_are_within_a_row_of_the_quota(weights, block):
    counts = block_counts(weights, block)
    exact = [Fraction(str(w)) for w in weights]
    quotas = [block * w / sum(exact) for w in exact]
    assert sum(counts) == block
    assert all(abs(c - q) < 1 for c, q in zip(counts, quotas, strict=True))
    # Largest remainders: who was rounded up lost more by rounding down than who was not.
    up = [q - int(q) for c, q in zip(counts, quotas, strict=True) if c > q]
    down = [q - int(q) for c, q in zip(counts, quotas, strict=True) if c < q]
    assert not (up and down) or min(up) >= max(down)


def test_block_counts_of_known_shares():
    assert block_counts([0.7, 0.3], 1000) == (700, 300)
    assert block_counts([1 / 3, 1 / 3, 1 / 3], 1000) == (334, 333, 333)
    assert block_counts([5, 0, 3], 16) == (10, 0, 6)
    assert block_counts([0.1, 0.2, 0.3], 6) == (1, 2, 3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), st.integers())
def test_a_block_pattern_holds_its_counts_and_ranks_in_order(counts, key):
    sources, ranks = block_pattern(tuple(counts), key)
    np.testing.assert_array_equal(np.bincount(sources, minlength=len(counts)), counts)
    for s in range(len(counts)):
        np.testing.assert_array_equal(ranks[sources == s], np.arange(counts[s]))
    one, other = (block_pattern((500, 500), k)[0] for k in (key, key + 1))
    assert 400 < np.sum(one == other) < 600


def test_epochs_and_sources_differ_in_order():
    first, second = epoch_row(np.arange(200), 100, 0).reshape(2, 100)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch_row(np.arange(100), 100, 0, source=1))
    assert not np.array_equal(first, epoch_row(np.arange(100), 100, 1))


def test_bad_input():
    for weights, words in (
        ([], "non-empty"),
        ([1.0, -0.1], "not negative"),
        ([0.0, 0.0], "not all zero"),
        ([1.0, float("nan")], "finite"),
        ([1.0, 0.0001], "weight 0.0001 of source 1 gives no row in a block of 1000"),
    ):
        refuses(lambda weights=weights: block_counts(weights), words)
    refuses(lambda: permute(0, 0, 0), "size=0")
    refuses(lambda: permute([1, 5], 5, 0), "exceeds range(5)")
