"""From hidden states to logits and log-probabilities."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.kernels.cross_entropy import token_logprobs
from lm.model.config import ModelConfig
from lm.model.params import ModelWeights, param_specs
from lm.sharding import constrain
from lm.weights import StructuredWeight, Weight, gather, unembed

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class Head:
    """The output matrix of a model, tied to the embedding or its own.

    Attributes:
      weight: [D, V padded], or [V padded, D] where tied.
      config: the model.
      loss: implementation of `token_logprobs`; None lets the size of the logits decide.
      score: [D, score_dim], or None.
    """

    weight: Weight
    config: ModelConfig
    loss: str | None = None
    score: Weight | None = None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, T, D] -> float32 [B, T, V padded], soft-capped; padding is masked."""
        specs = param_specs(self.config)
        spec = specs.embed if self.config.tied else specs.output
        weight = gather(self.weight, spec)
        logits = unembed(constrain(hidden, "batch", "sequence", None), weight, self.config.tied)
        logits = constrain(logits, "batch", "sequence", "vocab")
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
        if self.config.padded_vocab_size > self.config.vocab_size:
            real = jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size
            logits = jnp.where(real, logits, MASKED)
        return logits

    def scores(self, hidden: jax.Array) -> jax.Array:
        """Scores of every token: hidden [B, T, D] -> float32 [B, T, score_dim].

        Raises:
          ValueError: the model has no score head.
        """
        if self.score is None:
            raise ValueError("the model has no score head; set score_dim of its ModelConfig")
        weight = gather(self.score, param_specs(self.config).score)
        return unembed(constrain(hidden, "batch", "sequence", None), weight, False)

    def logprobs(self, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probability of `targets` [B, T] and the log-sum-exp, both float32 [B, T].

        The logits are never held whole where they would be large.
        """
        weight = self.weight
        if isinstance(weight, StructuredWeight):
            weight = weight.dequantize(hidden.dtype)
        return token_logprobs(
            hidden,
            weight,
            targets,
            transposed=self.config.tied,
            vocab_size=self.config.vocab_size,
            softcap=self.config.logit_softcap,
            implementation=self.loss,
        )


def make_head(params: ModelWeights, config: ModelConfig, loss: str | None = None) -> Head:
    """The head of a model."""
    weight = params.embed if params.output is None else params.output
    return Head(weight, config, loss, params.score)
