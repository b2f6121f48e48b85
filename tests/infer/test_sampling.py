"""Sampling: the distribution, its log-probabilities, and randomness that belongs to the request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.infer.sampling import keep_top_k, keep_top_p, sample_tokens, token_keys

sample = jax.jit(sample_tokens, static_argnames="vocab_size")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def drawn_logits(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (rows, width)).astype(np.float32)


def test_greedy_is_the_first_argmax_of_the_real_vocabulary():
    logits = drawn_logits(64, 16)
    logits[:4, :11] = 0
    logits[1, [2, 5, 8]], logits[2], logits[3] = 1, -1, -np.inf
    logits[3, 6:8] = -1
    logits[:, 11:] = 50.0  # padding, as if it had not been masked
    keys = token_keys(jnp.arange(64, dtype=jnp.uint32), jnp.zeros(64, jnp.int32))
    tokens, logprobs, sampling = sample(logits, keys, jnp.zeros(64), 11)
    assert not np.any(sampling)
    np.testing.assert_array_equal(tokens, logits[:, :11].argmax(-1))
    assert tokens[:4].tolist() == [0, 2, 0, 6]
    np.testing.assert_allclose(logprobs, log_softmax(logits[:, :11]).max(-1), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_and_logprobs(temperature):
    """Pearson's chi-square over 20,000 draws; log-probabilities are those of temperature 1."""
    N, V = 20_000, 7
    row = drawn_logits(1, V)[0]
    logits = np.broadcast_to(np.append(row, [30.0]), (N, V + 1))
    keys = token_keys(jnp.arange(N, dtype=jnp.uint32), jnp.full(N, 5))
    tokens, logprobs, sampling = sample(logits, keys, jnp.full(N, temperature), V)
    expected = N * np.exp(log_softmax(row / temperature))
    counts = np.bincount(tokens, minlength=V)
    assert len(counts) == V
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 22.5  # 6 degrees of freedom: one in a thousand
    np.testing.assert_allclose(logprobs, log_softmax(row)[tokens], atol=1e-5)
    np.testing.assert_allclose(sampling, log_softmax(row / temperature)[tokens], atol=1e-5)


def test_a_draw_does_not_depend_on_the_padding():
    logits = drawn_logits(50, 20)
    keys = token_keys(jnp.arange(50, dtype=jnp.uint32), jnp.zeros(50, jnp.int32))
    wide = np.pad(logits, [(0, 0), (0, 12)], constant_values=-1e30)
    tokens = sample(logits, keys, jnp.full(50, 2.0), 20)[0]
    np.testing.assert_array_equal(sample(wide, keys, jnp.full(50, 2.0), 20)[0], tokens)


def test_seeds_and_positions_give_different_keys():
    seeds, positions = np.meshgrid(np.arange(8, dtype=np.uint32), np.arange(8, dtype=np.int32))
    keys = jax.random.key_data(token_keys(seeds.ravel(), positions.ravel()))
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 64


def kept(logits: np.ndarray) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in logits]


def test_the_likeliest_tokens_are_kept():
    """Against sorting; rows of 4 ties, negative zeros and infinities among them."""
    logits = drawn_logits(40, 33).round(0)
    logits[:, 5], logits[0, 7] = -0.0, -np.inf
    counts = np.arange(40) % 33 + 1
    for row, count, found in zip(
        logits, counts, kept(np.asarray(keep_top_k(logits, counts))), strict=True
    ):
        last = np.sort(row)[::-1][count - 1]
        assert found == set(np.flatnonzero((row >= last) & np.isfinite(row)).tolist())


def test_the_fewest_of_enough_probability_are_kept():
    logits = drawn_logits(40, 33)
    least = np.linspace(0.01, 0.999, 40).astype(np.float32)
    for row, p, found in zip(
        logits, least, kept(np.asarray(keep_top_p(logits, least))), strict=True
    ):
        order = np.argsort(-row)
        total = np.cumsum(np.exp(log_softmax(row))[order])
        assert found == set(order[: int(np.searchsorted(total, p)) + 1].tolist())


def test_filters_are_applied_in_turn_and_by_row():
    """Top-p is of what top-k left, min-p of what top-p left; rows without filters draw as before.
    Each sampling log-probability is that of the truncated distribution."""
    row = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
    logits = jnp.log(jnp.tile(row, (4000, 1)))
    keys = token_keys(jnp.arange(4000, dtype=jnp.uint32), jnp.zeros(4000, jnp.int32))
    which = jnp.arange(4000) % 4  # no filter, top_k=2, top_k=2 and then top_p=0.5, min_p=0.5
    tokens, logprobs, sampling = map(np.asarray, sample(
        logits, keys, jnp.ones(4000), 4,
        top_ks=jnp.where((which == 1) | (which == 2), 2, 0),
        top_ps=jnp.where(which == 2, 0.5, 1.0), min_ps=jnp.where(which == 3, 0.5, 0.0),
    ))  # fmt: skip
    plain = sample(logits, keys, jnp.ones(4000), 4).tokens
    np.testing.assert_array_equal(tokens[::4], plain[::4])
    np.testing.assert_allclose(logprobs, np.log(row)[tokens], atol=1e-6)
    for i, kept in enumerate((4, 2, 1, 3)):  # 0.4 / 0.7 is enough of top-p, 0.2 / 0.4 of min-p
        probabilities = row[:kept] / row[:kept].sum()
        drawn = tokens[i::4]
        assert set(drawn.tolist()) == set(range(kept))
        np.testing.assert_allclose(np.bincount(drawn) / 1000, probabilities, atol=0.06)
        np.testing.assert_allclose(sampling[i::4], np.log(probabilities)[drawn], atol=1e-5)


def test_biases_move_draws_and_not_the_models_log_probabilities():
    """By -inf in effect, for greedy rows too; ids outside the vocabulary move nothing."""
    logits = drawn_logits(8, 12)
    keys = token_keys(jnp.arange(8, dtype=jnp.uint32), jnp.zeros(8, jnp.int32))
    temperatures = jnp.where(jnp.arange(8) % 2 == 0, 0.0, 1.0)
    best = logits.argmax(-1)
    ids, values = np.stack([best, np.full(8, 12)], 1), np.full((8, 2), -1e9, np.float32)
    tokens, logprobs, sampling = sample(logits, keys, temperatures, 12, bias=(ids, values))
    assert not np.any(tokens == best)
    np.testing.assert_allclose(logprobs, log_softmax(logits)[np.arange(8), tokens], atol=1e-5)
    banned = np.where(np.arange(12) == best[:, None], -1e9, logits)
    drawn = np.arange(1, 8, 2)
    np.testing.assert_array_equal(tokens[::2], banned[::2].argmax(-1))
    expected = log_softmax(banned)[drawn, tokens[drawn]]
    np.testing.assert_allclose(sampling[drawn], expected, atol=1e-5)
