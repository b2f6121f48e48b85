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
`bits_per_byte` of the scored tokens' text, and how it was measured.
"""

from __future__ import annotations

import dataclasses
import json
import math

from absl import flags

from experiments import model_flags as commands
from lm.config import program
from lm.config.command_line import ConfigError, input_errors
from lm.infer.generate import WIDER_DTYPE_HINT
from lm.infer.score import Scorer, perplexity

FLAGS = flags.FLAGS


def main() -> None:
    if FLAGS.text is None:
        raise ConfigError("no text; give a file with --text=FILE")
    text = commands.read_text(FLAGS.text)
    if not text:
        raise ConfigError(f"{FLAGS.text} is empty; there is nothing to score")
    opened = commands.model_from_flags()
    tokenizer, config = opened.tokenizer, opened.config
    window, stride = FLAGS.window, FLAGS.stride
    if window is None:
        window = min(512 if FLAGS.convention == "llama.cpp" else 2048, config.max_length)
    if window > config.max_length:
        raise ConfigError(f"--window={window} is beyond the model's context of {config.max_length}")
    with input_errors():
        ids = tokenizer.encode(text, bos=tokenizer.add_bos)
        scorer = Scorer(opened.params, config, batch_size=FLAGS.batch_size, dtype=commands.dtype())
        if FLAGS.max_tokens is not None:
            ids = ids[: FLAGS.max_tokens]
        found = perplexity(scorer, tokenizer, ids, window, stride, FLAGS.convention)
    if not math.isfinite(found.nats_per_token):
        raise ConfigError(
            f"log-probabilities are not finite in {commands.dtype()}; {WIDER_DTYPE_HINT}"
        )
    result = dataclasses.asdict(found) | {
        "window": window,
        "stride": window if stride is None else stride,
        "convention": FLAGS.convention,
        "text_tokens": len(ids),
        "dtype": str(commands.dtype()),
    }
    if FLAGS.format == "json":
        print(json.dumps(result))
        return
    print(
        f"perplexity {found.perplexity:.4f} ({found.nats_per_token:.5f} nats per token, "
        f"{found.bits_per_byte:.5f} bits per byte) of {found.tokens:,} tokens in {found.windows:,} "
        f"windows of {window}, stride {result['stride']}, convention of {FLAGS.convention}"
    )


if __name__ == "__main__":
    flags.DEFINE_string("text", None, "File of text, in UTF-8.")
    flags.DEFINE_integer("max_tokens", None, "Most tokens of the text to read.", lower_bound=2)
    flags.DEFINE_integer(
        "window", None, "Tokens read at a time; by default 2048, or 512 for llama.cpp."
    )
    flags.DEFINE_integer("stride", None, "Tokens between windows; by default the window.")
    flags.DEFINE_enum("convention", "transformers", ["transformers", "llama.cpp"], "See above.")
    flags.DEFINE_integer("batch_size", 1, "Windows at once.", lower_bound=1)
    flags.DEFINE_enum("format", "text", ["text", "json"], "What is printed.")
    program.run(main)
