"""Rules: which mesh axes each logical axis is split over, for each kind of array.

One table cannot serve weights and activations: fully sharded data parallelism splits the batch
of an activation and the `embed` axis of a weight over the same mesh axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lm.config.fields import Checked

Table = Mapping[str, tuple[str, ...]]

BATCH = ("slice", "data", "fsdp", "expert")
TOKENS = (*BATCH, "context")  # axes that split tokens


@dataclasses.dataclass(frozen=True)
class Rules:
    """Four tables from logical axis to mesh axes; an axis that is absent is not split.

    Attributes:
      activations: arrays of the forward pass.
      weights: parameters at rest.
      gradients: gradients, as the backward pass leaves them.
      optimizer: optimizer state and the parameter update.
      gathered: logical axes of weights that ZeRO splits and a product needs whole; the others, of
        which each device multiplies by its own part (`ffn`, `experts`), stay split.
    """

    activations: Table
    weights: Table
    gradients: Table
    optimizer: Table
    gathered: tuple[str, ...] = ("embed", "expert_embed")

    def without(self, mesh_axes: Sequence[str]) -> Rules:
        """The rules that split nothing over these mesh axes."""
        tables = (without(table, mesh_axes) for table in self.tables)
        return Rules(*tables, gathered=self.gathered)

    @property
    def tables(self) -> tuple[Table, ...]:
        return self.activations, self.weights, self.gradients, self.optimizer

    def __hash__(self) -> int:
        return hash((self.gathered, *(tuple(sorted(table.items())) for table in self.tables)))


@dataclasses.dataclass(frozen=True)
class Sharding(Checked):
    """How arrays are sharded over the mesh.

    Attributes:
      zero: ZeRO stage over `zero_axes`.
      sequence_parallel: between blocks, split the sequence over `tensor`.
      zero_axes: mesh axes that ZeRO shards the state over. On a TPU pod, `fsdp,data` with each as
        long as one dimension of the torus moves half of the gradients' bytes of one long `fsdp`.
      context: how attention crosses the mesh axis `context`, see `lm.parallel.context`; None for
        "zigzag" where that axis is larger than 1.
    """

    zero: Literal[0, 1, 2, 3] = 3
    sequence_parallel: bool = False
    zero_axes: tuple[str, ...] = ("fsdp",)
    context: Literal["zigzag", "ring", "ulysses"] | None = None


def make_rules(
    zero: int = 3, sequence_parallel: bool = False, zero_axes: tuple[str, ...] = ("fsdp",)
) -> Rules:
    """Tensor parallelism over `tensor` and ZeRO (arXiv:1910.02054) stage `zero` over `zero_axes`.

    Args:
      zero: 0 replicates everything over `zero_axes`; 1 shards the optimizer state, 2 also the
        gradients, 3 also the weights.
      sequence_parallel: between blocks, also split the sequence over `tensor` (arXiv:2205.05198).
      zero_axes: mesh axes ZeRO shards the state over, fastest interconnect first, all of them axes
        that split tokens. Weights are gathered, and gradients scattered, over one of them at a
        time: where each is one dimension of a torus, a TPU's links carry half of what they would
        for one large axis (its compiler makes an all-reduce of a reduce-scatter over several
        dimensions). The weights of experts, already split over `expert`, take the others
        (`expert_embed`); dense weights are replicated over `expert` unless it is named here.

    Raises:
      ValueError: `zero` is not 0, 1, 2 or 3, or `zero_axes` are not different axes of the tokens.
    """
    if zero not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO stage {zero} does not exist; use 0, 1, 2 or 3")
    if not zero_axes or len({*zero_axes} & {*TOKENS}) != len(zero_axes):
        raise ValueError(f"zero_axes={zero_axes} must be different ones of {', '.join(TOKENS)}")
    tensor = dict.fromkeys(("heads", "kv_heads", "ffn", "vocab"), ("tensor",))
    tensor |= {"layers": ("stage",), "experts": ("expert",)}
    of_experts = tuple(axis for axis in zero_axes if axis != "expert")
    sharded = tensor | {"embed": tuple(zero_axes), "expert_embed": of_experts}
    activations = {
        "batch": BATCH,
        "sequence": ("context",),
        "residual_sequence": ("context", "tensor") if sequence_parallel else ("context",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "ffn": ("tensor",),
        "vocab": ("tensor",),
    }
    return Rules(
        activations=activations,
        weights=sharded if zero >= 3 else tensor,
        gradients=sharded if zero >= 2 else tensor,
        optimizer=sharded if zero >= 1 else tensor,
    )


def without(
    table: Table, mesh_axes: Sequence[str], logical_axes: Sequence[str] | None = None
) -> Table:
    """The table that does not split over these mesh axes: all of it, or these logical axes."""
    return {
        name: tuple(a for a in axes if a not in mesh_axes)
        if logical_axes is None or name in logical_axes
        else axes
        for name, axes in table.items()
    }


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def partition_spec(
    table: Table, logical_axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; mesh axes of size 1 are left out.

    Raises:
      ValueError: two logical axes want one mesh axis, or a size of `shape` does not divide.
    """
    entries: list[tuple[str, ...] | str | None] = []
    owner: dict[str, str] = {}
    for i, logical in enumerate(logical_axes):
        axes = tuple(a for a in table.get(logical or "", ()) if mesh.shape[a] > 1)
        for axis in axes:
            if axis in owner:
                raise ValueError(
                    f"mesh axis {axis!r} would split both {owner[axis]!r} and {logical!r} of "
                    f"{tuple(logical_axes)}; give one of them another mesh axis in the rules"
                )
            owner[axis] = str(logical)
        if axes and shape is not None:
            check_divides(mesh, axes, str(logical), shape[i])
        entries.append(axes[0] if len(axes) == 1 else (axes or None))
    return PartitionSpec(*entries)


def check_divides(mesh: Mesh, axes: str | Sequence[str], name: str, size: int) -> None:
    """Raises ValueError, naming the sizes that work, unless the mesh axes divide `size`."""
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    parts = int(np.prod([mesh.shape[axis] for axis in axes]))
    if size % parts == 0:
        return
    label = " x ".join(f"{axis!r}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
    plural = "axes" if " x " in label else "axis"
    verb = "do" if plural == "axes" else "does"
    options = sizes(size, lambda d: size % d == 0)
    raise ValueError(f"mesh {plural} {label} {verb} not divide {name}={size}; use {options}")


def sizes(limit: int, works: Callable[[int], bool]) -> str:
    """The sizes from 1 to `limit` that work, as an error lists them: `1, 2 or 4`."""
    found = [str(d) for d in range(1, min(limit, 1024) + 1) if works(d)]
    return " or ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))
