"""Metadata of a GGUF file to `ModelConfig`.

Keys and defaults as in llama.cpp (docs/gguf.md of ggml, src/llama-model.cpp).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from lm.checkpoints.store import CheckpointError
from lm.model import ModelConfig, Rope, RopeScaling
from lm.model.families import FAMILIES, make_config, nearest
from lm.model.rope import rope_frequencies

Kinds = list[Literal["local", "global"]]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` says what the model is.

    Attributes:
      family: of ours.
      eps_key: of the norms.
      period: every so manieth layer is global, the others see a window; 0 where the file has no
        pattern: with a window all layers see it.
      traits: of `Family`, where the files of this architecture mean something else.
    """

    family: str
    eps_key: str = "attention.layer_norm_rms_epsilon"
    period: int = 0
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama"),
    "mistral": Architecture("llama"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", period=2),
    "gemma3": Architecture("gemma3", period=6),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3"),
    "gptneox": Architecture("gpt_neox", "attention.layer_norm_epsilon"),
}
# Gemma's largest models divide the scores by the width of a head of the residual stream.
_WIDE_SCALE = {"gemma2": 46, "gemma3": 62}


class Keys:
    """The metadata of a file, read by keys without their architecture."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata, self.source = metadata, source
        arch: Any = metadata.get("general.architecture")
        if arch not in ARCHITECTURES:
            raise CheckpointError(
                f"{source}: general.architecture is {arch!r}, which is not supported; "
                f"{nearest(str(arch), list(ARCHITECTURES))}"
            )
        self.arch = str(arch)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture."""
        return self.metadata.get(f"{self.arch}.{key}", default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "missing" if value is None else f"{value!r}"
            raise CheckpointError(
                f"{self.source}: {self.arch}.{key} is {found}; it has to be one positive integer"
            )
        return value

    def number(self, key: str, default: float | None) -> float | None:
        """A float as it was written: files hold the nearest float32 to 1e-5, say."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self.source}: {self.arch}.{key} is {value!r}, no number")
        return float(str(np.float32(value)))


def from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    *,
    rope_factors: Callable[[str], np.ndarray] | None = None,
    vocab_multiple: int = 128,
    source: str = "GGUF metadata",
) -> ModelConfig:
    """The `ModelConfig` of a GGUF file.

    Args:
      metadata: every key of the file.
      tensors: shapes by name, row-major: biases and a tied output are known by them.
      rope_factors: gives the tensor of that name, where there is `rope_freqs.weight`.
      vocab_multiple: see `ModelConfig`.
      source: of the metadata, for errors.

    Raises:
      CheckpointError: an architecture or a feature of it that is not supported, or a key that is
        missing or has a wrong value.
      ValueError: sizes do not fit each other.
    """
    keys = Keys(metadata, source)
    arch = ARCHITECTURES[keys.arch]
    _check_supported(keys, tensors)
    family = FAMILIES[arch.family]
    num_layers = keys.size("block_count")
    if num_layers > len(tensors):
        raise CheckpointError(
            f"{source}: {keys.arch}.block_count is {num_layers}, and the file has {len(tensors)} "
            "tensors"
        )
    num_heads = keys.size("attention.head_count")
    embed_dim = keys.size("embedding_length")
    head_dim = keys.get("attention.key_length", embed_dim // num_heads)
    window = keys.get("attention.sliding_window") or None
    eps = keys.number(arch.eps_key, None)
    if eps is None:
        raise CheckpointError(f"{source}: {keys.arch}.{arch.eps_key} is missing")
    traits: dict[str, Any] = {
        **arch.traits,
        "norm": dataclasses.replace(family.norm, eps=eps),
        "head_dim": head_dim,
        "window": window,
        "tied": "output.weight" not in tensors,
        "rope": _read_rope(keys, head_dim, tensors, rope_factors),
    }
    if family.local_rope is not None:
        traits["local_rope"] = Rope(keys.number("rope.freq_base_swa", 10_000.0) or 10_000.0)
    traits |= _read_biases(arch.family, tensors)
    if arch.family in ("gemma2", "gemma3"):
        softcap = 30.0 if arch.family == "gemma2" else None
        traits["logit_softcap"] = keys.number("final_logit_softcapping", softcap)
        if num_layers == _WIDE_SCALE[arch.family]:
            traits["query_scalar"] = embed_dim // num_heads
    if arch.family == "gemma2":
        traits["attention_softcap"] = keys.number("attn_logit_softcapping", 50.0)
    if arch.family == "gpt_neox":
        traits["parallel"] = bool(keys.get("use_parallel_residual", True))
    return make_config(
        arch.family,
        vocab_size=_vocab_size(keys, tensors),
        embed_dim=embed_dim,
        hidden_dim=keys.size("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.size("attention.head_count_kv", num_heads),
        max_length=keys.size("context_length"),
        vocab_multiple=vocab_multiple,
        kinds=_read_kinds(keys, arch, num_layers, window),
        **traits,
    )


def _check_supported(keys: Keys, tensors: Collection[str]) -> None:
    faults = []
    for key in ("expert_count", "attention.kv_lora_rank", "logit_scale", "residual_scale"):
        if keys.get(key):
            faults.append(f"{keys.arch}.{key}={keys.get(key)}")
    if keys.get("attention.value_length", None) not in (None, keys.get("attention.key_length")):
        faults.append(f"{keys.arch}.attention.value_length={keys.get('attention.value_length')}")
    if "rope_factors_long.weight" in tensors:
        faults.append("rope_factors_long.weight (LongRoPE)")
    if keys.metadata.get("general.type", "model") != "model":
        faults.append(f"general.type={keys.metadata['general.type']!r}")
    if faults:
        raise CheckpointError(f"{keys.source} has {', '.join(faults)}, which is not supported")


def _vocab_size(keys: Keys, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the embedding: `vocab_size` is not in every file, and counts padding in some."""
    shape = tensors.get("token_embd.weight")
    return shape[0] if shape else keys.size("vocab_size")


def _read_biases(family: str, tensors: Collection[str]) -> dict[str, bool]:
    """Which projections have biases; what a family always has is checked with the tensors."""
    if family != "llama":
        return {}
    return {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _read_kinds(keys: Keys, arch: Architecture, num_layers: int, window: int | None) -> Kinds:
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        local = [bool(x) for x in pattern]
        if len(local) != num_layers:
            raise CheckpointError(
                f"{keys.source}: {keys.arch}.attention.sliding_window_pattern has {len(local)} "
                f"values for {num_layers} layers"
            )
    elif period := pattern or arch.period:
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
    rotated = keys.size("rope.dimension_count", head_dim)
    rope = Rope(theta, rotated / head_dim)
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    length = keys.get("rope.scaling.original_context_length", 0)
    if "rope_freqs.weight" in tensors and rope_factors is not None:
        return _llama3(keys, rope, head_dim, rope_factors("rope_freqs.weight"))
    if kind == "yarn":
        scaling = RopeScaling(
            "yarn",
            factor,
            length or keys.size("context_length"),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0) or 32.0,
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0) or 1.0,
        )
        return dataclasses.replace(rope, scaling=scaling)
    if kind == "linear" or (kind == "none" and factor != 1.0 and keys.get("rope.scale_linear")):
        return rope if factor == 1.0 else Rope(theta, rope.fraction, RopeScaling("linear", factor))
    if kind != "none":
        raise CheckpointError(
            f"{keys.source}: {keys.arch}.rope.scaling.type is {kind!r}; supported are 'none', "
            "'linear' and 'yarn'"
        )
    return rope


def _llama3(keys: Keys, rope: Rope, head_dim: int, factors: np.ndarray) -> Rope:
    """The scaling whose divisors of the frequencies are `factors`, one a pair of dimensions.

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
        raise CheckpointError(
            f"{keys.source}: rope_freqs.weight {list(factors.shape)} stretches the rotary "
            f"frequencies by up to {factors.max():g} in a way that is not Llama 3's, which is not "
            "supported"
        )
    return found
