"""The local engine: batches of requests through one prefill and one decoding loop.

Shape suffixes: B rows, T prompt tokens, S positions of the cache, K likeliest tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.infer.cache import CacheKind, make_cache
from lm.infer.requests import Request, Sample
from lm.infer.sampling import sample_tokens, token_keys
from lm.infer.serving import serving_form
from lm.infer.text import StoppedText, Stream
from lm.model import ModelConfig, ModelWeights, Tokens, forward, make_head
from lm.weights import bind, num_adapters

MIN_PROMPT, MIN_CACHE, MIN_STOPS = 16, 64, 4  # smallest buckets
WIDER = "bfloat16 and float32 hold larger numbers than float16"
WATCHED = 8  # tokens a row between two looks at the text


class Decoder(Protocol):
    """The part of a tokenizer that fills in text."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    def stream(self, *, continuation: bool) -> Stream: ...


@flax.struct.dataclass
class Controls:
    """What the rows asked for.

    Attributes:
      seeds: uint32 [B].
      temperatures, top_ps: float32 [B].
      top_ks: int32 [B].
      stop_ids: int32 [B, M], -1 for none.
      ends: int32 [B], the position at which a row is full.
      adapters: int32 [B], -1 for none; or None where the model has not several.
    """

    seeds: Any
    temperatures: Any
    top_ks: Any
    top_ps: Any
    stop_ids: Any
    ends: Any
    adapters: Any = None


class CacheForm(NamedTuple):
    """Kind and dtype of the cache."""

    kind: CacheKind
    dtype: Any


@flax.struct.dataclass
class State:
    """Rows being generated.

    Attributes:
      cache: one a layer; holds every position before the newest token's.
      tokens, logprobs: [B, S], of generated tokens, by position.
      top_ids, top_logprobs: [B, S, K], the likeliest at that position, best first.
      last: int32 [B], the newest token.
      positions: int32 [B], of the token to come.
      done: bool [B].
    """

    cache: Any
    tokens: Any
    logprobs: Any
    top_ids: Any
    top_logprobs: Any
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
        cache_kind: CacheKind = "sliding",
        cache_dtype: Any = None,
    ) -> None:
        """Weights are brought into `serving_form`, in `dtype`, once.

        Args:
          params: weights, stacked or not.
          config: the model.
          tokenizer: fills in `Sample.text`.
          eos_ids: tokens that end every sample; None for the tokenizer's, if any.
          max_length: longest prompt and sample together; None for the model's.
          max_batch: most rows at once.
          dtype: of compute and cache.
          cache_kind: see `lm.infer.cache.make_cache`.
          cache_dtype: of the cache; None for `dtype`.

        Raises:
          ValueError: `max_batch` or `max_length` is out of range.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}; use 1 or more")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length}; use 2 or more: a prompt and a new token")
        if eos_ids is None:
            eos_ids = () if tokenizer is None else tokenizer.eos_ids
        self.params = serving_form(params, dtype)
        self.num_adapters = num_adapters(self.params)
        self.config, self.tokenizer, self.dtype = config, tokenizer, dtype
        self.eos_ids, self.max_batch = tuple(eos_ids), max_batch
        self.max_length = config.max_length if max_length is None else max_length
        self.cache = CacheForm(cache_kind, dtype if cache_dtype is None else cache_dtype)

    def sample(
        self, requests: Sequence[Request], watch: Callable[[int, str], None] | None = None
    ) -> list[Sample]:
        """One sample for each request, in their order.

        Args:
          requests: what to continue.
          watch: called with the index of a request and text of its sample as it comes; the pieces
            add up to `Sample.text`.

        Raises:
          ValueError: a prompt leaves no room for a new token, or has an id outside the vocabulary;
            more likeliest tokens than there are; an adapter that is not there; a stop text, or
            `watch`, without a tokenizer.
        """
        for i, request in enumerate(requests):
            self._check(i, request)
        if watch is not None and self.tokenizer is None:
            raise ValueError("watch is given text, which needs a tokenizer; give LocalSampler one")
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_token_ids))
        samples: dict[int, Sample] = {}
        for start in range(0, len(requests), self.max_batch):
            rows = by_length[start : start + self.max_batch]
            batch = _Batch(self, [requests[i] for i in rows], rows, watch)
            samples.update(zip(rows, batch.run(), strict=True))
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
        if request.top_logprobs > vocab_size:
            raise ValueError(
                f"request {index}: top_logprobs={request.top_logprobs}; there are {vocab_size} "
                "tokens"
            )
        if request.adapter is not None and request.adapter >= self.num_adapters:
            raise ValueError(
                f"request {index}: adapter={request.adapter}; the model has {self.num_adapters} to "
                "choose from (see lm.adapters.combine)"
            )
        if request.stop and self.tokenizer is None:
            raise ValueError(
                f"request {index}: stop texts need a tokenizer; give LocalSampler one, or use "
                "stop_ids"
            )


class _Batch:
    """Requests that run together, and the text of their samples so far."""

    def __init__(
        self,
        sampler: LocalSampler,
        requests: Sequence[Request],
        indices: Sequence[int],
        watch: Callable[[int, str], None] | None,
    ) -> None:
        self.sampler, self.requests, self.indices, self.watch = sampler, requests, indices, watch
        self.stops = [tuple(dict.fromkeys((*sampler.eos_ids, *r.stop_ids))) for r in requests]
        self.ids: list[list[int]] = [[] for _ in requests]
        self.texts: list[StoppedText] = []
        if sampler.tokenizer is not None:
            stream = sampler.tokenizer.stream
            self.texts = [StoppedText(stream(continuation=True), r.stop) for r in requests]

    def run(self) -> list[Sample]:
        sampler = self.sampler
        params, config, dtype = sampler.params, sampler.config, sampler.dtype
        ids, lengths, controls, length, num_top = self._arrays()
        state = prefill(
            params, ids, lengths, controls, config, length, num_top, dtype, sampler.cache
        )
        watched = self.watch is not None or any(request.stop for request in self.requests)
        steps = WATCHED if watched else length
        while True:
            state = decode(params, state, controls, steps, config, dtype)
            tokens, positions, done = jax.device_get((state.tokens, state.positions, state.done))
            stopped = np.array(done)
            for i in range(len(self.requests)):
                new = slice(int(lengths[i]) + len(self.ids[i]), int(positions[i]))
                stopped[i] |= self._take(i, tokens[i, new].tolist())
            if stopped.all():
                break
            state = dataclasses.replace(state, done=jnp.asarray(stopped))
        kept = jax.device_get((state.logprobs, state.top_ids, state.top_logprobs))
        return [self._sample(i, int(lengths[i]), *kept) for i in range(len(self.requests))]

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, Controls, int, int]:
        """Prompts, their lengths, controls; positions of the cache; number of likeliest tokens."""
        requests, most = self.requests, self.sampler.max_length
        B = bucket(len(requests), 1, self.sampler.max_batch)
        # Rows that only fill the batch have a prompt of one token and are done at once.
        lengths, ends = np.ones(B, np.int32), np.zeros(B, np.int32)
        for i, r in enumerate(requests):
            lengths[i] = len(r.prompt_token_ids)
            ends[i] = min(lengths[i] + r.max_new_tokens, most)
        T = bucket(int(lengths.max()), MIN_PROMPT, most)
        S = bucket(int(ends.max()), MIN_CACHE, most)
        num_top = max(r.top_logprobs for r in requests)
        num_top = bucket(num_top, 1, self.sampler.config.vocab_size) if num_top else 0
        ids = np.zeros((B, T), np.int32)
        seeds, top_ks = np.zeros(B, np.uint32), np.zeros(B, np.int32)
        temperatures, top_ps = np.zeros(B, np.float32), np.ones(B, np.float32)
        adapters = np.full(B, -1, np.int32)
        stop_ids = np.full((B, bucket(max(map(len, self.stops)), MIN_STOPS)), -1, np.int32)
        for i, r in enumerate(requests):
            ids[i, : lengths[i]] = r.prompt_token_ids
            seeds[i], temperatures[i] = r.seed, r.temperature
            top_ks[i], top_ps[i] = min(r.top_k, np.iinfo(np.int32).max), r.top_p
            stop_ids[i, : len(self.stops[i])] = self.stops[i]
            adapters[i] = -1 if r.adapter is None else r.adapter
        controls = Controls(seeds, temperatures, top_ks, top_ps, stop_ids, ends, adapters)
        return ids, lengths, controls, S, num_top

    def _take(self, i: int, new: Sequence[int]) -> bool:
        """Add the tokens of a row; whether a stop text has ended it."""
        for token in new:
            if self.texts and self.texts[i].stopped:
                return True
            self.ids[i].append(token)
            if self.texts and token not in self.stops[i]:
                self._tell(i, self.texts[i].push(token))
        return bool(self.texts) and self.texts[i].stopped

    def _tell(self, i: int, text: str) -> None:
        if text and self.watch is not None:
            self.watch(self.indices[i], text)

    def _sample(
        self,
        i: int,
        start: int,
        logprobs: np.ndarray,
        top_ids: np.ndarray,
        top_logprobs: np.ndarray,
    ) -> Sample:
        request, ids = self.requests[i], self.ids[i]
        text = None
        stopped = ids[-1] in self.stops[i]
        if self.texts:
            self._tell(i, self.texts[i].finish())
            text = self.texts[i].text
            stopped = stopped or self.texts[i].stopped
        rows = range(start, start + len(ids))
        if not np.isfinite(logprobs[i, start : start + len(ids)]).all():
            raise ValueError(
                f"request {self.indices[i]}: log-probabilities are not finite in "
                f"{jnp.dtype(self.sampler.dtype)}; {WIDER}"
            )
        top = None
        if request.top_logprobs:
            shown = slice(0, request.top_logprobs)
            top = tuple(
                tuple(
                    zip(
                        top_ids[i, p, shown].tolist(),
                        top_logprobs[i, p, shown].tolist(),
                        strict=True,
                    )
                )
                for p in rows
            )
        return Sample(
            prompt_token_ids=tuple(request.prompt_token_ids),
            token_ids=tuple(ids),
            finish_reason="stop" if stopped else "length",
            logprobs=tuple(logprobs[i, p].item() for p in rows) if request.logprobs else None,
            text=text,
            top_logprobs=top,
        )


def bucket(size: int, smallest: int, largest: int | None = None) -> int:
    """The next power of two, from `smallest` and up to `largest`."""
    bucket = max(smallest, 1 << (size - 1).bit_length()) if size else smallest
    return bucket if largest is None else min(bucket, largest)


@functools.partial(jax.jit, static_argnames=("config", "length", "num_top", "dtype", "form"))
def prefill(
    params: ModelWeights,
    ids: jax.Array,
    lengths: jax.Array,
    controls: Controls,
    config: ModelConfig,
    length: int,
    num_top: int,
    dtype: Any,
    form: CacheForm | None = None,
) -> State:
    """Read the prompts and draw each row's first token.

    Args:
      params: weights.
      ids: int32 [B, T], prompts padded on the right.
      lengths: int32 [B], at least 1.
      controls: what the rows asked for; a row whose end is not after its prompt draws nothing.
      config: the model.
      length: positions of the cache, S.
      num_top: likeliest tokens to keep of each position, K.
      dtype: of compute.
      form: of the cache; None for a contiguous one of `dtype`.
    """
    B, T = ids.shape
    form = form or CacheForm("contiguous", dtype)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    cache = make_cache(config, B, length, form.dtype, kind=form.kind)
    params = _bound(params, controls)
    output = forward(params, Tokens(ids, positions, segment_ids), config, cache, dtype=dtype)
    last_hidden = jnp.take_along_axis(output.hidden, lengths[:, None, None] - 1, axis=1)
    state = State(
        cache=output.cache,
        tokens=jnp.zeros((B, length), jnp.int32),
        logprobs=jnp.zeros((B, length), jnp.float32),
        top_ids=jnp.zeros((B, length, num_top), jnp.int32),
        top_logprobs=jnp.zeros((B, length, num_top), jnp.float32),
        last=jnp.zeros(B, jnp.int32),
        positions=lengths,
        done=lengths >= controls.ends,
    )
    return _emit(state, last_hidden, params, controls, config)


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="state")
def decode(
    params: ModelWeights,
    state: State,
    controls: Controls,
    steps: int | jax.Array,
    config: ModelConfig,
    dtype: Any,
) -> State:
    """Draw tokens until every row is done, or has got `steps` of them.

    The loop runs on the device, with the cache updated in place: about as fast as one call a token
    from the host (on two CPU cores 3 % slower to 12 % faster), which would also have to wait for
    each token to know when to stop.
    """
    params = _bound(params, controls)

    def step(state: State) -> State:
        positions = (state.positions - 1)[:, None]
        live = jnp.where(state.done, 0, 1)[:, None]
        tokens = Tokens(state.last[:, None], positions, live)
        output = forward(params, tokens, config, state.cache, dtype=dtype)
        return _emit(
            dataclasses.replace(state, cache=output.cache), output.hidden, params, controls, config
        )

    def more(loop: tuple[jax.Array, State]) -> jax.Array:
        return (loop[0] < steps) & ~jnp.all(loop[1].done)

    start = jnp.int32(0), state
    return jax.lax.while_loop(more, lambda loop: (loop[0] + 1, step(loop[1])), start)[1]


def _bound(params: ModelWeights, controls: Controls) -> ModelWeights:
    return params if controls.adapters is None else bind(params, controls.adapters)


def _emit(
    state: State, hidden: jax.Array, params: ModelWeights, controls: Controls, config: ModelConfig
) -> State:
    """Draw a token for each live row from hidden [B, 1, D] and write it down."""
    logits = make_head(params, config).logits(hidden)[:, 0]
    keys = token_keys(controls.seeds, state.positions)
    tokens, logprobs = sample_tokens(
        logits,
        keys,
        controls.temperatures,
        config.vocab_size,
        controls.top_ks,
        controls.top_ps,
    )
    rows, live = jnp.arange(tokens.shape[0]), ~state.done
    slots = jnp.where(live, state.positions, state.tokens.shape[1])
    positions = state.positions + live
    stopped = jnp.any(tokens[:, None] == controls.stop_ids, axis=1)
    top_ids, top_logprobs = state.top_ids, state.top_logprobs
    if num_top := top_ids.shape[-1]:
        best, ids = jax.lax.top_k(logits, num_top)
        best -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        top_ids = top_ids.at[rows, slots].set(ids, mode="drop")
        top_logprobs = top_logprobs.at[rows, slots].set(best, mode="drop")
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, slots].set(tokens, mode="drop"),
        logprobs=state.logprobs.at[rows, slots].set(logprobs, mode="drop"),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        last=tokens,
        positions=positions,
        done=state.done | stopped | (positions >= controls.ends),
    )
