"""Run an experiment with many configurations, and rank the results.

    python -m experiments.sweep --experiment=pretrain --config=quicktest --workdir=runs/sweep \
        --sweep='train.num_steps=100,200; optimizer.weight_decay=0,0.1'

`a=1,2; b=3,4` is every combination, `a=1,2 & b=3,4` pairs them, `a=1,2 | b=3,4` is one after the
other; `&` binds closer than `;`, which binds closer than `|`. A value with commas goes in
parentheses. `--config.key=value` edits what all runs share: with `--config.data.directory=FOLDER`
they read one dataset. Each run is a subprocess in a folder named after what it changes; the same
command skips finished runs and resumes others. The workdir receives `sweep.json`, the runs ranked
by held-out bits per byte (by training loss where one holds nothing out), and the folders, each with
`sweep.log`, what the run printed.

In Python, `lm.config.sweep` has the same as functions.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import json
import math
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from lm.config import codec, program
from lm.config import command_line as config_lib
from lm.config.command_line import ConfigError
from lm.config.fields import Count
from lm.config.program import Number
from lm.config.sweep import Edits, Sweep, named_runs, parse

# What runs are ranked by: the part of `summary.json` that has it, and its title.
MEASURES = {"bits_per_byte": ("held_out", "bits/byte"), "loss": ("train", "train loss")}


@dataclasses.dataclass
class Run:
    """One run: its name, folder, command, whole configuration, and how it ended."""

    name: str
    workdir: pathlib.Path
    command: list[str]
    config: Any
    edits: Edits
    result: dict[str, Any] = dataclasses.field(default_factory=dict)

    def finished(self) -> bool:
        """Whether the folder holds the end of a run with this very configuration."""
        saved = _read(self.workdir / "config.json")
        return bool(_read(self.workdir / "summary.json")) and not codec.difference(
            saved, self.config
        )

    def start(self) -> None:
        """Run to the end; `result` has the exit status and, of a failure, the last line."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        began, log = time.time(), self.workdir / "sweep.log"
        with log.open("wb") as out:
            status = subprocess.run(self.command, stdout=out, stderr=subprocess.STDOUT).returncode
        self.result = {"status": status, "seconds": round(time.time() - began, 1)}
        if status:
            lines = log.read_text(errors="replace").strip().splitlines()
            self.result["error"] = lines[-1] if lines else "no output"

    def scores(self) -> dict[str, float | None]:
        """What `MEASURES` names, as far as a run has finished and has it."""
        summary = _read(self.workdir / "summary.json") if self.finished() else {}
        return {name: (summary.get(group) or {}).get(name) for name, (group, _) in MEASURES.items()}


def _read(path: pathlib.Path) -> dict[str, Any]:
    """What a run wrote; {} of a file that is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def plan(
    experiment: str, base: Any, shared: Sequence[str], sweep: Sweep, workdir: pathlib.Path
) -> list[Run]:
    """The runs of a sweep; `shared` are the `--config` flags that all of them have."""
    return [
        Run(
            name,
            workdir / name,
            [sys.executable, "-m", f"experiments.{experiment}", *shared]
            + [f"--config.{key}={value}" for key, value in edits.items()]
            + [f"--workdir={workdir / name}"],
            config,
            edits,
        )
        for name, (config, edits) in named_runs(base, sweep).items()
    ]


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Start what is not finished, `jobs` at a time."""

    def one(run: Run) -> None:
        before = run.finished()
        if not before:
            run.start()
        end = "finished before" if before else run.result.get("error", "done")
        print(f"{run.name}: {end}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))


def rank(runs: Sequence[Run], workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Writes `sweep.json`: a row per run, the lowest score first, failures last."""
    rows = [{"name": run.name, "edits": run.edits, **run.scores(), **run.result} for run in runs]
    by = measure(rows)
    rows.sort(key=lambda row: (row[by] is None or math.isnan(row[by]), row[by] or 0.0))
    (workdir / "sweep.json").write_text(json.dumps({"runs": rows}, indent=2) + "\n")
    return rows


def measure(rows: Sequence[dict[str, Any]]) -> str:
    """The first of `MEASURES` that all finished runs have."""
    done = [row for row in rows if any(row[name] is not None for name in MEASURES)]
    shared = (name for name in MEASURES if all(row[name] is not None for row in done))
    return next(shared, "loss")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for the eye."""
    by = measure(rows)
    scores = ["failed" if (s := row[by]) is None else f"{s:.4f}" for row in rows]
    shown = zip([MEASURES[by][1], *scores], ["run", *(r["name"] for r in rows)], strict=True)
    return "\n".join(f"{score:>9}  {name}" for score, name in shown)


def main(argv: list[str]) -> int:
    """Exit status: 0 if every run finished, else 1."""
    settings = flags.FLAGS
    try:
        configs = importlib.import_module(f"experiments.configs.{settings.experiment}")
    except ModuleNotFoundError as error:
        raise ConfigError(f"--experiment={settings.experiment}: {error}") from None
    base, rest = config_lib.parse(argv, configs)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; flags are --name=value")
    with config_lib.input_errors():
        workdir = pathlib.Path(settings.workdir).expanduser()
        runs = plan(settings.experiment, base, argv, parse(settings.sweep), workdir)
    if settings.dry_run:
        print("\n".join(shlex.join(run.command) for run in runs))
        return 0
    execute(runs, settings.jobs)
    rows = rank(runs, workdir)
    print(table(rows))
    return int(any(row[measure(rows)] is None for row in rows))


def _program(argv: list[str]) -> None:
    with program.reported():
        sys.exit(main(argv[1:]))


def _parse(argv: list[str]) -> list[str]:
    with program.reported():
        return program.parse_known(argv, known_only=True)
    raise AssertionError("reported never swallows an error")


if __name__ == "__main__":
    flags.DEFINE_string("experiment", "pretrain", "Module of `experiments` to run.")
    flags.DEFINE_string("sweep", None, "What changes: 'a=1,2; b=3,4'.", required=True)
    flags.DEFINE_string("workdir", None, "Folder of all runs; the same one resumes.", required=True)
    flags.DEFINE(Number(Count), "jobs", 1, "Runs at a time.")
    flags.DEFINE_bool("dry_run", False, "Print the commands and run nothing.")
    app.run(_program, flags_parser=_parse)
