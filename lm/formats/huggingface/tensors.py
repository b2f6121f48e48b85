"""Which tensor of a Hugging Face file holds which of our weights: one table a family.

An `Entry` is one of their tensors and the one to three of our weights in it, with the transform
between them. Their matrices are `[out, in]`, ours `[in, out]`. The same table imports and exports.
Paths are fields of `ModelWeights` or, where the name has a `{i}`, of the layer's `LayerWeights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.model import Layer, ModelConfig
from lm.model.params import layer_specs, param_specs

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Between one of their tensors and some of ours. Data moves; no value changes."""

    def shape(self, ours: Sequence[Shape], config: ModelConfig) -> Shape:
        """Their shape, from ours."""
        return ours[0]

    def read(self, tensor: np.ndarray, ours: Sequence[Shape], layer: Layer | None) -> list[Any]:
        """Ours, of shapes `ours`, from theirs; views where that is possible."""
        return [tensor]

    def write(self, arrays: Sequence[np.ndarray], config: ModelConfig, layer: Layer | None) -> Any:
        """Theirs, from ours."""
        return arrays[0]


class Transpose(Transform):
    def shape(self, ours, config):
        return ours[0][::-1]

    def read(self, tensor, ours, layer):
        return [tensor.T]

    def write(self, arrays, config, layer):
        return arrays[0].T


class Vocabulary(Transform):
    """[vocab_size, D] <-> [padded, D]: rows of padding are zeros in, and cut off out."""

    def shape(self, ours, config):
        return (config.vocab_size, ours[0][1])

    def read(self, tensor, ours, layer):
        padding = ours[0][0] - tensor.shape[0]
        return [np.pad(tensor, ((0, padding), (0, 0))) if padding else tensor]

    def write(self, arrays, config, layer):
        return arrays[0][: config.vocab_size]


class VocabularyTranspose(Transform):
    """[vocab_size, D] <-> [D, padded]."""

    def shape(self, ours, config):
        return (config.vocab_size, ours[0][0])

    def read(self, tensor, ours, layer):
        padding = ours[0][1] - tensor.shape[0]
        return [np.pad(tensor.T, ((0, 0), (0, padding))) if padding else tensor.T]

    def write(self, arrays, config, layer):
        return arrays[0][:, : config.vocab_size].T


class Concatenated(Transform):
    """[out 1 + out 2 + ..., in] <-> [in, out 1], [in, out 2], ... (Phi-3)."""

    def shape(self, ours, config):
        return (sum(shape[1] for shape in ours), ours[0][0])

    def read(self, tensor, ours, layer):
        bounds = np.cumsum([shape[1] for shape in ours])[:-1]
        return [part.T for part in np.split(tensor, bounds)]

    def write(self, arrays, config, layer):
        return np.concatenate([array.T for array in arrays])


class Interleaved(Transform):
    """[heads x (query, key, value) x head_dim, in] <-> three [in, heads x head_dim] (GPT-NeoX).

    The bias is the same without `in`.
    """

    def shape(self, ours, config):
        return (3 * ours[0][-1], *ours[0][:-1])

    def read(self, tensor, ours, layer):
        assert layer is not None
        parts = tensor.reshape(layer.attention.num_heads, 3, layer.attention.head_dim, -1)
        return [parts[:, i].reshape(shape[::-1]).T for i, shape in enumerate(ours)]

    def write(self, arrays, config, layer):
        assert layer is not None
        heads = (layer.attention.num_heads, layer.attention.head_dim, -1)
        parts = np.stack([array.T.reshape(heads) for array in arrays], axis=1)
        return parts.reshape(3 * arrays[0].shape[-1], *arrays[0].shape[:-1])


@dataclasses.dataclass(frozen=True)
class Rotated(Transform):
    """[out, in] <-> [in, out], or [out] <-> [out], of latent attention: rotated pairs as halves.

    The rotated dimensions are the last of each head. Theirs lie in pairs (0, 1), (2, 3), ..., as
    the angles do; ours are first all pairs' first ones, then all second ones.

    Attributes:
      shared: there is one head (the key that all share, after the latent).
    """

    shared: bool = False

    def shape(self, ours, config):
        return ours[0][::-1]

    def read(self, tensor, ours, layer):
        return [tensor[self._order(tensor.shape[0], layer)].T]

    def write(self, arrays, config, layer):
        theirs = arrays[0].T
        return theirs[np.argsort(self._order(theirs.shape[0], layer))]

    def _order(self, count: int, layer: Layer | None) -> np.ndarray:
        """Which of their rows each of ours is."""
        assert layer is not None and layer.attention.latent is not None
        heads = 1 if self.shared else layer.attention.num_heads
        rows = np.arange(count).reshape(heads, -1)
        kept, rotated = np.split(rows, [-layer.attention.latent.rope_dim], axis=1)
        return np.concatenate([kept, rotated[:, ::2], rotated[:, 1::2]], axis=1).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of their tensors.

    Attributes:
      name: theirs; `{i}` is the layer.
      ours: paths of our weights, as `attention/query`.
      transform: between them.
      aliases: names it also goes by; read, never written.
    """

    name: str
    ours: tuple[str, ...]
    transform: Transform = Transform()
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """The entries of a family; one whose weights the configuration does not have is left out.

    Attributes:
      entries: of the model and of every layer.
      ignored: regular expressions of tensors such files may hold besides (buffers, not weights).
    """

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def _norm(name: str, ours: str) -> tuple[Entry, ...]:
    return (Entry(f"{name}.weight", (f"{ours}/scale",)), Entry(f"{name}.bias", (f"{ours}/bias",)))


def _linear(name: str, ours: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{name}.weight", (ours,), Transpose()),
        Entry(f"{name}.bias", (f"{ours}_bias",)),
    )


_L = "model.layers.{i}."
_EMBED = Entry("model.embed_tokens.weight", ("embed",), Vocabulary())
_OUTPUT = Entry("lm_head.weight", ("output",), VocabularyTranspose())
_OUTSIDE = (_EMBED, *_norm("model.norm", "norm"), _OUTPUT)
_OUT = _linear(_L + "self_attn.o_proj", "attention/out")
_DOWN = _linear(_L + "mlp.down_proj", "feed_forward/down")
_BLOCKS = (
    *_linear(_L + "self_attn.q_proj", "attention/query"),
    *_linear(_L + "self_attn.k_proj", "attention/key"),
    *_linear(_L + "self_attn.v_proj", "attention/value"),
    *_OUT,
    *_linear(_L + "mlp.gate_proj", "feed_forward/gate"),
    *_linear(_L + "mlp.up_proj", "feed_forward/up"),
    *_DOWN,
)
_QK_NORM = (
    Entry(_L + "self_attn.q_norm.weight", ("attention/query_norm",)),
    Entry(_L + "self_attn.k_norm.weight", ("attention/key_norm",)),
)
_PRE = (
    *_norm(_L + "input_layernorm", "attention_norm"),
    *_norm(_L + "post_attention_layernorm", "feed_forward_norm"),
)
_POST = (
    *_norm(_L + "post_attention_layernorm", "attention_post_norm"),
    *_norm(_L + "post_feedforward_layernorm", "feed_forward_post_norm"),
)
_BOTH = (
    *_norm(_L + "input_layernorm", "attention_norm"),
    *_norm(_L + "pre_feedforward_layernorm", "feed_forward_norm"),
    *_POST,
)
_PHI3_BLOCKS = (
    Entry(
        _L + "self_attn.qkv_proj.weight",
        ("attention/query", "attention/key", "attention/value"),
        Concatenated(),
    ),
    *_OUT,
    Entry(_L + "mlp.gate_up_proj.weight", ("feed_forward/gate", "feed_forward/up"), Concatenated()),
    *_DOWN,
)

_A = _L + "self_attn."
_LATENT_BLOCKS = (
    Entry(_A + "q_proj.weight", ("attention/query",), Rotated()),
    *_linear(_A + "q_a_proj", "attention/query_down"),
    Entry(_A + "q_a_layernorm.weight", ("attention/query_norm",)),
    Entry(_A + "q_b_proj.weight", ("attention/query_up",), Rotated()),
    Entry(_A + "kv_a_proj_with_mqa.weight", ("attention/key_value_down",), Rotated(shared=True)),
    Entry(_A + "kv_a_proj_with_mqa.bias", ("attention/key_value_down_bias",), Rotated(shared=True)),
    Entry(_A + "kv_a_layernorm.weight", ("attention/key_value_norm",)),
    Entry(_A + "kv_b_proj.weight", ("attention/key_value_up",), Transpose()),
    *_OUT,
    *_linear(_L + "mlp.gate_proj", "feed_forward/gate"),
    *_linear(_L + "mlp.up_proj", "feed_forward/up"),
    *_DOWN,
)

_X = "gpt_neox.layers.{i}."
_NEOX = (
    Entry("gpt_neox.embed_in.weight", ("embed",), Vocabulary()),
    *_norm("gpt_neox.final_layer_norm", "norm"),
    Entry("embed_out.weight", ("output",), VocabularyTranspose(), ("lm_head.weight",)),
    *_norm(_X + "input_layernorm", "attention_norm"),
    *_norm(_X + "post_attention_layernorm", "feed_forward_norm"),
    Entry(
        _X + "attention.query_key_value.weight",
        ("attention/query", "attention/key", "attention/value"),
        Interleaved(),
    ),
    Entry(
        _X + "attention.query_key_value.bias",
        ("attention/query_bias", "attention/key_bias", "attention/value_bias"),
        Interleaved(),
    ),
    *_linear(_X + "attention.dense", "attention/out"),
    *_linear(_X + "mlp.dense_h_to_4h", "feed_forward/up"),
    *_linear(_X + "mlp.dense_4h_to_h", "feed_forward/down"),
)

TABLES: Mapping[str, Table] = {
    "llama": Table((*_OUTSIDE, *_PRE, *_BLOCKS)),
    "mistral": Table((*_OUTSIDE, *_PRE, *_BLOCKS)),
    "qwen2": Table((*_OUTSIDE, *_PRE, *_BLOCKS)),
    "qwen3": Table((*_OUTSIDE, *_PRE, *_BLOCKS, *_QK_NORM)),
    "gemma2": Table((*_OUTSIDE, *_BOTH, *_BLOCKS)),
    "gemma3": Table((*_OUTSIDE, *_BOTH, *_BLOCKS, *_QK_NORM)),
    "olmo2": Table((*_OUTSIDE, *_POST, *_BLOCKS, *_QK_NORM)),
    "phi3": Table((*_OUTSIDE, *_PRE, *_PHI3_BLOCKS)),
    "deepseek_v2": Table((*_OUTSIDE, *_PRE, *_LATENT_BLOCKS)),
    "deepseek_v3": Table((*_OUTSIDE, *_PRE, *_LATENT_BLOCKS)),
    "gpt_neox": Table(
        _NEOX, (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)
    ),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of our weights is: a path of the stacked tree and, in a stack, the repeat.

    Attributes:
      path: as `stacks/0/layers/2/attention/query`.
      stack, position, repeat: of a layer's weight; None outside the layers.
      field: path within `LayerWeights` or `ModelWeights`.
      shape: of the weight itself, without the dimension of repeats.
    """

    path: str
    field: str
    shape: Shape
    stack: int | None = None
    position: int = 0
    repeat: int = 0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of their tensors, and ours that are in it."""

    name: str
    aliases: tuple[str, ...]
    shape: Shape
    places: tuple[Place, ...]
    transform: Transform
    layer: Layer | None


def attribute(tree: Any, field: str) -> Any:
    """The attribute at a path as `attention/query`, or None where the path ends early."""
    for name in field.split("/"):
        tree = getattr(tree, name, None)
    return tree


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the Hugging Face file of a model, layer by layer.

    Raises:
      ValueError: the family has no table, or a weight of the model has no place in it.
    """
    if config.family not in TABLES:
        raise ValueError(
            f"family {config.family!r} has no Hugging Face table; use {', '.join(TABLES)}"
        )
    entries = TABLES[config.family].entries
    specs = param_specs(config)
    for entry in entries:
        if "{i}" not in entry.name:
            found = _tensor(entry, entry.name, specs, Place("", "", ()), "", None, config)
            if found:
                yield found
    index = 0
    for s, stack in enumerate(config.stacks):
        for i, layer in enumerate(stack.layers):
            repeat, position = divmod(i, len(stack.pattern))
            layer_spec = layer_specs(layer, config.embed_dim, config.num_layers)
            base = Place("", "", (), s, position, repeat)
            prefix = f"stacks/{s}/layers/{position}/"
            for entry in entries:
                if "{i}" in entry.name:
                    name = entry.name.format(i=index)
                    found = _tensor(entry, name, layer_spec, base, prefix, layer, config)
                    if found:
                        yield found
            index += 1


def _tensor(
    entry: Entry,
    name: str,
    specs: Any,
    base: Place,
    prefix: str,
    layer: Layer | None,
    config: ModelConfig,
) -> Tensor | None:
    """The tensor of an entry, or None where the model has no such weight."""
    found = [attribute(specs, field) for field in entry.ours]
    if any(spec is None for spec in found):
        return None
    places = tuple(
        dataclasses.replace(base, path=prefix + field, field=field, shape=spec.shape)
        for field, spec in zip(entry.ours, found, strict=True)
    )
    shape = entry.transform.shape([place.shape for place in places], config)
    return Tensor(name, entry.aliases, shape, places, entry.transform, layer)
