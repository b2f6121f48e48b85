"""One self-contained HTML page about a training run: no scripts, no requests, light and dark.

    python -m experiments.report --workdir=W  # W/report.html from W/{config,metrics,summary} files

`metrics.jsonl` rows (see lm.run.metrics) may hold `loss`, `held_out_loss` and, for each of
several validation sets, `held_out_loss/<set>`; `tokens_per_second`, `mfu`, `learning_rate` and
`grad_norm`. Events are listed; resumed, rewound, skipped and save_failed are marked in the figures;
the last "goodput" event is where the time went. `summary.json` is what the trainer knows at its
end; every key may be missing:

    {
      "title": "Pretraining: quicktest",
      "held_out": {"bits_per_byte": 2.1, "ngram_bits_per_byte": 2.6, "lzma_bits_per_byte": 2.4,
                   "loss": 4.9, "num_bytes": 500_000,       # loss in nats per token
                   "figures": [{"set": "wiki", "weights": "average", "bits_per_byte": 2.0}, ...]},
      "model": {"num_parameters": 3_500_000, ...},          # further keys are listed
      "train": {"num_steps": 300, "num_tokens": 4_000_000, "seconds": 95.0},
      "samples": [{"prompt": "def main(", "text": "argv):\\n"}],
      "corpus": {"documents": 1200, ..., "sources": [{"name": "stdlib", "documents": 900}, ...]},
      "environment": {"device": "TPU v5e x 8", "jax": "0.10.2", "date": "...", "command": "..."},
      "files": ["checkpoints/300", {"path": "tokenizer.model", "what": "...", "num_bytes": 64_000}]
    }

Figures need matplotlib: `pip install 'lm-lifecycle[report]'`.
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
from absl import flags

from experiments import figures
from experiments.figures import Line, Points, Rows
from lm.config import codec, program
from lm.config.command_line import ConfigError
from lm.run import metrics as metrics_lib
from lm.run.goodput import KINDS, duration


def write(
    path: str | os.PathLike,
    *,
    metrics: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    config: Any = None,
) -> pathlib.Path:
    """Writes the page and returns its path.

    Args:
      path: the HTML file to write.
      metrics: rows as `lm.run.metrics.read` gives them, in any order.
      summary: see this module's docstring.
      config: the run's configuration, a dataclass or the content of its `config.json`.

    Raises:
      ModuleNotFoundError: matplotlib, of the `report` extra, is missing.
    """
    if dataclasses.is_dataclass(config):
        config = codec.to_dict(config)
    html = figures.page(
        "report.html.jinja",
        title=summary.get("title", "Training run"),
        held_out=_held_out(summary.get("held_out") or {}),
        tiles=_tiles(metrics, summary),
        figures=_figures(metrics),
        held_out_figures=(summary.get("held_out") or {}).get("figures") or [],
        goodput=_goodput(metrics),
        events=_events(metrics),
        notices=_notices(metrics, summary),
        samples=summary.get("samples") or [],
        corpus={k: v for k, v in (summary.get("corpus") or {}).items() if k != "sources"},
        sources=(summary.get("corpus") or {}).get("sources") or [],
        model=summary.get("model") or {},
        environment=summary.get("environment") or {},
        files=[f if isinstance(f, Mapping) else {"path": f} for f in summary.get("files") or []],
        config=config or {},
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, "utf-8", errors="replace")  # a sample may hold half a character
    return path


def write_from_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir/report.html` from the run's files; a run still going has no summary yet."""
    workdir = pathlib.Path(workdir)
    if not (workdir / "metrics.jsonl").exists():
        raise FileNotFoundError(
            f"{workdir} has no metrics.jsonl, so it is not the folder of a run; give one that "
            "experiments.pretrain was given as --workdir"
        )
    config, summary = (
        json.loads(file.read_text("utf-8")) if file.exists() else {}
        for file in (workdir / "config.json", workdir / "summary.json")
    )
    rows = metrics_lib.read(workdir / "metrics.jsonl")
    return write(workdir / "report.html", metrics=rows, summary=summary, config=config)


def _held_out(held_out: Mapping[str, Any]) -> dict[str, Any] | None:
    """The headline number and the bars it is compared with."""
    bits = held_out.get("bits_per_byte")
    if bits is None:
        return None
    bars = [{"name": "this model", "bits": bits, "ours": True}]
    for key, name in (
        ("ngram_bits_per_byte", "order-3 byte n-gram"),
        ("lzma_bits_per_byte", "lzma (xz)"),
    ):
        if held_out.get(key) is not None:
            bars.append({"name": name, "bits": held_out[key], "ours": False})
    bars.append({"name": "uncompressed", "bits": 8.0, "ours": False})
    for bar in bars:
        bar["percent"] = min(100.0, bar["bits"] / 8 * 100) if math.isfinite(bar["bits"]) else 0.0
    ngram = held_out.get("ngram_bits_per_byte")
    return {
        "bits": f"{bits:.3f}" if math.isfinite(bits) else "not finite",
        "bars": bars,
        "fewer_than_ngram": (1 - bits / ngram) * 100 if ngram and math.isfinite(bits) else None,
        "num_bytes": held_out.get("num_bytes"),
        "loss": held_out.get("loss"),
    }


def _tiles(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[tuple]:
    """Small numbers under the headline: (value, label)."""
    tiles = []
    if (parameters := (summary.get("model") or {}).get("num_parameters")) is not None:
        tiles.append((figures.short(parameters), "parameters"))
    train = summary.get("train") or {}
    if train.get("num_steps") is not None:
        tiles.append((f"{train['num_steps']:,}", "training steps"))
    if train.get("num_tokens") is not None:
        tiles.append((figures.short(train["num_tokens"]), "training tokens"))
    if losses := [v for _, v in figures.series(metrics, "loss") if math.isfinite(v)]:
        tiles.append((f"{statistics.fmean(losses[-10:]):.3f}", "training loss, nats per token"))
    for key, form, label in (
        ("tokens_per_second", figures.short, "tokens per second"),
        ("mfu", "{:.1%}".format, "MFU, model FLOPs of the peak"),
    ):
        if values := [v for _, v in figures.series(metrics, key) if math.isfinite(v)]:
            tiles.append((form(statistics.median(values)), label))
    if account := figures.goodput(metrics):
        tiles.append((f"{account['share']:.1%}", "goodput, time in steps that count"))
    if train.get("seconds") is not None:
        minutes, seconds = divmod(round(train["seconds"]), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
        tiles.append((clock, "training time"))
    return tiles


def _notices(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    notices = []
    losses = figures.series(metrics, "loss")
    if bad := [step for step, loss in losses if not math.isfinite(loss)]:
        count = f"{len(bad)} of {len(losses)} logged losses {'is' if len(bad) == 1 else 'are'}"
        notices.append(f"{count} not finite, the first at step {bad[0]:,}.")
    if not summary:
        notices.append("The run has not finished: it has written no summary yet.")
    return notices


def _goodput(metrics: Rows) -> dict[str, Any] | None:
    """Headline and bars: where the wall time of all the run's processes went."""
    account = figures.goodput(metrics)
    if account is None:
        return None
    total = max(sum(account["seconds"].values()), 1e-9)
    bars = [
        {
            "name": kind.replace("_", " "),
            "what": KINDS.get(kind, ""),
            "time": duration(seconds),
            "percent": 100 * seconds / total,
            "ours": kind == "step",
        }
        for kind, seconds in sorted(account["seconds"].items(), key=lambda item: -item[1])
        if seconds >= 0.0005 * total
    ]
    times = account.get("num_starts", 1)
    return {
        "share": f"{account['share']:.1%}",
        "total": duration(total),
        "starts": "once" if times == 1 else f"{times} times",
        "bars": bars,
    }


def _events(metrics: Rows) -> list[dict[str, Any]]:
    """What happened, in the order in which it did; steps skipped one after another are one line."""
    listed: list[dict[str, Any]] = []
    for row in metrics:
        if "event" not in row or row["event"] == "goodput":
            continue
        rest = {k: v for k, v in row.items() if k not in ("event", "step", "undone")}
        details = ", ".join(f"{figures.words(k)} {figures.quantity(v)}" for k, v in rest.items())
        name = figures.words(row["event"])
        last = listed[-1] if listed else {}
        if name == "skipped" and last.get("what") == name and last["undone"] == _undone(row):
            last["count"] += 1
            last["details"] = f"{last['count']} steps, the last {row['step']:,}"
            continue
        listed.append(
            {"step": row["step"], "what": name, "details": details, "undone": _undone(row)}
            | {"count": 1}
        )
    return listed


def _undone(row: Mapping[str, Any]) -> bool:
    return bool(row.get("undone"))


def _figures(metrics: Rows) -> dict[str, markupsafe.Markup]:
    """The figures there is data for, as SVG, by name."""
    drawn = {
        "loss": ("loss", "nats per token", (9.0, 3.6)),
        "throughput": ("tokens_per_second", "tokens per second", (9.0, 2.3)),
        "learning_rate": ("learning_rate", "learning rate", (4.4, 2.3)),
        "grad_norm": ("grad_norm", "gradient norm", (4.4, 2.3)),
    }
    found = {}
    for name, (key, title, size) in drawn.items():
        points = figures.series(metrics, key)
        if not any(math.isfinite(value) for _, value in points):
            continue
        lines = [_training_line(name, points, figures.events(metrics, key))]
        if name == "loss":
            sets = figures.held_out_sets(metrics, "held_out_loss")
            for color, (label, held_out) in enumerate(sets.items(), 1):
                measured = figures.series(metrics, held_out)
                if measured := [(x, y) for x, y in measured if math.isfinite(y)]:
                    lines.append(Line(label, measured, color, dotted=True))
        found[name] = figures.plot(
            name,
            title,
            lines,
            size=size,
            from_zero=name in ("throughput", "learning_rate"),
            legend=name == "loss",
            marks=name == "loss",
        )
    return found


def _training_line(name: str, points: Points, marks: list[tuple[int, str]]) -> Line:
    """As logged where that is exact or short, else smoothed over what was logged."""
    if name == "learning_rate" or len(points) < 50:
        return Line("training", points, marks=marks)
    if name == "throughput":  # its dips say nothing of a trend
        median = statistics.median(y for _, y in points if math.isfinite(y))
        smoothed = [(points[0][0], median), (points[-1][0], median)]
    else:
        smoothed = figures.smooth(points, 1 - 1 / (1 + len(points) / 64))
    return Line("training, smoothed", smoothed, raw=points, marks=marks)


def main() -> None:
    try:
        print(write_from_workdir(flags.FLAGS.workdir))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    program.run(main)
