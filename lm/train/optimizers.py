"""Optimizers, as optax transformations of gradients.

State leaves that mirror a weight end in the weight's path, so that `lm.train.state` can lay them
out as the weights' specs say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.weights import path_name

Tree = Any
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101), on matrices only.

    Attributes:
      b1, b2: decay of the first and second moments.
      eps: added to the root of the second moment.
      weight_decay: times learning rate and weight; norms and biases have none.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclasses.dataclass(frozen=True)
class Muon:
    """Momentum, orthogonalized, for the matrices of the layers; AdamW for everything else.

    K. Jordan, "Muon: an optimizer for hidden layers", 2024; updates are scaled by
    0.2 sqrt(max(in, out)) (arXiv:2502.16982), so that AdamW's learning rate serves both.

    Attributes:
      momentum: of the gradients, Nesterov's.
      steps: of the Newton-Schulz iteration.
      dtype: it is computed in.
      weight_decay: of matrices, times the learning rate.
      adam: for embedding, output, norms and biases.
    """

    momentum: float = 0.95
    steps: int = 5
    dtype: str = "bfloat16"
    weight_decay: float = 0.1
    adam: AdamW = AdamW()


def is_matrix(path: str) -> bool:
    """Whether a weight is a matrix: neither a norm's scale nor a bias."""
    name = path.rsplit("/", 1)[-1]
    return not (name in ("scale", "bias") or name.endswith(("_bias", "_norm")))


def is_hidden_matrix(path: str) -> bool:
    """Whether a weight is a matrix of a layer: neither embedding nor output."""
    return is_matrix(path) and path.startswith("stacks/")


def _mask(predicate: Callable[[str], Any]) -> Callable[[Tree], Tree]:
    return lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: predicate(path_name(path)), tree
    )


def make_optimizer(config: AdamW | Muon) -> optax.GradientTransformation:
    """The direction of a configuration's optimizer; its state is float32.

    The step multiplies it by minus the learning rate and adds it to the weights.
    """
    if isinstance(config, Muon):
        matrices = optax.chain(
            scale_by_muon(config.momentum, config.steps, jnp.dtype(config.dtype)),
            optax.add_decayed_weights(config.weight_decay),
        )
        others = _adam(config.adam)
        return optax.partition(
            {"muon": matrices, "adam": others},
            _mask(lambda path: "muon" if is_hidden_matrix(path) else "adam"),
        )
    return _adam(config)


def _adam(config: AdamW) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_mask(is_matrix)),
    )


class MuonState(NamedTuple):
    """Momentum of each matrix."""

    momentum: Tree


def scale_by_muon(momentum: float, steps: int, dtype: Any) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized over the last two dimensions of each matrix."""

    def init(params: Tree) -> MuonState:
        return MuonState(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        del params
        buffers = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state[0], updates)

        def direction(g: jax.Array, m: jax.Array) -> jax.Array:
            scale = 0.2 * max(g.shape[-2:]) ** 0.5
            nesterov = momentum * m + (1 - momentum) * g
            return scale * orthogonalize(nesterov, steps, dtype).astype(jnp.float32)

        return jax.tree.map(direction, updates, buffers), MuonState(buffers)

    return optax.GradientTransformation(init, update)


def orthogonalize(matrix: jax.Array, steps: int = 5, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Nearly U V^T of matrix = U S V^T, [*stack, in, out]: singular values near 1.

    A quintic Newton-Schulz iteration whose coefficients trade exactness for speed, so that singular
    values end between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.swapaxes(-1, -2) if tall else matrix).astype(jnp.float32)
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7
    x = x.astype(dtype)
    for _ in range(steps):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if tall else x


def clip_by_global_norm(gradients: Tree, max_norm: float | None) -> tuple[Tree, jax.Array]:
    """(gradients scaled down to `max_norm` if they exceed it, their norm before)."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
    if max_norm is None:
        return gradients, norm
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, gradients), norm
