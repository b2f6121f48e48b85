"""Frozen dataclasses as JSON: the one codec of `config.json` and of a checkpoint's `model.json`.

Values are read and written by their annotations, so JSON names a dataclass (as `class`) only where
a union leaves a choice. Below the annotation `Any` the JSON describes itself: every dataclass is
named, and found again among `classes`; a dtype is `{"dtype": "bfloat16"}`. A field added to a
dataclass after the JSON was written takes its default.
"""

import dataclasses
import enum
import json
import math
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin

import ml_dtypes
import numpy as np

from lm.config.fields import (
    FieldError,
    base,
    dataclasses_in,
    expected,
    hints,
    is_dataclass,
    is_enum,
    item_annotations,
    members,
    required,
    show,
    type_name,
)

T = TypeVar("T")
Classes = Mapping[str, type]
NO_CLASSES: Classes = MappingProxyType({})
# Strict JSON has no such numbers; these are the names protobuf's JSON mapping gives them.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class ConfigError(ValueError):
    """Invalid input by the user: programs print its message alone and exit with status 2."""


def encode(
    value: Any, annotation: Any = Any, path: str = "config", classes: Classes = NO_CLASSES
) -> Any:
    """The value as JSON's types.

    Args:
      value: scalars, enums, tuples, dtypes and dataclasses of these.
      annotation: of the value; `Any` for JSON that describes itself.
      path: name of the value in messages.
      classes: dataclasses that `Any` may hold, by name.

    Raises:
      TypeError: a value has no faithful form in JSON; the message names its path.
    """
    if is_dataclass(type(value)):
        choices, tagged = _choices(annotation, classes)
        name = type(value).__name__
        if choices.get(name) is not type(value):
            wanted = "one of the classes registered" if tagged else expected(annotation)
            raise TypeError(f"{path} holds a {type_name(type(value))}, not {wanted}")
        # `class` cannot be a field's name.
        return ({"class": name} if tagged else {}) | {
            field: encode(getattr(value, field), each, f"{path}.{field}", classes)
            for field, each in _fields(type(value), annotation).items()
        }
    if isinstance(value, tuple):
        items = _items(annotation, len(value))
        if items is None:
            raise TypeError(f"{path} holds a tuple {value!r}, not {expected(annotation)}")
        return [encode(v, items[i], f"{path}.{i}", classes) for i, v in enumerate(value)]
    if isinstance(value, enum.Enum) and annotation is not Any:
        return value.name
    if type(value) is float and not math.isfinite(value) and annotation is not Any:
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, type) and issubclass(value, np.generic):
        value = np.dtype(value)
    if isinstance(value, np.dtype) and annotation is Any:
        return {"dtype": value.name}
    raise TypeError(f"{path} holds a {type_name(type(value))}, which JSON cannot hold")


def decode(
    value: Any, annotation: Any = Any, path: str = "config", classes: Classes = NO_CLASSES
) -> Any:
    """The inverse of `encode`. A dataclass may name its class even where it need not.

    Raises:
      ValueError: the value does not fit; the message names `path`.
    """
    if isinstance(value, list) and (items := _items(annotation, len(value))) is not None:
        return tuple(decode(v, items[i], f"{path}.{i}", classes) for i, v in enumerate(value))
    if isinstance(value, dict):
        if annotation is Any and value.keys() == {"dtype"}:
            return _dtype(value["dtype"], path)
        return _decode_dataclass(value, annotation, path, classes)
    if annotation is Any:
        return value
    for member in map(base, members(annotation)):
        if get_origin(member) is Literal:
            for choice in get_args(member):
                if value == choice and type(value) is type(choice):
                    return choice
        elif is_enum(member):
            if isinstance(value, str) and value in member.__members__:
                return member[value]
        elif member is float and isinstance(value, str) and value in NON_FINITE:
            return NON_FINITE[value]
        elif type(value) is member or (member is float and type(value) is int):
            return value
    raise ValueError(f"{path}={value!r} is not {expected(annotation)}")


def _decode_dataclass(value: Any, annotation: Any, path: str, classes: Classes) -> Any:
    choices, tagged = _choices(annotation, classes)
    if not tagged and not choices:
        raise ValueError(f"{path}={value!r} is not {expected(annotation)}")
    values = dict(value)
    name = values.pop("class", None if tagged else next(iter(choices)))
    if name not in choices:
        wanted = "a class known here" if annotation is Any else f"one of {', '.join(choices)}"
        raise ValueError(f"{path}.class={name!r} is not {wanted}")
    fields = _fields(choices[name], annotation)
    unknown, missing = values.keys() - fields, required(choices[name]) - values.keys()
    for problem, keys in (("unknown", unknown), ("missing", missing)):
        if keys:
            names = ", ".join(f"{path}.{key}" for key in sorted(keys))
            raise ValueError(f"{problem} configuration key {names}")
    decoded = {k: decode(v, fields[k], f"{path}.{k}", classes) for k, v in values.items()}
    try:
        return choices[name](**decoded)
    except FieldError as error:
        raise ValueError(f"{path}.{error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _choices(annotation: Any, classes: Classes) -> tuple[Classes, bool]:
    """The dataclasses that a value may be, and whether JSON has to say which."""
    if annotation is Any:
        return classes, True
    choices = dataclasses_in(annotation)
    return choices, len(choices) > 1


def _fields(cls: type, annotation: Any) -> dict[str, Any]:
    """Fields with their annotations; all that is below `Any` describes itself."""
    if annotation is Any:
        return {field.name: Any for field in dataclasses.fields(cls) if field.init}
    return hints(cls)


def _items(annotation: Any, length: int) -> list[Any] | None:
    return [Any] * length if annotation is Any else item_annotations(annotation, length)


def _dtype(name: Any, path: str) -> np.dtype:
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise ValueError(f"{path}={name!r} is not the name of a dtype") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON's types. TypeError names a field that JSON cannot hold faithfully."""
    return encode(config, type(config))


def from_dict(values: Mapping[str, Any], cls: type[T]) -> T:
    """The inverse of `to_dict`. ConfigError names an unknown or missing key or a wrong type."""
    try:
        return decode(values, cls)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def save(config: Any, path: str | os.PathLike) -> None:
    """Writes JSON that `load` reads back equal; the file appears whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n", "utf-8")
    os.replace(part, path)


def load(path: str | os.PathLike, cls: type[T]) -> T:
    """Reads what `save` wrote. ConfigError names the file and what in it does not fit `cls`."""
    try:
        return from_dict(json.loads(pathlib.Path(path).read_text("utf-8")), cls)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from error


def difference(old: Any, new: Any) -> list[str]:
    """Changes between two configurations: `["train.num_steps: 100 -> 200", ...]`.

    Each is a dataclass or its `to_dict`.
    """
    a, b = (flatten(to_dict(c) if dataclasses.is_dataclass(c) else c) for c in (old, new))
    return [
        f"{path}: {show(a.get(path, 'absent'))} -> {show(b.get(path, 'absent'))}"
        for path in a | b
        if path not in a or path not in b or a[path] != b[path]
    ]


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """The values of JSON's types by dotted path; lists are values unless they hold objects."""
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        node = {str(i): item for i, item in enumerate(node)}
    if not isinstance(node, dict):
        return {path: node}
    found = {}
    for key, child in node.items():
        found |= flatten(child, f"{path}.{key}" if path else key)
    return found
