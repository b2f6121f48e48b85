"""Decoder-only language models: configuration, weights, and one forward pass."""

from lm.model.config import (
    Attention,
    FeedForward,
    Latent,
    Layer,
    ModelConfig,
    Norm,
    Rope,
    RopeScaling,
    Stack,
    make_stacks,
)
from lm.model.count import forward_flops, num_bytes, num_params, train_flops
from lm.model.decoder import LayerCache, Output, Tokens, forward
from lm.model.head import Head, make_head
from lm.model.params import (
    ModelWeights,
    Stacked,
    Unstacked,
    check_layout,
    param_specs,
    stack,
    unstack,
)

__all__ = [
    "Attention",
    "FeedForward",
    "Head",
    "Latent",
    "Layer",
    "LayerCache",
    "ModelConfig",
    "ModelWeights",
    "Norm",
    "Output",
    "Rope",
    "RopeScaling",
    "Stack",
    "Stacked",
    "Tokens",
    "Unstacked",
    "check_layout",
    "forward",
    "forward_flops",
    "make_head",
    "make_stacks",
    "num_bytes",
    "num_params",
    "param_specs",
    "stack",
    "train_flops",
    "unstack",
]
