"""A model small enough to compile in seconds, a batch that shows mistakes, and layouts of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.model import Attention, FeedForward, Layer, ModelConfig, ModelWeights, Stack, param_specs
from lm.sharding import Layout, MeshShape, make_mesh, make_rules
from lm.train.accumulation import Accumulation
from lm.train.objective import NextToken, Objective
from lm.train.optimizers import AdamW, make_optimizer
from lm.train.state import TrainState, abstract_state, everything, state_of
from lm.train.step import Gradient, TrainStep, make_train_step
from lm.weights import initialize

LAYER = Layer(Attention(8, 8, 4), FeedForward(64))
UNTIED = ModelConfig(500, 32, (Stack((LAYER,), 2),))
TIED = dataclasses.replace(UNTIED, tied=True, logit_softcap=5.0)
OBJECTIVE = NextToken(z_loss=0.1)


def constant_rate(step: Any) -> float:
    """A learning rate that never changes."""
    return 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to compute the same step."""

    mesh: MeshShape = MeshShape()
    zero: int = 3
    sequence_parallel: bool = False
    num_micro_batches: int = 1
    loss: str = "fused"
    remat: str = "none"
    config: ModelConfig = UNTIED
    dtype: Any = jnp.float32
    zero_axes: tuple[str, ...] = ("fsdp",)

    def __str__(self) -> str:
        axes = [f"{a}{n}" for a, n in dataclasses.asdict(self.mesh).items() if n > 1]
        parts = ["-".join(axes) or "one"]
        parts += [f"zero{self.zero}"] if self.mesh.fsdp > 1 else []
        parts += ["over-" + "-".join(self.zero_axes)] if len(self.zero_axes) > 1 else []
        parts += ["sequence"] if self.sequence_parallel else []
        parts += [f"micro{self.num_micro_batches}"] if self.num_micro_batches > 1 else []
        parts += [self.loss] if self.loss != "fused" else []
        parts += [self.remat] if self.remat != "none" else []
        parts += ["tied"] if self.config.tied else []
        parts += [jnp.dtype(self.dtype).name] if self.dtype != jnp.float32 else []
        return "-".join(parts)

    @property
    def layout(self) -> Layout:
        rules = make_rules(self.zero, self.sequence_parallel, self.zero_axes)
        return Layout(make_mesh(self.mesh), rules)

    @property
    def gradient(self) -> Accumulation:
        return Accumulation(self.config, self.num_micro_batches, self.dtype, self.remat, self.loss)


def make_batch(num_rows: int = 16, length: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows: documents of odd lengths, padding, unequal weights, unequal counts per row."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, length)
    ids = rng.integers(0, UNTIED.vocab_size, shape, dtype=np.int32)
    positions = np.zeros(shape, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    for row in range(num_rows):
        start, segment = 0, 1
        while start < length - row % 4:
            stop = min(start + int(rng.integers(3, length)), length - row % 4)
            positions[row, start:stop] = np.arange(stop - start)
            segment_ids[row, start:stop] = segment
            start, segment = stop, segment + 1
    weights = rng.uniform(0.5, 2.0, shape).astype(np.float32)
    weights *= (segment_ids > 0) & (
        rng.uniform(size=shape) < 0.2 + 0.1 * np.arange(num_rows)[:, None]
    )
    targets = rng.integers(0, UNTIED.vocab_size, shape, dtype=np.int32)
    return {
        "ids": ids, "positions": positions, "segment_ids": segment_ids,
        "targets": targets, "weights": weights,
    }  # fmt: skip


def keep_gradients() -> optax.GradientTransformation:
    """An optimizer that changes no weight; its state is the last gradients, exactly."""

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, updates), updates

    return optax.GradientTransformation(init, update)


@functools.cache
def first_weights(config: ModelConfig) -> ModelWeights:
    """The initial weights of key 0, on the host: to make them compiles as long as a step does."""
    make = jax.jit(lambda: initialize(param_specs(config), jax.random.key(0)))
    return jax.device_get(make())


class Result(NamedTuple):
    """What a step computed, on the host."""

    metrics: dict[str, np.ndarray]
    gradients: Any


def begin(
    case: Case, optimizer: Any = None, objective: Objective = OBJECTIVE, rate: Any = constant_rate,
    gradient: Gradient | None = None, **options: Any,
) -> tuple[TrainStep, TrainState]:  # fmt: skip
    """A case's step and the state of key 0; by default it keeps gradients, and does not clip."""
    optimizer, gradient = optimizer or keep_gradients(), gradient or case.gradient
    options = {"max_grad_norm": None} | options
    step = make_train_step(objective, optimizer, rate, case.layout, gradient, **options)
    state = state_of(
        first_weights(gradient.config), gradient.specs, optimizer, case.layout,
        options.get("trains", everything), ema="ema" in options, health="stability" in options,
        buffers=objective.init_buffers(),
    )  # fmt: skip
    return step, state


def take(step: TrainStep, state: TrainState, batch: Any) -> Result:
    """The result of a step of an optimizer that keeps gradients."""
    state, metrics = step(state, batch)
    return Result(*jax.device_get((metrics | (state.buffers or {}), state.opt_state)))


def train(
    case: Case, optimizer: Any, num_steps: int, rate: float = 3e-3, num_batches: int = 1
) -> tuple[list[float], TrainState]:
    """The loss of each of some steps, and the state after them."""
    step, state = begin(case, optimizer, rate=lambda step: rate, max_grad_norm=1.0)
    losses = []
    for i in range(num_steps):
        state, metrics = step(state, make_batch(seed=i % num_batches))
        losses.append(float(metrics["loss"]))
    return losses, state


@functools.cache
def compiled_step(case: Case, optimizer: str = "keep") -> Any:
    """The compiled step of a case, without clipping."""
    transformation = keep_gradients() if optimizer == "keep" else make_optimizer(AdamW())
    step = make_train_step(
        OBJECTIVE, transformation, constant_rate, case.layout, case.gradient, max_grad_norm=None
    )
    state = abstract_state(param_specs(case.config), transformation, case.layout)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in make_batch().items()}
    return step.lower(state, batch).compile()


@functools.cache
def run(case: Case) -> Result:
    """Metrics and gradients of one step from the weights of key 0 on the batch of seed 0."""
    params, specs = first_weights(case.config), param_specs(case.config)
    state = state_of(params, specs, keep_gradients(), case.layout, everything)
    compiled = compiled_step(case)
    state: TrainState
    batch = jax.device_put(make_batch(), compiled.input_shardings[0][1])
    state, metrics = compiled(state, batch)
    return Result(*jax.device_get((metrics, state.opt_state)))


def assert_same(result: Result, expected: Result, tolerance: float = 1e-5) -> None:
    """Every metric and every gradient agree, relative to the largest entry of each."""
    for name, value in expected.metrics.items():
        np.testing.assert_allclose(result.metrics[name], value, rtol=tolerance, err_msg=name)
    found = jax.tree_util.tree_leaves_with_path(result.gradients)
    wanted = jax.tree_util.tree_leaves_with_path(expected.gradients)
    assert len(found) == len(wanted) > 10
    for (path, x), (_, y) in zip(found, wanted, strict=True):
        largest = np.max(np.abs(y))
        assert largest > 0, path
        np.testing.assert_allclose(
            x, y, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path)
        )
