"""Log-probabilities of given text, and perplexity over windows of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm.infer.generate import MIN_PROMPT, bucket
from lm.infer.serving import layout_of, row_multiple
from lm.model import ModelConfig, ModelWeights, Tokens, forward, make_head
from lm.sharding import Layout, use_layout
from lm.tokenizers import Tokenizer
from lm.weights import cast

Convention = Literal["transformers", "llama.cpp"]


class Scorer:
    """Log-probability of each token of rows of ids, given the tokens before it.

    Rows are padded to powers of two, so that few shapes are compiled. Compute is in `dtype`,
    log-probabilities in float32; the logits of a row are never held whole where they are large.
    """

    def __init__(
        self,
        params: ModelWeights,
        config: ModelConfig,
        *,
        batch_size: int = 1,
        dtype: Any = jnp.float32,
        layout: Layout | None = None,
    ) -> None:
        """Computes under `layout`; None for that of the weights (`lm.infer.serving.layout_of`).

        Raises:
          ValueError: `batch_size` is not positive, or the weights are not on the layout's devices.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; use 1 or more")
        self.params, self.config = cast(params, dtype), config
        self.batch_size, self.dtype = batch_size, dtype
        self.layout = layout_of(self.params, layout)

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each row of n token ids float32 [n - 1], of its second token and on.

        Raises:
          ValueError: a row is longer than the model's context, or has an id outside the
            vocabulary.
        """
        found: list[np.ndarray] = []
        for start in range(0, len(rows), self.batch_size):
            found += self._batch(rows[start : start + self.batch_size])
        return found

    def _batch(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        most, vocab_size = self.config.max_length, self.config.vocab_size
        longest = max(map(len, rows))
        if longest > most:
            raise ValueError(f"{longest} tokens do not fit the model's context of {most}")
        multiple = row_multiple(self.layout)
        num_rows = -(-self.batch_size // multiple) * multiple
        ids = np.zeros((num_rows, bucket(longest, MIN_PROMPT, most)), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"token ids {ids.min()} to {ids.max()}; vocab_size is {vocab_size}")
        values = np.asarray(logprobs(self.params, ids, self.config, self.layout, self.dtype))
        return [values[i, : max(len(row) - 1, 0)] for i, row in enumerate(rows)]


@functools.partial(jax.jit, static_argnames=("config", "layout", "dtype"))
def logprobs(
    params: ModelWeights, ids: jax.Array, config: ModelConfig, layout: Layout, dtype: Any
) -> jax.Array:
    """ids [B, T] -> float32 [B, T - 1]. Padding on the right is seen only by padding."""
    with use_layout(layout):
        hidden = forward(params, Tokens.of(ids), config, dtype=dtype).hidden
        return make_head(params, config).logprobs(hidden[:, :-1], ids[:, 1:])[0]


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens [start, stop) are read, and those from `first` on are scored."""

    start: int
    stop: int
    first: int


def make_windows(
    num_tokens: int, window: int, stride: int | None, convention: Convention
) -> Iterator[Window]:
    """Windows over a text of `num_tokens`.

    "transformers" (its guide "Perplexity of fixed-length models"): a window starts every `stride`
    tokens, and scores what no window before it did, except its own first token; the last window may
    be shorter. A stride below the window gives every token some context.

    "llama.cpp" (its `perplexity` program): windows do not overlap, each scores the tokens after its
    middle one, and a remainder shorter than a window is left out.

    Raises:
      ValueError: a window or stride that is not possible, or a text too short to score.
    """
    if window < 2:
        raise ValueError(f"window={window}; use 2 or more: a token is scored given one before it")
    if convention == "llama.cpp":
        if stride not in (None, window):
            raise ValueError(f"stride={stride}: windows of llama.cpp do not overlap; leave it out")
        if num_tokens < window:
            raise ValueError(
                f"the text has {num_tokens} tokens, less than one window of {window}; give more "
                "text or a smaller window"
            )
        for start in range(0, num_tokens - window + 1, window):
            yield Window(start, start + window, start + window // 2 + 1)
        return
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride}; use 1 to the window, {window}")
    if num_tokens < 2:
        raise ValueError(f"the text has {num_tokens} tokens; perplexity needs at least 2")
    scored = 0
    for start in range(0, num_tokens, stride):
        stop = min(start + window, num_tokens)
        if (first := max(scored, start + 1)) < stop:
            yield Window(start, stop, first)
        scored = stop
        if stop == num_tokens:
            return


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measured.

    Attributes:
      tokens: scored.
      nats_per_token: mean of their negative log-probabilities.
      perplexity: exp(nats_per_token).
      bits_per_byte: of the text of the scored tokens; comparable across tokenizers.
      windows: number of windows.
    """

    tokens: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    windows: int


def perplexity(
    scorer: Scorer,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    window: int,
    stride: int | None = None,
    convention: Convention = "transformers",
) -> Perplexity:
    """Perplexity of a text.

    Args:
      scorer: with the model.
      tokenizer: gives the bytes of each token, and whether windows begin with BOS.
      ids: token ids of the text, with BOS in front where the model wants it.
      window: tokens read at a time.
      stride, convention: see `make_windows`. As in llama.cpp, under its convention BOS takes the
        place of each window's first token where the model wants BOS.

    Raises:
      ValueError: as `make_windows` and `Scorer.logprobs`.
    """
    nats, num_tokens, num_bytes = 0.0, 0, 0
    windows = list(make_windows(len(ids), window, stride, convention))
    for start in range(0, len(windows), scorer.batch_size):
        batch = windows[start : start + scorer.batch_size]
        rows = [list(ids[w.start : w.stop]) for w in batch]
        if convention == "llama.cpp" and tokenizer.add_bos:
            rows = [[tokenizer.bos_id, *row[1:]] for row in rows]
        for w, values in zip(batch, scorer.logprobs(rows), strict=True):
            nats -= float(values[w.first - w.start - 1 :].sum(dtype=np.float64))
            num_tokens += w.stop - w.first
            begins = w.first == 1 and ids[0] == tokenizer.bos_id
            scored = tokenizer.decode_bytes(ids[w.first : w.stop], continuation=not begins)
            num_bytes += len(scored)
    mean = nats / num_tokens
    bits = nats / math.log(2) / num_bytes if num_bytes else math.nan
    return Perplexity(num_tokens, mean, math.exp(min(mean, 700.0)), bits, len(windows))
