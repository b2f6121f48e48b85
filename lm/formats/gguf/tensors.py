"""Which tensor of a GGUF file holds which of our weights.

Their matrices are rows of `out` by `in`, ours `[in, out]`; several of ours may be rows of one
tensor of theirs. Names as in gguf-py's tensor_mapping.py; they mean the same in every architecture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lm.formats.common import attribute
from lm.formats.family import GGUF
from lm.model import Layer, ModelConfig
from lm.model.params import unstacked_specs
from lm.weights import ParamSpec

OUTSIDE: Mapping[str, str] = {
    "token_embd.weight": "embed",
    "output_norm.weight": "norm/scale",
    "output_norm.bias": "norm/bias",
    "output.weight": "output",
}
# Read for the configuration; not weights.
IGNORED = ("rope_freqs.weight",)

_LINEAR = {
    "attn_q": "attention/query",
    "attn_k": "attention/key",
    "attn_v": "attention/value",
    "attn_output": "attention/out",
    "ffn_gate": "feed_forward/gate",
    "ffn_up": "feed_forward/up",
    "ffn_down": "feed_forward/down",
}
_NORMS = {
    "attn_norm": "attention_norm",
    "ffn_norm": "feed_forward_norm",
    "post_attention_norm": "attention_post_norm",
    "post_ffw_norm": "feed_forward_post_norm",
}


def layer_tensors(gguf: GGUF) -> dict[str, tuple[str, ...]]:
    """Tensors of a layer, without `blk.N.` -> paths in `LayerWeights`, in the order of rows.

    A tensor whose weights the model does not have is not in the file.
    """
    linear: dict[str, tuple[str, ...]] = {name: (ours,) for name, ours in _LINEAR.items()}
    if gguf.fused:
        qkv = [linear.pop(name)[0] for name in ("attn_q", "attn_k", "attn_v")]
        linear["attn_qkv"] = tuple(qkv)
    if gguf.fused_gate:
        linear["ffn_up"] = (*linear.pop("ffn_gate"), *linear["ffn_up"])
    found: dict[str, tuple[str, ...]] = {}
    for name, ours in _NORMS.items():
        found |= {f"{name}.weight": (f"{ours}/scale",), f"{name}.bias": (f"{ours}/bias",)}
    for name, fields in linear.items():
        found[f"{name}.weight"] = fields
        found[f"{name}.bias"] = tuple(f"{field}_bias" for field in fields)
    found["attn_q_norm.weight"] = ("attention/query_norm",)
    found["attn_k_norm.weight"] = ("attention/key_norm",)
    return found


@dataclasses.dataclass(frozen=True)
class Rows:
    """One of our weights as rows of one of their tensors.

    Attributes:
      path: of our weight in the unstacked tree, as `stacks/0/layers/3/attention/query`.
      spec: of our weight.
      tensor: name of theirs.
      tensor_shape: its whole shape.
      start, count: its first row that is ours, and how many are; our matrix may have more rows, of
        padding.
      paired: the layer, where rotated pairs of rows are neighbours in the file.
      transposed: ours is `[in, out]`.
      minus: subtracted from every number.
    """

    path: str
    spec: ParamSpec
    tensor: str
    tensor_shape: tuple[int, ...]
    start: int
    count: int
    paired: Layer | None
    transposed: bool
    minus: float

    @property
    def order(self) -> np.ndarray | None:
        """The rows of theirs in our order; None where the order is the same."""
        return None if self.paired is None else halves_of_pairs(self.count, self.paired)


def rows(config: ModelConfig, gguf: GGUF) -> Iterator[Rows]:
    """Every weight of the model, layer by layer."""
    specs, layer_names = unstacked_specs(config), layer_tensors(gguf)
    for name, field in OUTSIDE.items():
        yield from _rows(name, (field,), specs, "", config, None)
    number = 0
    for s, stack in enumerate(config.stacks):
        for i, layer in enumerate(stack.layers):
            weights, prefix = specs.stacks[s].layers[i], f"stacks/{s}/layers/{i}/"
            paired = layer if gguf.interleaved else None
            for name, fields in layer_names.items():
                yield from _rows(f"blk.{number}.{name}", fields, weights, prefix, config, paired)
            number += 1


def _rows(
    name: str,
    fields: tuple[str, ...],
    weights: Any,
    prefix: str,
    config: ModelConfig,
    paired: Layer | None,
) -> Iterator[Rows]:
    """The weights in one of their tensors, or none where the model has no such weights."""
    specs: list[ParamSpec] = [attribute(weights, field) for field in fields]
    if None in specs:
        return
    embed, matrix = fields == ("embed",), len(specs[0].shape) == 2
    counts = [spec.shape[0] if embed else spec.shape[-1] for spec in specs]
    if fields[0] in ("embed", "output"):
        counts = [config.vocab_size]
    width = specs[0].shape[1 if embed else 0]
    shape = (sum(counts), width) if matrix else (sum(counts),)
    start = 0
    for field, spec, count in zip(fields, specs, counts, strict=True):
        rotated = field.rpartition("/")[2] in ("query", "key", "query_bias", "key_bias")
        # Their weights of norms have the one added that ours are multiplied without.
        is_scale = "norm" in field and field.endswith(("scale", "query_norm", "key_norm"))
        minus = 1.0 if config.norm.plus_one and is_scale else 0.0
        pairs, transposed = paired if rotated else None, matrix and not embed
        yield Rows(prefix + field, spec, name, shape, start, count, pairs, transposed, minus)
        start += count


def halves_of_pairs(count: int, layer: Layer) -> np.ndarray:
    """Rows of neighbouring pairs, as rows where a pair is half the rotated size apart.

    Rotated row `2 i + j` of a head in the file is row `i + j rotated / 2` of it here.
    """
    a = layer.attention
    rotated = a.head_dim if a.rope is None else int(a.head_dim * a.rope.fraction)
    head = np.arange(a.head_dim)
    head[:rotated] = head[:rotated].reshape(-1, 2).T.reshape(-1)
    return (np.arange(0, count, a.head_dim)[:, None] + head).reshape(-1)
