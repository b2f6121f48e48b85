"""The model as a `flax.nnx.Module`, for code that speaks Flax; `forward` does the computing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lm.model.config import ModelConfig
from lm.model.decoder import Tokens, forward
from lm.model.head import make_head
from lm.model.params import ModelWeights, param_specs
from lm.weights import initialize


class Transformer(nnx.Module):
    """A decoder whose every weight is an `nnx.Param`, under the name it has in `ModelWeights`.

    `nnx.state(model)` has paths such as `("weights", "stacks", 0, "layers", 0, "attention",
    "query")`; `nnx.split`, `nnx.merge`, `nnx.value_and_grad` and `nnx.Optimizer` work as on any
    module. A quantized leaf is a Param for each of its arrays.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: ModelWeights | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: Any = jnp.float32,
        remat: str = "none",
    ) -> None:
        """A model of given weights, or of fresh ones.

        Args:
          config: the model.
          params: weights, stacked or unstacked; the arrays are shared, not copied.
          rngs: initializes the weights (stream `params`) where none are given.
          dtype: of activations.
          remat: what the backward pass computes again; see `lm.model.remat`.

        Raises:
          ValueError: not exactly one of `params` and `rngs` is given.
        """
        if (params is None) == (rngs is None):
            given = "neither" if params is None else "both"
            raise ValueError(
                f"{given} of params and rngs given; give weights, or rngs to make them"
            )
        if rngs is not None:
            params = initialize(param_specs(config), rngs.params())
        self.config, self.dtype, self.remat = config, dtype, remat
        self.weights = nnx.data(jax.tree.map(nnx.Param, params))

    def params(self) -> ModelWeights:
        """The weights as `forward` takes them."""
        return jax.tree.map(
            lambda param: param.get_value(),
            self.weights,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )

    def __call__(self, tokens: Tokens | jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V padded], of `tokens`, or of ids [B, T] that are documents."""
        if not isinstance(tokens, Tokens):
            tokens = Tokens.of(tokens)
        params = self.params()
        output = forward(params, tokens, self.config, dtype=self.dtype, remat=self.remat)
        return make_head(params, self.config).logits(output.hidden)
