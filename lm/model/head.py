"""From hidden states to logits and log-probabilities."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.cross_entropy import structured_token_logprobs, token_logprobs
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
        logits = constrain(self._project(self.weight, hidden), "batch", "sequence", "vocab")
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
        logprobs, logsumexp = self._statistics(hidden, targets, entropy=False)
        return logprobs, logsumexp

    def logprobs_and_entropy(
        self, hidden: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probability of `targets` [B, T], and the entropy in nats of what they are drawn from.

        Both float32 [B, T], and in the memory that `logprobs` takes.
        """
        logprobs, _, entropy = self._statistics(hidden, targets, entropy=True)
        return logprobs, entropy

    def _statistics(
        self, hidden: jax.Array, targets: jax.Array, entropy: bool
    ) -> tuple[jax.Array, ...]:
        config, weight = self.config, self.weight
        options: dict[str, Any] = {
            "vocab_size": config.vocab_size, "softcap": config.logit_softcap, "entropy": entropy,
        }  # fmt: skip
        if isinstance(weight, StructuredWeight):
            project = functools.partial(self._project, weight)
            return structured_token_logprobs(hidden, project, targets, **options)
        return token_logprobs(
            hidden, weight, targets,
            transposed=config.tied, implementation=self.loss, **options,
        )  # fmt: skip

    def _project(self, weight: Weight, hidden: jax.Array) -> jax.Array:
        """Logits [B, T, V padded] before soft-cap and masking."""
        specs = param_specs(self.config)
        weight = gather(weight, specs.embed if self.config.tied else specs.output)
        return unembed(constrain(hidden, "batch", "sequence", None), weight, self.config.tied)


def make_head(params: ModelWeights, config: ModelConfig, loss: str | None = None) -> Head:
    """The head of a model."""
    weight = params.embed if params.output is None else params.output
    return Head(weight, config, loss, params.score)
