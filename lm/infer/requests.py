"""What asks for text and what comes back. No JAX: agents, evals and servers import this alone."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One continuation to generate. Sequences of ids may be given as any iterable of integers.

    Attributes:
      prompt_token_ids: what to continue; at least one id.
      max_new_tokens: most tokens to generate.
      temperature: divides the logits; 0 is greedy.
      top_k: draw among so many likeliest tokens, and any as likely as the last; 0 for all.
      top_p: then among the fewest likeliest whose probabilities add up to this; 1 for all.
      seed: of this request's own randomness, in [0, 2**32). The same request gives the same tokens
        whatever it is batched with; several samples of one prompt need several seeds.
      stop_ids: tokens that end the sample, beside the tokenizer's end of sequence.
      stop: texts that end the sample, and are left out of its text; they need a tokenizer.
      logprobs: whether the sample carries its log-probabilities.
      top_logprobs: how many of the likeliest tokens it carries for each of its own.
      adapter: number of the adapter, where the model has several (`lm.adapters.combine`); None for
        the model beneath them.

    Raises:
      ValueError: a value is out of range.
      TypeError: an id, `max_new_tokens` or `seed` is not an integer.
    """

    prompt_token_ids: Sequence[int]
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    stop_ids: Sequence[int] = ()
    logprobs: bool = False
    top_k: int = 0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    top_logprobs: int = 0
    adapter: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "prompt_token_ids", _ids("prompt_token_ids", self.prompt_token_ids)
        )
        object.__setattr__(self, "stop_ids", _ids("stop_ids", self.stop_ids))
        object.__setattr__(self, "max_new_tokens", _integer("max_new_tokens", self.max_new_tokens))
        object.__setattr__(self, "seed", _integer("seed", self.seed))
        if not self.prompt_token_ids:
            raise ValueError("prompt_token_ids is empty; give at least one token, such as BOS")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}; use 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature={self.temperature}; use 0 for greedy or a positive number"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}; use 0 to {2**32 - 1}")
        if self.adapter is not None:
            object.__setattr__(self, "adapter", _integer("adapter", self.adapter))
            if self.adapter < 0:
                raise ValueError(f"adapter={self.adapter}; they count from 0, None is for none")
        for name in ("top_k", "top_logprobs"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; use 0 for none, or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; use more than 0, and 1 for all")
        if isinstance(self.stop, str):
            raise TypeError(f"stop={self.stop!r} is one text; give a sequence of them")
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise ValueError(f"stop={list(self.stop)} has an empty text, which ends at once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What was generated for one request.

    Attributes:
      prompt_token_ids: the request's prompt.
      token_ids: the new tokens, the one that stopped it included.
      finish_reason: "stop" at a stop token or text; "length" at `max_new_tokens` or a full context.
      logprobs: of each of `token_ids` under the model itself (temperature 1), where asked for.
      top_logprobs: for each of `token_ids` the likeliest tokens and their log-probabilities, best
        first, where asked for.
      text: of `token_ids` without the token or text that stopped it, where there is a tokenizer.

    Raises:
      ValueError: an unknown finish reason, or log-probabilities that do not match the tokens.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    text: str | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.finish_reason not in get_args(FinishReason):
            raise ValueError(f"finish_reason={self.finish_reason!r}; use 'stop' or 'length'")
        for name in ("logprobs", "top_logprobs"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.token_ids):
                raise ValueError(
                    f"{name} has {len(values)} values for {len(self.token_ids)} token_ids; "
                    "give one for each, or None"
                )


class Sampler(Protocol):
    """Anything that generates: the local engine, a remote endpoint, a script, a recording."""

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample for each request, in their order."""
        ...


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} is not an integer; give an int") from None


def _ids(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if isinstance(values, str | bytes):
        raise TypeError(f"{name}={values!r} is text; encode it to token ids first")
    ids = tuple(_integer(f"{name}[{i}]", value) for i, value in enumerate(values))
    for i, value in enumerate(ids):
        if value < 0:
            raise ValueError(f"{name}[{i}]={value}; token ids are 0 or more")
    return ids
