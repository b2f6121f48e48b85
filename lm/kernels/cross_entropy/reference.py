"""Cross-entropy with the logits held whole: what the fused one is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.sharding import constrain


def reference_token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    *,
    transposed: bool,
    vocab_size: int,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `lm.kernels.cross_entropy.token_logprobs`."""
    equation = "...d,vd->...v" if transposed else "...d,dv->...v"
    weight = weight.astype(hidden.dtype)
    logits = jnp.einsum(equation, hidden, weight, preferred_element_type=jnp.float32)
    if logits.ndim == 3:
        logits = constrain(logits, "batch", "sequence", "vocab")
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    real = jnp.arange(logits.shape[-1]) < vocab_size
    logits = jnp.where(real, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return target - lse, lse
