"""Write any model there is as a Hugging Face directory, which `transformers` and others open.

    python -m experiments.convert --model=gemma3-270m --format=safetensors --output=gemma-3-270m \\
        --dtype=bfloat16

Blocks of GGUF files are decoded, and an adapter (`--adapter=DIRECTORY`) is added in. Writes
config.json, generation_config.json, safetensors, and tokenizer.json with its configuration and chat
template.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

from absl import flags

from experiments import commands, program
from experiments.config import ConfigError, input_errors
from lm.adapters import merge
from lm.checkpoints import save
from lm.checkpoints.models import is_huggingface, locate
from lm.tokenizers import Tokenizer
from lm.tokenizers.save import save_tokenizer

FLAGS = flags.FLAGS
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def main() -> None:
    if FLAGS.output is None:
        raise ConfigError("nowhere to write to; give a new folder with --output=DIR")
    output = pathlib.Path(FLAGS.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; give a new folder as --output")
    opened = commands.open_model()
    tokenizer = opened.tokenizer
    with input_errors():
        save(merge(opened.params), opened.config, output, extra=special_ids(tokenizer))
    source = locate(flags.FLAGS.model)
    if is_huggingface(source) and flags.FLAGS.tokenizer is None:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, output / name)
    else:
        generation = special_ids(tokenizer)
        if len(tokenizer.eos_ids) > 1:
            generation["eos_token_id"] = list(tokenizer.eos_ids)
        text = json.dumps(generation, indent=2) + "\n"
        (output / "generation_config.json").write_text(text, encoding="utf-8")
        write_tokenizer(tokenizer, source, output)
    for path in sorted(output.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special tokens that `config.json` names."""
    ids = {f"{key}_token_id": getattr(tokenizer, f"{key}_id") for key in ("bos", "eos", "pad")}
    return {key: value for key, value in ids.items() if value >= 0}


def write_tokenizer(tokenizer: Tokenizer, source: pathlib.Path, output: pathlib.Path) -> None:
    """The tokenizer's files, or the reason why there are none."""
    try:
        save_tokenizer(tokenizer, output)
    except ValueError as error:
        print(f"no tokenizer.json: {error}; use the one of {source}")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "A new folder for the model.")
    flags.DEFINE_enum("format", "safetensors", ["safetensors"], "What is written.")
    program.run(main)
