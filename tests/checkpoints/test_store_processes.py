"""Two processes of two devices save together; one process of any number of devices reads it."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from lm.checkpoints import Checkpoints
from lm.checkpoints.reference import digest
from tests.checkpoints.processes import make

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder two processes have used, and what each of them saw."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.checkpoints.processes"]
    processes = [
        subprocess.Popen(
            [*command, str(index), "2", str(port), "2", str(folder)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return folder, [json.loads((folder / f"seen{i}.json").read_text()) for i in range(2)]


def test_both_saw_the_same(two):
    _, seen = two
    assert seen[0] == seen[1]
    assert seen[0] == {
        "failures": [],
        "steps": [2, 3],
        "local": [13],
        "local first": [13, True, 13],
        "durable then": [3, True, 1],
        "before it": [2, True, 2],
        "failed": [4],
        "quick": True,
        "left": ["2", "3"],
        "digest": digest({"q": make(5)["frozen"]["q"]}),
        "again": [[], True],
        "due": [10, 20, 30],
    }


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_one_process_reads_what_two_wrote(two, num_devices):
    folder, _ = two
    expected = make(5, num_devices)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected
    )
    with Checkpoints(folder / "durable") as checkpoints:
        restored = checkpoints.restore_last(like)
    assert restored.step == 5
    for x, y in zip(*map(jax.tree.leaves, (restored.state, expected)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim) and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
