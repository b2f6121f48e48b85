"""Context parallelism: rows longer than a device holds, split along the sequence.

An attention function for each way, handed to the model's forward in place of
`lm.kernels.attention.attention`; outside of attention every token stands for itself, and the rules
alone split the sequence. Both read the layout in force and work with any of its other axes: the
batch is split over those of the rules' `batch`, heads over `tensor`, the sequence over `context`.

What one layer sends, per device, forward and backward together, in bytes, of arrays of two bytes an
element but the keys' gradients in float32; B rows, H query and K key/value heads of size h on the
device, T tokens of a row, n devices of `context`:

  ring     B T K h ((n - 1) / n (4 + 4 + 8) + 4 / n)    keys and values twice, gradients once
  Ulysses  B T h (n - 1) / n 8 (H + max(K, n)) / n    q, k, v and the result, and their gradients

The ring sends about 2 K n / (H + max(K, n)) times as much: with Llama 3's 32 and 8 heads 3.2 times
at n = 8. But it works on one chunk while the next one travels, and waits only where chunks are
short: a chunk of c tokens takes 2 B c^2 H h operations forward (half of the scores are masked)
while 4 B c K h bytes arrive, so nothing is waited for from c = 2 K / H x operations a second /
bytes a second of a link: 2,300 tokens on TPU v5p, 4,600 on v6e. Ulysses waits for all that it
sends, but runs the ordinary attention on whole rows: documents, padding and windows are balanced as
they come, and tokens stay in order.

So: Ulysses where n divides H and chunks are short, or where rows are packed of many documents,
whose masks zigzag cannot balance; the ring in zigzag order for longer rows, as n is not bounded by
heads. Where nearly all layers have a window, the ring without zigzag: such a layer talks to
neighbours only.

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
