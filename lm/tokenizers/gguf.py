"""Vocabularies in GGUF metadata: byte-level BPE ("gpt2") and SentencePiece ("llama").

The keys are those of ggml's docs/gguf.md; defaults and tokens that end a generation follow
llama.cpp.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lm.tokenizers import sentencepiece_model
from lm.tokenizers.base import Tokenizer
from lm.tokenizers.fast import FastTokenizer
from lm.tokenizers.pretokenizers import PRETOKENIZERS
from lm.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.tokenizers.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

_KEYS = {"pad": "padding", "unk": "unknown", "sep": "seperator"}  # so they are spelled
T = TypeVar("T", FastTokenizer, SentencePieceTokenizer)
_PREFIX = "tokenizer.ggml."
_SPECIAL = (CONTROL, UNKNOWN)
_KINDS = {
    "bert": "WordPiece (WPM)",
    "t5": "SentencePiece unigram (UGM)",
    "rwkv": "RWKV",
    "plamo2": "PLaMo-2",
    "gemma4": "Gemma 4",
    "no_vocab": "no vocabulary",
    "none": "no vocabulary",
}
# Tokens with these names end a generation, whatever the file's eos_token_id.
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
    *("<|endoftext|>", "<|eom_id|>", "<EOT>", "<|end_of_text|>", "<end_of_utterance>"),
    *("<\uff5cend\u2581of\u2581sentence\uff5c>",),
)


def from_gguf(metadata: Mapping[str, Any], name: str = "GGUF metadata") -> Tokenizer:
    """The tokenizer of a GGUF file's metadata.

    Args:
      metadata: all of the file's metadata, arrays as sequences.
      name: the file's name, for errors.

    Raises:
      ValueError: keys are missing or contradictory, or the kind of vocabulary is not supported.
    """
    kind = _get(metadata, "model", str, name)
    if kind == "gpt2":
        return _byte_level(metadata, name)
    if kind == "llama":
        return _sentencepiece(metadata, name)
    known = f", {_KINDS[kind]}," if kind in _KINDS else ""
    raise ValueError(
        f"'{name}' has a vocabulary of kind {_PREFIX}model='{kind}'{known} which is not supported; "
        "'gpt2' (byte-level BPE) and 'llama' (SentencePiece) are"
    )


def _byte_level(metadata: Mapping[str, Any], name: str) -> FastTokenizer:
    tokens, types = _tokens_and_types(metadata, name)
    pre = metadata.get(f"{_PREFIX}pre")
    if pre not in PRETOKENIZERS:
        said = "no pre-tokenizer" if pre is None else f"the unknown pre-tokenizer '{pre}'"
        raise ValueError(
            f"'{name}' has {said} ({_PREFIX}pre); convert the model again with a current "
            f"converter. Known: {', '.join(sorted(PRETOKENIZERS))}"
        )
    rule = PRETOKENIZERS[pre]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = _merges(_get(metadata, "merges", Sequence, name), vocabulary, name)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.ignore_merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in rule.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = {t: k for t, k in zip(tokens, types, strict=True) if k in (*_SPECIAL, USER_DEFINED)}
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, special=kind in _SPECIAL, normalized=False)
            for token, kind in added.items()
        ]
    )
    special = [token for token, kind in added.items() if kind in _SPECIAL]
    fast = FastTokenizer(tokenizer, name, special)
    return _with_rules(fast, metadata, tokens, types, name, add_bos=rule.add_bos)


def _merges(
    merges: Sequence[str], vocabulary: Mapping[str, int], name: str
) -> list[tuple[str, str]]:
    pairs = []
    for rank, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (space and left and right):
            raise ValueError(f"'{name}': merge {rank} is {merge!r}; 'left right' was expected")
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ValueError(
                    f"'{name}': merge {rank} ({merge!r}) needs the token {token!r}, which the "
                    "vocabulary lacks; the file is damaged or was converted wrongly"
                )
        pairs.append((left, right))
    return pairs


def _sentencepiece(metadata: Mapping[str, Any], name: str) -> SentencePieceTokenizer:
    tokens, types = _tokens_and_types(metadata, name)
    scores = _same_length(metadata, "scores", tokens, name)
    if bad := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
        raise ValueError(f"'{name}': the score of token {bad[0]} is {scores[bad[0]]}")
    byte_tokens = {t for t, kind in zip(tokens, types, strict=True) if kind == BYTE}
    wanted = {f"<0x{byte:02X}>" for byte in range(256)}
    if byte_tokens and byte_tokens != wanted:
        wrong = min(byte_tokens ^ wanted)
        raise ValueError(
            f"'{name}': byte tokens must be <0x00> to <0xFF>, and {wrong!r} "
            + ("is missing" if wrong in wanted else "is none of them")
        )
    prefix = bool(metadata.get(f"{_PREFIX}add_space_prefix", True))
    # SentencePiece needs exactly one unknown token; files may have more, or call it control.
    types = [CONTROL if kind == UNKNOWN else kind for kind in types]
    types[_special_id(metadata, "unk", len(tokens), name, default=0)] = UNKNOWN
    always = {t: i for i, t in enumerate(tokens) if types[i] == USER_DEFINED}
    model = sentencepiece_model.Model(
        tokens,
        scores,
        types,
        byte_fallback=bool(byte_tokens),
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
    )
    tokenizer = SentencePieceTokenizer(name, model, always_special=always)
    return _with_rules(tokenizer, metadata, tokens, types, name, bos=1, eos=2, add_bos=True)


def _with_rules(
    tokenizer: T,
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    types: Sequence[int],
    name: str,
    *,
    bos: int = -1,
    eos: int = -1,
    add_bos: bool,
) -> T:
    """The tokenizer with the file's rules, or these defaults; unused tokens get no text."""
    defaults = {"bos": bos, "eos": eos, "pad": -1}
    ids = {k: _special_id(metadata, k, len(tokens), name, i) for k, i in defaults.items()}
    more = {k: _special_id(metadata, k, len(tokens), name) for k in ("unk", "sep", "cls", "mask")}
    tokenizer.set_rules(
        ids,
        _ends(metadata, tokens, name),
        _adds(metadata, "bos", ids["bos"], add_bos, name),
        _adds(metadata, "eos", ids["eos"], False, name),
        _chat_templates(metadata),
        {f"{key}_token": tokens[i] for key, i in (ids | more).items() if i >= 0},
    )
    given, table = metadata[f"{_PREFIX}tokens"], tokenizer.token_bytes
    last = {token: i for i, token in enumerate(given)}
    tokenizer.token_bytes = [
        table[i] if types[i] != UNUSED else b"" if token in ("", tokens[i]) else table[last[token]]
        for i, token in enumerate(given)
    ]
    return tokenizer


def _get(metadata: Mapping[str, Any], key: str, kind: type, name: str) -> Any:
    value = metadata.get(_PREFIX + key)
    if value is None:
        raise ValueError(
            f"'{name}' has no {_PREFIX}{key}; convert the model with its vocabulary, or give the "
            "tokenizer by another path"
        )
    if kind is str and not isinstance(value, str):
        raise ValueError(f"'{name}': {_PREFIX}{key} is {value!r}; a string was expected")
    return value


def _same_length(metadata: Mapping[str, Any], key: str, tokens: Sequence[str], name: str) -> list:
    values = list(_get(metadata, key, Sequence, name))
    if len(values) != len(tokens):
        raise ValueError(
            f"'{name}': {_PREFIX}{key} has {len(values)} entries for {len(tokens)} tokens; the "
            "file is damaged or was converted wrongly"
        )
    return values


def _tokens_and_types(metadata: Mapping[str, Any], name: str) -> tuple[list[str], list[int]]:
    """Pieces and types; what begins or ends a text or a turn is a control token in any file.

    An empty token becomes an unused one, with the text that llama.cpp gives it. Of several tokens
    with one text the last is used, as there.
    """
    tokens = list(_get(metadata, "tokens", Sequence, name))
    types = [int(kind) for kind in _same_length(metadata, "token_type", tokens, name)]
    if wrong := sorted(set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}):
        raise ValueError(f"'{name}': token {types.index(wrong[0])} has the unknown type {wrong[0]}")
    last = {token: i for i, token in enumerate(tokens)}
    named = {_special_id(metadata, key, len(tokens), name) for key in ("bos", "eos", "eot", "eom")}
    for i, token in enumerate(tokens):
        if not token or last[token] != i:
            tokens[i], types[i] = f"[{'DUPLICATE' if token else 'EMPTY'}_{i}]", UNUSED
        elif (i in named and len(token) > 1) or token in _ENDS:  # files may name a comma
            types[i] = CONTROL
    return tokens, types


def _special_id(metadata: Mapping[str, Any], key: str, size: int, name: str, default=-1) -> int:
    full = f"{_PREFIX}{_KEYS.get(key, key)}_token_id"
    if full not in metadata:
        return default if default < size else -1
    token_id = int(metadata[full])
    if not 0 <= token_id < size:
        raise ValueError(f"'{name}': {full}={token_id} is outside the vocabulary [0, {size})")
    return token_id


def _adds(metadata: Mapping[str, Any], key: str, token_id: int, default: bool, name: str) -> bool:
    add = bool(metadata.get(f"{_PREFIX}add_{key}_token", default and token_id >= 0))
    if add and token_id < 0:
        raise ValueError(
            f"'{name}': {_PREFIX}add_{key}_token is true, and {_PREFIX}{key}_token_id is missing"
        )
    return add


def _ends(metadata: Mapping[str, Any], tokens: Sequence[str], name: str) -> list[int]:
    """Tokens besides EOS that end a generation."""
    ends = [_special_id(metadata, key, len(tokens), name) for key in ("eot", "eom")]
    ends += [i for i, token in enumerate(tokens) if token in _ENDS]
    # In the Harmony format <|end|> ends a message, and the turn goes on.
    if {"<|return|>", "<|call|>", "<|end|>"} <= set(tokens):
        ends = [i for i in ends if tokens[i] != "<|end|>"]
    return [i for i in ends if i >= 0]


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {k[len(key) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{key}.")}
    return {**({"default": metadata[key]} if key in metadata else {}), **named}
