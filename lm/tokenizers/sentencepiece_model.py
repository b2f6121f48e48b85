"""The fields of SentencePiece's model file that encoding and decoding depend on.

A `.model` file is the protocol buffer `ModelProto` of google/sentencepiece's own schema.
Parsed here because the module that SentencePiece ships refuses older protobuf runtimes.
"""

import dataclasses
import struct
from collections.abc import Iterator, Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class Model:
    """Pieces and the settings that matter.

    Attributes:
      pieces, scores, types: one per token; a space is written U+2581.
      model_type: UNIGRAM, BPE (or 3 words, 4 characters).
      unk_surface: text of the unknown token.
      add_dummy_prefix: put a space in front of the text.
      charsmap: whether a table of normalizations is applied, as NFKC.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    model_type: int = BPE
    byte_fallback: bool = False
    unk_surface: str = " \u2047 "
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bool = False


def parse(proto: bytes) -> Model:
    """Reads a serialized ModelProto.

    Raises:
      ValueError: the bytes are not a ModelProto.
    """
    pieces, scores, types = [], [], []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(proto):
            if number == 1:
                piece = dict(_fields(_as_bytes(value)))
                pieces.append(_as_bytes(piece[1]).decode())
                scores.append(struct.unpack("<f", _as_bytes(piece.get(2, bytes(4))))[0])
                types.append(piece.get(3, NORMAL))
            elif number == 2:
                trainer.update(_fields(_as_bytes(value)))
            elif number == 3:
                normalizer.update(_fields(_as_bytes(value)))
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a SentencePiece ModelProto: {error!r}") from error
    return Model(
        pieces,
        scores,
        types,
        model_type=int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        unk_surface=_as_bytes(trainer.get(44, Model.unk_surface.encode())).decode(),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        charsmap=bool(normalizer.get(2, b"")),
    )


def serialize(model: Model) -> bytes:
    """A ModelProto that SentencePiece loads; a table of normalizations is not kept."""
    special = {"bos": -1, "eos": -1, "pad": -1}
    unknown = model.types.index(UNKNOWN) if UNKNOWN in model.types else -1
    parts = []
    for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True):
        content = _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
        parts.append(_field(1, content))
    trainer = (
        _field(3, model.model_type)
        + _field(35, int(model.byte_fallback))
        + _field(40, unknown)
        + b"".join(_field(41 + n, value) for n, value in enumerate(special.values()))
        + _field(44, model.unk_surface.encode())
    )
    if unknown >= 0:
        trainer += _field(45, model.pieces[unknown].encode())
    normalizer = (
        _field(1, b"identity")
        + _field(3, int(model.add_dummy_prefix))
        + _field(4, int(model.remove_extra_whitespaces))
        + _field(5, 1)
    )
    return b"".join(parts) + _field(2, trainer) + _field(3, normalizer)


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise KeyError("a field has the wrong type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an int for varints, else bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise IndexError(f"field {number} has unknown wire type {kind}")
        if at + size > len(data):
            raise IndexError(f"field {number} ends after the file")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError("an integer is too long")


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value
    return _encode_varint(number << 3 | _VARINT) + _encode_varint(value % 2**64)


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
