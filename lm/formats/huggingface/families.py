"""How each family of Hugging Face's transformers writes its configuration, as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Format:
    """How one `model_type` writes its configuration.

    Attributes:
      model_type: value of that key.
      class_name: of the causal language model in transformers, written under `architectures`.
      defaults: what transformers assumes where a key is absent.
      activation_key, eps_key: their names.
      bias: it has the key `attention_bias`, which speaks of all four projections.
      window: which layers see `sliding_window`: none, all, those of `layer_types` or from
        `max_window_layers` on if `use_sliding_window` ("flag"), or those of `layer_types` or an
        alternating pattern ("pattern").
      rope_keys: names of the rotary base and fraction outside `rope_parameters`; where the
        fraction's is None, a fraction other than 1 is refused.
      scalings: rope types it may have.
      latent: keys and values come from a latent, whose sizes it has; yarn's `mscale_all_dim` also
        scales the scores; layers from `first_k_dense_replace` on are mixtures of experts.
      own_keys: keys that only this format has and that do not change what is computed.
    """

    model_type: str
    class_name: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation_key: str = "hidden_act"
    eps_key: str = "rms_norm_eps"
    bias: bool = False
    window: Literal["all", "flag", "pattern"] | None = None
    rope_keys: tuple[str, str | None] = ("rope_theta", None)
    scalings: tuple[str, ...] = ("linear", "llama3", "yarn")
    latent: bool = False
    own_keys: tuple[str, ...] = ()


_GEMMA_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

# Of mixtures, which a model of dense layers does not have, and of multi-token prediction.
_MIXTURE = """
aux_loss_alpha ep_size head_dim moe_intermediate_size moe_layer_freq n_group n_shared_experts
norm_topk_prob num_experts_per_tok num_mtp_layers num_nextn_predict_layers output_router_logits
qk_head_dim router_aux_loss_coef routed_scaling_factor scoring_func seq_aux topk_group topk_method
"""
_MIXTURE_KEYS = tuple(_MIXTURE.split())
_LATENT_DEFAULTS: Mapping[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
}

FORMATS: Mapping[str, Format] = {
    "llama": Format("llama", "LlamaForCausalLM", bias=True),
    "mistral": Format(
        "mistral",
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        window="all",
    ),
    "qwen2": Format(
        "qwen2",
        "Qwen2ForCausalLM",
        {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
        window="flag",
    ),
    "qwen3": Format(
        "qwen3",
        "Qwen3ForCausalLM",
        {
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        bias=True,
        window="flag",
    ),
    "gemma2": Format(
        "gemma2",
        "Gemma2ForCausalLM",
        {
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        activation_key="hidden_activation",
        bias=True,
        window="pattern",
        own_keys=("hidden_act",),
    ),
    "gemma3": Format(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_GEMMA_DEFAULTS, "max_position_embeddings": 131072},
        activation_key="hidden_activation",
        bias=True,
        window="pattern",
    ),
    "olmo2": Format("olmo2", "Olmo2ForCausalLM", {"rms_norm_eps": 1e-5}, bias=True),
    "phi3": Format(
        "phi3",
        "Phi3ForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        window="all",
        rope_keys=("rope_theta", "partial_rotary_factor"),
        scalings=("longrope",),
        own_keys=("original_max_position_embeddings",),
    ),
    "deepseek_v2": Format(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {**_LATENT_DEFAULTS, "n_routed_experts": 64, "first_k_dense_replace": 0},
        bias=True,
        latent=True,
        own_keys=_MIXTURE_KEYS,
    ),
    "deepseek_v3": Format(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **_LATENT_DEFAULTS,
            "n_routed_experts": 256,
            "first_k_dense_replace": 3,
            "max_position_embeddings": 4096,
        },
        bias=True,
        latent=True,
        own_keys=_MIXTURE_KEYS,
    ),
    "gpt_neox": Format(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "rotary_pct": 0.25,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
        eps_key="layer_norm_eps",
        bias=True,
        rope_keys=("rotary_emb_base", "rotary_pct"),
    ),
}

DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}

# Keys that do not change what the model computes: names, dtypes, special tokens, dropout of
# training, initialization, generation, and what transformers keeps in every configuration.
_METADATA = """
_attn_implementation _attn_implementation_autoset _name_or_path architectures
attn_implementation auto_map bos_token_id cache_implementation chunk_size_feed_forward
decoder_start_token_id dtype eos_token_id id2label initializer_range is_decoder is_llama_config
label2id model_type name_or_path output_attentions output_hidden_states pad_token_id
pretraining_tp problem_type return_dict task_specific_params tf_legacy_loss tokenizer_class
torch_dtype transformers.js_config transformers_version unk_token_id unsloth_fixed
unsloth_version use_cache attention_dropout attention_probs_dropout_prob classifier_dropout
embd_pdrop hidden_dropout hidden_dropout_prob resid_pdrop diversity_penalty do_sample
early_stopping encoder_no_repeat_ngram_size length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values
repetition_penalty return_dict_in_generate temperature top_k top_p typical_p
"""
METADATA = frozenset(_METADATA.split())
