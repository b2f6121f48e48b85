"""Write any model there is as a Hugging Face directory, which `transformers` and others open.

    python -m experiments.convert --model=gemma3-270m --format=safetensors --output=gemma-3-270m \\
        --dtype=bfloat16

Blocks of GGUF files are decoded, and an adapter (`--adapter=DIRECTORY`) is added in, with the whole
weights and the tokenizer it may bring. Of a model of more than text, the text model is written.
Writes config.json, generation_config.json, safetensors, and tokenizer.json with its configuration
and chat templates: all of them, or after an error nothing.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Collection, Iterator
from typing import Any

import jax.numpy as jnp

from experiments import model_flags
from lm.adapters import merge
from lm.config import program
from lm.config.command_line import ConfigError, input_errors
from lm.formats import load_pretrained, save_huggingface
from lm.formats.open import is_huggingface, locate
from lm.tokenizers import Tokenizer
from lm.tokenizers.save import save_tokenizer

OPTIONS = program.Options()
OPTIONS.define("string", "output", None, "A new folder for the model.")
OPTIONS.define("enum", "format", "safetensors", ["safetensors"], "What is written.")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def main() -> None:
    if not OPTIONS.output:
        raise ConfigError("nowhere to write to; give a new folder with --output=DIR")
    if model_flags.KEEP_QUANTIZED.value:
        raise ConfigError("convert decodes blocks; leave --keep_quantized out")
    output = pathlib.Path(OPTIONS.output).expanduser()
    convert(
        model_flags.model_path(),
        output,
        dtype=model_flags.dtype(),
        adapter=model_flags.adapter_path(),
        tokenizer=model_flags.TOKENIZER.value,
        ignore=model_flags.IGNORE.value,
    )
    for path in sorted(output.rglob("*")):
        if path.is_file():
            print(f"{path}  {path.stat().st_size:,} bytes")


def convert(
    model: str | pathlib.Path,
    output: pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    adapter: str | pathlib.Path | None = None,
    tokenizer: str | pathlib.Path | None = None,
    ignore: Collection[str] = (),
) -> None:
    """Write a model as a Hugging Face directory.

    Args:
      model, dtype, tokenizer, ignore: see `lm.formats.load_pretrained`.
      output: a new folder.
      adapter: a PEFT directory whose LoRA adapter is merged into the weights, and whose whole
        weights replace the model's.

    Raises:
      ConfigError: the model cannot be opened, or `output` is there or cannot be written.
    """
    with input_errors(), new_folder(output) as folder:
        opened = load_pretrained(model, dtype=dtype, tokenizer=tokenizer, ignore=ignore)
        params, config, words = opened
        if adapter is not None:
            params, config, words = model_flags.with_adapter(
                opened, adapter, tokenizer=tokenizer, ignore=ignore
            )
        save_huggingface(merge(params), config, folder, extra=special_ids(words))
        source = locate(model)
        if adapter is not None and words is not opened.tokenizer:
            copy_tokenizer(pathlib.Path(adapter).expanduser(), folder)
        elif is_huggingface(source) and tokenizer is None:
            copy_tokenizer(source, folder)
        else:
            write_tokenizer(words, source, folder)
        if not (folder / "generation_config.json").exists():
            text = json.dumps(special_ids(words), indent=2) + "\n"
            (folder / "generation_config.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, `.NAME.partial`, that becomes `output`; after an error it is removed.

    It is beside `output`, or inside where that is an empty folder, which may be a mount.

    Raises:
      ConfigError: `output` is there already, or it or what the block writes cannot be written.
    """
    try:
        target = output.resolve()
        empty = target.is_dir() and not any(target.iterdir())
        if target.exists() and not empty:
            raise ConfigError(f"{output} is there already; give a new folder as --output")
        partial = (target if empty else target.parent) / f".{target.name}.partial"
        try:
            partial.mkdir(parents=True)
        except FileExistsError as error:
            raise ConfigError(
                f"{partial} is there: another convert writes it, or one was killed; remove it, or "
                "choose another --output"
            ) from error
        try:
            yield partial
            if empty:
                for path in sorted(partial.iterdir()):
                    path.rename(target / path.name)
                partial.rmdir()
            else:
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot write {output}: {reason}; choose another --output") from error


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special tokens of `config.json` and `generation_config.json`: EOS is all of them."""
    ids = {f"{key}_token_id": getattr(tokenizer, f"{key}_id") for key in ("bos", "eos", "pad")}
    ids = {key: value for key, value in ids.items() if value >= 0}
    return ids | ({"eos_token_id": list(tokenizer.eos_ids)} if len(tokenizer.eos_ids) > 1 else {})


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copy what a Hugging Face directory says of its tokenizer and of generation."""
    for path in [path for pattern in TOKENIZER_FILES for path in sorted(source.glob(pattern))]:
        with input_errors():  # reading errors are kept apart from writing errors
            content = path.read_bytes()
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)


def write_tokenizer(tokenizer: Tokenizer, source: pathlib.Path, folder: pathlib.Path) -> None:
    """The tokenizer's files, or the reason why there are none."""
    try:
        save_tokenizer(tokenizer, folder)
    except ValueError as error:
        print(f"no tokenizer.json: {error}; use the one of {source}")


if __name__ == "__main__":
    program.run(main, options=OPTIONS)
