"""Flags that the commands on a trained model share, and the model they name."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from absl import flags

from lm.adapters import combine
from lm.config.command_line import ConfigError, input_errors
from lm.formats import Pretrained, load_peft, load_pretrained
from lm.formats.common import malformed
from lm.formats.open import DTYPES
from lm.tokenizers import open_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# These are the command's own flags, so that its `--help` lists them.
_OWN: dict[str, Any] = {"module_name": sys.argv[0]}
MODEL = flags.DEFINE_string(
    "model", None, "A Hugging Face directory, a .gguf file, a checkpoint or workdir of a run, or "
    "the name of a model that an installed package brings.", **_OWN,
)  # fmt: skip
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Where the tokenizer is, if not with --model.", **_OWN
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of weights and compute.", **_OWN)
KEEP_QUANTIZED = flags.DEFINE_bool(
    "keep_quantized", None, "Compute on the blocks of a .gguf file instead of decoding them once. "
    "By default experiments.generate does so on a CPU, for the types that are faster in blocks "
    "there.", **_OWN,
)  # fmt: skip
_ADAPTER = flags.DEFINE_multi_string(
    "adapter", [], "A PEFT directory with a LoRA adapter, put over the model. experiments.generate "
    "takes several as NAME=DIRECTORY, of which each row of --prompts chooses by "
    '"adapter": NAME.', **_OWN,
)  # fmt: skip


IGNORE = flags.DEFINE_list(
    "ignore_config_keys", [], "Keys of config.json, adapter_config.json or a .gguf file's metadata "
    "to pass over, because they do not change what the model computes.", **_OWN,
)  # fmt: skip


def model_path() -> str:
    """The value of `--model`. Raises ConfigError if there is none."""
    if not MODEL.value:
        raise ConfigError("no model; give one with --model=PATH_OR_NAME")
    return MODEL.value


def adapter_path() -> str | None:
    """The value of `--adapter`, if any. Raises ConfigError if there are several."""
    if len(_ADAPTER.value) > 1:
        raise ConfigError("give one --adapter=DIRECTORY; experiments.generate alone takes several")
    return _ADAPTER.value[0] if _ADAPTER.value else None


def model_from_flags() -> Pretrained:
    """The model the flags name, with the adapter they name.

    Raises:
      ConfigError: there is none, it or its adapter cannot be opened, or there are several adapters.
    """
    adapter = adapter_path()
    model = _base(bool(KEEP_QUANTIZED.value))
    return model if adapter is None else _from_flags(model, adapter)


def open_with_adapters() -> tuple[Pretrained, dict[str, int]]:
    """The model to generate with that the flags name, and the numbers of adapters with names.

    Raises:
      ConfigError: as `model_from_flags`; or one of several adapters has no name, or two share one.
    """
    named: dict[str, str] = {}
    for value in _ADAPTER.value:
        name, equals, directory = value.partition("=")
        alone = len(_ADAPTER.value) == 1 and pathlib.Path(value).exists()
        if not equals or not name or alone:
            if len(_ADAPTER.value) == 1:
                model = _base(KEEP_QUANTIZED.value)
                return _from_flags(model, value), {}
            raise ConfigError(f"--adapter={value}: one of several needs a name: NAME=DIRECTORY")
        if name in named:
            raise ConfigError(f"two adapters are named {name!r}; give each its own name")
        named[name] = directory
    model = _base(KEEP_QUANTIZED.value)
    if not named:
        return model, {}
    adapted = []
    for name, directory in named.items():
        other = _from_flags(model, directory)
        if other.config != model.config:
            raise ConfigError(
                f"--adapter={name}={directory} replaces the embedding or the output, and so cannot "
                "be one of several; give it alone, or merge it with experiments.convert"
            )
        adapted.append(other.params)
    with input_errors():
        params = combine(model.params, adapted)
    return model._replace(params=params), {name: i for i, name in enumerate(named)}


def with_adapter(
    model: Pretrained,
    directory: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | None = None,
    ignore: Collection[str] = (),
) -> Pretrained:
    """The model with the LoRA adapter in a PEFT directory.

    An adapter with its own embedding brings the tokenizer that is in its directory, unless
    `tokenizer` was named. `ignore`: see `load_peft`.

    Raises:
      ConfigError: the adapter cannot be opened, or does not fit the model.
    """
    with input_errors(), malformed(directory):
        params, config = load_peft(directory, model.params, model.config, ignore=ignore)
        text, own = model.tokenizer, pathlib.Path(directory).expanduser()
        has_tokenizer = any((own / name).is_file() for name in TOKENIZER_FILES)
        if params.embed is not model.params.embed and has_tokenizer and tokenizer is None:
            text = open_tokenizer(own)
        text.use_with(config.vocab_size)
        return Pretrained(params, config, text)


def _from_flags(model: Pretrained, directory: str) -> Pretrained:
    return with_adapter(model, directory, tokenizer=TOKENIZER.value, ignore=IGNORE.value)


def _base(keep_quantized: bool | None) -> Pretrained:
    with input_errors():
        return load_pretrained(
            model_path(),
            dtype=dtype(),
            keep_quantized=keep_quantized,
            tokenizer=TOKENIZER.value,
            ignore=IGNORE.value,
        )


def dtype() -> jnp.dtype:
    """The value of `--dtype`."""
    return jnp.dtype(_DTYPE.value)
