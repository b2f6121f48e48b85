"""What hosts compare before they compute anything, and how a difference reads."""

from __future__ import annotations

import json
import pathlib
import uuid

import pytest

from lm.distributed import facts, watchdog
from lm.run import session
from tests.experiments.survival import config_of

A, B, C = (f"host {i} of 3 ({name})" for i, name in enumerate("abc"))
SAME = {"seed": 0, "files": "x" * 200}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({B: {}, C: {}}, ""),
        ({B: {"seed": 1}, C: {}}, f"differ in seed: {A} has 0, {B} has 1; start the same command"),
        ({B: {}, C: {"seed": 0.5}}, f"differ in seed: {A} has 0, {C} has 0.5; start"),
        ({B: {"seed": 1}, C: {"seed": 1}}, f"{A} has 0, {B} and 1 more have 1; start"),
        ({B: {"new": True}, C: {}}, f"differ in new: {A} has none, {B} has true; start"),
        ({B: {"seed": None}, C: {}}, f"differ in seed: {A} has 0, {B} has none; start"),
        # Values that differ beyond what is shown of them.
        ({B: {"files": "x" * 199 + "y"}, C: {}}, "differ in files: "),
        (
            {B: dict.fromkeys(("seed", "u", "v", "w", "x"), 1), C: {}},
            "they also differ in u, v, w and 1 more; start",
        ),
    ],
)
def test_the_first_difference_is_named(others, message):
    said = {A: SAME} | {host: SAME | changed for host, changed in others.items()}
    found = watchdog.difference(json.loads(json.dumps(said)))
    assert message in found and bool(found) == bool(message)
    assert "\n" not in found and len(found) < 500


def test_only_what_decides_the_program_is_compared():
    """Flags in any order; where a host is and where its files go may differ."""
    one = {
        "XLA_FLAGS": "--xla_dump_to=/tmp/a --xla_gpu_enable_x=true --xla_y",
        "JAX_ENABLE_X64": "1", "JAX_PROCESS_ID": "0", "JAX_COMPILATION_CACHE_DIR": "/a",
        "JAX_COORDINATOR_ADDRESS": "a:1", "TPU_WORKER_ID": "0", "HOME": "/root",
    }  # fmt: skip
    other = {"XLA_FLAGS": "--xla_y --xla_gpu_enable_x=true", "JAX_ENABLE_X64": "1"}
    assert facts.environment(one) == facts.environment(other)
    for change in (
        {"XLA_FLAGS": "--xla_y"}, {"XLA_FLAGS": "--xla_y --xla_gpu_enable_x=false"},
        {"JAX_ENABLE_X64": "0"}, {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        {"LIBTPU_INIT_ARGS": "--xla_tpu_z=1"},
    ):  # fmt: skip
        assert facts.environment(one) != facts.environment(other | change), change


def test_an_older_checkout_is_seen(tmp_path):
    (tmp_path / "lm" / "run").mkdir(parents=True)
    path = tmp_path / "lm" / "run" / "loop.py"
    path.write_text("a = 1\n")
    before = facts.sources(tmp_path)
    path.write_text("a = 2\n")
    assert list(before) == ["code of lm/run/loop.py"] and facts.sources(tmp_path) != before
    here = facts.program_facts({})
    assert "code of lm/distributed/facts.py" in here and "code of experiments/sft.py" in here
    assert {"program", "version of jax", "version of jaxlib", "version of python"} <= here.keys()


def test_every_key_of_the_configuration_is_compared_but_folders_of_a_host():
    from experiments.configs.pretrain import quicktest

    base = session.config_facts(config_of(quicktest(), {}))
    for key, value, differs in (
        ("train.seed", "7", True), ("data.seed", "7", True), ("train.num_steps", "9", True),
        ("data.directory", "/data", True), ("model.stacks.0.num_repeats", "3", True),
    ):  # fmt: skip
        assert (session.config_facts(config_of(quicktest(), {key: value})) != base) == differs
    one, two = (
        session.config_facts(config_of(quicktest(), {"data.directory": path})) for path in "ab"
    )
    assert one == two != base


def folders(*paths: pathlib.Path, **errors: str) -> dict:
    """What hosts say of their workdir, each having written its file there."""
    said = {}
    for host, path in zip((A, B, C), paths, strict=False):
        path.mkdir(parents=True, exist_ok=True)
        name = f".host-{len(said)}-{uuid.uuid4()}"
        (path / name).touch()
        said[host] = {"--workdir": {"path": str(path), "file": name, "made": False}}
        if host[5] in errors:
            said[host]["--workdir"]["error"] = errors[host[5]]
    return said


def test_a_folder_that_is_not_one_or_cannot_be_written_to_is_named(tmp_path):
    run, link = tmp_path / "run [a] b", tmp_path / "link"
    assert watchdog.separate(folders(run, run, run)) == ""
    link.symlink_to(run)
    assert watchdog.separate(folders(run, link)) == ""
    found = watchdog.separate(folders(run, run, tmp_path / "other"))
    assert found == (
        f"--workdir={run} of {A} and --workdir={tmp_path / 'other'} of {C} are not one folder; "
        "give a directory that all hosts share"
    )
    found = watchdog.separate(folders(run, run, **{"1": "Read-only file system"}))
    assert f"--workdir={run} cannot be written to on {B}: Read-only file system" in found
