"""What the commands that use a finished model share: flags, and opening it."""

from __future__ import annotations

import jax.numpy as jnp
from absl import flags

from experiments.config import ConfigError, input_errors
from lm.checkpoints import Opened, open_any
from lm.checkpoints.models import DTYPES

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "A Hugging Face directory, a .gguf file, a checkpoint or workdir of a run, or the name of a "
    "model that an installed package brings.",
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Where the tokenizer is, if not with --model.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of weights and compute.")
_KEEP_QUANTIZED = flags.DEFINE_bool(
    "keep_quantized", False, "Compute on the blocks of a .gguf file instead of decoding them once."
)


def open_model() -> Opened:
    """The model the flags name.

    Raises:
      ConfigError: there is none, or it cannot be opened.
    """
    if not _MODEL.value:
        raise ConfigError("no model; give one with --model=PATH_OR_NAME")
    with input_errors():
        return open_any(
            _MODEL.value,
            dtype=dtype(),
            keep_quantized=_KEEP_QUANTIZED.value,
            tokenizer=_TOKENIZER.value,
        )


def dtype() -> jnp.dtype:
    """What `--dtype` says."""
    return jnp.dtype(_DTYPE.value)


def read_text(path: str) -> str:
    """The text of a file, which has to be UTF-8, with line ends as Python reads them: all "\\n".

    Raises:
      ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start} "
            f"({error.reason}); convert it, with iconv for example"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
