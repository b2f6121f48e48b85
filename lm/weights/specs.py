"""One declaration per weight, and every tree that follows from it.

A tree of `ParamSpec` gives the abstract weights, their shardings, their initial values and their
count by `tree.map`. The random key of a weight is folded from its path, so that adding a weight
changes no other.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lm.sharding import Rules, current_layout, gather_weight, named_sharding
from lm.weights.leaf import StructuredWeight, is_structured

Tree = Any
Kind = Literal["matrix", "embedding", "vector"]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, dtype, logical axes and initial distribution of one weight.

    Attributes:
      shape: `[*stack, in, out]` for a matrix, `[*stack, n]` for a scale or a bias.
      axes: logical axis of each dimension, or None.
      init: "normal" (standard deviation `scale`), "ones" or "zeros".
      scale: standard deviation of "normal".
      dtype: of the master weight.
      leaf: what holds the weight if it is not an array: a `StructuredWeight` of ShapeDtypeStructs.
        Such a weight comes from a file or a quantizer, never from `initialize`.
      kind: what optimizers and adapters treat it as: a "matrix" of a layer, an "embedding" (the
        output matrix and other heads too), or a "vector" (scales, biases, magnitudes), however many
        layers are stacked.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    scale: float = 0.02
    dtype: DTypeLike = jnp.float32
    leaf: StructuredWeight | None = None
    kind: Kind = "matrix"

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and logical axes {self.axes} differ in length")


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def map_specs(f, specs: Tree, *trees: Tree) -> Tree:
    """`tree.map` over the specs; what `trees` have at a spec (structured weights) stays whole."""
    return jax.tree.map(f, specs, *trees, is_leaf=is_spec)


def specs_of(params: Tree, specs: Tree) -> Tree:
    """The specs of weights as they are held, with leaves and adapters, from the model's specs."""
    return map_specs(
        lambda s, w: w.specs(s) if isinstance(w, StructuredWeight) else s, specs, params
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as `stacks/0/layers/0/attention/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def abstract(specs: Tree, rules: Rules | None = None, mesh: Mesh | None = None) -> Tree:
    """The tree of `jax.ShapeDtypeStruct`, with shardings at rest where a mesh is given."""

    def leaf(spec: ParamSpec) -> Any:
        if spec.leaf is not None:
            if mesh is None or rules is None:
                return spec.leaf
            return jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                spec.leaf,
                spec.leaf.shardings(spec.axes, rules, mesh),
            )
        sharding = None
        if mesh is not None and rules is not None:
            sharding = named_sharding(mesh, rules.weights, spec.axes, spec.shape)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    return map_specs(leaf, specs)


def initialize(specs: Tree, key: jax.Array) -> Tree:
    """Initial weights. Call it under `jit` with `out_shardings` to make each shard in place."""

    def leaf(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
        if spec.leaf is not None:
            name = type(spec.leaf).__name__
            raise ValueError(f"{path_name(path)} is a {name}, which has no initial value; load it")
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, spec.dtype)
        if spec.init == "ones":
            return jnp.ones(spec.shape, spec.dtype)
        own = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return spec.scale * jax.random.normal(own, spec.shape, spec.dtype)

    return jax.tree_util.tree_map_with_path(leaf, specs, is_leaf=is_spec)


def count(specs: Tree) -> int:
    """Number of weights in the tree."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def shardings(specs: Tree, rules: Rules, mesh: Mesh, params: Tree = None, kind: str = "weights"):
    """Shardings of a tree of weights at rest, or of another `kind` of table ("optimizer", ...).

    Args:
      specs: the tree of ParamSpec.
      rules: the tables.
      mesh: the mesh.
      params: the weights, needed only where the specs do not know some `StructuredWeight`.
      kind: which table of `rules`.

    Raises:
      ValueError: a mesh axis does not divide a dimension; the message names the weight.
    """
    table = getattr(rules, kind)

    def leaf(path: tuple[Any, ...], spec: ParamSpec, weight: Any = None) -> Any:
        try:
            held = spec.leaf if weight is None else weight
            if isinstance(held, StructuredWeight):
                return held.shardings(spec.axes, rules, mesh)
            return named_sharding(mesh, table, spec.axes, spec.shape)
        except ValueError as error:
            raise ValueError(f"{path_name(path)} {list(spec.shape)}: {error}") from None

    trees = () if params is None else (params,)
    return jax.tree_util.tree_map_with_path(leaf, specs, *trees, is_leaf=is_spec)


def cast(params: Tree, dtype: DTypeLike) -> Tree:
    """Floating-point arrays of the tree in `dtype`; a `StructuredWeight` casts itself."""

    def leaf(x: Any) -> Any:
        if isinstance(x, StructuredWeight):
            return x.cast(dtype)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x.astype(dtype)

    return jax.tree.map(leaf, params, is_leaf=is_structured)


def gather(params: Tree, specs: Tree) -> Tree:
    """Weights as the matrices multiply them (`gather_weight`); a StructuredWeight stays as is."""
    if current_layout() is None:
        return params

    def leaf(spec: ParamSpec, weight: Any) -> Any:
        if isinstance(weight, StructuredWeight):
            inner = weight.specs(spec)
            return weight if is_spec(inner) else map_specs(leaf, inner, weight)
        return gather_weight(weight, *spec.axes)

    return map_specs(leaf, specs, params)


def shard_like(tree: Tree, specs: Tree, kind: str) -> Tree:
    """State the sharding of a tree shaped like the weights, by a table of the layout's rules."""
    layout = current_layout()
    if layout is None:
        return tree
    wanted = shardings(specs, layout.rules, layout.mesh, tree, kind)
    return jax.lax.with_sharding_constraint(tree, wanted)
