"""The training step: gradients by accumulation, clipping, the optimizer's update.

The whole step is one jitted function of (state, batch). What is computed is said by an objective
and an optimizer; where it lies, by a layout; how gradients are gathered, by a `Gradient`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax

from lm.model import ModelConfig, param_specs
from lm.sharding import Layout, named_sharding, step_options, use_layout
from lm.train.accumulation import Accumulation
from lm.train.ema import Ema, num_updates
from lm.train.objective import Batch, Objective, Term, total_loss
from lm.train.optimizers import clip_by_global_norm
from lm.train.stability import Stability, learning_rate
from lm.train.state import TrainState, everything, partition, state_shardings
from lm.weights import cast, shard_like

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


def specs_of_gradient(gradient: Gradient) -> Tree:
    """Specs of every weight that a `Gradient` computes with."""
    own = getattr(gradient, "specs", None)
    return param_specs(gradient.config) if own is None else own


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
