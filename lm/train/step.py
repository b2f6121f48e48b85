"""The training step: gradients, clipping, the optimizer's update.

The whole step is one jitted function of (state, batch). What is computed is said by an objective
and an optimizer; where it is stored, by a layout; how gradients are made, by a `Gradient`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lm.model import ModelConfig
from lm.sharding import Layout, step_options, use_layout
from lm.train.batch import batch_shardings
from lm.train.ema import Ema, num_updates
from lm.train.objective import Batch, Objective, Term, total_loss
from lm.train.optimizers import clip_by_global_norm, with_specs
from lm.train.stability import Stability, learning_rate
from lm.train.state import TrainState, everything, partition, state_shardings
from lm.weights import cast, shard_like

Tree = Any
Metrics = dict[str, jax.Array]
Schedule = Callable[[Any], Any]  # the learning rate of a step, counted from 0


class Gradient(Protocol):
    """Gradients of an objective over a whole batch: accumulation, or a pipeline's schedule.

    Attributes:
      config: the model.
      dtype: of compute.
      specs: of every weight it computes with.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> DTypeLike: ...

    @property
    def specs(self) -> Tree: ...

    def __call__(
        self, objective: Objective, trainable: Tree, frozen: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[Tree, dict[str, Term], Tree]:
        """(gradients in float32, shaped like `trainable`; terms; the objective's `stats`).

        Terms and stats are of the whole batch.
        """
        ...

    def terms(
        self, objective: Objective, params: Tree, batch: Batch, rng: jax.Array
    ) -> dict[str, Term]:
        """The terms of the whole batch alone, in as little memory as a step takes."""
        ...

    def counts(
        self, objective: Objective, params: Tree, batch: Batch, rng: jax.Array
    ) -> dict[str, Term]:
        """The terms of the whole batch, of which the counts alone hold."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A jitted step (state, batch) -> (state, metrics), for batches of any leaves.

    Attributes:
      step: the function.
      objective: of the step.
      layout: mesh and rules.
      state: shardings of the state, which is donated.
    """

    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    objective: Objective
    layout: Layout
    state: TrainState
    _jitted: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.jitted(batch)(state, batch)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """As `jax.jit(...).lower`."""
        return self.jitted(batch).lower(state, batch)

    def jitted(self, batch: Batch) -> Any:
        """The jitted function for batches of these leaves and shapes."""
        leaves, structure = jax.tree.flatten(batch)
        key = structure, tuple(x.shape for x in leaves)
        if key not in self._jitted:
            length = jax.eval_shape(self.objective.inputs, batch).ids.shape[1]
            self._jitted[key] = jax.jit(
                self.step,
                in_shardings=(self.state, batch_shardings(batch, self.layout, length)),
                out_shardings=(self.state, None),
                donate_argnums=0,
                compiler_options=step_options(self.layout.mesh) or None,
            )
        return self._jitted[key]


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
    """A step: (state, batch) -> (state, metrics), jitted; the state is donated.

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

    Metrics, float32 scalars: `total_loss`, what is minimized; each term's mean under its name;
    `grad_norm` (before clipping), `learning_rate` (this step's), `tokens`, the objective's
    `num_tokens`, and `Stability.guard`'s.
    """
    optimizer = with_specs(optimizer, gradient.specs)
    wanted = state_shardings(
        gradient.specs, optimizer, layout, trains,
        ema=ema is not None, health=stability is not None, buffers=objective.init_buffers(),
    )  # fmt: skip
    train_specs, _ = partition(gradient.specs, trains)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_layout(layout):
            rng = jax.random.fold_in(jax.random.key(seed), state.step)
            gradients, terms, stats = gradient(
                objective.with_buffers(state.buffers), state.trainable, state.frozen, batch, rng
            )
            gradients = shard_like(gradients, train_specs, "optimizer")
            gradients, norm = clip_by_global_norm(gradients, max_grad_norm)
            weights = shard_like(state.trainable, train_specs, "optimizer")
            directions, opt_state = optimizer.update(gradients, state.opt_state, weights)
            rate = learning_rate(schedule, state)
            updates = jax.tree.map(lambda direction: -rate * direction, directions)
            trainable = optax.apply_updates(weights, updates)
            buffers, frozen = objective.update(state.buffers, state.frozen, stats)
            after = dataclasses.replace(
                state, step=state.step + 1, trainable=trainable, frozen=frozen,
                opt_state=opt_state, buffers=buffers,
            )  # fmt: skip
            if ema is not None:
                after = dataclasses.replace(
                    after, ema=ema.update(state.ema, trainable, num_updates(state))
                )
            total = total_loss(terms)
            metrics = {"total_loss": total}
            metrics |= {name: term.sum / term.count for name, term in terms.items()}
            metrics |= {"grad_norm": norm, "learning_rate": rate}
            metrics["tokens"] = jnp.float32(objective.num_tokens(batch))
            if stability is not None:
                before = dataclasses.replace(state, trainable=weights)
                after, found = stability.guard(before, after, total, norm)
                metrics |= found
            return after, metrics

    return TrainStep(step, objective, layout, wanted)


def make_eval_step(
    objective: Objective, layout: Layout, gradient: Gradient
) -> Callable[[Tree, Batch], dict[str, Term]]:
    """A jitted function (params, batch) -> the objective's terms, to be added up over batches."""

    def evaluate(params: Tree, batch: Batch) -> dict[str, Term]:
        with use_layout(layout):
            weights = cast(params, gradient.dtype)
            return gradient.terms(objective, weights, batch, jax.random.key(0))

    return jax.jit(evaluate)
