"""Sweeps: edits of a configuration, combined, paired, or one after the other.

product(param("train.num_steps", 100, 200), param("optimizer.weight_decay", 0.0, 0.1))
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

from lm.config import command_line as config_lib
from lm.config import fields

Edits = dict[str, str]  # texts by dotted key, as on the command line
Sweep = tuple[Edits, ...]
MAX_NAME = 120


def param(key: str, *values: Any) -> Sweep:
    """One edit per value: `param("train.num_steps", 100, 200)`."""
    return tuple({key: value if isinstance(value, str) else fields.show(value)} for value in values)


def product(*sweeps: Sweep) -> Sweep:
    """Every combination; the last sweep varies fastest. ValueError: a key is in two of them."""
    return tuple(_join(parts) for parts in itertools.product(*sweeps))


def zipped(*sweeps: Sweep) -> Sweep:
    """The first of each together, then the second, ... ValueError: unequal lengths, equal keys."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        keys = ", ".join("/".join(sweep[0]) for sweep in sweeps if sweep)
        raise ValueError(f"cannot pair {keys}: they have {', '.join(map(str, lengths))} values")
    return tuple(_join(parts) for parts in zip(*sweeps, strict=True))


def chain(*sweeps: Sweep) -> Sweep:
    """One after the other."""
    return tuple(itertools.chain(*sweeps))


def _join(parts: Sequence[Edits]) -> Edits:
    joined: Edits = {}
    for edits in parts:
        if twice := joined.keys() & edits.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is swept twice at once")
        joined |= edits
    return joined


def parse(text: str) -> Sweep:
    """A sweep written as `a=1,2; b=3,4 & c=5,6 | d=7`. ValueError names what does not fit."""

    def values(part: str) -> Sweep:
        key, _, rest = (side.strip() for side in part.partition("="))
        if not key or not rest:
            raise ValueError(f"{part.strip()!r} in --sweep is not key=value,value")
        found = re.findall(r"\s*(\([^()]*\)|[^,]+)", rest)
        return param(key, *(value.strip() for value in found))

    def combinations(part: str) -> Sweep:
        return product(*(zipped(*map(values, each.split("&"))) for each in part.split(";")))

    return chain(*map(combinations, text.split("|")))


def named_runs(base: Any, sweep: Sweep) -> dict[str, tuple[Any, Edits]]:
    """(configuration, edits) of each run by its name, equal runs once. Errors as `override`."""
    runs: dict[str, tuple[Any, Edits]] = {}
    for edits in sweep:
        config = config_lib.override(base, edits)
        runs.setdefault(run_name(config, edits), (config, edits))
    return runs


def run_name(config: Any, edits: Edits) -> str:
    """A file name of the changed keys and their values as read, `optimizer.weight_decay=0.1`.

    The order of keys and how a value is written do not matter. Where a file name cannot hold it,
    or should not be so long, a hash keeps what is left of it one run's alone.
    """
    values = {key: fields.show(_get(config, key)) for key in sorted(edits)}
    whole = ",".join(f"{key}={value}" for key, value in values.items()) or "base"
    name = re.sub(r"[^\w.,=+-]+", "_", whole)
    if name == whole and len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _get(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, tuple) else getattr(value, part)
    return value
