"""`config.json` in both styles, against published files, against transformers, and its errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lm.formats import from_huggingface, to_huggingface
from lm.formats.families import make_config
from lm.formats.known import KNOWN, known_model
from lm.model import Rope, RopeScaling, Stack, make_stacks, num_params
from lm.model.rope import rope_frequencies

# What the published repositories hold, less tokens and dtypes.
PUBLISHED = {
    "llama3_1_8b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "mistral_7b": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2_5_0_5b": {
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma3_1b": {
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "gemma2_2b": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "phi3_mini": {
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "neox_20b": {
        "hidden_act": "gelu_fast",
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50432,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_is_the_known_model(name):
    assert from_huggingface(PUBLISHED[name]) == known_model(name)


@pytest.mark.parametrize("name", KNOWN)
def test_there_and_back(name):
    config = known_model(name)
    data = to_huggingface(config, {"eos_token_id": 7})
    assert data["eos_token_id"] == 7
    assert from_huggingface(data) == config
    new_style = {k: v for k, v in data.items() if not k.startswith(("rope_scaling", "rope_theta"))}
    assert from_huggingface(new_style) == config
    old_style = {k: v for k, v in data.items() if k != "rope_parameters"}
    assert from_huggingface(old_style) == config


@pytest.mark.oracle
@pytest.mark.parametrize("name", KNOWN)
def test_transformers_reads_the_same_model(name):
    """What transformers makes of our file, and what it writes itself, is the model we meant."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(known_model(name, num_layers=7))
    theirs = transformers.AutoConfig.for_model(**to_huggingface(config))
    assert from_huggingface(theirs.to_dict()) == config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    assert type(model).__name__ == to_huggingface(config)["architectures"][0]
    assert sum(p.numel() for p in model.parameters()) == num_params(config)


LLAMA = PUBLISHED["llama3_1_8b"]
GEMMA3 = PUBLISHED["gemma3_1b"]
QWEN2 = PUBLISHED["qwen2_5_0_5b"]
BAD = {
    "model type": ({"model_type": "mamba"}, "model_type 'mamba'.*gemma3_text.*llama"),
    "experts": (LLAMA | {"num_local_experts": 8}, "'num_local_experts'=8.*understood are.*ignore"),
    "quantized": (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
    "window": (LLAMA | {"sliding_window": 9}, "'sliding_window'=9"),
    "activation": (LLAMA | {"hidden_act": "relu2"}, "'hidden_act' is 'relu2'; supported are silu"),
    "longrope": (
        LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        "'rope_type' is 'longrope'; supported here are default, linear, llama3, yarn",
    ),
    "dynamic": (
        LLAMA | {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "'rope_type' is 'dynamic'",
    ),
    "rope parameter": (
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "finetuned": True}},
        "'finetuned'=True.*understood are factor",
    ),
    "no factor": (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "lack factor"),
    "partial rotary": (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    "phi3 yarn": (
        PUBLISHED["phi3_mini"] | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "'yarn'; supported here are default",
    ),
    "no size": ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "'hidden_size' is None"),
    "string": (LLAMA | {"vocab_size": "32000"}, "'vocab_size' is '32000'.*positive integer"),
    "heads": (LLAMA | {"num_key_value_heads": 5}, "num_kv_heads=5 does not divide num_heads=32"),
    "layer types": (GEMMA3 | {"layer_types": ["chunked_attention"] * 26}, "'layer_types'"),
    "too few types": (GEMMA3 | {"layer_types": ["full_attention"]}, "num_hidden_layers=26"),
    "types without window": (
        QWEN2 | {"layer_types": ["sliding_attention"] * 24},
        "no 'sliding_window' in use",
    ),
    "bidirectional": (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional"),
    "attention cap": (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    data, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        from_huggingface(data)


def test_ignore_passes_over_a_key():
    data = LLAMA | {"a_new_remark": "x"}
    with pytest.raises(ValueError, match="a_new_remark"):
        from_huggingface(data)
    assert from_huggingface(data, ignore=["a_new_remark"]) == known_model("llama3_1_8b")


def test_yarn_factor_of_attention():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    plain = from_huggingface(LLAMA | {"rope_scaling": scaling})
    assert plain.layers[0].attention.rope == Rope(500_000.0, scaling=RopeScaling("yarn", 4.0, 4096))
    mscale = from_huggingface(
        LLAMA | {"rope_scaling": scaling | {"mscale": 1, "mscale_all_dim": 1}}
    )
    rope = mscale.layers[0].attention.rope
    assert rope is not None and rope.scaling is not None and rope.scaling.attention_factor == 1.0


def test_windows_of_the_last_layers():
    config = from_huggingface(
        QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 20}
    )
    assert [layer.attention.window for layer in config.layers] == [None] * 20 + [5] * 4
    assert from_huggingface(to_huggingface(config)) == config


SIZES = {"vocab_size": 97, "embed_dim": 32, "hidden_dim": 48, "num_layers": 4, "num_heads": 4}


@pytest.mark.parametrize(
    ("family", "traits", "field"),
    [
        ("llama", {"qk_norm": "head"}, "layers/0/attention/qk_norm='head'"),
        ("llama", {"pattern": ("local",), "window": 7}, "layers/3/attention/window=7"),
        ("llama", {"placement": "both"}, "placement='both'"),
        ("mistral", {"attention_bias": True}, "attention/bias=True"),
        ("gemma2", {"scale_embed": False}, "embed_scale=None"),
        ("gemma2", {"query_scalar": 20.5}, "attention/scale="),
        ("gpt_neox", {"head_dim": 16}, "attention/head_dim=16"),
    ],
)
def test_refuses_to_write_what_the_format_cannot_say(family, traits, field):
    config = make_config(family, **SIZES, **traits)
    with pytest.raises(ValueError, match=f"cannot say.*{field}"):
        to_huggingface(config)


def test_layers_that_differ_are_not_written_as_the_first():
    config = make_config("llama", **SIZES)
    first = config.layers[0]
    wide = dataclasses.replace(
        first, feed_forward=dataclasses.replace(first.feed_forward, hidden_dim=9)
    )
    config = dataclasses.replace(config, stacks=make_stacks((first, first, first, wide)))
    with pytest.raises(ValueError, match=r"layers/3/feed_forward/hidden_dim=9"):
        to_huggingface(config)


def test_how_layers_are_stacked_does_not_matter():
    config = make_config("llama", **SIZES)
    other = dataclasses.replace(
        config, stacks=(Stack(config.layers[:1], 1), Stack(config.layers[:1], 3))
    )
    assert to_huggingface(other) == to_huggingface(config)


def test_longrope_under_its_first_name():
    """Phi-3 mini 128k as first published: `su`, and the original length beside it."""
    long, short = [1.0 + i for i in range(48)], [1.0] * 48
    data = {
        "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"type": "su", "long_factor": long, "short_factor": short},
    }  # fmt: skip
    config = from_huggingface(data)
    rope = config.layers[0].attention.rope
    assert rope == Rope(
        scaling=RopeScaling(
            "longrope", 32.0, 4096, short_factors=tuple(short), long_factors=tuple(long)
        )
    )
    plain, _ = rope_frequencies(Rope(), 96)
    stretched, factor = rope_frequencies(rope, 96, config.max_length)
    np.testing.assert_allclose(plain / stretched, long, rtol=1e-12)
    # ln 32 / ln 4096 is 5 bits over 12.
    assert factor == pytest.approx((17 / 12) ** 0.5, rel=1e-12)
    within, factor_within = rope_frequencies(rope, 96, 4096)
    assert np.array_equal(within, plain) and factor_within == factor
    assert from_huggingface(to_huggingface(config)) == config
    with pytest.raises(ValueError, match="longrope has 48 long_factors; a head rotates 32 pairs"):
        rope_frequencies(rope, 64, config.max_length)
    del data["rope_scaling"]["long_factor"]
    with pytest.raises(ValueError, match="of type 'longrope' lack long_factor"):
        from_huggingface(data)
