"""Which tensors the Hugging Face file of a model has, and where our weights in them are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lm.formats.common import attribute
from lm.formats.families import family_of
from lm.formats.huggingface.transforms import Shape, Transform
from lm.model import Layer, ModelConfig, ModelWeights, Unstacked
from lm.model.params import layer_specs, param_specs
from lm.weights import is_structured


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of our weights is.

    Attributes:
      field: path within `LayerWeights`, or `ModelWeights` outside the layers.
      shape: of the weight itself, without the dimension of repeats.
      stack: number of its stack; None outside the layers.
      index: number of the layer in its stack.
      position, repeat: of the layer in the stack's pattern, and of the pattern.
    """

    field: str
    shape: Shape
    stack: int | None = None
    index: int = 0
    position: int = 0
    repeat: int = 0

    @property
    def path(self) -> str:
        """In the stacked tree, as `stacks/0/layers/2/attention/query`."""
        if self.stack is None:
            return self.field
        return f"stacks/{self.stack}/layers/{self.position}/{self.field}"

    @property
    def unstacked_path(self) -> str:
        """In the unstacked tree."""
        if self.stack is None:
            return self.field
        return f"stacks/{self.stack}/layers/{self.index}/{self.field}"

    def weight(self, params: ModelWeights) -> Any:
        """The weight, of this layer alone; a leaf of a stacked layer is that of the stack."""
        if self.stack is None:
            return attribute(params, self.field)
        stack = params.stacks[self.stack]
        if isinstance(stack, Unstacked):
            return attribute(stack.layers[self.index], self.field)
        weight = attribute(stack.layers[self.position], self.field)
        return weight if weight is None or is_structured(weight) else weight[self.repeat]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of their tensors, and ours that are in it.

    Attributes:
      layer: it belongs to; None outside the layers.
    """

    name: str
    aliases: tuple[str, ...]
    shape: Shape
    places: tuple[Place, ...]
    transform: Transform
    layer: Layer | None

    def read(self, array: Any, shapes: list[Shape] | None = None) -> list[Any]:
        """Our weights from the tensor; `shapes` are those of `places` unless given."""
        shapes = [place.shape for place in self.places] if shapes is None else shapes
        return self.transform.read(array, shapes, self.layer)


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the Hugging Face file of a model, layer by layer.

    Raises:
      ValueError: the family is unknown.
    """
    entries = family_of(config).huggingface.tensors
    scopes: list[tuple[Any, Place, Layer | None]] = [(param_specs(config), Place("", ()), None)]
    for s, stack in enumerate(config.stacks):
        for i, layer in enumerate(stack.layers):
            repeat, position = divmod(i, len(stack.pattern))
            specs = layer_specs(layer, config.embed_dim, config.num_layers)
            scopes.append((specs, Place("", (), s, i, position, repeat), layer))
    for number, (specs, base, layer) in enumerate(scopes, -1):
        for entry in entries:
            found = [attribute(specs, field) for field in entry.ours]
            if ("{i}" in entry.name) != (layer is not None) or None in found:
                continue
            places = tuple(
                dataclasses.replace(base, field=field, shape=spec.shape)
                for field, spec in zip(entry.ours, found, strict=True)
            )
            shape = entry.transform.shape([place.shape for place in places], config)
            name = entry.name.format(i=number)
            yield Tensor(name, entry.aliases, shape, places, entry.transform, layer)
