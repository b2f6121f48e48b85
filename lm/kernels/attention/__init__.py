"""Attention: one function, several implementations."""

from lm.kernels.attention.choose import IMPLEMENTATIONS, attention
from lm.kernels.attention.reference import View, mask, reference_attention

__all__ = ["IMPLEMENTATIONS", "View", "attention", "mask", "reference_attention"]
