"""Generate text with any model there is.

    python -m experiments.generate --model=smollm2-135m-instruct --prompt='The capital of France is'
    python -m experiments.generate --model=runs/demo --prompts=prompts.jsonl --logprobs=5 \\
        --format=json

A model is a Hugging Face directory, a .gguf file, a checkpoint or workdir of a run of ours, or the
name of a model that an installed package brings. A prompt is raw text with the model's own rule for
BOS, special tokens in it parsed; `--chat` puts it into the model's chat template as a user's turn.
A row of `--prompts` is {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}, with
"tools" (JSON schemas), "documents", "chat_template_kwargs" (the template's own variables, as
{"enable_thinking": false}) and "continue_final_message" where its chat template reads them; for all
rows `--tools` and `--chat_template_kwargs` take JSON, or the file that holds it. `--chat_template`
is another template: one of the model's by its name, or a file.

A `--stop` text that names a special token (`--stop='<|im_end|>'`) stops at that token too.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from experiments import model_flags
from experiments.prompts import adapter_of, chat_template, check_row, encode, json_of, read_rows
from lm.config import program
from lm.config.command_line import ConfigError, input_errors
from lm.config.fields import Count, NonNegative, PositiveFraction, Seed, Whole
from lm.formats import Pretrained
from lm.infer import Request, Sample
from lm.infer.generate import LocalSampler
from lm.infer.serving import serving_form
from lm.tokenizers import ChatTemplate

GROUP = 8  # batches of prompts between two lines of output
KWARGS = "chat_template_kwargs"
NO_ADAPTERS: Mapping[str, int] = {}

OPTIONS = program.Options()
OPTIONS.define("string", "prompt", None, "Text to continue.")
OPTIONS.define("string", "prompts", None, "File of prompts, one JSON object per line.")
OPTIONS.define("bool", "chat", False, "Put prompts into the model's chat template.")
OPTIONS.define("string", "tools", None, "JSON schemas of functions, as text or in a file.")
OPTIONS.define("string", "chat_template_kwargs", None, "The chat template's variables, as JSON.")
OPTIONS.define("string", "chat_template", None, "Another chat template: a name, or a file.")
OPTIONS.number(Count, "max_new_tokens", 64, "Most tokens to generate.")
OPTIONS.number(NonNegative, "temperature", 0.0, "Divides the logits; 0 is greedy.")
OPTIONS.number(Whole, "top_k", 0, "Draw among this many likeliest tokens; 0 for all.")
OPTIONS.number(
    PositiveFraction, "top_p", 1.0, "Draw among the likeliest of this probability; 1 for all."
)
OPTIONS.number(Seed, "seed", 0, "Seed of the first prompt; prompt i uses seed + i.")
OPTIONS.define("multi_string", "stop", [], "Text that ends a sample; may be repeated.")
OPTIONS.number(Whole, "logprobs", None, "Print the K likeliest tokens as well.")
OPTIONS.number(Count, "batch_size", 8, "Most prompts at once.")
OPTIONS.define("enum", "format", "text", ["text", "json"], "What is printed.")


def main() -> None:
    if (OPTIONS.prompt is None) == (OPTIONS.prompts is None):
        raise ConfigError("give either --prompt=TEXT or --prompts=FILE.jsonl")
    if OPTIONS.logprobs is not None and OPTIONS.format != "json":
        raise ConfigError("--logprobs are printed with --format=json; add it")
    with input_errors():
        settings = read_settings()
    rows = {"--prompt": {"prompt": OPTIONS.prompt}}
    if OPTIONS.prompts is not None:
        rows = dict(read_rows(OPTIONS.prompts))
    common = json_of("tools", OPTIONS.tools, "tools")
    common |= json_of(KWARGS, OPTIONS.chat_template_kwargs, KWARGS)
    rows = {where: with_common(row, common) for where, row in rows.items()}
    model, adapters = model_flags.open_with_adapters()
    streams = OPTIONS.format == "text" and len(rows) == 1
    samples = generate(
        model,
        list(rows.values()),
        names=list(rows),
        adapters=adapters,
        chat=OPTIONS.chat,
        template=chat_template(model, OPTIONS.chat_template),
        batch_size=OPTIONS.batch_size,
        dtype=model_flags.dtype(),
        donate=True,
        on_text=(lambda _, text: print(text, end="", flush=True)) if streams else None,
        **settings,
    )
    fault = None
    for where, sample in zip(rows, samples, strict=True):
        if streams:
            print()
        elif OPTIONS.format == "json":
            print(json.dumps(to_json(sample)), flush=True)
        else:
            print(f"--- {where} ---\n{sample.text or ''}\n", flush=True)
        if sample.error is not None:
            fault = fault or f"{where}: {sample.error}"
    if fault is not None:
        raise ConfigError(fault)


def with_common(row: Mapping[str, Any], common: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, with what all rows have; its own counts more, each variable by itself."""
    own = {key: value for key, value in row.items() if value is not None}
    if KWARGS in common:
        own[KWARGS] = common[KWARGS] | own.get(KWARGS, {})
    return {**common, **own}


def read_settings() -> dict[str, Any]:
    """Fields of every request, checked before a model is opened."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    settings: dict[str, Any] = {name: getattr(OPTIONS, name) for name in names} | {
        "logprobs": OPTIONS.logprobs is not None,
        "top_logprobs": OPTIONS.logprobs or 0,
    }
    Request(prompt=[0], **settings)
    return settings


def generate(
    model: Pretrained,
    rows: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str] | None = None,
    adapters: Mapping[str, int] = NO_ADAPTERS,
    chat: bool = False,
    template: ChatTemplate | None = None,
    batch_size: int = 8,
    dtype: Any = jnp.float32,
    donate: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> Iterator[Sample]:
    """A sample for every row, in order.

    Args:
      model: to generate with.
      rows: as in the file of `--prompts`.
      names: of the rows, for errors.
      adapters: numbers of the model's adapters by name.
      chat: put prompts into the model's chat template, as a user's turn.
      template: another chat template.
      batch_size: the most prompts at once.
      dtype: of compute.
      donate: the model's weights may be freed; it cannot be used afterwards.
      on_text: called with the number of a row in its group and text, as it is generated.
      **settings: fields of `Request` that all rows share; row i uses `seed` + i.

    Raises:
      ConfigError: a row or a setting is wrong, or a prompt does not fit the model.
    """
    requests = []
    for i, row in enumerate(rows):
        where = names[i] if names else f"row {i}"
        check_row(row, where)
        seed, ids = (settings.get("seed", 0) + i) % 2**32, encode(model, row, where, chat, template)
        own: dict[str, Any] = {"seed": seed, "adapter": adapter_of(row, adapters, where)}
        with input_errors():
            requests.append(Request(prompt=ids, **settings | own))
    with input_errors():
        sampler = LocalSampler(
            serving_form(model.params, dtype, donate=donate),
            model.config,
            tokenizer=model.tokenizer,
            max_batch=batch_size,
            dtype=dtype,
        )
    for start in range(0, len(requests), GROUP * batch_size):
        with input_errors():
            samples = sampler.sample(requests[start : start + GROUP * batch_size], on_text)
        yield from samples


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
    program.run(main, options=OPTIONS)
