"""Writing a tokenizer as the files of a Hugging Face model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from lm.tokenizers.base import Tokenizer
from lm.tokenizers.fast import FastTokenizer
from lm.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.tokenizers.sentencepiece_fast import fast_vocabulary


def save_tokenizer(tokenizer: Tokenizer, directory: str | os.PathLike[str]) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and the chat templates.

    The files add BOS and EOS by the tokenizer's own rule, and parse special tokens.

    Args:
      tokenizer: any kind; SentencePiece only if it is byte-pair encoding without normalization.
      directory: an existing directory.

    Returns:
      The names of the files.

    Raises:
      ValueError: tokenizer.json cannot express the SentencePiece model, or the name of a chat
        template is not a valid file name; nothing is written.
      OSError: a file cannot be written.
    """
    folder = Path(directory)
    for name in tokenizer.chat_templates:
        if Path(name).name != name:
            raise ValueError(f"chat template {name!r} has an invalid file name; rename it")
    if isinstance(tokenizer, FastTokenizer):
        inner = tokenizers.Tokenizer.from_str(tokenizer.serialized)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        inner = fast_vocabulary(tokenizer.model, str(tokenizer.path))
    else:
        raise ValueError(f"a {type(tokenizer).__name__} has no form in tokenizer.json")
    names = _names(tokenizer)
    inner.post_processor = _post_processor(tokenizer, names)
    (folder / "tokenizer.json").write_text(inner.to_str(), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
    }
    config |= tokenizer.named_tokens
    for key in ("bos", "eos", "pad"):
        token_id = getattr(tokenizer, f"{key}_id")
        if token_id >= 0:
            config[f"{key}_token"] = names[token_id]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    written = ["tokenizer.json", "tokenizer_config.json"]
    for name, template in tokenizer.chat_templates.items():
        file = f"additional_chat_templates/{name}.jinja"
        written.append("chat_template.jinja" if name == "default" else file)
        path = folder / written[-1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")
    return written


def _names(tokenizer: Tokenizer) -> dict[int, str]:
    """Names of special tokens, and of BOS, EOS and padding even if they are not special."""
    names = {i: token for token, i in tokenizer.special_tokens.items()}
    for token_id in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
        if token_id >= 0:
            names.setdefault(token_id, bytes(tokenizer.token_bytes[token_id]).decode())
    return names


def _post_processor(tokenizer: Tokenizer, names: dict[int, str]) -> Any:
    front = [names[tokenizer.bos_id]] if tokenizer.add_bos else []
    back = [names[tokenizer.eos_id]] if tokenizer.add_eos else []
    ids = {token: i for i, token in names.items()}
    return processors.TemplateProcessing(
        single=[*front, "$A", *back],
        pair=[*front, "$A", *back, *front, "$B", *back],
        special_tokens=[(token, ids[token]) for token in dict.fromkeys(front + back)],
    )
