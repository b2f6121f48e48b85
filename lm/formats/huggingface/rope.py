"""Rotary parameters of Hugging Face's `config.json` (`rope_parameters`, `rope_scaling`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lm.formats.common import IGNORE_HINT
from lm.model import Rope, RopeScaling

OLD_NAMES = {"su": "longrope"}

# Keys of each rope type besides `rope_type`, `rope_theta` and `partial_rotary_factor`, and the
# fields of `RopeScaling` they are.
_FACTOR = {"factor": "factor"}
_LENGTH = {**_FACTOR, "original_max_position_embeddings": "original_length"}
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
KEYS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": _FACTOR,
    "llama3": {**_LENGTH, "low_freq_factor": "low_frequency", "high_freq_factor": "high_frequency"},
    "yarn": {**_LENGTH, **dict(zip(_YARN, _YARN, strict=True))},
    "longrope": {
        **_LENGTH,
        "attention_factor": "attention_factor",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
    },
}
# Of every type; the last two change nothing where the type does not read them.
_ANYWHERE = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
    *("finetuned", "original_max_position_embeddings"),
)
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The rope type these parameters are of."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return OLD_NAMES.get(kind, kind)


def read_rope(
    parameters: Mapping[str, Any],
    max_length: int,
    scalings: tuple[str, ...],
    partial: bool,
    scores: bool = False,
) -> Rope:
    """The rotary embedding these parameters say.

    Args:
      parameters: `rope_theta`, `rope_type` (or `type`), `partial_rotary_factor` and what the type
        asks for.
      max_length: `max_position_embeddings`, the original length where none is given.
      scalings: types the model may have besides "default".
      partial: whether the model may rotate a part of each head.
      scores: whether yarn's `mscale_all_dim` also scales the scores.

    Raises:
      ValueError: a type or key that is not supported, or one that is missing.
    """
    kind = rope_type(parameters)
    if kind != "default" and kind not in scalings:
        raise ValueError(
            f"config.json key 'rope_type' is {kind!r}; supported here are "
            f"{', '.join(('default', *scalings))}"
        )
    allowed = {*_ANYWHERE, *KEYS[kind]}
    for key, value in parameters.items():
        if key not in allowed and value:
            raise ValueError(
                f"config.json rope parameter {key!r}={value!r} is not supported with rope_type "
                f"{kind!r}; understood are {', '.join(sorted(allowed))}. {IGNORE_HINT}"
            )
    fraction = parameters.get("partial_rotary_factor")
    fraction = 1.0 if fraction is None else float(fraction)
    if fraction != 1.0 and not partial:
        raise ValueError(
            f"config.json key 'partial_rotary_factor' is {fraction}; this model type rotates whole "
            "heads, use 1.0"
        )
    theta = float(parameters["rope_theta"])
    return Rope(theta, fraction, _read_scaling(kind, parameters, max_length, scores))


def _read_scaling(
    kind: str, p: Mapping[str, Any], max_length: int, scores: bool
) -> RopeScaling | None:
    if kind == "default":
        return None
    missing = [key for key in REQUIRED[kind] if p.get(key) is None]
    if missing:
        raise ValueError(f"config.json rope parameters of type {kind!r} lack {', '.join(missing)}")
    found = {field: _value(p[key]) for key, field in KEYS[kind].items() if p.get(key) is not None}
    if kind != "linear":
        found["original_length"] = length = int(found.get("original_length", max_length))
        found.setdefault("factor", max_length / length)
    if kind == "yarn":
        # Zero stands for the default of these, as in transformers.
        weights = {key: found.pop(key, None) or None for key in ("mscale", "mscale_all_dim")}
        found = {key: x for key, x in found.items() if x or not key.startswith("beta")}
        found["truncate"] = bool(p.get("truncate", True))
        if scores:
            found |= weights
        elif "attention_factor" not in found and all(weights.values()):
            mscale, mscale_all = (_mscale(found["factor"], x or 0.0) for x in weights.values())
            found["attention_factor"] = mscale / mscale_all
    return RopeScaling(kind, **found)  # pyright: ignore[reportArgumentType]


def _value(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return tuple(map(float, x))
    return x if isinstance(x, bool) else float(x)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(rope: Rope, partial: bool) -> dict[str, Any]:
    """The inverse of `read_rope`; `partial` writes the rotated fraction too."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if partial:
        parameters["partial_rotary_factor"] = rope.fraction
    s = rope.scaling
    if s is None:
        return parameters
    values = {key: getattr(s, field) for key, field in KEYS[s.kind].items()}
    values = {key: [*x] if isinstance(x, tuple) else x for key, x in values.items()}
    return parameters | {"rope_type": s.kind} | {k: x for k, x in values.items() if x is not None}
