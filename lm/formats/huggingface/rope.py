"""Rotary parameters of Hugging Face's `config.json` (`rope_parameters`, `rope_scaling`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lm.model import Rope, RopeScaling

OLD_NAMES = {"su": "longrope"}

# Keys of each rope type besides `rope_type`, `rope_theta` and `partial_rotary_factor`.
KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
}


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
    allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *KEYS[kind]}
    for key, value in parameters.items():
        if key not in allowed and value:
            raise ValueError(
                f"config.json rope parameter {key!r}={value!r} is not supported with rope_type "
                f"{kind!r}; understood are {', '.join(sorted(allowed))}"
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
    original = p.get("original_max_position_embeddings")
    original = max_length if original is None else int(original)
    factor = p.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = max_length / original
    missing = [key for key in REQUIRED[kind] if p.get(key) is None]
    if missing:
        raise ValueError(f"config.json rope parameters of type {kind!r} lack {', '.join(missing)}")
    factor = float(factor)  # pyright: ignore[reportArgumentType]
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        return RopeScaling("llama3", factor, original, low, high)
    attention_factor = p.get("attention_factor")
    if kind == "longrope":
        short, long = (tuple(map(float, p[key])) for key in ("short_factor", "long_factor"))
        return RopeScaling(
            "longrope",
            factor,
            original,
            attention_factor=None if attention_factor is None else float(attention_factor),
            short_factors=short,
            long_factors=long,
        )
    mscale, mscale_all = (float(p.get(key) or 0) for key in ("mscale", "mscale_all_dim"))
    if not scores and attention_factor is None and mscale and mscale_all:
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=float(p.get("beta_fast") or 32),
        beta_slow=float(p.get("beta_slow") or 1),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=bool(p.get("truncate", True)),
        mscale=mscale or None if scores else None,
        mscale_all_dim=mscale_all or None if scores else None,
    )


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
    parameters |= {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        parameters["original_max_position_embeddings"] = s.original_length
    if s.kind == "llama3":
        parameters |= {"low_freq_factor": s.low_frequency, "high_freq_factor": s.high_frequency}
    if s.kind == "longrope":
        parameters |= {"short_factor": [*s.short_factors], "long_factor": [*s.long_factors]}
    if s.attention_factor is not None:
        parameters["attention_factor"] = s.attention_factor
    if s.kind == "yarn":
        parameters |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
        weights = {"mscale": s.mscale, "mscale_all_dim": s.mscale_all_dim}
        parameters |= {key: weight for key, weight in weights.items() if weight is not None}
    return parameters
