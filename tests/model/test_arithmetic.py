"""What every practitioner knows of memory, derived from specs, leaves, caches and states alone.

Nothing is made: every tree here is one of shapes. GB is 10^9 bytes, KiB 1024.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.adapters.lora import add_lora, trains
from lm.files.ggml import block_type
from lm.formats.families import make_config
from lm.formats.known import known_model
from lm.infer.cache import make_cache
from lm.model import ModelConfig, num_bytes, num_params, param_specs, unstack
from lm.train.optimizers import AdamW, make_optimizer
from lm.train.state import partition
from lm.weights import GGUFBlocks, abstract, path_name, rtn, specs_of

LLAMA2_70B = known_model("llama2_70b")


def weights(config: ModelConfig, dtype=jnp.bfloat16):
    """The weights as shapes."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract(param_specs(config))
    )


def quantized(config: ModelConfig, **formats):
    """The weights as shapes, by patterns of paths; the rest in 16 bits."""
    return jax.eval_shape(functools.partial(rtn, formats=formats), weights(config))


def gigabytes(tree) -> float:
    return num_bytes(tree) / 1e9


def test_num_bytes_is_that_of_what_is_made():
    config = make_config("llama", vocab_size=128, embed_dim=64, hidden_dim=128, num_layers=2,
                         num_heads=2)  # fmt: skip
    made = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), weights(config))
    assert num_bytes(made) == num_bytes(weights(config)) == 2 * num_params(config)
    assert num_bytes(param_specs(config)) == 4 * num_params(config)
    made = rtn(made, {"stacks/*": "nf4"})
    held = sum(x.nbytes for x in jax.tree.leaves(made))
    shapes = quantized(config, **{"stacks/*": "nf4"})
    assert held == num_bytes(made) == num_bytes(shapes)
    query = shapes.stacks[0].layers[0].attention.query
    spec = specs_of(shapes, param_specs(config)).stacks[0].layers[0].attention.query
    assert num_bytes(spec) == num_bytes(query) == query.nbytes


@pytest.mark.parametrize(
    ("what", "rule_of_thumb", "exact"),
    [("float32", 280, 275.91), ("bfloat16", 140, 137.95), ("int8", 70, 69.00), ("int4", 35, 35.57)],
)
def test_a_70b_model(what, rule_of_thumb, exact):
    """Bytes a weight times 70 billion; 68.98 billion it has, and scales of blocks come on top."""
    if what.startswith("int"):
        held = quantized(LLAMA2_70B, **{"*": what})
    else:
        held = weights(LLAMA2_70B, jnp.dtype(what))
    assert gigabytes(held) == pytest.approx(rule_of_thumb, rel=0.03)
    assert gigabytes(held) == pytest.approx(exact, abs=0.05)


def q4_k_m(config: ModelConfig) -> dict[str, str]:
    """Which type llama.cpp's Q4_K_M gives each matrix of the unstacked 70B model.

    Half of the layers' `value` and `down` get more bits: the first and the last eighth, and every
    third between. In a 70B model, eight heads share each value, and `value` gets Q5_K elsewhere.
    """
    n = config.num_layers
    kinds = {"embed": "Q4_K", "output": "Q6_K"}
    for i in range(n):
        more = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
        for name in ("attention/query", "attention/key", "attention/out"):
            kinds[f"stacks/0/layers/{i}/{name}"] = "Q4_K"
        kinds[f"stacks/0/layers/{i}/attention/value"] = "Q6_K" if more else "Q5_K"
        for name in ("gate", "up", "down"):
            kinds[f"stacks/0/layers/{i}/feed_forward/{name}"] = (
                "Q6_K" if more and name == "down" else "Q4_K"
            )
    return kinds


def test_a_70b_model_in_q4_k_m():
    """The published file, llama-2-70b.Q4_K_M.gguf, has 41.42 GB; its norms are float32."""
    kinds = q4_k_m(LLAMA2_70B)
    bits = {}
    for kind in set(kinds.values()):
        one = np.zeros(block_type(kind).row_bytes(256), np.uint8)
        leaf = GGUFBlocks.from_bytes(one, kind, (1, 256))
        assert leaf.nbytes == one.size
        bits[kind] = leaf.bits_per_weight
    assert bits == {"Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
    total, seen = 0.0, set()
    unstacked = jax.eval_shape(unstack, weights(LLAMA2_70B))
    for path, x in jax.tree_util.tree_leaves_with_path(unstacked):
        kind = kinds.get(path_name(path))
        seen |= {path_name(path)} if kind else set()
        assert (kind is None) == ("norm" in path_name(path))
        total += x.size * (bits[kind] if kind else 32) / 8
    assert seen == kinds.keys()
    assert total / 1e9 == pytest.approx(41.42, abs=0.01)
    assert total / 1e9 == pytest.approx(40, rel=0.05)


ATTENTION = ("query", "key", "value", "out")


@pytest.mark.parametrize(
    ("targets", "rank", "times"),
    [
        (("query", "value"), 8, 1607),
        (ATTENTION, 16, 402),
        ((*ATTENTION, "gate", "up", "down"), 8, 337),
        ((*ATTENTION, "gate", "up", "down"), 32, 84),
    ],
)
def test_lora_trains_hundreds_of_times_fewer_weights(targets, rank, times):
    """Of Llama 2 7B; r (in + out) for each matrix. The paper's own choice is the first row's."""
    config = known_model("llama2_7b")

    def chosen(path: str) -> bool:
        return path.startswith("stacks/") and path.rsplit("/")[-1] in targets

    adapted = jax.eval_shape(
        lambda w, key: add_lora(w, config, key, rank=rank, targets=chosen),
        weights(config), jax.eval_shape(lambda: jax.random.key(0)),
    )  # fmt: skip
    trainable, _ = partition(adapted, trains)
    trained = sum(x.size for x in jax.tree.leaves(trainable))
    assert num_params(config) / trained == pytest.approx(times, abs=0.6)


def cache_bytes_per_token(config: ModelConfig) -> int:
    """What one more position of one row takes in 16 bits."""

    def of(length: int) -> int:
        return num_bytes(jax.eval_shape(lambda: make_cache(config, 1, length, jnp.bfloat16)))

    return of(1001) - of(1000)


def deepseek(num_layers: int) -> ModelConfig:
    """Attention of DeepSeek-V2 (236B): its cache does not depend on the feed-forward layers."""
    return make_config("deepseek_v2", vocab_size=102400, embed_dim=5120, hidden_dim=12288,
                       num_layers=num_layers, num_heads=128)  # fmt: skip


def test_kv_cache_of_a_token():
    """Multi-head, grouped-query, multi-query and latent attention."""
    kib = {name: cache_bytes_per_token(known_model(name)) / 1024
           for name in ("llama2_7b", "llama2_70b", "llama3_8b", "llama3_70b")}  # fmt: skip
    assert kib == {"llama2_7b": 512, "llama2_70b": 320, "llama3_8b": 128, "llama3_70b": 320}
    multi_query = known_model("llama2_7b", num_kv_heads=1)
    assert cache_bytes_per_token(multi_query) == 512 * 1024 // 32 == 16 * 1024

    latent = deepseek(60)
    assert cache_bytes_per_token(latent) == 60 * (512 + 64) * 2 == 69_120
    # The paper (arXiv:2405.04434, table 1): as much as grouped-query attention of 2.25 groups.
    heads = {"latent": None, "head_dim": 128, "num_layers": 60}
    sizes = {"vocab_size": 102400, "embed_dim": 5120, "hidden_dim": 12288, "num_heads": 128}
    one_group = cache_bytes_per_token(make_config("deepseek_v2", **sizes, **heads, num_kv_heads=1))
    multi_head = cache_bytes_per_token(make_config("deepseek_v2", **sizes, **heads))
    assert cache_bytes_per_token(latent) / one_group == 2.25
    assert cache_bytes_per_token(latent) / multi_head == pytest.approx(0.0176, abs=5e-5)
    # The paper (abstract): 93.3 % less than DeepSeek 67B (95 layers, 8 groups), whose cache has 16
    # bits a number where this one has 6 (section 3.2.3).
    dense = make_config("llama", vocab_size=102400, embed_dim=8192, hidden_dim=22016,
                        num_layers=95, num_heads=64, num_kv_heads=8)  # fmt: skip
    saved = 1 - cache_bytes_per_token(latent) * 6 / 16 / cache_bytes_per_token(dense)
    assert saved == pytest.approx(0.933, abs=5e-4)


def test_qlora_of_65b_fits_in_48_gb():
    """Llama 65B as in QLoRA (arXiv:2305.14314): NF4 with double quantization, adapters of rank 64
    on every matrix of every layer, in bfloat16, and Adam in float32. A row of 2,048 tokens, each
    layer computed again on the way back: of a layer its input is kept."""
    config = make_config("llama", vocab_size=32000, embed_dim=8192, hidden_dim=22016, num_layers=80,
                         num_heads=64)  # fmt: skip
    assert num_params(config) == 65_285_660_672
    base = quantized(config, **{"stacks/*": "nf4"})
    adapted = jax.eval_shape(
        lambda w, key: add_lora(w, config, key, rank=64, dtype=jnp.bfloat16),
        base, jax.eval_shape(lambda: jax.random.key(0)),
    )  # fmt: skip
    trainable, frozen = partition(adapted, trains)
    optimizer = make_optimizer(AdamW(), specs_of(adapted, param_specs(config)))
    parts = {
        "base": gigabytes(frozen),
        "adapters": gigabytes(trainable),
        "gradients": gigabytes(trainable),
        "Adam": gigabytes(jax.eval_shape(optimizer.init, trainable)),
        "layers' inputs": 80 * 2048 * 8192 * 2 / 1e9,
    }
    assert parts == pytest.approx(
        {"base": 34.46, "adapters": 1.6, "gradients": 1.6, "Adam": 6.4, "layers' inputs": 2.68},
        abs=0.01,
    )
    assert sum(parts.values()) < 48 < gigabytes(weights(config))
