"""The attention function: which implementation runs."""

from __future__ import annotations

from typing import Any

import jax

from lm.kernels.attention.blocked import blocked_attention
from lm.kernels.attention.reference import (
    View,
    reference_attention,
    reference_attention_backward,
)
from lm.kernels.attention.sharded import (
    on_tpu,
    sharded_flash,
    sharded_flash_backward,
    sharded_flash_gpu,
    sharded_splash,
)

IMPLEMENTATIONS = ("reference", "blocked", "flash", "mosaic_gpu", "splash", "cudnn")
FLASH_FROM = 16  # queries; of fewer, as in decoding, most of a block would be padding


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """softmax(scale q k^T) v, grouped-query, masked by positions, segments and window.

    Args:
      q: [B, T, H, h].
      k, v: [B, S, K, h]; K divides H, and query heads g..g+H/K-1 share one of them; the head size
        of v may be another than that of q and k.
      view: positions and segments of queries and keys.
      scale: multiplies the scores.
      causal: a query sees no later position.
      window: positions a query sees, itself included; None for all.
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
      sinks: [H] scores of a key with no value, added to the denominator (GPT-OSS).
      return_lse: also return the log-sum-exp of the scores, float32 [B, T, H].
      implementation: "flash" is a kernel for TPUs (interpreted on CPUs), "mosaic_gpu" one for
        Hopper GPUs (compiled for H200; never run), "splash" JAX's own for TPUs, "cudnn" cuDNN's;
        "blocked" and "reference" are plain JAX. None for "flash" where the
        layout's mesh is of TPUs and there are at least `FLASH_FROM` queries, else "blocked" where
        it applies (causal attention of tokens to themselves, no sinks, no log-sum-exp), else
        "reference". On a mesh, the kernels but cuDNN's run on each device's batch rows and heads.

    Returns:
      [B, T, H, h of v] of q's dtype (and the log-sum-exp). A query that sees no key gets zeros, and
      -0.7 times the largest float32 as its log-sum-exp: finite, so that `jnp.logaddexp` and
      exp(lse - max) of parts merge without NaN.

    Raises:
      ValueError: the implementation is unknown, or cannot do what is asked, or not on this mesh.
    """
    blocked = causal and view.in_order and sinks is None and not return_lse
    if implementation is None:
        plain = "blocked" if blocked else "reference"
        implementation = "flash" if on_tpu() and q.shape[1] >= FLASH_FROM else plain
    if implementation == "flash":
        return sharded_flash(
            q, k, v, view, scale=scale, causal=causal, window=window,
            softcap=softcap, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    if implementation == "mosaic_gpu":
        return sharded_flash_gpu(
            q, k, v, view, scale=scale, causal=causal, window=window,
            softcap=softcap, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    if implementation == "blocked":
        if not blocked:
            raise ValueError(
                "blocked attention is causal, of tokens in order to themselves, without sinks or "
                "log-sum-exp; use implementation='reference'"
            )
        return blocked_attention(q, k, v, view, scale=scale, window=window, softcap=softcap)
    if implementation == "reference":
        return reference_attention(
            q, k, v, view, scale=scale, causal=causal, window=window,
            softcap=softcap, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    if implementation == "splash":
        refused = {
            "sinks": sinks,
            "return_lse": return_lse,
            "arbitrary positions": not view.in_order,
        }
        _refuse("splash", "flash", refused)
        return sharded_splash(
            q, k, v, view, scale=scale, causal=causal, window=window, softcap=softcap
        )  # fmt: skip
    if implementation == "cudnn":
        return _cudnn(q, k, v, view, scale, causal, window, softcap, sinks, return_lse)
    raise ValueError(
        f"attention implementation {implementation!r} is unknown; use {', '.join(IMPLEMENTATIONS)}"
    )


def attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    dlse: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of attention where `k`, `v` may be only a part of the keys.

    Each weight is exp(score - lse), so the results of the parts add up: to dq as they are, to dk
    and dv each its own rows. Sinks need nothing here if `out` and `lse` count them.

    Args:
      q, k, v, view, scale, causal, window, softcap: as `attention`.
      out, lse: [B, T, H, h of v] and [B, T, H], of the softmax over all keys.
      dout: the gradient of `out`.
      dlse: the gradient of `lse`, float32 [B, T, H]; None for 0.
      implementation: "reference" or "flash"; None for "flash" where the layout's mesh is of TPUs.

    Returns:
      (dq, dk, dv), float32, shaped as q, k and v. Queries that see no key of this part, and keys
      that no query sees, get zeros.

    Raises:
      ValueError: the implementation is unknown, or cannot do what is asked.
    """
    if implementation is None:
        implementation = "flash" if on_tpu() else "reference"
    options: dict[str, Any] = {
        "scale": scale, "causal": causal, "window": window, "softcap": softcap, "dlse": dlse,
    }  # fmt: skip
    if implementation == "flash":
        return sharded_flash_backward(q, k, v, view, out, lse, dout, **options)
    if implementation == "reference":
        return reference_attention_backward(q, k, v, view, out, lse, dout, **options)
    raise ValueError(
        f"attention_backward implementation {implementation!r} is unknown; use reference or flash"
    )


def _cudnn(q, k, v, view, scale, causal, window, softcap, sinks, return_lse):
    """cuDNN's flash attention; rows must be whole documents, positions 0..T-1."""
    refused = {
        "packed segments": view.query_segments,
        "softcap": softcap,
        "sinks": sinks,
        "return_lse": return_lse,
        "head sizes that differ": q.shape[3] != v.shape[3],
        "arbitrary positions": not view.in_order,
    }
    _refuse("cudnn", "reference", refused)
    local = None if window is None else (window - 1, 0 if causal else window - 1)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=local, implementation="cudnn"
    )


def _refuse(name: str, instead: str, refused: dict[str, Any]) -> None:
    for what, asked in refused.items():
        if asked is not None and asked is not False:
            raise ValueError(f"{name} attention cannot do {what}; use implementation={instead!r}")
