"""Token log-probabilities: which implementation runs."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import jax

from lm.kernels.cross_entropy.fused import fused_token_logprobs, make_placement
from lm.kernels.cross_entropy.reference import reference_token_logprobs

Implementation = Literal["reference", "fused"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

# From about here on chunks take no more time on CPU (0.6 to 1.1 times the reference's), though they
# compute the logits twice; on accelerators the value is a guess.
MAX_LOGIT_BYTES = 32 * 2**20


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
    entropy: bool = False,
) -> tuple[jax.Array, ...]:
    """Log-probability of each target under softmax(hidden @ weight), and the log-sum-exp.

    Both outputs are differentiable with respect to `hidden` and `weight`: cross-entropy is minus
    the first, z-loss (arXiv:2204.02311) a multiple of the second squared. Matrices multiply in the
    dtype of `hidden` and add up in float32; logits are float32.

    Args:
      hidden: [..., D]; [B, T, D] is split over the mesh by `batch` and `sequence`, [B, D] by
        `batch`.
      weight: [D, V padded] with logical axes (embed, vocab), as it rests.
      targets: int32 [...], in 0..vocab_size-1. Another value gives a finite result of no meaning,
        to be masked by the caller.
      transposed: the weight is [V padded, D] instead (output tied to the embedding).
      vocab_size: columns from here on are padding; they take no part.
      softcap: logits become softcap * tanh(logits / softcap) (arXiv:2408.00118).
      implementation: "reference" (all logits at once) or "fused" (a chunk of tokens at a time);
        None for the first unless it would hold more than `max_logit_bytes`.
      max_logit_bytes: bytes of float32 logits per device.
      chunk_tokens: tokens per device and chunk of "fused"; None for what suits the platform.
      entropy: whether to return the entropy of the distribution as well, differentiable like them.

    Returns:
      (log-probability, log-sum-exp), or those and the entropy in nats; each float32 [...].

    Raises:
      ValueError: shapes that do not fit, a size the mesh does not divide, a bad option.
    """
    padded_vocab = _check(hidden, weight, targets, transposed, vocab_size, softcap, chunk_tokens)
    options: dict[str, Any] = {
        "transposed": transposed, "vocab_size": vocab_size, "softcap": softcap, "entropy": entropy,
    }  # fmt: skip
    at = make_placement(hidden.shape, weight.shape, transposed)
    if implementation is None:
        num_tokens = targets.size // at.size(at.scatter + at.reduce)
        large = 4 * num_tokens * padded_vocab // at.size(at.vocab) > max_logit_bytes
        implementation = "fused" if large else "reference"
    if implementation == "reference":
        return reference_token_logprobs(hidden, weight, targets, **options)
    if implementation == "fused":
        return fused_token_logprobs(hidden, weight, targets, chunk_tokens=chunk_tokens, **options)
    raise ValueError(
        f"cross-entropy implementation {implementation!r} is unknown; "
        f"use {', '.join(IMPLEMENTATIONS)}"
    )


def _check(hidden, weight, targets, transposed, vocab_size, softcap, chunk_tokens) -> int:
    """The padded size of the vocabulary, if all is well."""
    if weight.ndim != 2:
        raise ValueError(f"output weight of shape {list(weight.shape)} is not a matrix")
    padded_vocab, size = weight.shape if transposed else weight.shape[::-1]
    if hidden.shape[-1] != size:
        other = "[D, V], transposed=False" if transposed else "[V, D], transposed=True"
        raise ValueError(
            f"hidden size {hidden.shape[-1]} does not match an output weight of shape "
            f"{list(weight.shape)} with transposed={transposed}; is it {other}?"
        )
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets {list(targets.shape)} do not match hidden states {list(hidden.shape)}; "
            f"one target a token: {list(hidden.shape[:-1])}"
        )
    if not 0 < vocab_size <= padded_vocab:
        raise ValueError(
            f"vocab_size={vocab_size} is outside 1..{padded_vocab}, the weight's columns"
        )
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap={softcap}; use a positive number, or None for no cap")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}; use a positive number, or None")
    return padded_vocab
