"""The attention function: which implementation runs."""

from __future__ import annotations

from typing import Any

import jax

from lm.kernels.attention.blocked import blocked_attention
from lm.kernels.attention.flash_gpu import flash_attention_gpu_backward
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
      ValueError: shapes disagree, the window or soft-cap is not positive, only one side has
        segments, or the implementation is unknown, or cannot do what is asked, or not on this mesh.
    """
    _check(q, k, v, view, sinks)
    check_scores(window, softcap)
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
      implementation: "reference", "flash", or "mosaic_gpu" on a device's own arrays; None for
        "flash" where the layout's mesh is of TPUs.

    Returns:
      (dq, dk, dv), float32, shaped as q, k and v. Queries that see no key of this part, and keys
      that no query sees, get zeros.

    Raises:
      ValueError: as `attention`.
    """
    _check(q, k, v, view)
    check_scores(window, softcap)
    if implementation is None:
        implementation = "flash" if on_tpu() else "reference"
    options: dict[str, Any] = {
        "scale": scale, "causal": causal, "window": window, "softcap": softcap, "dlse": dlse,
    }  # fmt: skip
    if implementation == "flash":
        return sharded_flash_backward(q, k, v, view, out, lse, dout, **options)
    if implementation == "reference":
        return reference_attention_backward(q, k, v, view, out, lse, dout, **options)
    if implementation == "mosaic_gpu":
        return flash_attention_gpu_backward(q, k, v, view, out, lse, dout, **options)
    raise ValueError(
        f"attention_backward implementation {implementation!r} is unknown; use reference, flash or "
        "mosaic_gpu"
    )


def check_scores(window: int | None, softcap: float | None) -> None:
    """Raises ValueError for a window of no positions, or a soft-cap that is not positive.

    Arrays, which may be traced, are not looked at.
    """
    if window is not None and not isinstance(window, jax.Array) and window < 1:
        raise ValueError(f"window={window}; use 1 or more, or None to see all positions")
    if softcap is not None and not isinstance(softcap, jax.Array) and not softcap > 0:
        raise ValueError(f"softcap={softcap}; use more than 0, or None for scores as they are")


def _check(q, k, v, view: View, sinks: jax.Array | None = None) -> None:
    """Raises ValueError for shapes that disagree; one row's positions may stand for all rows."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}; give [B, T, H, h], "
            "[B, S, K, h] and [B, S, K, h of v]"
        )
    (B, T, H, h), (S, K) = q.shape, k.shape[1:3]
    if k.shape != (B, S, K, h) or v.shape[:3] != (B, S, K):
        raise ValueError(
            f"k {k.shape} and v {v.shape} do not go with q {q.shape}; give k [{B}, S, K, {h}] and "
            "v [B, S, K, h of v] of the same B, S and K"
        )
    if K == 0 or H % K:
        raise ValueError(f"num_kv_heads={K} of k does not divide num_heads={H} of q")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"sinks has shape {sinks.shape}; give one a query head, [{H}]")
    if (view.query_segments is None) != (view.key_segments is None):
        raise ValueError("give the view query_segments and key_segments, both or neither")
    for side, length in (("query", T), ("key", S)):
        for what in ("positions", "segments"):
            x = getattr(view, f"{side}_{what}")
            if x is not None and x.shape not in ((B, length), (1, length)):
                raise ValueError(
                    f"{side}_{what} of the view has shape {x.shape}; give [{B}, {length}]"
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
