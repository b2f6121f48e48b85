"""The local engine: batches of requests through one prefill and one decoding loop.

Shape suffixes: B rows, T prompt tokens, S positions of the cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.infer.cache import make_cache
from lm.infer.requests import Request, Sample
from lm.infer.sampling import sample_tokens, token_keys
from lm.model import ModelConfig, ModelWeights, Tokens, forward, make_head, unstack
from lm.weights import cast

MIN_PROMPT, MIN_CACHE, MIN_STOPS = 16, 64, 4  # smallest buckets


class Decoder(Protocol):
    """The part of a tokenizer that fills in text."""

    @property
    def eos_id(self) -> int: ...

    def decode(self, ids: Iterable[int]) -> str: ...


@flax.struct.dataclass
class Controls:
    """What the rows asked for.

    Attributes:
      seeds: uint32 [B].
      temperatures: float32 [B].
      stop_ids: int32 [B, M], -1 for none.
      ends: int32 [B], the position at which a row is full.
    """

    seeds: Any
    temperatures: Any
    stop_ids: Any
    ends: Any


@flax.struct.dataclass
class State:
    """Rows being generated.

    Attributes:
      cache: one a layer; holds every position before the newest token's.
      tokens, logprobs: [B, S], of generated tokens, by position.
      last: int32 [B], the newest token.
      positions: int32 [B], of the token to come.
      done: bool [B].
    """

    cache: Any
    tokens: Any
    logprobs: Any
    last: Any
    positions: Any
    done: Any


class LocalSampler:
    """A Sampler that runs the model here.

    Requests are run in batches of similar lengths. Prompts, cache and batch are padded to powers of
    two, so that few shapes are compiled. What a request gets depends on nothing but the request, up
    to float rounding between shapes.
    """

    def __init__(
        self,
        params: ModelWeights,
        config: ModelConfig,
        *,
        tokenizer: Decoder | None = None,
        eos_ids: Sequence[int] | None = None,
        max_length: int | None = None,
        max_batch: int = 16,
        dtype: Any = jnp.float32,
    ) -> None:
        """Weights are unstacked, and cast to `dtype`, once.

        Args:
          params: weights, stacked or not.
          config: the model.
          tokenizer: fills in `Sample.text`.
          eos_ids: tokens that end every sample; None for the tokenizer's end of sequence, if any.
          max_length: longest prompt and sample together; None for the model's.
          max_batch: most rows at once.
          dtype: of compute and cache. bfloat16 is slow for single tokens on CPUs.

        Raises:
          ValueError: `max_batch` or `max_length` is out of range.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}; use 1 or more")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length}; use 2 or more: a prompt and a new token")
        if eos_ids is None:
            eos_ids = () if tokenizer is None else (tokenizer.eos_id,)
        self.params = cast(unstack(params), dtype)
        self.config, self.tokenizer, self.dtype = config, tokenizer, dtype
        self.eos_ids, self.max_batch = tuple(eos_ids), max_batch
        self.max_length = config.max_length if max_length is None else max_length

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample for each request, in their order.

        Raises:
          ValueError: a prompt leaves no room for a new token, or has an id outside the vocabulary.
        """
        for i, request in enumerate(requests):
            self._check(i, request)
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_token_ids))
        samples: dict[int, Sample] = {}
        for start in range(0, len(requests), self.max_batch):
            rows = by_length[start : start + self.max_batch]
            samples.update(zip(rows, self._run([requests[i] for i in rows]), strict=True))
        return [samples[i] for i in range(len(requests))]

    def _check(self, index: int, request: Request) -> None:
        ids, vocab_size = request.prompt_token_ids, self.config.vocab_size
        if len(ids) >= self.max_length:
            raise ValueError(
                f"request {index}: the prompt's {len(ids)} tokens leave no room for a new one in "
                f"max_length={self.max_length}; use at most {self.max_length - 1}"
            )
        if max(ids) >= vocab_size:
            raise ValueError(
                f"request {index}: token id {max(ids)} is outside vocab_size={vocab_size}; encode "
                "the prompt with the model's own tokenizer"
            )

    def _run(self, requests: Sequence[Request]) -> list[Sample]:
        """One batch."""
        B = _bucket(len(requests), 1, self.max_batch)
        stops = [tuple(dict.fromkeys((*self.eos_ids, *r.stop_ids))) for r in requests]
        # Rows that only fill the batch have a prompt of one token and are done at once.
        lengths = np.ones(B, np.int32)
        lengths[: len(requests)] = [len(r.prompt_token_ids) for r in requests]
        ends = np.zeros(B, np.int32)
        ends[: len(requests)] = [
            min(len(r.prompt_token_ids) + r.max_new_tokens, self.max_length) for r in requests
        ]
        T = _bucket(int(lengths.max()), MIN_PROMPT, self.max_length)
        S = _bucket(int(ends.max()), MIN_CACHE, self.max_length)
        ids = np.zeros((B, T), np.int32)
        seeds, temperatures = np.zeros(B, np.uint32), np.zeros(B, np.float32)
        stop_ids = np.full((B, _bucket(max(map(len, stops)), MIN_STOPS)), -1, np.int32)
        for i, request in enumerate(requests):
            ids[i, : lengths[i]] = request.prompt_token_ids
            seeds[i], temperatures[i] = request.seed, request.temperature
            stop_ids[i, : len(stops[i])] = stops[i]
        controls = Controls(seeds, temperatures, stop_ids, ends)
        state = prefill(self.params, ids, lengths, controls, self.config, S, self.dtype)
        state = decode(self.params, state, controls, self.config, self.dtype)
        tokens, logprobs, stop_at = jax.device_get((state.tokens, state.logprobs, state.positions))
        samples = []
        for i, request in enumerate(requests):
            new = slice(int(lengths[i]), int(stop_at[i]))
            values = logprobs[i, new].tolist()
            samples.append(self._sample(request, tokens[i, new].tolist(), values, stops[i]))
        return samples

    def _sample(
        self, request: Request, ids: list[int], logprobs: list[float], stops: Sequence[int]
    ) -> Sample:
        stopped = ids[-1] in stops
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(ids[:-1] if stopped else ids)
        return Sample(
            prompt_token_ids=tuple(request.prompt_token_ids),
            token_ids=tuple(ids),
            finish_reason="stop" if stopped else "length",
            logprobs=tuple(logprobs) if request.logprobs else None,
            text=text,
        )


def _bucket(size: int, smallest: int, largest: int | None = None) -> int:
    """The next power of two, from `smallest` and up to `largest`."""
    bucket = max(smallest, 1 << (size - 1).bit_length()) if size else smallest
    return bucket if largest is None else min(bucket, largest)


@functools.partial(jax.jit, static_argnames=("config", "length", "dtype"))
def prefill(
    params: ModelWeights,
    ids: jax.Array,
    lengths: jax.Array,
    controls: Controls,
    config: ModelConfig,
    length: int,
    dtype: Any,
) -> State:
    """Read the prompts and draw each row's first token.

    Args:
      params: weights.
      ids: int32 [B, T], prompts padded on the right.
      lengths: int32 [B], at least 1.
      controls: what the rows asked for; a row whose end is not after its prompt draws nothing.
      config: the model.
      length: positions of the cache, S.
      dtype: of compute and cache.
    """
    B, T = ids.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    cache = make_cache(config, B, length, dtype)
    output = forward(params, Tokens(ids, positions, segment_ids), config, cache, dtype=dtype)
    last_hidden = jnp.take_along_axis(output.hidden, lengths[:, None, None] - 1, axis=1)
    state = State(
        cache=output.cache,
        tokens=jnp.zeros((B, length), jnp.int32),
        logprobs=jnp.zeros((B, length), jnp.float32),
        last=jnp.zeros(B, jnp.int32),
        positions=lengths,
        done=lengths >= controls.ends,
    )
    return _emit(state, last_hidden, params, controls, config)


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="state")
def decode(
    params: ModelWeights, state: State, controls: Controls, config: ModelConfig, dtype: Any
) -> State:
    """Draw tokens until every row is done.

    The loop runs on the device, with the cache updated in place: about as fast as one call a token
    from the host (on two CPU cores 3 % slower to 12 % faster), which would also have to wait for
    each token to know when to stop.
    """

    def step(state: State) -> State:
        positions = (state.positions - 1)[:, None]
        live = jnp.where(state.done, 0, 1)[:, None]
        tokens = Tokens(state.last[:, None], positions, live)
        output = forward(params, tokens, config, state.cache, dtype=dtype)
        return _emit(
            dataclasses.replace(state, cache=output.cache), output.hidden, params, controls, config
        )

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state)


def _emit(
    state: State, hidden: jax.Array, params: ModelWeights, controls: Controls, config: ModelConfig
) -> State:
    """Draw a token for each live row from hidden [B, 1, D] and write it down."""
    logits = make_head(params, config).logits(hidden)[:, 0]
    keys = token_keys(controls.seeds, state.positions)
    tokens, logprobs = sample_tokens(logits, keys, controls.temperatures, config.vocab_size)
    rows, live = jnp.arange(tokens.shape[0]), ~state.done
    slots = jnp.where(live, state.positions, state.tokens.shape[1])
    positions = state.positions + live
    stopped = jnp.any(tokens[:, None] == controls.stop_ids, axis=1)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, slots].set(tokens, mode="drop"),
        logprobs=state.logprobs.at[rows, slots].set(logprobs, mode="drop"),
        last=tokens,
        positions=positions,
        done=state.done | stopped | (positions >= controls.ends),
    )
