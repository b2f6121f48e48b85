"""Tokens and settings in the files beside a vocabulary, read as Hugging Face's libraries do.

tokenizer_config.json says which tokens are added to the vocabulary (`added_tokens_decoder`), which
have a name (`eos_token`), and where a space goes in front of text. Where it has no such table, the
older special_tokens_map.json and added_tokens.json count.
"""

import dataclasses
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from absl import logging
from tokenizers import AddedToken

from lm.tokenizers.base import SPACE_SYMBOL

_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")
# Classes whose settings of spaces count beside a tokenizer.json; others take it as it is.
_SPACED = ("LlamaTokenizer", "CodeLlamaTokenizer", "")
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "")
_NAMES = [f"{key}_token" for key in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_MOST = 1 << 24  # numbers of tokens are below
# The parts of tokenizer.json, and the key of their steps.
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
_EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the files in a folder say.

    Attributes:
      config: tokenizer_config.json, with what the older files add.
      tokens: added tokens in the order of their numbers, then those that only have a name, each
        with its number, or None.
      listed: special tokens without a name.
      overrides: whether the flags of `tokens` count more than those in tokenizer.json.
    """

    config: Mapping[str, Any]
    tokens: Sequence[tuple[AddedToken, int | None]] = ()
    listed: Sequence[str] = ()
    overrides: bool = False

    @property
    def names(self) -> dict[str, str]:
        """Tokens by name: `bos_token`, `image_token`, whatever the configuration has."""
        pairs = {key: _content(value) for key, value in _named(self.config).items()}
        return {key: content for key, content in pairs.items() if content}

    def scheme(self, prefixes: bool, model_file: bool) -> str | None:
        """Which text gets a space in front: "always", "first", "never"; None to leave it as it is.

        "always" is each text between special tokens, "first" only the one that nothing precedes.

        Args:
          prefixes: whether the vocabulary puts a space in front by itself.
          model_file: whether it is a SentencePiece file, which "legacy" is about by itself;
            tokenizer.json was written with that setting, and is changed where "add_prefix_space"
            asks for it.
        """
        add, legacy = self.config.get("add_prefix_space"), self.config.get("legacy")
        if not model_file and (self.kind not in _SPACED or add is None):
            return None
        if not (prefixes if add is None else add):
            return "never" if prefixes else None
        if legacy is None or (legacy and model_file):
            return None if prefixes else "always"
        return "always" if legacy else "first"

    @property
    def kind(self) -> str:
        """The class of Hugging Face's library, whichever of its two forms."""
        return str(self.config.get("tokenizer_class") or "").removesuffix("Fast")


def read_declared(folder: Path) -> Declared:
    """What the files in a folder say; nothing if there are none.

    Raises:
      ValueError: a file is malformed.
    """
    path = folder / "tokenizer_config.json"
    config, older = read_json(path), read_json(folder / "special_tokens_map.json")
    table = config.get("added_tokens_decoder")
    if table is None:
        config = {**config, **older}
    others = config.get("additional_special_tokens"), config.get("extra_special_tokens")
    entries = [value for values in others if isinstance(values, list) for value in values]
    listed = [content for content in map(_content, entries) if content]
    special = dict.fromkeys([*Declared(config).names.values(), *listed])
    tokens: dict[str, tuple[AddedToken, int | None]] = {}
    try:
        if table is not None:
            numbered = sorted((int(i), value) for i, value in table.items())
        else:
            added = read_json(path := folder / "added_tokens.json")
            numbered = sorted((int(i), content) for content, i in added.items())
        for i, value in numbered:
            if not 0 <= i < _MOST:
                raise ValueError(f"number {i}")
            token = _token(value, special)
            tokens[token.content] = (token, i)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"'{path}' has a malformed table of added tokens ({error!r:.80}); each needs a number "
            "and its text"
        ) from error
    given = {_content(value): value for value in (*entries, *_named(config).values())}
    for content in special:
        tokens.setdefault(content, (_token(given.get(content, content), special), None))
    tokens.pop("", None)
    return Declared(config, list(tokens.values()), listed, table is not None)


def add_tokens(tokenizer: tokenizers.Tokenizer, declared: Declared, name: str) -> None:
    """Add the tokens that the files declare, in the order of their numbers, at the end.

    Where the files leave out numbers they get the next ones nevertheless, as in Hugging Face's
    library; that is reported.

    Args:
      tokenizer: modified.
      name: its origin, for the report.
    """
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    new: list[AddedToken] = []
    for token, number in declared.tokens:
        old = known.get(token.content)
        if old is not None and (number is None or not declared.overrides):
            flags = {flag: getattr(old, flag) for flag in _FLAGS}
            token = AddedToken(old.content, special=old.special or token.special, **flags)
        if repr(token) != repr(old):
            new.append(token)
    tokenizer.add_tokens(new)
    for token, number in declared.tokens:
        found = tokenizer.token_to_id(token.content)
        if number is not None and found != number:
            logging.warning(
                "'%s': the token %r is number %s, as in transformers; the files beside it say %d",
                name, token.content, found, number,
            )  # fmt: skip


def set_spaces(tokenizer: tokenizers.Tokenizer, declared: Declared, model_file: bool) -> None:
    """Put the space in front of text where the files say; see `Declared.scheme`."""
    state = {part: _steps(getattr(tokenizer, part)) for part in _PARTS}
    before = json.dumps(state)
    words, added = state["pre_tokenizer"], declared.config.get("add_prefix_space")
    if [step["type"] for step in words] == ["ByteLevel"]:  # others split before they would add it
        default = None if declared.kind in _GENERIC else False
        if (added := default if added is None else added) is not None:
            words[0]["add_prefix_space"] = bool(added)
    prepends = any(step["type"] == "Prepend" for step in state["normalizer"])
    spaced = [step for step in words if step["type"] == "Metaspace"]
    marks = [step for step in state["normalizer"] if step.get("content") == SPACE_SYMBOL]
    prefixes = prepends or any(step["prepend_scheme"] != "never" for step in spaced)
    scheme = declared.scheme(prefixes, model_file) if spaced or marks else None
    if scheme is not None:
        _move_space(state, scheme)
    if json.dumps(state) != before:
        layout = {part: {"type": "Sequence", key: state[part]} for part, key in _PARTS.items()}
        layout = {part: steps if state[part] else None for part, steps in layout.items()}
        parts = tokenizers.Tokenizer.from_str(json.dumps(_EMPTY | layout))
        for part in _PARTS:
            setattr(tokenizer, part, getattr(parts, part))


def _move_space(state: dict[str, list[dict[str, Any]]], scheme: str) -> None:
    """Rewrite the steps of a SentencePiece-like tokenizer."""
    words, decoder = state["pre_tokenizer"], state["decoder"]
    state["normalizer"] = [step for step in state["normalizer"] if step["type"] != "Prepend"]
    if scheme != "never" and not any(step["type"] == "Metaspace" for step in words):
        words.insert(0, {"type": "Metaspace", "replacement": SPACE_SYMBOL, "split": False})
    for step in (*words, *decoder):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = scheme
    kept = [step for step in decoder if not (step["type"] == "Strip" and step["start"])]
    if scheme != "never" and not any(step["type"] == "Metaspace" for step in kept):
        kept.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    state["decoder"] = kept


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, in their order."""
    return flatten(json.loads(part.__getstate__()) if part is not None else None)


def flatten(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, sequences in sequences taken apart."""
    if part is None:
        return []
    inner = next((part[key] for key in _PARTS.values() if key in part), None)
    if part["type"] != "Sequence" or inner is None:
        return [dict(part)]
    return [step for each in inner for step in flatten(each)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file.

    Raises:
      ValueError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}; an object was expected")
    return content


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """The named tokens of a configuration, in the order in which the library adds them."""
    keys = [key for key in (*_NAMES, *config) if key in config and key.endswith("_token")]
    more = config.get("extra_special_tokens")
    return {key: config[key] for key in keys} | (more if isinstance(more, dict) else {})


def _content(value: Any) -> str:
    """The text of a token that is given as text or with flags; "" for anything else."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _token(value: Any, special: Container[str]) -> AddedToken:
    content = value if isinstance(value, str) else value["content"]
    given = value if isinstance(value, dict) else {}
    flags = {flag: bool(given[flag]) for flag in _FLAGS if flag in given}
    return AddedToken(content, special=bool(given.get("special")) or content in special, **flags)
