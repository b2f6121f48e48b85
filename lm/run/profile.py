"""A trace of a few steps by `jax.profiler`, to see what the device does when."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax


def parse_steps(text: str, num_steps: int) -> range:
    """ "10:15" -> the steps 10 to 14, counted from 0 as the trainer takes them.

    Raises:
      ValueError: not two whole numbers, an empty or negative range, or steps the run does not have.
    """
    try:
        first, last = map(int, text.split(":"))
    except ValueError:
        raise ValueError(
            f"profile_steps={text!r} is not a range of steps; give FIRST:END, such as 10:15 for "
            "the steps 10 to 14"
        ) from None
    if first < 0 or last <= first:
        raise ValueError(
            f"profile_steps={text!r} holds no step; FIRST must be 0 or more and below END, such "
            f"as {max(first, 0)}:{max(first, 0) + 5}"
        )
    if last > num_steps:
        first = max(0, min(first, num_steps - 5))
        raise ValueError(
            f"profile_steps={text!r} goes beyond the run's {num_steps} steps; give for instance "
            f"{first}:{min(first + 5, num_steps)}"
        )
    return range(first, last)


class Profiler:
    """Traces a range of steps into `folder`; reports what goes wrong and never fails the run.

        with Profiler(workdir / "profile", parse_steps("10:15")) as profiler:
            for step in range(num_steps):
                with profiler.at(step, metrics):
                    state, metrics = train_step(state, batch)

    A resumed run that starts inside the range traces what is left of it.

    Args:
      folder: made when the trace begins.
      steps: None for no trace.
      say: prints where the trace is and how to look at it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        steps: range | None,
        say: Callable[[str], None] = print,
    ):
        self.folder = pathlib.Path(folder)
        self._steps, self._say = steps, say
        self._tracing = False

    def at(self, step: int, before: Any = None) -> AbstractContextManager:
        """Around the call that starts step `step`, counted from 0.

        Args:
          step: the number of steps done.
          before: results of the steps before, which the trace waits for where it begins and ends,
            so that it holds whole steps.
        """
        if self._steps is None:
            return contextlib.nullcontext()
        if self._tracing and step not in self._steps:
            self._stop(before)
        elif not self._tracing and step in self._steps:
            self._start(before)
        if not self._tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def close(self, before: Any = None) -> None:
        """Ends the trace of a run that ends inside the range."""
        if self._tracing:
            self._stop(before)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, before: Any) -> None:
        try:
            jax.block_until_ready(before)
            jax.profiler.start_trace(self.folder)
            self._tracing = True
        except Exception as error:  # a profiler that is busy or cannot write ends no training
            self._give_up(error)

    def _stop(self, before: Any) -> None:
        self._tracing, self._steps = False, None
        try:
            jax.block_until_ready(before)
            jax.profiler.stop_trace()
        except Exception as error:
            self._give_up(error)
            return
        traces = sorted(self.folder.rglob("*.trace.json.gz"))
        lines = [
            f"profile: {self.folder}",
            f"  pip install xprof, then: xprof --logdir={self.folder}"
            "  (or TensorBoard with the plugin tensorboard-plugin-profile)",
        ]
        if traces:
            lines.append(f"  or open {traces[-1]} at https://ui.perfetto.dev")
        self._say("\n".join(lines))

    def _give_up(self, error: Exception) -> None:
        self._steps = None
        self._say(f"no profile, training goes on: {type(error).__name__}: {error}")
