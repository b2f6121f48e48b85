"""The next token from logits. Randomness belongs to a request and a position, never to a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_keys(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """The random key of each row's token: uint32 seeds [B], int32 positions [B] -> keys [B]."""
    return jax.vmap(lambda seed, p: jax.random.fold_in(jax.random.key(seed), p))(seeds, positions)


def sample_tokens(
    logits: jax.Array, keys: jax.Array, temperatures: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row from softmax(logits / temperature); the largest logit at temperature 0.

    Args:
      logits: float32 [B, V]; columns from `vocab_size` on are padding and are never drawn.
      keys: random keys [B]; not used by rows at temperature 0.
      temperatures: float32 [B].
      vocab_size: tokens of the tokenizer.

    Returns:
      tokens int32 [B], and their log-probabilities at temperature 1, float32 [B].
    """
    logits = logits[:, :vocab_size].astype(jnp.float32)  # draws do not depend on the padding
    greedy = temperatures <= 0

    def draw(_: None) -> jax.Array:
        scaled = logits / jnp.where(greedy, 1.0, temperatures)[:, None]
        return jax.vmap(jax.random.categorical)(keys, scaled)

    best = jnp.argmax(logits, axis=-1)
    # Noise for a whole vocabulary costs more than the rest: none is made where all are greedy.
    drawn = jax.lax.cond(jnp.all(greedy), lambda _: best, draw, None)
    tokens = jnp.where(greedy, best, drawn)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)
