import functools

import grain
import numpy as np
import pytest
from absl import flags

from lm.data.batches import Batches
from lm.data.grain_datasets import batches_dataset, rows_dataset, source_of
from lm.data.packed import pack_source
from tests.data.test_batches import packed as make_packed

packed = functools.partial(make_packed, 40, shard=15)


def batches():
    return Batches([packed()], 4, seed=3)


def test_rows_through_a_shuffling_grain_loader():
    rows, plain = rows_dataset(packed), packed()
    assert len(rows) == plain.num_rows
    loader = rows.shuffle(seed=1).batch(4, drop_remainder=False).to_iter_dataset()
    read = [row for batch in loader for row in batch["ids"].tolist()]
    whole = Batches([plain], plain.num_rows).host_batch(0)["ids"].tolist()
    assert read != whole
    assert sorted(read) == sorted(whole)


@pytest.fixture
def parsed_flags():
    """grain's workers ask for flags."""
    parsed = flags.FLAGS.is_parsed()
    flags.FLAGS.mark_as_parsed()
    yield
    if not parsed:
        flags.FLAGS.unparse_flags()


@pytest.mark.usefixtures("parsed_flags")
def test_batches_of_a_run_through_worker_processes():
    dataset = batches_dataset(batches, 5)
    loader = dataset.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=1))
    read = list(loader)
    assert len(read) == 5
    for step, batch in enumerate(read):
        for name, array in batches().host_batch(step).items():
            np.testing.assert_array_equal(batch[name], array)


def test_a_grain_dataset_is_a_source():
    def document(tokens):
        return {"tokens": np.asarray(tokens) + 1, "num_bytes": 7}

    dataset = grain.MapDataset.source([[1, 2, 3], [4, 5], [6]]).map(document)
    source = source_of(dataset)
    assert [source.read(d).tolist() for d in range(3)] == [[2, 3, 4], [5, 6], [7]]
    assert source.num_bytes.tolist() == [7, 7, 7]
    assert pack_source(source, 2).num_pairs == 3
