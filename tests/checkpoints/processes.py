"""What each process of `test_store_processes.py` runs."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time

import jax

TIMEOUT = 60


def make(offset: int = 0, num_fsdp: int = 4):
    """A tree sharded, replicated and scalar, in several dtypes: the same values on any mesh."""
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((num_fsdp,), ("fsdp",), devices=jax.devices()[:num_fsdp])

    def place(x, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    values = np.arange(64 * 8, dtype=np.float32).reshape(64, 8) + offset
    return {
        "trainable": {
            "w": place(values, "fsdp"),
            "b": place(values.astype(jnp.bfloat16), None, "fsdp"),
        },
        "frozen": {"q": place((values % 8).astype(jnp.uint4), "fsdp")},
        "opt_state": {"count": place(np.int32(offset)), "m": place(-values, "fsdp")},
    }


def restores(found, offset: int) -> bool:
    """Whether this process's shards of `found` are what `make(offset)` says."""
    import numpy as np

    same = True
    for x, y in zip(*map(jax.tree.leaves, (found, make(offset))), strict=True):
        for mine, its in zip(x.addressable_shards, y.addressable_shards, strict=True):
            same &= mine.index == its.index and mine.data.dtype == its.data.dtype
            same &= np.asarray(mine.data).tobytes() == np.asarray(its.data).tobytes()
    return same


def run(index: int, folder: pathlib.Path) -> dict:
    """Save, damage, restore, fail and save again; what was seen, for the test to judge."""
    from jax.experimental import multihost_utils

    from lm.checkpoints import Checkpoints, Reference, SaveInterval, arrays
    from lm.checkpoints.reference import digest

    seen: dict = {}
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make()
    )
    checkpoints = Checkpoints(
        folder / "durable", keep=2, local=folder / f"disk{index}", keep_local=1, timeout=TIMEOUT
    )
    for step in (1, 2, 3):
        checkpoints.save(step, make(step), {"step": step})
        checkpoints.save_local(step + 10, make(step + 10), {"step": step + 10})
    checkpoints.wait()
    seen["failures"] = checkpoints.failures()
    multihost_utils.sync_global_devices("saved")
    seen["steps"], seen["local"] = checkpoints.steps(), checkpoints.local.steps()

    found = checkpoints.restore_last(like)
    seen["local first"] = [found.step, restores(found.state, 13), found.metadata["step"]]
    multihost_utils.sync_global_devices("local")
    if index == 1:  # one host has lost its disk: nobody may use the local copy
        data = folder / "disk1" / "process_1" / "13" / "data"
        data.write_bytes(bytes(data.stat().st_size))
    found = checkpoints.restore_last(like)
    seen["durable then"] = [found.step, restores(found.state, 3), len(found.skipped)]
    multihost_utils.sync_global_devices("durable")
    if index == 0:  # one file damaged: whoever reads it, all pass it over
        (file,) = (folder / "durable" / "3" / "state").glob("manifest.ocdbt")
        file.write_bytes(file.read_bytes()[:-1])
    multihost_utils.sync_global_devices("damaged")
    found = checkpoints.restore_last(like)
    seen["before it"] = [found.step, restores(found.state, 2), len(found.skipped)]

    # The disk fails under process 1 alone: both learn of it, nothing hangs, the next save works.
    write = arrays.Handler.write_own_checksums
    if index == 1:
        arrays.Handler.write_own_checksums = refuse
    before = time.monotonic()
    checkpoints.save(4, make(4), {})
    checkpoints.wait()
    arrays.Handler.write_own_checksums = write
    seen["failed"] = [failure.step for failure in checkpoints.failures()]
    seen["quick"] = time.monotonic() - before < TIMEOUT
    multihost_utils.sync_global_devices("failed")
    seen["left"] = sorted(path.name for path in (folder / "durable").iterdir())
    multihost_utils.sync_global_devices("looked")
    reference = Reference("elsewhere", digest({"q": make(5)["frozen"]["q"]}))
    seen["digest"] = reference.digest
    checkpoints.save(5, make(5), {}, wait=True)
    seen["again"] = [checkpoints.failures(), checkpoints.restore(5, like) is not None]
    interval = SaveInterval(minutes=1)
    # The clocks of the processes differ: process 0's counts, at every tenth step.
    clock = 61.0 if index == 0 else 0.0
    seen["due"] = [step for step in range(1, 31) if interval.due(step, clock, 0.0)]
    checkpoints.close()
    return seen


def refuse(*_):
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    coordinator, index = os.environ["LM_COORDINATOR"], int(os.environ["LM_PROCESS_ID"])
    folder = pathlib.Path(sys.argv[1])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, index, initialization_timeout=TIMEOUT)
    seen = run(index, folder)
    (folder / f"seen{index}.json").write_text(json.dumps(seen))
    jax.distributed.shutdown()
