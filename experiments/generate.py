"""Generate text with any model there is.

    python -m experiments.generate --model=smollm2-135m-instruct --prompt='The capital of France is'
    python -m experiments.generate --model=runs/demo --prompts=prompts.jsonl --logprobs=5 \\
        --format=json

A model is a Hugging Face directory, a .gguf file, a checkpoint or workdir of a run of ours, or the
name of a model that an installed package brings. A prompt is raw text with the model's own rule for
BOS, special tokens in it parsed; `--chat` puts it into the model's chat template as a user's turn.
A row of `--prompts` is {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}.

`--adapter=DIRECTORY` puts a LoRA adapter of PEFT over the model, quantized or not. With
`--adapter=NAME=DIRECTORY`, once for each of several, a row that has "adapter": NAME gets that one,
and any other the model alone; rows of all kinds run in one batch.

`--format=json` prints one object per prompt, in order: `prompt_token_ids`, `token_ids` (including
the one that ended it), `text` (without it), `finish_reason` ("stop", or "length" at
`--max_new_tokens` or the end of the context), and with `--logprobs=K` `logprobs`: for each token
its `token_id`, its `logprob` under the model at temperature 1, and `top`, the K likeliest. A prompt
that fails has the `finish_reason` "error" and says why in `error`; the command then ends with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from experiments import model_flags as commands
from lm.config import program
from lm.config.command_line import ConfigError, input_errors
from lm.formats import Pretrained
from lm.infer import Messages, Request, Sample
from lm.infer.generate import LocalSampler
from lm.infer.serving import serving_form
from lm.infer.tokenized import encode_prompt

FLAGS = flags.FLAGS
KEYS = ("prompt", "messages", "adapter")  # of a row of --prompts
GROUP = 8  # batches of prompts between two lines of output


def main() -> None:
    if (FLAGS.prompt is None) == (FLAGS.prompts is None):
        raise ConfigError("give either --prompt=TEXT or --prompts=FILE.jsonl")
    if FLAGS.logprobs is not None and FLAGS.format != "json":
        raise ConfigError("--logprobs are printed with --format=json; add it")
    with input_errors():
        settings = read_settings()
    rows = [("--prompt", {"prompt": FLAGS.prompt})]
    if FLAGS.prompts is not None:
        rows = list(read_rows(FLAGS.prompts))
    opened, adapters = commands.open_with_adapters()
    requests = []
    for i, (where, row) in enumerate(rows):
        ids = encode(opened, row, where, FLAGS.chat)
        seed = (FLAGS.seed + i) % 2**32
        own = {"seed": seed, "adapter": adapter_of(row, adapters, where)}
        requests.append(Request(prompt=ids, **settings | own))
    with input_errors():
        sampler = LocalSampler(
            serving_form(opened.params, commands.dtype(), donate=True),
            opened.config,
            tokenizer=opened.tokenizer,
            max_batch=FLAGS.batch_size,
            dtype=commands.dtype(),
        )
    if FLAGS.format == "text" and len(requests) == 1:
        with input_errors():
            samples = sampler.sample(requests, lambda _, text: print(text, end="", flush=True))
        print()
        check_samples(rows, samples)
        return
    samples = []
    for start in range(0, len(requests), GROUP * FLAGS.batch_size):
        group = requests[start : start + GROUP * FLAGS.batch_size]
        with input_errors():
            samples += sampler.sample(group)
        for i, sample in enumerate(samples[start:], start):
            if FLAGS.format == "json":
                print(json.dumps(to_json(sample)), flush=True)
            else:
                print(f"--- {rows[i][0]} ---\n{sample.text or ''}\n", flush=True)
    check_samples(rows, samples)


def check_samples(rows: Sequence[tuple[str, Any]], samples: Sequence[Sample]) -> None:
    """Raises ConfigError with the first failure of the samples, if any."""
    for (where, _), sample in zip(rows, samples, strict=True):
        if sample.error is not None:
            raise ConfigError(f"{where}: {sample.error}")


def read_settings() -> dict[str, Any]:
    """Fields of every request, checked before a model is opened."""
    settings = {
        "max_new_tokens": FLAGS.max_new_tokens,
        "temperature": FLAGS.temperature,
        "top_k": FLAGS.top_k,
        "top_p": FLAGS.top_p,
        "seed": FLAGS.seed,
        "stop": FLAGS.stop,
        "logprobs": FLAGS.logprobs is not None,
        "top_logprobs": FLAGS.logprobs or 0,
    }
    Request(prompt=[0], **settings)
    return settings


def read_rows(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a JSONL file of prompts, each with `file:line`; empty lines are passed over.

    Raises:
      ConfigError: the file has no prompts, or one is malformed.
    """
    found = False
    # Not `splitlines`: JSON strings may hold U+2028.
    for number, line in enumerate(commands.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where, found = f"{path}:{number}", True
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON: {error}") from error
        check_row(row, where)
        yield where, row
    if not found:
        raise ConfigError(f'{path} has no prompts; give rows like {{"prompt": "Hello"}}')


def check_row(row: Any, where: str) -> None:
    """Raises ConfigError unless a row has either a prompt or messages."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ConfigError(
            f'{where} has to be an object with either "prompt" or "messages", not {row!r:.80}'
        )
    for key in row.keys() - set(KEYS):
        raise ConfigError(f"{where}: unknown key {key!r}; a row has {', '.join(KEYS)}")
    if not isinstance(row.get("adapter"), str | None):
        raise ConfigError(f'{where}: "adapter" is {row["adapter"]!r:.80}; it has to be a name')
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise ConfigError(f'{where}: "prompt" is {row["prompt"]!r:.80}; it has to be text')
        return
    messages = row["messages"]
    fine = isinstance(messages, list) and messages
    if not fine or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ConfigError(
            f'{where}: "messages" has to be a list of objects with "role" and "content", '
            f"not {messages!r:.80}"
        )


def adapter_of(row: Mapping[str, Any], adapters: Mapping[str, int], where: str) -> int | None:
    """The number of the adapter a row names.

    Raises:
      ConfigError: there is none of that name.
    """
    name = row.get("adapter")
    if name is not None and name not in adapters:
        known = ", ".join(adapters) or "none; give them as --adapter=NAME=DIRECTORY"
        raise ConfigError(f"{where}: no adapter {name!r}; there are {known}")
    return None if name is None else adapters[name]


def encode(
    opened: Pretrained, row: Mapping[str, Any], where: str, chat: bool = False
) -> Sequence[int]:
    """Token ids of a row; with `chat` a prompt is a user's turn.

    Raises:
      ConfigError: they are none, or too many for the model.
    """
    most = opened.config.max_length
    try:
        messages = row.get("messages")
        if messages is None and chat:
            messages = [{"role": "user", "content": row["prompt"]}]
        prompt = row["prompt"] if messages is None else Messages(messages)
        ids = encode_prompt(opened.tokenizer, prompt)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if len(ids) >= most:
        raise ConfigError(
            f"{where}: the prompt's {len(ids)} tokens leave no room for a new one in the model's "
            f"context of {most}; shorten it to at most {most - 1}"
        )
    return ids


def to_json(sample: Sample) -> dict[str, Any]:
    """The object that `--format=json` prints."""
    found: dict[str, Any] = {
        "prompt_token_ids": list(sample.prompt_token_ids or ()),
        "token_ids": list(sample.token_ids or ()),
        "text": sample.text,
        "finish_reason": sample.finish_reason,
    }
    if sample.error is not None:
        return found | {"error": sample.error}
    if sample.logprobs is not None:
        ids = sample.token_ids or ()
        tops = sample.top_logprobs or [()] * len(ids)
        found["logprobs"] = [
            {
                "token_id": token_id,
                "logprob": logprob,
                "top": [{"token_id": i, "logprob": value} for i, value in top],
            }
            for token_id, logprob, top in zip(ids, sample.logprobs, tops, strict=True)
        ]
    return found


if __name__ == "__main__":
    flags.DEFINE_string("prompt", None, "Text to continue.")
    flags.DEFINE_string("prompts", None, "File of prompts, one JSON object per line.")
    flags.DEFINE_bool("chat", False, "Put prompts into the model's chat template.")
    flags.DEFINE_integer("max_new_tokens", 64, "Most tokens to generate.")
    flags.DEFINE_float("temperature", 0.0, "Divides the logits; 0 is greedy.")
    flags.DEFINE_integer("top_k", 0, "Draw among this many likeliest tokens; 0 for all.")
    flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest of this probability; 1 for all.")
    flags.DEFINE_integer("seed", 0, "Seed of the first prompt; prompt i uses seed + i.")
    flags.DEFINE_multi_string("stop", [], "Text that ends a sample; may be repeated.")
    flags.DEFINE_integer(
        "logprobs", None, "With log-probabilities, and this many likeliest tokens.", lower_bound=0
    )
    flags.DEFINE_integer("batch_size", 8, "Most prompts at once.", lower_bound=1)
    flags.DEFINE_enum("format", "text", ["text", "json"], "What is printed.")
    program.run(main)
