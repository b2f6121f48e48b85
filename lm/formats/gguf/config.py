"""Metadata of a GGUF file to `ModelConfig`.

Keys and defaults as in llama.cpp (docs/gguf.md of ggml, src/llama-model.cpp).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from lm.files import FormatError
from lm.formats.common import IGNORE_HINT
from lm.formats.families import FAMILIES, make_config
from lm.formats.family import GGUF, Family
from lm.model import ModelConfig, Rope, RopeScaling
from lm.model.rope import rope_frequencies
from lm.model.traits import Kind, nearest

ARCHITECTURES: Mapping[str, Family] = {
    architecture: family
    for family in FAMILIES.values()
    if family.gguf and family is FAMILIES[family.name]
    for architecture in family.gguf.architectures
}


class Keys:
    """The metadata of a file, read by keys without their architecture."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata, self.source = metadata, source
        arch: Any = metadata.get("general.architecture")
        if arch not in ARCHITECTURES:
            raise FormatError(
                f"{source}: general.architecture is {arch!r}, which is not supported; "
                f"{nearest(str(arch), list(ARCHITECTURES))}"
            )
        self.arch, self.family = str(arch), ARCHITECTURES[str(arch)]
        assert self.family.gguf is not None
        self.gguf: GGUF = self.family.gguf
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture."""
        self.used.add(key)
        return self.metadata.get(f"{self.arch}.{key}", default)

    def unread(self, prefix: str) -> list[str]:
        """Keys of the architecture that begin so, say something, and were never asked for."""
        start = f"{self.arch}.{prefix}"
        keys = [key.removeprefix(f"{self.arch}.") for key in self.metadata if key.startswith(start)]
        return [key for key in keys if key not in self.used and self.says(key)]

    def says(self, key: str) -> bool:
        """Whether the value of a key is there, and neither false, zero nor empty."""
        value = self.metadata.get(f"{self.arch}.{key}")
        return bool(value.any() if isinstance(value, np.ndarray) else value)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "missing" if value is None else f"{value!r}"
            raise FormatError(
                f"{self.source}: {self.arch}.{key} is {found}; it has to be one positive integer"
            )
        return value

    def number(self, key: str, default: float | None) -> float | None:
        """A float as it was written: files hold the nearest float32 to 1e-5, say."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise FormatError(f"{self.source}: {self.arch}.{key} is {value!r}, not a number")
        return float(str(np.float32(value)))


def from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    *,
    rope_factors: Callable[[str], np.ndarray] | None = None,
    source: str = "GGUF metadata",
    ignore: Collection[str] = (),
) -> ModelConfig:
    """The `ModelConfig` of a GGUF file.

    Args:
      metadata: every key of the file.
      tensors: shapes by name, row-major: biases and a tied output are known by them.
      rope_factors: gives the tensor of that name, where there is `rope_freqs.weight`.
      source: of the metadata, for errors.
      ignore: keys to pass over, with or without the architecture, because they do not change what
        the model computes.

    Raises:
      FormatError: an architecture or a feature of it that is not supported, or a key that is
        missing or has a wrong value.
      ValueError: sizes do not fit each other.
    """
    if (kind := metadata.get("general.type", "model")) != "model":
        raise FormatError(f"{source}: general.type is {kind!r}; only whole models are read")
    keys = Keys(metadata, source)
    gguf, traits = keys.gguf, keys.family.traits
    num_layers = keys.size("block_count")
    if num_layers > len(tensors):
        raise FormatError(
            f"{source}: {keys.arch}.block_count is {num_layers}, and the file has {len(tensors)} "
            "tensors"
        )
    num_heads = keys.size("attention.head_count")
    embed_dim = keys.size("embedding_length")
    head_dim = keys.get("attention.key_length", embed_dim // num_heads)
    window = keys.get("attention.sliding_window") or None
    eps = keys.number(gguf.eps_key, None)
    if eps is None:
        raise FormatError(f"{source}: {keys.arch}.{gguf.eps_key} is missing")
    changes: dict[str, Any] = {
        "norm": dataclasses.replace(traits.norm, eps=eps),
        "head_dim": head_dim,
        "window": window,
        "tied": "output.weight" not in tensors,
        "rope": _read_rope(keys, head_dim, tensors, rope_factors),
    }
    if traits.local_rope is not None:
        theta = traits.local_rope.theta
        changes["local_rope"] = Rope(
            keys.number("rope.freq_base_swa", theta) or theta,
            keys.size("rope.dimension_count_swa", head_dim) / head_dim,
        )
    if gguf.has_biases:
        changes |= {
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "attention_out_bias": "blk.0.attn_output.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        }
    for key, (trait, default) in gguf.keys.items():
        flag = isinstance(default, bool)
        changes[trait] = bool(keys.get(key, default)) if flag else keys.number(key, default)
    if num_layers == gguf.wide_layers:
        changes["query_scalar"] = embed_dim // num_heads
    _check_supported(keys, tensors, ignore)
    return make_config(
        keys.family.name,
        # Key `vocab_size` is not in every file, and counts padding in some.
        vocab_size=(tensors.get("token_embd.weight") or (keys.size("vocab_size"),))[0],
        embed_dim=embed_dim,
        hidden_dim=keys.size("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.size("attention.head_count_kv", num_heads),
        max_length=keys.size("context_length"),
        kinds=_read_kinds(keys, num_layers, window),
        **changes,
    )


# Keys that change what is computed in a way that is not read for any architecture.
_UNSUPPORTED = """
attention.alibi_bias_max attention.clamp_kqv attention.kv_lora_rank attention.max_alibi_bias
attention.output_scale attention.scale attention.temperature_scale attn_logit_softcapping
embedding_scale expert_count final_logit_softcapping logit_scale residual_scale
"""


def _check_supported(keys: Keys, tensors: Collection[str], ignore: Collection[str]) -> None:
    """Raises FormatError where something is left, the rest being read, that may change the model.

    What the rotary embedding is computed from is known: no key of it is passed over.
    """
    found = [*filter(keys.says, _UNSUPPORTED.split()), *keys.unread("rope.")]
    found = [key for key in found if key not in keys.used]
    if keys.get("attention.causal") is False:
        found.append("attention.causal")
    if keys.get("attention.value_length") not in (None, keys.get("attention.key_length")):
        found.append("attention.value_length")
    passed = {key.removeprefix(f"{keys.arch}.") for key in ignore}
    faults = [f"{keys.arch}.{key}={keys.get(key)}" for key in found if key not in passed]
    if "rope_factors_long.weight" in tensors:
        faults.append("rope_factors_long.weight (LongRoPE)")
    if faults:
        raise FormatError(
            f"{keys.source} has {', '.join(faults)}, which is not supported. {IGNORE_HINT}"
        )


def _read_kinds(keys: Keys, num_layers: int, window: int | None) -> list[Kind]:
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        local = [bool(x) for x in pattern]
        if len(local) != num_layers:
            raise FormatError(
                f"{keys.source}: {keys.arch}.attention.sliding_window_pattern has {len(local)} "
                f"values for {num_layers} layers"
            )
    elif period := pattern or keys.gguf.period:
        local = [(i + 1) % int(period) != 0 for i in range(num_layers)]
    else:
        local = [window is not None] * num_layers
    return ["local" if is_local else "global" for is_local in local]


def _read_rope(
    keys: Keys,
    head_dim: int,
    tensors: Collection[str],
    rope_factors: Callable[[str], np.ndarray] | None,
) -> Rope:
    theta = keys.number("rope.freq_base", 10_000.0)
    assert theta is not None
    rope = Rope(theta, keys.size("rope.dimension_count", head_dim) / head_dim)
    scaling = _read_scaling(keys)
    if "rope_freqs.weight" in tensors and rope_factors is not None:
        if scaling is not None:
            raise FormatError(
                f"{keys.source} has rope_freqs.weight and {keys.arch}.rope.scaling.type="
                f"{scaling.kind!r}; supported is one of them"
            )
        return _llama3(keys, rope, head_dim, rope_factors("rope_freqs.weight"))
    return dataclasses.replace(rope, scaling=scaling)


def _read_scaling(keys: Keys) -> RopeScaling | None:
    """The stretching that the keys say, as llama.cpp computes it."""
    keys.get("rope.scaling.finetuned")  # says how the model was trained
    kind = keys.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise FormatError(
            f"{keys.source}: {keys.arch}.rope.scaling.type is {kind!r}; supported are 'none', "
            "'linear' and 'yarn'"
        )
    old_factor = keys.number("rope.scale_linear", 1.0)
    factor = keys.number("rope.scaling.factor", old_factor) or 1.0
    original = keys.get("rope.scaling.original_context_length")
    betas = [keys.number(f"rope.scaling.yarn_beta_{x}", None) for x in ("fast", "slow")]
    # Both multiply cos and sin, besides yarn's own factor.
    names = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    more = math.prod(keys.number(name, 1.0) or 1.0 for name in names)
    mixed = keys.number("rope.scaling.yarn_ext_factor", -1.0)
    if mixed not in ((-1.0, 1.0) if kind == "yarn" else (-1.0, 0.0)):
        raise FormatError(
            f"{keys.source}: {keys.arch}.rope.scaling.yarn_ext_factor is {mixed} with "
            f"rope.scaling.type {kind!r}; supported is 1 with 'yarn', and 0 without"
        )
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            original or keys.size("context_length"),
            beta_fast=betas[0] or 32.0,
            beta_slow=betas[1] or 1.0,
            attention_factor=None if more == 1 else more * (1 + 0.1 * math.log(max(factor, 1.0))),
        )
    if more != 1:
        raise FormatError(
            f"{keys.source}: {' x '.join(names)} is {more:g} with rope.scaling.type {kind!r}; "
            "supported with 'yarn' alone"
        )
    stretched = factor != 1.0 and (kind == "linear" or keys.get("rope.scale_linear"))
    return RopeScaling("linear", factor) if stretched else None


def _llama3(keys: Keys, rope: Rope, head_dim: int, factors: np.ndarray) -> Rope:
    """The scaling whose divisors of the frequencies are `factors`, one per pair of dimensions.

    Converters write the divisors of Llama 3.1's rule, not the rule; its bounds are 1 and 4 turns
    in 8,192 positions in every model published.
    """
    plain, _ = rope_frequencies(rope, head_dim)
    scaling = RopeScaling("llama3", 1.0)
    found = None
    if factors.shape == plain.shape:
        # The slowest pair turns least, and is stretched most: by all of the factor, or by a share.
        turns = scaling.original_length * plain[-1] / (2 * np.pi)
        kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        kept = min(max(kept, 0.0), 1.0)
        share = 1 / float(factors[-1]) - kept
        factor = float(np.float32((1 - kept) / share)) if share > 0 and kept < 1 else 1.0
        scaling = dataclasses.replace(scaling, factor=float(f"{factor:.5g}"))
        found = Rope(rope.theta, rope.fraction, scaling)
        stretched, _ = rope_frequencies(found, head_dim)
        if not np.allclose(plain / stretched, factors, rtol=1e-4):
            found = None
    if found is None:
        raise FormatError(
            f"{keys.source}: rope_freqs.weight {list(factors.shape)} stretches the rotary "
            f"frequencies by up to {factors.max():g} in a way that is not Llama 3's, which is not "
            "supported"
        )
    return found
