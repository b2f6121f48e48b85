"""Average the weights of a run's checkpoints, and compare the average with the last of them.

    python -m experiments.average --workdir=runs/demo --last=5 --output=runs/demo/average
    python -m experiments.average --workdir=runs/demo --steps=200,240,280 --output=DIR

Writes the average as a checkpoint of its own, which opens by its path like any other, and prints
held-out figures of the last checkpoint, of the average and, where the run kept one, of the last
checkpoint's exponential average (EMA). No more than two models are in memory at a time.

Averaging the last checkpoints of a run helps where the learning rate has not decayed
(arXiv:1803.05407, arXiv:2306.03241); after a full decay expect little.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.pretrain import open_run
from lm.checkpoints import Checkpoints, open_checkpoint
from lm.config import program
from lm.config.command_line import ConfigError, input_errors
from lm.config.fields import Several
from lm.config.program import Number
from lm.run.parts import Run
from lm.train.state import TrainState
from lm.weights import cast

Tree = Any
Figures = dict[str, dict[str, float]]


@functools.partial(jax.jit, donate_argnums=0)
def _move(average: Tree, weights: Tree, share: jax.Array) -> Tree:
    """The average, moved by `share` of the way to the weights."""
    return jax.tree.map(lambda a, w: a + share * (w.astype(jnp.float32) - a), average, weights)


@dataclasses.dataclass(frozen=True)
class Averaged:
    """What `average` made.

    Attributes:
      steps: of the checkpoints that went into it.
      path: the checkpoint written.
      figures: held-out figures by name, of `last`, `average` and, if there is one, `ema`.
    """

    steps: tuple[int, ...]
    path: pathlib.Path
    figures: Figures


def average(run: Run, steps: Sequence[int], output: str | pathlib.Path) -> Averaged:
    """Average the weights of checkpoints of a run, each counting the same.

    Args:
      run: with the checkpoints.
      steps: of the checkpoints.
      output: an empty or missing folder for the average.

    Raises:
      ConfigError: fewer than two checkpoints, one that is missing or damaged, or an output that
        holds something already.
    """
    output, steps = pathlib.Path(output).expanduser(), tuple(sorted(set(steps)))
    if len(steps) < 2:
        raise ConfigError(f"an average needs at least two checkpoints, not those of steps {steps}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; give a new folder as --output")
    mean, dtypes, figures = None, None, {}
    for i, step in enumerate(steps):
        with input_errors():
            weights, _ = open_checkpoint(run.checkpoints.directory / str(step), run.layout)
        if step == steps[-1]:
            figures["last"] = run.evaluate(weights)
        dtypes = jax.tree.map(lambda x: x.dtype, weights)
        mean = cast(weights, jnp.float32) if mean is None else mean
        mean = mean if i == 0 else _move(mean, weights, jnp.float32(1 / (i + 1)))
        del weights
    mean = jax.tree.map(lambda x, dtype: x.astype(dtype), mean, dtypes)
    figures["average"] = run.evaluate(mean)
    with Checkpoints(output, config=run.model) as checkpoints:
        nothing = jax.tree.map(lambda _: None, mean)
        state = TrainState(jnp.int32(steps[-1]), mean, nothing, ())
        metadata = {"averaged_steps": list(steps), "figures": figures}
        checkpoints.save(steps[-1], state, metadata, wait=True)
        for failure in checkpoints.failures():
            raise ConfigError(f"the average could not be written: {failure.error}")
    del mean, state
    if run.ema is not None:
        with input_errors():
            weights, _ = open_checkpoint(
                run.checkpoints.directory / str(steps[-1]), run.layout, ema=True
            )
        figures["ema"] = run.evaluate(weights)
    return Averaged(steps, output / str(steps[-1]), figures)


def choose(available: Sequence[int], last: int | None, steps: Sequence[str]) -> list[int]:
    """The steps asked for, out of those of the checkpoints there are.

    Raises:
      ConfigError: both or neither was asked for, or steps that are not there.
    """
    have = f"checkpoints there are: {', '.join(map(str, available)) or 'none'}"
    if (last is None) == (not steps):
        raise ConfigError(f"give either --last=K or --steps=A,B,...; {have}")
    if last is not None:
        if not 2 <= last <= len(available):
            raise ConfigError(f"--last={last} must be at least 2 and at most {len(available)}; "
                              f"{have}")  # fmt: skip
        return list(available[-last:])
    try:
        chosen = [int(step) for step in steps]
    except ValueError:
        raise ConfigError(f"--steps={','.join(steps)} must be numbers; {have}") from None
    missing = sorted(set(chosen) - set(available))
    if missing:
        raise ConfigError(f"no checkpoints of steps {missing}; {have}")
    return chosen


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each model, a column for each figure."""
    names = list(next(iter(figures.values())))
    width = max(map(len, figures))
    lines = [" " * width + "  " + "  ".join(names)]
    for model, values in figures.items():
        cells = [f"{values[name]:.4f}".rjust(len(name)) for name in names]
        lines.append(f"{model:{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def main() -> None:
    values = flags.FLAGS
    run = open_run(values.workdir)
    steps = choose(run.checkpoints.steps(), values.last, values.steps)
    made = average(run, steps, values.output)
    print(f"average of steps {', '.join(map(str, made.steps))}: {made.path}\n")
    print(table(made.figures))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE(Number(Several), "last", None, "How many of the last checkpoints to average.")
    flags.DEFINE_list("steps", [], "Steps of the checkpoints to average, in place of --last.")
    flags.DEFINE_string("output", None, "A new folder for the average.", required=True)
    program.run(main)
