"""SIGTERM before a machine is taken away: all hosts save at the same step."""

from __future__ import annotations

import signal
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils


class PreemptionNotice:
    """SIGTERM on any host, agreed on by all hosts at one step.

    Cloud machines and Slurm send SIGTERM before they take a host away. With several processes JAX's
    runtime holds that signal's handler (do not install another after `start`) and agrees on a step
    that every host has yet to reach. Alone, `install` puts a handler in place.

        notice = PreemptionNotice()
        notice.install()
        ...
        if notice.agreed(step):
            save(state); sys.exit(notice.EXIT)

    A second SIGTERM, or Ctrl-C, ends the process at once.
    """

    EXIT = 128 + signal.SIGTERM

    def __init__(self) -> None:
        self.received = False
        self.num_calls = 0

    def install(self) -> None:
        """Start to listen for SIGTERM; call it on the main thread, after `start`."""
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._on_signal)

    def agreed(self, step: int) -> bool:
        """Whether every host saves and ends now, `step` steps done; all call it after each step.

        Hosts agree on the number of calls, not of steps, so a run may go back to an earlier step.
        """
        self.num_calls += 1
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(self.num_calls)
        return self.received

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(
            "SIGTERM: the run saves after this step and ends; a second SIGTERM ends it at once",
            file=sys.stderr, flush=True,
        )  # fmt: skip
