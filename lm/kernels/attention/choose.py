"""The attention function: which implementation runs."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lm.kernels.attention.blocked import blocked_attention
from lm.kernels.attention.flash_gpu import flash_attention_gpu_backward
from lm.kernels.attention.reference import (
    View,
    reference_attention,
    reference_attention_backward,
)
from lm.kernels.attention.scores import Scores
from lm.kernels.attention.sharded import (
    on_tpu,
    sharded_flash,
    sharded_flash_backward,
    sharded_flash_gpu,
    sharded_splash,
    target,
)

Implementation = Literal["reference", "blocked", "flash", "mosaic_gpu", "splash", "cudnn"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
FLASH_FROM = 16  # queries; of fewer, as in decoding, most of a block would be padding
CUDNN_HEAD_DIM = 128  # the largest cuDNN takes on every GPU since Ampere
# Those that do all that is asked, or say themselves what they do not.
_COMPLETE: dict[str, Any] = {
    "reference": reference_attention, "flash": sharded_flash, "mosaic_gpu": sharded_flash_gpu,
}  # fmt: skip


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """softmax(scale q k^T) v, grouped-query, masked by positions, segments and window.

    Args:
      q: [B, T, H, h].
      k, v: [B, S, K, h]; K divides H, and query heads g..g+H/K-1 share one of them; the head size
        of v may differ from that of q and k.
      view: positions and segments of queries and keys.
      scores: scale, causality, window and soft-cap.
      sinks: [H] scores of a key with no value, added to the denominator (GPT-OSS).
      return_lse: also return the log-sum-exp of the scores, float32 [B, T, H].
      implementation: "flash" is a kernel for TPUs (interpreted on CPUs), "mosaic_gpu" one for
        Hopper GPUs (compiled for H200; never run), "splash" JAX's own for TPUs, "cudnn" cuDNN's;
        "blocked" and "reference" are plain JAX. None for what `default_implementation` says of the
        layout's devices. On a mesh, the kernels but cuDNN's run on each device's batch rows and
        heads.

    Returns:
      [B, T, H, h of v] of q's dtype (and the log-sum-exp). A query that sees no key gets zeros, and
      -0.7 times the largest float32 as its log-sum-exp: finite, so that `jnp.logaddexp` and
      exp(lse - max) of parts merge without NaN.

    Raises:
      ValueError: shapes disagree, the window or soft-cap is not positive, only one side has
        segments, or the implementation is unknown, or cannot do what is asked, or not on this mesh.
    """
    _check(q, k, v, view, sinks)
    if implementation is None:
        implementation = default_implementation(
            _platform(), q, k, v, view, scores, plain=sinks is None and not return_lse
        )
    if implementation in _COMPLETE:
        complete = _COMPLETE[implementation]
        return complete(q, k, v, view, scores, sinks=sinks, return_lse=return_lse)
    asked = {"sinks": sinks, "log-sum-exp (return_lse)": return_lse,
             "arbitrary positions": not view.in_order}  # fmt: skip
    if implementation == "blocked":
        _refuse("blocked", "reference", asked | {"causal=False": not scores.causal})
        return blocked_attention(q, k, v, view, scores)
    if implementation == "splash":
        _refuse("splash", "flash", asked)
        return sharded_splash(q, k, v, view, scores)
    if implementation == "cudnn":
        asked |= {
            "packed segments": view.query_segments,
            "softcap": scores.softcap,
            "head sizes that differ": q.shape[3] != v.shape[3],
        }
        _refuse("cudnn", "reference", asked)
        return _cudnn(q, k, v, scores)
    raise ValueError(
        f"attention implementation {implementation!r} is unknown; use {', '.join(IMPLEMENTATIONS)}"
    )


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scores: Scores) -> jax.Array:
    behind = None if scores.window is None else scores.window - 1
    local = None if behind is None else (behind, 0 if scores.causal else behind)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scores.scale, is_causal=scores.causal, local_window_size=local,
        implementation="cudnn",
    )  # fmt: skip


def default_implementation(
    platform: str | None, q: Any, k: Any, v: Any, view: View, scores: Scores, plain: bool
) -> str:
    """The implementation for what is asked, of shapes and dtypes alone.

    "flash" on TPUs from `FLASH_FROM` queries on. "cudnn" on GPUs for whole documents in order, in
    bfloat16 or float16, of head sizes it has, without soft-cap. Elsewhere "blocked" where it
    applies (causal attention of tokens in order to themselves), else "reference".

    Args:
      platform: "tpu", "gpu" with its cuDNN, or anything else.
      q, k, v: arrays, or their shapes and dtypes.
      view, scores: as `attention`.
      plain: neither sinks nor the log-sum-exp are asked for.
    """
    if platform == "tpu" and q.shape[1] >= FLASH_FROM:
        return "flash"
    h = q.shape[3]
    if (
        platform == "gpu"
        and plain
        and view.in_order
        and view.query_segments is None
        and scores.softcap is None
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.dtype == k.dtype == v.dtype
        and h == v.shape[3] <= CUDNN_HEAD_DIM
        and h % 8 == 0
    ):
        return "cudnn"
    return "blocked" if plain and view.in_order and scores.causal else "reference"


def _platform() -> str | None:
    """Platform of the devices compiled for; a GPU that is only described has no cuDNN."""
    device = target()
    if device is None or device.platform not in ("gpu", "cuda"):
        return None if device is None else device.platform
    client = type(getattr(device, "client", None)).__name__
    return "gpu" if client == "Client" else None


def attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    scores: Scores,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    dlse: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of attention where `k`, `v` may be only some of the keys.

    Each weight is exp(score - lse), so parts' results add up to dq, and are the rows of dk and dv.
    Sinks need nothing here if `out` and `lse` include them.

    Args:
      q, k, v, view, scores: as `attention`.
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
    if implementation is None:
        implementation = "flash" if on_tpu() else "reference"
    kernels: Any = {
        "flash": sharded_flash_backward,
        "reference": reference_attention_backward,
        "mosaic_gpu": flash_attention_gpu_backward,
    }
    if implementation not in kernels:
        raise ValueError(
            f"attention_backward implementation {implementation!r} is unknown; use reference, "
            "flash or mosaic_gpu"
        )
    return kernels[implementation](q, k, v, view, scores, out, lse, dout, dlse=dlse)


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
        raise ValueError(f"sinks has shape {sinks.shape}; give one per query head, [{H}]")
    if (view.query_segments is None) != (view.key_segments is None):
        raise ValueError("give the view query_segments and key_segments, both or neither")
    for side, length in (("query", T), ("key", S)):
        for what in ("positions", "segments"):
            x = getattr(view, f"{side}_{what}")
            if x is not None and x.shape not in ((B, length), (1, length)):
                raise ValueError(
                    f"{side}_{what} of the view has shape {x.shape}; give [{B}, {length}]"
                )


def _refuse(name: str, instead: str, refused: dict[str, Any]) -> None:
    for what, asked in refused.items():
        if asked is not None and asked is not False:
            raise ValueError(f"{name} attention cannot do {what}; use implementation={instead!r}")
