"""Requests for text, and samples. No JAX: agents, evals and servers import only this."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

FinishReason = Literal["stop", "length", "error"]


_OWN = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


@dataclasses.dataclass(frozen=True)
class Messages:
    """A conversation to continue, for a sampler that knows the model's chat template.

    Attributes:
      messages: objects with "role", "content" and whatever else the template reads.
      tools: JSON schemas of the functions the model may call.
      variables: further names that the template may read, as `enable_thinking`.
      continue_final_message: go on with the last message, which is begun.

    Raises:
      ValueError: there are no messages, one has no role, or a variable has the name of a field.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        if taken := sorted(_OWN & {*self.variables}):
            raise ValueError(f"the template's variable {taken[0]!r} has a field of its own")
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "tools", tuple(self.tools))
        if not self.messages:
            raise ValueError("messages is empty; give at least one, such as the user's turn")
        for i, message in enumerate(self.messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f'messages[{i}]={message!r:.80} has no "role"; give one')


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What a sample must match.

    Attributes:
      kind: "json_schema", "regex", or "gbnf" (llama.cpp's grammars).
      source: the schema, expression or grammar as text.
    """

    kind: Literal["json_schema", "regex", "gbnf"]
    source: str


Prompt = Sequence[int] | str | Messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Text to generate. A sampler that does not implement a field answers with an error sample.

    Attributes:
      prompt: what to continue: token ids (any iterable of integers), a text, or `Messages`.
        `lm.infer.tokenized.Tokenized` makes token ids of the other two.
      max_new_tokens: most tokens to generate; 0 only to score the prompt (`prompt_logprobs`).
      n: samples to draw; sample i has the seed `seed + i`.
      temperature: divides the logits; 0 is greedy.
      top_k: draw among this many likeliest tokens, and any as likely as the last; 0 for all.
      top_p: then among the fewest likeliest whose probabilities add up to this; 1 for all.
      min_p: then among those at least this times as likely as the likeliest; 0 for all.
      presence_penalty, frequency_penalty: subtracted from the logits of tokens already generated,
        once, and as often as they occur.
      repetition_penalty: divides positive logits of tokens seen, multiplies negative ones; 1 for
        none.
      logit_bias: added to the logits of token ids, as a mapping or pairs.
      grammar: what the sample must match.
      seed: seed of this request's own randomness, in [0, 2**32). A request gives the same tokens
        whatever it is batched with; several samples of one prompt need different seeds.
      stop_ids: tokens that end the sample, besides the tokenizer's end of sequence.
      stop: texts that end the sample and are left out of its text; they need a tokenizer.
      logprobs: whether the sample carries its log-probabilities.
      top_logprobs: how many of the likeliest tokens it carries for each of its own.
      prompt_logprobs: whether it carries the log-probabilities of the prompt's tokens.
      adapter: number of the adapter, where the model has several (`lm.adapters.combine`); None for
        the base model.
      priority: requests with a higher one are served first.

    Raises:
      ValueError: a value is out of range.
      TypeError: an id or a count is not an integer.
    """

    prompt: Prompt
    max_new_tokens: int = 64
    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    grammar: Grammar | None = None
    seed: int = 0
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    adapter: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        self._set(stop_ids=token_ids("stop_ids", self.stop_ids))
        if not isinstance(self.prompt, str | Messages):
            self._set(prompt=token_ids("prompt", self.prompt))
            if not self.prompt:
                raise ValueError("prompt is empty; give at least one token, such as BOS")
        for name in _COUNTS:
            self._set(**{name: _integer(name, getattr(self, name))})
        if self.adapter is not None:
            self._set(adapter=_integer("adapter", self.adapter))
        for name, (works, remedy) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and works(value)):
                raise ValueError(f"{name}={value}; {remedy}")
        if self.max_new_tokens == 0 and not self.prompt_logprobs:
            raise ValueError("max_new_tokens=0; use 1 or more, or ask for prompt_logprobs")
        bias = self.logit_bias
        pairs = tuple(bias.items() if isinstance(bias, Mapping) else bias)
        ids = token_ids("logit_bias", [i for i, _ in pairs])
        self._set(logit_bias=tuple(zip(ids, (float(x) for _, x in pairs), strict=True)))
        if not all(math.isfinite(x) for _, x in self.logit_bias):  # type: ignore[misc]
            raise ValueError(f"logit_bias={dict(pairs)}; use finite numbers, such as -100 to ban")
        if isinstance(self.stop, str):
            raise TypeError(f"stop={self.stop!r} is one text; give a sequence of them")
        self._set(stop=tuple(self.stop))
        if "" in self.stop:
            raise ValueError(f"stop={list(self.stop)} has an empty text, which ends at once")

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


_COUNTS = ("max_new_tokens", "n", "top_k", "top_logprobs", "seed", "priority")
_NOT_NEGATIVE = (lambda x: x >= 0, "use 0 for none, or more")
_RANGES: dict[str, Any] = {
    "max_new_tokens": (lambda x: x >= 0, "use 1 or more"),
    "n": (lambda x: x >= 1, "use 1 or more"),
    "temperature": (lambda x: x >= 0, "use 0 for greedy or a positive number"),
    "top_k": _NOT_NEGATIVE,
    "top_p": (lambda x: 0 < x <= 1, "use more than 0, and 1 for all"),
    "min_p": (lambda x: 0 <= x < 1, "use 0 for all tokens, or less than 1"),
    "presence_penalty": (lambda x: True, "use a finite number"),
    "frequency_penalty": (lambda x: True, "use a finite number"),
    "repetition_penalty": (lambda x: x > 0, "use 1 for none or a positive number"),
    "seed": (lambda x: 0 <= x < 2**32, f"use 0 to {2**32 - 1}"),
    "top_logprobs": _NOT_NEGATIVE,
    "adapter": (lambda x: x >= 0, "adapters count from 0, None is for none"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What was generated for one request. What a sampler does not know is None.

    Attributes:
      finish_reason: "stop" at a stop token or text; "length" at `max_new_tokens` or a full context;
        "error" where the request failed, whatever became of others.
      text: the text, without the token or text that stopped it.
      token_ids: the new tokens, including the one that stopped it.
      prompt_token_ids: the prompt as the model read it.
      logprobs: log-probability of each new token under the model itself (temperature 1), where
        asked for.
      sampling_logprobs: the same under the distribution it was drawn from, with temperature, bias
        and truncation: 0 for greedy ones. An importance ratio divides by this one.
      top_logprobs: for each new token the likeliest tokens and their log-probabilities at
        temperature 1, best first, where asked for.
      prompt_logprobs: log-probability of each of the prompt's tokens but the first, where asked
        for.
      error: why the request failed.

    Raises:
      ValueError: an unknown finish reason, an error without a message or the other way around, or
        log-probabilities that do not match the tokens.
    """

    finish_reason: FinishReason
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    sampling_logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.finish_reason not in get_args(FinishReason):
            known = ", ".join(map(repr, get_args(FinishReason)))
            raise ValueError(f"finish_reason={self.finish_reason!r}; use {known}")
        if (self.error is None) == (self.finish_reason == "error"):
            raise ValueError(
                f"finish_reason={self.finish_reason!r} with error={self.error!r}; give a message "
                "with 'error', and with nothing else"
            )
        for name in ("logprobs", "sampling_logprobs", "top_logprobs"):
            values = getattr(self, name)
            if None not in (values, self.token_ids) and len(values) != len(self.token_ids or ()):
                raise ValueError(
                    f"{name} has {len(values)} values for {len(self.token_ids or ())} token_ids; "
                    "give one for each, or None"
                )

    @classmethod
    def failed(cls, error: object, prompt_token_ids: tuple[int, ...] | None = None) -> Sample:
        """The sample of a request that failed."""
        return cls(finish_reason="error", error=str(error), prompt_token_ids=prompt_token_ids)


class Sampler(Protocol):
    """Anything that generates: the local engine, a remote endpoint, a script, a recording."""

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """The samples of all requests in their order, `n` for each.

        A request that fails gives samples with `finish_reason="error"`; the others are unharmed.
        """
        ...


def expand(requests: Sequence[Request]) -> list[Request]:
    """Requests for one sample each, in the order `Sampler.sample` returns the samples."""
    return [
        request if request.n == 1 else
        dataclasses.replace(request, n=1, seed=(request.seed + i) % 2**32)
        for request in requests
        for i in range(request.n)
    ]  # fmt: skip


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} is not an integer; give an int") from None


def token_ids(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Token ids as plain integers.

    Raises:
      TypeError: one is not an integer.
      ValueError: one is negative.
    """
    ids = tuple(_integer(f"{name}[{i}]", value) for i, value in enumerate(values))
    for i, value in enumerate(ids):
        if value < 0:
            raise ValueError(f"{name}[{i}]={value}; token ids are 0 or more")
    return ids
