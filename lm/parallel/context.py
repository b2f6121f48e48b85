"""Context parallelism: rows longer than a device holds, split along the sequence.

An attention function for each strategy, given to the model's forward in place of
`lm.kernels.attention.attention`; outside attention tokens do not interact, and the rules alone
split the sequence. Both read the layout in force and work with any of its other axes: the batch is
split over the rules' `batch`, heads over `tensor`, the sequence over `context`.

Bytes that one layer sends per device, forward and backward together, with two bytes per element
except for the keys' gradients in float32; B rows, H query and K key/value heads of size h on the
device, T tokens per row, n devices of `context`:

  ring     B T K h ((n - 1) / n (4 + 4 + 8) + 4 / n)    keys and values twice, gradients once
  Ulysses  B T h (n - 1) / n 8 (H + max(K, n)) / n    q, k, v and the result, and their gradients

The ring sends about 2 K n / (H + max(K, n)) times as much: with Llama 3's 32 and 8 heads 3.2 times
at n = 8. But it works on one chunk while the next one travels, and waits only where chunks are
short: a chunk of c tokens takes 2 B c^2 H h operations forward (half of the scores are masked)
while 4 B c K h bytes arrive, so nothing waits from c = 2 K / H x operations per second / bytes per
second of a link: 2,300 tokens on TPU v5p, 4,600 on v6e. Ulysses waits for all that it sends, but
runs ordinary attention on whole rows: documents, padding and windows are balanced, and tokens stay
in order.

So: Ulysses where n divides H and chunks are short, or where rows are packed with many documents,
whose masks zigzag cannot balance; the ring in zigzag order for longer rows, as n is not bounded by
heads. Where nearly all layers have a window, the ring without zigzag: such a layer communicates
with its neighbours only.

Sources: ring attention arXiv:2310.01889, its balanced order arXiv:2311.09431 and Llama 3
(arXiv:2407.21783, section 3.3.2), Ulysses arXiv:2309.14509.
"""

from __future__ import annotations

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
        """How an activation is sharded. Errors as `partition_spec`."""
        return partition_spec(self.layout.rules.activations, logical_axes, self.mesh, shape)


def current_context() -> Context | None:
    """The axes that split the sequence in the layout in force; None where nothing does."""
    layout = current_layout()
    if layout is None or layout.parts("sequence") == 1:
        return None
    axes = tuple(a for a in layout.rules.activations["sequence"] if layout.mesh.shape[a] > 1)
    return Context(layout, axes, layout.parts("sequence"))
