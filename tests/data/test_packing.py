import itertools
import json
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.packed import PackedSource, pack_source
from lm.data.packing import make_plan, open_plan, pack
from lm.data.sources import ArraySource, Document
from tests.refuses import refuses


def source_of(lengths, start=0):
    return ArraySource.from_documents(
        Document(np.arange(start, start + n, dtype=np.int32), n) for n in lengths
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 90), max_size=60), st.integers(1, 40))
def test_rows_are_those_of_a_plain_best_fit_decreasing(lengths, seq_len):
    """Among rows of equal room, the one that came to it last; whole rows first."""
    rows, room, stamp = [], [], []
    pairs = [max(n - 1, 0) for n in lengths]
    order = sorted((n % seq_len, d) for d, n in enumerate(pairs) if n % seq_len)
    for n, d in sorted(order, key=lambda piece: -piece[0]):
        fitting = [i for i in range(len(rows)) if room[i] >= n]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(seq_len)
            stamp.append(0)
        i = min(fitting, key=lambda i: (room[i], -stamp[i]))
        rows[i].append([d, pairs[d] // seq_len * seq_len, n])
        room[i] -= n
        stamp[i] = sum(map(len, rows))
    whole = [[[d, k * seq_len, seq_len]] for d, n in enumerate(pairs) for k in range(n // seq_len)]
    row_offsets, pieces = pack(np.asarray(lengths, int), seq_len)
    found = [pieces[a:b].tolist() for a, b in itertools.pairwise(row_offsets)]
    assert found == whole + rows


def test_plans_stay_what_they_were_and_waste_below_one_percent():
    assert make_plan(source_of([5, 40, 3, 17]), 16, "tokenizer").hash.startswith("691835c43ccdc3")
    lengths = np.random.default_rng(0).lognormal(6, 1.3, 20_000).astype(int) + 2
    plan = make_plan(ArraySource(np.zeros(0), np.cumsum([0, *lengths]), lengths, "f"), 1024)
    assert plan.hash == "8fc481a109aaa43ef6d8e6b324a7201b"
    assert plan.num_pairs == (lengths - 1).sum()
    assert plan.waste == pytest.approx(1 - (lengths - 1).sum() / (plan.num_rows * 1024))
    assert plan.waste < 0.01


def test_a_source_is_packed_shard_by_shard(tmp_path):
    source = source_of([5, 40, 3, 17, 1, 1, 9])
    one = pack_source(source, 16, tmp_path, "t")
    assert one.hash == make_plan(source, 16, "t").hash
    assert one.shards[0][0] is source
    several = pack_source(source, 16, tmp_path, "t", shard_documents=2)
    assert [len(part) for part, _ in several.shards] == [2, 2, 1]  # one without pairs is left out
    assert several.num_pairs == one.num_pairs == 69
    assert several.num_bytes == sum([5, 40, 3, 17, 9])
    assert several.num_rows == sum(plan.num_rows for _, plan in several.shards)
    again = pack_source(source, 16, tmp_path, "t", shard_documents=2)
    assert again.hash == several.hash
    assert len(list(tmp_path.iterdir())) == 4
    assert several.hash not in (one.hash, pack_source(source, 16, shard_documents=3).hash)
    mixed = (*one.shards, *pack_source(source, 8).shards)
    refuses(lambda: PackedSource(mixed, "mixed"), "'mixed' have plans of seq_len [8, 16]")


def test_plan_is_reopened_and_named_by_what_made_it(tmp_path):
    source = source_of([5, 40, 3, 17])
    plan = open_plan(source, 16, tmp_path, "tokenizer")
    made = make_plan(source, 16, "tokenizer")
    np.testing.assert_array_equal(plan.pieces, made.pieces)
    np.testing.assert_array_equal(plan.row_offsets, made.row_offsets)
    assert isinstance(plan.pieces, np.memmap)
    assert plan.hash == made.hash

    [directory] = tmp_path.iterdir()
    written = (directory / "pieces.npy").stat().st_mtime_ns
    assert open_plan(source, 16, tmp_path, "tokenizer").hash == plan.hash
    assert (directory / "pieces.npy").stat().st_mtime_ns == written

    others = [
        open_plan(source_of([5, 40, 3, 17], start=1), 16, tmp_path, "tokenizer"),
        open_plan(source, 8, tmp_path, "tokenizer"),
        open_plan(source, 16, tmp_path, "another"),
    ]
    assert len({plan.hash, *(o.hash for o in others)}) == 4
    assert len(list(tmp_path.iterdir())) == 4


def test_plan_cut_short_or_damaged(tmp_path, monkeypatch):
    source = source_of([5, 40])

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", Mock(side_effect=OSError("disk full")))
        refuses(lambda: open_plan(source, 16, tmp_path), "disk full", error=OSError)
    assert not list(tmp_path.iterdir())

    open_plan(source, 16, tmp_path)
    [directory] = tmp_path.iterdir()
    about = json.loads((directory / "plan.json").read_text())
    (directory / "plan.json").write_text(json.dumps(about | {"num_rows": 99}))
    refuses(lambda: open_plan(source, 16, tmp_path), "does not match its plan.json; delete")


def test_bad_input():
    refuses(lambda: pack(np.asarray([3]), 0), "seq_len=0")
    refuses(lambda: make_plan(source_of([1, 0, 1]), 8), "no (input, target) pair")
