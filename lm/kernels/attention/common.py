"""What the attention kernels share: padding, sinks, and the work they declare."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from lm.kernels.attention.reference import View
from lm.kernels.attention.schedule import PADDING_POSITION, PADDING_SEGMENT, Rows
from lm.kernels.attention.scores import Scores

# Products of a kernel over the head size of queries and keys, and over that of values; kernels that
# give some of the gradients each have the scores to compute again.
PRODUCTS = {
    "forward": (1, 1), "backward": (3, 2), "dq": (2, 1), "dk": (2, 1), "dv": (1, 1), "dkv": (2, 2),
}  # fmt: skip
_DECLARED = "kernel_flops_"


def padded(x: jax.Array, axis: int, block: int, **how: Any) -> jax.Array:
    """`x` padded to a multiple of `block` along the axis; `how` as `jnp.pad`."""
    extra = -x.shape[axis] % block
    if not extra:
        return x
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)], **how)


def padded_rows(view: View, query: int, key: int, causal: bool) -> Rows:
    """Rows padded to multiples of the blocks; no query sees a padding key."""
    query_positions, key_positions = (
        jnp.asarray(x, jnp.int32) for x in (view.query_positions, view.key_positions)
    )
    query_segments, key_segments = view.query_segments, view.key_segments
    if query_segments is None and not causal and key_positions.shape[1] % key:
        query_segments = jnp.zeros_like(query_positions)
        key_segments = jnp.zeros_like(key_positions)
    query_positions = padded(query_positions, 1, query, mode="edge")
    key_positions = padded(key_positions, 1, key, constant_values=PADDING_POSITION)
    if query_segments is None:
        return Rows(query_positions, key_positions, None, None)
    query_segments, key_segments = (
        jnp.asarray(x, jnp.int32) for x in (query_segments, key_segments)
    )
    return Rows(
        query_positions,
        key_positions,
        padded(query_segments, 1, query, mode="edge"),
        padded(key_segments, 1, key, constant_values=PADDING_SEGMENT),
    )


def with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, lse) with one more key that has no value: the others get less weight."""
    both = jnp.logaddexp(lse, sinks.astype(jnp.float32))
    return (out * jnp.exp(lse - both)[..., None]).astype(out.dtype), both


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
