"""Damage is found and named, and the checkpoint before it used; a full disk stops no training."""

import errno
import os
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from lm.checkpoints import CheckpointError, Checkpoints, DamagedError, arrays, checksums
from lm.checkpoints.opening import find
from tests.checkpoints.states import assert_same_bits
from tests.refuses import refuses

LIKE = {
    "x": jax.ShapeDtypeStruct((2,), jnp.int32),
    "trainable": {"w": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)},
}


def state(step):
    return {"x": jnp.full((2,), step), "trainable": {"w": jnp.full((3, 5), step, jnp.bfloat16)}}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with the checkpoints of steps 1 and 2, and the files of the second."""
    directory = tmp_path_factory.mktemp("run")
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"step": step}, wait=True)
        assert checkpoints.failures() == []
    files = [p.relative_to(directory) for p in sorted((directory / "2").rglob("*")) if p.is_file()]
    assert len(files) > 15
    return directory, files


@pytest.fixture(scope="module")
def read_files(two):
    """Files of step 2 that are ever read: Orbax adds two at the top while renaming."""
    files = two[1]
    never = [pathlib.Path("2/commit_success.txt"), pathlib.Path("2/_CHECKPOINT_METADATA")]
    assert set(never) < set(files)
    return [file for file in files if file not in never]


def test_the_two_files_that_have_no_checksum_do_not_matter(two, read_files, tmp_path):
    directory = shutil.copytree(two[0], tmp_path / "run")
    for file in set(two[1]) - set(read_files):
        (directory / file).unlink()
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore_last(LIKE)
    assert restored.step == 2
    assert_same_bits(restored.state, state(2))


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def damaged(content, how, rng):
    """Contents that are not what was written; None for no file."""
    size = len(content)
    if how != "flipped":
        return [{"half": content[: size // 2], "empty": b"", "missing": None}[how]]
    flips = np.zeros((4, size), np.uint8)
    for mask, position in zip(flips, (0, size // 2, size - 1, rng.integers(size)), strict=True):
        mask[position] = 1 << rng.integers(8)
    return [(np.frombuffer(content, np.uint8) ^ mask).tobytes() for mask in flips]


@pytest.mark.parametrize("how", ["flipped", "half", "empty", "missing"])
def test_damage_to_any_file_is_named_and_the_step_passed_over(two, read_files, how):
    directory, rng = two[0], np.random.default_rng(0)
    like, ignore = ({}, ["x", "trainable"]) if how == "flipped" else (LIKE, ())
    for file in read_files:
        content = (directory / file).read_bytes()
        for bad in damaged(content, how, rng):
            (directory / file).unlink()
            if bad is not None:
                (directory / file).write_bytes(bad)
            with Checkpoints(directory) as checkpoints:
                restored = checkpoints.restore_last(like, ignore=ignore)
                assert restored.step == 1 and restored.metadata == {"step": 1}
                assert len(restored.skipped) == 1 and str(file) in restored.skipped[0]
                assert checkpoints.steps() == [1]
                if like:
                    assert_same_bits(restored.state, state(1))
                    refuses(lambda: checkpoints.restore(2, LIKE), str(file), error=DamagedError)
            (directory / file).write_bytes(content)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.restore_last(LIKE).step == 2


def test_opening_by_path_passes_over_damage_too(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "checkpoints")
    assert find(tmp_path).name == "2"
    flip(tmp_path / "checkpoints" / "2" / "model.json", 40, 3)
    assert find(tmp_path).name == "1"
    with pytest.raises(DamagedError, match=r"2/model\.json is damaged"):
        find(tmp_path / "checkpoints" / "2")
    (tmp_path / "checkpoints" / "1" / "weights" / "manifest.ocdbt").unlink()
    with pytest.raises(DamagedError, match=r"every checkpoint in .* is damaged"):
        find(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find(tmp_path / "nothing")


def test_an_error_of_the_storage_on_reading_is_not_taken_for_damage(two, monkeypatch):
    """A disk that does not answer now may hold a sound checkpoint, so no older one is used."""

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Checkpoints(two[0]) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "crc32", fail)
            refuses(lambda: checkpoints.restore_last(LIKE), os.strerror(errno.EIO), error=OSError)
        assert checkpoints.steps() == [1, 2] and checkpoints.restore_last(LIKE).step == 2


def test_where_none_is_sound_training_does_not_start_anew(two, tmp_path):
    directory = shutil.copytree(two[0], tmp_path / "run")
    for step in (1, 2):
        flip(directory / str(step) / "metadata.json", 3, 0)
    with (
        Checkpoints(directory) as checkpoints,
        pytest.raises(CheckpointError, match=r"is sound: .*step 2.*step 1.*move the directory"),
    ):
        checkpoints.restore_last(LIKE)


def test_a_damaged_step_is_written_again_and_is_not_one_of_the_last(two, tmp_path):
    directory = shutil.copytree(two[0], tmp_path / "run")
    flip(directory / "2" / "checksums", 3, 0)
    with Checkpoints(directory, keep=1) as checkpoints:
        assert checkpoints.restore_last(LIKE).step == 1
        checkpoints.save(2, state(7), {}, wait=True)
        assert checkpoints.failures() == [] and checkpoints.steps() == [2]
        np.testing.assert_array_equal(checkpoints.restore(2, LIKE)["x"], [7, 7])


def test_crc32_is_the_standard_one(tmp_path):
    # The check value of CRC-32/ISO-HDLC (Ross Williams' catalogue).
    (tmp_path / "a").write_bytes(b"123456789")
    assert checksums.crc32(epath.Path(tmp_path / "a")) == (0xCBF43926, 9)


@pytest.mark.parametrize("moment", ["arrays", "checksums", "start", "room"])
def test_an_error_of_the_storage_is_reported_and_the_next_save_tried(tmp_path, monkeypatch, moment):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_, **__):
        raise full

    class Broken:
        result = refuse

    async def write_and_break(self, *args, write=ocp.PyTreeCheckpointHandler.async_save, **kwargs):
        return [*(await write(self, *args, **kwargs)), Broken()]

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state(1), {}, wait=True)
        with monkeypatch.context() as patch:
            if moment == "arrays":
                patch.setattr(ocp.PyTreeCheckpointHandler, "async_save", write_and_break)
            elif moment == "checksums":
                patch.setattr(checksums, "compute", refuse)
            elif moment == "start":
                patch.setattr(arrays.Handler, "async_save", refuse)
            else:
                patch.setattr(type(checkpoints.directory), "mkdir", refuse)
            checkpoints.save(2, state(2), {})
            checkpoints.wait()
        (failure,) = checkpoints.failures()
        assert failure.step == 2 and "No space left on device" in failure.error
        assert checkpoints.failures() == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
        assert checkpoints.restore_last(LIKE).step == 1
        checkpoints.save(2, state(2), {}, wait=True)
        assert checkpoints.failures() == [] and checkpoints.steps() == [2]
        assert checkpoints.restore_last(LIKE).step == 2


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)],
        capture_output=True,
        timeout=100,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=100)


def test_a_full_disk(small_disk):
    def big(step):
        return {"x": jnp.full((1 << 18,), step)}  # 1 MB

    like = {"x": jax.ShapeDtypeStruct((1 << 18,), jnp.int32)}
    with Checkpoints(small_disk / "run", keep=1) as checkpoints:
        checkpoints.save(1, big(1), {}, wait=True)
        assert checkpoints.failures() == []
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(1_300_000))
        for step in (2, 3):
            checkpoints.save(step, big(step), {})
            checkpoints.wait()
            (failure,) = checkpoints.failures()
            assert failure.step == step and str(small_disk / "run" / str(step)) in failure.error
            assert [path.name for path in (small_disk / "run").iterdir()] == ["1"]
            assert checkpoints.restore_last(like).step == 1
        ballast.unlink()
        checkpoints.save(4, big(4), {}, wait=True)
        assert checkpoints.failures() == [] and checkpoints.steps() == [4]
        assert (np.asarray(checkpoints.restore(4, like)["x"]) == 4).all()
