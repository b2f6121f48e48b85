"""Which tensor of a GGUF file holds which of our weights: one table an architecture.

Their matrices are rows of `out` by `in`, ours `[in, out]`; several of ours may be rows of one
tensor of theirs. Names as in gguf-py's tensor_mapping.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lm.formats.huggingface.tensors import attribute
from lm.model import Layer, ModelConfig
from lm.model.params import unstacked_specs
from lm.weights import ParamSpec


@dataclasses.dataclass(frozen=True)
class Table:
    """The tensors of an architecture; one whose weights the model does not have is left out.

    Attributes:
      layer: tensor of a layer, without `blk.N.` -> paths in `LayerWeights`, in the order of rows.
      interleaved: rows of queries and keys lie so that rotated pairs are neighbours.
      plus_one: weights of norms are stored with the one added (ours are without, by `Norm`).
    """

    layer: Mapping[str, tuple[str, ...]]
    interleaved: bool = False
    plus_one: bool = False


OUTSIDE: Mapping[str, str] = {
    "token_embd.weight": "embed",
    "output_norm.weight": "norm/scale",
    "output_norm.bias": "norm/bias",
    "output.weight": "output",
}
# Read for the configuration, and no weights.
IGNORED = ("rope_freqs.weight",)


def _linear(name: str, ours: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": (ours,), f"{name}.bias": (f"{ours}_bias",)}


def _norm(name: str, ours: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": (f"{ours}/scale",), f"{name}.bias": (f"{ours}/bias",)}


_QKV = ("attention/query", "attention/key", "attention/value")
_SPLIT_QKV = {
    **_linear("attn_q", _QKV[0]),
    **_linear("attn_k", _QKV[1]),
    **_linear("attn_v", _QKV[2]),
}
_FUSED_QKV = {"attn_qkv.weight": _QKV, "attn_qkv.bias": tuple(f"{name}_bias" for name in _QKV)}
_OUT_DOWN = {
    **_linear("attn_output", "attention/out"),
    **_linear("ffn_down", "feed_forward/down"),
}
_UP = _linear("ffn_up", "feed_forward/up")
_GATED = {**_linear("ffn_gate", "feed_forward/gate"), **_UP}
_QK_NORM = {
    "attn_q_norm.weight": ("attention/query_norm",),
    "attn_k_norm.weight": ("attention/key_norm",),
}
_PRE = {**_norm("attn_norm", "attention_norm"), **_norm("ffn_norm", "feed_forward_norm")}
_POST = {
    **_norm("post_attention_norm", "attention_post_norm"),
    **_norm("post_ffw_norm", "feed_forward_post_norm"),
}
_BLOCKS = {**_SPLIT_QKV, **_OUT_DOWN, **_GATED}

TABLES: Mapping[str, Table] = {
    "llama": Table({**_PRE, **_BLOCKS}, interleaved=True),
    "mistral": Table({**_PRE, **_BLOCKS}, interleaved=True),
    "qwen2": Table({**_PRE, **_BLOCKS}),
    "qwen3": Table({**_PRE, **_BLOCKS, **_QK_NORM}),
    "gemma2": Table({**_PRE, **_POST, **_BLOCKS}, plus_one=True),
    "gemma3": Table({**_PRE, **_POST, **_BLOCKS, **_QK_NORM}, plus_one=True),
    "olmo2": Table({**_POST, **_BLOCKS, **_QK_NORM}),
    "phi3": Table(
        {
            **_PRE,
            **_FUSED_QKV,
            **_OUT_DOWN,
            "ffn_up.weight": ("feed_forward/gate", "feed_forward/up"),
        }
    ),
    "gptneox": Table({**_PRE, **_FUSED_QKV, **_OUT_DOWN, **_UP}),
}


@dataclasses.dataclass(frozen=True)
class Rows:
    """One of our weights as rows of one of their tensors.

    Attributes:
      path: of our weight in the unstacked tree, as `stacks/0/layers/3/attention/query`.
      spec: of our weight.
      tensor: name of theirs.
      tensor_shape: its whole shape.
      start: its first row that is ours.
      count: how many are; our matrix may have more, of padding.
      turned: the layer, where a head's rows are in another order.
      transposed: ours is `[in, out]`.
      minus: taken off every number.
    """

    path: str
    spec: ParamSpec
    tensor: str
    tensor_shape: tuple[int, ...]
    start: int
    count: int
    turned: Layer | None
    transposed: bool
    minus: float

    @property
    def order(self) -> np.ndarray | None:
        """Of the rows, where it is another; None for theirs."""
        return None if self.turned is None else halves_of_pairs(self.count, self.turned)


def rows(config: ModelConfig, architecture: str) -> Iterator[Rows]:
    """Every weight of the model, in the order of the table, layer by layer."""
    table, specs = TABLES[architecture], unstacked_specs(config)
    for name, field in OUTSIDE.items():
        spec = attribute(specs, field)
        if spec is not None:
            yield from _rows(name, (field,), specs, "", config, table, None)
    index = 0
    for s, stack in enumerate(config.stacks):
        for i, layer in enumerate(stack.layers):
            weights = specs.stacks[s].layers[i]
            for name, fields in table.layer.items():
                prefix = f"stacks/{s}/layers/{i}/"
                full = f"blk.{index}.{name}"
                yield from _rows(full, fields, weights, prefix, config, table, layer)
            index += 1


def _rows(
    name: str,
    fields: tuple[str, ...],
    weights: Any,
    prefix: str,
    config: ModelConfig,
    table: Table,
    layer: Layer | None,
) -> Iterator[Rows]:
    """The weights in one of their tensors, or none where the model has no such weights."""
    specs: list[ParamSpec] = [attribute(weights, field) for field in fields]
    if any(spec is None for spec in specs):
        return
    embed = fields == ("embed",)
    counts = [spec.shape[0] if embed else spec.shape[-1] for spec in specs]
    if layer is None and specs[0].axes.count("vocab"):
        counts = [config.vocab_size]
    matrix = len(specs[0].shape) == 2
    width = specs[0].shape[1 if embed else 0]
    shape = (sum(counts), width) if matrix else (sum(counts),)
    start = 0
    for field, spec, count in zip(fields, specs, counts, strict=True):
        rotated = field.rpartition("/")[2] in ("query", "key", "query_bias", "key_bias")
        turned = layer if table.interleaved and rotated else None
        norm = "norm" in field and field.endswith(("scale", "query_norm", "key_norm"))
        minus = 1.0 if table.plus_one and norm else 0.0
        path = prefix + field
        yield Rows(path, spec, name, shape, start, count, turned, matrix and not embed, minus)
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
