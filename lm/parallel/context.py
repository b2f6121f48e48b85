"""Context parallelism: rows longer than a device holds, split along the sequence.

An attention function for each way, handed to the model's forward in place of
`lm.kernels.attention.attention`; outside of attention every token stands for itself, and the rules
alone split the sequence. Both read the layout in force and work with any of its other axes: the
batch is split over those of the rules' `batch`, heads over `tensor`, the sequence over `context`.

What one layer sends, per device, forward and backward together, in elements of two bytes (keys and
values travel in the model's dtype, their gradients in float32), with B rows and H query heads, K
key/value heads of size h on the device, T tokens of a row, n devices of `context`:

  ring     (n - 1) / n * B T K h * (4 + 4 + 8) bytes    keys and values twice, gradients once
  ulysses  (n - 1) / n * B T h / n * 8 (H + max(K, n)) bytes    q, k, v and the result, both ways

The ring sends 2 K n / (H + max(K, n)) times as much: Llama 3's 8 of 32 heads, n = 8: 3.2 times. But
it works on one chunk while the next one travels, so that it waits only where a chunk is short: a
chunk of c tokens takes 2 B c^2 H h operations forward, half of it masked, for 4 B c K h bytes sent,
so nothing is waited for from c = 2 (K / H) * operations a second / bytes a second of a link: 2,600
tokens on TPU v5p (459e12, 90e9), 5,100 on v6e (918e12, 90e9). Ulysses waits for all it sends, but
runs the ordinary attention on whole rows, which knows masks exactly, balances windows and packing,
and needs no reordering.

So: Ulysses where H is a multiple of n and the row is short, or where most layers have a window;
the ring, in `zigzag` order, beyond, for it has no bound on n. Where most layers have a small window
the ring without zigzag talks to neighbours only: see `ring_attention`.

Sources: ring attention arXiv:2310.01889, its balanced order arXiv:2311.09431 and Llama 3
(arXiv:2407.21783, section 3.3.2), Ulysses arXiv:2309.14509.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh, PartitionSpec

from lm.sharding import Layout, current_layout, partition_spec


class Context(NamedTuple):
    """The mesh axes that split the sequence.

    Attributes:
      layout: mesh and rules.
      axes: their names.
      size: devices along them.
    """

    layout: Layout
    axes: tuple[str, ...]
    size: int

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh

    @property
    def label(self) -> str:
        """As errors name it: mesh axis 'context'=8."""
        return "mesh axis " + " x ".join(f"{a!r}={self.mesh.shape[a]}" for a in self.axes)

    def spec(self, shape: tuple[int, ...], *logical_axes: str | None) -> PartitionSpec:
        """How an activation lies. Errors as `partition_spec`."""
        return partition_spec(self.layout.rules.activations, logical_axes, self.mesh, shape)

    def part(self, name: str, size: int) -> int:
        """`size` on one device, for a logical axis that the rules divide."""
        axes = self.layout.rules.activations.get(name, ())
        return size // math.prod(self.mesh.shape[a] for a in axes)


def current_context() -> Context | None:
    """The axes that split the sequence in the layout in force; None where nothing does."""
    layout = current_layout()
    if layout is None:
        return None
    axes = tuple(
        a for a in layout.rules.activations.get("sequence", ()) if layout.mesh.shape[a] > 1
    )
    size = math.prod(layout.mesh.shape[a] for a in axes)
    return Context(layout, axes, size) if size > 1 else None


def divisors(limit: int, works: Callable[[int], bool]) -> str:
    """The sizes of `context` up to `limit` that work, to be named in an error."""
    found = [str(d) for d in range(1, min(limit, 1024) + 1) if works(d)]
    return " or ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))
