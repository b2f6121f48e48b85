"""Gradients by plain differentiation, over micro-batches one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.model import ModelConfig, forward, make_head, param_specs
from lm.sharding import constrain
from lm.train.objective import Batch, Objective, Term
from lm.train.state import merge
from lm.weights import cast, shard_like
from lm.weights.specs import map_specs

Tree = Any


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """Gradients by plain differentiation, over micro-batches one after another.

    Attributes:
      config: the model.
      num_micro_batches: divides the batch; each device's own rows are divided.
      dtype: of compute; weights are cast once a step, gradients are added up in float32.
      remat: see `lm.model.remat`.
      loss: implementation of the cross-entropy; None lets the size of the logits decide.
      attention: implementation of attention; None for the default.
      unroll: write the layers out instead of looping over them; see `lm.model.forward`.
      specs: of every weight, where some are leaves or have adapters (`lm.weights.specs_of`); None
        for those of plain arrays.
    """

    config: ModelConfig
    num_micro_batches: int = 1
    dtype: Any = jnp.float32
    remat: str = "none"
    loss: str | None = None
    attention: Callable[..., jax.Array] | None = None
    unroll: bool = False
    specs: Any = None

    @property
    def all_specs(self) -> Tree:
        """Specs of every weight."""
        return param_specs(self.config) if self.specs is None else self.specs

    def __call__(
        self, objective: Objective, trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array
    ) -> tuple[Tree, dict[str, Term]]:
        # Pinned where they rest, so that what is gathered is in the dtype of compute.
        specs = trainable_specs(self.all_specs, trainable)
        compute = shard_like(cast(trainable, self.dtype), specs, "weights")
        counts = self.counts(objective, compute, frozen, batch, key)

        def micro_gradient(micro: Batch) -> tuple[Tree, dict[str, jax.Array]]:
            def value(weights: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
                terms = self.terms(objective, weights, frozen, micro, key)
                sums = {name: term.sum for name, term in terms.items()}
                parts = [t.coefficient * t.sum / counts[name].count for name, t in terms.items()]
                return jnp.sum(jnp.stack(parts)), sums

            gradients, sums = jax.grad(value, has_aux=True)(compute)
            return cast(gradients, jnp.float32), sums

        if self.num_micro_batches == 1:
            gradients, sums = micro_gradient(batch)
        else:
            gradients, sums = self.add_up(micro_gradient, trainable, batch)
        terms = {name: dataclasses.replace(term, sum=sums[name]) for name, term in counts.items()}
        return gradients, terms

    def terms(
        self, objective: Objective, weights: Tree, frozen: Tree, batch: Batch, key: jax.Array
    ) -> dict[str, Term]:
        """The objective's terms for one micro-batch."""
        params = merge(weights, frozen)
        output = forward(
            params, objective.inputs(batch), self.config,
            attention=self.attention, dtype=self.dtype, remat=self.remat, unroll=self.unroll,
        )  # fmt: skip
        head = make_head(params, self.config, self.loss)
        return objective.loss(head, output.hidden, batch, key)

    def counts(
        self, objective: Objective, weights: Tree, frozen: Tree, batch: Batch, key: jax.Array
    ) -> dict[str, Term]:
        """Counts over the whole batch. The sums beside them are of no use, and XLA drops them."""
        shape = (*objective.inputs(batch).ids.shape, self.config.embed_dim)
        hidden = jnp.zeros(shape, self.dtype)
        head = make_head(merge(weights, frozen), self.config, "reference")
        terms = objective.loss(head, hidden, batch, key)
        return {
            n: dataclasses.replace(t, count=jnp.maximum(t.count, 1e-9)) for n, t in terms.items()
        }

    def add_up(
        self, micro_gradient: Callable[[Batch], Any], trainable: Tree, batch: Batch
    ) -> tuple[Tree, dict[str, jax.Array]]:
        """The sum of `micro_gradient` over the micro-batches."""
        specs = trainable_specs(self.all_specs, trainable)

        def split(x: jax.Array) -> jax.Array:
            M, B = self.num_micro_batches, x.shape[0]
            if B % M:
                raise ValueError(f"num_micro_batches={M} does not divide the batch of {B} rows")
            rows = x.reshape(B // M, M, *x.shape[1:]).swapaxes(0, 1)
            return constrain(rows, None, "batch", *(None,) * (x.ndim - 1))

        def body(total: Any, micro: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, micro_gradient(micro)), None

        micro_batches = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(micro_gradient, first)
        gradients, sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        zeros = (shard_like(gradients, specs, "gradients"), sums)
        total, _ = jax.lax.scan(body, zeros, micro_batches)
        return total


def trainable_specs(specs: Tree, trainable: Tree) -> Tree:
    """Specs of the weights that train, None elsewhere."""
    return map_specs(lambda spec, weight: None if weight is None else spec, specs, trainable)
