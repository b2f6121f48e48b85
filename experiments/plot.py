"""Compares runs in one self-contained HTML page: curves overlaid, final figures, what differed.

    python -m experiments.plot runs/a runs/b --output=compare.html
    python -m experiments.plot runs/* --metric=loss --metric=grad_norm --x=time --smooth=0.95

Each run is the workdir of `experiments.pretrain`; one still going may be compared too. Where a run
was resumed, rewound, or skipped a step, its curves are marked.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from experiments import figures
from experiments.figures import Line, Points, Rows
from lm.config import program
from lm.config.command_line import ConfigError
from lm.run import metrics as metrics_lib
from lm.run.goodput import duration

X_LABELS = {"step": "step", "tokens": "training tokens", "time": "{unit} of the run"}
FOCUS = 0.1  # of a run is steep: the y axis shows the lines after it
# Figures that are drawn where nothing else is asked for: metric -> title.
TITLES = {
    "loss": "training loss, nats per token",
    "held_out_bits_per_byte": "bits per byte",
    "held_out_loss": "nats per token",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds."""

    name: str
    rows: Rows
    config: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def metrics(self) -> list[str]:
        """Names of what was measured, in the order of their first rows."""
        rows = [row for row in self.rows if "event" not in row]
        return list(dict.fromkeys(k for row in rows for k in row if k != "step"))


def load(workdirs: Sequence[str | os.PathLike]) -> list[Run]:
    """The runs, named by what their paths do not share.

    Raises:
      FileNotFoundError: a folder that holds no run.
      ValueError: no workdir, one given twice, or a run that has logged nothing.
    """
    if not workdirs:
        raise ValueError("no runs to compare; give their workdirs, such as runs/a runs/b")
    paths = [pathlib.Path(workdir).expanduser().resolve() for workdir in workdirs]
    for workdir, path in zip(workdirs, paths, strict=True):
        if not (path / "metrics.jsonl").exists():
            raise FileNotFoundError(
                f"{workdir} has no metrics.jsonl, so it is not the folder of a run; give folders "
                "that experiments.pretrain was given as --workdir"
            )
        if paths.count(path) > 1:
            raise ValueError(f"{workdir} is given twice; give each run once")
    return [_load(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _load(path: pathlib.Path, name: str) -> Run:
    rows = metrics_lib.read(path / "metrics.jsonl")
    if all("event" in row for row in rows):
        raise ValueError(f"{path} has logged no step yet; leave it out, or wait for its first row")
    config, summary = (
        json.loads(file.read_text("utf-8")) if file.exists() else {}
        for file in (path / "config.json", path / "summary.json")
    )
    return Run(name, rows, config, summary)


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The paths without the folders that all share, at either end."""
    parts = [path.parts for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    start = min(_num_shared(parts), min(map(len, parts)) - 1)
    end = _num_shared([part[start:][::-1] for part in parts])
    end = min(end, min(map(len, parts)) - start - 1)
    return ["/".join(part[start : len(part) - end]) for part in parts]


def _num_shared(parts: Sequence[Sequence[str]]) -> int:
    """How many first items all have."""
    columns = itertools.takewhile(lambda items: len(set(items)) == 1, zip(*parts, strict=False))
    return sum(1 for _ in columns)


def abscissa(run: Run, x: str) -> Callable[[float], float]:
    """step -> the run's place on the x axis: steps, tokens or seconds; between rows, interpolated.

    Tokens are added up from the tokens of the steps logged, each standing for those since the row
    before. Seconds are wall time of the run's processes.

    Raises:
      ValueError: the run has not logged what the axis needs.
    """
    if x == "step":
        return lambda step: step
    key = {"tokens": "tokens", "time": "seconds"}[x]
    points = figures.series(run.rows, key)
    if not points:
        raise ValueError(f"{run.name} has logged no {key!r}, which --x={x} needs; use --x=step")
    steps = [0.0] + [step for step, _ in points]
    if x == "time":
        places = [0.0] + [seconds for _, seconds in points]
    else:
        passed = (b - a for a, b in itertools.pairwise(steps))
        taken = (n * tokens for n, (_, tokens) in zip(passed, points, strict=True))
        places = [0.0, *itertools.accumulate(taken)]
    return lambda step: float(figures.interpolate(step, steps, places))


def chosen(runs: Sequence[Run], asked: Sequence[str]) -> dict[str, str]:
    """Metric -> title of each figure: those asked for, else the usual ones that runs share.

    Raises:
      ValueError: a metric that no run has, or runs without anything in common.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    for name in asked:
        if name not in known:
            raise ValueError(f"no run has logged {name!r}; there is {', '.join(known)}")
    if asked:
        return {name: figures.words(name) for name in asked}
    shared = [name for name in known if all(name in run.metrics for run in runs)]
    if not shared:
        lists = "; ".join(f"{run.name} has {', '.join(run.metrics)}" for run in runs)
        raise ValueError(f"the runs have no metric in common: {lists}; choose with --metric=NAME")
    found = {}
    for name, title in TITLES.items():
        if name == "held_out_loss" and any(key.startswith("held_out_bits") for key in known):
            continue
        sets = figures.held_out_sets([dict.fromkeys(known)], name)
        if name.startswith("held_out"):
            found |= {key: f"{label}, {title}" for label, key in sets.items()}
        elif name in known:
            found[name] = title
    return found or {name: figures.words(name) for name in shared[:4]}


def draw(
    runs: Sequence[Run], metric: str, title: str, x: str, weight: float, size: Any, first: bool
) -> Any:
    """A figure: one line a run, smoothed over the faint line of what was logged."""
    scale, unit = _time_unit(runs) if x == "time" else (1, "")
    lines = []
    for color, run in enumerate(runs):
        points = figures.series(run.rows, metric)
        if not points:
            continue
        place = _scaled(abscissa(run, x), scale)
        placed: Points = [(place(step), value) for step, value in points]
        marks = [(place(step), event) for step, event in figures.events(run.rows, metric)]
        if metric.removeprefix("ema_").startswith("held_out"):
            finite = [(at, y) for at, y in placed if math.isfinite(y)]
            lines.append(Line(run.name, finite, color, dotted=True))
        elif metric == "learning_rate" or not weight or len(placed) < 20:
            lines.append(Line(run.name, placed, color, marks=marks))
        else:
            smoothed = figures.smooth(placed, weight)
            lines.append(Line(run.name, smoothed, color, raw=placed, marks=marks))
    name = "".join(c if c.isalnum() else "-" for c in metric)
    zero = metric in ("tokens_per_second", "learning_rate")
    return figures.plot(
        name,
        title,
        lines,
        x_label=X_LABELS[x].format(unit=unit),
        size=size,
        from_zero=zero,
        focus=FOCUS,
        marks=first,
    )


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    """Seconds and name of the unit in which the longest run is read best."""
    longest = max((s for run in runs for _, s in figures.series(run.rows, "seconds")), default=0)
    units = ((1, "seconds"), (60, "minutes"), (3600, "hours"), (86400, "days"))
    return max((unit for unit in units if longest >= 2 * unit[0]), default=units[0])


def _scaled(place: Callable[[float], float], scale: float) -> Callable[[float], float]:
    return lambda step: place(step) / scale


def final_figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A line a figure: title, a cell a run, and which cells are the best (of two or more)."""
    lines: list[tuple[str, list[Any], Callable[[Any], str], Callable[..., Any] | None]] = []

    def line(title: str, value: Callable[[Run], Any], form: Any, best: Any = None) -> None:
        values = [value(run) for run in runs]
        if any(v is not None for v in values):
            lines.append((title, values, form, best))

    line("steps", _last_step, "{:,}".format)
    line("tokens", _tokens, figures.short)
    line("training loss", lambda run: _mean(run, "loss"), "{:.4f}".format, min)
    sets = figures.held_out_sets([dict.fromkeys(k for r in runs for k in r.metrics)],
                                 "held_out_bits_per_byte")  # fmt: skip
    for label, key in sets.items():
        last = lambda run, key=key: _last(run, key)  # noqa: E731
        line(f"{label}, bits per byte", last, "{:.4f}".format, min)
    line("tokens/s", lambda run: _median(run, "tokens_per_second"), figures.short, max)
    line("MFU", lambda run: _median(run, "mfu"), "{:.1%}".format, max)
    line("goodput", lambda run: (figures.goodput(run.rows) or {}).get("share"),
           "{:.1%}".format, max)  # fmt: skip
    line("time", _seconds, duration)
    for event in figures.MARKS:
        line(figures.words(event), lambda run, event=event: _count(run, event), "{:,}".format)
    return [
        {"title": title, "cells": _cells(values, form, best)} for title, values, form, best in lines
    ]


def _cells(values: Sequence[Any], form: Any, best: Any) -> list[dict[str, Any]]:
    known = [v for v in values if v is not None and math.isfinite(v)]
    top = best(known) if best and len(set(known)) > 1 else None
    cells = []
    for v in values:
        text = "–" if v is None else form(v) if math.isfinite(v) else "not finite"
        cells.append({"text": text, "best": v is not None and v == top})
    return cells


def _last_step(run: Run) -> int:
    return max(row["step"] for row in run.rows if "event" not in row)


def _tokens(run: Run) -> float | None:
    return abscissa(run, "tokens")(_last_step(run)) if "tokens" in run.metrics else None


def _seconds(run: Run) -> float | None:
    account = figures.goodput(run.rows)
    return None if account is None else sum(account["seconds"].values())


def _mean(run: Run, metric: str) -> float | None:
    """Of the last ten rows."""
    values = [v for _, v in figures.series(run.rows, metric) if math.isfinite(v)][-10:]
    return statistics.fmean(values) if values else None


def _last(run: Run, metric: str) -> float | None:
    points = figures.series(run.rows, metric)
    return points[-1][1] if points else None


def _median(run: Run, metric: str) -> float | None:
    values = [v for _, v in figures.series(run.rows, metric) if math.isfinite(v)]
    return statistics.median(values) if values else None


def _count(run: Run, event: str) -> int | None:
    """How often it happened, thrown away later or not; None for never."""
    return sum(row.get("event") == event for row in run.rows) or None


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of the settings that are not the same in all."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    table = [(key, [settings.get(key, "–") for settings in flat]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _flatten(config: Any, path: str = "") -> dict[str, str]:
    """ "model.stacks.0.num_repeats" -> "4"."""
    if isinstance(config, Mapping):
        items = list(config.items())
    elif isinstance(config, list) and any(isinstance(item, Mapping) for item in config):
        items = list(enumerate(config))
    else:
        return {path: json.dumps(config) if not isinstance(config, str) else config}
    found = {}
    for key, value in items:
        found |= _flatten(value, f"{path}.{key}" if path else str(key))
    return found


def write(
    output: str | os.PathLike,
    runs: Sequence[Run],
    *,
    metrics: Sequence[str] = (),
    smooth: float = 0.8,
    x: str = "step",
) -> pathlib.Path:
    """Writes the page and returns its path.

    Args:
      output: the HTML file to write.
      runs: from `load`.
      metrics: names of what to draw; none for the usual ones.
      smooth: see `figures.smooth`.
      x: "step", "tokens" or "time".

    Raises:
      ValueError: see `chosen`, `abscissa` and `figures.smooth`.
      ModuleNotFoundError: matplotlib, of the `report` extra, is missing.
    """
    names = chosen(runs, metrics)
    drawn = []
    for i, (metric, title) in enumerate(names.items()):
        wide = i == 0 or (i == len(names) - 1 and i % 2 == 1)
        size = (9.0, 4.2 if i == 0 else 2.3) if wide else (4.4, 2.6)
        svg = draw(runs, metric, title, x, smooth, size, i == 0)
        drawn.append({"svg": svg, "place": 0 if i == 0 else 2 if wide else 1})
    html = figures.page(
        "plot.html.jinja",
        title="Comparison of runs" if len(runs) > 1 else runs[0].name,
        runs=[_described(i, run) for i, run in enumerate(runs)],
        drawn=drawn,
        smooth=smooth,
        final=final_figures(runs),
        differences=differences(runs),
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(html, "utf-8", errors="replace")
    return output


def _described(index: int, run: Run) -> dict[str, Any]:
    """A run's entry in the key of colours."""
    environment, model = run.summary.get("environment") or {}, run.summary.get("model") or {}
    facts = []
    if (parameters := model.get("num_parameters")) is not None:
        facts.append(f"{figures.short(parameters)} parameters")
    facts += [environment[key] for key in ("device", "date") if key in environment]
    if not run.summary:
        facts.append("not finished")
    return {
        "name": run.name,
        "color": index % figures.NUM_COLORS,
        "dashed": index >= figures.NUM_COLORS,
        "facts": " · ".join(facts),
    }


def main(workdirs: Sequence[str]) -> None:
    values = flags.FLAGS
    try:
        runs = load(workdirs)
        print(write(values.output, runs, metrics=values.metric, smooth=values.smooth, x=values.x))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    flags.DEFINE_string("output", "compare.html", "The page to write.")
    flags.DEFINE_multi_string(
        "metric", [], "What to draw; may be repeated. The usual if not given."
    )
    flags.DEFINE_float("smooth", 0.8, "Weight of a neighbour in the smoothed line; 0 for none.")
    flags.DEFINE_enum("x", "step", list(X_LABELS), "The x axis.")
    program.run(main, positional=True)
