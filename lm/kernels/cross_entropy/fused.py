"""Token log-probabilities a chunk of tokens at a time, vocabulary-parallel over the mesh.

The logits of one chunk live at a time, and the backward pass computes them again, as in
arXiv:2411.09009; each device holds the columns of its part of the vocabulary, as in
arXiv:1909.08053. Forward and backward are each one `map_devices` inside one
`custom_vjp`: no transposition rule of a collective takes part in the gradient.

Shapes: N tokens of this device, C of one chunk, D hidden size, V columns of this device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lm.kernels.cross_entropy.reference import MASKED, token_axes, weight_axes
from lm.sharding import current_layout, map_devices, mesh_axes, partition_spec

# On CPU the logits of few tokens stay near the cores. Elsewhere every chunk reads and writes the
# weight's whole float32 gradient, which fewer tokens do not hide.
CPU_CHUNK_TOKENS = 256
CHUNK_TOKENS = 1024


def fused_token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    *,
    transposed: bool,
    vocab_size: int,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    entropy: bool = False,
) -> tuple[jax.Array, ...]:
    """As `token_logprobs`, holding float32 logits of at most `chunk_tokens` tokens per device.

    None is `CPU_CHUNK_TOKENS` or `CHUNK_TOKENS`, by the platform it is compiled for.

    Reverse mode only: there is no second derivative and no `jvp`.
    """
    plan = _Plan(
        transposed=transposed,
        vocab_size=vocab_size,
        masked=vocab_size < weight.shape[0 if transposed else 1],
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        entropy=entropy,
        placement=make_placement(hidden.shape, weight.shape, transposed),
    )
    return _fused(plan, hidden, weight, targets)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the arrays are sharded over the mesh, and the mesh axes each collective runs over.

    Attributes:
      mesh: the mesh, or None for one device without a layout.
      hidden, tokens, weight, gradient: specs of the arrays; `gradient` is the weight's.
      vocab: axes that split the vocabulary.
      embed: axes that split the weight's hidden dimension at rest.
      scatter: axes that split it in the gradient.
      reduce: axes that split the tokens, less `scatter`.
      sequence: axes of `vocab` that also split the sequence of `hidden`.
    """

    mesh: Mesh | None = None
    hidden: PartitionSpec = PartitionSpec()
    tokens: PartitionSpec = PartitionSpec()
    weight: PartitionSpec = PartitionSpec()
    gradient: PartitionSpec = PartitionSpec()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    scatter: tuple[str, ...] = ()
    reduce: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()

    def size(self, axes: Sequence[str]) -> int:
        """Number of parts that these mesh axes make."""
        return math.prod(self.mesh.shape[axis] for axis in axes) if self.mesh else 1


def make_placement(hidden: Sequence[int], weight: Sequence[int], transposed: bool) -> Placement:
    """The placement of arrays of these shapes under the layout in force.

    Raises:
      ValueError: mesh axes do not divide the batch, the sequence, the vocabulary or `embed`.
    """
    layout = current_layout()
    if layout is None:
        return Placement()
    mesh, rules, axes = layout.mesh, layout.rules, weight_axes(transposed)
    num_dims = len(hidden) - 1
    tokens = partition_spec(rules.activations, token_axes(num_dims, "sequence"), mesh, hidden[:-1])
    at_rest = partition_spec(rules.weights, axes, mesh, weight)
    gradient = partition_spec(rules.gradients, axes, mesh, weight)
    of_tokens = tuple(axis for entry in tokens for axis in mesh_axes(entry))
    embed, vocab = axes.index("embed"), mesh_axes(at_rest[axes.index("vocab")])
    scatter = mesh_axes(gradient[embed])
    if not set(scatter) <= set(of_tokens):  # nothing to sum there: leave the slicing to jit
        scatter = ()
    gradient_entries = [at_rest[0], at_rest[1]]
    gradient_entries[embed] = scatter or None

    split, residual = (), tokens
    if num_dims > 1:
        wanted = partition_spec(rules.activations, token_axes(num_dims, "residual_sequence"), mesh)
        whole = mesh_axes(tokens[1])
        split = mesh_axes(wanted[1])[len(whole) :]
        parts = math.prod(mesh.shape[axis] for axis in mesh_axes(wanted[1]))
        follows = mesh_axes(wanted[1])[: len(whole)] == whole and set(split) <= set(vocab)
        if follows and hidden[1] % parts == 0:
            residual = wanted
        else:
            split = ()
    return Placement(
        mesh=mesh,
        hidden=PartitionSpec(*residual, None),
        tokens=tokens,
        weight=at_rest,
        gradient=PartitionSpec(*gradient_entries),
        vocab=vocab,
        embed=mesh_axes(at_rest[embed]),
        scatter=scatter,
        reduce=tuple(axis for axis in of_tokens if axis not in scatter),
        sequence=split,
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is fixed while tracing: the options of `token_logprobs` and the placement."""

    transposed: bool
    vocab_size: int
    masked: bool
    softcap: float | None
    chunk_tokens: int | None
    entropy: bool
    placement: Placement

    def over_mesh(self, function, in_specs, out_specs) -> Callable[..., Any]:
        """`function` of local arrays as one of global arrays."""
        local = functools.partial(function, self)
        return map_devices(local, in_specs, out_specs, self.placement.mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(plan: _Plan, hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> Any:
    return _fused_forward(plan, hidden, weight, targets)[0]


def _fused_forward(plan, hidden, weight, targets):
    at = plan.placement
    specs = (at.hidden, at.weight, at.tokens)
    forward = plan.over_mesh(_local_forward, specs, (at.tokens,) * (3 if plan.entropy else 2))
    results = forward(hidden, weight, targets)
    return results, (hidden, weight, targets, results[1:])


def _fused_backward(plan, residuals, cotangents):
    at = plan.placement
    backward = plan.over_mesh(
        _local_backward,
        (at.hidden, at.weight, at.tokens, at.tokens, at.tokens),
        (at.hidden, at.gradient),
    )
    d_hidden, d_weight = backward(*residuals, cotangents)
    return d_hidden, d_weight, None


_fused.defvjp(_fused_forward, _fused_backward)


def _local_forward(plan: _Plan, hidden: jax.Array, weight: jax.Array, targets: jax.Array):
    """The results for this device's tokens, from its part of the columns."""
    matrix = _gather_weight(plan, weight, hidden.dtype)
    hidden = _gather_sequence(plan, hidden)
    columns = _columns(plan, matrix)

    def step(_, chunk):
        hidden_CD, targets_C = chunk
        logits_CV, _ = _logits(plan, hidden_CD, matrix, columns)
        top = jnp.max(logits_CV, axis=-1)
        logsumexp = top + jnp.log(jnp.sum(jnp.exp(logits_CV - top[:, None]), axis=-1))
        target = jnp.sum(jnp.where(columns == targets_C[:, None], logits_CV, 0.0), axis=-1)
        if not plan.entropy:
            return None, (logsumexp, target)
        probs_CV = jnp.exp(logits_CV - logsumexp[:, None])
        return None, (logsumexp, target, jnp.sum(probs_CV * logits_CV, axis=-1))

    rows = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    _, (logsumexp, target, *mean) = _scan_chunks(plan, step, None, rows)
    vocab = plan.placement.vocab
    if vocab:
        top = jax.lax.pmax(logsumexp, vocab)
        share = jnp.exp(logsumexp - top)  # of this part's columns, times the same number everywhere
        total, target, *mean = jax.lax.psum((share, target, *(share * m for m in mean)), vocab)
        logsumexp, mean = top + jnp.log(total), [m / total for m in mean]
    results = (target - logsumexp, logsumexp, *(logsumexp - m for m in mean))
    return tuple(x.reshape(targets.shape) for x in results)


def _local_backward(plan, hidden, weight, targets, results, cotangents):
    """Gradients of this device's hidden states and of its part of the weight."""
    at = plan.placement
    matrix = _gather_weight(plan, weight, hidden.dtype)
    whole = _gather_sequence(plan, hidden)
    columns = _columns(plan, matrix)
    to_hidden, to_weight = (
        ("cv,vd->cd", "cv,cd->vd") if plan.transposed else ("cv,dv->cd", "cv,cd->dv")
    )
    # Partial sums of other devices are still to be added: keep them in float32 until then.
    partial_dtype = jnp.float32 if at.vocab else hidden.dtype

    def step(d_matrix, chunk):
        hidden_CD, targets_C, logsumexp_C, d_logprobs_C, d_logsumexp_C, *of_entropy = chunk
        logits_CV, slope_CV = _logits(plan, hidden_CD, matrix, columns)
        probs_CV = jnp.exp(logits_CV - logsumexp_C[:, None])
        d_CV = (d_logsumexp_C - d_logprobs_C)[:, None] * probs_CV
        d_CV += jnp.where(columns == targets_C[:, None], d_logprobs_C[:, None], 0.0)
        if plan.entropy:
            entropy_C, d_entropy_C = of_entropy
            mean_C = logsumexp_C - entropy_C
            d_CV -= d_entropy_C[:, None] * probs_CV * (logits_CV - mean_C[:, None])
        if slope_CV is not None:
            d_CV *= slope_CV
        if plan.masked:
            d_CV = jnp.where(columns < plan.vocab_size, d_CV, 0.0)
        d_CV = d_CV.astype(hidden_CD.dtype)
        d_hidden = jnp.einsum(to_hidden, d_CV, matrix, preferred_element_type=jnp.float32)
        d_matrix += jnp.einsum(to_weight, d_CV, hidden_CD, preferred_element_type=jnp.float32)
        return d_matrix, d_hidden.astype(partial_dtype)

    per_token = (targets, results[0], *cotangents[:2], *results[1:], *cotangents[2:])
    rows = (whole.reshape(-1, whole.shape[-1]), *(x.reshape(-1) for x in per_token))
    d_matrix, d_hidden = _scan_chunks(plan, step, jnp.zeros(matrix.shape, jnp.float32), rows)
    d_hidden = d_hidden.reshape(whole.shape)
    d_matrix = d_matrix.astype(weight.dtype)  # before it is sent, as every weight's gradient is
    if at.sequence:
        d_hidden = jax.lax.psum_scatter(d_hidden, at.sequence, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in at.vocab if axis not in at.sequence)
    if rest:
        d_hidden = jax.lax.psum(d_hidden, rest)
    if at.scatter:
        embed = weight_axes(plan.transposed).index("embed")
        for axis in at.scatter:
            d_matrix = jax.lax.psum_scatter(d_matrix, axis, scatter_dimension=embed, tiled=True)
    if at.reduce:
        d_matrix = jax.lax.psum(d_matrix, at.reduce)
    return d_hidden.astype(hidden.dtype), d_matrix


def _logits(plan: _Plan, hidden_CD: jax.Array, matrix: jax.Array, columns: jax.Array):
    """Logits float32 [C, V] of a chunk and, where capped, the derivative of the cap."""
    equation = "cd,vd->cv" if plan.transposed else "cd,dv->cv"
    logits = jnp.einsum(equation, hidden_CD, matrix, preferred_element_type=jnp.float32)
    slope = None
    if plan.softcap is not None:
        tanh = jnp.tanh(logits / plan.softcap)
        logits, slope = plan.softcap * tanh, 1.0 - tanh * tanh
    if plan.masked:
        logits = jnp.where(columns < plan.vocab_size, logits, MASKED)
    return logits, slope


def _gather_weight(plan: _Plan, weight: jax.Array, dtype) -> jax.Array:
    """This device's columns with every row, in the dtype that multiplies."""
    weight = weight.astype(dtype)
    if not plan.placement.embed:
        return weight
    embed = weight_axes(plan.transposed).index("embed")
    for axis in reversed(plan.placement.embed):
        weight = jax.lax.all_gather(weight, axis, axis=embed, tiled=True)
    return weight


def _gather_sequence(plan: _Plan, hidden: jax.Array) -> jax.Array:
    """Hidden states of every token that this device's columns are to meet."""
    if not plan.placement.sequence:
        return hidden
    return jax.lax.all_gather(hidden, plan.placement.sequence, axis=1, tiled=True)


def _columns(plan: _Plan, matrix: jax.Array) -> jax.Array:
    """Vocabulary ids int32 [V] of this device's columns."""
    size = matrix.shape[0 if plan.transposed else 1]
    columns = jnp.arange(size, dtype=jnp.int32)
    if not plan.placement.vocab:
        return columns
    return columns + size * jax.lax.axis_index(plan.placement.vocab)


def _scan_chunks(plan: _Plan, step, carry: Any, rows: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """`lax.scan` of `step` over chunks of arrays [N, ...]; its outputs are joined to [N, ...]."""
    num_tokens = rows[0].shape[0]

    def scan(chunk_tokens: int, carry: Any, *rows: jax.Array) -> tuple[Any, Any]:
        num_chunks = -(-num_tokens // chunk_tokens)
        size = -(-num_tokens // num_chunks)  # evened out, so that little is padded
        chunks = tuple(_chunks(x, size) for x in rows)
        carry, parts = jax.lax.scan(step, carry, chunks)
        return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], parts)

    if plan.chunk_tokens is not None or num_tokens <= CPU_CHUNK_TOKENS:
        return scan(plan.chunk_tokens or CPU_CHUNK_TOKENS, carry, *rows)
    return jax.lax.platform_dependent(
        carry,
        *rows,
        cpu=functools.partial(scan, CPU_CHUNK_TOKENS),
        default=functools.partial(scan, CHUNK_TOKENS),
    )


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """[N, ...] -> [chunks, size, ...], filled up with zeros."""
    padding = -x.shape[0] % size
    if padding:
        x = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])
