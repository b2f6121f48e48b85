"""What a training run is made of, whatever it trains: the parts that programs put together."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from lm.checkpoints import Checkpoints, Reference
from lm.data.stream import HeldOutSet, Stream
from lm.model import ModelConfig
from lm.run.loop import Intervals, Rewind
from lm.run.saving import Checkpointing
from lm.sharding import Layout, named_sharding
from lm.tokenizers import Tokenizer
from lm.train.accumulation import Accumulation
from lm.train.ema import Ema
from lm.train.objective import Objective
from lm.train.optimizers import Optimizer
from lm.train.stability import Stability
from lm.train.state import Parts, TrainState, abstract_state, everything, init_state, state_of
from lm.train.step import Schedule, TrainStep, make_eval_step, make_train_step

Tree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run is made of but its state.

    Attributes:
      workdir: where it is written.
      layout: mesh and rules.
      tokenizer: of the data.
      stream: batches by step.
      held_out: held-out sets by name; the first one's figures have no name.
      objective, optimizer, schedule, gradient: of the step; the gradient knows the model.
      specs: of the model's weights, adapters included.
      checkpoints: of the workdir.
      data: where the data is, for people.
      num_steps: when training ends.
      seed: of random initial weights and of the step.
      max_grad_norm: gradients are scaled down to this norm.
      stability, rewind, ema, intervals, saving: see their classes.
      peak_flops: of one device, per second; None where not known.
      trains: which weights train, by path.
      initial: makes the weights to begin with; None for random ones.
      frozen: where weights that do not train are stored; None to store them in each checkpoint.
    """

    workdir: pathlib.Path
    layout: Layout
    tokenizer: Tokenizer
    stream: Stream
    held_out: Mapping[str, HeldOutSet]
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule
    gradient: Accumulation
    specs: Tree
    checkpoints: Checkpoints
    data: pathlib.Path
    num_steps: int
    seed: int = 0
    max_grad_norm: float | None = 1.0
    stability: Stability | None = None
    rewind: Rewind | None = None
    ema: Ema | None = None
    intervals: Intervals = Intervals()
    saving: Checkpointing = Checkpointing()
    peak_flops: float | None = None
    trains: Callable[[str], bool] = everything
    initial: Callable[[], Tree] | None = None
    frozen: Reference | None = None

    @property
    def model(self) -> ModelConfig:
        return self.gradient.config

    @property
    def rows(self) -> NamedSharding:
        """How arrays [B, T] of a batch are sharded over the mesh."""
        return named_sharding(
            self.layout.mesh, self.layout.rules.activations, ("batch", "sequence")
        )

    def step(self) -> TrainStep:
        """The jitted training step."""
        return make_train_step(
            self.objective, self.optimizer, self.schedule, self.layout, self.gradient,
            max_grad_norm=self.max_grad_norm, seed=self.seed, stability=self.stability,
            ema=self.ema, trains=self.trains,
        )  # fmt: skip

    def new_state(self) -> TrainState:
        """The state of step 0."""
        if self.initial is not None:
            return state_of(
                self.initial(), self.specs, self.optimizer, self.layout, self.trains, **self._extra
            )
        key = jax.random.key(self.seed)
        return init_state(self.specs, self.optimizer, key, self.layout, self.trains, **self._extra)

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, to restore into."""
        return abstract_state(self.specs, self.optimizer, self.layout, self.trains, **self._extra)

    @property
    def _extra(self) -> Parts:
        return {
            "ema": self.ema is not None,
            "health": self.stability is not None,
            "buffers": self.objective.init_buffers(),
        }

    @functools.cached_property
    def _eval_step(self) -> Callable[..., Any]:
        return make_eval_step(self.objective, self.layout, self.gradient)

    def evaluate(self, params: Tree) -> dict[str, float]:
        """The mean of each of the objective's terms, such as `held_out_loss`, in nats per token.

        With the bytes of a set's text known, `held_out_bits_per_byte` too, of the term `loss`.
        Every held-out set after the first has its name in them: `held_out_loss/books`.
        """
        found = {}
        for i, (name, held_out) in enumerate(self.held_out.items()):
            batches = (held_out.device_batch(j, self.rows) for j in range(len(held_out)))
            terms = [self._eval_step(params, batch) for batch in batches]
            suffix = f"/{name}" if i else ""
            for key in terms[0] if terms else ():
                total, count = (
                    math.fsum(float(getattr(each[key], part)) for each in terms)
                    for part in ("sum", "count")
                )
                found[f"held_out_{key}{suffix}"] = total / count
                if key == "loss" and held_out.num_bytes:
                    bits = total / math.log(2) / held_out.num_bytes
                    found[f"held_out_bits_per_byte{suffix}"] = bits
        return found
