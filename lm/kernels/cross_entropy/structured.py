"""Token log-probabilities where a function makes the logits, a chunk of tokens at a time.

It is for output matrices that are more than an array: the function multiplies by the matrix as it
is held, and its gradient is the function's own.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.kernels.cross_entropy.fused import CHUNK_TOKENS
from lm.kernels.cross_entropy.reference import of_logits, token_axes
from lm.sharding import constrain, current_layout


def structured_token_logprobs(
    hidden: jax.Array,
    project: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    *,
    vocab_size: int,
    softcap: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    entropy: bool = False,
) -> tuple[jax.Array, ...]:
    """As `token_logprobs`, with `project`: hidden [B, T, D] -> float32 [B, T, V] not capped yet.

    The logits of about `chunk_tokens` tokens per device are held at a time, and made again in the
    backward pass.
    """
    B, T, _ = hidden.shape
    layout = current_layout()
    batch, context = (layout.parts(n) if layout else 1 for n in ("batch", "sequence"))
    num = -(-T * B // (batch * context * chunk_tokens))
    size = -(-T // (context * num))  # tokens of a row, per device and chunk
    padding = context * num * size - T

    def cut(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [num, B, context x size, ...], a part of each device's tokens."""
        rest = x.shape[2:]
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0) for _ in rest)))
        x = jnp.moveaxis(x.reshape(B, context, num, size, *rest), 2, 0)
        x = x.reshape(num, B, context * size, *rest)
        return constrain(x, None, *token_axes(2, "sequence"), *(None for _ in rest))

    @jax.checkpoint
    def step(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        logits = constrain(project(hidden), *token_axes(2, "sequence"), "vocab")
        return of_logits(logits, targets, vocab_size, softcap, entropy)

    if num == 1:
        return step(hidden, targets)
    parts = jax.lax.map(lambda chunk: step(*chunk), (cut(hidden), cut(targets)))

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(num, B, context, size), 0, 2)
        return constrain(x.reshape(B, -1), "batch", "sequence")[:, :T]

    return jax.tree.map(join, parts)
