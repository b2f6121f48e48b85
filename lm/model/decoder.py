"""One forward pass, from tokens to hidden states.

Shape suffixes: B batch, T tokens of a row, D embed_dim, H query heads, K key/value heads, h head
size, F feed-forward size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.kernels import attention as attention_kernels
from lm.kernels.attention import Scores, View
from lm.kernels.embedding import lookup
from lm.kernels.paged_attention import PageBatch
from lm.model import latent
from lm.model.config import Attention, FeedForward, Layer, ModelConfig, Rope, Stack
from lm.model.norms import elementwise, normalize
from lm.model.params import (
    AttentionWeights,
    FeedForwardWeights,
    LatentAttentionWeights,
    LayerWeights,
    ModelWeights,
    NormWeights,
    Stacked,
    Unstacked,
    layer_at,
    layer_specs,
    param_specs,
)
from lm.model.remat import checkpointed
from lm.model.rope import apply_rope, rope_table, score_factor
from lm.sharding import constrain, constrain_both
from lm.weights import StructuredWeight, gather, linear, take

AttentionFunction = Callable[..., jax.Array]
RopeTables = dict[tuple[Rope, int], tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class Tokens:
    """What the model reads.

    Attributes:
      ids: int32 [B, T].
      positions: int32 [B, T], from 0 in each document.
      segment_ids: int32 [B, T], or None for one document per row; tokens see their own segment
        only, and 0 marks padding.
      pages: where the tokens stand in paged caches. The batch may then be flat, [1, N]: new tokens
        of several sequences, one after another. None for caches without pages.
      in_order: the segments are whole, from their first tokens on, in order and without gaps, so
        that attention need look neither at later tokens nor at what a cache held before; it must
        be true where it is said. See `View`.
    """

    ids: Any
    positions: Any
    segment_ids: Any = None
    pages: PageBatch | None = None
    in_order: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, ids: jax.Array) -> Tokens:
        """Rows that are whole documents: ids [B, T] at positions 0 .. T-1."""
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        return cls(ids, positions, in_order=True)


class LayerCache(Protocol):
    """Keys and values of one layer; one call writes the new ones and reads."""

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        tokens: Tokens,
        scores: Scores,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """q [B, T, H, h], k and v [B, T, K, h] -> ([B, T, H, h], the cache with k and v in it).

        Latent attention comes as multi-query attention in latent space: K is 1, h is kv_rank +
        rope_dim, and v is k[..., :kv_rank], so that k alone need be kept.
        """
        ...


@runtime_checkable
class LatentLayerCache(LayerCache, Protocol):
    """A cache of latents in which long prompts may attend in the expanded form."""

    def attend_expanded(
        self,
        q: jax.Array,
        latents: jax.Array,
        expand: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
        tokens: Tokens,
        scores: Scores,
    ) -> tuple[jax.Array, LayerCache]:
        """q [B, T, H, h] and latents [B, T, x] -> ([B, T, H, v], the cache with the latents in it).

        `expand` makes every head's keys [B, S, H, h] and values [B, S, H, v] of latents [B, S, x].
        """
        ...


@flax.struct.dataclass
class Output:
    """What the forward pass returns.

    Attributes:
      hidden: [B, T, D], normalized, ready for the output matrix.
      cache: the caches, one per layer, or None.
      aux: auxiliary sums by name; a dense model has none.
    """

    hidden: Any
    cache: Any = None
    aux: Any = flax.struct.field(default_factory=dict)


def forward(
    params: ModelWeights,
    tokens: Tokens,
    config: ModelConfig,
    cache: Sequence[LayerCache] | None = None,
    attention: AttentionFunction | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    unroll: bool = False,
) -> Output:
    """Hidden states of `tokens`.

    Args:
      params: weights, stacked or unstacked.
      tokens: what to read.
      config: the model.
      cache: one LayerCache per layer (decoding), or None (training).
      attention: instead of `lm.kernels.attention.attention`.
      dtype: of activations; norms, rotary angles and softmax are float32 inside.
      remat: what the backward pass computes again; see `lm.model.remat`.
      unroll: write stacked layers out instead of looping over them: slower to compile, and on CPU a
        tenth faster, since nothing is copied into and out of the loop.
    """
    if tokens.ids.ndim != 2:
        raise ValueError(f"ids must be [batch, tokens], got shape {tokens.ids.shape}")
    x = embed(params, tokens, config, dtype)
    tables = rope_tables(tokens, config)
    attend = attention or attention_kernels.attention
    caches = list(cache) if cache is not None else None
    new_caches: list[LayerCache] = []
    for weights, stack in zip(params.stacks, config.stacks, strict=True):
        block = Block(config, tokens, tables, attend, remat, unroll)
        if caches is None:
            x = run(weights, x, stack, block)
        else:
            for i, layer in enumerate(stack.layers):
                x, new = block(layer_at(weights, i), x, layer, caches[len(new_caches)])
                assert new is not None
                new_caches.append(new)
    hidden = normalize(x, params.norm, config.norm)
    return Output(hidden, tuple(new_caches) if caches is not None else None)


def embed(params: ModelWeights, tokens: Tokens, config: ModelConfig, dtype: Any) -> jax.Array:
    """Rows of the embedding, [B, T, D]."""
    if isinstance(params.embed, StructuredWeight):
        x = take(gather(params.embed, param_specs(config).embed), tokens.ids, dtype)
    else:
        x = lookup(params.embed, tokens.ids).astype(dtype)
    x = constrain(x, "batch", "sequence", None)
    if config.embed_scale is not None:
        x *= jnp.asarray(config.embed_scale, dtype)
    return constrain(x, "batch", "residual_sequence", None)


def run(weights: Stacked | Unstacked, x: jax.Array, stack: Stack, block: Block) -> jax.Array:
    """The layers of a Stack: one `lax.scan` over its repeats, or one after another unstacked."""
    unstacked = isinstance(weights, Unstacked)
    layers = stack.layers if unstacked else stack.pattern
    in_loop = not (unstacked or block.unroll) and stack.num_repeats > 1

    def repeat(x: jax.Array, pattern: tuple[LayerWeights, ...]) -> tuple[jax.Array, None]:
        for layer, layer_weights in zip(layers, pattern, strict=True):
            without_cache = functools.partial(block, layer=layer, cache=None)
            x, _ = checkpointed(without_cache, block.remat, in_loop)(layer_weights, x)
        return x, None

    if unstacked:
        return repeat(x, weights.layers)[0]
    return jax.lax.scan(repeat, x, weights.layers, unroll=block.unroll)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A decoder layer applied to the residual stream of one call of `forward`."""

    config: ModelConfig
    tokens: Tokens
    tables: RopeTables
    attention: AttentionFunction
    remat: str
    unroll: bool

    def __call__(
        self, weights: LayerWeights, x: jax.Array, layer: Layer, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        specs = layer_specs(layer, self.config.embed_dim, self.config.num_layers)
        w: LayerWeights = gather(weights, specs)
        x = checkpoint_name(x, "input")

        def norm(y: jax.Array, norm_weights: NormWeights | None) -> jax.Array:
            return y if norm_weights is None else normalize(y, norm_weights, layer.norm)

        attended, cache = self.attend(norm(x, w.attention_norm), w.attention, layer, cache)
        attended = norm(attended, w.attention_post_norm)
        before = x if layer.parallel else x + attended
        fed = feed_forward(norm(before, w.feed_forward_norm), w.feed_forward, layer.feed_forward)
        fed = norm(fed, w.feed_forward_post_norm)
        x = before + fed + attended if layer.parallel else before + fed
        return constrain(x, "batch", "residual_sequence", None), cache

    def attend(
        self,
        x: jax.Array,
        w: AttentionWeights | LatentAttentionWeights,
        layer: Layer,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention over x [B, T, D], already normalized -> [B, T, D]."""
        a = layer.attention
        B, T, _ = x.shape
        x = gather_sequence(x)
        if isinstance(w, LatentAttentionWeights):
            out, cache = self.latent_heads(x, w, a, cache)
        else:
            out, cache = self.heads(x, w, layer, cache)
        out = checkpoint_name(constrain(out, "batch", "sequence", "heads", None), "attention")
        out = linear(out.reshape(B, T, a.num_heads * a.value_dim), w.out, w.out_bias)
        return scatter_sequence(out), cache

    def heads(
        self, x: jax.Array, w: AttentionWeights, layer: Layer, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention output of each head, [B, T, H, h]."""
        a = layer.attention
        B, T, _ = x.shape

        def project(weight: Any, bias: Any, scale: Any, num: int, axis: str) -> jax.Array:
            y = linear(x, weight, bias)
            if a.qk_norm == "full" and scale is not None:
                y = normalize(y, NormWeights(scale), layer.norm)
            y = y.reshape(B, T, num, a.head_dim)
            if a.qk_norm == "head" and scale is not None:
                y = normalize(y, NormWeights(scale), layer.norm)
            return constrain(y, "batch", "sequence", axis, None)

        q = project(w.query, w.query_bias, w.query_norm, a.num_heads, "heads")
        k = project(w.key, w.key_bias, w.key_norm, a.num_kv_heads, "kv_heads")
        v = project(w.value, w.value_bias, None, a.num_kv_heads, "kv_heads")
        if a.rope is not None:
            table = self.tables[a.rope, a.head_dim]
            q, k = apply_rope(q, table), apply_rope(k, table)
        if cache is None:
            return self.plain(q, k, v, a, w.sinks), None
        return cache.attend(*_named(q, k, v), self.tokens, scores_of(a), w.sinks)

    def plain(
        self, q: jax.Array, k: jax.Array, v: jax.Array, a: Attention, sinks: Any = None
    ) -> jax.Array:
        """Attention among the tokens, without a cache."""
        t = self.tokens
        view = View(t.positions, t.positions, t.segment_ids, t.segment_ids, t.in_order)
        options = {} if sinks is None else {"sinks": sinks}
        return self.attention(*_named(q, k, v), view, scores_of(a), **options)

    def latent_heads(
        self, x: jax.Array, w: LatentAttentionWeights, a: Attention, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """As `heads`, for latent attention. See `lm.model.latent` for its two forms."""
        table = None if a.rope is None else self.tables[a.rope, a.rotated_dim]
        q = latent.queries(x, w, a, table)
        latents = latent.latents(x, w, a, table)
        if cache is None:
            return self.plain(q, *latent.expand(latents, w, a), a), None
        if isinstance(cache, LatentLayerCache) and latent.expands(x.shape[1], a):
            expand = functools.partial(latent.expand, w=w, a=a)
            return cache.attend_expanded(q, latents, expand, self.tokens, scores_of(a))
        key_up, value_up = latent.absorbed(w, a, x.dtype)
        q, k, v = latent.in_latent_space(q, latents, key_up, a)
        out, cache = cache.attend(q, k, v, self.tokens, scores_of(a))
        return jnp.einsum("bthr,rhv->bthv", out, value_up), cache


def _named(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values under the names remat policies use."""
    return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")


def scores_of(a: Attention) -> Scores:
    """The scores of a layer's attention."""
    scale = (a.head_dim**-0.5 if a.scale is None else a.scale) * score_factor(a.rope)
    return Scores(scale, window=a.window, softcap=a.softcap)


def gather_sequence(x: jax.Array) -> jax.Array:
    """x [B, T, D] with its sequence gathered over `tensor`, where sequence parallelism splits it.

    Stated before and after, so that it is gathered in its own dtype, not in the float32 of the norm
    that made it.
    """
    x = constrain(x, "batch", "residual_sequence", None)
    return constrain(x, "batch", "sequence", None)


def scatter_sequence(x: jax.Array) -> jax.Array:
    """x [B, T, D] with its sequence split as between blocks: the inverse of `gather_sequence`.

    Its gradient is gathered over `tensor` here, once for both products that read it: left to itself
    XLA gathers whole rows over `context` as well.
    """
    split, whole = ("batch", "residual_sequence", None), ("batch", "sequence", None)
    return constrain(constrain_both(x, split, whole), *split)


def feed_forward(x: jax.Array, w: FeedForwardWeights, config: FeedForward) -> jax.Array:
    """x [B, T, D], already normalized -> [B, T, D]."""
    activation = ACTIVATIONS[config.activation]
    x = gather_sequence(x)
    up = checkpoint_name(linear(x, w.up, w.up_bias), "up")
    if w.gate is None:
        inner = elementwise(_activated, activation)(up)
    else:
        gate = checkpoint_name(linear(x, w.gate, w.gate_bias), "gate")
        inner = elementwise(_gated, activation)(gate, up)
    inner = constrain(inner, "batch", "sequence", "ffn")
    return scatter_sequence(linear(inner, w.down, w.down_bias))


def _gated(activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array):
    return (activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


def _activated(activation: Callable[[jax.Array], jax.Array], up: jax.Array) -> jax.Array:
    return activation(up.astype(jnp.float32)).astype(up.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def rope_tables(tokens: Tokens, config: ModelConfig) -> RopeTables:
    """cos and sin tables for each kind of rotary embedding in the model."""
    kinds = {
        (a.rope, a.rotated_dim) for a in (layer.attention for layer in config.layers) if a.rope
    }
    return {kind: rope_table(tokens.positions, *kind, config.max_length) for kind in kinds}
