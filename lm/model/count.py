"""Parameters and floating-point operations, from the specs alone."""

from __future__ import annotations

from lm.model.config import ModelConfig
from lm.model.params import param_specs
from lm.weights import count


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


def forward_flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations a token of a forward pass over rows of `length`, causal.

    The convention, stated once: a multiply-add is 2; every weight of a matrix product counts
    once a token (the output matrix too, the embedding's look-up not); attention counts 4 x
    query heads x head size x the mean number of positions seen, (length + 1) / 2 without a
    window; norms, activations, softmax and recomputation count nothing. PaLM's count
    (arXiv:2204.02311, appendix B) without the causal half would be higher.
    """
    total = 2.0 * config.vocab_size * config.embed_dim
    for layer in config.layers:
        a, f = layer.attention, layer.feed_forward
        projections = 2 * (a.num_heads + a.num_kv_heads) * a.head_dim * config.embed_dim
        inner = (3 if f.gated else 2) * f.hidden_dim * config.embed_dim
        total += 2.0 * (projections + inner)
        total += 4.0 * a.num_heads * a.head_dim * mean_positions(length, a.window)
    return total


def train_flops(config: ModelConfig, length: int) -> float:
    """Operations a token of forward and backward: three times the forward's."""
    return 3.0 * forward_flops(config, length)


def mean_positions(length: int, window: int | None) -> float:
    """Mean number of positions a query of a row sees, itself included."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
