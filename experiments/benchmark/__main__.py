"""Benchmarks, each with flags of its own.

    python -m experiments.benchmark train       # the training step, beside transformers on PyTorch
    python -m experiments.benchmark kernels     # attention, paged decoding and the step
    python -m experiments.benchmark generate    # decoding, beside transformers and llama.cpp

`python -m experiments.benchmark train --help` lists the flags of `train`.
"""

from __future__ import annotations

import importlib
import sys

from absl import flags

from experiments.benchmark import harness
from lm.config import program

COMMANDS = ("train", "kernels", "generate")


def main() -> None:
    global __doc__
    name = next(iter(sys.argv[1:]), "--help")
    if name in ("--help", "-help", "-h", "--helpshort", "--helpfull"):
        print(__doc__, end="")
        return
    if name not in COMMANDS:
        print(f"error: no benchmark {name!r}; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    command = importlib.import_module(f"experiments.benchmark.{name}")
    harness.define_flags()
    command.define_flags()
    for module in (harness, command):
        flags.adopt_module_key_flags(module)  # so that --help lists them
    __doc__ = command.__doc__

    def run() -> None:
        if flags.FLAGS.worker:
            contenders = importlib.import_module(f"experiments.benchmark.{name}_contenders")
            harness.serve(contenders.contender(flags.FLAGS.worker))
        else:
            harness.check_output()
            command.main()

    del sys.argv[1]
    harness.COMMAND.append(name)
    program.run(run)


if __name__ == "__main__":
    main()
