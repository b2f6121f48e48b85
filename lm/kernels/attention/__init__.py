"""Attention: one function, several implementations."""

from lm.kernels.attention.choose import IMPLEMENTATIONS, attention, attention_backward
from lm.kernels.attention.reference import View, mask, reference_attention

__all__ = [
    "IMPLEMENTATIONS",
    "View",
    "attention",
    "attention_backward",
    "mask",
    "reference_attention",
]
