"""The local engine: batches of requests through one prefill and one decoding loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lm.infer.cache import CacheKind
from lm.infer.programs import CacheConfig, DecodeState, SamplingParams, decode, prefill
from lm.infer.requests import Request, Sample, expand
from lm.infer.serving import layout_of, row_multiple, serving_form
from lm.infer.text import StoppedText, Stream
from lm.model import ModelConfig, ModelWeights
from lm.sharding import Layout
from lm.weights import num_adapters

MIN_PROMPT, MIN_CACHE, MIN_STOPS = 16, 64, 4  # smallest buckets
WIDER_DTYPE_HINT = "bfloat16 and float32 hold larger numbers than float16"
POLL_EVERY = 8  # tokens per row between two looks at the text
# Fields of a Request this sampler does not implement, and their values that ask for nothing.
UNSUPPORTED = {
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "grammar": None,
}  # fmt: skip


class Decoder(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def stream(self, *, continuation: bool) -> Stream: ...


class LocalSampler:
    """A Sampler that runs the model on the devices of its weights.

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
        layout: Layout | None = None,
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
          layout: mesh and rules to compute under; None for those of the weights (`layout_of`).

        Raises:
          ValueError: `max_batch` or `max_length` is out of range, or the weights are not on the
            layout's devices.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}; use 1 or more")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length}; use 2 or more: a prompt and a new token")
        if eos_ids is None:
            eos_ids = () if tokenizer is None else tokenizer.eos_ids
        self.params = serving_form(params, dtype)
        self.layout = layout_of(self.params, layout)
        self.num_adapters = num_adapters(self.params)
        self.config, self.tokenizer, self.dtype = config, tokenizer, dtype
        self.eos_ids, self.max_batch = tuple(eos_ids), max_batch
        self.max_length = config.max_length if max_length is None else max_length
        self.cache = CacheConfig(cache_kind, dtype if cache_dtype is None else cache_dtype)

    def sample(
        self, requests: Sequence[Request], watch: Callable[[int, str], None] | None = None
    ) -> list[Sample]:
        """The samples of all requests in their order, `n` for each.

        A request that cannot be run gives failed samples that say why: a prompt that is not token
        ids, leaves no room for a new token or has an id outside the vocabulary; more likeliest
        tokens than there are; an unknown adapter; stop texts without a tokenizer; a field that is
        not implemented here. So does a row whose log-probabilities are not finite.

        Args:
          requests: what to continue.
          watch: called with the index of a sample and text of it as it comes; the pieces add up to
            `Sample.text`.

        Raises:
          ValueError: `watch` without a tokenizer.
        """
        if watch is not None and self.tokenizer is None:
            raise ValueError("watch is given text, which needs a tokenizer; give LocalSampler one")
        requests = expand(requests)
        samples: dict[int, Sample] = {}
        for i, request in enumerate(requests):
            if problem := self._problem(request):
                samples[i] = Sample.failed(problem)
        waiting = [i for i in range(len(requests)) if i not in samples]
        waiting.sort(key=lambda i: (-requests[i].priority, len(requests[i].prompt)))  # type: ignore
        for start in range(0, len(waiting), self.max_batch):
            rows = waiting[start : start + self.max_batch]
            batch = _Batch(self, [requests[i] for i in rows], rows, watch)
            samples.update(zip(rows, batch.run(), strict=True))
        return [samples[i] for i in range(len(requests))]

    def _problem(self, request: Request) -> str | None:
        """Why a request cannot be run."""
        prompt, vocab_size = request.prompt, self.config.vocab_size
        for name, nothing in UNSUPPORTED.items():
            if (value := getattr(request, name)) != nothing:
                return f"{name}={value!r} is not implemented by LocalSampler; leave it out"
        if not isinstance(prompt, tuple):
            kind = "text" if isinstance(prompt, str) else "messages"
            return f"the prompt is {kind}; give token ids, or wrap the sampler in Tokenized"
        room = self.max_length - bool(request.max_new_tokens)
        if len(prompt) > room:
            return (
                f"the prompt's {len(prompt)} tokens leave no room for a new one in max_length="
                f"{self.max_length}; use at most {room}"
            )
        largest = max((*prompt, *(i for i, _ in request.logit_bias)))  # type: ignore[misc]
        if largest >= vocab_size:
            return (
                f"token id {largest} is outside vocab_size={vocab_size}; encode the prompt with "
                "the model's own tokenizer"
            )
        if request.top_logprobs > vocab_size:
            return f"top_logprobs={request.top_logprobs}; there are {vocab_size} tokens"
        if request.adapter is not None and request.adapter >= self.num_adapters:
            return (
                f"adapter={request.adapter}; the model has {self.num_adapters} to choose from "
                "(see lm.adapters.combine)"
            )
        if request.stop and self.tokenizer is None:
            return "stop texts need a tokenizer; give LocalSampler one, or use stop_ids"
        return None


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
        self.prompts: list[Any] = [r.prompt for r in requests]
        self.stops = [tuple(dict.fromkeys((*sampler.eos_ids, *r.stop_ids))) for r in requests]
        self.ids: list[list[int]] = [[] for _ in requests]
        self.texts: list[StoppedText] = []
        if sampler.tokenizer is not None:
            stream, special = sampler.tokenizer.stream, sampler.tokenizer.special_tokens
            self.texts = [StoppedText(stream(continuation=True), r.stop, special) for r in requests]

    def run(self) -> list[Sample]:
        sampler = self.sampler
        params, config, layout = sampler.params, sampler.config, sampler.layout
        ids, lengths, sampling, length, num_top = self._arrays()
        score_prompt = any(r.prompt_logprobs for r in self.requests)
        state = prefill(
            params, ids, lengths, sampling, config, layout, length, sampler.dtype, sampler.cache,
            num_top, score_prompt,
        )  # fmt: skip
        watched = self.watch is not None or any(request.stop for request in self.requests)
        steps = POLL_EVERY if watched else length
        while True:
            state = decode(params, state, sampling, steps, config, layout, sampler.dtype)
            tokens, positions, done = jax.device_get((state.tokens, state.positions, state.done))
            stopped = np.array(done)
            for i in range(len(self.requests)):
                new = slice(int(lengths[i]) + len(self.ids[i]), int(positions[i]))
                stopped[i] |= self._take(i, tokens[i, new].tolist())
            if stopped.all():
                break
            state = dataclasses.replace(state, done=jax.device_put(stopped, state.done.sharding))
        kept = jax.device_get(dataclasses.replace(state, cache=None))
        return [self._sample(i, kept) for i in range(len(self.requests))]

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, SamplingParams, int, int]:
        """Prompts, their lengths, what they ask for; the cache's length; likeliest tokens."""
        requests, most = self.requests, self.sampler.max_length
        B = bucket(len(requests), 1, self.sampler.max_batch)
        B = -(-B // (multiple := row_multiple(self.sampler.layout))) * multiple
        # Rows that only fill the batch have a prompt of one token and are done at once.
        lengths, ends = np.ones(B, np.int32), np.zeros(B, np.int32)
        for i, r in enumerate(requests):
            lengths[i] = len(self.prompts[i])
            ends[i] = min(lengths[i] + r.max_new_tokens, most)
        T = bucket(int(lengths.max()), MIN_PROMPT, most)
        S = bucket(int(ends.max()), MIN_CACHE, most)
        vocab_size = self.sampler.config.vocab_size
        num_top = max(r.top_logprobs for r in requests)
        num_top = bucket(num_top, 1, vocab_size) if num_top else 0
        ids = np.zeros((B, T), np.int32)
        seeds, top_ks = np.zeros(B, np.uint32), np.zeros(B, np.int32)
        temperatures, top_ps, min_ps = (np.full(B, x, np.float32) for x in (0, 1, 0))
        adapters = np.full(B, -1, np.int32)
        stop_ids = np.full((B, bucket(max(map(len, self.stops)), MIN_STOPS)), -1, np.int32)
        bias = None
        if num_bias := max(len(r.logit_bias) for r in requests):
            shape = B, bucket(num_bias, MIN_STOPS)
            bias = np.full(shape, vocab_size, np.int32), np.zeros(shape, np.float32)
        for i, r in enumerate(requests):
            ids[i, : lengths[i]] = self.prompts[i]
            seeds[i], temperatures[i] = r.seed, r.temperature
            top_ks[i] = min(r.top_k, np.iinfo(np.int32).max)
            top_ps[i], min_ps[i] = r.top_p, r.min_p
            stop_ids[i, : len(self.stops[i])] = self.stops[i]
            adapters[i] = -1 if r.adapter is None else r.adapter
            for j, pair in enumerate(r.logit_bias):
                for x, value in zip(bias or (), pair, strict=False):  # type: ignore[arg-type]
                    x[i, j] = value
        sampling = SamplingParams(
            seeds, temperatures, top_ks, top_ps, min_ps, stop_ids, ends, adapters, bias
        )
        return ids, lengths, sampling, S, num_top

    def _take(self, i: int, new: Sequence[int]) -> bool:
        """Adds new tokens of row i. Returns whether a stop text has ended it."""
        for token in new:
            if self.texts and self.texts[i].stopped:
                return True
            self.ids[i].append(token)
            if self.texts and token not in self.stops[i]:
                self._report(i, self.texts[i].push(token))
        return bool(self.texts) and self.texts[i].stopped

    def _report(self, i: int, text: str) -> None:
        if text and self.watch is not None:
            self.watch(self.indices[i], text)

    def _sample(self, i: int, state: DecodeState) -> Sample:
        """The sample of row i, from arrays on the host."""
        request, prompt, ids = self.requests[i], self.prompts[i], self.ids[i]
        text = None
        stopped = bool(ids) and ids[-1] in self.stops[i]
        if self.texts:
            self._report(i, self.texts[i].finish())
            text = self.texts[i].text
            stopped = stopped or self.texts[i].stopped
        new = slice(len(prompt), len(prompt) + len(ids))
        scored = state.prompt_logprobs[i, : len(prompt) - 1] if request.prompt_logprobs else ()
        if not (np.isfinite(state.logprobs[i, new]).all() and np.isfinite(scored).all()):
            dtype = jnp.dtype(self.sampler.dtype)
            problem = f"log-probabilities are not finite in {dtype}; {WIDER_DTYPE_HINT}"
            return Sample.failed(problem, prompt)
        top = None
        if request.top_logprobs:
            shown = slice(0, request.top_logprobs)
            likeliest = state.top_ids[i, new, shown], state.top_logprobs[i, new, shown]
            pairs = zip(*(x.tolist() for x in likeliest), strict=True)
            top = tuple(tuple(zip(*pair, strict=True)) for pair in pairs)

        def floats(values: Any, wanted: bool) -> tuple[float, ...] | None:
            return tuple(np.asarray(values).tolist()) if wanted else None

        return Sample(
            finish_reason="stop" if stopped else "length",
            text=text,
            token_ids=tuple(ids),
            prompt_token_ids=prompt,
            logprobs=floats(state.logprobs[i, new], request.logprobs),
            sampling_logprobs=floats(state.sampling_logprobs[i, new], request.logprobs),
            top_logprobs=top,
            prompt_logprobs=floats(scored, request.prompt_logprobs),
        )


def bucket(size: int, smallest: int, largest: int | None = None) -> int:
    """The next power of two, from `smallest` and up to `largest`."""
    bucket = max(smallest, 1 << (size - 1).bit_length()) if size else smallest
    return bucket if largest is None else min(bucket, largest)
