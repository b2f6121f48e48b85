"""What the readers and writers of all formats share."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.files import FormatError
from lm.model import ModelConfig, ModelWeights
from lm.weights import is_spec, path_name

Path = str | pathlib.Path
Header = tuple[tuple[int, ...], str]  # shape and dtype of a tensor in a file
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of weights in safetensors
# How a user passes over a key of a configuration that nothing here understands.
IGNORE_HINT = (
    "If a key does not change what the model computes, pass it over: --ignore_config_keys=KEY,... "
    "(in Python, ignore=[KEY, ...])"
)
_LAYER = re.compile(r"(?:\.layers\.|\bblk\.)(\d+)")


def read_json(file: pathlib.Path, remedy: str = "") -> Any:
    """The contents of a JSON file.

    Raises:
      FormatError: it does not exist (the message ends with `remedy`), or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{file} does not exist{remedy}") from None
    except ValueError as error:
        raise FormatError(f"{file} is not JSON: {error}") from None


@contextlib.contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Turns what Python raises for a value of the wrong type in a file into a FormatError.

    The readers name the key where they check its type; this is for the places where they do not.
    """
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise FormatError(
            f"{path} has a value of another type than its format allows "
            f"({type(error).__name__}: {error}); it is damaged, or its writer deviates from the "
            "format"
        ) from error


def tensor_fault(
    name: str,
    shape: tuple[int, ...] | None,
    found: Header | None,
    dtypes: Collection[str] = DTYPES,
) -> str | None:
    """What is wrong with a tensor of a safetensors file, or None.

    Args:
      name: in the file.
      shape: that the model wants; None where any is accepted.
      found: its shape and dtype in the file; None where it is missing.
      dtypes: that it may have.
    """
    if found is None:
        return f"{name} {list(shape or ())} is missing"
    if found[1] not in dtypes:
        return f"{name} is of dtype {found[1]}; expected {' or '.join(dtypes)}"
    if shape is not None and found[0] != shape:
        return f"{name} is {list(found[0])}, the model wants {list(shape)}"
    return None


def refuse(faults: list[str], source: str, config: ModelConfig, verdict: str = "does not fit a"):
    """Raises FormatError naming every fault, if there is one."""
    if faults:
        raise FormatError(
            f"{source} {verdict} {config.family!r} model of {config.num_layers} layers, "
            f"{len(faults)} faults: {'; '.join(_by_layer(faults))}"
        )


def _by_layer(faults: list[str]) -> list[str]:
    """Faults that differ in the number of the layer alone, as one."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        found = list(_LAYER.finditer(fault))
        start, end = found[0].span(1) if len(found) == 1 else (len(fault), len(fault))
        grouped.setdefault((fault[:start], fault[end:]), []).append(fault[start:end])
    return [
        f"{before}{numbers[0] if len(numbers) == 1 else '{' + ','.join(numbers) + '}'}{after}"
        for (before, after), numbers in grouped.items()
    ]


def attribute(tree: Any, field: str) -> Any:
    """The attribute at a path as `attention/query`, or None where the path ends early."""
    for name in field.split("/"):
        tree = getattr(tree, name, None)
    return tree


def by_path(specs: Any) -> dict[str, Any]:
    """The specs of a tree by their paths."""
    found = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    return {path_name(path): spec for path, spec in found}


def tree_of(weights: Mapping[str, Any], specs: ModelWeights) -> ModelWeights:
    """The tree with the structure of `specs`, of weights by their paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: weights[path_name(path)], specs, is_leaf=is_spec
    )


def put(array: np.ndarray, sharding: Any) -> jax.Array:
    """A copy of `array` on the devices; each host reads and places its own part."""
    if sharding is None:
        return jnp.array(array)
    # Copied, because on a CPU the result would otherwise be the file's memory.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))
