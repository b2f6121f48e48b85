"""SentencePiece's byte-pair vocabularies as those of the `tokenizers` library."""

import tokenizers
from tokenizers import decoders, models, normalizers

from lm.tokenizers.base import SPACE_SYMBOL
from lm.tokenizers.sentencepiece_model import BPE, CONTROL, UNKNOWN, USER_DEFINED, Model


def fast_vocabulary(model: Model, name: str) -> tokenizers.Tokenizer:
    """The vocabulary for the `tokenizers` library, with the same ids for every text.

    Byte-pair merges follow from the scores of pieces: the higher the score, the earlier the merge.

    Args:
      model: byte-pair encoding without normalization.
      name: its origin, for errors.

    Raises:
      ValueError: it is of another kind.
    """
    if model.model_type != BPE or model.charsmap or model.remove_extra_whitespaces:
        raise ValueError(
            f"'{name}' is not byte-pair encoding without normalization, as tokenizer.json requires"
        )
    vocabulary = {piece: i for i, piece in enumerate(model.pieces)}
    ranked = sorted(range(len(model.pieces)), key=lambda i: (-model.scores[i], i))
    merges = []
    for i in ranked:
        piece = model.pieces[i]
        if model.types[i] not in (CONTROL, UNKNOWN):
            merges += _splits(piece, vocabulary)
    unknown = model.pieces[model.types.index(UNKNOWN)]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    spaces = normalizers.Replace(" ", SPACE_SYMBOL)
    steps = [decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        spaces = normalizers.Sequence([normalizers.Prepend(SPACE_SYMBOL), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    inner.normalizer, inner.decoder = spaces, decoders.Sequence(steps)
    for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        found = [p for p, t in zip(model.pieces, model.types, strict=True) if t == kind]
        inner.add_tokens(
            [tokenizers.AddedToken(piece, special=special, normalized=False) for piece in found]
        )
    return inner


def _splits(piece: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that form a piece, by the ids of the pairs."""
    cuts = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
    pairs = [(a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
    return sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
