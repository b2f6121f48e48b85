"""`model.json`: describes a checkpoint's model, so that opening it needs only its path.

It holds the configuration with the class of every dataclass; the tree of weights, with the class of
every node and of every leaf that is more than an array; and the name and type of every stored
array. Each checkpoint has its own, so that a copied step directory is a whole model.
A field added to a configuration later takes its default for older checkpoints.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from typing import Any

from lm.checkpoints.checksums import CheckpointError
from lm.checkpoints.names import describe, parse
from lm.config import codec
from lm.model import ModelConfig
from lm.weights import StructuredWeight

FILE = "model.json"
VERSION = 2
NEWER = (
    "open the checkpoint with the version of the code that wrote it, or a later one, and import or "
    "register (lm.checkpoints.register) the classes that are its own"
)
PACKAGES = ("lm.model.", "lm.weights.")  # their tree classes need no `register`

_registered: dict[str, type] = {}


def register(*classes: type) -> None:
    """Register dataclasses of higher packages, so that checkpoints can hold them."""
    _registered.update({cls.__name__: cls for cls in classes})


def _known() -> dict[str, type]:
    """Classes by name: leaves, nodes of the tree of weights, and those of the configuration."""
    known: dict[str, type] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGES):
            for cls in vars(module).values():
                if isinstance(cls, type) and dataclasses.is_dataclass(cls):
                    known[cls.__name__] = cls
    pending: list[type] = [StructuredWeight]
    while pending:
        subclasses = pending.pop().__subclasses__()
        known |= {cls.__name__: cls for cls in subclasses}
        pending += subclasses
    return known | _registered


def encode(value: Any, where: str = "config") -> Any:
    """A configuration, or a leaf's static field, as JSON that describes itself.

    Raises:
      CheckpointError: it holds a value with no faithful form; the message names the field.
    """
    try:
        return codec.encode(value, Any, where, _known())
    except TypeError as error:
        raise CheckpointError(
            f"{error}; a dataclass becomes known by lm.checkpoints.register"
        ) from error


def decode(value: Any, where: str = "config") -> Any:
    """The inverse of `encode`.

    Raises:
      CheckpointError: a class or field is unknown here, or its value is refused.
    """
    try:
        return codec.decode(value, Any, where, _known())
    except ValueError as error:
        raise CheckpointError(f"{error}; {NEWER}") from error


def encode_tree(tree: Any, where: str = "weights") -> Any:
    """A tree of weights as JSON's types: classes, static fields, and each array's type."""
    if tree is None:
        return None
    if not dataclasses.is_dataclass(tree) and hasattr(tree, "dtype"):
        return describe(tree)
    if isinstance(tree, tuple | list):
        return [encode_tree(each, f"{where}/{i}") for i, each in enumerate(tree)]
    if isinstance(tree, dict):
        return {"keys": {key: encode_tree(each, f"{where}/{key}") for key, each in tree.items()}}
    if not dataclasses.is_dataclass(tree):
        raise CheckpointError(f"{where} is a {type(tree).__name__}, which is not a tree of weights")
    name = type(tree).__name__
    if _known().get(name) is not type(tree):
        raise CheckpointError(
            f"{where}: checkpoints do not know the class {type(tree).__qualname__}; "
            "register it with lm.checkpoints.register"
        )
    node: dict[str, Any] = {"class": name}
    for field in dataclasses.fields(tree):
        value, path = getattr(tree, field.name), f"{where}/{field.name}"
        if not field.metadata.get("pytree_node", True):
            node.setdefault("static", {})[field.name] = encode(value, path)
        elif value is not None:
            node.setdefault("fields", {})[field.name] = encode_tree(value, path)
    return node


def decode_tree(value: Any, where: str = "weights") -> Any:
    """The inverse of `encode_tree`, with a ShapeDtypeStruct for each array."""
    if value is None:
        return None
    if isinstance(value, str):
        return parse(value)
    if isinstance(value, list):
        return tuple(decode_tree(each, f"{where}/{i}") for i, each in enumerate(value))
    if "keys" in value:
        return {k: decode_tree(each, f"{where}/{k}") for k, each in value["keys"].items()}
    cls = _known().get(value["class"])
    if cls is None:
        raise CheckpointError(f"{where}: class {value['class']!r} is not known here; {NEWER}")
    today = getattr(cls, "renamed_fields", {})
    is_array = {f.name: f.metadata.get("pytree_node", True) for f in dataclasses.fields(cls)}
    fields: dict[str, Any] = {name: None for name, array in is_array.items() if array}
    for name, each in value.get("fields", {}).items():
        fields[name] = decode_tree(each, f"{where}/{name}")
    for name, each in value.get("static", {}).items():
        fields[today.get(name, name)] = decode(each, f"{where}/{name}")
    if unknown := fields.keys() - is_array.keys():
        raise CheckpointError(
            f"{where}: {cls.__name__} has no {', '.join(sorted(unknown))} here; {NEWER}"
        )
    return cls(**fields)


class ModelJson(typing.NamedTuple):
    """The contents of `model.json`.

    Attributes:
      config: the model's configuration; None if the saved state is not a model's.
      weights: the tree of weights, for `decode_tree`; None as above.
      arrays: type, as `bfloat16[2,32]`, of every array in the checkpoint, by name.
      frozen: path and digest of frozen weights stored elsewhere, or None.
    """

    config: ModelConfig | None
    weights: Any
    arrays: dict[str, str]
    frozen: dict[str, str] | None


def to_dict(
    config: ModelConfig | None, weights: Any, arrays: dict[str, Any], frozen: dict[str, str] | None
) -> dict[str, Any]:
    """The contents of `model.json` for these weights and arrays."""
    return {
        "version": VERSION,
        "config": None if config is None else encode(config),
        "weights": encode_tree(weights),
        "frozen": frozen,
        "arrays": {name: describe(array) for name, array in arrays.items()},
    }


def from_dict(values: dict[str, Any], where: Any) -> ModelJson:
    """Read `model.json`; the tree of weights stays encoded, for `decode_tree`.

    Raises:
      CheckpointError: it has another version, or a class that is not known here.
    """
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{where} has format version {values.get('version')}; this code reads version {VERSION}"
        )
    config = values["config"]
    return ModelJson(
        None if config is None else decode(config),
        values["weights"],
        values["arrays"],
        values["frozen"],
    )
