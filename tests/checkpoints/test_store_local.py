"""The tier on the host's own disk is used where it is newest, sound and of this layout."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.checkpoints import Checkpoints
from tests.checkpoints.states import assert_same_bits, every_dtype, structs


def other(state):
    """Other values of the same types: each array upside down."""
    return {k: jax.device_put(np.asarray(x)[::-1], x.sharding) for k, x in state.items()}


@pytest.fixture
def tiers(tmp_path):
    """Checkpoints with durable step 10 and local steps 12 and 13, and the states."""
    state = every_dtype(4)
    with Checkpoints(tmp_path / "durable", local=tmp_path / "disk", keep_local=2) as checkpoints:
        checkpoints.save(10, state, {"row": 10})
        for step in (11, 12, 13):
            checkpoints.save_local(step, other(state), {"row": step})
        checkpoints.wait()
        assert checkpoints.failures() == []
        yield checkpoints, tmp_path / "disk" / "process_0", state


def test_the_newest_of_both_is_taken(tiers):
    checkpoints, disk, state = tiers
    assert sorted(path.name for path in disk.iterdir()) == ["12", "13"]
    restored = checkpoints.restore_last(structs(state))
    assert (restored.step, restored.metadata) == (13, {"row": 13})
    assert str(disk) in restored.source
    assert_same_bits(restored.state, other(state))
    for x, y in zip(*map(jax.tree.leaves, (restored.state, state)), strict=True):
        assert x.sharding == y.sharding
    checkpoints.save(20, state, {"row": 20}, wait=True)
    restored = checkpoints.restore_last(structs(state))
    assert restored.step == 20 and str(checkpoints.directory) in restored.source
    assert_same_bits(restored.state, state)


def test_damage_is_named_and_the_one_before_used(tiers):
    checkpoints, disk, state = tiers
    for name in ("data", "index.json", "checksums"):
        content = (disk / "13" / name).read_bytes()
        broken = bytearray(content)
        broken[len(content) // 3] ^= 16
        for bad in (bytes(broken), content[:-1], b""):
            (disk / "13" / name).write_bytes(bad)
            restored = checkpoints.restore_last(structs(state))
            assert restored.step == 12 and f"13/{name}" in restored.skipped[0]
        (disk / "13" / name).write_bytes(content)
    assert checkpoints.restore_last(structs(state)).step == 13


def test_another_layout_falls_back_on_the_durable_one(tiers):
    checkpoints, _, state = tiers
    restored = checkpoints.restore_last(structs(every_dtype(2)))
    assert restored.step == 10 and len(restored.skipped) == 2
    assert "was written with another layout of" in restored.skipped[0]
    assert_same_bits(restored.state, state)


def test_another_run_on_the_same_disk_is_not_mistaken(tiers, tmp_path):
    _, _, state = tiers
    with Checkpoints(tmp_path / "another", local=tmp_path / "disk") as another:
        assert another.restore_last(structs(state)) is None


def test_a_full_local_disk_is_reported(tiers, monkeypatch):
    checkpoints, disk, state = tiers

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "ascontiguousarray", refuse)
        checkpoints.save_local(14, state, {})
        checkpoints.wait()
    (failure,) = checkpoints.failures()
    assert failure.step == 14 and "No space left" in failure.error and str(disk) in failure.error
    assert sorted(path.name for path in disk.iterdir()) == ["12", "13"]
    checkpoints.save_local(15, state, {})
    checkpoints.wait()
    assert checkpoints.restore_last(structs(state)).step == 15


def test_replicated_arrays_are_stored_once(tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    copies = jax.device_put(np.zeros((1000, 100), np.float32), NamedSharding(mesh, PartitionSpec()))
    with Checkpoints(tmp_path / "durable", local=tmp_path / "disk") as checkpoints:
        checkpoints.save_local(1, {"copies": copies}, {})
    assert (tmp_path / "disk" / "process_0" / "1" / "data").stat().st_size == copies.nbytes
