"""The tree of a model's weights, and its specs.

Matrices are `[*stack, in, out]`. `Stacked` is the training form, one leading dimension of repeats
for `lax.scan`; `Unstacked` is the serving form, each layer its own arrays and leaf types.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, Literal, TypeVar

import flax.struct
import jax

from lm.model.config import Attention, FeedForward, Latent, Layer, ModelConfig, Norm, Stack
from lm.sharding import Layout, check_divides
from lm.weights import ParamSpec, Weight, is_spec, shardings
from lm.weights.specs import map_specs

# What a tree holds in the place of each weight: the Weight itself, its ParamSpec, its shape, its
# sharding.
Slot = TypeVar("Slot")


@flax.struct.dataclass
class NormWeights(Generic[Slot]):
    scale: Slot
    bias: Slot | None = None


@flax.struct.dataclass
class AttentionWeights(Generic[Slot]):
    query: Slot
    key: Slot
    value: Slot
    out: Slot
    query_bias: Slot | None = None
    key_bias: Slot | None = None
    value_bias: Slot | None = None
    out_bias: Slot | None = None
    query_norm: Slot | None = None
    key_norm: Slot | None = None
    sinks: Slot | None = None


@flax.struct.dataclass
class LatentAttentionWeights(Generic[Slot]):
    """Weights of multi-head latent attention; see `Latent`. Queries: `query`, or down, norm and up.

    Attributes:
      key_value_down: [D, kv_rank + rope_dim], the latent and the shared rotated key.
      key_value_up: [kv_rank, heads x (nope_dim + value_dim)], each head's key, then its value.
      out: [heads x value_dim, D].
      query: [D, heads x head_dim].
      query_down, query_up: [D, query_rank] and [query_rank, heads x head_dim].
    """

    key_value_down: Slot
    key_value_norm: Slot
    key_value_up: Slot
    out: Slot
    query: Slot | None = None
    query_down: Slot | None = None
    query_norm: Slot | None = None
    query_up: Slot | None = None
    query_down_bias: Slot | None = None
    key_value_down_bias: Slot | None = None
    out_bias: Slot | None = None


@flax.struct.dataclass
class FeedForwardWeights(Generic[Slot]):
    up: Slot
    down: Slot
    gate: Slot | None = None
    up_bias: Slot | None = None
    down_bias: Slot | None = None
    gate_bias: Slot | None = None


@flax.struct.dataclass
class LayerWeights(Generic[Slot]):
    attention: AttentionWeights[Slot] | LatentAttentionWeights[Slot]
    feed_forward: FeedForwardWeights[Slot]
    attention_norm: NormWeights[Slot] | None = None
    attention_post_norm: NormWeights[Slot] | None = None
    feed_forward_norm: NormWeights[Slot] | None = None
    feed_forward_post_norm: NormWeights[Slot] | None = None


@flax.struct.dataclass
class Stacked(Generic[Slot]):
    """Weights of a Stack's pattern; every leaf has a leading dimension of repeats."""

    layers: tuple[LayerWeights[Slot], ...]


@flax.struct.dataclass
class Unstacked(Generic[Slot]):
    """Weights of a Stack's layers, in order, each its own."""

    layers: tuple[LayerWeights[Slot], ...]


@flax.struct.dataclass
class ModelWeights(Generic[Slot]):
    embed: Slot
    stacks: tuple[Stacked[Slot] | Unstacked[Slot], ...]
    norm: NormWeights[Slot]
    output: Slot | None = None
    score: Slot | None = None


def vector(size: int, axis: str | None, init: Literal["ones", "zeros"] = "zeros") -> ParamSpec:
    """The spec of a scale or a bias."""
    return ParamSpec((size,), (axis,), init, kind="vector")


def bias(size: int, axis: str | None, present: bool) -> ParamSpec | None:
    """The spec of a bias that a layer may have."""
    return vector(size, axis) if present else None


def norm_specs(norm: Norm, size: int, axis: str | None = "norm") -> NormWeights[ParamSpec]:
    init = "zeros" if norm.plus_one else "ones"
    return NormWeights(vector(size, axis, init), bias(size, axis, norm.bias))


def attention_specs(
    a: Attention, norm: Norm, D: int, out_scale: float
) -> AttentionWeights[ParamSpec]:
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    query_norm = key_norm = None
    if a.qk_norm == "head":
        query_norm = key_norm = norm_specs(norm, a.head_dim, None).scale
    elif a.qk_norm == "full":
        query_norm, key_norm = norm_specs(norm, q, None).scale, norm_specs(norm, kv, None).scale
    return AttentionWeights(
        query=ParamSpec((D, q), ("embed", "heads"), scale=D**-0.5),
        key=ParamSpec((D, kv), ("embed", "kv_heads"), scale=D**-0.5),
        value=ParamSpec((D, kv), ("embed", "kv_heads"), scale=D**-0.5),
        out=ParamSpec((q, D), ("heads", "embed"), scale=q**-0.5 * out_scale),
        query_bias=bias(q, "heads", a.bias),
        key_bias=bias(kv, "kv_heads", a.bias),
        value_bias=bias(kv, "kv_heads", a.bias),
        out_bias=bias(D, "norm", a.out_bias),
        query_norm=query_norm,
        key_norm=key_norm,
        sinks=bias(a.num_heads, "heads", a.sinks),
    )


def latent_attention_specs(
    a: Attention, latent: Latent, D: int, out_scale: float
) -> LatentAttentionWeights[ParamSpec]:
    """Latents are whole on every device of `tensor`; what is made of them is split by heads."""
    R, q, v = latent.kv_rank, a.num_heads * a.head_dim, a.num_heads * latent.value_dim

    def down(size: int) -> ParamSpec:
        return ParamSpec((D, size), ("embed", None), scale=D**-0.5)

    def up(rank: int, size: int) -> ParamSpec:
        return ParamSpec((rank, size), ("embed", "heads"), scale=rank**-0.5)

    weights = LatentAttentionWeights(
        key_value_down=down(R + latent.rope_dim),
        key_value_norm=vector(R, None, "ones"),
        key_value_up=up(R, a.num_heads * latent.nope_dim + v),
        out=ParamSpec((v, D), ("heads", "embed"), scale=v**-0.5 * out_scale),
        key_value_down_bias=bias(R + latent.rope_dim, None, a.bias),
        out_bias=bias(D, "norm", a.out_bias),
    )
    rank = latent.query_rank
    if rank is None:
        return dataclasses.replace(weights, query=up(D, q))
    return dataclasses.replace(
        weights,
        query_down=down(rank),
        query_norm=vector(rank, None, "ones"),
        query_up=up(rank, q),
        query_down_bias=bias(rank, None, a.bias),
    )


def feed_forward_specs(f: FeedForward, D: int, out_scale: float) -> FeedForwardWeights[ParamSpec]:
    F = f.hidden_dim
    matrix = ParamSpec((D, F), ("embed", "ffn"), scale=D**-0.5)
    return FeedForwardWeights(
        up=matrix,
        down=ParamSpec((F, D), ("ffn", "embed"), scale=F**-0.5 * out_scale),
        gate=matrix if f.gated else None,
        up_bias=bias(F, "ffn", f.bias),
        down_bias=bias(D, "norm", f.bias),
        gate_bias=bias(F, "ffn", f.bias and f.gated),
    )


def layer_specs(layer: Layer, D: int, num_layers: int) -> LayerWeights[ParamSpec]:
    """Specs of one layer. Projections back into the residual start smaller by sqrt(2 layers)."""
    out_scale = (2 * num_layers) ** -0.5
    norm = norm_specs(layer.norm, D)
    pre = norm if layer.placement in ("pre", "both") else None
    post = norm if layer.placement in ("post", "both") else None
    a = layer.attention
    return LayerWeights(
        attention=attention_specs(a, layer.norm, D, out_scale)
        if a.latent is None
        else latent_attention_specs(a, a.latent, D, out_scale),
        feed_forward=feed_forward_specs(layer.feed_forward, D, out_scale),
        attention_norm=pre,
        attention_post_norm=post,
        feed_forward_norm=pre,
        feed_forward_post_norm=post,
    )


def stack_specs(stack: Stack, D: int, num_layers: int) -> Stacked[ParamSpec]:
    def stacked(spec: ParamSpec) -> ParamSpec:
        shape, axes = (stack.num_repeats, *spec.shape), ("layers", *spec.axes)
        return dataclasses.replace(spec, shape=shape, axes=axes)

    specs = tuple(layer_specs(layer, D, num_layers) for layer in stack.pattern)
    return Stacked(map_specs(stacked, specs))


def param_specs(config: ModelConfig) -> ModelWeights[ParamSpec]:
    """The specs of every weight of the model, in the stacked form."""
    D, V = config.embed_dim, config.padded_vocab_size
    # A scaled embedding (Gemma) starts small enough that the residual stream starts near one.
    embed_scale = 1.0 / config.embed_scale if config.embed_scale else 0.02

    def head(size: int, axis: str | None) -> ParamSpec:
        return ParamSpec((D, size), ("embed", axis), scale=D**-0.5, kind="embedding")

    return ModelWeights(
        embed=ParamSpec((V, D), ("vocab", "embed"), scale=embed_scale, kind="embedding"),
        stacks=tuple(stack_specs(stack, D, config.num_layers) for stack in config.stacks),
        norm=norm_specs(config.norm, D),
        output=None if config.tied else head(V, "vocab"),
        score=None if config.score_dim is None else head(config.score_dim, None),
    )


def unstacked_specs(config: ModelConfig) -> ModelWeights[ParamSpec]:
    """The specs of every weight of the model, in the serving form."""

    def layer(each: Layer) -> LayerWeights[ParamSpec]:
        return layer_specs(each, config.embed_dim, config.num_layers)

    stacks = tuple(Unstacked(tuple(map(layer, stack.layers))) for stack in config.stacks)
    return dataclasses.replace(param_specs(config), stacks=stacks)


def specs_for(params: ModelWeights, config: ModelConfig) -> ModelWeights[ParamSpec]:
    """The specs of every weight of the model, each stack in the form it has in `params`."""
    stacked, unstacked = param_specs(config), unstacked_specs(config)
    forms = zip(params.stacks, stacked.stacks, unstacked.stacks, strict=True)
    stacks = tuple(u if isinstance(own, Unstacked) else s for own, s, u in forms)
    return dataclasses.replace(stacked, stacks=stacks)


def layer_at(stack: Stacked[Slot] | Unstacked[Slot], index: int) -> LayerWeights[Slot]:
    """Weights of layer `index` of a stack, in either form."""
    if isinstance(stack, Unstacked):
        return stack.layers[index]
    repeat, position = divmod(index, len(stack.layers))
    return jax.tree.map(lambda a: a[repeat], stack.layers[position])


def num_layers(stack: Stacked | Unstacked) -> int:
    if isinstance(stack, Unstacked):
        return len(stack.layers)
    return len(stack.layers) * jax.tree.leaves(stack)[0].shape[0]


def unstack(params: ModelWeights[Weight]) -> ModelWeights[Weight]:
    """The serving form: every layer its own arrays."""
    stacks = tuple(
        Unstacked(tuple(layer_at(stack, i) for i in range(num_layers(stack))))
        for stack in params.stacks
    )
    return dataclasses.replace(params, stacks=stacks)


def stack(params: ModelWeights[Weight], config: ModelConfig) -> ModelWeights[Weight]:
    """The training form, from the serving form.

    Raises:
      ValueError: layers that share a stack differ in leaf types or shapes.
    """

    def join(
        weights: Stacked[Weight] | Unstacked[Weight], spec: Stack, name: str
    ) -> Stacked[Weight]:
        if isinstance(weights, Stacked):
            return weights
        size = len(spec.pattern)
        columns = []
        for position in range(size):
            layers = weights.layers[position::size]
            shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), layer) for layer in layers]
            for i, shape in enumerate(shapes):
                if shape != shapes[0]:
                    raise ValueError(
                        f"{name}: layer {position + i * size} differs from layer {position} in "
                        "leaf types or shapes; keep the unstacked form"
                    )
            columns.append(jax.tree.map(lambda *a: jax.numpy.stack(a), *layers))
        return Stacked(tuple(columns))

    pairs = zip(params.stacks, config.stacks, strict=True)
    return dataclasses.replace(
        params, stacks=tuple(join(w, spec, f"stacks/{i}") for i, (w, spec) in enumerate(pairs))
    )


def check_layout(
    config: ModelConfig, layout: Layout, specs: Any = None, pipeline: bool = False
) -> None:
    """Whether the layout can split the model: its weights, gradients, optimizer state and heads.

    Args:
      config: the model.
      layout: mesh and rules, and with them the ZeRO stage and its axes.
      specs: of every weight, where some are not plain arrays; None for `param_specs(config)`.
      pipeline: whether something runs the stages; else `stage` must be 1.

    Raises:
      ValueError: a mesh axis does not divide a size, or the model has no use for one. The message
        names the weight, the axis and the sizes that work.
    """
    mesh, rules = layout.mesh, layout.rules
    specs = param_specs(config) if specs is None else specs
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    used = {"stage": pipeline, "expert": any("experts" in spec.axes for spec in leaves)}
    for axis, missing in (("stage", "pipeline"), ("expert", "mixture of experts")):
        if mesh.shape[axis] > 1 and not used[axis]:
            raise ValueError(
                f"mesh axis {axis!r}={mesh.shape[axis]}: the model has no {missing}; use 1"
            )
    for a in dict.fromkeys(layer.attention for layer in config.layers):
        for name, size in (("kv_heads", a.num_kv_heads), ("heads", a.num_heads)):
            check_divides(mesh, rules.activations.get(name, ()), f"num_{name}", size)
    for kind in ("weights", "gradients", "optimizer"):
        shardings(specs, rules, mesh, kind=kind)
