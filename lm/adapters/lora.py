"""LoRA over a model's weights: leaves of the tree change, the model does not.

A weight is chosen by a predicate over its path, as `stacks/0/layers/0/attention/query`. Different
ranks are several calls of `add_lora`, each with its own weights.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm.model import ModelConfig, ModelWeights
from lm.model.params import Stacked, param_specs, specs_for, unstacked_specs
from lm.sharding import Layout
from lm.weights import (
    LoRA,
    MultiLoRA,
    ParamSpec,
    is_spec,
    is_structured,
    path_name,
    shardings,
)

Tree = Any


def linear_layers(config: ModelConfig) -> Callable[[str], bool]:
    """The predicate of every matrix of every layer; neither the embedding nor the output."""
    trees = param_specs(config), unstacked_specs(config)
    specs = jax.tree_util.tree_leaves_with_path(trees, is_leaf=is_spec)
    paths = {path_name(path[1:]) for path, spec in specs if spec.kind == "matrix"}
    return paths.__contains__


def trains(path: str) -> bool:
    """The predicate of a TrainState in which adapters alone train."""
    return path.rsplit("/", 1)[-1] in ("a", "b", "magnitude")


def _map(f: Callable[..., Any], params: Tree, *others: Tree) -> Tree:
    """f(path, weight, ...) over whole weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *weights: f(path_name(path), *weights), params, *others, is_leaf=is_structured
    )


def add_lora(
    params: ModelWeights,
    config: ModelConfig,
    key: jax.Array,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Callable[[str], bool] | None = None,
    rslora: bool = False,
    dora: bool = False,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
) -> ModelWeights:
    """The model with new adapters, which change nothing until they train.

    As in PEFT: of a matrix, `a` is uniform in +-1/sqrt(in) and `b` is 0; of the embedding, `a` is 0
    and `b` normal. DoRA's magnitude is the length of the columns.

    Args:
      params: weights of any kind, stacked or not.
      config: the model.
      key: random key; that of a weight is folded from its path.
      rank: r.
      alpha: what is added is multiplied by alpha / r; None for `rank`, that is 1.
      targets: which weights, by path; None for `linear_layers(config)`.
      rslora: multiply by alpha / sqrt(r) instead (arXiv:2312.03732).
      dora: with magnitudes (arXiv:2402.09353).
      dtype: of `a` and `b`.
      layout: make every part in its place on a mesh.

    Raises:
      ValueError: the rank is not positive, no weight is chosen, or one is not a matrix or has an
        adapter.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}; use 1 or more")
    scale = (rank if alpha is None else alpha) / (rank**0.5 if rslora else rank)
    specs = jax.tree_util.tree_leaves_with_path(specs_for(params, config), is_leaf=is_spec)
    spec_of: dict[str, ParamSpec] = {path_name(path): spec for path, spec in specs}
    chosen: list[str] = []
    is_target = targets or linear_layers(config)

    def add(path: str, weight: Any) -> Any:
        if not is_target(path):
            return weight
        chosen.append(path)
        _check_matrix(params, path, weight)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        make = functools.partial(
            _parts, rank=rank, scale=scale, dora=dora, dtype=dtype, embedding=path == "embed"
        )
        if layout is not None:
            parts = jax.eval_shape(make, own, weight).specs(spec_of[path])
            make = jax.jit(make, out_shardings=shardings(parts, layout.rules, layout.mesh))
        return dataclasses.replace(make(own, weight), base=weight)

    adapted = _map(add, params)
    if not chosen:
        raise ValueError("`targets` chose no weight; it is asked of paths as stacks/0/layers/0/...")
    return adapted


def _check_matrix(params: ModelWeights, path: str, weight: Any) -> None:
    if isinstance(weight, LoRA | MultiLoRA):
        raise ValueError(f"{path} has an adapter already; merge or remove it first")
    parts = path.split("/")
    stacked = parts[0] == "stacks" and isinstance(params.stacks[int(parts[1])], Stacked)
    if len(weight.shape) < 2 + stacked:
        raise ValueError(f"{path} {list(weight.shape)} is not a matrix; choose another weight")


def _parts(
    key: jax.Array, weight: Any, *, rank: int, scale: float, dora: bool, dtype: Any, embedding: bool
) -> LoRA:
    """A new adapter without its base."""
    *stack, rows, columns = weight.shape
    a_shape, b_shape = (*stack, rows, rank), (*stack, rank, columns)
    a, b = jnp.zeros(a_shape, dtype), jnp.zeros(b_shape, dtype)
    if embedding:
        b = jax.random.normal(key, b_shape, dtype)
    else:
        a = jax.random.uniform(key, a_shape, dtype, -(rows**-0.5), rows**-0.5)
    magnitude = None
    if dora:
        dense = weight.dequantize(jnp.float32) if is_structured(weight) else weight
        magnitude = jnp.linalg.norm(dense.astype(jnp.float32), axis=-2)
    return LoRA(None, a, b, jnp.full(tuple(stack), scale, jnp.float32), magnitude)


def count(params: Tree) -> int:
    """The number of trainable parameters in adapters."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(x.size for path, x in leaves if trains(path_name(path)))


def remove(params: ModelWeights) -> ModelWeights:
    """The model beneath its adapters."""
    return _map(lambda _, w: w.base if isinstance(w, LoRA | MultiLoRA) else w, params)


def merge(params: ModelWeights, dtype: Any = None, base: Tree = None) -> ModelWeights:
    """The model with its adapters added in, in float32: arrays where there were adapters.

    Args:
      params: with adapters; weights without stay as they are.
      dtype: of the merged arrays; None for the base's, or float32 where the base is not an array.
      base: merge into these weights instead. An adapter trained over a quantized model is better
        added to the weights that were quantized than to what the format kept of them.

    Raises:
      ValueError: a weight has several adapters.
    """

    def leaf(path: str, weight: Any, beneath: Any) -> Any:
        if isinstance(weight, MultiLoRA):
            raise ValueError(f"{path} has {weight.num_adapters} adapters; select one first")
        if not isinstance(weight, LoRA):
            return beneath
        own = jnp.float32 if is_structured(beneath) else beneath.dtype
        return dataclasses.replace(weight, base=beneath).dequantize(own if dtype is None else dtype)

    return _map(leaf, params, remove(params) if base is None else base)


def combine(params: ModelWeights, adapted: Sequence[ModelWeights]) -> ModelWeights:
    """One model with several adapters, of which each row of a batch chooses (`lm.weights.bind`).

    Args:
      params: the model beneath, of any weights, without adapters.
      adapted: that model with one adapter each, numbered in this order. Ranks and the weights that
        have one may differ.

    Raises:
      ValueError: no adapter is given, or one has magnitudes (DoRA) or other weights beneath it.
    """
    if not adapted:
        raise ValueError("no adapter to combine")

    def leaf(path: str, base: Any, *weights: Any) -> Any:
        beneath = [w.base if isinstance(w, LoRA) else w for w in weights]
        if not all(_same(base, other) for other in beneath):
            raise ValueError(
                f"{path}: an adapter that replaces whole weights cannot be one of several; merge "
                "it into the model instead (experiments.convert)"
            )
        found = [w if isinstance(w, LoRA) else None for w in weights]
        ranks = [0 if w is None else w.a.shape[-1] for w in found]
        if not any(ranks):
            return base
        if any(w is not None and w.magnitude is not None for w in found):
            raise ValueError(f"{path}: DoRA cannot be one of several adapters; merge it instead")
        padded = [_padded(base.shape, w, max(ranks)) for w in found]
        a, b, scale = zip(*padded, strict=True)
        return MultiLoRA(base, jnp.stack(a, -3), jnp.stack(b, -3), jnp.stack(scale, -1))

    return _map(leaf, params, *adapted)


def _same(a: Any, b: Any) -> bool:
    """Whether two weights are one, or hold the same numbers."""
    if a is b:
        return True
    ours, theirs = jax.tree.leaves(a), jax.tree.leaves(b)
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(x is y or jnp.array_equal(x, y) for x, y in pairs)


def _padded(
    shape: tuple[int, ...], weight: LoRA | None, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """a, b and scale of an adapter, or of none, with zeros up to `rank`."""
    *stack, rows, columns = shape
    if weight is None:
        a, b = jnp.zeros((*stack, rows, rank)), jnp.zeros((*stack, rank, columns))
        return a, b, jnp.zeros(tuple(stack))
    missing, none = (0, rank - weight.a.shape[-1]), (0, 0)
    leading = (none,) * len(stack)
    a = jnp.pad(weight.a, (*leading, none, missing))
    return a, jnp.pad(weight.b, (*leading, missing, none)), weight.scale


def select(params: ModelWeights, index: int) -> ModelWeights:
    """The model with only adapter `index` of several.

    Raises:
      ValueError: there is no such adapter.
    """
    return _map(lambda _, w: w.select(index) if isinstance(w, MultiLoRA) else w, params)
