"""A command of this project: an absl program that reports invalid input in one line, status 2."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from lm.config import command_line as config_lib
from lm.config import fields
from lm.config.command_line import ConfigError, Configs

HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull"}


class Number(flags.ArgumentParser):
    """Reads a flag by an annotation, as keys of a configuration are read."""

    def __init__(self, annotation: Any) -> None:
        self.annotation, self.syntactic_help = annotation, fields.expected(annotation)

    def parse(self, argument: Any) -> Any:
        return fields.parse(argument, self.annotation) if isinstance(argument, str) else argument

    def flag_type(self) -> str:
        return fields.type_name(self.annotation)


class Options(flags.FlagValues):
    """A command's own flags, apart from absl's, so that one process can import several commands.

    Their values are attributes once `run` has parsed them.
    """

    def define(self, kind: str, name: str, default: Any, *arguments: Any, **more: Any) -> None:
        """Define a flag, as absl's `DEFINE_<kind>` does."""
        getattr(flags, f"DEFINE_{kind}")(name, default, *arguments, **more, flag_values=self)

    def number(self, annotation: Any, name: str, default: Any, note: str) -> None:
        """Define a flag that is read by an annotation."""
        flags.DEFINE(Number(annotation), name, default, note, flag_values=self)


def run(
    main: Callable[..., None],
    *,
    options: Options | None = None,
    positional: bool = False,
    configs: Configs | None = None,
    workdir: bool = False,
) -> NoReturn:
    """Run `main()` and exit; a ConfigError prints its message to stderr and exits with status 2.

    `--verbosity=1` adds the traceback and shows libraries' messages of level INFO.

    Args:
      main: called with the arguments that the other options ask for, in the order configuration,
        folder, list.
      options: the flags of the command, which `main` reads.
      positional: pass `main` the list of arguments that are not flags.
      configs: pass `main` the configuration chosen from these by `--config` and edited by its keys;
        `--help` lists both.
      workdir: pass `main` the folder of `--workdir`, which is then required.
    """
    if workdir:
        flags.DEFINE_string(
            "workdir", None, "Folder of the run; the same folder resumes it.",
            module_name=sys.argv[0],
        )  # fmt: skip
    if options is not None:
        for name in options:
            flags.FLAGS[name] = options[name]
            flags.FLAGS.register_flag_by_module(sys.argv[0], options[name])  # for `--help`
    chosen: list[Any] = []

    def program(argv: Sequence[str]) -> None:
        if options is not None:
            options.mark_as_parsed()
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # absl programs show every library's INFO
        with reported():
            if argv[1:] and not positional:
                raise ConfigError(f"unexpected argument {argv[1]!r}; flags are --name=value")
            if workdir and flags.FLAGS.workdir is None:
                raise ConfigError("no folder for the run; give one with --workdir=FOLDER")
            if workdir:
                chosen.append(pathlib.Path(flags.FLAGS.workdir).expanduser())
            main(*chosen, *([list(argv[1:])] if positional else []))

    def parse_flags(argv: list[str]) -> list[str]:
        with reported():
            if HELP & set(argv) and configs is not None:
                print(config_lib.help_text(argv, configs))
                sys.exit(0)
            if HELP & set(argv):
                return flags.FLAGS(argv)
            if configs is None:
                return parse_known(argv)
            positionals = parse_known(config_lib.rest_of(argv))  # an unknown flag is reported first
            chosen.append(config_lib.parse(argv, configs)[0])
            return positionals
        raise AssertionError("reported never swallows an error")

    app.run(program, flags_parser=parse_flags)
    raise AssertionError("app.run returned")


def parse_known(argv: Sequence[str], known_only: bool = False) -> list[str]:
    """The arguments of `argv` that are not flags. ConfigError: a flag is wrong or missing."""
    try:
        return flags.FLAGS(argv, known_only=known_only)
    except flags.Error as error:
        raise ConfigError(str(error)) from error


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Ends the program with a ConfigError's message, or quietly when its reader has gone."""
    try:
        yield
    except ConfigError as error:
        if flags.FLAGS.is_parsed() and flags.FLAGS.verbosity > 0:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
