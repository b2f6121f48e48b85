"""Values of configuration fields: read from text, and checked, by their annotations.

Annotations: bool, int, float, str, None, Literal, Enum, tuples, dataclasses, unions of these, and
any of them with a `Rule`, such as `Count`. Floats are finite in float32, in which they are used.
"""

import contextlib
import dataclasses
import enum
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

_EXPECTED = {int: "an int", float: "a finite float32", bool: "true or false", str: "a str"}
_EXAMPLES = {int: "8", float: "0.1", bool: "true", str: "text"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds of the values of a field annotated `Annotated[T, rule]`, beside their type.

    Attributes:
      holds: whether a value of that type is right.
      text: the values for messages, after the type's name: "above 0".
    """

    holds: Callable[[Any], bool]
    text: str


def within(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """The rule of numbers from `low` to `high`; `above` and `below` leave out the bound itself."""

    def holds(value: Any) -> bool:
        each = (value, _as_float32(value)) if isinstance(value, float) else (value,)
        return all(
            (low < x if above else low <= x) and (x < high if below else x <= high) for x in each
        )

    if high == math.inf:
        return Rule(holds, f"above {low}" if above else f"of at least {low}")
    return Rule(holds, f"in {'(' if above else '['}{low}, {high}{')' if below else ']'}")


Count = Annotated[int, within(1, 2**31 - 1)]  # of steps, rows, tokens; a size
Whole = Annotated[int, within(0, 2**31 - 1)]  # a count that may be 0
Several = Annotated[int, within(2, 2**31 - 1)]
Seed = Annotated[int, within(0, 2**32 - 1)]  # the bits of a seed that JAX's keys take in
Positive = Annotated[float, within(0, above=True)]
NonNegative = Annotated[float, within(0)]
Fraction = Annotated[float, within(0, 1)]
PositiveFraction = Annotated[float, within(0, 1, above=True)]
BelowOne = Annotated[float, within(0, 1, below=True)]  # a decay, or a share that leaves some
NOT_EMPTY = Rule(bool, "with at least one")  # of tuples


def _as_float32(value: Any) -> float:
    """The number as arrays hold it, on devices that take the smallest ones for 0."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return 0.0 if abs(single) < np.finfo(np.float32).tiny else float(single)


class FieldError(ValueError):
    """A field's value is not one that its annotation allows; the message begins with its name."""


class Checked:
    """Base of dataclasses whose fields hold what their annotations say, checked as they are made.

    Numbers, None and choices are checked, in tuples too; a class with a `__post_init__` of its own
    calls this one first.

    Raises:
      FieldError: a value is of another type, or out of range.
    """

    def __post_init__(self) -> None:
        for name, annotation in hints(type(self)).items():
            value = getattr(self, name)
            if not fits(value, annotation):
                raise FieldError(f"{name}={value!r:.80} is not {expected(annotation)}")


def members(annotation: Any) -> tuple:
    """The alternatives of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def base(annotation: Any) -> Any:
    """The annotation without its rules."""
    is_ruled = typing.get_origin(annotation) is Annotated
    return typing.get_args(annotation)[0] if is_ruled else annotation


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is one of the numbers, Nones, choices and tuples of them that are allowed.

    Of other types anything is.
    """
    return any(_fits(value, member) for member in members(annotation))


def _fits(value: Any, member: Any) -> bool:
    origin, args = typing.get_origin(member), typing.get_args(member)
    if origin is Annotated:
        return fits(value, args[0]) and all(rule.holds(value) for rule in args[1:])
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin is tuple and isinstance(value, tuple):
        items = item_annotations(member, len(value))
        return items is not None and all(map(fits, value, items))
    if member is types.NoneType:
        return value is None
    if member is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if member is float:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        with contextlib.suppress(OverflowError):  # of an int with more digits than a float has
            return is_number and math.isfinite(_as_float32(value))
        return False
    return True


def dataclasses_in(annotation: Any) -> dict[str, type]:
    """The dataclasses among an annotation's alternatives, by name."""
    return {member.__name__: member for member in members(annotation) if is_dataclass(member)}


def is_dataclass(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """A dataclass's fields, in order, with their annotations resolved. Not to be changed."""
    resolved = typing.get_type_hints(cls, include_extras=True)
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
    for member in map(base, members(annotation)):
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
        raise ValueError(f"{text!r:.80} is not {expected(annotation)}") from None


def _parse(text: str, annotation: Any) -> Any:
    alternatives = members(annotation)
    if len(alternatives) > 1:
        if types.NoneType in alternatives and text in ("None", "none", "null"):
            return None
        for member in sorted(alternatives, key=lambda member: member is str):  # str fits anything
            with contextlib.suppress(ValueError):
                return _parse(text, member)
    elif typing.get_origin(annotation) is Annotated:
        value = _parse(text, base(annotation))
        if fits(value, annotation):
            return value
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
    elif annotation is float:
        if fits(value := float(text), float):
            return value
    elif annotation is str:
        return text
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
    if typing.get_origin(annotation) is Annotated:
        return " ".join([type_name(args[0]), *(rule.text for rule in args[1:])])
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
        if typing.get_origin(member) is Annotated:
            kind, *rules = typing.get_args(member)
            words.append(" ".join([expected(kind), *(rule.text for rule in rules)]))
        elif typing.get_origin(member) is typing.Literal:
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
    for member in map(base, members(annotation)):
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
