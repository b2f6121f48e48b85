"""Tiny models of `transformers`, one a case, with every parameter away from its initial value.

Shapes are odd on purpose: a vocabulary that is not a multiple of 128, grouped-query ratio 3, heads
that are not width / heads, windows shorter than a row, patterns that leave a remainder.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

BASE = {
    "vocab_size": 139,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,  # an embedding's padding row would get no gradient
}
GQA = BASE | {"num_key_value_heads": 2}


def rope(kind: str, theta: float = 10_000.0, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **rest}}


LLAMA3_FACTORS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = rope("llama3", original_max_position_embeddings=64, **LLAMA3_FACTORS)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
# The ramp begins at pair 5 of 8; with the usual beta_fast it would at pair 1.
YARN_MSCALE = {"max_position_embeddings": 2048} | rope(
    "yarn", 100.0, factor=4.0, original_max_position_embeddings=512, mscale=0.7,
    mscale_all_dim=0.4, beta_fast=4.0, beta_slow=0.5,
)  # fmt: skip
# As DeepSeek's, in whose files both weights are the same.
YARN_DEEPSEEK = rope(
    "yarn", factor=40.0, original_max_position_embeddings=8, mscale=0.707, mscale_all_dim=0.707
)
# Five different sizes, no one the width / heads.
LATENT = {
    "kv_lora_rank": 20, "q_lora_rank": 22, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
    "v_head_dim": 14, "first_k_dense_replace": 3, "rms_norm_eps": 0.03,
}  # fmt: skip
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GQA | {"head_dim": 12, "attention_bias": True, "mlp_bias": True}
        | {"rms_norm_eps": 0.03}),
    "llama3": (
        "llama",
        BASE | {"num_key_value_heads": 1, "tie_word_embeddings": True}
        | {"max_position_embeddings": 512} | LLAMA3,
    ),
    "llama_linear": ("llama", GQA | {"num_hidden_layers": 2} | rope("linear", factor=2.5)),
    "smollm2": (
        "llama",
        GQA | {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"tie_word_embeddings": True} | rope("default", 100_000.0),
    ),
    "mistral": ("mistral", GQA | {"sliding_window": 5, "head_dim": 10}),
    "qwen2": (
        "qwen2",
        GQA | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 4}
        | {"max_window_layers": 2} | YARN,
    ),
    "qwen3": (
        "qwen3",
        GQA | {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True} | YARN_MSCALE,
    ),
    "gemma2": (
        "gemma2",
        GQA | {"num_hidden_layers": 5, "head_dim": 12, "query_pre_attn_scalar": 20}
        | {"rms_norm_eps": 0.03}
        | {"sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        BASE | {"num_hidden_layers": 8, "num_attention_heads": 3, "num_key_value_heads": 1}
        | {"head_dim": 20, "query_pre_attn_scalar": 31, "sliding_window": 4}
        | {"sliding_window_pattern": 3, "final_logit_softcapping": 2.0} | GEMMA3_ROPE,
    ),
    "olmo2": ("olmo2", GQA | {"rms_norm_eps": 0.03}),
    "phi3": (
        "phi3",
        GQA | {"sliding_window": 6} | rope("default", partial_rotary_factor=0.5),
    ),
    "gpt_neox": (
        "gpt_neox",
        BASE | {"num_attention_heads": 3, "rotary_pct": 0.25, "layer_norm_eps": 0.03},
    ),
    "deepseek_v2": ("deepseek_v2", BASE | LATENT | {"attention_bias": True, "mlp_bias": True}),
    "deepseek_v2_plain_queries": (
        "deepseek_v2", BASE | LATENT | {"q_lora_rank": None} | YARN_DEEPSEEK,
    ),
    "deepseek_v3": (
        "deepseek_v3",
        BASE | LATENT | {"num_key_value_heads": 6, "tie_word_embeddings": True} | YARN_MSCALE,
    ),
    "gpt_neox_sequential": (
        "gpt_neox",
        BASE | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast"}
        | {"tie_word_embeddings": True, "num_hidden_layers": 2}
        | rope("linear", factor=2.0, partial_rotary_factor=0.5),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A model of transformers on the CPU in float32, and its `config.json`."""

    model: Any
    json: dict[str, Any]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] of ids [B, T], without gradients."""
        torch = pytest.importorskip("torch")
        with torch.no_grad():
            tokens = torch.from_numpy(ids).long()
            return self.model(input_ids=tokens, use_cache=False).logits.numpy()

    def arrays(self, gradient: bool = False) -> dict[str, np.ndarray]:
        """Parameters, or their gradients, by the names of its files."""
        return {
            name.replace("lm_head", "embed_out") if "neox" in self.json["model_type"] else name: (
                parameter.grad if gradient else parameter
            )
            .detach()
            .numpy()
            for name, parameter in self.model.named_parameters()
        }


@functools.cache
def make_oracle(case: str) -> Oracle:
    """The model of a case, with noise in every parameter; logits come out of order one."""
    model_type, arguments = CASES[case]
    return build_oracle(model_type, arguments, len(case))


def build_oracle(model_type: str, arguments: dict[str, Any], seed: int = 0) -> Oracle:
    """A model of a configuration, as `make_oracle`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)  # matrices this small only wait for other threads
    # A configuration edits the dictionaries it is given.
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(arguments))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    tied = config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.3 * noise
            elif "embed" in name and not tied:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return Oracle(model, config.to_dict())
