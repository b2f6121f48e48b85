"""The model families, one record each, and `make_config`, which makes a `ModelConfig` from one.

A new family is one more `Family` in `FAMILIES`: traits say what it computes, the Hugging Face and
GGUF parts how others write it. Tensor names are transformers'; sizes of the GGUF architectures are
llama.cpp's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lm.formats.family import GGUF, Entry, Family, HuggingFace
from lm.formats.huggingface.transforms import (
    Concatenated,
    Interleaved,
    Rotated,
    Transpose,
    Vocabulary,
)
from lm.model.config import Latent, ModelConfig, Norm, Rope, make_stacks
from lm.model.traits import Kind, Traits, make_layer, nearest

# -- Tensors that several families share. ---------------------------------------------------------


def _norm(name: str, ours: str) -> tuple[Entry, ...]:
    return (Entry(f"{name}.weight", (f"{ours}/scale",)), Entry(f"{name}.bias", (f"{ours}/bias",)))


def _linear(name: str, ours: str) -> tuple[Entry, ...]:
    return (Entry(f"{name}.weight", (ours,), Transpose()), Entry(f"{name}.bias", (f"{ours}_bias",)))


_L, _A, _X = "model.layers.{i}.", "model.layers.{i}.self_attn.", "gpt_neox.layers.{i}."
_QKV = ("attention/query", "attention/key", "attention/value")
_OUTSIDE = (
    Entry("model.embed_tokens.weight", ("embed",), Vocabulary()),
    *_norm("model.norm", "norm"),
    Entry("lm_head.weight", ("output",), Vocabulary(transposed=True)),
)
_OUT = _linear(_A + "o_proj", "attention/out")
_GATE_UP = (
    *_linear(_L + "mlp.gate_proj", "feed_forward/gate"),
    *_linear(_L + "mlp.up_proj", "feed_forward/up"),
)
_DOWN = _linear(_L + "mlp.down_proj", "feed_forward/down")
_BLOCKS = (
    *_linear(_A + "q_proj", "attention/query"),
    *_linear(_A + "k_proj", "attention/key"),
    *_linear(_A + "v_proj", "attention/value"),
    *_OUT,
    *_GATE_UP,
    *_DOWN,
    Entry(_A + "q_norm.weight", ("attention/query_norm",)),
    Entry(_A + "k_norm.weight", ("attention/key_norm",)),
)
_FUSED_BLOCKS = (
    Entry(_A + "qkv_proj.weight", _QKV, Concatenated()),
    *_OUT,
    Entry(_L + "mlp.gate_up_proj.weight", ("feed_forward/gate", "feed_forward/up"), Concatenated()),
    *_DOWN,
)
_LATENT_BLOCKS = (
    Entry(_A + "q_proj.weight", ("attention/query",), Rotated()),
    *_linear(_A + "q_a_proj", "attention/query_down"),
    Entry(_A + "q_a_layernorm.weight", ("attention/query_norm",)),
    Entry(_A + "q_b_proj.weight", ("attention/query_up",), Rotated()),
    Entry(_A + "kv_a_proj_with_mqa.weight", ("attention/key_value_down",), Rotated(shared=True)),
    Entry(_A + "kv_a_proj_with_mqa.bias", ("attention/key_value_down_bias",), Rotated(shared=True)),
    Entry(_A + "kv_a_layernorm.weight", ("attention/key_value_norm",)),
    Entry(_A + "kv_b_proj.weight", ("attention/key_value_up",), Transpose()),
    *_OUT,
    *_GATE_UP,
    *_DOWN,
)
_NEOX = (
    Entry("gpt_neox.embed_in.weight", ("embed",), Vocabulary()),
    *_norm("gpt_neox.final_layer_norm", "norm"),
    Entry("embed_out.weight", ("output",), Vocabulary(transposed=True), ("lm_head.weight",)),
    *_norm(_X + "input_layernorm", "attention_norm"),
    *_norm(_X + "post_attention_layernorm", "feed_forward_norm"),
    Entry(_X + "attention.query_key_value.weight", _QKV, Interleaved()),
    Entry(_X + "attention.query_key_value.bias", tuple(f"{x}_bias" for x in _QKV), Interleaved()),
    *_linear(_X + "attention.dense", "attention/out"),
    *_linear(_X + "mlp.dense_h_to_4h", "feed_forward/up"),
    *_linear(_X + "mlp.dense_4h_to_h", "feed_forward/down"),
)
# Norms before the blocks, and after them (OLMo 2) or both (Gemma), where one name means another.
_PRE = (
    *_OUTSIDE,
    *_norm(_L + "input_layernorm", "attention_norm"),
    *_norm(_L + "post_attention_layernorm", "feed_forward_norm"),
)
_POST = (
    *_OUTSIDE,
    *_norm(_L + "input_layernorm", "attention_norm"),
    *_norm(_L + "pre_feedforward_layernorm", "feed_forward_norm"),
    *_norm(_L + "post_attention_layernorm", "attention_post_norm"),
    *_norm(_L + "post_feedforward_layernorm", "feed_forward_post_norm"),
)

# -- The families. --------------------------------------------------------------------------------


def _sizes(*sizes: int) -> dict[str, int]:
    """What transformers assumes: configurations of text models in larger ones leave it out."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return dict(zip((*names, "num_attention_heads"), sizes, strict=True))


_HEADS = ("num_key_value_heads", "head_dim")
_BIASED = (*_HEADS, "attention_bias")
_SOFT_CAPPED = (*_BIASED, "query_pre_attn_scalar", "final_logit_softcapping")
_EPS6 = Norm(eps=1e-6)

_LLAMA = Family(
    "llama",
    Traits(),
    HuggingFace(
        "llama",
        "LlamaForCausalLM",
        _PRE + _BLOCKS,
        _sizes(32000, 4096, 11008, 32, 32),
        keys=(*_BIASED, "mlp_bias"),
    ),
    GGUF(("llama", "mistral"), has_biases=True, interleaved=True),
)
_MISTRAL = Family(
    "mistral",
    Traits(pattern=("local",), window=4096),
    HuggingFace(
        "mistral",
        "MistralForCausalLM",
        _PRE + _BLOCKS,
        _sizes(32000, 4096, 14336, 32, 32)
        | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        window="all",
    ),
)
_QWEN_DEFAULTS = _sizes(151936, 4096, 22016, 32, 32) | {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN2 = Family(
    "qwen2",
    Traits(norm=_EPS6, attention_bias=True, rope=Rope(theta=1e6)),
    HuggingFace("qwen2", "Qwen2ForCausalLM", _PRE + _BLOCKS, _QWEN_DEFAULTS, window="flag"),
    GGUF(("qwen2",)),
)
_QWEN3 = Family(
    "qwen3",
    Traits(norm=_EPS6, qk_norm="head", head_dim=128, rope=Rope(theta=1e6)),
    HuggingFace(
        "qwen3",
        "Qwen3ForCausalLM",
        _PRE + _BLOCKS,
        {**_QWEN_DEFAULTS, "head_dim": 128},
        keys=_BIASED,
        window="flag",
    ),
    GGUF(("qwen3",)),
)
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA2 = Family(
    "gemma2",
    Traits(
        norm=Norm(eps=1e-6, plus_one=True),
        placement="both",
        activation="gelu_tanh",
        head_dim=256,
        pattern=("local", "global"),
        window=4096,
        attention_softcap=50.0,
        logit_softcap=30.0,
        tied=True,
        scale_embed=True,
    ),
    HuggingFace(
        "gemma2",
        "Gemma2ForCausalLM",
        _POST + _BLOCKS,
        {
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        keys=(*_SOFT_CAPPED, "attn_logit_softcapping"),
        activation_key="hidden_activation",
        window="pattern",
        other_keys=("hidden_act",),
    ),
    GGUF(
        ("gemma2",),
        period=2,
        keys={
            "final_logit_softcapping": ("logit_softcap", 30.0),
            "attn_logit_softcapping": ("attention_softcap", 50.0),
        },
        wide_layers=46,
    ),
)
_GEMMA3 = Family(
    "gemma3",
    dataclasses.replace(
        _GEMMA2.traits,
        attention_softcap=None,
        logit_softcap=None,
        qk_norm="head",
        rope=Rope(theta=1e6),
        local_rope=Rope(theta=10_000.0),
        pattern=("local",) * 5 + ("global",),
    ),
    dataclasses.replace(
        _GEMMA2.huggingface,
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        defaults=_GEMMA_DEFAULTS
        | _sizes(262208, 2304, 9216, 26, 8)
        | {"max_position_embeddings": 131072},
        keys=_SOFT_CAPPED,
        period_keys=("sliding_window_pattern", "_sliding_window_pattern"),
        other_keys=(),
    ),
    GGUF(
        ("gemma3",),
        period=6,
        keys={"final_logit_softcapping": ("logit_softcap", None)},
        wide_layers=62,
    ),
)
_OLMO2 = Family(
    "olmo2",
    Traits(norm=_EPS6, placement="post", qk_norm="full", rope=Rope(theta=500_000.0)),
    HuggingFace("olmo2", "Olmo2ForCausalLM", _POST + _BLOCKS, {"rms_norm_eps": 1e-5}, keys=_BIASED),
    GGUF(("olmo2",)),
)
_PHI3 = Family(
    "phi3",
    Traits(pattern=("local",)),
    HuggingFace(
        "phi3",
        "Phi3ForCausalLM",
        _PRE + _FUSED_BLOCKS,
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        window="all",
        rope_keys=("rope_theta", "partial_rotary_factor"),
        scalings=("longrope",),
        other_keys=("original_max_position_embeddings",),
    ),
    GGUF(("phi3",), fused=True, fused_gate=True),
)
_GPT_NEOX = Family(
    "gpt_neox",
    Traits(
        norm=Norm("layer", bias=True),
        parallel=True,
        activation="gelu",
        gated=False,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        rope=Rope(fraction=0.25),
    ),
    HuggingFace(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _NEOX,
        {
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "rotary_pct": 0.25,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
        keys=("attention_bias", "use_parallel_residual"),
        eps_key="layer_norm_eps",
        rope_keys=("rotary_emb_base", "rotary_pct"),
        ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    ),
    GGUF(
        ("gptneox",),
        "attention.layer_norm_epsilon",
        keys={"use_parallel_residual": ("parallel", True)},
        fused=True,
    ),
)
# Keys of mixtures, which a model of dense layers does not have, and of multi-token prediction.
_MIXTURE = """
aux_loss_alpha ep_size head_dim moe_intermediate_size moe_layer_freq n_group n_shared_experts
norm_topk_prob num_experts_per_tok num_mtp_layers num_nextn_predict_layers output_router_logits
qk_head_dim router_aux_loss_coef routed_scaling_factor scoring_func seq_aux topk_group topk_method
"""
_DEEPSEEK_V2 = Family(  # dense layers only
    "deepseek_v2",
    Traits(norm=_EPS6, latent=Latent(512, 128, 64, 128, 1536)),
    HuggingFace(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        _PRE + _LATENT_BLOCKS,
        {
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "rope_interleave": True,
            "n_routed_experts": 64,
            "first_k_dense_replace": 0,
        },
        keys=("num_key_value_heads", "attention_bias", "mlp_bias"),
        other_keys=tuple(_MIXTURE.split()),
    ),
)
_DEEPSEEK_V3 = Family(
    "deepseek_v3",
    _DEEPSEEK_V2.traits,
    dataclasses.replace(
        _DEEPSEEK_V2.huggingface,
        model_type="deepseek_v3",
        class_name="DeepseekV3ForCausalLM",
        defaults={
            **_DEEPSEEK_V2.huggingface.defaults,
            "n_routed_experts": 256,
            "first_k_dense_replace": 3,
            "max_position_embeddings": 4096,
        },
        keys=("num_key_value_heads", "attention_bias"),
    ),
)

FAMILIES: Mapping[str, Family] = {
    **{
        family.name: family
        for family in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA2, _GEMMA3, _OLMO2, _PHI3)
        + (_GPT_NEOX, _DEEPSEEK_V2, _DEEPSEEK_V3)
    },
    "llama2": _LLAMA,
    "llama3": _LLAMA.variant(rope=Rope(theta=500_000.0)),
    "smollm2": _LLAMA.variant(rope=Rope(theta=100_000.0), tied=True),
}


def family_of(config: ModelConfig) -> Family:
    """The family a configuration names.

    Raises:
      ValueError: it is not in `FAMILIES`.
    """
    if config.family not in FAMILIES:
        names = list(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise ValueError(f"family {config.family!r} has no format; {nearest(config.family, names)}")
    return FAMILIES[config.family]


def make_config(
    family: str,
    *,
    vocab_size: int,
    embed_dim: int,
    hidden_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    max_length: int = 2048,
    vocab_multiple: int = 128,
    kinds: Sequence[Kind] | None = None,
    **traits: Any,
) -> ModelConfig:
    """A model of a family.

    Args:
      family: a key of `FAMILIES`.
      vocab_size, embed_dim, num_layers, max_length, vocab_multiple: see `ModelConfig`.
      hidden_dim: inner size of the feed-forward.
      num_heads, num_kv_heads: query heads; key and value heads, None for as many.
      kinds: "local" or "global" for every layer, instead of the family's pattern.
      **traits: fields of `Traits` that differ from the family's.

    Raises:
      ValueError: an unknown family or trait, or sizes that do not fit each other.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown; {nearest(family, list(FAMILIES))}")
    names = [field.name for field in dataclasses.fields(Traits)]
    if unknown := traits.keys() - names:
        name = min(unknown)
        raise ValueError(f"{name!r} is not a trait of a family; {nearest(name, names)}")
    t = dataclasses.replace(FAMILIES[family].traits, **traits)
    if kinds is None:
        kinds = [t.pattern[i % len(t.pattern)] for i in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {"local", "global"}:
        raise ValueError(
            f"kinds={list(kinds)} has to be 'local' or 'global' for each of {num_layers} layers"
        )
    sizes = embed_dim, hidden_dim, num_heads, num_heads if num_kv_heads is None else num_kv_heads
    layer_of = {kind: make_layer(t, kind, *sizes) for kind in dict.fromkeys(kinds)}
    return ModelConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        stacks=make_stacks(tuple(layer_of[kind] for kind in kinds)),
        norm=t.norm,
        tied=t.tied,
        embed_scale=embed_dim**0.5 if t.scale_embed else None,
        logit_softcap=t.logit_softcap,
        vocab_multiple=vocab_multiple,
        max_length=max_length,
        family=FAMILIES[family].name,
    )
