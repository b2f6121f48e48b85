"""What the models of a family share, whatever their size, and the layers made from it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Literal

from lm.model.config import Attention, FeedForward, Latent, Layer, Norm, Rope

Kind = Literal["local", "global"]


@dataclasses.dataclass(frozen=True)
class Traits:
    """What the models of a family compute.

    Attributes:
      norm: of the residual stream, of queries and keys, and before the output.
      placement, parallel: of the norms and blocks; see `Layer`.
      activation, gated: of the feed-forward; see `FeedForward`.
      attention_bias: biases of query, key and value.
      attention_out_bias: bias of the attention's output.
      mlp_bias: biases of the feed-forward.
      qk_norm: see `Attention`.
      head_dim: size of a head; None for embed_dim / num_heads.
      rope: rotary embedding (of the global layers, where they differ).
      local_rope: rotary embedding of local layers; None for `rope`.
      pattern: kinds of the layers, repeated; a "local" layer sees `window` positions.
      window: positions a local layer sees, itself included; None for all.
      query_scalar: scores are divided by its square root; None for the size of a head.
      attention_softcap, logit_softcap: soft caps of scores and logits.
      tied: the output matrix is the embedding.
      scale_embed: the embedding is multiplied by embed_dim ** 0.5.
      latent: keys and values come from a latent (MLA), whose sizes give `head_dim`.
    """

    norm: Norm = Norm()
    placement: Literal["pre", "post", "both"] = "pre"
    parallel: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    head_dim: int | None = None
    rope: Rope = Rope()
    local_rope: Rope | None = None
    pattern: tuple[Kind, ...] = ("global",)
    window: int | None = None
    query_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied: bool = False
    scale_embed: bool = False
    latent: Latent | None = None


def make_layer(
    f: Traits, kind: Kind, embed_dim: int, hidden_dim: int, num_heads: int, num_kv_heads: int
) -> Layer:
    """A layer with these traits. Raises ValueError for sizes that do not fit each other."""
    head_dim = f.head_dim
    if head_dim is None and f.latent is not None:
        head_dim = f.latent.nope_dim + f.latent.rope_dim
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide embed_dim={embed_dim}; give head_dim"
            )
        head_dim = embed_dim // num_heads
    scale = None
    if f.query_scalar is not None and f.query_scalar != head_dim:
        scale = f.query_scalar**-0.5
    local = kind == "local"
    rope = f.local_rope if local and f.local_rope is not None else f.rope
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        window=f.window if local else None,
        scale=scale,
        softcap=f.attention_softcap,
        bias=f.attention_bias,
        out_bias=f.attention_out_bias,
        qk_norm=f.qk_norm,
        latent=f.latent,
    )
    feed_forward = FeedForward(hidden_dim, f.activation, f.gated, f.mlp_bias)
    return Layer(attention, feed_forward, f.norm, f.placement, f.parallel)


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a message: the name that was probably meant, and all there are."""
    close = difflib.get_close_matches(name, names, 1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(names)}"
