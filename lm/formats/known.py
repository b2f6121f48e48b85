"""Published models, as rows of family, sizes and what differs from the family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.formats.families import make_config
from lm.model.config import ModelConfig, Norm, Rope, RopeScaling
from lm.model.traits import nearest

Row = tuple[str, dict[str, Any]]


_COLUMNS = (
    *("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads"),
    *("hidden_dim", "max_length"),
)


def _row(family: str, *sizes: int, **rest: Any) -> Row:
    return family, dict(zip(_COLUMNS, sizes, strict=True)) | rest


def _llama3_rope(factor: float) -> Rope:
    return Rope(500_000.0, scaling=RopeScaling("llama3", factor))


_L31 = {"rope": _llama3_rope(8.0)}
_L32 = {"rope": _llama3_rope(32.0), "tied": True}
_EPS5 = {"norm": Norm(eps=1e-5)}
_G3 = {"window": 1024, "rope": Rope(1e6, scaling=RopeScaling("linear", 8.0))}
_TIED = {"tied": True}

# Sizes in the order of `_COLUMNS`.
KNOWN: Mapping[str, Row] = {
    "llama2_7b": _row("llama2", 32000, 4096, 32, 32, 32, 11008, 4096),
    "llama2_13b": _row("llama2", 32000, 5120, 40, 40, 40, 13824, 4096),
    "llama2_70b": _row("llama2", 32000, 8192, 80, 64, 8, 28672, 4096),
    "llama3_8b": _row("llama3", 128256, 4096, 32, 32, 8, 14336, 8192),
    "llama3_70b": _row("llama3", 128256, 8192, 80, 64, 8, 28672, 8192),
    "llama3_1_8b": _row("llama3", 128256, 4096, 32, 32, 8, 14336, 131072, **_L31),
    "llama3_1_70b": _row("llama3", 128256, 8192, 80, 64, 8, 28672, 131072, **_L31),
    "llama3_405b": _row("llama3", 128256, 16384, 126, 128, 8, 53248, 131072, **_L31),
    "llama3_2_1b": _row("llama3", 128256, 2048, 16, 32, 8, 8192, 131072, **_L32),
    "llama3_2_3b": _row("llama3", 128256, 3072, 28, 24, 8, 8192, 131072, **_L32),
    "mistral_7b": _row("mistral", 32000, 4096, 32, 32, 8, 14336, 32768),
    "mistral_7b_v0_3": _row(
        "mistral", 32768, 4096, 32, 32, 8, 14336, 32768, window=None, rope=Rope(1e6)
    ),
    "qwen2_5_0_5b": _row("qwen2", 151936, 896, 24, 14, 2, 4864, 32768, **_TIED),
    "qwen2_5_1_5b": _row("qwen2", 151936, 1536, 28, 12, 2, 8960, 131072, **_TIED),
    "qwen2_5_3b": _row("qwen2", 151936, 2048, 36, 16, 2, 11008, 32768, **_TIED),
    "qwen2_5_7b": _row("qwen2", 152064, 3584, 28, 28, 4, 18944, 131072),
    "qwen2_5_14b": _row("qwen2", 152064, 5120, 48, 40, 8, 13824, 131072, **_EPS5),
    "qwen2_5_32b": _row("qwen2", 152064, 5120, 64, 40, 8, 27648, 131072, **_EPS5),
    "qwen2_5_72b": _row("qwen2", 152064, 8192, 80, 64, 8, 29568, 131072, **_EPS5),
    "qwen3_0_6b": _row("qwen3", 151936, 1024, 28, 16, 8, 3072, 40960, **_TIED),
    "qwen3_1_7b": _row("qwen3", 151936, 2048, 28, 16, 8, 6144, 40960, **_TIED),
    "qwen3_4b": _row("qwen3", 151936, 2560, 36, 32, 8, 9728, 40960, **_TIED),
    "qwen3_8b": _row("qwen3", 151936, 4096, 36, 32, 8, 12288, 40960),
    "qwen3_14b": _row("qwen3", 151936, 5120, 40, 40, 8, 17408, 40960),
    "qwen3_32b": _row("qwen3", 151936, 5120, 64, 64, 8, 25600, 40960),
    "gemma2_2b": _row("gemma2", 256000, 2304, 26, 8, 4, 9216, 8192),
    "gemma2_9b": _row("gemma2", 256000, 3584, 42, 16, 8, 14336, 8192),
    "gemma2_27b": _row(
        "gemma2", 256000, 4608, 46, 32, 16, 36864, 8192, head_dim=128, query_scalar=144
    ),
    "gemma3_270m": _row("gemma3", 262144, 640, 18, 4, 1, 2048, 32768, window=512),
    "gemma3_1b": _row("gemma3", 262144, 1152, 26, 4, 1, 6912, 32768, window=512),
    "gemma3_4b": _row("gemma3", 262208, 2560, 34, 8, 4, 10240, 131072, **_G3),
    "gemma3_12b": _row("gemma3", 262208, 3840, 48, 16, 8, 15360, 131072, **_G3),
    "gemma3_27b": _row(
        "gemma3", 262208, 5376, 62, 32, 16, 21504, 131072, head_dim=128, query_scalar=168, **_G3
    ),
    "smollm2_135m": _row("smollm2", 49152, 576, 30, 9, 3, 1536, 8192),
    "smollm2_360m": _row("smollm2", 49152, 960, 32, 15, 5, 2560, 8192),
    "smollm2_1_7b": _row("smollm2", 49152, 2048, 24, 32, 32, 8192, 8192, rope=Rope(130_000.0)),
    "olmo2_1b": _row("olmo2", 100352, 2048, 16, 16, 16, 8192, 4096),
    "olmo2_7b": _row("olmo2", 100352, 4096, 32, 32, 32, 11008, 4096),
    "olmo2_13b": _row("olmo2", 100352, 5120, 40, 40, 40, 13824, 4096),
    "olmo2_32b": _row("olmo2", 100352, 5120, 64, 40, 8, 27648, 4096),
    "phi3_mini": _row("phi3", 32064, 3072, 32, 32, 32, 8192, 4096, window=2047),
    "phi3_medium": _row("phi3", 32064, 5120, 40, 40, 10, 17920, 4096, window=2047),
    "phi4": _row("phi3", 100352, 5120, 40, 40, 10, 17920, 16384, rope=Rope(250_000.0)),
    "pythia_70m": _row("gpt_neox", 50304, 512, 6, 8, 8, 2048, 2048),
    "pythia_160m": _row("gpt_neox", 50304, 768, 12, 12, 12, 3072, 2048),
    "pythia_410m": _row("gpt_neox", 50304, 1024, 24, 16, 16, 4096, 2048),
    "pythia_1b": _row("gpt_neox", 50304, 2048, 16, 8, 8, 8192, 2048),
    "pythia_1_4b": _row("gpt_neox", 50304, 2048, 24, 16, 16, 8192, 2048),
    "pythia_2_8b": _row("gpt_neox", 50304, 2560, 32, 32, 32, 10240, 2048),
    "pythia_6_9b": _row("gpt_neox", 50432, 4096, 32, 32, 32, 16384, 2048),
    "pythia_12b": _row("gpt_neox", 50688, 5120, 36, 40, 40, 20480, 2048),
    "neox_20b": _row("gpt_neox", 50432, 6144, 44, 64, 64, 24576, 2048, activation="gelu_tanh"),
}


def known_model(name: str, **changes: Any) -> ModelConfig:
    """The configuration of a published model.

    Args:
      name: a key of `KNOWN`.
      **changes: arguments of `make_config` to use instead of the row's.

    Raises:
      ValueError: there is no such model.
    """
    if name not in KNOWN:
        raise ValueError(f"model {name!r} is unknown; {nearest(name, list(KNOWN))}")
    family, arguments = KNOWN[name]
    return make_config(family, **(arguments | changes))
