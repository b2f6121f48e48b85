"""Whose workdir it is: a run goes on only with the configuration it began with."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from lm.config import codec
from lm.config.changes import Change, changes
from lm.config.codec import ConfigError


def check_path(workdir: pathlib.Path) -> None:
    """Raises ConfigError if `workdir` is an address and not a path."""
    if re.match(r"\w+:/", str(workdir)):
        raise ConfigError(
            f"workdir {workdir} is an address, and a run writes to a file system: mount the bucket "
            "(gcsfuse, s3fs) and give the path below it"
        )


def claim_workdir(config: Any, workdir: pathlib.Path) -> list[Change]:
    """Check that the run begun in `workdir`, if any, is that of `config`.

    Returns:
      What has changed in the configuration since, all of it in fields that may change.

    Raises:
      ConfigError: `workdir` is not a path, or the folder holds a run with another configuration;
        every difference is named.
    """
    check_path(workdir)
    path = workdir / "config.json"
    if not any((workdir / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        return []
    if not path.exists():
        raise ConfigError(
            f"{workdir} holds metrics or checkpoints but no config.json, so it is not known "
            "whose they are; give another --workdir"
        )
    found = changes(codec.load(path, type(config)), config)
    other = [change.text for change in found if change.allowed is None]
    if other:
        raise ConfigError(
            f"{workdir} holds another run: {'; '.join(other[:8])}. Give another --workdir, "
            "or the configuration it began with"
        )
    return found
