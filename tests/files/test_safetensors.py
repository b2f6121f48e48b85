"""safetensors files: read and written as the library does, malformed ones refused by name."""

import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lm.files.base import FileFormatError
from lm.files.safetensors import DTYPES, INDEX, SINGLE, open_safetensors
from lm.files.safetensors_writer import LazyTensor, write_safetensors, write_sharded
from tests.files.samples import safetensors_bytes, safetensors_header
from tests.refuses import refuses

ROOT = pathlib.Path(__file__).resolve().parents[2]


def every_dtype():
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (), (0, 4), (5,), (1, 2, 3)]
    tensors = {}
    for i, (code, dtype) in enumerate(DTYPES.items()):
        shape = shapes[i % len(shapes)]
        raw = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), np.uint8)
        if code == "BOOL":
            raw = raw & 1
        tensors[f"{i % 7}.{code.lower()}"] = raw.view(dtype).reshape(shape)
    return tensors


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


@pytest.fixture
def library_tensors():
    """What the numpy half of the library can write."""
    return {k: v for k, v in every_dtype().items() if not k.endswith(("fnuz", "f8_e8m0"))}


def test_reads_what_the_library_wrote(tmp_path, library_tensors):
    path = tmp_path / "a.safetensors"
    save_file(library_tensors, path, metadata={"format": "pt", "é": '"\\\n'})
    model = open_safetensors(path)
    assert model.metadata == ({"format": "pt", "é": '"\\\n'},)
    with safe_open(path, framework="np") as peer:
        assert set(model.tensors) == set(peer.keys())
        for name, array in library_tensors.items():
            same(model.array(name), array)
            part = peer.get_slice(name)
            assert model.tensors[name].type == part.get_dtype()
            assert list(model.tensors[name].shape) == part.get_shape()


def test_writes_the_bytes_the_library_writes(tmp_path, library_tensors):
    metadata = {"format": "pt", "é": '"\\\n\x01'}
    # The library puts metadata in no order of its own, so one key at a time.
    for i, extra in enumerate([{}, *({k: v} for k, v in metadata.items())]):
        save_file(library_tensors, tmp_path / "peer", metadata=extra or None)
        write_safetensors(tmp_path / f"{i}", library_tensors, metadata=extra)
        assert (tmp_path / f"{i}").read_bytes() == (tmp_path / "peer").read_bytes()


@pytest.mark.oracle
def test_torch_reads_what_we_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    tensors = every_dtype()
    write_safetensors(tmp_path / "a", tensors)
    theirs = load_file(tmp_path / "a")
    assert set(theirs) == set(tensors)
    for name, tensor in theirs.items():
        assert list(tensor.shape) == list(tensors[name].shape)
        assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == tensors[name].tobytes()


def test_round_trip_of_every_dtype(tmp_path):
    tensors = every_dtype()
    write_safetensors(tmp_path / "a", tensors)
    model = open_safetensors(tmp_path / "a")
    streamed = dict(model.stream())
    assert set(streamed) == set(tensors)
    for name, array in tensors.items():
        same(streamed[name], array)
        same(model.raw(name), np.frombuffer(array.tobytes(), np.uint8))
        assert not model.array(name).flags.writeable and not model.raw(name).flags.owndata


def test_writes_views_and_other_byte_orders(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path / "a", {"t": x.T, "s": x[:, ::2], "b": x.astype(">f4")})
    with safe_open(tmp_path / "a", framework="np") as peer:
        same(peer.get_tensor("t"), np.ascontiguousarray(x.T))
        same(peer.get_tensor("s"), np.ascontiguousarray(x[:, ::2]))
        same(peer.get_tensor("b"), x)


@pytest.mark.parametrize("size", [1, 100, 250, 10_000])
def test_shards_and_their_index(tmp_path, size):
    rng = np.random.default_rng(1)
    tensors = {f"t{i}": rng.standard_normal((i + 1, 5)).astype(np.float32) for i in range(6)}
    reads = []

    def lazy(name, array):
        return LazyTensor(array.dtype, array.shape, lambda: reads.append(name) or array)

    files = write_sharded(
        tmp_path, {k: lazy(k, v) for k, v in tensors.items()}, max_shard_size=size
    )
    assert sorted(reads) == sorted(tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*files, INDEX] if len(files) > 1 else [SINGLE]
    )
    seen = {}
    for file in files:
        with safe_open(tmp_path / file, framework="np") as peer:
            found = {name: peer.get_tensor(name) for name in peer.keys()}  # noqa: SIM118
        assert len(found) == 1 or sum(a.nbytes for a in found.values()) <= size
        seen |= found
    assert set(seen) == set(tensors)
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
        assert set(index["weight_map"].values()) == set(files)
    model = open_safetensors(tmp_path)
    for name, array in tensors.items():
        same(seen[name], array)
        same(model.array(name), array)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"what was there")
    other = LazyTensor(np.dtype("<f4"), (3,), lambda: np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"'t' is float32 \[4\], announced as float32 \[3\]"):
        write_safetensors(path, {"a": np.zeros(2), "t": other})
    with pytest.raises(ValueError, match="int4"):
        write_safetensors(path, {"t": np.zeros(2, ml_dtypes.int4)})
    assert path.read_bytes() == b"what was there" and list(tmp_path.iterdir()) == [path]


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def one(data=8, **changes):
    return safetensors_bytes({"t": entry(**changes)}, bytes(data))


# Each is refused; the words are those of this reader's own checks.
MALFORMED = {
    "empty": (b"", "size is 0"),
    "short": (b"\x02\0\0\0",),
    "header huge": (safetensors_bytes("{}", length=2**64 - 1),),
    "not JSON": (safetensors_bytes('{"a":}'),),
    "key twice": (safetensors_bytes('{"t":1,"u":2,"t":1}'),),
    "depth": (safetensors_bytes('{"t":' + "[" * 99999),),
    "field missing": (safetensors_bytes('{"t":{"dtype":"F32"}}'),),
    "metadata value": (safetensors_bytes({"__metadata__": {"a": 1}}),),
    "dtype": (one(dtype="F31"), "F31"),
    "F4": (one(dtype="F4", shape=[16]), "tensor 't' dtype is 'F4'", "several numbers into a byte"),
    "F6": (one(12, dtype="F6_E3M2", shape=[16], offsets=[0, 12]), "'F6_E3M2'", "expected one of"),
    "overflow": (one(shape=[2**62, 2]),),
    "overflow of nothing": (one(0, shape=[2**40, 0, 2**40], offsets=[0, 0]), "less than 2**63"),
    "65 dimensions": (one(4, shape=[1] * 65, offsets=[0, 4]), "64 dimensions"),
    "size": (one(shape=[3]),),
    "outside": (one(offsets=[2**60, 2**60 + 8]),),
    "cut": (one(7), "not fully covered"),
    "more": (one(9), "not fully covered"),
    "gap": (safetensors_bytes({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17)),),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused(tmp_path, name):
    content, *words = MALFORMED[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    words = words or ["header is ", "fetch or convert the file again"]
    error = refuses(lambda: open_safetensors(path), *words, error=FileFormatError)
    assert str(error).startswith(f"{path}: ") and len(str(error)) < 1000


def shards(folder, weight_map, **content):
    header, size = safetensors_header(["a", "b"])
    (folder / "model-1.safetensors").write_bytes(safetensors_bytes(header, bytes(size)))
    index = {"metadata": {"total_size": 1.5}, "weight_map": weight_map} | content
    (folder / INDEX).write_text(json.dumps(index))
    return folder


GOOD = {"a": "model-1.safetensors", "b": "model-1.safetensors"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model-1.safetensors", "without a directory"),
        ("/etc/passwd", "without a directory"),
        ("", "without a directory"),
        ("a\0b", "without a directory"),
        ("other.safetensors", "a file that exists"),
        ("link.safetensors", "expected no link out of"),
        ("folder", "a file that exists"),
        (3, "expected a string"),
    ],
)
def test_an_index_stays_in_its_folder(tmp_path, name, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "folder").mkdir()
    (tmp_path / "outside.safetensors").write_bytes(safetensors_bytes("{}"))
    (folder / "link.safetensors").symlink_to("../outside.safetensors")
    shards(folder, GOOD)
    assert set(open_safetensors(folder).tensors) == {"a", "b"}
    shards(folder, GOOD | {"c": name})
    refuses(lambda: open_safetensors(folder), message, str(folder / INDEX), error=FileFormatError)


def test_links_of_a_hugging_face_cache(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    shards(snapshot, GOOD)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    assert set(open_safetensors(snapshot).tensors) == {"a", "b"}
    (snapshot / "model-1.safetensors").unlink()
    (snapshot / "model-1.safetensors").symlink_to("../../../outside")
    with pytest.raises(FileFormatError, match="no link out of"):
        open_safetensors(snapshot)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "weight_map is None"),
        ("{", "expected JSON in UTF-8"),
        ('{"weight_map": [1]}', "weight_map is [1]"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "index key is 'a'"),
        ('{"weight_map": ' + "[" * 99999, "recursion"),
    ],
)
def test_an_index_is_json(tmp_path, content, message):
    (tmp_path / INDEX).write_text(content)
    refuses(lambda: open_safetensors(tmp_path), message, error=FileFormatError)


def test_index_and_shards_agree(tmp_path):
    shards(tmp_path, GOOD | {"c": "model-1.safetensors"})
    refuses(lambda: open_safetensors(tmp_path), "weight_map file of 'c'", "holds that tensor")
    (tmp_path / "model-2.safetensors").write_bytes((tmp_path / "model-1.safetensors").read_bytes())
    shards(tmp_path, GOOD | {"b": "model-2.safetensors"})
    refuses(lambda: open_safetensors(tmp_path), "tensor name is 'a'", "does not have")


def test_a_folder_without_a_model(tmp_path):
    refuses(lambda: open_safetensors(tmp_path), "no model.safetensors", error=FileNotFoundError)


MEMORY = """
import resource, sys
from lm.files.safetensors import open_safetensors

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = 0.0
for name, array in open_safetensors(sys.argv[1]).stream():
    total += float(array.max())
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_streaming_holds_one_tensor(tmp_path):
    """96 MiB in tensors of 8: streaming adds less than three tensors to the process."""
    size, count = 8 << 20, 12
    tensors = {
        f"t{i:02}": LazyTensor(
            np.dtype("<f4"), (size // 4,), lambda i=i: np.full(size // 4, i, np.float32)
        )
        for i in range(count)
    }
    write_safetensors(tmp_path / "a", tensors)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "a")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    total, grown = result.stdout.split()
    assert float(total) == sum(range(count))
    assert int(grown) * 1024 < 3 * size
