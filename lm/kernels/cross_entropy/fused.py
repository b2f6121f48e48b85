"""Cross-entropy fused with its projection: chunks of tokens, the vocabulary split over `tensor`.

Only one chunk's logits are alive at a time, in both passes; the backward pass computes them again.
The `custom_vjp` stands around `shard_map`, each pass being one: inside it, sums over mesh axes
would be differentiated as well, and the gradient come out wrong.

Shape suffixes: N tokens of a device, n tokens of a chunk, D embed_dim, V this device's part of the
padded vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.kernels.matmul import dot
from lm.sharding import Layout, current_layout, partition_spec

CHUNK_BYTES = 8 << 20  # of a chunk's float32 logits: few enough to stay near the cores


class Static(NamedTuple):
    """What is known at trace time."""

    transposed: bool
    vocab_size: int
    softcap: float | None
    chunk: int | None
    layout: Layout | None


def fused_token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    *,
    transposed: bool,
    vocab_size: int,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `lm.kernels.cross_entropy.token_logprobs`; `chunk_tokens` are those of one device."""
    layout = current_layout()
    if hidden.ndim != 3:
        layout = None
    static = Static(transposed, vocab_size, softcap, chunk_tokens, layout)
    return _token_logprobs(hidden, weight.astype(hidden.dtype), targets, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_logprobs(hidden, weight, targets, static: Static):
    return _forward(hidden, weight, targets, static)[0]


def _forward(hidden, weight, targets, static: Static):
    local = functools.partial(_local_forward, static)
    if static.layout is None:
        logprobs, lse = local(hidden, weight, targets)
    else:
        tokens, states, matrix, _ = _specs(static)
        logprobs, lse = jax.shard_map(
            local,
            mesh=static.layout.mesh,
            in_specs=(states, matrix, tokens),
            out_specs=(tokens, tokens),
            check_vma=False,
        )(hidden, weight, targets)
    return (logprobs, lse), (hidden, weight, targets, lse)


def _backward(static: Static, saved, cotangents):
    hidden, weight, targets, lse = saved
    local = functools.partial(_local_backward, static)
    arguments = (hidden, weight, targets, lse, *cotangents)
    if static.layout is None:
        dhidden, dweight = local(*arguments)
    else:
        tokens, states, matrix, gradient = _specs(static)
        dhidden, dweight = jax.shard_map(
            local,
            mesh=static.layout.mesh,
            in_specs=(states, matrix, *[tokens] * 4),
            out_specs=(states, gradient),
            check_vma=False,
        )(*arguments)
    return dhidden, dweight, None


_token_logprobs.defvjp(_forward, _backward)


def _specs(static: Static) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec, PartitionSpec]:
    """PartitionSpecs of tokens [B, T], hidden [B, T, D], the gathered weight, and its gradient."""
    layout = static.layout
    assert layout is not None
    mesh, rules = layout.mesh, layout.rules
    axes = ("vocab", "embed") if static.transposed else ("embed", "vocab")
    gathered = {"vocab": rules.activations["vocab"]}
    return (
        partition_spec(rules.activations, ("batch", "sequence"), mesh),
        partition_spec(rules.activations, ("batch", "sequence", None), mesh),
        partition_spec(gathered, axes, mesh),
        partition_spec(rules.gradients, axes, mesh),
    )


def _axes(static: Static, logical: str) -> tuple[str, ...]:
    """Mesh axes, larger than 1, of a logical axis of activations."""
    if static.layout is None:
        return ()
    mesh, rules = static.layout.mesh, static.layout.rules
    return tuple(a for a in rules.activations.get(logical, ()) if mesh.shape[a] > 1)


def _chunks(static: Static, vocab: int, *arrays):
    """Arrays [N, ...] as [chunks, n, ...], padded with zeros at the end."""
    num_tokens = arrays[0].shape[0]
    chunk = static.chunk or max(64, CHUNK_BYTES // (4 * vocab) // 64 * 64)
    chunk = min(chunk, num_tokens)
    pad = -num_tokens % chunk
    split = []
    for x in arrays:
        x = jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1)))
        split.append(x.reshape(-1, chunk, *x.shape[1:]))
    return split


def _logits(static: Static, hidden_nD, weight, first: jax.Array | int):
    """(logits, float32 [n, V], -inf in padding columns; the columns of the whole vocabulary)."""
    contract = (((1,), (1 if static.transposed else 0,)), ((), ()))
    raw = jax.lax.dot_general(hidden_nD, weight, contract, preferred_element_type=jnp.float32)
    logits = raw if static.softcap is None else static.softcap * jnp.tanh(raw / static.softcap)
    columns = first + jnp.arange(logits.shape[-1])
    return jnp.where(columns < static.vocab_size, logits, -jnp.inf), columns


def _first_column(static: Static, vocab: int) -> jax.Array | int:
    """Column of the whole vocabulary at which this device's part begins."""
    index: jax.Array | int = 0
    for axis in _axes(static, "vocab"):
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index * vocab


def _local_forward(static: Static, hidden, weight, targets):
    shape = targets.shape
    hidden, targets = _as_rows(hidden, 1), _as_rows(targets, 0)
    vocab = weight.shape[0 if static.transposed else 1]
    first = _first_column(static, vocab)
    split = _axes(static, "vocab")

    def chunk(_, xs):
        hidden_nD, targets_n = xs
        logits, columns = _logits(static, hidden_nD, weight, first)
        top = jnp.max(logits, axis=-1)
        top = jax.lax.pmax(top, split) if split else top
        total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        target = jnp.sum(jnp.where(columns == targets_n[:, None], logits, 0.0), axis=-1)
        if split:
            total, target = jax.lax.psum((total, target), split)
        lse = jnp.log(total) + top
        return None, (target - lse, lse)

    chunks = _chunks(static, vocab, hidden, targets)
    _, (logprobs, lse) = jax.lax.scan(chunk, None, tuple(chunks))
    count = targets.shape[0]
    return logprobs.reshape(-1)[:count].reshape(shape), lse.reshape(-1)[:count].reshape(shape)


def _local_backward(static: Static, hidden, weight, targets, lse, dlogprobs, dlse):
    shape, dtype = hidden.shape, hidden.dtype
    hidden = _as_rows(hidden, 1)
    targets, lse, dlogprobs, dlse = (_as_rows(x, 0) for x in (targets, lse, dlogprobs, dlse))
    vocab = weight.shape[0 if static.transposed else 1]
    first = _first_column(static, vocab)

    def chunk(dweight, xs):
        hidden_nD, targets_n, lse_n, dlogprobs_n, dlse_n = xs
        logits, columns = _logits(static, hidden_nD, weight, first)
        dlogits = (dlse_n - dlogprobs_n)[:, None] * jnp.exp(logits - lse_n[:, None])
        dlogits += jnp.where(columns == targets_n[:, None], dlogprobs_n[:, None], 0.0)
        if static.softcap is not None:
            capped = jnp.where(columns < static.vocab_size, logits, 0.0)
            dlogits *= 1 - jnp.square(capped / static.softcap)
        dlogits = dlogits.astype(dtype)
        dhidden = dot(dlogits, weight, transpose_y=not static.transposed)
        pair = (dlogits, hidden_nD) if static.transposed else (hidden_nD, dlogits)
        dweight += dot(*pair, transpose_x=True).astype(jnp.float32)
        return dweight, dhidden

    chunks = _chunks(static, vocab, hidden, targets, lse, dlogprobs, dlse)
    dweight, dhidden = jax.lax.scan(chunk, jnp.zeros(weight.shape, jnp.float32), tuple(chunks))
    dhidden = dhidden.reshape(-1, shape[-1])[: hidden.shape[0]].reshape(shape)
    if split := _axes(static, "vocab"):
        dhidden = jax.lax.psum(dhidden, split)
    return dhidden, _sum_over_batch(static, dweight.astype(dtype))


def _as_rows(x: jax.Array, trailing: int) -> jax.Array:
    """Leading dimensions flattened into one."""
    return x.reshape(-1, *x.shape[x.ndim - trailing :])


def _sum_over_batch(static: Static, dweight: jax.Array) -> jax.Array:
    """Add up the weight's gradient over the devices that hold other tokens.

    Where the `gradients` table splits it over an axis of the batch, each device gets its part only.
    """
    layout = static.layout
    if layout is None:
        return dweight
    scatter = layout.rules.gradients.get("embed", ())
    dim = 1 if static.transposed else 0
    rest = []
    for axis in _axes(static, "batch") + _axes(static, "sequence"):
        if axis in scatter:
            dweight = jax.lax.psum_scatter(dweight, axis, scatter_dimension=dim, tiled=True)
        else:
            rest.append(axis)
    return jax.lax.psum(dweight, tuple(rest)) if rest else dweight
