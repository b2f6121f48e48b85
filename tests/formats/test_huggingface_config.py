"""`config.json` in both styles, against published files, against transformers, and its errors."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from lm.formats import from_huggingface, to_huggingface
from lm.formats.families import make_config
from lm.formats.known import KNOWN, known_model
from lm.model import Rope, RopeScaling, Stack, make_stacks, num_params
from lm.model.rope import rope_frequencies
from tests.refuses import refuses

# `config.json` of the published repositories, without tokens and dtypes.
PUBLISHED = json.loads(pathlib.Path(__file__).with_name("published_configs.json").read_text())


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
PHI3 = PUBLISHED["phi3_mini"]
LINEAR, YARN = ({"rope_type": kind, "factor": 2.0} for kind in ("linear", "yarn"))
LONGROPE = {"type": "longrope", "short_factor": [1.0]}
DYNAMIC = {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
# The published file, what it says instead, and words of the refusal.
BAD = [
    (LLAMA, {"model_type": "mamba"}, ["model_type 'mamba'", "gemma3_text", "llama"]),
    (LLAMA, {"num_local_experts": 8}, ["'num_local_experts'=8", "understood are", "ignore"]),
    (LLAMA, {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    (LLAMA, {"sliding_window": 9}, ["'sliding_window'=9"]),
    (LLAMA, {"hidden_act": "relu2"}, ["'hidden_act' is 'relu2'; supported are silu"]),
    (LLAMA, {"rope_scaling": LONGROPE}, ["'longrope'; supported here are default, linear"]),
    (LLAMA, DYNAMIC, ["'rope_type' is 'dynamic'"]),
    (LLAMA, {"rope_scaling": LINEAR | {"tuned": True}}, ["'tuned'=True", "understood are factor"]),
    (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, ["lack factor"]),
    (LLAMA, {"partial_rotary_factor": 0.5}, ["'partial_rotary_factor' is 0.5"]),
    (PHI3, {"rope_scaling": YARN}, ["'yarn'; supported here are default"]),
    (LLAMA, {"hidden_size": None}, ["'hidden_size' is None"]),
    (LLAMA, {"vocab_size": "32000"}, ["'vocab_size' is '32000'", "positive integer"]),
    (LLAMA, {"num_key_value_heads": 5}, ["num_kv_heads=5 does not divide num_heads=32"]),
    (GEMMA3, {"layer_types": ["chunked_attention"] * 26}, ["'layer_types'"]),
    (GEMMA3, {"layer_types": ["full_attention"]}, ["num_hidden_layers=26"]),
    (QWEN2, {"layer_types": ["sliding_attention"] * 24}, ["no 'sliding_window' in use"]),
    (GEMMA3, {"use_bidirectional_attention": True}, ["use_bidirectional"]),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
]


@pytest.mark.parametrize(("data", "changes", "words"), BAD, ids=[next(iter(b[1])) for b in BAD])
def test_refuses(data, changes, words):
    refuses(lambda: from_huggingface(data | changes), *words)


def test_ignore_passes_over_a_key():
    data = LLAMA | {"a_new_remark": "x"}
    refuses(lambda: from_huggingface(data), "a_new_remark")
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
    refuses(lambda: to_huggingface(config), "cannot say", field)


def test_layers_that_differ_are_not_written_as_the_first():
    config = make_config("llama", **SIZES)
    first = config.layers[0]
    wide = dataclasses.replace(
        first, feed_forward=dataclasses.replace(first.feed_forward, hidden_dim=9)
    )
    config = dataclasses.replace(config, stacks=make_stacks((first, first, first, wide)))
    refuses(lambda: to_huggingface(config), "layers/3/feed_forward/hidden_dim=9")


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
    words = "longrope has 48 long_factors; a head rotates 32 pairs"
    refuses(lambda: rope_frequencies(rope, 64, config.max_length), words)
    del data["rope_scaling"]["long_factor"]
    refuses(lambda: from_huggingface(data), "of type 'longrope' lack long_factor")
