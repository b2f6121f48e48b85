"""Frozen weights by reference: their path and a digest.

The digest covers names, shapes, dtypes and every bit, whatever the mesh: it is a sum over elements
of a hash of (bits, position), in integers, so each device adds its own shard and nothing is
gathered. 64 bits per array protect against accidents, not against adversaries.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.checkpoints.names import describe, flatten

SEEDS = (0x9E3779B9, 0x85EBCA6B)


def _mix(x: jax.Array) -> jax.Array:
    """An avalanche of 32 bits: MurmurHash3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32 (two of them, in a last dimension, for 64-bit types)."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    width = jax.dtypes.itemsize_bits(x.dtype)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
    """uint32 [2] of an array."""
    bits = _bits(x)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, axis
        )
    return jnp.stack(
        [jnp.sum(_mix(bits ^ _mix(position ^ jnp.uint32(seed)))) for seed in SEEDS]
    ).astype(jnp.uint32)


@functools.cache
def _compiled(sharding: Any) -> Any:
    if isinstance(sharding, NamedSharding):
        return jax.jit(_hash, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(_hash)


def digest(leaves: Mapping[str, Any]) -> str:
    """Digest of arrays by name: equal for the same bits on any mesh, as 32 hexadecimal digits."""
    whole = hashlib.blake2b(digest_size=16)
    for name, leaf in sorted(leaves.items()):
        low, high = np.asarray(_compiled(getattr(leaf, "sharding", None))(leaf)).tolist()
        whole.update(f"{name} {describe(leaf)} {high:08x}{low:08x}\n".encode())
    return whole.hexdigest()


@dataclasses.dataclass(frozen=True)
class Reference:
    """Weights stored elsewhere.

    Attributes:
      path: a checkpoint or model directory; a relative path starts at the directory of the
        checkpoint that refers to it, so that both can move together.
      digest: the weights' `digest`.
    """

    path: str
    digest: str

    @classmethod
    def of(cls, path: Any, frozen: Any) -> Reference:
        """The reference to the weights `frozen` (a tree with None where a weight trains)."""
        return cls(str(path), digest(flatten(frozen)))
