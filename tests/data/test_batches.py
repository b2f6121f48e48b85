import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.data.batches import Batches, HeldOut
from lm.data.packed import SHARD_DOCUMENTS, pack_source
from lm.data.sources import ArraySource, Document
from tests.refuses import refuses

SEQ_LEN = 16


def packed(num_documents, seed=0, seq_len=SEQ_LEN, longest=60, shard=SHARD_DOCUMENTS):
    """Documents of distinct tokens, so that a token identifies its document and place."""
    lengths = np.random.default_rng(seed).integers(2, longest, num_documents)
    starts = 100_000 * seed + 1 + np.cumsum(lengths) - lengths
    source = ArraySource.from_documents(
        Document(np.arange(s, s + n, dtype=np.int32), 3 * int(n))
        for s, n in zip(starts, lengths, strict=True)
    )
    return pack_source(source, seq_len, name=f"source{seed}", shard_documents=shard)


def all_pairs(data):
    tokens = [source.read(d) for source, _ in data.shards for d in range(len(source))]
    return sorted((int(a), int(b)) for t in tokens for a, b in itertools.pairwise(t))


def pairs_of(batch):
    counted = batch["weights"] > 0
    return [*zip(*(batch[name][counted].tolist() for name in ("ids", "targets")), strict=True)]


@pytest.mark.parametrize("shard", [40, 7])
def test_a_batch_is_its_documents(shard):
    data = packed(40, shard=shard)
    assert len(data.shards) == -(-40 // shard)
    batches = Batches([data], 4)
    for step in range(8):
        batch = batches.host_batch(step)
        for i, row in enumerate(batches.rows(step)[1].tolist()):
            at, (source, pieces) = 0, data.row(row)
            for segment, (document, start, length) in enumerate(pieces.tolist(), 1):
                tokens = source.read(document)
                here = (i, slice(at, at + length))
                np.testing.assert_array_equal(batch["ids"][here], tokens[start:][:length])
                np.testing.assert_array_equal(batch["targets"][here], tokens[start + 1 :][:length])
                np.testing.assert_array_equal(batch["positions"][here], np.arange(length))
                assert (batch["segment_ids"][here] == segment).all()
                assert (batch["weights"][here] == 1).all()
                at += length
            for array in batch.values():
                assert not array[i, at:].any()
        assert {a.dtype for n, a in batch.items() if n != "weights"} == {np.dtype(np.int32)}
        assert batch["weights"].dtype == np.float32


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 9), st.integers(1, 30))
def test_an_epoch_is_every_pair_once(num_documents, batch_size, seed, shard):
    data = packed(num_documents, shard=shard)
    num_rows = data.num_rows
    batches = Batches([data], batch_size, seed=seed)
    rows = np.concatenate([batches.rows(s)[1] for s in range(-(-2 * num_rows // batch_size))])
    for epoch in rows[: 2 * num_rows].reshape(2, num_rows):
        assert sorted(epoch.tolist()) == list(range(num_rows))
    one = Batches([data], num_rows, seed=seed).host_batch(0)
    assert sorted(pairs_of(one)) == all_pairs(data)


@pytest.mark.parametrize("spec", [("data", None), (None, "data"), (("data", "seq"), None), ()])
def test_device_batch_is_the_host_batch(spec):
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "seq"))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    held_out = HeldOut(packed(9), 8)
    for batches, step in ((Batches([packed(30)], 8), 5), (held_out, len(held_out) - 1)):
        batch = batches.device_batch(step, sharding)
        for name, array in batches.host_batch(step).items():
            assert batch[name].shape == array.shape
            np.testing.assert_array_equal(batch[name], array)


def test_device_batch_reads_only_rows_of_this_host(monkeypatch):
    """A host whose devices hold rows 2, 3, 6 and 7 of 8 reads these, once."""
    batches = Batches([packed(30)], 8)
    read = []
    host_batch = Batches.host_batch

    def spy(self, step, rows=None):
        read.append(np.asarray(rows).tolist())
        return host_batch(self, step, rows)

    class Sharding:
        def addressable_devices_indices_map(self, shape):
            slices = [slice(2, 4), slice(6, 8)]
            return {i: (s, slice(None)) for i, s in enumerate(slices)}

    def place(shape, sharding, callback):
        indices = sharding.addressable_devices_indices_map(shape).values()
        return np.concatenate([callback(index) for index in indices])

    monkeypatch.setattr(Batches, "host_batch", spy)
    monkeypatch.setattr(jax, "make_array_from_callback", place)
    placed = batches.device_batch(3, Sharding())
    assert read == [[2, 3, 6, 7]]
    np.testing.assert_array_equal(placed["ids"], host_batch(batches, 3)["ids"][[2, 3, 6, 7]])


@pytest.mark.parametrize(("batch_size", "shard"), [(1, 25), (3, 8), (1000, 25)])
def test_held_out_reads_every_pair_once(batch_size, shard):
    data = packed(25, shard=shard)
    held_out = HeldOut(data, batch_size)
    batches = list(held_out)
    assert len(batches) == len(held_out)
    assert {b["ids"].shape for b in batches} == {(batch_size, SEQ_LEN)}
    assert sorted(pair for b in batches for pair in pairs_of(b)) == all_pairs(data)
    assert held_out.num_pairs == len(all_pairs(data))
    assert held_out.num_bytes == 3 * sum(int(source.lengths.sum()) for source, _ in data.shards)
    for batch in batches:
        np.testing.assert_array_equal(batch["segment_ids"] > 0, batch["weights"] > 0)


def test_prefetch_goes_on_from_any_step():
    batches = Batches([packed(30)], 4)
    with batches.prefetch(7, 3) as stream:
        read = list(stream)
    assert len(read) == 3
    for step, batch in enumerate(read, 7):
        np.testing.assert_array_equal(batch["ids"], batches.host_batch(step)["ids"])


def test_bad_input():
    refuses(lambda: Batches([], 4), "at least one, of distinct names")
    refuses(lambda: Batches([packed(5)] * 2, 4), "distinct names")
    lengths = "seq_len: {'source0': 16, 'source1': 8}"
    refuses(lambda: Batches([packed(5), packed(5, 1, 8)], 4), lengths)
    refuses(lambda: Batches([packed(5)], 0), "batch_size=0")
    refuses(lambda: HeldOut(packed(5), 0), "batch_size=0")
