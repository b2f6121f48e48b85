"""Weights: their specs, the leaf types that hold them, and the four functions that use them."""

from lm.weights.int8 import Int8
from lm.weights.leaf import Leaf, Weight, grouped_linear, linear, take, unembed
from lm.weights.lora import LoRA, MultiLoRA, bind
from lm.weights.specs import (
    ParamSpec,
    abstract,
    cast,
    count,
    gather,
    initialize,
    is_spec,
    path_name,
    shard_like,
    shardings,
    specs_of,
)

__all__ = [
    "Int8",
    "Leaf",
    "LoRA",
    "MultiLoRA",
    "ParamSpec",
    "Weight",
    "abstract",
    "bind",
    "cast",
    "count",
    "gather",
    "grouped_linear",
    "initialize",
    "is_spec",
    "linear",
    "path_name",
    "shard_like",
    "shardings",
    "specs_of",
    "take",
    "unembed",
]
