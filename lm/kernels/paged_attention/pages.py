"""Pages of keys and values.

A token's key and value of one head are stored side by side in one row, so that one copy brings a
page of all heads, and heads of 64 fill a TPU's 128 lanes. Latent attention (MLA, arXiv:2405.04434)
has rows whose first lanes are key and value at once. Rows are zero-padded to multiples of 128
lanes: a TPU pads them anyway, and arrays that are not are laid out differently and copied per call.

Shape suffixes: P pages of the pool, K key/value heads, p tokens of a page, W lanes of a row, N
tokens of a flat batch, B sequences, M most pages of a sequence.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

LANES = 128
QUANTIZED = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}  # largest value


@flax.struct.dataclass
class Pages:
    """The keys and values of one layer, of all sequences.

    Attributes:
      data: [P, K, p, W]. A row is a key of `key_dim` lanes, then a value of `value_dim`; latent, it
        is a key whose first `value_dim` lanes are the value.
      scales: float32 [P, 2, K, p] for int8 and float8_e4m3fn data, else None: what each token's row
        of a head is multiplied by, one for the lanes before `split` and one for those after, which
        are key and value, or the latent and its rotary part.
      key_dim, value_dim: lanes of a key and of a value.
      latent: whether the value is the beginning of the key.
    """

    data: Any
    scales: Any = None
    key_dim: int = flax.struct.field(pytree_node=False, default=0)
    value_dim: int = flax.struct.field(pytree_node=False, default=0)
    latent: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def split(self) -> int:
        return self.value_dim if self.latent else self.key_dim

    @property
    def value_lanes(self) -> slice:
        start = 0 if self.latent else self.key_dim
        return slice(start, start + self.value_dim)

    @property
    def page_size(self) -> int:
        return self.data.shape[2]


@flax.struct.dataclass
class PageBatch:
    """Where the new tokens of a flat batch of sequences stand, once for all layers.

    Attributes:
      page_table: int32 [B, M], pages of each sequence in order. Entries before a window or behind
        the sequence's end are not read; -1 for none.
      kv_lens: int32 [B], tokens of each sequence, new ones included.
      cu_q_lens: int32 [B + 1], where each sequence's new tokens begin in the batch, and where the
        last's end.
      q_lens: int32 [B], new tokens of each, where they are fewer than from one beginning to the
        next; the rest is padding. None where there is none.
      max_q_len: the most new tokens of a sequence, where it is known; 1 for decoding.
    """

    page_table: Any
    kv_lens: Any
    cu_q_lens: Any
    q_lens: Any = None
    max_q_len: int | None = flax.struct.field(pytree_node=False, default=None)

    def check(self) -> None:
        """Raises ValueError for shapes that disagree, or that are not of integers."""
        fields = ("page_table", "kv_lens", "cu_q_lens", "q_lens")
        given = {name: x for name in fields if (x := getattr(self, name)) is not None}
        B = self.page_table.shape[0] if self.page_table.ndim == 2 else None
        if B is None or self.kv_lens.shape != (B,) or self.cu_q_lens.shape != (B + 1,):
            raise ValueError(
                f"page_table {self.page_table.shape}, kv_lens {self.kv_lens.shape}, cu_q_lens "
                f"{self.cu_q_lens.shape}; give [B, M], [B] and [B + 1] of one B"
            )
        if self.q_lens is not None and self.q_lens.shape != (B,):
            raise ValueError(f"q_lens has shape {self.q_lens.shape}; give one per sequence, [{B}]")
        for name, x in given.items():
            if not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(f"{name} is {x.dtype.name}; give int32")

    @property
    def starts(self) -> Any:
        """int32 [B], where each sequence's new tokens begin."""
        return self.cu_q_lens[:-1]

    @property
    def lens(self) -> Any:
        """int32 [B], new tokens of each sequence."""
        return self.cu_q_lens[1:] - self.starts if self.q_lens is None else self.q_lens


def make_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    latent: bool = False,
    dtype: Any = jnp.bfloat16,
) -> Pages:
    """Empty pages.

    Args:
      num_pages, page_size: of the pool.
      num_kv_heads: of the layer; 1 for latent attention.
      key_dim: size of a key; for latent attention the latent's and the rotary part's together.
      value_dim: size of a value, or of the latent; None for `key_dim`.
      latent: whether the value is the beginning of the key.
      dtype: of the rows; int8 and float8_e4m3fn come with scales.

    Raises:
      ValueError: sizes below one, or a latent that is not one head's, or as wide as its key.
    """
    sizes = {"num_pages": num_pages, "page_size": page_size, "num_kv_heads": num_kv_heads}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}; use 1 or more")
    value_dim = value_dim or key_dim
    if latent and (num_kv_heads != 1 or value_dim >= key_dim):
        raise ValueError(
            f"latent pages with num_kv_heads={num_kv_heads}, key_dim={key_dim}, value_dim="
            f"{value_dim}: latent attention has one head, whose key is the latent and a rotary part"
        )
    width = key_dim if latent else key_dim + value_dim
    width = -(-width // LANES) * LANES
    data = jnp.zeros((num_pages, num_kv_heads, page_size, width), dtype)
    scales = None
    if data.dtype in QUANTIZED:
        scales = jnp.zeros((num_pages, 2, num_kv_heads, page_size), jnp.float32)
    return Pages(data, scales, key_dim, value_dim, latent)


def quantize(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """x [..., h] as `dtype` and float32 scales [...]: absolute maximum, symmetric, nearest even."""
    largest = QUANTIZED[jnp.dtype(dtype)]
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / largest
    values = x / jnp.where(scales == 0, 1.0, scales)[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return jnp.clip(values, -largest, largest).astype(dtype), scales


def new_rows(
    pages: Pages, keys: jax.Array, values: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """(rows [N, K, W], their scales [N, 2, K] or None) as the pages hold them.

    Raises:
      ValueError: sizes are not those of the pages.
    """
    K, W = pages.data.shape[1], pages.data.shape[3]
    if values is not None and values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(f"keys {keys.shape} and values {values.shape}; give [N, K, size] of both")
    new = keys if values is None else jnp.concatenate([keys, values], axis=-1)
    wanted = pages.key_dim + (0 if pages.latent else pages.value_dim)
    if new.shape[1:] != (K, wanted):
        raise ValueError(
            f"new keys and values are [tokens, {K}, {wanted}] for these pages, not {new.shape}"
        )
    new = jnp.pad(new, [(0, 0), (0, 0), (0, W - wanted)])
    if pages.scales is None:
        return new.astype(pages.data.dtype), None
    halves = [quantize(part, pages.data.dtype) for part in jnp.split(new, [pages.split], axis=-1)]
    rows, scales = zip(*halves, strict=True)
    return jnp.concatenate(rows, axis=-1), jnp.stack(scales, axis=1)


def check_tables(page_table: Any, kv_lens: Any, num_pages: int, page_size: int) -> None:
    """Refuses tables that point outside the pool. For host arrays: traced values are unknown.

    Args:
      page_table: int [B, M]; entries behind a sequence's length are not looked at.
      kv_lens: int [B].
      num_pages, page_size: of the pool.

    Raises:
      ValueError: shapes disagree, a length is beyond the table, or a page does not exist.
    """
    table, lens = np.asarray(page_table), np.asarray(kv_lens)
    if table.ndim != 2 or lens.shape != table.shape[:1]:
        raise ValueError(
            f"page_table {table.shape} and kv_lens {lens.shape}; give [B, M] and [B] of one B"
        )
    capacity = table.shape[1] * page_size
    for row, length in enumerate(lens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"kv_lens[{row}]={length} is outside 0..{capacity}, what {table.shape[1]} pages of "
                f"{page_size} hold; widen page_table"
            )
    used = np.arange(table.shape[1])[None] < -(-lens[:, None] // page_size)
    wrong = used & ((table < 0) | (table >= num_pages))
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"page_table[{row}, {column}]={int(table[row, column])} is not a page; there are 0.."
            f"{num_pages - 1}"
        )
