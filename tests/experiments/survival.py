"""A small pre-training run in a process of its own, to be killed, and what it left behind."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lm.checkpoints import open_checkpoint
from lm.config import command_line as config_lib
from lm.run import metrics as metrics_lib
from tests.commands import ROOT, of_one_device

NUM_STEPS = 40
SETTINGS = {
    "data.files": f"{sysconfig.get_path('stdlib')}/email/*.py",
    "data.max_megabytes": "0",
    "data.held_out": "0.1",
    "data.max_held_out_tokens": "5000",
    "model.vocab_size": "512",
    "model.stacks.0.num_repeats": "1",
    "model.embed_dim": "64",
    "model.stacks.0.pattern.0.attention.head_dim": "16",
    "model.stacks.0.pattern.0.feed_forward.hidden_dim": "128",
    "model.max_length": "64",
    "train.sequence_length": "64",
    "train.batch_size": "16",
    "train.num_steps": str(NUM_STEPS),
    "train.unroll": "false",
    "intervals.log": "1",
    "intervals.save": "4",
    "intervals.evaluate": "20",
    "mesh.fsdp": "1",
    "ema.decay": "0.9",
    "learning_rate.decay": "constant",
    "stability.warmup": "12",
    "stability.window": "12",
    "rewind.learning_rate": "0.5",
    "rewind.recovery_steps": "4",
    "rewind.skip_steps": "4",
    "sampling.max_new_tokens": "4",
}


def config_of(
    base: Any, settings: dict[str, str], corpus: pathlib.Path | None = None, **changes: str
) -> Any:
    """The configuration with settings and changes (`train__seed="1"`), on a corpus that exists."""
    edits = settings | {key.replace("__", "."): value for key, value in changes.items()}
    edits |= {} if corpus is None else {"data.directory": str(corpus)}
    return config_lib.override(base, edits)


def interrupted(
    finished: pathlib.Path, workdir: pathlib.Path, step: int, without: str = "data"
) -> pathlib.Path:
    """A copy of a run whose last checkpoint is of that step."""
    if workdir != finished:
        shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns(without))
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    return workdir


def start(
    workdir: pathlib.Path, settings: dict[str, str], launcher: Sequence[str] = ()
) -> subprocess.Popen:
    """The command a user types, in the background; its output goes to `<workdir>.log`.

    Args:
      workdir: of the run.
      settings: of its configuration.
      launcher: arguments of Python that come before the command.
    """
    command = [sys.executable, *launcher, *([sys.executable] if launcher else [])]
    command += ["-m", "experiments.pretrain", "--config=quicktest"]
    command += [f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=of_one_device(), stdout=log, stderr=log)


def finish(workdir: pathlib.Path, settings: dict[str, str], launcher: Sequence[str] = ()) -> None:
    """Run the command to its end."""
    process = start(workdir, settings, launcher)
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
    assert code == 0, pathlib.Path(f"{workdir}.log").read_text()[-3000:]


def stop_when(
    process: subprocess.Popen, happens: Callable[[], bool], number: int = signal.SIGKILL
) -> int:
    """Send the signal as soon as something happens; the exit status."""
    deadline = time.monotonic() + 300
    while not happens() and process.poll() is None:
        assert time.monotonic() < deadline, "the run neither got there nor ended"
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=60)


def events(workdir: pathlib.Path, name: str) -> list[dict]:
    """The metrics' events of that name."""
    return [row for row in metrics_lib.read(workdir / "metrics.jsonl") if row.get("event") == name]


def last_step(workdir: pathlib.Path) -> int:
    """Of the last whole row of metrics; 0 before the first."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    steps = [row["step"] for row in map(json.loads, lines) if "event" not in row]
    return steps[-1] if steps else 0


def is_saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written just now."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def rows(workdir: pathlib.Path) -> list[dict]:
    """Every line of the metrics, each of which must be whole."""
    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def course(workdir: pathlib.Path) -> dict[int, tuple]:
    """Loss, gradient norm, learning rate and held-out loss by step; no step may come twice."""
    steps = [row for row in rows(workdir) if "event" not in row]
    names = ("loss", "grad_norm", "learning_rate", "tokens", "held_out_loss", "ema_held_out_loss")
    found = {row["step"]: tuple(row.get(name) for name in names) for row in steps}
    assert len(found) == len(steps), "a step appears twice"
    assert list(found) == sorted(found)
    return found


def digest(workdir: pathlib.Path, step: int) -> str:
    """Hash of the weights of a checkpoint."""
    params, _ = open_checkpoint(workdir / "checkpoints" / str(step))
    hashed = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        hashed.update(jax.tree_util.keystr(path).encode())
        hashed.update(np.asarray(leaf).tobytes())
    return hashed.hexdigest()
