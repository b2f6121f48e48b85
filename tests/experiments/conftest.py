"""A small run that met bad data, went back and finished, for commands that look at runs."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from experiments import assemble, pretrain
from lm.data.batches import Batches
from lm.run import metrics as metrics_lib
from lm.run import parts
from lm.run.parts import Run
from tests.experiments import survival

SEED = 7  # of this run's data alone: other runs' batches stay what they are
CHANGES = {
    "data.seed": str(SEED),
    "train.num_steps": "24",
    "train.dtype": "float32",
    "stability.warmup": "8",
    "stability.window": "8",
    "intervals.save": "1",
    "ema.decay": "0.8",
}
FIRST_BAD, NUM_BAD = 14, 3  # steps, from 1


@dataclasses.dataclass(frozen=True)
class Spiked:
    """The run; its rows of metrics; and the distinct batches read for each step, in order.

    While it is in use, the data of the bad rows is bad: their targets are one token, over and over.
    """

    run: Run
    rows: list[dict]
    read: dict[int, list[dict[str, np.ndarray]]]

    @property
    def workdir(self) -> pathlib.Path:
        return self.run.workdir

    def row(self, step: int) -> dict:
        return next(r for r in self.rows if r["step"] == step and "event" not in r)

    def events(self, name: str) -> list[dict]:
        return survival.events(self.workdir, name)


def once(make: Callable) -> Callable:
    """`make`, called once for arguments that read alike; these are kept, as closures do not."""
    made: dict[str, tuple] = {}

    def get(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if key not in made:
            made[key] = (make(*args, **kwargs), args, kwargs)
        return made[key][0]

    return get


@pytest.fixture(scope="package", autouse=True)
def shared_programs() -> Iterator[None]:
    """Runs of equal configuration share their jitted functions: traced and compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "make_optimizer", once(assemble.make_optimizer))
        for name in ("make_train_step", "make_eval_step"):
            patch.setattr(parts, name, once(getattr(parts, name)))
        yield


@pytest.fixture(scope="package")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spiked]:
    workdir = tmp_path_factory.mktemp("spiked")
    read: dict[int, list[dict[str, np.ndarray]]] = {}
    host_batch = Batches.host_batch

    def spoiled(stream: Batches, step: int, rows=None) -> dict[str, np.ndarray]:
        batch = host_batch(stream, step, rows)
        if stream.timeline.seed != SEED:
            return batch
        size = stream.batch_size(step)
        if 0 <= stream.timeline.first_row(step) // size - (FIRST_BAD - 1) < NUM_BAD:
            batch["targets"][batch["weights"] > 0] = 3
        seen = read.setdefault(step + 1, [])
        if not any(np.array_equal(batch["ids"], other["ids"]) for other in seen):
            seen.append({name: x.copy() for name, x in batch.items()})
        return batch

    config = survival.config_of(pretrain.configs.quicktest(), survival.SETTINGS | CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "host_batch", spoiled)
        pretrain.main(config, workdir)
        rows = metrics_lib.read(workdir / "metrics.jsonl")
        yield Spiked(
            pretrain.assemble(config, workdir)[0], rows, {s: list(b) for s, b in read.items()}
        )
