"""Writing to pages as a Pallas TPU kernel, in place.

XLA's scatter into pages copies the whole pool, and lays it out otherwise, where many tokens or
narrow types are written. Here the grid goes over the tiles of rows that get new ones; each is read,
changed and written back, all heads at once.

Shape suffixes as in `pages`; I tiles, t rows of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.paged_attention.pages import LANES, PageBatch, Pages, new_rows
from lm.kernels.paged_attention.tpu_blocks import check_sizes


class Tiles(NamedTuple):
    """What the grid goes over. All int32 [I]; `tokens` int32 [I, t].

    Attributes:
      pages, places: page, and which of its tiles. Where nothing is to do, those of the tile before,
        which then stays where it is.
      fresh: 1 where the tile is not the one before.
      begins, ends: rows of the tile that are new.
      tokens: places in the flat batch, N for none.
    """

    pages: jax.Array
    places: jax.Array
    fresh: jax.Array
    begins: jax.Array
    ends: jax.Array
    tokens: jax.Array


def make_tiles(pages: Pages, batch: PageBatch, num_tokens: int, size: int) -> Tiles:
    """The tiles of `size` rows that the new tokens touch."""
    P, _, p, _ = pages.data.shape
    B, M = batch.page_table.shape
    kv_lens, starts, lens = batch.kv_lens, batch.starts, batch.lens
    firsts = kv_lens - lens
    counts = jnp.where(lens > 0, (kv_lens - 1) // size - firsts // size + 1, 0)
    if batch.max_q_len == 1:
        rows, index = jnp.arange(B, dtype=jnp.int32), jnp.zeros(B, jnp.int32)
        live = lens > 0
    else:
        stops = jnp.cumsum(counts)
        num = min(num_tokens, num_tokens // size + 2 * B)
        i = jnp.arange(num, dtype=jnp.int32)
        rows = jnp.searchsorted(stops, i, side="right", method="compare_all")
        rows = jnp.minimum(rows, B - 1).astype(jnp.int32)
        index, live = i - (stops - counts)[rows], i < stops[-1]
    begin = (firsts[rows] // size + index) * size  # position of the tile's first row
    page = batch.page_table[rows, jnp.clip(begin // p, 0, M - 1)]
    live &= (begin >= 0) & (begin < M * p) & (page >= 0) & (page < P)
    begins = jnp.maximum(firsts[rows] - begin, 0)
    ends = jnp.where(live, jnp.minimum(kv_lens[rows] - begin, size), 0)
    i = jnp.arange(len(rows), dtype=jnp.int32)
    source = jax.lax.cummax(jnp.where(live, i, -1))
    source = jnp.where(source < 0, jnp.argmax(live), source)
    page, place = jnp.clip(page, 0, P - 1)[source], (begin % p // size)[source]
    same = (page[1:] == page[:-1]) & (place[1:] == place[:-1])
    fresh = jnp.concatenate([jnp.ones(1, jnp.int32), 1 - same.astype(jnp.int32)])
    if batch.max_q_len == 1:
        tokens = starts[:, None]
    else:
        offsets = begin[:, None] + jnp.arange(size, dtype=jnp.int32) - firsts[rows][:, None]
        tokens = starts[rows][:, None] + offsets
        tokens = jnp.where((offsets >= 0) & (offsets < lens[rows][:, None]), tokens, num_tokens)
    return Tiles(page, place, fresh, begins, ends, tokens)


def tpu_write_pages(
    pages: Pages, keys: jax.Array, values: jax.Array | None, batch: PageBatch,
    *, chip: str | None = None, interpret: Any = False,
) -> Pages:  # fmt: skip
    """See `lm.kernels.paged_attention.write_pages`."""
    check_sizes(pages, batch.page_table, chip)
    _, K, _, W = pages.data.shape
    size = 32 // pages.data.dtype.itemsize if pages.scales is None else LANES
    tiles = make_tiles(pages, batch, len(keys), size)
    new, new_scales = new_rows(pages, keys, values)
    t = tiles.tokens.shape[1]

    def at(i: jax.Array, page: jax.Array, place: jax.Array, *_: jax.Array):
        return page[i], 0, place[i], 0

    def scales_at(i: jax.Array, page: jax.Array, place: jax.Array, *_: jax.Array):
        return page[i], 0, 0, place[i]

    def new_at(i: jax.Array, *_: jax.Array):
        return i, 0, 0, 0

    def gathered(x: jax.Array) -> jax.Array:
        return x.at[tiles.tokens].get(mode="fill", fill_value=0)

    data_spec = pl.BlockSpec((1, K, size, W), at)
    operands = [gathered(new).swapaxes(1, 2), pages.data]
    in_specs, out_specs = [pl.BlockSpec((1, K, t, W), new_at), data_spec], [data_spec]
    if pages.scales is not None:
        assert new_scales is not None
        scales_spec = pl.BlockSpec((1, 2, K, size), scales_at)
        operands += [jnp.moveaxis(gathered(new_scales), 1, 3), pages.scales]
        in_specs += [pl.BlockSpec((1, 2, K, t), new_at), scales_spec]
        out_specs += [scales_spec]
    scalars = tiles[:-1]
    num = len(tiles.tokens)
    aliases = {len(scalars) + 1 + 2 * i: i for i in range(len(out_specs))}
    moved = 2 * num * K * size * W * pages.data.dtype.itemsize
    out = pl.pallas_call(
        functools.partial(_kernel, size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(num,), in_specs=in_specs, out_specs=out_specs
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[1::2]],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name="write_pages",
    )(*(s.astype(jnp.int32) for s in scalars), *operands)
    return dataclasses.replace(pages, data=out[0], scales=out[1] if len(out) > 1 else None)


def _kernel(size: int, pages, places, fresh, begins, ends, *refs) -> None:
    del pages, places
    item = pl.program_id(0)
    num = len(refs) // 3
    begin, end = begins[item], ends[item]
    for i, out_ref in enumerate(refs[2 * num :]):
        new_ref, old_ref = refs[2 * i : 2 * i + 2]

        @pl.when(fresh[item] == 1)
        def _(out_ref=out_ref, old_ref=old_ref) -> None:
            out_ref[...] = old_ref[...]

        # Scales [1, 2, K, t] at once, rows [1, K, t, W] head by head: of all of them the compiler
        # would spill more than some chips hold.
        def merge(head: Any, _: None, out_ref=out_ref, new_ref=new_ref, rows=i == 0) -> None:
            at = (slice(None), pl.ds(head, 1)) if rows else ...
            # Through float32, exactly: narrow types are not selected from on every chip.
            old = out_ref[at].astype(jnp.float32)
            row = jax.lax.broadcasted_iota(jnp.int32, old.shape, 2 if rows else 3)
            new = jnp.broadcast_to(new_ref[at].astype(jnp.float32), old.shape)
            merged = jnp.where((row >= begin) & (row < end), new, old)
            out_ref[at] = merged.astype(out_ref.dtype)

        @pl.when(end > begin)
        def _(merge=merge, heads=out_ref.shape[1] if i == 0 else 1) -> None:
            jax.lax.fori_loop(0, heads, merge, None)
