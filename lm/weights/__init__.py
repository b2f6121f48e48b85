"""Weights: their specs, the leaf types that hold them, and the four functions that use them."""

from lm.weights.blocked import Blocked
from lm.weights.fp8 import Fp8
from lm.weights.gguf import GGUFBlocks
from lm.weights.int4 import Int4
from lm.weights.int8 import Int8
from lm.weights.int8_groups import Int8Groups
from lm.weights.leaf import (
    StructuredWeight,
    Weight,
    grouped_linear,
    is_structured,
    linear,
    take,
    unembed,
)
from lm.weights.lora import LoRA, MultiLoRA, bind, num_adapters
from lm.weights.nf4 import NF4
from lm.weights.rtn import FORMATS, rtn
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
from lm.weights.words import Words, native_kinds

__all__ = [
    "FORMATS",
    "NF4",
    "Blocked",
    "Fp8",
    "GGUFBlocks",
    "Int4",
    "Int8",
    "Int8Groups",
    "LoRA",
    "MultiLoRA",
    "ParamSpec",
    "StructuredWeight",
    "Weight",
    "Words",
    "abstract",
    "bind",
    "cast",
    "count",
    "gather",
    "grouped_linear",
    "initialize",
    "is_spec",
    "is_structured",
    "linear",
    "native_kinds",
    "num_adapters",
    "path_name",
    "rtn",
    "shard_like",
    "shardings",
    "specs_of",
    "take",
    "unembed",
]
