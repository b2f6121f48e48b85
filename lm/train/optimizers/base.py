"""What every optimizer shares: its state, its path rules, its weight decay.

An optimizer is a configuration that names a method for each weight. A method declares what it keeps
for a weight, as specs, and computes a direction from a gradient; `Optimizer` applies the methods to
a tree. The declaration gives the state's shapes, its initial zeros and how it is sharded.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from lm.config.fields import Checked, NonNegative
from lm.weights import ParamSpec, is_spec, path_name
from lm.weights.specs import Kind

Tree = Any
Slots = dict[str, jax.Array]
Kinds = Mapping[str, Kind]  # of weights, by path


@dataclasses.dataclass(frozen=True)
class PathRule(Checked):
    """Learning rate and weight decay of the weights whose path a pattern is found in.

    Attributes:
      pattern: regular expression, searched for in paths such as
        `stacks/0/layers/0/attention/query`.
      learning_rate: factor on the learning rate, weight decay included.
      weight_decay: in place of the optimizer's own; None keeps that.

    Raises:
      ValueError: the pattern is not a regular expression.
    """

    pattern: str
    learning_rate: NonNegative = 1.0
    weight_decay: NonNegative | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern {self.pattern!r} is not a regular expression: {error}"
            ) from None


class Method(Protocol):
    """What is kept for one weight, and the direction it is moved in."""

    def slots(self, weight: ParamSpec) -> dict[str, ParamSpec]:
        """Specs of the arrays kept, by name; all begin as zeros."""
        ...

    def update(
        self, gradient: jax.Array, slots: Slots, weight: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        """(direction to move against, new slots); `count` updates came before."""
        ...


class OptimizerConfig(Protocol):
    """A frozen dataclass that chooses a method and a weight decay for each weight."""

    @property
    def rules(self) -> tuple[PathRule, ...]: ...

    def method(self, weight: ParamSpec) -> Method: ...

    def decay(self, weight: ParamSpec) -> float: ...


class OptimizerState(NamedTuple):
    """Updates done, and the slots: by name, a tree like the weights, None where there is none."""

    count: Any
    slots: dict[str, Tree]


class Optimizer(optax.GradientTransformation):
    """Directions of a tree of weights: optax's `init` and `update`, and `specs`.

    The direction of a weight w is `learning_rate * (method's direction + weight_decay * w)`, with
    both numbers by the first rule whose pattern its path holds. The train step multiplies it by
    minus the schedule's rate. State is float32. In trees, None is a weight that does not train.

    Which method a weight has is said by its spec's `kind`. `init_state` and `make_train_step` give
    the specs; where `init` and `update` are called otherwise, they are an argument.

    Raises:
      ValueError: from `init` and `specs`, a rule's pattern is found in no path; from `init` and
        `update`, there are no specs.
    """

    config: OptimizerConfig
    weights: Tree

    def __new__(cls, config: OptimizerConfig, weights: Tree = None) -> Optimizer:
        named = jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_spec)
        kinds = {path_name(path): spec.kind for path, spec in named}
        init, update = (functools.partial(f, config, kinds) for f in (_init, _update))
        self = super().__new__(cls, init, update)
        self.config, self.weights = config, weights
        return self

    def specs(self, params: Tree) -> OptimizerState:
        """Specs of the state of weights with these specs: shapes, dtypes and logical axes."""
        return _specs(self.config, params)


def with_specs(optimizer: optax.GradientTransformation, specs: Tree) -> Any:
    """The optimizer with the specs of the weights, if it is an `Optimizer` without them."""
    if isinstance(optimizer, Optimizer) and optimizer.weights is None:
        return Optimizer(optimizer.config, specs)
    return optimizer


def _specs(config: OptimizerConfig, params: Tree) -> OptimizerState:
    named, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_spec)
    check_rules(config.rules, [path_name(path) for path, _ in named])
    slots = [config.method(spec).slots(spec) for _, spec in named]
    count = ParamSpec((), (), "zeros", dtype=jnp.int32)
    return OptimizerState(count, _by_name(slots, treedef))


def _as_spec(kinds: Kinds, path: Any, weight: Any) -> ParamSpec:
    name = path_name(path)
    if name not in kinds:
        raise ValueError(
            f"the optimizer has no spec of {name}; give make_optimizer the specs of the weights"
        )
    return ParamSpec(weight.shape, (None,) * len(weight.shape), kind=kinds[name])


def _init(config: OptimizerConfig, kinds: Kinds, params: Tree) -> OptimizerState:
    specs = jax.tree_util.tree_map_with_path(functools.partial(_as_spec, kinds), params)
    state = _specs(config, specs)
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), state, is_leaf=is_spec)


def _update(
    config: OptimizerConfig, kinds: Kinds, updates: Tree, state: Any, params: Tree = None
) -> tuple[Tree, OptimizerState]:
    """(directions, new state); `updates` are gradients in float32."""
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    slots: list[Slots] = [{} for _ in named]
    for name, tree in state.slots.items():
        for own, x in zip(slots, treedef.flatten_up_to(tree), strict=True):
            own |= {} if x is None else {name: x}
    directions = []
    for i, gradient in enumerate(treedef.flatten_up_to(updates)):
        path, weight = named[i]
        spec = _as_spec(kinds, path, weight)
        method = config.method(spec)
        direction, slots[i] = method.update(gradient, slots[i], weight, state.count)
        factor, decay = _rates(config, path_name(path), spec)
        direction = direction + decay * weight if decay else direction
        directions.append(direction if factor == 1 else factor * direction)
    new = OptimizerState(state.count + 1, _by_name(slots, treedef))
    return treedef.unflatten(directions), new


def _rates(config: OptimizerConfig, path: str, spec: ParamSpec) -> tuple[float, float]:
    """(factor on the learning rate, weight decay) of a weight."""
    for rule in config.rules:
        if re.search(rule.pattern, path):
            decay = rule.weight_decay
            return rule.learning_rate, config.decay(spec) if decay is None else decay
    return 1.0, config.decay(spec)


def _by_name(slots: list[dict[str, Any]], treedef: Any) -> dict[str, Tree]:
    names = sorted({name for own in slots for name in own})
    return {name: treedef.unflatten([own.get(name) for own in slots]) for name in names}


def check_rules(rules: tuple[PathRule, ...], paths: list[str]) -> None:
    """Raises ValueError, naming the nearest paths, where a pattern is found in none of them."""
    for rule in rules:
        if not any(re.search(rule.pattern, path) for path in paths):
            near = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.0)
            raise ValueError(
                f"pattern {rule.pattern!r} is found in no weight that trains; the nearest paths "
                f"are {', '.join(near)}"
            )


def refuse_rules(adam: Any) -> None:
    """Raises ValueError where the Adam inside another optimizer's configuration has rules."""
    if adam.rules:
        raise ValueError("adam.rules are not read here; give the rules to the optimizer around it")


def clip_by_global_norm(gradients: Tree, max_norm: float | None) -> tuple[Tree, jax.Array]:
    """(gradients scaled down to `max_norm` if they exceed it, their norm before)."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
    if max_norm is None:
        return gradients, norm
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, gradients), norm
