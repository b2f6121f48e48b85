"""Gradients by plain differentiation, over micro-batches one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lm.model import ModelConfig, Output, Tokens, forward, make_head, param_specs
from lm.sharding import constrain, current_layout, use_layout
from lm.train.batch import micro_batches
from lm.train.objective import Batch, Objective, Term
from lm.train.state import merge
from lm.weights import cast, shard_like
from lm.weights.specs import map_specs

Tree = Any


class Reorder(Protocol):
    """Another order of the tokens of a row, for the model alone; see `lm.parallel.reorder_for`."""

    def tokens(self, tokens: Tokens) -> Tokens: ...

    def restore(self, hidden: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """Gradients by plain differentiation, over micro-batches one after another.

    Attributes:
      config: the model.
      num_micro_batches: divides the examples of each shard of the batch.
      dtype: of compute; weights are cast once per step, gradients are added up in float32.
      remat: see `lm.model.remat`.
      loss: implementation of the cross-entropy; None lets the size of the logits decide.
      attention: implementation of attention; None for the default.
      unroll: write the layers out instead of looping over them; see `lm.model.forward`.
      specs: of every weight, where some are leaves or have adapters (`lm.weights.specs_of`); by
        default those of plain arrays.
      reorder: order of tokens that `attention` wants; None for the batch's.
    """

    config: ModelConfig
    num_micro_batches: int = 1
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    loss: str | None = None
    attention: Callable[..., jax.Array] | None = None
    unroll: bool = False
    specs: Tree = None
    reorder: Reorder | None = None

    def __post_init__(self) -> None:
        if self.specs is None:
            object.__setattr__(self, "specs", param_specs(self.config))

    def __call__(
        self, objective: Objective, trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[Tree, dict[str, Term], Tree]:
        # Pinned where they rest, so that what is gathered is in the dtype of compute.
        specs = trainable_specs(self.specs, trainable)
        compute = shard_like(cast(trainable, self.dtype), specs, "weights")
        counts = self.counts(objective, merge(compute, frozen), batch, rng)

        def micro_gradient(micro: Batch) -> tuple[Tree, tuple[dict[str, jax.Array], Tree]]:
            def value(weights: Tree) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
                params = merge(weights, frozen)
                output = self.run(objective, params, micro)
                head = make_head(params, self.config, self.loss)
                terms = objective.loss(head, output, micro, rng)
                sums = {name: term.sum for name, term in terms.items()}
                parts = [t.coefficient * t.sum / counts[name].count for name, t in terms.items()]
                return jnp.sum(jnp.stack(parts)), (sums, objective.stats(output, micro))

            gradients, sums = jax.grad(value, has_aux=True)(compute)
            return cast(gradients, jnp.float32), sums

        def begin(zeros: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
            return shard_like(zeros[0], specs, "gradients"), zeros[1]

        axes = deferred_axes() if self.num_micro_batches > 1 else ()
        for axis in axes:
            begin = jax.vmap(begin, spmd_axis_name=axis)
        by_shard = self.add_up(objective, over_shards(micro_gradient, axes), batch, begin)
        gradients, (sums, stats) = jax.tree.map(lambda x: sum_shards(x, axes), by_shard)
        terms = {name: dataclasses.replace(term, sum=sums[name]) for name, term in counts.items()}
        return gradients, terms, stats

    def terms(
        self, objective: Objective, params: Tree, batch: Batch, rng: jax.Array
    ) -> dict[str, Term]:
        """The objective's terms over a whole batch, without gradients."""

        def of_micro_batch(micro: Batch) -> dict[str, Term]:
            head = make_head(params, self.config, self.loss)
            return objective.loss(head, self.run(objective, params, micro), micro, rng)

        return self.add_up(objective, of_micro_batch, batch)

    def run(self, objective: Objective, params: Tree, batch: Batch) -> Output:
        """The forward pass over a batch, in the batch's order."""
        tokens = objective.inputs(batch)
        if self.reorder is not None:
            tokens = self.reorder.tokens(tokens)
        output = forward(
            params, tokens, self.config,
            attention=self.attention, dtype=self.dtype, remat=self.remat, unroll=self.unroll,
        )  # fmt: skip
        if self.reorder is None:
            return output
        return dataclasses.replace(output, hidden=self.reorder.restore(output.hidden))

    def counts(
        self, objective: Objective, params: Tree, batch: Batch, rng: jax.Array
    ) -> dict[str, Term]:
        """Denominators of each term over the global batch.

        They are of the loss on hidden states and auxiliary sums of zeros, of which only the counts
        are used; XLA removes the rest.
        """
        shapes = jax.eval_shape(lambda: self.run(objective, params, batch))
        output = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        head = make_head(params, self.config, "reference")
        terms = objective.loss(head, output, batch, rng)
        return {
            n: dataclasses.replace(t, count=jnp.maximum(t.count, 1e-9)) for n, t in terms.items()
        }

    def add_up(
        self,
        objective: Objective,
        function: Callable[[Batch], Any],
        batch: Batch,
        begin: Callable[[Any], Any] = lambda zeros: zeros,
    ) -> Any:
        """The sum of `function` over the micro-batches; `begin` states how zeros are sharded."""
        if self.num_micro_batches == 1:
            return function(batch)

        def body(total: Any, micro: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, function(micro)), None

        parts = micro_batches(objective, batch, self.num_micro_batches)
        shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
        zeros = begin(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        total, _ = jax.lax.scan(body, zeros, parts)
        return total


def deferred_axes() -> tuple[str, ...]:
    """Axes of the batch over which gradients are summed once per step, not per micro-batch.

    All of them under ZeRO 0 and 1, whose accumulators are whole on every device anyway. Not with
    context parallelism: under `vmap` its rings would compute what they otherwise skip.

    The sum is of the float32 accumulators, whatever the dtype of compute. Gradients computed in
    bfloat16 would be sent as such once per micro-batch, in half the bytes each, except on CPU: so
    two micro-batches save nothing, and more of them save less than they do in float32.
    """
    layout = current_layout()
    if layout is None:
        return ()
    rules, sizes = layout.rules, layout.mesh.shape
    tables = (rules.weights, rules.gradients)
    split = {a for table in tables for name in rules.gathered for a in table.get(name, ())}
    if any(sizes[axis] > 1 for axis in {*split, *rules.activations["sequence"]}):
        return ()
    return tuple(axis for axis in rules.activations["batch"] if sizes[axis] > 1)


def over_shards(function: Callable[[Batch], Any], axes: Sequence[str]) -> Callable[[Batch], Any]:
    """`function` of each shard of a batch by itself: results get a dimension, split, per axis."""
    if not axes:
        return function
    axis, rest = axes[0], axes[1:]

    def of_shard(batch: Batch) -> Any:
        batch = {n: constrain(x, *("batch", *(None,) * x.ndim)[: x.ndim]) for n, x in batch.items()}
        return over_shards(function, rest)(batch)

    def of_batch(batch: Batch) -> Any:
        layout = current_layout()
        assert layout is not None
        size = layout.mesh.shape[axis]
        mapped = {n: 0 if x.ndim else None for n, x in batch.items()}
        cut = {n: x.reshape(size, -1, *x.shape[1:]) if x.ndim else x for n, x in batch.items()}
        with use_layout(layout.inside_vmap(axis)):
            return jax.vmap(of_shard, (mapped,), spmd_axis_name=axis)(cut)

    return of_batch


def sum_shards(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """The sum over the dimensions of `over_shards`, as one reduction over all the axes."""
    layout = current_layout()
    if not axes or layout is None:
        return x
    x = x.reshape(-1, *x.shape[len(axes) :])
    spec = PartitionSpec(tuple(axes), *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
    return jnp.sum(jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec)), 0)


def trainable_specs(specs: Tree, trainable: Tree) -> Tree:
    """Specs of the weights that train, None elsewhere."""
    return map_specs(lambda spec, weight: None if weight is None else spec, specs, trainable)
