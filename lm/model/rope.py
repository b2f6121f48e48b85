"""Rotary position embedding (arXiv:2104.09864), half-rotated, and its stretchings."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from lm.model.config import Rope, RopeScaling


def rope_frequencies(rope: Rope, head_dim: int, max_length: int = 0) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, float64 [rotated / 2]; the factor of cos, sin.

    Args:
      rope: the rotary embedding.
      head_dim: size of what it rotates a fraction of.
      max_length: the model's, which longrope asks for.
    """
    rotated = int(head_dim * rope.fraction)
    frequencies = rope.theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    scaling = rope.scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.kind == "longrope":
        return _longrope(frequencies, scaling, max_length)
    return _yarn(frequencies, rope, rotated, scaling)


def _llama3(frequencies: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Slow pairs are stretched, fast ones kept, those between interpolated."""
    turns = s.original_length * frequencies / (2 * math.pi)
    smooth = (turns - s.low_frequency) / (s.high_frequency - s.low_frequency)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequencies / s.factor + smooth * frequencies


def _longrope(frequencies: np.ndarray, s: RopeScaling, max_length: int) -> tuple[np.ndarray, float]:
    """arXiv:2402.13753: factors that were searched for, pair by pair."""
    name = "long_factors" if max_length > s.original_length else "short_factors"
    factors = np.asarray(getattr(s, name), np.float64)
    if factors.shape != frequencies.shape:
        raise ValueError(
            f"longrope has {factors.size} {name}; a head rotates {frequencies.size} pairs, which "
            "need one each"
        )
    factor = s.attention_factor
    if factor is None:
        stretched = math.log(max(s.factor, 1.0)) / math.log(s.original_length)
        factor = math.sqrt(1 + stretched)
    return frequencies / factors, factor


def _yarn(
    frequencies: np.ndarray, rope: Rope, rotated: int, s: RopeScaling
) -> tuple[np.ndarray, float]:
    """arXiv:2309.00071, equations 17 to 23."""

    def pair(turns: float) -> float:
        return (
            rotated * math.log(s.original_length / (turns * 2 * math.pi)) / 2 / math.log(rope.theta)
        )

    low, high = pair(s.beta_fast), pair(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rotated // 2) - low) / (high - low), 0.0, 1.0)
    stretched = frequencies / s.factor * ramp + frequencies * (1 - ramp)
    factor = s.attention_factor
    if factor is None and s.mscale and s.mscale_all_dim:
        factor = _mscale(s, s.mscale) / _mscale(s, s.mscale_all_dim)
    return stretched, _mscale(s, 1.0) if factor is None else factor


def _mscale(s: RopeScaling, weight: float) -> float:
    return 0.1 * weight * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0


def score_factor(rope: Rope | None) -> float:
    """What the scores are multiplied by besides their scale; see `RopeScaling.mscale_all_dim`."""
    if rope is None or rope.scaling is None or not rope.scaling.mscale_all_dim:
        return 1.0
    return _mscale(rope.scaling, rope.scaling.mscale_all_dim) ** 2


def rope_table(
    positions: jax.Array, rope: Rope, head_dim: int, max_length: int = 0
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, rotated / 2], at integer positions [B, T]."""
    frequencies, factor = rope_frequencies(rope, head_dim, max_length)
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x [B, T, heads, head_dim]: pair i is dimensions i and i + rotated / 2."""
    cos, sin = (t[:, :, None, :] for t in table)
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = (x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
