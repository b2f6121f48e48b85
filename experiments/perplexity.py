"""Perplexity of a text under any model there is.

    python -m experiments.perplexity --model=smollm2-135m-instruct --text=wiki.test.raw \\
        --window=2048 --stride=512
    python -m experiments.perplexity --model=model.gguf --text=wiki.test.raw \\
        --convention=llama.cpp --window=512

Two conventions, whose figures must not be compared with each other. "transformers" (the guide of
that library): windows start every `--stride` tokens, and each token is scored once, in the first
window that has it after another. "llama.cpp" (its `perplexity` program): windows do not overlap,
each scores the tokens after its middle one, and begins with BOS where the model wants BOS. The
text is tokenized whole, line ends read as "\\n", special tokens in it not parsed.

`--format=json` prints an object: `tokens` (scored), `nats_per_token`, `perplexity`,
`bits_per_byte` of the scored tokens' text, and how it was measured; of a tokenizer that loses text
`unknown_tokens`, and `text_changed`: the tokens do not give the text back. A first token that no
BOS comes before is not scored, and its bytes do not count, as in training.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

import jax.numpy as jnp
from absl import logging

from experiments import model_flags
from lm.config import program
from lm.config.command_line import ConfigError, input_errors
from lm.config.fields import Count, Several
from lm.data.files import read_text
from lm.formats import Pretrained
from lm.infer.generate import WIDER_DTYPE_HINT
from lm.infer.score import Scorer, perplexity

OPTIONS = program.Options()
OPTIONS.define("string", "text", None, "File of text, in UTF-8.")
OPTIONS.number(Several, "max_tokens", None, "Most tokens of the text to read.")
OPTIONS.number(Several, "window", None, "Tokens read at a time; by default 2048 or 512.")
OPTIONS.number(Count, "stride", None, "Tokens between windows; by default the window.")
OPTIONS.define("enum", "convention", "transformers", ["transformers", "llama.cpp"], "See above.")
OPTIONS.number(Count, "batch_size", 1, "Windows at once.")
OPTIONS.define("enum", "format", "text", ["text", "json"], "What is printed.")


def main() -> None:
    if OPTIONS.text is None:
        raise ConfigError("no text; give a file with --text=FILE")
    with input_errors():
        text = read_text(OPTIONS.text)
    if not text:
        raise ConfigError(f"{OPTIONS.text} is empty; there is nothing to score")
    result = measure(
        model_flags.model_from_flags(),
        text,
        window=OPTIONS.window,
        stride=OPTIONS.stride,
        convention=OPTIONS.convention,
        max_tokens=OPTIONS.max_tokens,
        batch_size=OPTIONS.batch_size,
        dtype=model_flags.dtype(),
    )
    if OPTIONS.format == "json":
        print(json.dumps(result))
        return
    print(
        "perplexity {perplexity:.4f} ({nats_per_token:.5f} nats per token, {bits_per_byte:.5f} "
        "bits per byte) of {tokens:,} tokens in {windows:,} windows of {window}, stride {stride}, "
        "convention of {convention}".format(**result)
    )


def measure(
    model: Pretrained,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    convention: Literal["transformers", "llama.cpp"] = "transformers",
    max_tokens: int | None = None,
    batch_size: int = 1,
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """The perplexity of a text, as the object `--format=json` prints.

    Args:
      model: to score with.
      text: to score.
      window: tokens read at a time; None for 2048, or 512 by the convention of llama.cpp.
      stride: tokens between windows; None for the window.
      convention: see the head of this file.
      max_tokens: the most tokens of the text to read.
      batch_size: windows at once.
      dtype: of compute.

    Raises:
      ConfigError: the sizes do not fit the model, or log-probabilities are not finite.
    """
    tokenizer, config = model.tokenizer, model.config
    if window is None:
        window = min(512 if convention == "llama.cpp" else 2048, config.max_length)
    if window > config.max_length:
        raise ConfigError(f"--window={window} is beyond the model's context of {config.max_length}")
    with input_errors():
        ids = tokenizer.encode(text, bos=tokenizer.add_bos)
        changed, unknown = tokenizer.decode(ids) != text, ids.count(tokenizer.unk_id)
        if changed or unknown:
            logging.warning(
                "the tokenizer loses text: %d unknown tokens, and the rest does not come back byte "
                "for byte; bits per byte are of the text that the tokens hold", unknown,
            )  # fmt: skip
        scorer = Scorer(model.params, config, batch_size=batch_size, dtype=dtype)
        if max_tokens is not None:
            ids = ids[:max_tokens]
        found = perplexity(scorer, tokenizer, ids, window, stride, convention)
    if not math.isfinite(found.nats_per_token):
        raise ConfigError(f"log-probabilities are not finite in {dtype}; {WIDER_DTYPE_HINT}")
    return dataclasses.asdict(found) | {
        "window": window,
        "stride": window if stride is None else stride,
        "convention": convention,
        "text_tokens": len(ids),
        "unknown_tokens": unknown,
        "text_changed": changed,
        "dtype": str(dtype),
    }


if __name__ == "__main__":
    program.run(main, options=OPTIONS)
