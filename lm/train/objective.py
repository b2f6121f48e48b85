"""What is minimized: two pure functions around one forward pass.

`inputs(batch)` says what the model reads; `loss(head, output, batch, rng)` returns named terms,
each a sum, a count, and a coefficient. Counts depend on the batch alone, so the step can add them
up over the whole global batch first; then every micro-batch adds `coefficient * sum / count`, and
accumulation, packing and sharding change the loss by float rounding only.

What no gradient changes has three more functions. `stats` sums it up over the batch; after the
optimizer, `update` makes new buffers (a running KL) and new frozen weights (a router's biases) of
the sums; `with_buffers` is the objective of a step that reads buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from lm.model import Head, Output, Tokens

Batch = Mapping[str, Any]
Tree = Any


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
    """Something to minimize. Subclasses write `inputs` and `loss`; the rest has defaults."""

    @property
    def rows_per_example(self) -> int:
        """Adjacent rows that belong together, and that accumulation never separates: pairs 2."""
        return 1

    def inputs(self, batch: Batch) -> Tokens:
        """What the model reads; `ids` [B, T], with B a multiple of `rows_per_example`."""
        ...

    def loss(self, head: Head, output: Output, batch: Batch, rng: jax.Array) -> dict[str, Term]:
        """The terms of a batch.

        Args:
          head: from hidden states to log-probabilities and scores.
          output: of the forward pass over `inputs(batch)`: hidden states [B, T, D] and auxiliary
            sums. Zeros where only the counts are read.
          batch: what `inputs` was given.
          rng: random key of the step.
        """
        ...

    def num_tokens(self, batch: Batch) -> jax.Array:
        """How many tokens a batch counts as, in throughput: those read, without padding."""
        tokens = self.inputs(batch)
        if tokens.segment_ids is None:
            return jnp.float32(tokens.ids.size)
        return jnp.sum(tokens.segment_ids > 0).astype(jnp.float32)

    def init_buffers(self) -> Tree:
        """The buffers of a new state: arrays, the same on every device; None for none."""
        return None

    def with_buffers(self, buffers: Tree) -> Objective:
        """The objective of a step that begins with these buffers."""
        return self

    def stats(self, output: Output, batch: Batch) -> Tree:
        """Sums over a batch that no gradient flows through, added up over micro-batches."""
        return {}

    def update(self, buffers: Tree, frozen: Tree, stats: Tree) -> tuple[Tree, Tree]:
        """New (buffers, frozen weights), from `stats` of the whole batch; not on skipped steps."""
        return buffers, frozen


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of the next token, with PaLM's z-loss (arXiv:2204.02311, section 5).

    A batch holds, each [B, T]: `ids`, `positions`, `segment_ids`, `targets`, and `weights`
    (float32, 0 where a target does not count).

    Attributes:
      z_loss: coefficient of the mean squared log-sum-exp of the logits.
    """

    z_loss: float = 0.0

    def inputs(self, batch: Batch) -> Tokens:
        return Tokens(batch["ids"], batch["positions"], batch.get("segment_ids"), in_order=True)

    def num_tokens(self, batch: Batch) -> jax.Array:
        return jnp.sum(batch["weights"])

    def loss(self, head: Head, output: Output, batch: Batch, rng: jax.Array) -> dict[str, Term]:
        logprobs, lse = head.logprobs(output.hidden, batch["targets"])
        weights = batch["weights"]
        count = jnp.sum(weights)
        terms = {"loss": Term(-jnp.sum(weights * logprobs), count)}
        if self.z_loss:
            terms["z_loss"] = Term(jnp.sum(weights * jnp.square(lse)), count, self.z_loss)
        return terms
