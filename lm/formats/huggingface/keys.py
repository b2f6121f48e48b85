"""Keys of `config.json`: defaults, activations, those passed over, and what optional ones mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lm.model import Layer, ModelConfig

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Key:
    """A key that only some model types have.

    Attributes:
      arguments: of `make_config`, which take its value.
      write: its value, from the model and its first layer.
      is_flag: its value is read as true or false.
    """

    arguments: tuple[str, ...]
    write: Callable[[ModelConfig, Layer], Any]
    is_flag: bool = False

    def read(self, value: Any) -> dict[str, Any]:
        """Arguments of `make_config`."""
        return dict.fromkeys(self.arguments, bool(value) if self.is_flag else value)


def _query_scalar(config: ModelConfig, layer: Layer) -> int:
    scale = layer.attention.scale
    return layer.attention.head_dim if scale is None else round(scale**-2)


KEYS: Mapping[str, Key] = {
    "num_key_value_heads": Key(("num_kv_heads",), lambda _, layer: layer.attention.num_kv_heads),
    "head_dim": Key(("head_dim",), lambda _, layer: layer.attention.head_dim),
    "attention_bias": Key(
        ("attention_bias", "attention_out_bias"), lambda _, layer: layer.attention.bias, True
    ),
    "mlp_bias": Key(("mlp_bias",), lambda _, layer: layer.feed_forward.bias, True),
    "use_parallel_residual": Key(("parallel",), lambda _, layer: layer.parallel, True),
    "query_pre_attn_scalar": Key(("query_scalar",), _query_scalar),
    "final_logit_softcapping": Key(("logit_softcap",), lambda config, _: config.logit_softcap),
    "attn_logit_softcapping": Key(("attention_softcap",), lambda _, layer: layer.attention.softcap),
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
assistant_confidence_threshold assistant_lookbehind bad_words_ids cache_config compile_config
constraints disable_compile dola_layers encoder_repetition_penalty epsilon_cutoff eta_cutoff
exponential_decay_length_penalty force_words_ids generation_config guidance_scale low_memory
max_cache_len max_matching_ngram_size max_time min_p num_assistant_tokens_schedule output_logits
output_scores output_router_logits penalty_alpha prefill_chunk_size renormalize_logits
sequence_bias stop_strings target_lookbehind token_healing watermarking_config
base_model_pp_plan base_model_tp_plan causal finetuning_task flash_attn gradient_checkpointing
ignore_index is_causal keys_to_ignore_at_inference language library_name license loss_type
max_sequence_length model_max_length model_name num_labels processor_class seq_length tags
use_bfloat16 use_flash_attention use_flash_attention_2 use_flash_attn use_liger_kernel
"""
METADATA = frozenset(_METADATA.split())
# Private names, special tokens, dropout; and factors that are one.
_NAMES = re.compile(
    r"_.*|.*_token(s|_ids?|_index)?|.*(dropout|_pdrop|dropout_(prob|rate))|unsloth_.*"
)
_FACTORS = re.compile(r".*(multiplier|scale|scaling|factor|ratio|_groups|_mod)")


def is_harmless(key: str, value: Any) -> bool:
    """Whether a key of `config.json` that nothing reads leaves what the model computes as it is."""
    is_one = not isinstance(value, bool) and value == 1
    return bool(key in METADATA or _NAMES.fullmatch(key) or (is_one and _FACTORS.fullmatch(key)))
