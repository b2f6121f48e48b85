"""Ragged paged attention: which implementation runs, and where."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lm.hardware.chips import chip_of
from lm.kernels.attention.scores import Scores
from lm.kernels.attention.sharded import on_tpu, target
from lm.kernels.cpu.paged import cpu_paged_attention, supports
from lm.kernels.paged_attention.pages import PageBatch, Pages
from lm.kernels.paged_attention.reference import (
    reference_paged_attention,
    reference_write_pages,
)
from lm.kernels.paged_attention.tpu import tpu_paged_attention
from lm.kernels.paged_attention.tpu_write import tpu_write_pages
from lm.sharding import Layout, check_divides, current_layout, map_devices

IMPLEMENTATIONS = ("reference", "tpu", "cpu")
MEGACORE = ("TPU v4", "TPU v5p")  # chips that show their two cores as one


def paged_attention(
    q: jax.Array,
    pages: Pages,
    batch: PageBatch,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    implementation: str | None = None,
    interpret: Any = False,
    **blocks: int,
) -> jax.Array:
    """Causal attention of a flat batch of new tokens to their sequences' pages.

    The new tokens are the last of their sequences, and their keys and values are in the pages
    (`write_pages`). Prefill, chunks of it and single tokens may be mixed. Under a layout the heads
    are split as its rules split `kv_heads`, pages alike; one head (latent or multi-query attention)
    is held by every device, and everything is replicated over the other mesh axes.

    Args:
      q: [N, H, h], sequence after sequence; h is `pages.key_dim`.
      pages: the pool; its K heads divide H.
      batch: where the new tokens stand.
      scores: scale, window and soft-cap; causal.
      sinks: [H] scores of a key with no value, added to the denominator.
      implementation: "reference", "tpu" or, for few new tokens per sequence, "cpu"; None for the
        kernel of the layout's devices, where it can do what is asked.
      interpret: run the TPU kernel as plain JAX; or what else `pl.pallas_call` takes.
      blocks: `block_q` and `block_kv` of the TPU kernel, in tokens, and its `cores`.

    Returns:
      [N, H, value_dim] of q's dtype; zeros for padding.

    Raises:
      ValueError: shapes disagree, the scores are not causal, the implementation is unknown or
        cannot hold the table, a page or a block, or the mesh does not divide the heads.
    """
    _check_queries(q, pages, sinks)
    batch.check()
    if not scores.causal:
        raise ValueError("paged attention is causal; give Scores with causal=True")
    chip = _chip()

    def reference(q, pages, batch, sinks):
        return reference_paged_attention(q, pages, batch, scores, sinks)

    def tpu(q, pages, batch, sinks):
        options: Any = {"cores": 2 if chip in MEGACORE else 1} | blocks
        return tpu_paged_attention(
            q, pages, batch, scores, sinks, chip=chip, interpret=interpret, **options
        )

    def cpu(q, pages, batch, sinks):
        return cpu_paged_attention(q, pages, batch, scores, sinks)

    def specs(layout: Layout):
        K = pages.data.shape[1]
        axes = kv_axes = kv_head_axes(layout, K)
        if K == 1:
            table = layout.rules.activations
            axes = tuple(a for a in table.get("heads", ()) if layout.mesh.shape[a] > 1)
            check_divides(layout.mesh, axes, "num_heads", q.shape[1])
        heads = PartitionSpec(None, axes or None)
        of_sinks = None if sinks is None else PartitionSpec(axes or None)
        return (heads, _page_specs(pages, kv_axes), PartitionSpec(), of_sinks), heads

    if implementation is None and _platform() == "cpu" and supports(pages, batch):
        implementation = "cpu"
    kernels = {"tpu": tpu, "cpu": cpu}
    return _dispatch(implementation, reference, kernels, specs, q, pages, batch, sinks)


def write_pages(
    pages: Pages,
    keys: jax.Array,
    values: jax.Array | None,
    batch: PageBatch,
    *,
    implementation: str | None = None,
    interpret: Any = False,
) -> Pages:
    """Put the keys and values of a flat batch of new tokens into their sequences' pages.

    A page must not be another sequence's too where new tokens go. Arguments that are not described
    are those of `paged_attention`, errors too.

    Args:
      keys: [N, K, key_dim].
      values: [N, K, value_dim]; None for latent pages, whose keys hold them.

    Returns:
      The pages, the old ones' memory where it is donated. Padding, positions beyond the table and
      those whose table entry is negative are written nowhere.
    """
    batch.check()
    tpu = functools.partial(tpu_write_pages, chip=_chip(), interpret=interpret)

    def specs(layout: Layout):
        axes = kv_head_axes(layout, pages.data.shape[1])
        heads, of_pages = PartitionSpec(None, axes or None), _page_specs(pages, axes)
        return (of_pages, heads, None if values is None else heads, PartitionSpec()), of_pages

    kernels = {"tpu": tpu, "cpu": reference_write_pages}
    how = implementation, reference_write_pages, kernels, specs
    return _dispatch(*how, pages, keys, values, batch)


def _chip() -> str | None:
    """Name of the chip compiled for, if it is known."""
    device = target()
    chip = None if device is None else chip_of(device.device_kind)
    return None if chip is None else chip.name


def _platform() -> str | None:
    """Platform of the devices compiled for, if it is known."""
    device = target()
    return None if device is None else device.platform


def _dispatch(
    implementation: str | None,
    reference: Any,
    kernels: Mapping[str, Any],
    specs: Any,
    *arguments: Any,
) -> Any:
    """The result of the implementation; of a kernel on each device, by `specs` of a layout.

    Kernels cannot be partitioned by the compiler: each device runs them on the heads it has.
    """
    if implementation is None:
        implementation = "tpu" if on_tpu() else "reference"
    if implementation == "reference":
        return reference(*arguments)
    if kernel := kernels.get(implementation):
        layout = current_layout()
        if layout is None:
            return kernel(*arguments)
        given, result = specs(layout)
        return map_devices(kernel, given, result, layout.mesh)(*arguments)
    raise ValueError(
        f"paged attention implementation {implementation!r} is unknown; use "
        f"{', '.join(IMPLEMENTATIONS)}"
    )


def _check_queries(q: jax.Array, pages: Pages, sinks: jax.Array | None) -> None:
    K = pages.data.shape[1]
    if q.ndim != 3 or q.shape[2] != pages.key_dim:
        raise ValueError(f"q is [tokens, heads, {pages.key_dim}] for these pages, not {q.shape}")
    if q.shape[1] % K:
        raise ValueError(f"num_kv_heads={K} of the pages does not divide num_heads={q.shape[1]}")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks has shape {sinks.shape}; give one per query head, [{q.shape[1]}]")


def kv_head_axes(layout: Layout, num_kv_heads: int) -> tuple[str, ...]:
    """Mesh axes the heads of pages are split over; none for a single head.

    Raises:
      ValueError: the axes do not divide the heads.
    """
    table, mesh = layout.rules.activations, layout.mesh
    axes = tuple(a for a in table.get("kv_heads", ()) if mesh.shape[a] > 1)
    if num_kv_heads == 1 or not axes:
        return ()
    check_divides(mesh, axes, "num_kv_heads", num_kv_heads)
    return axes


def _page_specs(pages: Pages, axes: tuple[str, ...]) -> Pages:
    return dataclasses.replace(
        pages,
        data=PartitionSpec(None, axes or None),
        scales=None if pages.scales is None else PartitionSpec(None, None, axes or None),
    )
