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
    GQA,
    LATENT,
    LLAMA3_FACTORS,
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
        | rope("llama3", original_max_position_embeddings=32, **LLAMA3_FACTORS)),
    "phi3": ("phi3", PHI3),
    "deepseek_v2": ("deepseek_v2", BASE | LATENT | TWO_LAYERS | YARN_DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", BASE | LATENT | TWO_LAYERS | {"num_key_value_heads": 6}
        | rope("yarn", factor=40.0, original_max_position_embeddings=8, mscale=1.0,
               mscale_all_dim=1.0)),
}  # fmt: skip


@pytest.mark.parametrize("case", LONG)
def test_logits_beyond_the_original_length(case):
    """Every logit of 256 positions, where training saw 8 or 32; unstretched ones are others."""
    model_type, arguments = LONG[case]
    oracle = build_oracle(model_type, arguments | {"max_position_embeddings": 256})
    ids = np.random.default_rng(0).integers(0, 139, (1, 256), dtype=np.int32)
    want = oracle.logits(ids)
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
    oracle = build_oracle("phi3", PHI3 | {"max_position_embeddings": 256})
    ids = np.random.default_rng(0).integers(0, 139, (1, 32), dtype=np.int32)
    want = oracle.logits(ids)
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


# Published configurations (config.json of each), cut to their dense layers: vocabulary, width,
# feed-forward size, heads, rank of queries, layers.
PUBLISHED = {
    "DeepSeek-V2": ("deepseek_v2", 102400, 5120, 12288, 128, 1536, 1),
    "DeepSeek-V2-Lite": ("deepseek_v2", 102400, 2048, 10944, 16, None, 1),
    "DeepSeek-V3": ("deepseek_v3", 129280, 7168, 18432, 128, 1536, 3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_counted_as_transformers_counts_them(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_type, vocab_size, width, hidden, heads, rank, layers = PUBLISHED[name]
    theirs = transformers.AutoConfig.for_model(
        model_type, vocab_size=vocab_size, hidden_size=width, intermediate_size=hidden,
        num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=rank,
        num_hidden_layers=layers, first_k_dense_replace=layers,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    config = from_huggingface(theirs.to_dict())
    assert num_params(config) == sum(p.numel() for p in model.parameters())
