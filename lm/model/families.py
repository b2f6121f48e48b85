"""Model families as tables, and the one function that makes a `ModelConfig` of them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lm.model.config import (
    Attention,
    FeedForward,
    Latent,
    Layer,
    ModelConfig,
    Norm,
    Rope,
    make_stacks,
)

Kind = Literal["local", "global"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of a family share, whatever their size.

    Attributes:
      architecture: what `ModelConfig.family` becomes; families of one architecture share a
        checkpoint format (Llama 2, Llama 3 and SmolLM2 are "llama").
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

    architecture: str
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


_LLAMA = Family("llama")
_GEMMA = Family(
    "gemma2",
    norm=Norm(eps=1e-6, plus_one=True),
    placement="both",
    activation="gelu_tanh",
    head_dim=256,
    pattern=("local", "global"),
    window=4096,
    tied=True,
    scale_embed=True,
)

_DEEPSEEK = Family("deepseek_v2", norm=Norm(eps=1e-6), latent=Latent(512, 128, 64, 128, 1536))

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "llama2": _LLAMA,
    "llama3": dataclasses.replace(_LLAMA, rope=Rope(theta=500_000.0)),
    "smollm2": dataclasses.replace(_LLAMA, rope=Rope(theta=100_000.0), tied=True),
    "mistral": Family("mistral", pattern=("local",), window=4096),
    "qwen2": Family("qwen2", norm=Norm(eps=1e-6), attention_bias=True, rope=Rope(theta=1e6)),
    "qwen3": Family(
        "qwen3", norm=Norm(eps=1e-6), qk_norm="head", head_dim=128, rope=Rope(theta=1e6)
    ),
    "gemma2": dataclasses.replace(_GEMMA, attention_softcap=50.0, logit_softcap=30.0),
    "gemma3": dataclasses.replace(
        _GEMMA,
        architecture="gemma3",
        qk_norm="head",
        rope=Rope(theta=1e6),
        local_rope=Rope(theta=10_000.0),
        pattern=("local",) * 5 + ("global",),
    ),
    "olmo2": Family(
        "olmo2",
        norm=Norm(eps=1e-6),
        placement="post",
        qk_norm="full",
        rope=Rope(theta=500_000.0),
    ),
    "phi3": Family("phi3", pattern=("local",)),
    "gpt_neox": Family(
        "gpt_neox",
        norm=Norm("layer", bias=True),
        parallel=True,
        activation="gelu",
        gated=False,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        rope=Rope(fraction=0.25),
    ),
    # All layers dense: mixtures of experts are not built yet.
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": dataclasses.replace(_DEEPSEEK, architecture="deepseek_v3"),
}


def make_config(
    family: str,
    *,
    vocab_size: int,
    embed_dim: int,
    hidden_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    max_length: int = 2048,
    vocab_multiple: int = 128,
    kinds: Sequence[Kind] | None = None,
    **traits: Any,
) -> ModelConfig:
    """A model of a family.

    Args:
      family: a key of `FAMILIES`.
      vocab_size, embed_dim, num_layers, max_length, vocab_multiple: see `ModelConfig`.
      hidden_dim: inner size of the feed-forward.
      num_heads, num_kv_heads: query heads; key and value heads, None for as many.
      kinds: "local" or "global" for every layer, instead of the family's pattern.
      **traits: fields of `Family` to use instead of the family's.

    Raises:
      ValueError: an unknown family or trait, or sizes that do not fit each other.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown; {nearest(family, list(FAMILIES))}")
    names = [field.name for field in dataclasses.fields(Family)]
    for name in traits:
        if name not in names:
            raise ValueError(f"{name!r} is not a trait of a family; {nearest(name, names)}")
    f = dataclasses.replace(FAMILIES[family], **traits)
    if kinds is None:
        kinds = [f.pattern[i % len(f.pattern)] for i in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {"local", "global"}:
        raise ValueError(
            f"kinds={list(kinds)} has to be 'local' or 'global' for each of {num_layers} layers"
        )
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    layers = {
        kind: _layer(f, kind, embed_dim, hidden_dim, num_heads, num_kv_heads)
        for kind in ("local", "global")
    }
    return ModelConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        stacks=make_stacks(tuple(layers[kind] for kind in kinds)),
        norm=f.norm,
        tied=f.tied,
        embed_scale=embed_dim**0.5 if f.scale_embed else None,
        logit_softcap=f.logit_softcap,
        vocab_multiple=vocab_multiple,
        max_length=max_length,
        family=f.architecture,
    )


def _layer(
    f: Family, kind: Kind, embed_dim: int, hidden_dim: int, num_heads: int, num_kv_heads: int
) -> Layer:
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
    local = kind == "local" and f.window is not None
    rope = f.local_rope if kind == "local" and f.local_rope is not None else f.rope
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
    close = difflib.get_close_matches(name, names, 1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(names)}"
