import numpy as np
import pytest
import tensorflow_datasets as tfds

from lm.data.sources import ArraySource, Document, open_source, write_dataset
from tests.data.foreign import write_tfds
from tests.refuses import refuses


def documents(num, seed=0, high=60_000):
    rng = np.random.default_rng(seed)
    return [
        Document(rng.integers(0, high, rng.integers(1, 50)).astype(np.int32), 7 * i, f"d{i}")
        for i in range(num)
    ]


@pytest.mark.parametrize(("high", "dtype"), [(60_000, np.uint16), (100_000, np.int32)])
def test_dataset_round_trip_in_order(tmp_path, high, dtype):
    train, validation = documents(30, high=high), documents(5, seed=1, high=high)
    directory = tmp_path / "tokens" / "1.0.0"
    write_dataset(
        directory, {"train": iter(train), "validation": validation}, max_documents_per_shard=8
    )
    for split, expected in (("train", train), ("validation", validation)):
        source = open_source(directory, split)
        assert len(source) == len(expected)
        assert source._tokens.dtype == dtype
        np.testing.assert_array_equal(source.lengths, [len(d.tokens) for d in expected])
        np.testing.assert_array_equal(source.num_bytes, [d.num_bytes for d in expected])
        for i, document in enumerate(expected):
            assert source.read(i).dtype == np.int32
            np.testing.assert_array_equal(source.read(i), document.tokens)
            np.testing.assert_array_equal(source.read(i, 2, 3), document.tokens[2:5])
            np.testing.assert_array_equal(source.read(i, 3), document.tokens[3:])
        assert source.fingerprint == ArraySource.from_documents(expected).fingerprint


def test_any_tfds_reader_opens_it(tmp_path):
    written = documents(4)
    write_dataset(tmp_path / "d", {"train": written}, name="some_name")
    builder = tfds.builder_from_directory(tmp_path / "d")
    assert builder.info.name == "some_name"
    for document, example in zip(written, builder.as_data_source("train"), strict=True):
        np.testing.assert_array_equal(example["tokens"], document.tokens)
        assert example["num_bytes"] == document.num_bytes
        assert example["name"].decode() == document.name


def test_the_cache_is_reused_and_follows_the_data(tmp_path):
    directory, cache = tmp_path / "d", tmp_path / "cache"
    write_dataset(directory, {"train": documents(4)})
    first = open_source(directory, "train", cache)
    [entry] = cache.iterdir()
    written = (entry / "tokens.npy").stat().st_mtime_ns
    assert open_source(directory, "train", cache).fingerprint == first.fingerprint
    assert (entry / "tokens.npy").stat().st_mtime_ns == written
    directory.rename(tmp_path / "moved")
    assert open_source(tmp_path / "moved", "train", cache).fingerprint == first.fingerprint
    assert len(list(cache.iterdir())) == 1

    write_dataset(directory, {"train": documents(4, seed=2)})
    assert open_source(directory, "train", cache).fingerprint != first.fingerprint


def test_fingerprint_follows_content():
    def fingerprint(*tokens):
        return ArraySource.from_documents(
            Document(np.asarray(t, np.int32), 1) for t in tokens
        ).fingerprint

    assert fingerprint([1, 2], [3]) == fingerprint([1, 2], [3])
    assert len({fingerprint(*t) for t in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]])}) == 3


def test_head_holds_the_leading_documents():
    source = ArraySource.from_documents(Document(np.arange(n), 10 * n) for n in (4, 3, 5))
    for tokens, expected in ((1, 1), (4, 1), (5, 2), (7, 2), (8, 3), (999, 3)):
        head = source.head(tokens)
        assert len(head) == expected
        assert head.num_bytes.sum() == source.num_bytes[:expected].sum()
        np.testing.assert_array_equal(head.read(expected - 1), source.read(expected - 1))
    assert source.head(4).fingerprint != source.fingerprint


def test_bad_input(tmp_path):
    refuses(
        lambda: open_source(tmp_path, "train"), "dataset_info.json is missing",
        error=FileNotFoundError,
    )  # fmt: skip
    refuses(lambda: write_dataset(tmp_path / "empty", {"train": []}), "'train' of", "no documents")
    write_dataset(tmp_path / "d", {"train": documents(2)})
    refuses(lambda: open_source(tmp_path / "d", "test"), "no split 'test', only ['train']")
    refuses(
        lambda: write_dataset(tmp_path / "d", {"train": documents(2)}), "is not empty",
        error=FileExistsError,
    )  # fmt: skip
    other = write_tfds(tmp_path / "images", {"label": np.int64}, {"train": [{"label": 1}]})
    refuses(lambda: open_source(other, "train"), "no feature 'tokens', only ['label']")
