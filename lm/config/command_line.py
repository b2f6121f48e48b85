"""Configuration by frozen dataclasses, chosen and edited on the command line.

    CONFIGS = {"quicktest": quicktest, "small": small}  # functions, or a module of them

    def main(config: Config, workdir: pathlib.Path) -> None: ...

    if __name__ == "__main__":
        program.run(main, configs=CONFIGS, workdir=True)

`--config=small` calls `small()`, `--config=small:8` calls `small(8)`, with the argument read by its
annotation. `--config.train.num_steps=1_000` (or `--config.train.num_steps 1_000`) replaces one
field, at any depth, read by the field's annotation: int (`1_000`, `1e6`), float, bool (`true`,
`false`), str, None if Optional, Literal, Enum (by name or value), tuples (`1,2,3`), and members
of tuples by index (`--config.model.stacks.0.num_repeats=2`). Naming a key of a
group that is None creates it from its defaults; the class of a group that may be of several is
chosen by its name (`--config.optimizer=Lion --config.optimizer.b1=0.9`). All edits of one
dataclass are one `dataclasses.replace`, so its `__post_init__` sees them together. `--help` lists
configurations and keys.
"""

import contextlib
import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags

from lm.config import fields
from lm.config.codec import ConfigError

T = TypeVar("T")
Configs = Mapping[str, Callable[..., Any]] | types.ModuleType


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Turns a ValueError or OSError of the block, where input is checked, into a ConfigError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def parse(argv: Sequence[str], configs: Configs, default: str | None = None) -> tuple[Any, list]:
    """The configuration that argv asks for, and argv without its `--config` flags."""
    name, edits, rest = _split(argv)
    name = name if name is not None else default
    if name is None:
        names = ", ".join(_functions(configs))
        raise ConfigError(f"no configuration chosen; give --config=NAME, one of {names}")
    return override(choose(configs, name), edits), rest


def rest_of(argv: Sequence[str]) -> list[str]:
    """argv without its `--config` flags."""
    return _split(argv)[2]


def config_arguments(argv: Sequence[str]) -> list[str]:
    """The `--config` flags of argv, each as one word."""
    name, edits, _ = _split(argv)
    own = [] if name is None else [f"--config={name}"]
    return own + [f"--config.{key}={text}" for key, text in edits.items()]


def choose(configs: Configs, spec: str) -> Any:
    """Calls the function that `name[:argument]` names."""
    name, colon, argument = spec.partition(":")
    functions = _functions(configs)
    if name not in functions:
        raise ConfigError(
            f"unknown configuration --config={name}; {_did_you_mean(_nearest(name, functions))}"
            f"the choices are {', '.join(functions)}"
        )
    parameters = list(inspect.signature(functions[name]).parameters.values())
    if colon and not parameters:
        raise ConfigError(f"--config={spec}: {name} takes no argument; use --config={name}")
    if not colon and parameters and parameters[0].default is inspect.Parameter.empty:
        needed = f"--config={name}:{parameters[0].name.upper()}"
        raise ConfigError(f"--config={name} needs an argument: {needed}")
    try:
        if not colon:
            return functions[name]()
        known = typing.get_type_hints(functions[name], include_extras=True)
        return functions[name](fields.parse(argument, known.get(parameters[0].name, str)))
    except ValueError as error:
        raise ConfigError(f"--config={spec}: {error}") from error


def override(config: T, edits: Mapping[str, str]) -> T:
    """A copy of `config` with each `{"train.num_steps": "100"}` read by its field's annotation."""
    paths = {tuple(key.split(".")): text for key, text in edits.items()}
    return _edit(config, type(config), paths, "config", config) if paths else config


def _split(argv: Sequence[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """argv as (configuration name, edits by key, everything else)."""
    name, edits, rest = None, {}, []
    tokens = iter(argv)
    for token in tokens:
        if token == "--":
            rest += [token, *tokens]
            break
        match = re.fullmatch(r"--?config(?:\.([^=]*))?(?:=(.*))?", token, re.DOTALL)
        if match is None:
            rest.append(token)
            continue
        key, value = match.groups()
        if value is None:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise ConfigError(f"{token} needs a value: {token}=VALUE")
        if key is None:
            name = value
        else:
            edits[key] = value
    return name, edits, rest


def _edit(value: Any, annotation: Any, edits: dict[tuple, str], path: str, root: Any) -> Any:
    """`value` with the edits below it; `edits` maps the keys that remain to texts."""
    chosen = fields.dataclasses_in(annotation).get(edits.get((), ""))
    if chosen is not None:  # the group's class by name, and then its keys
        value = _from_defaults(chosen, path)
        edits = {keys: text for keys, text in edits.items() if keys}
    if () in edits:
        if len(edits) > 1:
            raise ConfigError(f"--{path}={edits[()]} conflicts with the flags that set its keys")
        return _parse_field(edits[()], annotation, path, value)
    if value is None:
        value = _from_defaults(annotation, path)
    groups: dict[str, dict[tuple, str]] = {}
    for (head, *tail), text in edits.items():
        groups.setdefault(head, {})[tuple(tail)] = text
    children = _children(value, annotation)
    changes = {}
    for head, below in groups.items():
        if head not in children:
            raise ConfigError(_unknown_key(head, list(children), path, value, root))
        old, each = children[head]
        changes[head] = _edit(old, each, below, f"{path}.{head}", root)
    if isinstance(value, tuple):
        return tuple(changes.get(str(i), old) for i, old in enumerate(value))
    try:
        return dataclasses.replace(value, **changes)
    except fields.FieldError as error:
        raise ConfigError(f"{path}.{error}") from error
    except (ValueError, TypeError) as error:
        changed = ", ".join(f"{path}.{key}" for key in changes)
        raise ConfigError(f"{error} (on setting {changed})") from error


def _children(value: Any, annotation: Any) -> dict[str, tuple[Any, Any]]:
    """The fields of a dataclass or the items of a tuple, each with its annotation."""
    if dataclasses.is_dataclass(value):
        return {k: (getattr(value, k), each) for k, each in fields.hints(type(value)).items()}
    if isinstance(value, tuple):
        items = fields.item_annotations(annotation, len(value)) or list(map(type, value))
        return {str(i): pair for i, pair in enumerate(zip(value, items, strict=True))}
    return {}


def _from_defaults(annotation: Any, path: str) -> Any:
    classes = list(fields.dataclasses_in(annotation).values())
    if len(classes) != 1:
        raise ConfigError(f"{path} is None here, so it has no keys to set")
    try:
        return classes[0]()
    except TypeError as error:
        raise ConfigError(f"{path} has no defaults: {error}") from None


def _parse_field(text: str, annotation: Any, path: str, old: Any) -> Any:
    try:
        return fields.parse(text, annotation)
    except ValueError as error:
        keys = list(_children(old, annotation))
        if dataclasses.is_dataclass(old) or (keys and fields.example(annotation) is None):
            raise ConfigError(
                f"{path} is a group of keys; set each by itself, as --{path}.{keys[0]}=VALUE "
                f"(keys: {', '.join(keys)})"
            ) from None
        example = fields.example(annotation) if old is None else fields.show(old)
        hint = f"; for example --{path}={example}" if example is not None else ""
        raise ConfigError(f"{path}: {error}{hint}") from None


def _unknown_key(head: str, keys: list[str], path: str, value: Any, root: Any) -> str:
    if not keys:
        return f"{path} is {fields.show(value)!r}, which has no key {head!r}"
    if isinstance(value, tuple):
        return f"{path} has no index {head!r}; it has {len(keys)}, from 0 to {len(keys) - 1}"
    # The same name in another group is a likelier slip than a similar name in this one.
    elsewhere = [key for key in _leaves(root, type(root), "") if key.split(".")[-1] == head]
    nearest = _nearest(head, keys)
    close = f"config.{elsewhere[0]}" if elsewhere else nearest and f"{path}.{nearest}"
    return (
        f"unknown configuration key {path}.{head}; {_did_you_mean(close)}"
        f"the keys of {path} are {', '.join(keys)}"
    )


def _nearest(word: str, words: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.5)), None)


def _did_you_mean(word: str | None) -> str:
    return f"did you mean {word}? " if word else ""


def _functions(configs: Configs) -> Mapping[str, Callable[..., Any]]:
    if isinstance(configs, Mapping):
        return configs
    functions = inspect.getmembers(configs, inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if function.__module__ == configs.__name__ and not name.startswith("_")
    }


def help_text(argv: Sequence[str], configs: Configs) -> str:
    """The running program's configurations, keys and flags, by its `--help` or `--helpfull`."""
    functions = _functions(configs)
    name = _split(argv)[0] or next(iter(functions))
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Configurations:"]
    for key, function in functions.items():
        arguments = "".join(f"[:{each}]" for each in inspect.signature(function).parameters)
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        lines.append(f"  --config={key + arguments:<24} {summary}".rstrip())
    lines += ["", f"Keys, with their values in --config={name}:"]
    try:
        leaves = _leaves(choose(configs, name), None, "")
    except ConfigError as error:
        leaves = {}
        lines.append(f"  {error}")
    flag_of = {key: f"--config.{key}={fields.show(value)}" for key, (value, _) in leaves.items()}
    width = max(map(len, flag_of.values()), default=0)
    for key, (_, annotation) in leaves.items():
        lines.append(f"  {flag_of[key]:<{width}}  {fields.type_name(annotation)}")
    every = "--helpfull" in argv
    known = flags.FLAGS.get_help() if every else flags.FLAGS.main_module_help()
    return "\n".join([*lines, "", "Flags:", known])


def _leaves(value: Any, annotation: Any, path: str) -> dict[str, tuple[Any, Any]]:
    """Every settable key below `value`, with its value and annotation."""
    scalars = isinstance(value, tuple) and not any(map(dataclasses.is_dataclass, value))
    children = _children(value, annotation)
    if not children or scalars:
        return {path: (value, annotation)}
    found = {}
    for key, (child, each) in children.items():
        found |= _leaves(child, each, f"{path}.{key}" if path else key)
    return found
