"""Attention: one function, several implementations."""

from lm.kernels.attention.choose import (
    IMPLEMENTATIONS,
    Implementation,
    attention,
    attention_backward,
    default_implementation,
)
from lm.kernels.attention.reference import View, mask, reference_attention
from lm.kernels.attention.scores import Scores

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "Scores",
    "View",
    "attention",
    "attention_backward",
    "default_implementation",
    "mask",
    "reference_attention",
]
