"""GGUF files: read and written as the `gguf` package does, and malformed ones refused by name."""

import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from lm.files.base import FileFormatError
from lm.files.gguf import read_gguf
from lm.files.gguf_writer import GGUFTensor, write_gguf
from tests.files.samples import GGML_TYPES, METADATA, Entry, gguf_bytes, random_entry
from tests.refuses import refuses

# gguf-py says 40 bytes for Q8_1, ggml 36.
PEER_TYPES = [name for name in GGML_TYPES if name in T.__members__ and name != "Q8_1"]
SCALARS = {
    "u8": np.uint8(255),
    "i8": np.int8(-128),
    "u16": np.uint16(65535),
    "i16": np.int16(-3),
    "u32": np.uint32(7),
    "i32": np.int32(-7),
    "f32": np.float32(0.1),
    "u64": np.uint64(2**63),
    "i64": np.int64(-(2**63)),
    "f64": np.float64(0.1),
}


def put(folder, built, name="a.gguf"):
    path = folder / name
    path.write_bytes(built.data if hasattr(built, "data") else built)
    return path


def plain(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value if isinstance(value, str | int | float) else [plain(v) for v in value]


def peer_file(path, metadata, tensors, **options):
    """Written by gguf-py: `metadata` of (adder, key, value), `tensors` of (name, type, array)."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for adder, key, value in metadata:
        getattr(writer, adder)(key, value)
    for name, kind, array in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def peer_tensors(rng):
    found = []
    for name in PEER_TYPES:
        *_, nbytes = GGML_TYPES[name]
        dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(name)
        if dtype:
            found.append((f"t.{name}", None, rng.standard_normal((3, 5)).astype(dtype)))
        elif name[1:].isdigit():
            found.append((f"t.{name}", None, np.arange(6, dtype=f"<i{nbytes}").reshape(1, 2, 3)))
        else:
            raw = rng.integers(0, 256, (3, 2 * nbytes), dtype=np.uint8)
            found.append((f"t.{name}", T[name], raw))
    return found


def test_reads_every_value_type(tmp_path):
    model = read_gguf(put(tmp_path, gguf_bytes(METADATA)))
    assert {key: plain(value) for key, value in model.metadata.items()} == {
        key: value for key, _, value in METADATA
    }
    assert list(model.types.values()) == [
        "array" if kind.endswith("[]") else kind for _, kind, _ in METADATA
    ]
    assert model.metadata["a.true"] is True
    assert model.metadata["a.f32s"].dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        model.metadata["a.f32s"][0] = 1


def test_reads_what_gguf_py_wrote(tmp_path):
    rng = np.random.default_rng(0)
    metadata = [
        ("add_uint32", "a.count", 7),
        ("add_float32", "a.scale", 0.25),
        ("add_bool", "a.flag", False),
        ("add_array", "a.names", ["é", "", "b c"]),
        ("add_array", "a.scores", [0.5, -1.5]),
    ]
    tensors = peer_tensors(rng)
    model = read_gguf(peer_file(tmp_path / "a.gguf", metadata, tensors))
    assert {key: plain(model.metadata[key]) for _, key, _ in metadata} == {
        key: value for _, key, value in metadata
    }
    peer = gguf.GGUFReader(tmp_path / "a.gguf")
    assert list(model.tensors) == [tensor.name for tensor in peer.tensors]
    for tensor in peer.tensors:
        info = model.tensors[tensor.name]
        assert (info.type, info.offset, info.nbytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(
            model.raw(tensor.name), tensor.data.reshape(-1).view(np.uint8)
        )
    for name, kind, array in tensors:
        if kind is None:
            np.testing.assert_array_equal(model.array(name), array, strict=True)


def test_writes_the_bytes_gguf_py_writes(tmp_path):
    tensors = peer_tensors(np.random.default_rng(1))
    metadata = [
        ("add_uint32", "a.count", 7),
        ("add_float64", "a.scale", 0.1),
        ("add_int8", "a.small", -1),
        ("add_bool", "a.flag", True),
        ("add_array", "a.names", ["é", "", "b c"]),
        ("add_array", "a.ids", [1, 2, -3]),
        ("add_array", "a.scores", [0.5, -1.5]),
        ("add_array", "a.nested", [[1, 2], [3]]),
    ]
    expected = peer_file(tmp_path / "peer.gguf", metadata, tensors).read_bytes()
    ours = {"general.architecture": "llama"} | {key: value for _, key, value in metadata}
    sources = {
        name: array if kind is None else packed(kind.name, array) for name, kind, array in tensors
    }
    write_gguf(tmp_path / "a.gguf", ours, sources, types={"a.scale": "f64", "a.small": "i8"})
    assert (tmp_path / "a.gguf").read_bytes() == expected


def packed(kind, raw):
    _, block, nbytes = GGML_TYPES[kind]
    return GGUFTensor(kind, (*raw.shape[:-1], raw.shape[-1] // nbytes * block), lambda: raw)


def test_written_again_it_is_the_same(tmp_path):
    rng = np.random.default_rng(2)
    metadata = [*METADATA, ("general.alignment", "u32", 64), ("bad", "str[]", [b"\xff", "ok"])]
    built = gguf_bytes(
        metadata, [random_entry(f"t.{k}", k, 3, 2, rng) for k in GGML_TYPES], alignment=64
    )
    model = read_gguf(put(tmp_path, built))
    tensors = {
        name: GGUFTensor(info.type, info.shape, lambda name=name: model.raw(name))
        for name, info in model.tensors.items()
    }
    for name in ("b.gguf", "c.gguf"):
        write_gguf(tmp_path / name, model.metadata, tensors, types=model.types)
        assert (tmp_path / name).read_bytes() == built.data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "c.gguf"]


def test_numbers_get_the_type_they_fit(tmp_path):
    metadata = {"a": 1, "b": -1, "c": 2**40, "d": -(2**40), "e": 2**63, "f": 1.5, "g": True}
    write_gguf(tmp_path / "a.gguf", metadata | SCALARS, {})
    model = read_gguf(tmp_path / "a.gguf")
    assert list(model.types.values()) == [
        "u32", "i32", "u64", "i64", "u64", "f32", "bool", *SCALARS,
    ]  # fmt: skip
    assert model.metadata == metadata | {key: value.item() for key, value in SCALARS.items()}


REFUSED = {
    "NoneType": ({"a": None}, {}),
    "one type": ({"a": [1, "b"]}, {}),
    "empty": ({"a": []}, {}),
    "u64": ({"a": 2**64}, {}),
    "2 dimensions": ({"a": np.zeros((2, 2), np.int32)}, {}),
    "power of two": ({"general.alignment": 24}, {}),
    "none of them 0": ({}, {"t": np.zeros((2, 0), np.float32)}),
    "4 dimensions": ({}, {"t": np.zeros((1,) * 5, np.float32)}),
    "complex64": ({}, {"t": np.zeros(2, np.complex64)}),
    "63 bytes": ({}, {"t" * 64: np.zeros(2, np.float32)}),
    "multiple of 256": ({}, {"t": GGUFTensor("Q4_K", (2, 100), lambda: np.zeros(1))}),
    "Q9": ({}, {"t": GGUFTensor("Q9", (2, 100), lambda: np.zeros(1))}),
    "67 bytes": ({}, {"t": GGUFTensor("Q8_0", (2, 32), lambda: np.zeros(67, np.uint8))}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_writer_refuses(tmp_path, words):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"what was there")
    refuses(lambda: write_gguf(path, *REFUSED[words]), words)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_are_views_in_their_dtype(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = {"f": x, "b": x.astype(ml_dtypes.bfloat16), "i": x.astype(np.int8), "s": x[0, 1]}
    write_gguf(tmp_path / "a.gguf", {}, {name: np.asarray(a) for name, a in arrays.items()})
    model = read_gguf(tmp_path / "a.gguf")
    for name, array in arrays.items():
        np.testing.assert_array_equal(model.array(name), array, strict=name != "s")
        np.testing.assert_array_equal(model.dequantize(name), np.asarray(array, np.float32))
        assert not model.raw(name).flags.owndata and not model.raw(name).flags.writeable
    packed_path = put(tmp_path, gguf_bytes([], [Entry("t", (32,), 8, bytes(34))]), "b.gguf")
    refuses(lambda: read_gguf(packed_path).array("t"), "dequantize")
    view = model.array("f")
    model.release("f")
    del model
    np.testing.assert_array_equal(view, x)


LENGTHS = {
    "words": lambda rng: rng.integers(1, 12, 30_000),
    "empty and short": lambda rng: rng.integers(0, 2, 20_000),
    "around a byte": lambda rng: rng.choice([0, 5, 254, 255, 256, 257, 70_000], 3000),
    "one window": lambda rng: np.array([(1 << 18) - 9, 3] * 40),
    "few": lambda rng: rng.integers(0, 9, 63),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("alphabet", ["zeros", "ones", "letters"])
def test_finds_every_string(tmp_path, name, alphabet):
    """Strings whose bytes look like lengths, in runs of every kind."""
    rng = np.random.default_rng(3)
    letters = {"zeros": [0], "ones": [0, 0, 0, 0, 0, 0, 0, 1], "letters": range(97, 123)}[alphabet]
    lengths = LENGTHS[name](rng)
    text = rng.choice(np.array(letters, np.uint8), int(lengths.sum())).tobytes().decode()
    ends = np.cumsum(lengths).tolist()
    words = [text[end - n : end] for end, n in zip(ends, lengths.tolist(), strict=True)]
    body = b"".join(len(w).to_bytes(8, "little") + w.encode() for w in words)
    built = gguf_bytes([("a", "str[]", [])]).data
    # The array's count is the last number; its strings follow.
    built[-8:] = len(words).to_bytes(8, "little")
    built[16:24] = (2).to_bytes(8, "little")
    tail = gguf_bytes([("b", "u32", 5)]).data[24:]
    model = read_gguf(put(tmp_path, bytes(built + body + tail)))
    strings = model.metadata["a"]
    assert len(strings) == len(words) and list(strings) == words
    assert strings[-1] == words[-1] and strings[3:5] == words[3:5]
    assert model.metadata["b"] == 5
    path = put(tmp_path, bytes(built + body[:-1]))
    with pytest.raises(FileFormatError, match=rf"'a'\[{len(words) - 1}\] length"):
        read_gguf(path)


def test_a_string_that_is_not_text_is_reported_when_read(tmp_path):
    path = put(tmp_path, gguf_bytes([("t", "str[]", ["ok", b"\xff\xfe", "fine"])]))
    strings = read_gguf(path).metadata["t"]
    assert strings[0] == "ok" and strings[2] == "fine" and strings.raw(1) == b"\xff\xfe"
    for read in (lambda: strings[1], lambda: list(strings)):
        refuses(read, "a.gguf: metadata 't'[1] is ", "UTF-8", error=FileFormatError)


def test_version_2_is_the_same(tmp_path):
    entry = random_entry("t", "Q8_0", 2, 2, np.random.default_rng(4))
    model = read_gguf(put(tmp_path, gguf_bytes(METADATA, [entry], version=2)))
    assert model.version == 2 and model.metadata["a.u8"] == 255
    assert model.raw("t").tobytes() == entry.data


def test_parts_are_one_model(tmp_path):
    tensors = [(f"t{i}", None, np.full((4, 8), i, np.float32)) for i in range(5)]
    peer_file(tmp_path / "m.gguf", [], tensors, split_max_tensors=2)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in files:
        model = read_gguf(path)
        assert list(model.tensors) == [name for name, _, _ in tensors]
        assert model.metadata["general.architecture"] == "llama"
        for name, _, array in tensors:
            np.testing.assert_array_equal(model.array(name), array)
            model.release(name)
    files[1].rename(tmp_path / "elsewhere")
    refuses(lambda: read_gguf(files[0]), "m-00002-of-00003.gguf, which is missing")
    files[1].write_bytes(files[2].read_bytes())
    refuses(lambda: read_gguf(files[0]), "split.no", "(2, 3)", "expected (1, 3)")
    files[0].rename(tmp_path / "m.gguf")
    refuses(lambda: read_gguf(tmp_path / "m.gguf"), "number at the end of the name")


def f32(name="t", ne=(8,), **changes):
    entry = Entry(name, ne, 0, bytes(32))
    for key, value in changes.items():
        setattr(entry, key, value)
    return entry


def array_head(kind, count, rest=b""):
    return gguf_bytes([("a", "u8[]", [])]).data[:-12] + struct.pack("<IQ", kind, count) + rest


BIG = 2**64 - 1
MALFORMED = {
    "empty": (b"", "size is 0"),
    "cut head": (gguf_bytes().data[:20], "metadata count length is 8; expected 4 at most"),
    "version 1": (gguf_bytes(version=1), "version is 1; expected 2 or 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (gguf_bytes(num_tensors=BIG), "tensor count is 18446744073709551615"),
    "value count": (gguf_bytes(METADATA, num_values=2**40), "metadata count is 1099511627776"),
    "key length": (
        gguf_bytes([("k", "u8", 1)]).data[:24] + struct.pack("<Q", BIG) + bytes(99),
        "metadata key 0 length is 18446744073709551615",
    ),
    "key not text": (gguf_bytes([(b"\xc3(", "u8", 1)]), "metadata key 0 is .*UTF-8"),
    "key twice": (gguf_bytes([("k", "u8", 1)] * 2), "metadata key 1 is 'k'"),
    "value type": (
        gguf_bytes([("k", "u8", 1)]).data[:-5] + struct.pack("<IQ", 13, 0),
        "metadata 'k' type is 13",
    ),
    "value not text": (gguf_bytes([("k", "str", b"\xff")]), "metadata 'k' is .*UTF-8"),
    "bool": (gguf_bytes([("k", "bool", 2)]), "metadata 'k' is 2; expected 0 or 1"),
    "array type": (array_head(77, 0), "'a' element type is 77"),
    "array count": (array_head(10, 2**61), "'a' count is 2305843009213693952; expected 0 at most"),
    "string count": (array_head(8, 2**32, bytes(80)), "'a' count is 4294967296; expected 10 at"),
    "array of arrays": (array_head(9, 2**50, bytes(24)), "'a' count is .*; expected 2 at most"),
    "depth": (array_head(9, 1, struct.pack("<IQ", 9, 1) * 5000), "depth is 9; expected 8"),
    "alignment 24": (gguf_bytes([("general.alignment", "u32", 24)]), "power of two"),
    "alignment type": (gguf_bytes([("general.alignment", "str", "32")]), r"\(str\) is '32'"),
    "name not text": (gguf_bytes([], [f32(b"\xff")]), "tensor 0 name is .*UTF-8"),
    "name twice": (gguf_bytes([], [f32(), f32()]), "tensor name is 't'"),
    "five dimensions": (gguf_bytes([], [f32(ne=(8, 1, 1, 1, 1))]), "'t' dimensions is 5"),
    "no numbers": (gguf_bytes([], [f32(ne=(8, 0))]), r"'t' shape is \(0, 8\)"),
    "overflow": (gguf_bytes([], [f32(ne=(2**32, 2**32))]), "shape is .*2\\*\\*63"),
    "cut": (gguf_bytes([], [f32()]).data[:-1], "'t' end is .*is it whole"),
    "offset outside": (gguf_bytes([], [f32(offset=2**63)]), "'t' end is"),
    "offset misaligned": (gguf_bytes([], [f32(offset=4)]), "'t' offset is 4; .*multiple of 32"),
    "overlap": (
        gguf_bytes([], [f32("a", (16,), data=bytes(64)), f32("b", offset=32)]),
        "'b' offset is .*, the end of 'a'",
    ),
    "blocks": (gguf_bytes([], [f32(ne=(8,), code=12)]), "'t' shape .*multiple of 256 for Q4_K"),
    "no such type": (gguf_bytes([], [f32(code=99)]), "'t' type is 99"),
    "removed": (gguf_bytes([], [f32(code=4)]), "'t' type is 4; that is Q4_2, which ggml removed"),
    "split alone": (gguf_bytes([("split.count", "u16", 3)]), "split.count is 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_by_name(tmp_path, name):
    content, message = MALFORMED[name]
    path = put(tmp_path, content)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 1000


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_cut_anywhere_it_is_refused(tmp_path, cut):
    data = gguf_bytes(METADATA, [f32()]).data
    path = put(tmp_path, bytes(data[: len(data) * cut // 200]))
    with pytest.raises(FileFormatError):
        read_gguf(path)


def test_what_is_allowed_is_read(tmp_path):
    """Gaps, another order and bytes at the end are allowed; so is a scalar."""
    tensors = [f32("b", offset=64), f32("a", offset=0, data=bytes(96)), f32("c", (), offset=128)]
    path = put(tmp_path, bytes(gguf_bytes([], tensors).data + b"more"))
    model = read_gguf(path)
    assert model.tensors["c"].shape == () and model.array("c") == 0
    assert [i.offset - model.tensors["a"].offset for i in model.tensors.values()] == [64, 0, 128]
