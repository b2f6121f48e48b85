"""The state of training, which of its weights are trainable, and how it is sharded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lm.sharding import Layout, named_sharding
from lm.train.optimizers import with_specs
from lm.weights import (
    LoRA,
    StructuredWeight,
    abstract,
    cast,
    initialize,
    is_spec,
    path_name,
    shardings,
)

Tree = Any  # shaped like the weights, or like the state of an optimizer of any kind
Scalar = jax.Array  # of the state itself; trees of shapes and shardings have those in its place


@flax.struct.dataclass
class Health:
    """Statistics of the steps so far, for `lm.train.stability`; replicated scalars.

    Attributes:
      count: int32, steps in the statistics.
      loss_mean, loss_variance, grad_norm_mean, grad_norm_variance: float32, of steps taken.
      skipped: int32, steps skipped in all.
      in_a_row: int32, steps skipped since the last one taken.
      recovery_scale: float32, of the learning rate while it recovers.
      recovery_until: int32, first step that has the schedule's rate again.
    """

    count: Scalar
    loss_mean: Scalar
    loss_variance: Scalar
    grad_norm_mean: Scalar
    grad_norm_variance: Scalar
    skipped: Scalar
    in_a_row: Scalar
    recovery_scale: Scalar
    recovery_until: Scalar

    @classmethod
    def new(cls) -> Health:
        """The statistics of a run that has taken no step."""
        whole, real = (jnp.zeros((), dtype) for dtype in (jnp.int32, jnp.float32))
        return cls(whole, real, real, real, real, whole, whole, jnp.ones_like(real), whole)


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      step: int32, steps done.
      trainable: the trainable weights; None where a weight is frozen.
      frozen: the other weights, of any leaf type; None where a weight is trainable.
      opt_state: of the optimizer, for `trainable`.
      ema: float32 average of `trainable`, laid out as the optimizer's state; or None.
      health: `Health`, or None.
      buffers: what the objective keeps from step to step, replicated; or None.
    """

    step: Scalar
    trainable: Tree
    frozen: Tree
    opt_state: Tree
    ema: Tree = None
    health: Health | None = None
    buffers: Tree = None

    @property
    def params(self) -> Tree:
        """The whole model."""
        return merge(self.trainable, self.frozen)


class Parts(TypedDict, total=False):
    """Optional parts of a state.

    Attributes:
      ema: with an average of the weights, as the step's `ema` needs.
      health: with what the step's `stability` needs.
      buffers: the objective's `init_buffers()`.
    """

    ema: bool
    health: bool
    buffers: Tree


def _is_weight(x: Any) -> bool:
    return x is None or (isinstance(x, StructuredWeight) and not isinstance(x, LoRA)) or is_spec(x)


def partition(params: Tree, trains: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """(trainable, frozen) by a predicate over paths such as `stacks/0/layers/0/attention/query`."""

    def keep(wanted: bool) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if trains(path_name(path)) == wanted else None,
            params,
            is_leaf=_is_weight,
        )

    return keep(True), keep(False)


def merge(trainable: Tree, frozen: Tree) -> Tree:
    """The tree that `partition` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=_is_weight)


def everything(path: str) -> bool:
    """The predicate of pre-training: every weight is trainable."""
    return True


def state_specs(specs: Tree, optimizer: optax.GradientTransformation) -> Tree:
    """The optimizer's state, with a spec for every leaf that the `optimizer` table shards.

    An optimizer may have a method `specs(specs)`, from the weights' specs to a tree like its state,
    of ParamSpecs and, for what is replicated, ShapeDtypeStructs. For any other, a leaf whose path
    ends in a weight's path and whose shape is the weight's is sharded as the weight is; anything
    else (counts) is replicated.
    """
    own = getattr(optimizer, "specs", None)
    if own is not None:
        return own(specs)
    by_path = {
        path_name(path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    }

    def find(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            spec = by_path.get("/".join(parts[start:]))
            if spec is not None and spec.shape == leaf.shape:
                return spec
        return leaf

    state = jax.eval_shape(optimizer.init, abstract(specs))
    return jax.tree_util.tree_map_with_path(find, state)


def state_shardings(
    specs: Tree,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    trains: Callable[[str], bool] = everything,
    **parts: Unpack[Parts],
) -> TrainState:
    """NamedShardings of a TrainState of the model with these specs. Arguments as `init_state`.

    Raises:
      ValueError: a mesh axis does not divide a weight; the message names both.
    """
    mesh, rules = layout.mesh, layout.rules
    replicated: Any = NamedSharding(mesh, PartitionSpec())

    def of_state(leaf: Any) -> NamedSharding:
        if not is_spec(leaf):
            return replicated
        return named_sharding(mesh, rules.optimizer, leaf.axes, leaf.shape)

    trainable, frozen = partition(specs, trains)
    return TrainState(
        step=replicated,
        trainable=shardings(trainable, rules, mesh),
        frozen=shardings(frozen, rules, mesh),
        opt_state=jax.tree.map(of_state, state_specs(trainable, optimizer), is_leaf=is_spec),
        ema=shardings(trainable, rules, mesh, kind="optimizer") if parts.get("ema") else None,
        health=jax.tree.map(lambda _: replicated, Health.new()) if parts.get("health") else None,
        buffers=jax.tree.map(lambda _: replicated, parts.get("buffers")),
    )


def init_state(
    specs: Tree,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    layout: Layout,
    trains: Callable[[str], bool] = everything,
    **parts: Unpack[Parts],
) -> TrainState:
    """A new model and its optimizer, every shard made on its own device.

    Args:
      specs: of every weight.
      optimizer: its state is made for the trainable weights.
      key: random key of the initial weights.
      layout: mesh and rules.
      trains: whether the weight at a path is trainable.
      parts: see `Parts`.
    """
    wanted = state_shardings(specs, optimizer, layout, trains, **parts)
    return jax.jit(_maker(specs, optimizer, trains, **parts), out_shardings=wanted)(key)


def state_of(
    params: Tree,
    specs: Tree,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    trains: Callable[[str], bool],
    **parts: Unpack[Parts],
) -> TrainState:
    """The state in which training of an existing model, or of adapters over it, begins.

    Args:
      params: weights of any kind. They are donated: arrays that have their sharding already are not
        copied, and the first step reuses their memory.
      specs: of these weights; `lm.weights.specs_of` gives them.
      optimizer, layout, trains, parts: as in `init_state`.
    """
    wanted = state_shardings(specs, optimizer, layout, trains, **parts)
    trainable, frozen = jax.device_put(partition(params, trains), (wanted.trainable, wanted.frozen))

    def make(trainable: Tree) -> TrainState:
        state = _begin(trainable, None, with_specs(optimizer, specs), **parts)
        return dataclasses.replace(state, trainable=None)

    places = dataclasses.replace(wanted, trainable=None, frozen=None)
    rest = jax.jit(make, out_shardings=places)(trainable)
    return dataclasses.replace(rest, trainable=trainable, frozen=frozen)


def abstract_state(
    specs: Tree,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    trains: Callable[[str], bool] = everything,
    **parts: Unpack[Parts],
) -> TrainState:
    """The TrainState as ShapeDtypeStructs with shardings: to restore into, or to compile with."""
    shapes = jax.eval_shape(_maker(specs, optimizer, trains, **parts), jax.random.key(0))
    wanted = state_shardings(specs, optimizer, layout, trains, **parts)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        wanted,
    )


def _maker(
    specs: Tree,
    optimizer: optax.GradientTransformation,
    trains: Callable[[str], bool],
    **parts: Unpack[Parts],
) -> Callable[[jax.Array], TrainState]:
    own = with_specs(optimizer, specs)

    def make(key: jax.Array) -> TrainState:
        return _begin(*partition(initialize(specs, key), trains), own, **parts)

    return make


def _begin(
    trainable: Tree,
    frozen: Tree,
    optimizer: optax.GradientTransformation,
    **parts: Unpack[Parts],
) -> TrainState:
    """The state of step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        opt_state=optimizer.init(trainable),
        ema=cast(trainable, jnp.float32) if parts.get("ema") else None,
        health=Health.new() if parts.get("health") else None,
        buffers=jax.tree.map(jnp.asarray, parts.get("buffers")),
    )


def bytes_per_device(tree: Tree) -> dict[int, int]:
    """Bytes of the arrays of `tree` on each device of this process, by device id."""
    held: dict[int, int] = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return held
