"""Parameters, bytes and floating-point operations, from the specs alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lm.model.config import Layer, ModelConfig
from lm.model.params import layer_specs, param_specs
from lm.weights import count, is_spec


def num_params(config: ModelConfig, embedding: bool = True) -> int:
    """Weights of the model, the vocabulary's padding not counted.

    Args:
      config: the model.
      embedding: also count the embedding (and so, where tied, the output matrix).
    """
    specs = param_specs(config)
    padding = config.padded_vocab_size - config.vocab_size
    matrices = 1 if config.tied else 2
    total = count(specs) - padding * config.embed_dim * matrices
    return total if embedding else total - config.vocab_size * config.embed_dim


def num_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, ShapeDtypeStructs or ParamSpecs, at any depth.

    So of weights in any format, a cache or a state of training, without making them:
    `num_bytes(jax.eval_shape(lambda w: rtn(w, {"stacks/*": "nf4"}), abstract(specs)))`.
    """
    total = 0
    for x in jax.tree.leaves(tree, is_leaf=is_spec):
        if is_spec(x) and x.leaf is not None:
            total += num_bytes(x.leaf)
        else:
            total += math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
    return total


def forward_flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations a token of a forward pass over rows of `length`, causal.

    The convention, stated once: a multiply-add is 2; every weight of a matrix product counts
    once a token (the output matrix too, the embedding's look-up not); attention counts 2 x
    query heads x (size of a key + size of a value) x the mean number of positions seen,
    (length + 1) / 2 without a window, latent attention in its expanded form; norms, activations,
    softmax and recomputation count nothing. PaLM's count (arXiv:2204.02311, appendix B) without
    the causal half would be higher.
    """
    total = 2.0 * config.vocab_size * config.embed_dim
    for layer in config.layers:
        a = layer.attention
        specs = jax.tree.leaves(layer_specs(layer, config.embed_dim, 1), is_leaf=is_spec)
        total += 2.0 * sum(math.prod(spec.shape) for spec in specs if spec.kind == "matrix")
        pair = 2.0 * a.num_heads * (a.head_dim + a.value_dim)
        total += pair * mean_positions(length, a.window)
    return total


def activation_widths(layer: Layer) -> dict[str, int]:
    """Values per token of the activations of a layer that `lm.model.remat` names."""
    a, f = layer.attention, layer.feed_forward
    keys = a.num_kv_heads * a.head_dim
    return {
        "query": a.num_heads * a.head_dim, "key": keys, "value": keys,
        "attention": a.num_heads * a.value_dim,
        "up": f.hidden_dim, "gate": f.hidden_dim if f.gated else 0,
    }  # fmt: skip


def train_flops(config: ModelConfig, length: int) -> float:
    """Operations a token of forward and backward: three times the forward's."""
    return 3.0 * forward_flops(config, length)


def mean_positions(length: int, window: int | None) -> float:
    """Mean number of positions a query of a row sees, itself included."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
