"""Leaves named by their paths, and comparing those of a checkpoint with those wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.checkpoints.checksums import CheckpointError
from lm.weights import path_name

Tree = Any
SHOWN = 8


def flatten(tree: Tree) -> dict[str, Any]:
    """`{"trainable/stacks/0/layers/0/attention/query": leaf}`; None is not a leaf."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(leaves: Mapping[str, Any], like: Tree) -> Tree:
    """The inverse of `flatten`, for a tree shaped like `like`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], like)


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries keyed by the parts of each name."""
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return nested


def describe(leaf: Any) -> str:
    """An array's type, as `bfloat16[2,32]`."""
    return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"


def parse(described: str) -> jax.ShapeDtypeStruct:
    """The inverse of `describe`."""
    dtype, _, shape = described.removesuffix("]").partition("[")
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, shape.split(",")))), jnp.dtype(dtype))


def matches(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a name is one of `prefixes` or below one."""
    return any(name == p or name.startswith(p + "/") for p in prefixes)


def check_fit(where: Any, have: Mapping[str, str], want: Mapping[str, str]) -> None:
    """Compare the types of arrays by name.

    Raises:
      CheckpointError: arrays are missing, unexpected or of another type; the message names them.
    """
    faults = [f"{name} is missing" for name in sorted(want.keys() - have.keys())]
    faults += [
        f"{name} is {have[name]}, the model wants {want[name]}"
        for name in sorted(want.keys() & have.keys())
        if want[name] != have[name]
    ]
    faults += [f"{name} is not in this model" for name in sorted(have.keys() - want.keys())]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        fields = sorted({name.split("/")[0] for name in want.keys() ^ have.keys()})
        remedy = f", or ignore {fields}" if fields else ""
        raise CheckpointError(
            f"checkpoint {where} does not fit this model: {'; '.join(faults[:SHOWN])}{more}. "
            f"Use the configuration it was written with, or another workdir{remedy}"
        )
