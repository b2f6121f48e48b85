"""What a decoder is made of, as frozen dataclasses. Families are tables of these."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from lm.config.fields import NOT_EMPTY, Checked, Count, NonNegative, Positive, PositiveFraction


@dataclasses.dataclass(frozen=True)
class RopeScaling(Checked):
    """Stretching of the rotary frequencies for contexts longer than the model was trained on.

    Attributes:
      kind: "linear" (arXiv:2306.15595), "llama3" (Llama 3.1's rule), "yarn" (arXiv:2309.00071),
        "longrope" (arXiv:2402.13753).
      factor: how much longer.
      original_length: context of the original training (llama3, yarn, longrope).
      low_frequency, high_frequency: llama3's bounds, in turns within `original_length`.
      beta_fast, beta_slow: yarn's bounds, in turns.
      attention_factor: yarn and longrope multiply cos and sin by this; None for 0.1 ln(factor) + 1
        and for sqrt(1 + ln(factor) / ln(original_length)).
      truncate: yarn rounds the bounds of its ramp to whole dimensions.
      mscale, mscale_all_dim: DeepSeek's yarn, with m(x) = 0.1 x ln(factor) + 1: the scores are
        multiplied by m(mscale_all_dim) ** 2, and where both are given and `attention_factor` is
        not, cos and sin by m(mscale) / m(mscale_all_dim).
      short_factors, long_factors: longrope divides each pair's frequency by its own; by the long
        ones in a model whose `max_length` is over `original_length`, so that all of a cache is
        rotated alike.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: Positive
    original_length: Count = 8192
    low_frequency: NonNegative = 1.0
    high_frequency: NonNegative = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    truncate: bool = True
    mscale: NonNegative | None = None
    mscale_all_dim: NonNegative | None = None
    short_factors: tuple[Positive, ...] = ()
    long_factors: tuple[Positive, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rope(Checked):
    """Rotary position embedding (arXiv:2104.09864), half-rotated.

    Attributes:
      theta: base of the frequencies.
      fraction: of each head's size that is rotated (GPT-NeoX: 0.25).
      scaling: stretching of the frequencies.
    """

    theta: Positive = 10_000.0
    fraction: PositiveFraction = 1.0
    scaling: RopeScaling | None = None


@dataclasses.dataclass(frozen=True)
class Norm(Checked):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450), computed in float32.

    Attributes:
      kind: which.
      eps: added to the mean square or the variance.
      plus_one: the weight is stored as its difference from one (Gemma).
      bias: a bias is added (LayerNorm).
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: NonNegative = 1e-5
    plus_one: bool = False
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Latent(Checked):
    """Multi-head latent attention (MLA, arXiv:2405.04434): keys and values come from a latent.

    The latent and one rotated key, shared by all heads, are all that is cached.

    Attributes:
      kv_rank: size of the latent that keys and values are made of.
      nope_dim: of a head's query and key, what is not rotated.
      rope_dim: of a head's query and key, what is rotated.
      value_dim: size of a head's value.
      query_rank: size of the latent that queries are made of; None for a plain projection.
      eps: of the RMSNorm over either latent.
    """

    kv_rank: Count
    nope_dim: Count
    rope_dim: Count
    value_dim: Count
    query_rank: Count | None = None
    eps: NonNegative = 1e-6


@dataclasses.dataclass(frozen=True)
class Attention(Checked):
    """Multi-head, grouped-query (arXiv:2305.13245), multi-query or latent attention.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: size of a head's query and key.
      rope: rotary embedding; None for no positions.
      window: positions a query sees, itself included; None for all before it.
      scale: of the scores; None for head_dim ** -0.5.
      softcap: soft cap of the scores (Gemma 2).
      bias: of the query, key and value projections; with `latent`, of those into the latents.
      out_bias: of the output projection.
      qk_norm: normalize queries and keys "head" by head (Qwen 3, Gemma 3) or across all of a
        token's heads, "full" (OLMo 2); None for neither.
      sinks: each head has a learned score of a key without a value (GPT-OSS).
      latent: keys and values come from a latent (MLA); None for projections of their own.
    """

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    rope: Rope | None = Rope()
    window: Count | None = None
    scale: Positive | None = None
    softcap: Positive | None = None
    bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    sinks: bool = False
    latent: Latent | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.latent is None:
            return
        wanted = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.latent.nope_dim + self.latent.rope_dim,
            "qk_norm": None,
            "sinks": False,
        }
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not fit latent attention of "
                    f"num_heads={self.num_heads}, nope_dim={self.latent.nope_dim} and "
                    f"rope_dim={self.latent.rope_dim}; use {value!r}"
                )

    @property
    def rotated_dim(self) -> int:
        """Size of what the rotary embedding is given of a head."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def value_dim(self) -> int:
        """Size of a head's value."""
        return self.head_dim if self.latent is None else self.latent.value_dim


@dataclasses.dataclass(frozen=True)
class FeedForward(Checked):
    """Two matrices, or three where gated (arXiv:2002.05202).

    Attributes:
      hidden_dim: inner size.
      activation: "silu", "gelu" (exact) or "gelu_tanh".
      gated: activation(gate x) * (up x), else activation(up x).
      bias: of every projection.
    """

    hidden_dim: Count
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Layer(Checked):
    """One decoder layer.

    Attributes:
      attention, feed_forward: the two blocks.
      norm: of the residual stream.
      placement: norms "pre" each block, "post" it (OLMo 2), or "both" (Gemma 2 and 3).
      parallel: both blocks read the same residual (GPT-NeoX).
    """

    attention: Attention
    feed_forward: FeedForward
    norm: Norm = Norm()
    placement: Literal["pre", "post", "both"] = "pre"
    parallel: bool = False


@dataclasses.dataclass(frozen=True)
class Stack(Checked):
    """A short pattern of layers, repeated: the weights of each position are stacked."""

    pattern: Annotated[tuple[Layer, ...], NOT_EMPTY]
    num_repeats: Count

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, in order."""
        return self.pattern * self.num_repeats


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
    """A decoder-only language model.

    Attributes:
      vocab_size: tokens of the tokenizer.
      embed_dim: width of the residual stream.
      stacks: the layers.
      norm: before the output.
      tied: the output matrix is the embedding.
      embed_scale: multiplies the embedding (Gemma: embed_dim ** 0.5).
      logit_softcap: soft cap of the logits (Gemma 2).
      vocab_multiple: the vocabulary's rows are padded to a multiple of this; 128 x `tensor` keeps
        every shard a whole number of lanes. Padding is masked in loss and sampler.
      max_length: context length the model is made for; see `RopeScaling.long_factors`.
      family: name of the table it came from.
      score_dim: scores per token of a reward or value head beside the output; None for no head.
    """

    vocab_size: Count
    embed_dim: Count
    stacks: Annotated[tuple[Stack, ...], NOT_EMPTY]
    norm: Norm = Norm()
    tied: bool = False
    embed_scale: Positive | None = None
    logit_softcap: Positive | None = None
    vocab_multiple: Count = 128
    max_length: Count = 2048
    family: str = "llama"
    score_dim: Count | None = None

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, in order."""
        return tuple(layer for stack in self.stacks for layer in stack.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def make_stacks(layers: tuple[Layer, ...]) -> tuple[Stack, ...]:
    """The fewest-layer pattern that repeats through `layers`; what is left is its own Stack."""
    for size in range(1, len(layers) + 1):
        repeats = len(layers) // size
        covered = size * repeats
        if layers[:covered] == layers[:size] * repeats and (repeats > 1 or size == len(layers)):
            rest = layers[covered:]
            return (Stack(layers[:size], repeats), *(make_stacks(rest) if rest else ()))
    return ()
