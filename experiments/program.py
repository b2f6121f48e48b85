"""A command of this project: an absl program whose bad input is one line and exit status 2."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from experiments import config as config_lib
from experiments.config import ConfigError


def run(
    main: Callable[..., None],
    *,
    positional: bool = False,
    configs: Mapping[str, Callable[..., Any]] | None = None,
) -> NoReturn:
    """Run `main()` and exit; a ConfigError is its message on stderr and status 2.

    With `--verbosity=1` it is its traceback too.

    Args:
      main: called without arguments, or with those that the next two ask for.
      positional: `main` takes the list of arguments that are no flags.
      configs: `main` takes the configuration that `--config` and its keys choose of these.
    """
    chosen: list[Any] = []
    default = next(iter(configs)) if configs else None

    def program(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # absl's programs say INFO of every library
        with reported():
            if argv[1:] and not positional:
                raise ConfigError(f"unexpected argument {argv[1]!r}; flags are --name=value")
            main(*chosen, *([list(argv[1:])] if positional else []))

    def parse_flags(argv: list[str]) -> list[str]:
        if {"--help", "--helpshort", "--helpfull"} & set(argv):
            return flags.FLAGS(argv)
        with reported():
            if configs is None:
                return parse_known(argv)
            _, rest = config_lib.parse(argv, configs, default)
            positionals = parse_known(rest)  # first, so that an unknown flag is what is told
            chosen.append(config_lib.parse(argv, configs)[0])
            return positionals
        raise AssertionError("reported never swallows an error")

    app.run(program, flags_parser=parse_flags)
    raise AssertionError("app.run returned")


def parse_known(argv: Sequence[str], known_only: bool = False) -> list[str]:
    """What of `argv` is no flag. Raises ConfigError for a flag that is wrong or missing."""
    try:
        return flags.FLAGS(argv, known_only=known_only)
    except flags.Error as error:
        raise ConfigError(str(error)) from error


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Ends the program with a ConfigError's message, and quietly where its reader has gone."""
    try:
        yield
    except ConfigError as error:
        if (
            flags.FLAGS.is_parsed()
            and flags.FLAGS["verbosity"].present
            and flags.FLAGS.verbosity > 0
        ):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
