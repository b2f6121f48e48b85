"""Token log-probabilities the plain way: the logits of every token at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.matmul import dot
from lm.sharding import constrain, gather_weight

# Finite, so that a device that holds nothing but padding columns makes no NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def reference_token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    *,
    transposed: bool,
    vocab_size: int,
    softcap: float | None = None,
    entropy: bool = False,
) -> tuple[jax.Array, ...]:
    """As `token_logprobs`, holding float32 logits [..., V] until the backward pass."""
    tokens = token_axes(hidden.ndim - 1, "sequence")
    hidden = constrain(hidden, *tokens, None)
    matrix = gather_weight(weight.astype(hidden.dtype), *weight_axes(transposed))
    projected: Any = _project(hidden, matrix, transposed)
    logits = constrain(projected, *tokens, "vocab")
    return of_logits(logits, targets, vocab_size, softcap, entropy)


def of_logits(
    logits: jax.Array, targets: jax.Array, vocab_size: int, softcap: float | None, entropy: bool
) -> tuple[jax.Array, ...]:
    """The results of `token_logprobs`, from float32 logits [..., V] not capped yet."""
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    columns = jnp.arange(logits.shape[-1])
    if vocab_size < logits.shape[-1]:
        logits = jnp.where(columns < vocab_size, logits, MASKED)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    # A gather along a sharded vocabulary would bring the logits together; a masked sum does not.
    target = jnp.sum(jnp.where(columns == targets[..., None], logits, 0.0), axis=-1)
    if not entropy:
        return target - logsumexp, logsumexp
    real = jnp.where(columns < vocab_size, logits, 0.0)  # a gradient times MASKED may overflow
    mean = jnp.sum(jnp.exp(logits - logsumexp[..., None]) * real, axis=-1)
    return target - logsumexp, logsumexp, logsumexp - mean


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(hidden: jax.Array, matrix: jax.Array, transposed: bool) -> jax.Array:
    """Logits in float32; on the way back they multiply in the dtype of `hidden`."""
    return dot(hidden, matrix, transpose_y=transposed, out_dtype=jnp.float32)


def _project_forward(hidden, matrix, transposed):
    return _project(hidden, matrix, transposed), (hidden, matrix)


def _project_backward(transposed, saved, d_logits):
    hidden, matrix = saved
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = dot(d_logits, matrix, transpose_y=not transposed)
    pair = (d_logits, hidden) if transposed else (hidden, d_logits)
    return d_hidden, dot(*pair, transpose_x=True)


_project.defvjp(_project_forward, _project_backward)


def token_axes(num_dims: int, sequence: str) -> tuple[str | None, ...]:
    """Logical axes of the token dimensions: [B, T, ...], or a flat [B]."""
    return ("batch", sequence, *(None,) * num_dims)[:num_dims]


def weight_axes(transposed: bool) -> tuple[str, str]:
    """Logical axes of the output matrix."""
    return ("vocab", "embed") if transposed else ("embed", "vocab")
