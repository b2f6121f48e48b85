"""A command of this project: an absl program whose bad input is one line and exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from experiments.config import ConfigError


def run(main: Callable[..., None], *, positional: bool = False) -> NoReturn:
    """Run `main()`, or `main(arguments)` where arguments without a flag are taken, and exit.

    A ConfigError is its message on stderr and status 2; with `--verbosity=1` its traceback too.
    """

    def program(argv: Sequence[str]) -> None:
        logging.set_verbosity(max(flags.FLAGS.verbosity, logging.WARNING))
        try:
            if argv[1:] and not positional:
                raise ConfigError(f"unexpected argument {argv[1]!r}; flags are --name=value")
            main(*([list(argv[1:])] if positional else []))
        except ConfigError as error:
            if flags.FLAGS["verbosity"].present and flags.FLAGS.verbosity > 0:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except BrokenPipeError:  # whoever reads has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)

    app.run(program)
    raise AssertionError("app.run returned")
