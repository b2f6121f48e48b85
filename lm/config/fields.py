"""Values of configuration fields, read from text by their annotations.

Annotations: bool, int, float, str, None, Literal, Enum, tuples, dataclasses, and unions of these.
"""

import contextlib
import dataclasses
import enum
import re
import types
import typing
from typing import Any

_EXPECTED = {int: "an int", float: "a float", bool: "true or false", str: "a str"}
_EXAMPLES = {int: "8", float: "0.1", bool: "true", str: "text"}


def members(annotation: Any) -> tuple:
    """The alternatives of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def dataclasses_in(annotation: Any) -> dict[str, type]:
    """The dataclasses among an annotation's alternatives, by name."""
    return {member.__name__: member for member in members(annotation) if is_dataclass(member)}


def is_dataclass(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def hints(cls: type) -> dict[str, Any]:
    """A dataclass's fields, in order, with their annotations resolved."""
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls) if field.init}


def required(cls: type) -> set[str]:
    """A dataclass's fields without a default."""
    return {
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    }


def item_annotations(annotation: Any, length: int) -> list[Any] | None:
    """The annotation of each of `length` items, or None where it is not such a tuple."""
    for member in members(annotation):
        args = typing.get_args(member)
        if typing.get_origin(member) is tuple:
            if args[-1] is Ellipsis:
                return [args[0]] * length
            if len(args) == length:
                return list(args)
    return None


def parse(text: str, annotation: Any) -> Any:
    """Reads text by an annotation; ValueError says what was expected where it does not fit."""
    try:
        return _parse(text, annotation)
    except ValueError:
        raise ValueError(f"{text!r} is not {expected(annotation)}") from None


def _parse(text: str, annotation: Any) -> Any:
    alternatives = members(annotation)
    if len(alternatives) > 1:
        if types.NoneType in alternatives and text in ("None", "none", "null"):
            return None
        for member in sorted(alternatives, key=lambda member: member is str):  # str fits anything
            with contextlib.suppress(ValueError):
                return _parse(text, member)
    elif typing.get_origin(annotation) is typing.Literal:
        for choice in typing.get_args(annotation):
            if text in (str(choice), show(choice)):
                return choice
    elif is_enum(annotation):
        for member in annotation:
            if text in (member.name, str(member.value)):
                return member
    elif typing.get_origin(annotation) is tuple:
        texts = [item.strip() for item in text.strip("()[] ").removesuffix(",").split(",")]
        texts = [] if texts == [""] else texts
        items = item_annotations(annotation, len(texts))
        if items is not None:
            return tuple(_parse(item, each) for item, each in zip(texts, items, strict=True))
    elif annotation is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif annotation is int:
        if re.fullmatch(r"[+-]?\d+[eE]\+?\d+", text) and abs(float(text)) < 2**53:
            return int(float(text))
        return int(text)
    elif annotation in (float, str):
        return annotation(text)
    raise ValueError(text)


def show(value: Any) -> str:
    """A value as `parse` reads it."""
    if isinstance(value, tuple | list):
        return ",".join(map(show, value))
    if isinstance(value, enum.Enum):
        return value.name
    return str(value).lower() if isinstance(value, bool) else str(value)


def type_name(annotation: Any) -> str:
    """An annotation as in source code: `int | None`, `tuple[int, ...]`, `'a' | 'b'`."""
    if annotation is types.NoneType or annotation is None:
        return "None"
    if annotation is Ellipsis:
        return "..."
    if is_enum(annotation):
        return " | ".join(choice.name for choice in annotation)
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(repr, args))
    if len(members(annotation)) > 1:
        return " | ".join(map(type_name, args))
    name = getattr(annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(type_name, args))}]" if args else name


def expected(annotation: Any) -> str:
    """Describes the values of an annotation, for messages."""
    words = []
    for member in members(annotation):
        if typing.get_origin(member) is typing.Literal:
            words.append(f"one of {', '.join(map(str, typing.get_args(member)))}")
        elif is_enum(member):
            words.append(f"one of {', '.join(choice.name for choice in member)}")
        elif typing.get_origin(member) is tuple:
            words.append(f"a {type_name(member)} (values separated by commas)")
        elif member is types.NoneType:
            words.append("None")
        else:
            words.append(_EXPECTED.get(member, f"a {type_name(member)}"))
    return " or ".join(words)


def example(annotation: Any) -> str | None:
    """A text that `parse` accepts, or None if there is no simple one."""
    for member in members(annotation):
        if member in _EXAMPLES:
            return _EXAMPLES[member]
        if typing.get_origin(member) is typing.Literal:
            return str(typing.get_args(member)[0])
        if is_enum(member):
            return next(iter(member)).name
        if typing.get_origin(member) is tuple:
            items = [example(arg) for arg in typing.get_args(member) if arg is not Ellipsis]
            if None not in items:
                return ",".join(map(str, items))
    return None
