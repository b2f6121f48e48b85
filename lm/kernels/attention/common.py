"""What the flash kernels share: their gradient, padding, sinks, and the work they declare."""

from __future__ import annotations

import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

from lm.kernels.attention.reference import View
from lm.kernels.attention.schedule import PADDING_POSITION, PADDING_SEGMENT
from lm.kernels.attention.scores import Scores

# Products of a kernel over the head size of queries and keys, and over that of values; kernels that
# give some of the gradients each have the scores to compute again.
PRODUCTS = {
    "forward": (1, 1), "backward": (3, 2), "dq": (2, 1), "dk": (2, 1), "dv": (1, 1), "dkv": (2, 2),
}  # fmt: skip
_DECLARED = "kernel_flops_"
LOG2_E = math.log2(math.e)
# A score that no query sees, and the maximum before any was seen: so far apart that the weight of
# the one under the other is 0, though exp(MASK - MASK) would be 1.
MASK, NONE_SEEN = -1e37, -1e30


class Kernel(Protocol):
    """A forward kernel and its gradients, with all that is known at trace time; hashable."""

    def forward(self, q: Any, k: Any, v: Any, view: View, /) -> tuple[jax.Array, jax.Array]:
        """(out [B, T, H, h of v], log-sum-exp [B, T, H])."""
        ...

    def gradients(
        self, q: Any, k: Any, v: Any, view: View, lse2: Any, delta: Any, dout: Any, dtype: Any, /
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dq of `dtype`, dk, dv).

        Args:
          q, k, v, view: as `forward`.
          lse2: float32 [B, T, H], log-sum-exp in powers of two; 1e30 where every weight is 0.
          delta: float32 [B, T, H], sum of dout * out less the gradient of the log-sum-exp.
          dout: [B, T, H, h of v].
          dtype: of dq.
        """
        ...


def attend(kernel: Kernel, q, k, v, view: View, sinks: Any, return_lse: bool) -> Any:
    """Attention by a kernel, differentiable. See `lm.kernels.attention.attention`."""
    results: Any = _attend(kernel, q, k, v, view)
    out, lse = results
    if sinks is not None:  # one more key, that has no value: the others get less weight
        both = jnp.logaddexp(lse, sinks.astype(jnp.float32))
        out, lse = (out * jnp.exp(lse - both)[..., None]).astype(out.dtype), both
    return (out, lse) if return_lse else out


def gradients(kernel: Kernel, q, k, v, view: View, out, lse, dout, dlse, dtype: Any) -> Any:
    """(dq of `dtype`, dk, dv) by a kernel; see `lm.kernels.attention.attention_backward`."""
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    if dlse is not None:
        delta -= dlse
    lse2 = jnp.where(lse < NONE_SEEN, -NONE_SEEN, lse * LOG2_E)
    return kernel.gradients(q, k, v, view, lse2, delta, dout.astype(q.dtype), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: Kernel, q, k, v, view: View) -> Any:
    return _forward(kernel, q, k, v, view)[0]


def _forward(kernel: Kernel, q, k, v, view: View) -> Any:
    # Named so that keeping "attention" keeps both, and the backward pass runs no forward kernel.
    out, lse = (checkpoint_name(x, "attention") for x in kernel.forward(q, k, v, view))
    return (out, lse), (q, k, v, view, out, lse)


def _backward(kernel: Kernel, saved: Any, cotangents: Any) -> Any:
    q, k, v, view, out, lse = saved
    dq, dk, dv = gradients(kernel, q, k, v, view, out, lse, *cotangents, dtype=q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), jax.tree.map(lambda _: None, view)


_attend.defvjp(_forward, _backward)


def padded(x: jax.Array, axis: int, block: int, **how: Any) -> jax.Array:
    """`x` padded to a multiple of `block` along the axis; `how` as `jnp.pad`."""
    extra = -x.shape[axis] % block
    if not extra:
        return x
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)], **how)


def padded_view(view: View, query: int, key: int, causal: bool) -> View:
    """The view in int32, padded to multiples of the blocks; no query sees a padding key."""

    def pad(of_queries: Any, of_keys: Any, fill: int) -> tuple[jax.Array, jax.Array]:
        of_queries, of_keys = (jnp.asarray(x, jnp.int32) for x in (of_queries, of_keys))
        return (
            padded(of_queries, 1, query, mode="edge"),
            padded(of_keys, 1, key, constant_values=fill),
        )

    positions = view.query_positions, view.key_positions
    segments = view.query_segments, view.key_segments
    if segments[0] is None and not causal and positions[1].shape[1] % key:
        segments = jnp.zeros_like(positions[0]), jnp.zeros_like(positions[1])
    positions = pad(*positions, PADDING_POSITION)
    if segments[0] is not None:
        segments = pad(*segments, PADDING_SEGMENT)
    return View(*positions, *segments, in_order=view.in_order)


def mask_rows(view: View, positions: bool = True) -> tuple[jax.Array, ...]:
    """What the kernels' masks read of queries and of keys: int32 [B, n, T] and [B, n, S].

    These are positions, if they are wanted, and segments, if there are any; () for neither.
    """
    fields = ["positions"] * positions + ["segments"] * (view.query_segments is not None)
    if not fields:
        return ()
    sides = ([getattr(view, f"{side}_{field}") for field in fields] for side in ("query", "key"))
    return tuple(jnp.stack(rows, axis=1) for rows in sides)


def num_scores(T: int, S: int, scores: Scores) -> int:
    """Number of unmasked scores of T queries and S keys of one document, both from position 0.

    That holds for tokens attending to themselves and for a prompt into an empty cache. Positions
    are not known when a program is traced: later chunks of a prompt and the parts of a ring are
    counted as if they were first, and packed rows have fewer.
    """
    own, window = np.arange(T), scores.window  # a query's position
    first = np.zeros_like(own) if window is None else np.maximum(own - window + 1, 0)
    last = own if scores.causal else S if window is None else own + window - 1
    return int((np.minimum(last, S - 1) - first + 1).clip(0).sum())


def kernel_flops(kernel: str, scores: int, h: int, d: int) -> int:
    """Operations of a kernel of `PRODUCTS` for `scores` scores, and head sizes h and d (values)."""
    of_keys, of_values = PRODUCTS[kernel]
    return 2 * scores * (of_keys * h + of_values * d)


def declared(**flops: int) -> Any:
    """A context for tracing kernels whose interface takes no cost estimate.

    Args:
      flops: operations per call, by a word of the kernel's name.
    """
    return set_xla_metadata(**{_DECLARED + part: str(n) for part, n in flops.items()})


def declared_flops(kernel: str, metadata: dict[str, Any] | None) -> float:
    """The operations `declared` for a kernel of that name.

    Raises:
      ValueError: none were declared.
    """
    for key, value in (metadata or {}).items():
        if key.startswith(_DECLARED) and f"_{key.removeprefix(_DECLARED)}_" in f"_{kernel}_":
            return float(value)
    raise ValueError(
        f"kernel {kernel!r} declares no operations; give its call a cost_estimate, or trace it "
        "within lm.kernels.attention.common.declared"
    )
