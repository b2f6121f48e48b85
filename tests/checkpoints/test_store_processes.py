"""Two processes of two devices save together; one process of any number of devices reads it."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from lm.checkpoints import Checkpoints
from lm.checkpoints.reference import digest
from tests.checkpoints.processes import make
from tests.checkpoints.states import assert_same_bits, structs

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder two processes have used, and what each of them saw."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["scripts/run_local.py", "--num_processes=2", "--devices=2", "--"]
    program = [sys.executable, "-m", "tests.checkpoints.processes", str(folder)]
    done = subprocess.run(
        [sys.executable, *launcher, *program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
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
    with Checkpoints(folder / "durable") as checkpoints:
        restored = checkpoints.restore_last(structs(expected))
    assert restored.step == 5
    assert_same_bits(restored.state, expected)
    for x, y in zip(*map(jax.tree.leaves, (restored.state, expected)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
