"""Opening the tokenizer at a path."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from lm.files.gguf import is_gguf, read_gguf
from lm.tokenizers.base import Tokenizer
from lm.tokenizers.declared import Declared, add_tokens, read_declared, read_json, set_spaces
from lm.tokenizers.fast import FastTokenizer
from lm.tokenizers.gguf import from_gguf
from lm.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.tokenizers.sentencepiece_fast import fast_vocabulary
from lm.tokenizers.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, with_pieces

T = TypeVar("T", FastTokenizer, SentencePieceTokenizer)
_RULED = ("bos", "eos", "pad")
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
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"'{path}' is not a tokenizer.json ({error})") from error
    declared = read_declared(path.parent)
    tokenizer = _as_declared(inner, path, declared)
    ids = {key: getattr(tokenizer, f"{key}_id") for key in _RULED}
    return _with_rules(tokenizer, path, declared, ids)


def _open_model(path: Path) -> Tokenizer:
    tokenizer, declared = SentencePieceTokenizer(path), read_declared(path.parent)
    ids = {key: getattr(tokenizer, f"{key}_id") for key in _RULED}
    # What is null was taken away, whatever the vocabulary says.
    ids |= {key: -1 for key in _RULED if declared.config.get(f"{key}_token", "") is None}
    model = tokenizer.model
    strips = any(t.lstrip or t.rstrip or t.single_word for t, _ in declared.tokens)
    if not strips and declared.scheme(model.add_dummy_prefix, model_file=True) is None:
        return _with_rules(_with_pieces(tokenizer, declared), path, declared, ids)
    pieces, known = list(model.pieces), set(model.pieces)
    for token, number in declared.tokens:  # placeholders get their names by their numbers
        if number is not None and number < len(pieces) and token.content not in known:
            pieces[number] = token.content
    try:
        inner = fast_vocabulary(dataclasses.replace(model, pieces=pieces), str(path))
    except ValueError as error:
        raise ValueError(
            f"{error}, and the files beside it have settings that SentencePiece cannot express; "
            "save the tokenizer as tokenizer.json with the library that wrote it"
        ) from error
    # As SentencePiece's own: found in the text as it is, without a space put in front of it.
    tokens = [(_verbatim(token), number) for token, number in declared.tokens]
    declared = dataclasses.replace(declared, tokens=tokens)
    opened = _as_declared(inner, path, declared, model_file=True)
    opened.add_bos = tokenizer.add_bos
    return _with_rules(opened, path, declared, ids)


def _as_declared(
    inner: tokenizers.Tokenizer, path: Path, declared: Declared, model_file: bool = False
) -> FastTokenizer:
    set_spaces(inner, declared, model_file)
    add_tokens(inner, declared, str(path))
    return FastTokenizer(inner, str(path))


def _verbatim(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    flags = {name: getattr(token, name) for name in ("special", "lstrip", "rstrip", "single_word")}
    return tokenizers.AddedToken(token.content, normalized=False, **flags)


def _with_pieces(tokenizer: SentencePieceTokenizer, declared: Declared) -> SentencePieceTokenizer:
    """The tokenizer with the declared tokens as pieces, special ones as control pieces."""
    types, size = tokenizer.model.types, len(tokenizer.model.pieces)
    changes, always, end = [], {}, size
    for token, number in declared.tokens:
        at = known = tokenizer.id_of(token.content)
        if at is None:
            at = number if number is not None and number < size else end
            end += at == end
        if known is None or (token.special and types[at] not in (CONTROL, UNKNOWN)):
            changes.append((at, token.content, CONTROL if token.special else USER_DEFINED))
        if not token.special and (known is None or types[at] != USER_DEFINED):
            always[token.content] = at
    if not changes and not always:
        return tokenizer
    proto = with_pieces(tokenizer.path.read_bytes(), changes)
    return SentencePieceTokenizer(tokenizer.path, always_special=always, proto=proto)


def _with_rules(tokenizer: T, path: Path, declared: Declared, ids: Mapping[str, int]) -> T:
    """The tokenizer with the rules of the files beside it.

    Args:
      ids: of BOS, EOS and padding by the vocabulary, where the files name none.
    """
    config, names = declared.config, declared.names
    named: dict[str, Any] = {
        f"{key}_token": bytes(tokenizer.token_bytes[i]).decode("utf-8", "replace")
        for key, i in ids.items()
        if i >= 0
    } | names
    if declared.listed:
        named["additional_special_tokens"] = list(declared.listed)
    found = {key: tokenizer.id_of(names[f"{key}_token"]) for key in ids if f"{key}_token" in names}
    add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
    tokenizer.set_rules(
        {**ids, **{key: i for key, i in found.items() if i is not None}},
        _eos_ids(path.parent),
        tokenizer.add_bos if add_bos is None else bool(add_bos),
        tokenizer.add_eos if add_eos is None else bool(add_eos),
        _chat_templates(path.parent, config),
        named,
    )
    return tokenizer


def _eos_ids(folder: Path) -> list[int]:
    """Tokens that end a generation by the model's own files, in their order."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return ids


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates in files of their own, or else those of the configuration."""
    files = {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    if (file := folder / "chat_template.jinja").is_file():
        files["default"] = file
    if files:
        return {name: _read(files[name]) for name in sorted(files)}
    source: Any = config.get("chat_template") or {}
    if isinstance(source, str):
        return {"default": source}
    try:
        found = source if isinstance(source, dict) else {e["name"]: e["template"] for e in source}
        if not all(isinstance(text, str) for pair in found.items() for text in pair):
            raise TypeError("not text")
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"'{folder / 'tokenizer_config.json'}': chat_template is {source!r:.80}; a text was "
            "expected, or a list of objects with 'name' and 'template'"
        ) from error
    return dict(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 ({error}); convert it") from error
