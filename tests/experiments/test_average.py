"""`experiments.average`: the mean of checkpoints, opened and evaluated like any other."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from experiments.average import average, choose, table
from lm.checkpoints import open_checkpoint
from lm.config.command_line import ConfigError
from lm.model import num_params
from tests.commands import command
from tests.experiments.conftest import Spiked
from tests.refuses import refuses


def weights(path: pathlib.Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(open_checkpoint(path)[0])]


def test_it_is_the_mean_and_is_compared(spiked: Spiked, tmp_path: pathlib.Path) -> None:
    steps = [16, 24, 20]
    made = average(spiked.run, steps, tmp_path / "average")
    assert made.steps == (16, 20, 24)
    each = [weights(spiked.workdir / "checkpoints" / str(step)) for step in made.steps]
    found = weights(tmp_path / "average")
    assert sum(x.size for x in found) == num_params(spiked.run.model)
    for x, *parts in zip(found, *each, strict=True):
        assert x.dtype == parts[0].dtype
        np.testing.assert_allclose(x, np.mean(np.float64(parts), axis=0), atol=1e-6)
    row = spiked.row(24)
    for name in ("held_out_loss", "held_out_bits_per_byte"):
        np.testing.assert_allclose(made.figures["last"][name], row[name], rtol=1e-5)
        np.testing.assert_allclose(made.figures["ema"][name], row[f"ema_{name}"], rtol=1e-5)
    opened, config = open_checkpoint(made.path, spiked.run.layout)
    assert config == spiked.run.model
    assert spiked.run.evaluate(opened) == made.figures["average"]
    assert made.figures["average"] != made.figures["last"]
    lines = table(made.figures).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["last", "average", "ema"]
    for line, figures in zip(lines[1:], made.figures.values(), strict=True):
        assert [float(x) for x in line.split()[1:]] == [round(x, 4) for x in figures.values()]


def test_what_it_refuses(spiked: Spiked, tmp_path: pathlib.Path) -> None:
    checkpoints = spiked.workdir / "checkpoints"
    before = sorted(checkpoints.rglob("*"))
    for steps, output, words in (
        ([24, 24], tmp_path / "one", "at least two checkpoints"),
        ([20, 24], checkpoints, "is there already; give a new folder"),
        ([23, 99], tmp_path / "missing", "holds no checkpoint"),
    ):
        refuses(lambda s=steps, o=output: average(spiked.run, s, o), words, error=ConfigError)
    assert sorted(checkpoints.rglob("*")) == before and not any(tmp_path.iterdir())


def test_choose() -> None:
    have = [10, 20, 30]
    assert choose(have, 2, []) == [20, 30]
    assert choose(have, None, ["30", "10"]) == [30, 10]
    for last, steps, message in [
        (None, [], "give either --last=K or --steps"),
        (2, ["10"], "give either"),
        (4, [], "--last=4 must be at least 2 and at most 3; checkpoints there are: 10, 20, 30"),
        (1, [], "--last=1 must be at least 2"),
        (None, ["10", "15"], "no checkpoints of steps [15]"),
        (None, ["ten"], "--steps=ten must be numbers"),
    ]:
        refuses(
            lambda last=last, steps=steps: choose(have, last, steps), message, error=ConfigError
        )


def test_the_command(spiked: Spiked, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "average"
    out = command("average", f"--workdir={spiked.workdir}", "--last=3", f"--output={output}")
    assert f"average of steps 22, 23, 24: {output}/24" in out
    assert len(weights(output)) > 5
