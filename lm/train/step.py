"""The training step: gradients by accumulation, clipping, the optimizer's update.

The whole step is one jitted function of (state, batch). What is computed is said by an objective
and an optimizer; where it lies, by a layout; how gradients are gathered, by a `Gradient`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from lm.model import ModelConfig, forward, make_head, param_specs
from lm.sharding import Layout, constrain, named_sharding, step_options, use_layout
from lm.train.ema import Ema, num_updates
from lm.train.objective import Batch, Objective, Term, total_loss
from lm.train.optimizers import clip_by_global_norm
from lm.train.stability import Stability, learning_rate
from lm.train.state import TrainState, everything, merge, partition, state_shardings
from lm.weights import cast, shard_like
from lm.weights.specs import map_specs

Tree = Any
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Schedule = Callable[[Any], Any]  # the learning rate of a step, counted from 0


class Gradient(Protocol):
    """Gradients of an objective over a whole batch."""

    @property
    def config(self) -> ModelConfig: ...

    def __call__(
        self, objective: Objective, trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array
    ) -> tuple[Tree, dict[str, Term]]:
        """(gradients in float32, shaped like `trainable`; terms of the whole batch)."""
        ...


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

    def __call__(
        self, objective: Objective, trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array
    ) -> tuple[Tree, dict[str, Term]]:
        # Pinned where they rest, so that what is gathered is in the dtype of compute.
        specs = _trainable_specs(specs_of_gradient(self), trainable)
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
        specs = _trainable_specs(specs_of_gradient(self), trainable)

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


def specs_of_gradient(gradient: Gradient) -> Tree:
    """Specs of every weight that a `Gradient` computes with."""
    own = getattr(gradient, "specs", None)
    return param_specs(gradient.config) if own is None else own


def _trainable_specs(specs: Tree, trainable: Tree) -> Tree:
    """Specs of the weights that train, None elsewhere."""
    return map_specs(lambda spec, weight: None if weight is None else spec, specs, trainable)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    layout: Layout,
    gradient: Gradient,
    *,
    max_grad_norm: float | None = 1.0,
    stability: Stability | None = None,
    ema: Ema | None = None,
    seed: int = 0,
    trains: Callable[[str], bool] = everything,
) -> TrainStep:
    """A jitted step: (state, batch) -> (state, metrics). The state is donated.

    Args:
      objective: what to minimize.
      optimizer: the direction of the weights that train; it is multiplied by minus the learning
        rate and added.
      schedule: the learning rate of a step.
      layout: mesh and rules; a ZeRO stage is nothing but a choice of rules.
      gradient: accumulation, or a pipeline's schedule.
      max_grad_norm: gradients are scaled down to this global norm; None for never.
      stability: which steps are skipped; the state then needs `health`. None: every step is taken.
      ema: an average of the weights; the state then needs `ema`. None: there is none.
      seed: of the random key the objective is given; folded with the step.
      trains: which weights train, as in `init_state`.

    Metrics, float32 scalars: each term's mean under its name, `grad_norm` (before clipping),
    `learning_rate` (this step's), `tokens`, the count of the first term, and `Stability.guard`'s.
    """
    specs = specs_of_gradient(gradient)
    parts = {"ema": ema is not None, "health": stability is not None}
    wanted = state_shardings(specs, optimizer, layout, trains, **parts)
    train_specs, _ = partition(specs, trains)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_layout(layout):
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            gradients, terms = gradient(objective, state.trainable, state.frozen, batch, key)
            gradients = shard_like(gradients, train_specs, "optimizer")
            gradients, norm = clip_by_global_norm(gradients, max_grad_norm)
            weights = shard_like(state.trainable, train_specs, "optimizer")
            directions, opt_state = optimizer.update(gradients, state.opt_state, weights)
            rate = learning_rate(schedule, state)
            updates = jax.tree.map(lambda direction: -rate * direction, directions)
            trainable = optax.apply_updates(weights, updates)
            after = dataclasses.replace(
                state, step=state.step + 1, trainable=trainable, opt_state=opt_state
            )
            if ema is not None:
                after = dataclasses.replace(
                    after, ema=ema.update(state.ema, trainable, num_updates(state))
                )
            metrics = {name: term.sum / term.count for name, term in terms.items()}
            metrics |= {"grad_norm": norm, "learning_rate": rate}
            metrics["tokens"] = next(iter(terms.values())).count
            if stability is not None:
                before = dataclasses.replace(state, trainable=weights)
                after, found = stability.guard(before, after, total_loss(terms), norm)
                metrics |= found
            return after, metrics

    batch_sharding = named_sharding(layout.mesh, layout.rules.activations, ("batch", "sequence"))
    return jax.jit(
        step,
        in_shardings=(wanted, batch_sharding),
        out_shardings=(wanted, None),
        donate_argnums=0,
        compiler_options=step_options(layout.mesh) or None,
    )


def make_eval_step(
    objective: Objective, layout: Layout, gradient: Accumulation
) -> Callable[[Tree, Batch], dict[str, Term]]:
    """A jitted function (params, batch) -> the objective's terms, to be added up over batches."""

    def evaluate(params: Tree, batch: Batch) -> dict[str, Term]:
        with use_layout(layout):
            weights = cast(params, gradient.dtype)
            none = jax.tree.map(lambda _: None, weights)
            return gradient.terms(objective, weights, none, batch, jax.random.key(0))

    return jax.jit(evaluate)
