"""What is minimized: two pure functions around one forward pass.

`inputs(batch)` says what the model reads; `loss(head, hidden, batch, key)` returns named terms,
each a sum, a count, and a coefficient. Counts depend on the batch alone, so the step can add them
up over the whole global batch first; then every micro-batch adds `coefficient * sum / count`, and
accumulation, packing and sharding change the loss by float rounding only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from lm.model import Head, Tokens

Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class Term:
    """One part of a loss: `coefficient * sum / count`.

    Attributes:
      sum: differentiable, summed over the batch.
      count: what it is divided by once summed over the global batch; depends on the batch alone.
      coefficient: its weight; 0 for a figure that is only reported.
    """

    sum: Any
    count: Any
    coefficient: float = flax.struct.field(pytree_node=False, default=1.0)


def total_loss(terms: Mapping[str, Term]) -> jax.Array:
    """What is minimized, of terms of the whole batch: each mean times its coefficient, summed."""
    parts = [t.coefficient * t.sum / t.count for t in terms.values() if t.coefficient]
    return jnp.sum(jnp.stack(parts))


class Objective(Protocol):
    """Something to minimize."""

    def inputs(self, batch: Batch) -> Tokens:
        """What the model reads."""
        ...

    def loss(self, head: Head, hidden: jax.Array, batch: Batch, key: jax.Array) -> dict[str, Term]:
        """The terms, from hidden states [B, T, D] of `inputs(batch)`."""
        ...


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, with PaLM's z-loss (arXiv:2204.02311, section 5).

    A batch holds, each [B, T]: `ids`, `positions`, `segment_ids`, `targets`, and `weights`
    (float32, 0 where a target does not count).

    Attributes:
      z_loss: coefficient of the mean squared log-sum-exp of the logits.
    """

    z_loss: float = 0.0

    def inputs(self, batch: Batch) -> Tokens:
        return Tokens(batch["ids"], batch["positions"], batch.get("segment_ids"))

    def loss(self, head: Head, hidden: jax.Array, batch: Batch, key: jax.Array) -> dict[str, Term]:
        logprobs, lse = head.logprobs(hidden, batch["targets"])
        weights = batch["weights"]
        count = jnp.sum(weights)
        terms = {"loss": Term(-jnp.sum(weights * logprobs), count)}
        if self.z_loss:
            terms["z_loss"] = Term(jnp.sum(weights * jnp.square(lse)), count, self.z_loss)
        return terms
