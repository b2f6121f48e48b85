"""What every training program does around its trainer: hosts, the clock, the workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from lm import distributed
from lm.config import codec
from lm.config.changes import Change
from lm.config.command_line import input_errors
from lm.distributed import is_first_process
from lm.run.goodput import Goodput, process_age
from lm.run.loop import Outcome
from lm.run.parts import Run
from lm.run.process import keep_freed_memory
from lm.run.profile import parse_steps
from lm.run.trainer import Training
from lm.run.workdir import check_path, claim_workdir, owned

# Keys of folders that are each host's own, or may have another path there.
OF_A_HOST = ("checkpoints.local", "data.directory")


@dataclasses.dataclass
class Session:
    """A workdir that is this run's for the length of `session`.

    Attributes:
      config, workdir: of the run.
      changes: of the configuration since the run was last started.
      goodput: the account of this process's time.
      outcome: of training, once it has ended.
    """

    config: Any
    workdir: pathlib.Path
    changes: Sequence[Change]
    goodput: Goodput
    outcome: Outcome | None = None

    def train(self, run: Run, profile_steps: str | None = None) -> Outcome:
        """Train to the end, or until the machine goes away; `config.json` says with what.

        Args:
          run: assembled from `config`.
          profile_steps: which to trace, as "10:15".

        Raises:
          ConfigError: hosts differ in the data, the run has no such steps to trace, or its
            checkpoints do not fit.
          FloatingPointError: see `Training`.
        """
        with input_errors():
            distributed.agree("data", data_facts(run))
        if is_first_process():
            self.workdir.mkdir(parents=True, exist_ok=True)
            codec.save(self.config, self.workdir / "config.json")
        with input_errors():
            profile = profile_steps and parse_steps(profile_steps, run.num_steps)
        self.outcome = Training(run, self.goodput, profile or None)(self.changes)
        return self.outcome


@contextlib.contextmanager
def session(config: Any, workdir: pathlib.Path) -> Iterator[Session]:
    """Find the other hosts and claim `workdir`; leave with status 143 if the machine goes away.

    To be entered before JAX is used.

    Raises:
      ConfigError: the hosts do not find each other, differ in what decides the run or have not
        one `workdir`; or another process is at work in it, or it holds another run.
    """
    check_path(workdir)
    goodput = Goodput(already=process_age())
    keep_freed_memory()
    if logging.get_verbosity() == logging.INFO:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every detail of every save
    with contextlib.ExitStack() as stack:
        with input_errors():
            facts, folders = config_facts(config), {"--workdir": workdir}
            stack.enter_context(distributed.start(facts=facts, folders=folders))
            if is_first_process():
                stack.enter_context(owned(workdir))
        stack.enter_context(goodput.watch_compilation())
        opened = Session(config, workdir, claim_workdir(config, workdir), goodput)
        yield opened
    if opened.outcome is not None and opened.outcome.reason == "preempted":
        sys.exit(distributed.PreemptionNotice.EXIT)


def config_facts(config: Any) -> dict[str, Any]:
    """The configuration by key; of folders that each host may have elsewhere, whether it has one.

    What is in the folder of the data is compared when it has been opened (`data_facts`).
    """
    keys = codec.flatten(codec.to_dict(config))
    own = {key: bool(keys[key]) for key in OF_A_HOST if key in keys}
    return {"configuration": type(config).__name__} | {
        f"--config.{key}": value for key, value in (keys | own).items()
    }


def data_facts(run: Run) -> dict[str, Any]:
    """Order and pack plans of the data, sizes of the held-out sets, and the newest checkpoint."""
    facts: Mapping[str, Any] = codec.flatten(run.stream.state(run.num_steps))
    held_out = {
        f"the size of the held-out set {name}": [len(held_out), held_out.num_bytes]
        for name, held_out in run.held_out.items()
    }
    tokenizer = {"the tokenizer": run.tokenizer.fingerprint}
    newest = {"the newest checkpoint": run.checkpoints.latest()}
    return tokenizer | {f"the data: {k}": v for k, v in facts.items()} | held_out | newest
