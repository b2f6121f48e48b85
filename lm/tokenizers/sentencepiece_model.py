"""The fields of SentencePiece's model file that encoding and decoding depend on.

A `.model` file is the protocol buffer `ModelProto` of google/sentencepiece's own schema. The fields
are declared here because the module that SentencePiece ships refuses older protobuf runtimes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.message import DecodeError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
_UNK_SURFACE = " \u2047 "
_SPECIAL = ("unk", "bos", "eos", "pad")
# Name, number, type and default by message. Enumerations are integers: the same bytes.
_SCHEMA = {
    "Piece": (
        ("piece", 1, Field.TYPE_STRING, None),
        ("score", 2, Field.TYPE_FLOAT, None),
        ("type", 3, Field.TYPE_INT32, str(NORMAL)),
    ),
    "Trainer": (
        ("model_type", 3, Field.TYPE_INT32, str(UNIGRAM)),
        ("byte_fallback", 35, Field.TYPE_BOOL, None),
        *((f"{name}_id", 40 + i, Field.TYPE_INT32, None) for i, name in enumerate(_SPECIAL)),
        ("unk_surface", 44, Field.TYPE_STRING, _UNK_SURFACE),
        ("unk_piece", 45, Field.TYPE_STRING, None),
    ),
    "Normalizer": (
        ("name", 1, Field.TYPE_STRING, None),
        ("precompiled_charsmap", 2, Field.TYPE_BYTES, None),
        ("add_dummy_prefix", 3, Field.TYPE_BOOL, "true"),
        ("remove_extra_whitespaces", 4, Field.TYPE_BOOL, "true"),
        ("escape_whitespaces", 5, Field.TYPE_BOOL, "true"),
    ),
    "Model": (
        ("pieces", 1, "Piece", None),
        ("trainer", 2, "Trainer", None),
        ("normalizer", 3, "Normalizer", None),
    ),
}


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
    unk_surface: str = _UNK_SURFACE
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bool = False


def parse(proto: bytes) -> Model:
    """Reads a serialized ModelProto.

    Raises:
      ValueError: the bytes are not a ModelProto.
    """
    try:
        message = _message_class().FromString(proto)
        pieces = [each.piece for each in message.pieces]
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a SentencePiece ModelProto: {error!r}") from error
    trainer, normalizer = message.trainer, message.normalizer
    return Model(
        pieces,
        [each.score for each in message.pieces],
        [each.type for each in message.pieces],
        model_type=trainer.model_type,
        byte_fallback=trainer.byte_fallback,
        unk_surface=trainer.unk_surface,
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        charsmap=bool(normalizer.precompiled_charsmap),
    )


def serialize(model: Model) -> bytes:
    """A ModelProto that SentencePiece loads; a table of normalizations is not kept."""
    unknown = model.types.index(UNKNOWN) if UNKNOWN in model.types else -1
    message = _message_class()(
        trainer={
            "model_type": model.model_type,
            "byte_fallback": model.byte_fallback,
            **{f"{name}_id": -1 for name in _SPECIAL},
            "unk_surface": model.unk_surface,
        },
        normalizer={
            "name": "identity",
            "add_dummy_prefix": model.add_dummy_prefix,
            "remove_extra_whitespaces": model.remove_extra_whitespaces,
            "escape_whitespaces": True,
        },
    )
    for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True):
        message.pieces.add(piece=piece, score=score, type=kind)
    if unknown >= 0:
        message.trainer.unk_id, message.trainer.unk_piece = unknown, model.pieces[unknown]
    return message.SerializeToString()


def with_pieces(proto: bytes, pieces: Sequence[tuple[int, str, int]]) -> bytes:
    """The ModelProto with other pieces, and all else as it was.

    Args:
      pieces: number, text and type of each; numbers of further ones go on where there are no more.
    """
    message = _message_class().FromString(proto)
    for number, piece, kind in pieces:
        if number == len(message.pieces):
            message.pieces.add()
        message.pieces[number].piece, message.pieces[number].type = piece, kind
    return message.SerializeToString()


@functools.cache
def _message_class() -> Any:
    """The class of `Model` messages, in a pool of its own beside SentencePiece's."""
    file = descriptor_pb2.FileDescriptorProto(name="model", package="lm", syntax="proto2")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, number, kind, default in fields:
            label = Field.LABEL_REPEATED if field == "pieces" else Field.LABEL_OPTIONAL
            kinds = {"type_name": f".lm.{kind}"} if isinstance(kind, str) else {"type": kind}
            message.field.add(
                name=field, number=number, label=label, default_value=default, **kinds
            )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("lm.Model"))
