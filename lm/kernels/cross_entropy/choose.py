"""Which implementation of the cross-entropy runs."""

from __future__ import annotations

import math

import jax

from lm.kernels.cross_entropy.fused import fused_token_logprobs
from lm.kernels.cross_entropy.reference import reference_token_logprobs
from lm.sharding import current_layout

IMPLEMENTATIONS = ("reference", "fused")
MAX_LOGIT_BYTES = 32 << 20


def token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    *,
    transposed: bool,
    vocab_size: int,
    softcap: float | None = None,
    implementation: str | None = None,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
    chunk_tokens: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden weight)[target] and the log-sum-exp, float32; differentiable both.

    Args:
      hidden: [..., D], of the compute dtype; products are added up in float32.
      weight: [D, V padded], or [V padded, D] where `transposed`.
      targets: int [...].
      transposed: the output is tied to the embedding.
      vocab_size: columns from here on are padding and count nothing.
      softcap: logits become softcap * tanh(logits / softcap).
      implementation: "reference" or "fused"; None for "fused" where a device's float32 logits
        would exceed `max_logit_bytes`.
      max_logit_bytes: see there.
      chunk_tokens: tokens whose logits "fused" holds at once.

    Returns:
      Log-probability of each target, and the log-sum-exp of its logits, both [...].

    Raises:
      ValueError: the implementation is unknown.
    """
    vocab = weight.shape[0 if transposed else 1]
    if implementation is None:
        layout = current_layout()
        parts = layout.mesh.size if layout is not None else 1
        logit_bytes = 4 * math.prod(targets.shape) * vocab / parts
        implementation = "fused" if logit_bytes > max_logit_bytes else "reference"
    if implementation == "reference":
        return reference_token_logprobs(
            hidden, weight, targets, transposed=transposed, vocab_size=vocab_size, softcap=softcap
        )
    if implementation == "fused":
        return fused_token_logprobs(
            hidden, weight, targets, transposed=transposed, vocab_size=vocab_size,
            softcap=softcap, chunk_tokens=chunk_tokens,
        )  # fmt: skip
    raise ValueError(
        f"cross-entropy implementation {implementation!r} is unknown; "
        f"use {', '.join(IMPLEMENTATIONS)}"
    )
