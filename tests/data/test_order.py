import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.order import block_counts, derive_key, epoch_row, mixture_source, permute

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
    assert len(set(values.tolist())) == len(index)
    assert all(0 <= v < size for v in values.tolist())
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
@given(WEIGHTS, st.integers(0, 50), st.integers(0, 9))
def test_mixture_counts_are_exact_in_every_block(weights, seed, number):
    counts = block_counts(weights, 100)
    quotas = 100 * np.asarray(weights) / sum(weights)
    assert counts.sum() == 100
    assert (np.abs(counts - quotas) < 1).all()
    source, _ = mixture_source(np.arange(number * 100, (number + 1) * 100), weights, seed, 100)
    np.testing.assert_array_equal(np.bincount(source, minlength=len(weights)), counts)


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 50), st.lists(st.integers(0, 999), min_size=1))
def test_ranks_count_the_rows_of_a_source(weights, seed, some):
    source, rank = mixture_source(np.arange(1000), weights, seed, 100)
    for s in range(len(weights)):
        np.testing.assert_array_equal(rank[source == s], np.arange(np.sum(source == s)))
    # Any rows, in any order and number, have the source and rank they have in the whole stream.
    some_source, some_rank = mixture_source(some, weights, seed, 100)
    np.testing.assert_array_equal(some_source, source[some])
    np.testing.assert_array_equal(some_rank, rank[some])


def test_blocks_differ_in_order():
    source, _ = mixture_source(np.arange(2000), [0.5, 0.5], 0, 1000)
    assert 400 < np.sum(source[:1000] == source[1000:]) < 600


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 3))
def test_an_epoch_repeats_nothing(num_rows, seed, source):
    rows = epoch_row(np.arange(3 * num_rows), num_rows, seed, source).reshape(3, num_rows)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(num_rows), (3, 1)))


def test_epochs_and_sources_differ_in_order():
    first, second = epoch_row(np.arange(200), 100, 0).reshape(2, 100)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch_row(np.arange(100), 100, 0, source=1))
    assert not np.array_equal(first, epoch_row(np.arange(100), 100, 1))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "non-empty"),
        ([1.0, -0.1], "not negative"),
        ([0.0, 0.0], "not all zero"),
        ([1.0, float("nan")], "finite"),
        ([1.0, 0.0001], "weight 0.0001 of source 1 gives no row in a block of 1000"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        block_counts(weights)


def test_bad_permutations():
    with pytest.raises(ValueError, match="size=0"):
        permute(0, 0, 0)
    with pytest.raises(ValueError, match=r"exceeds range\(5\)"):
        permute([1, 5], 5, 0)
