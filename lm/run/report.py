"""One self-contained HTML page about a run, or several side by side: no scripts, no requests.

`metrics.jsonl` rows (see lm.run.metrics) may hold `loss`, `held_out_loss` and, for each of
several validation sets, `held_out_loss/<set>`; `tokens_per_second`, `mfu`, `learning_rate` and
`grad_norm`. Events are listed; resumed, rewound, skipped and save_failed are marked in the figures;
the last "goodput" event is where the time went. `summary.json` is what the trainer knows at its
end; every key may be missing:

    {
      "title": "Pretraining: quicktest",
      "held_out": {"bits_per_byte": 2.1, "ngram_bits_per_byte": 2.6,
                   "loss": 4.9, "num_bytes": 500_000,       # loss in nats per token
                   "figures": [{"set": "wiki", "weights": "average", "bits_per_byte": 2.0}, ...]},
      "model": {"num_parameters": 3_500_000, ...},          # further keys are listed
      "samples": [{"prompt": "def main(", "text": "argv):\\n"}],
      "corpus": {"documents": 1200, ...},
      "environment": {"device": "TPU v5e x 8", "jax": "0.10.2", "date": "...", "command": "..."},
      "files": [{"path": "tokenizer.model", "what": "...", "num_bytes": 64_000}]
    }
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np

from lm.config.codec import flatten
from lm.run import figures
from lm.run import metrics as metrics_lib
from lm.run.figures import Line, Points, quantity, short, words
from lm.run.goodput import KINDS, duration

Rows = Sequence[Mapping[str, Any]]

X_LABELS = {"step": "step", "tokens": "training tokens", "time": "{unit} of the run"}
FOCUS = 0.1  # the beginning of a run is steep: the y axis is scaled to the lines after it
# Metrics drawn by default: name -> title.
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
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def metrics(self) -> list[str]:
        """Names of what was measured, in the order of their first rows."""
        rows = [row for row in self.rows if "event" not in row]
        return list(dict.fromkeys(k for row in rows for k in row if k != "step"))

    @functools.cached_property
    def goodput(self) -> Mapping[str, Any]:
        """The last "goodput" event, the account over all of the run's processes; {} without."""
        return next((row for row in reversed(self.rows) if row.get("event") == "goodput"), {})

    @property
    def last_step(self) -> int | None:
        return max((row["step"] for row in self.rows if "event" not in row), default=None)

    @property
    def num_tokens(self) -> float | None:
        """Trained on so far; None where tokens are not logged."""
        return abscissa(self, "tokens")(self.last_step or 0) if "tokens" in self.metrics else None

    def series(self, name: str) -> Points:
        """(step, value) by step; where a step was logged twice, the later row counts."""
        rows = (row for row in self.rows if "event" not in row and name in row)
        return sorted({row["step"]: row[name] for row in rows}.items())

    def count(self, event: str) -> int:
        """How often it happened."""
        return sum(row.get("event") == event for row in self.rows)

    def finite(self, name: str) -> Points:
        """The finite values of `series`."""
        return [(step, value) for step, value in self.series(name) if math.isfinite(value)]

    def marks(self, metric: str) -> list[tuple[int, str]]:
        """(step, event) to mark on a curve: events whose steps have not been thrown away.

        Skipped steps are marked where they show, in loss and gradient norm.
        """
        hidden = set() if metric in ("loss", "grad_norm") else {"skipped", "save_failed"}
        shown = figures.MARKS.keys() - hidden
        rows = [row for row in self.rows if row.get("event") in shown and not row.get("undone")]
        return sorted({(row["step"], row["event"]) for row in rows})


def load(workdirs: Sequence[str | os.PathLike]) -> list[Run]:
    """The runs, named by what their paths do not share.

    Raises:
      FileNotFoundError: a folder without a run.
      ValueError: no workdir, one given twice, or, of several runs, one that has logged nothing.
    """
    if not workdirs:
        raise ValueError("no runs to compare; give their workdirs, such as runs/a runs/b")
    paths = [pathlib.Path(workdir).expanduser().resolve() for workdir in workdirs]
    runs = []
    for workdir, path, name in zip(workdirs, paths, run_names(paths), strict=True):
        if not (path / "metrics.jsonl").exists():
            raise FileNotFoundError(
                f"{workdir} has no metrics.jsonl, so it is not the folder of a run; give one that "
                "experiments.pretrain was given as --workdir"
            )
        if paths.count(path) > 1:
            raise ValueError(f"{workdir} is given twice; give each run once")
        config, summary = (
            json.loads(file.read_text("utf-8")) if file.exists() else {}
            for file in (path / "config.json", path / "summary.json")
        )
        run = Run(name, metrics_lib.read(path / "metrics.jsonl"), config, summary)
        if run.last_step is None and len(paths) > 1:
            raise ValueError(f"{path} has logged no step yet; leave it out, or wait for its first")
        runs.append(run)
    return runs


def run_names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The paths without the folders that all share, at either end."""
    names = [list(path.parts) for path in paths]
    for end in (0, -1):
        while min(map(len, names)) > 1 and len({name[end] for name in names}) == 1:
            for name in names:
                del name[end]
    return ["/".join(name) for name in names]


def write_from_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir/report.html` from the run's files; an unfinished run has no summary yet."""
    return write(pathlib.Path(workdir) / "report.html", load([workdir]))


def write(
    path: str | os.PathLike,
    runs: Sequence[Run],
    *,
    metrics: Sequence[str] = (),
    smooth: float | None = None,
    x: str = "step",
) -> pathlib.Path:
    """Writes the page and returns its path.

    Args:
      path: the HTML file to write.
      runs: from `load`.
      metrics: names of what to draw; none for the usual ones.
      smooth: see `figures.smooth`; None for a weight that suits the number of rows.
      x: "step", "tokens" or "time".

    Raises:
      ValueError: see `chosen`, `abscissa` and `figures.smooth`.
      ModuleNotFoundError: matplotlib, of the `report` extra, is missing.
    """
    names = chosen(runs, metrics)
    drawn = []
    for i, (metric, title) in enumerate(names.items()):
        wide = i == 0 or (i == len(names) - 1 and i % 2 == 1)
        size = (9.0, 4.0 if i == 0 else 2.3) if wide else (4.4, 2.5)
        svg = draw(runs, metric, title, x, smooth, size, i == 0)
        drawn.append({"svg": svg, "place": 0 if i == 0 else 2 if wide else 1})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"quantity": quantity, "words": words, "size": figures.size_of}
    environment.tests["table"] = lambda value: isinstance(value, Mapping)
    html = environment.get_template("report.html.jinja").render(
        title="Comparison of runs" if len(runs) > 1 else runs[0].summary.get("title", runs[0].name),
        runs=[described(i, run) for i, run in enumerate(runs)],
        drawn=drawn,
        smooth=smooth,
        final=final_figures(runs),
        differences=differences(runs),
        run=details(runs[0]) if len(runs) == 1 else None,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, "utf-8", errors="replace")  # a sample may hold half a character
    return path


def held_out_sets(names: Iterable[str], measure: str) -> dict[str, str]:
    """Title -> key of the held-out metric `measure`, of each validation set and its EMA.

    "held_out_loss" is "held-out", "held_out_loss/wiki" is "held-out: wiki", and with averaged
    weights "ema_held_out_loss" is "held-out, EMA".
    """
    found = {}
    for key in names:
        base, slash, held_out = key.partition("/")
        if base.removeprefix("ema_") == measure:
            averaged = ", EMA" if base.startswith("ema_") else ""
            found["held-out" + f": {held_out}" * bool(slash) + averaged] = key
    return found


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
    points = run.series(key)
    if not points:
        raise ValueError(f"{run.name} has logged no {key!r}, which --x={x} needs; use --x=step")
    steps = [0.0] + [step for step, _ in points]
    if x == "time":
        places = [0.0] + [seconds for _, seconds in points]
    else:
        passed = (b - a for a, b in itertools.pairwise(steps))
        taken = (n * tokens for n, (_, tokens) in zip(passed, points, strict=True))
        places = [0.0, *itertools.accumulate(taken)]
    return lambda step: float(np.interp(step, steps, places))


def chosen(runs: Sequence[Run], asked: Sequence[str]) -> dict[str, str]:
    """Metric -> title of each figure: those asked for, else the usual ones that the runs share.

    The held-out losses of a single run are drawn beside its training loss.

    Raises:
      ValueError: a metric that no run has, or runs without anything in common.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    for name in asked:
        if name not in known:
            raise ValueError(f"no run has logged {name!r}; there is {', '.join(known)}")
    if asked:
        return {name: words(name) for name in asked}
    if len(runs) == 1:
        usual = {k: v for k, v in TITLES.items() if not k.startswith("held_out")}
        return {name: title for name, title in usual.items() if runs[0].finite(name)}
    shared = [name for name in known if all(name in run.metrics for run in runs)]
    if not shared:
        lists = "; ".join(f"{run.name} has {', '.join(run.metrics)}" for run in runs)
        raise ValueError(f"the runs have no metric in common: {lists}; choose with --metric=NAME")
    found = {}
    for name, title in TITLES.items():
        if name == "held_out_loss" and any(key.startswith("held_out_bits") for key in known):
            continue
        if name.startswith("held_out"):
            sets = held_out_sets(known, name)
            found |= {key: f"{label}, {title}" for label, key in sets.items()}
        elif name in known:
            found[name] = title
    return found or {name: words(name) for name in shared[:4]}


def draw(
    runs: Sequence[Run], metric: str, title: str, x: str, weight: float | None, size: Any,
    first: bool,
) -> markupsafe.Markup:  # fmt: skip
    """A figure: one line per run, smoothed over the faint line of what was logged."""
    longest = max((s for run in runs for _, s in run.series("seconds")), default=0)
    units = ((1, "seconds"), (60, "minutes"), (3600, "hours"), (86400, "days"))
    scale, unit = max((unit for unit in units if longest >= 2 * unit[0]), default=units[0])
    scale = scale if x == "time" else 1
    lines, single = [], len(runs) == 1
    for color, run in enumerate(runs):
        place = abscissa(run, x)
        names = {"training" if single else run.name: metric}
        names |= held_out_sets(run.metrics, "held_out_loss") if single and metric == "loss" else {}
        for i, (name, key) in enumerate(names.items()):
            points = [(place(step) / scale, value) for step, value in run.series(key)]
            marks = [(place(step) / scale, event) for step, event in run.marks(key)]
            if points:
                lines.append(curve(name, key, points, color + i, marks, weight))
    return figures.plot(
        "".join(c if c.isalnum() else "-" for c in metric),
        title,
        lines,
        x_label=X_LABELS[x].format(unit=unit),
        size=size,
        from_zero=metric in ("tokens_per_second", "learning_rate"),
        focus=0.0 if single else FOCUS,
        legend=single and first,
        marks=first,
    )


def curve(
    name: str, metric: str, points: Points, color: int, marks: Sequence[tuple[float, str]],
    weight: float | None,
) -> Line:  # fmt: skip
    """As logged where that is exact or short, else smoothed over what was logged."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if metric.removeprefix("ema_").startswith("held_out"):
        return Line(name, finite, color, dotted=True)
    if weight is None:
        weight = 1 - 1 / (1 + len(points) / 64) if len(points) >= 50 else 0.0
    if metric == "learning_rate" or not weight or len(points) < 20:
        return Line(name, points, color, marks=marks)
    return Line(f"{name}, smoothed", figures.smooth(points, weight), color, raw=points, marks=marks)


def final_figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of the final figures: title, a cell per run, and which cells are the best of several."""
    bits = held_out_sets((k for run in runs for k in run.metrics), "held_out_bits_per_byte")
    table: list[tuple[str, Callable[[Run], Any], Callable[[Any], str], Any]] = [
        ("parameters", lambda r: (r.summary.get("model") or {}).get("num_parameters"), short, None),
        ("steps", lambda run: run.last_step, "{:,}".format, None),
        ("tokens", lambda run: run.num_tokens, short, None),
        ("training loss", lambda run: _of(statistics.fmean, run.finite("loss")[-10:]),
         "{:.4f}".format, min),
        *((f"{label}, bits per byte", lambda run, key=key: _of(max, run.series(key)[-1:]),
           "{:.4f}".format, min) for label, key in bits.items()),
        ("tokens/s", lambda run: _of(statistics.median, run.finite("tokens_per_second")), short,
         max),
        ("MFU", lambda run: _of(statistics.median, run.finite("mfu")), "{:.1%}".format, max),
        ("goodput", lambda run: run.goodput.get("share"), "{:.1%}".format, max),
        ("time", lambda run: sum(run.goodput.get("seconds", {}).values()) or None, duration, None),
        *((words(event), lambda run, event=event: run.count(event) or None, "{:,}".format, None)
          for event in figures.MARKS),
    ]  # fmt: skip
    rows = []
    for title, value, form, best in table:
        values = [value(run) for run in runs]
        known = [v for v in values if v is not None and math.isfinite(v)]
        top = best(known) if best and len(set(known)) > 1 else None
        texts = [
            "–" if v is None else form(v) if math.isfinite(v) else "not finite" for v in values
        ]
        if texts != ["–"] * len(runs):
            best_of = [v is not None and v == top for v in values]
            cells = [{"text": t, "best": b} for t, b in zip(texts, best_of, strict=True)]
            rows.append({"title": title, "cells": cells})
    return rows


def _of(reduce: Callable[[list[float]], Any], points: Points) -> float | None:
    """A figure of the values; None without any."""
    return reduce([value for _, value in points]) if points else None


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of the settings that are not the same in all."""
    flat = [
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in each.items()}
        for each in (flatten(run.config) for run in runs)
    ]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    table = [(key, [settings.get(key, "–") for settings in flat]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def described(index: int, run: Run) -> dict[str, Any]:
    """A run's entry in the key of colours."""
    environment, model = run.summary.get("environment") or {}, run.summary.get("model") or {}
    parameters = model.get("num_parameters")
    facts = [] if parameters is None else [f"{short(parameters)} parameters"]
    facts += [environment[key] for key in ("device", "date") if key in environment]
    facts += [] if run.summary else ["not finished"]
    color, dashed = index % figures.NUM_COLORS, index >= figures.NUM_COLORS
    return {"name": run.name, "color": color, "dashed": dashed, "facts": " · ".join(facts)}


def details(run: Run) -> dict[str, Any]:
    """What the page of a single run also shows."""
    parts = ("samples", "corpus", "model", "environment", "files")
    held_out = run.summary.get("held_out") or {}
    return {part: run.summary.get(part) or {} for part in parts} | {
        "notices": notices(run),
        "headline": headline(held_out),
        "held_out_figures": held_out.get("figures") or [],
        "goodput": goodput_bars(run),
        "events": listed_events(run),
        "config": run.config,
    }


def notices(run: Run) -> list[str]:
    found, losses = [], run.series("loss")
    if bad := [step for step, loss in losses if not math.isfinite(loss)]:
        count = f"{len(bad)} of {len(losses)} logged losses {'is' if len(bad) == 1 else 'are'}"
        found.append(f"{count} not finite, the first at step {bad[0]:,}.")
    if not run.summary:
        found.append("The run has not finished: it has written no summary yet.")
    return found


def headline(held_out: Mapping[str, Any]) -> dict[str, Any] | None:
    """Held-out bits per byte, and the bars it is compared with."""
    bits = held_out.get("bits_per_byte")
    if bits is None:
        return None
    ngram = held_out.get("ngram_bits_per_byte")
    named = {"this model": bits, "order-3 byte n-gram": ngram, "uncompressed": 8.0}
    finite = math.isfinite(bits)
    return {
        "bits": f"{bits:.3f}" if finite else "not finite",
        "bars": [
            {"name": name, "text": quantity(value), "ours": name == "this model",
             "percent": min(100.0, value / 8 * 100) if math.isfinite(value) else 0.0}
            for name, value in named.items()
            if value is not None
        ],
        "fewer_than_ngram": (1 - bits / ngram) * 100 if ngram and finite else None,
        "num_bytes": held_out.get("num_bytes"),
        "loss": held_out.get("loss"),
    }  # fmt: skip


def goodput_bars(run: Run) -> dict[str, Any] | None:
    """Headline and bars: where the wall time of all the run's processes went."""
    if not run.goodput:
        return None
    spent = run.goodput["seconds"]
    total, starts = max(sum(spent.values()), 1e-9), run.goodput.get("num_starts", 1)
    return {
        "share": f"{run.goodput['share']:.1%}",
        "total": duration(total),
        "starts": "once" if starts == 1 else f"{starts} times",
        "bars": [
            {"name": words(kind), "what": KINDS.get(kind, ""), "text": duration(seconds),
             "percent": 100 * seconds / total, "ours": kind == "step"}
            for kind, seconds in sorted(spent.items(), key=lambda item: -item[1])
            if seconds >= 0.0005 * total
        ],
    }  # fmt: skip


def listed_events(run: Run) -> list[dict[str, Any]]:
    """Events in their order; steps skipped one after another are one line."""
    listed: list[dict[str, Any]] = []
    for row in run.rows:
        if "event" not in row or row["event"] == "goodput":
            continue
        name, undone = words(row["event"]), bool(row.get("undone"))
        last = listed[-1] if listed else {}
        if name == "skipped" and last.get("what") == name and last["undone"] == undone:
            last["count"] += 1
            last["details"] = f"{last['count']} steps, the last {row['step']:,}"
            continue
        rest = {k: v for k, v in row.items() if k not in ("event", "step", "undone")}
        text = ", ".join(f"{words(k)} {quantity(v)}" for k, v in rest.items())
        listed.append(
            {"step": row["step"], "what": name, "details": text, "undone": undone, "count": 1}
        )
    return listed
