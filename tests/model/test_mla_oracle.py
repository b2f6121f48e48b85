"""DeepSeek-V2 and -V3 as `transformers` has them: long context, generation, published sizes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.formats import from_huggingface, from_tensors, to_huggingface
from lm.infer.generate import LocalSampler
from lm.infer.requests import Request
from lm.model import ModelConfig, Stack, Tokens, forward, make_head, num_params, unstack
from lm.model.latent import expands
from tests.model.huggingface_oracle import (
    BASE,
    CASES,
    GQA,
    LATENT,
    YARN_DEEPSEEK,
    build_oracle,
    make_oracle,
    rope,
)

pytestmark = pytest.mark.oracle


def logits_of(oracle, config: ModelConfig, ids: np.ndarray) -> np.ndarray:
    params = from_tensors(oracle.arrays(), config)

    @jax.jit
    def run(params):
        hidden = forward(params, Tokens.of(jnp.asarray(ids)), config).hidden
        return make_head(params, config).logits(hidden)

    return np.asarray(run(params))[..., : config.vocab_size]


TWO_LAYERS = {"num_hidden_layers": 2}
PHI3 = GQA | TWO_LAYERS | {"original_max_position_embeddings": 32} | rope(
    "longrope", partial_rotary_factor=0.75, short_factor=[1.1, 1.0, 1.3],
    long_factor=[1.0, 3.1, 9.7], original_max_position_embeddings=32,
)  # fmt: skip
LONG = {
    "llama": ("llama", GQA | TWO_LAYERS
        | rope("yarn", factor=8.0, original_max_position_embeddings=32)),
    "llama3": ("llama", GQA | TWO_LAYERS
        | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=32)),
    "phi3": ("phi3", PHI3),
    "deepseek_v2": ("deepseek_v2", BASE | LATENT | TWO_LAYERS | YARN_DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", BASE | LATENT | TWO_LAYERS | {"num_key_value_heads": 6}
        | rope("yarn", factor=40.0, original_max_position_embeddings=8, mscale=1.0,
               mscale_all_dim=1.0)),
}  # fmt: skip


@pytest.mark.parametrize("case", LONG)
def test_logits_beyond_the_original_length(case):
    """Every logit of 256 positions, where training saw 8 or 32; unstretched ones are others."""
    torch = pytest.importorskip("torch")
    model_type, arguments = LONG[case]
    oracle = build_oracle(model_type, arguments | {"max_position_embeddings": 256})
    ids = np.random.default_rng(0).integers(0, 139, (1, 256), dtype=np.int32)
    with torch.no_grad():
        want = oracle.model(input_ids=torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    config = from_huggingface(oracle.json)
    got = logits_of(oracle, config, ids)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    layer = config.layers[0]
    assert layer.attention.rope is not None and layer.attention.rope.scaling is not None
    plain = dataclasses.replace(layer.attention.rope, scaling=None)
    layer = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, rope=plain))
    other = logits_of(oracle, dataclasses.replace(config, stacks=(Stack((layer,), 2),)), ids)
    assert np.abs(other[:, 128:] - want[:, 128:]).max() > 0.1


def test_longrope_within_the_original_length():
    """A model that is to be no longer has the short factors, and cos and sin grow all the same."""
    torch = pytest.importorskip("torch")
    oracle = build_oracle("phi3", PHI3 | {"max_position_embeddings": 256})
    ids = np.random.default_rng(0).integers(0, 139, (1, 32), dtype=np.int32)
    with torch.no_grad():
        want = oracle.model(input_ids=torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    config = from_huggingface(oracle.json)
    got = logits_of(oracle, dataclasses.replace(config, max_length=32), ids)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(logits_of(oracle, config, ids) - want).max() > 0.1
    assert from_huggingface(to_huggingface(config)) == config


@pytest.mark.parametrize("case", ["deepseek_v2_plain_queries", "deepseek_v3"])
def test_greedy_generation_equals_transformers(case):
    """Prompts on both sides of where a prompt attends expanded; new tokens are absorbed."""
    torch = pytest.importorskip("torch")
    oracle = make_oracle(case)
    config = from_huggingface(oracle.json)
    sampler = LocalSampler(
        unstack(from_tensors(oracle.arrays(), config)), config, max_length=64, eos_ids=()
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (3, 9, 24)]
    attention = config.layers[0].attention
    assert {expands(n, attention) for n in (4, 32)} == {True, False}
    # One at a time, so that a short prompt is not padded to a long one's form.
    for prompt in prompts:
        (sample,) = sampler.sample([Request(prompt=prompt, max_new_tokens=20)])
        row = torch.tensor([prompt])
        with torch.no_grad():
            out = oracle.model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=20, do_sample=False
            )
        assert out[0, len(prompt) :].tolist() == list(sample.token_ids)


# Published configurations (config.json of each), cut to their dense layers.
PUBLISHED = {
    "DeepSeek-V2": ("deepseek_v2", {
        "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "num_hidden_layers": 1, "first_k_dense_replace": 1,
    }),
    "DeepSeek-V2-Lite": ("deepseek_v2", {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
        "num_hidden_layers": 1, "first_k_dense_replace": 1,
    }),
    "DeepSeek-V3": ("deepseek_v3", {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "num_hidden_layers": 3, "first_k_dense_replace": 3,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_counted_as_transformers_counts_them(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_type, arguments = PUBLISHED[name]
    theirs = transformers.AutoConfig.for_model(model_type, **arguments)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    config = from_huggingface(theirs.to_dict())
    assert num_params(config) == sum(p.numel() for p in model.parameters())


def test_cases_have_every_kind():
    kinds = {name: CASES[name][1].get("q_lora_rank") for name in CASES if "deepseek" in name}
    assert None in kinds.values() and len(kinds) == 3
