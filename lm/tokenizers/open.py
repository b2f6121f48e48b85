"""Opening the tokenizer at a path."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from lm.files.gguf import is_gguf, read_gguf
from lm.tokenizers.base import Tokenizer
from lm.tokenizers.fast import FastTokenizer
from lm.tokenizers.gguf import from_gguf
from lm.tokenizers.sentencepiece import SentencePieceTokenizer

T = TypeVar("T", FastTokenizer, SentencePieceTokenizer)
_EXPECTED = (
    "a folder with tokenizer.json or tokenizer.model, the workdir of a training run, a .gguf or a "
    ".model file"
)


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer at `path`, with its rules for BOS and EOS and its chat templates.

    Args:
      path: a folder in Hugging Face's layout (tokenizer.json is preferred to tokenizer.model), the
        workdir of a training run or its data folder, a .gguf file, a tokenizer.json, or a
        SentencePiece .model file.

    Raises:
      FileNotFoundError: `path` does not exist, or holds no tokenizer.
      ValueError: the tokenizer cannot be used; the message says why.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at '{path}': it does not exist; give {_EXPECTED}")
    if path.is_dir():
        for folder in (path, path / "data"):
            for name in ("tokenizer.json", "tokenizer.model"):
                if (folder / name).is_file():
                    return _open_file(folder / name)
        raise FileNotFoundError(f"no tokenizer in '{path}'; give {_EXPECTED}")
    return _open_file(path)


def _open_file(path: Path) -> Tokenizer:
    if path.suffix == ".gguf" or is_gguf(path):
        return from_gguf(read_gguf(path).metadata, str(path))
    if path.suffix == ".json":
        return _open_json(path)
    if path.suffix == ".model":
        return _open_model(path)
    raise ValueError(f"'{path}' is not a tokenizer; give {_EXPECTED}")


def _open_json(path: Path) -> FastTokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"'{path}' is not a tokenizer.json ({error})") from error
    return _with_rules(FastTokenizer(tokenizer, str(path)), path)


def _open_model(path: Path) -> SentencePieceTokenizer:
    tokenizer = SentencePieceTokenizer(path)
    added = _read_json(path.parent / "added_tokens.json")
    if missing := [token for token, i in added.items() if i >= tokenizer.vocab_size]:
        raise ValueError(
            f"'{path}' lacks {len(missing)} tokens that added_tokens.json adds ({missing[0]!r}...);"
            " save the tokenizer as tokenizer.json"
        )
    return _with_rules(tokenizer, path)


def _with_rules(tokenizer: T, path: Path) -> T:
    """The tokenizer with the rules of the files beside it."""
    # The second overrides the older first.
    names = ("special_tokens_map.json", "tokenizer_config.json")
    config = _read_json(path.parent / names[0]) | _read_json(path.parent / names[1])
    ids = {key: getattr(tokenizer, f"{key}_id") for key in ("bos", "eos", "pad")}
    for key in ids:
        token = config.get(f"{key}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            if (found := tokenizer.id_of(token)) is None:
                raise ValueError(f"'{path}' names {token!r}, which is not in its vocabulary")
            ids[key] = found
    add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
    tokenizer.set_rules(
        ids,
        _eos_ids(path.parent),
        tokenizer.add_bos if add_bos is None else bool(add_bos),
        tokenizer.add_eos if add_eos is None else bool(add_eos),
        _chat_templates(path.parent, config),
    )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}; an object was expected")
    return content


def _eos_ids(folder: Path) -> list[int]:
    """Tokens that end a generation by the model's own files, in their order."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return ids


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates of the configuration, overridden by those in files of their own."""
    source = config.get("chat_template") or {}
    if isinstance(source, str):
        source = {"default": source}
    elif isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}
    templates = dict(source)
    if (file := folder / "chat_template.jinja").is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    return templates
