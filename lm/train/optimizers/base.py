"""What every optimizer shares: its state, its path rules, its weight decay.

An optimizer is a configuration that names a method for each weight. A method declares what it keeps
for a weight, as specs, and computes a direction from a gradient; `Optimizer` applies the methods to
a tree. The declaration gives the state's shapes, its initial zeros and how it lies on a mesh.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from lm.weights import ParamSpec, is_spec, path_name

Tree = Any
Slots = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class PathRule:
    """Learning rate and weight decay of the weights whose path a pattern is found in.

    Attributes:
      pattern: regular expression, searched for in paths such as
        `stacks/0/layers/0/attention/query`.
      learning_rate: factor on the learning rate, weight decay included.
      weight_decay: in place of the optimizer's own; None keeps that.

    Raises:
      ValueError: the pattern is no regular expression, or a number is negative.
    """

    pattern: str
    learning_rate: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern {self.pattern!r} is no regular expression: {error}"
            ) from None
        if self.learning_rate < 0 or (self.weight_decay or 0) < 0:
            raise ValueError(f"{self} must have no negative learning_rate or weight_decay")


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
    """A frozen dataclass that chooses a method and a weight decay for each path."""

    @property
    def rules(self) -> tuple[PathRule, ...]: ...

    def method(self, path: str, shape: tuple[int, ...]) -> Method: ...

    def decay(self, path: str) -> float: ...


class OptimizerState(NamedTuple):
    """Updates done, and the slots: by name, a tree like the weights, None where there is none."""

    count: Any
    slots: dict[str, Tree]


class Optimizer(optax.GradientTransformation):
    """Directions of a tree of weights: optax's `init` and `update`, and `specs`.

    The direction of a weight w is `learning_rate * (method's direction + weight_decay * w)`, with
    both numbers by the first rule whose pattern its path holds. The train step multiplies it by
    minus the schedule's rate. State is float32. In trees, None is a weight that does not train.

    Raises:
      ValueError: from `init` and `specs`, a rule's pattern is found in no path.
    """

    config: OptimizerConfig

    def __new__(cls, config: OptimizerConfig) -> Optimizer:
        update = functools.partial(_update, config)
        self = super().__new__(cls, functools.partial(_init, config), update)
        self.config = config
        return self

    def specs(self, params: Tree) -> OptimizerState:
        """Specs of the state of weights with these specs: shapes, dtypes and logical axes."""
        return _specs(self.config, params)


def _specs(config: OptimizerConfig, params: Tree) -> OptimizerState:
    named, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_spec)
    names = [path_name(path) for path, _ in named]
    check_rules(config.rules, names)
    slots = [
        config.method(name, spec.shape).slots(spec)
        for name, (_, spec) in zip(names, named, strict=True)
    ]
    count = ParamSpec((), (), "zeros", dtype=jnp.int32)
    return OptimizerState(count, _by_name(slots, treedef))


def _init(config: OptimizerConfig, params: Tree) -> OptimizerState:
    specs = jax.tree.map(lambda x: ParamSpec(x.shape, (None,) * len(x.shape)), params)
    state = _specs(config, specs)
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), state, is_leaf=is_spec)


def _update(
    config: OptimizerConfig, updates: Tree, state: Any, params: Tree = None
) -> tuple[Tree, OptimizerState]:
    """(directions, new state); `updates` are gradients in float32."""
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    slots: list[Slots] = [{} for _ in named]
    for name, tree in state.slots.items():
        for own, x in zip(slots, treedef.flatten_up_to(tree), strict=True):
            own |= {} if x is None else {name: x}
    directions = []
    for i, gradient in enumerate(treedef.flatten_up_to(updates)):
        name, weight = path_name(named[i][0]), named[i][1]
        method = config.method(name, weight.shape)
        direction, slots[i] = method.update(gradient, slots[i], weight, state.count)
        factor, decay = _rates(config, name)
        direction = direction + decay * weight if decay else direction
        directions.append(direction if factor == 1 else factor * direction)
    new = OptimizerState(state.count + 1, _by_name(slots, treedef))
    return treedef.unflatten(directions), new


def _rates(config: OptimizerConfig, path: str) -> tuple[float, float]:
    """(factor on the learning rate, weight decay) of a weight."""
    for rule in config.rules:
        if re.search(rule.pattern, path):
            decay = rule.weight_decay
            return rule.learning_rate, config.decay(path) if decay is None else decay
    return 1.0, config.decay(path)


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


def is_matrix(path: str) -> bool:
    """Whether a weight is a matrix: neither a norm's scale nor a bias."""
    name = path.rsplit("/", 1)[-1]
    return not (name in ("scale", "bias") or name.endswith(("_bias", "_norm")))


def is_hidden_matrix(path: str) -> bool:
    """Whether a weight is a matrix of a layer: neither embedding nor output."""
    return is_matrix(path) and path.startswith("stacks/")


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
