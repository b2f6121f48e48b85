"""How the values of one Hugging Face tensor are arranged in one or more of our weights.

Their matrices are `[out, in]`, ours `[in, out]`. A transform only moves data; no value changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.model import Layer, ModelConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """The identity: their tensor is our weight."""

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


@dataclasses.dataclass(frozen=True)
class Vocabulary(Transform):
    """[vocab_size, D] <-> [padded, D]: padding rows are zeros when read, and not written.

    Attributes:
      transposed: ours is [D, padded].
    """

    transposed: bool = False

    def shape(self, ours, config):
        return (config.vocab_size, ours[0][0 if self.transposed else 1])

    def read(self, tensor, ours, layer):
        padding = ours[0][1 if self.transposed else 0] - tensor.shape[0]
        rows = np.pad(tensor, ((0, padding), (0, 0))) if padding else tensor
        return [rows.T if self.transposed else rows]

    def write(self, arrays, config, layer):
        rows = arrays[0].T if self.transposed else arrays[0]
        return rows[: config.vocab_size]


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

    The rotated dimensions are the last of each head. In their files pairs are neighbours,
    (0, 1), (2, 3), ...; ours has the first dimension of every pair, then the second of every pair.

    Attributes:
      shared: there is one head (the rotated key that all heads share, after the latent).
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
        """For each of our rows, the number of theirs."""
        assert layer is not None and layer.attention.latent is not None
        heads = 1 if self.shared else layer.attention.num_heads
        rows = np.arange(count).reshape(heads, -1)
        kept, rotated = np.split(rows, [-layer.attention.latent.rope_dim], axis=1)
        return np.concatenate([kept, rotated[:, ::2], rotated[:, 1::2]], axis=1).reshape(-1)
