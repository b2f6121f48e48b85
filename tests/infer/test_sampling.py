"""Sampling: the distribution, its log-probabilities, and randomness that belongs to the request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.infer.sampling import sample_tokens, token_keys

sample = jax.jit(sample_tokens, static_argnames="vocab_size")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def drawn_logits(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (rows, width)).astype(np.float32)


def test_greedy_is_the_argmax_of_the_real_vocabulary():
    logits = drawn_logits(64, 16)
    logits[:, 11:] = 50.0  # padding, as if it had not been masked
    keys = token_keys(jnp.arange(64, dtype=jnp.uint32), jnp.zeros(64, jnp.int32))
    tokens, logprobs = sample(logits, keys, jnp.zeros(64), 11)
    np.testing.assert_array_equal(tokens, logits[:, :11].argmax(-1))
    np.testing.assert_allclose(logprobs, log_softmax(logits[:, :11]).max(-1), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_and_logprobs(temperature):
    """Pearson's chi-square over 20,000 draws; log-probabilities are those of temperature 1."""
    N, V = 20_000, 7
    row = drawn_logits(1, V)[0]
    logits = np.broadcast_to(np.append(row, [30.0]), (N, V + 1))
    keys = token_keys(jnp.arange(N, dtype=jnp.uint32), jnp.full(N, 5))
    tokens, logprobs = sample(logits, keys, jnp.full(N, temperature), V)
    expected = N * np.exp(log_softmax(row / temperature))
    counts = np.bincount(tokens, minlength=V)
    assert len(counts) == V
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 22.5  # 6 degrees of freedom: one in a thousand
    np.testing.assert_allclose(logprobs, log_softmax(row)[tokens], atol=1e-5)


def test_a_draw_depends_on_its_row_alone():
    logits = drawn_logits(6, 40)
    seeds, positions = jnp.arange(6, dtype=jnp.uint32), jnp.arange(10, 16)
    temperatures = jnp.array([0.0, 1.0, 1.5, 0.0, 3.0, 1.0])
    tokens, logprobs = sample(logits, token_keys(seeds, positions), temperatures, 40)
    order = np.array([4, 2, 0])
    again, logprobs_again = sample(
        logits[order], token_keys(seeds[order], positions[order]), temperatures[order], 40
    )
    np.testing.assert_array_equal(again, tokens[order])
    np.testing.assert_allclose(logprobs_again, logprobs[order], rtol=1e-6)


def test_a_draw_does_not_depend_on_the_padding():
    logits = drawn_logits(50, 20)
    keys = token_keys(jnp.arange(50, dtype=jnp.uint32), jnp.zeros(50, jnp.int32))
    wide = np.pad(logits, [(0, 0), (0, 12)], constant_values=-1e30)
    tokens, _ = sample(logits, keys, jnp.full(50, 2.0), 20)
    np.testing.assert_array_equal(sample(wide, keys, jnp.full(50, 2.0), 20)[0], tokens)


def test_seeds_and_positions_give_different_keys():
    seeds, positions = np.meshgrid(np.arange(8, dtype=np.uint32), np.arange(8, dtype=np.int32))
    keys = jax.random.key_data(token_keys(seeds.ravel(), positions.ravel()))
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 64
