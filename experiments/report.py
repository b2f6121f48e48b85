"""One self-contained HTML page about a training run: no scripts, no requests, light and dark.

    python -m experiments.report --workdir=W  # W/report.html from W/{config,metrics,summary} files

`metrics.jsonl` rows (see lm.train.metrics) may hold `loss`, `held_out_loss`, `tokens_per_second`,
`learning_rate` and `grad_norm`; rows `{"event": "resumed", "step": N}` are marked in the figures.
`summary.json` is what the trainer knows at its end; every key may be missing:

    {
      "title": "Pretraining: quicktest",
      "held_out": {"bits_per_byte": 2.1, "ngram_bits_per_byte": 2.6, "lzma_bits_per_byte": 2.4,
                   "loss": 4.9, "num_bytes": 500_000},      # loss in nats per token
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
import io
import json
import math
import os
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
from absl import app, flags

from experiments import config as config_lib
from lm.train import metrics as metrics_lib

# matplotlib draws in fixed colours; these stand for the page's own, which follow light and dark.
_COLORS = {
    "#010101": "var(--muted)",
    "#020202": "var(--line)",
    "#030303": "var(--accent)",
    "#040404": "var(--second)",
}
_TEXT, _GRID, _ACCENT, _SECOND = _COLORS
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
Points = list[tuple[int, float]]


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
      metrics: rows as `lm.train.metrics.read` gives them, in any order.
      summary: see this module's docstring.
      config: the run's configuration, a dataclass or the content of its `config.json`.

    Raises:
      ModuleNotFoundError: matplotlib, of the `report` extra, is missing.
    """
    if dataclasses.is_dataclass(config):
        config = config_lib.to_dict(config)
    template = pathlib.Path(__file__).with_name("report.html.jinja")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"quantity": quantity, "words": _words, "size": _size}
    environment.tests["table"] = lambda value: isinstance(value, Mapping)
    html = environment.from_string(template.read_text("utf-8")).render(
        title=summary.get("title", "Training run"),
        held_out=_held_out(summary.get("held_out") or {}),
        tiles=_tiles(metrics, summary),
        figures=_figures(metrics),
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


def series(metrics: Iterable[Mapping[str, Any]], name: str) -> Points:
    """(step, value) by step; where a step was logged twice, the later row counts."""
    points = {row["step"]: row[name] for row in metrics if "event" not in row and name in row}
    return sorted(points.items())


def smooth(points: Points, window: int) -> Points:
    """Mean over `window` points around each, fewer towards both ends, so that nothing lags.

    Points that are not finite are left out and do not spoil those beside them.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    smoothed = []
    for i, (step, _) in enumerate(finite):
        reach = min(window // 2, i, len(finite) - 1 - i)
        around = [value for _, value in finite[i - reach : i + reach + 1]]
        smoothed.append((step, math.fsum(around) / len(around)))
    return smoothed


def quantity(value: Any) -> str:
    """A number for reading: 1234567 -> '1,234,567', 0.000123456 -> '0.0001235'."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not finite"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(quantity, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _words(name: str) -> str:
    """A key as a label: 'num_bytes' -> 'bytes'."""
    return str(name).removeprefix("num_").replace("_", " ")


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} GB"


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
        tiles.append((_short(parameters), "parameters"))
    train = summary.get("train") or {}
    if train.get("num_steps") is not None:
        tiles.append((f"{train['num_steps']:,}", "training steps"))
    if train.get("num_tokens") is not None:
        tiles.append((_short(train["num_tokens"]), "training tokens"))
    if losses := [v for _, v in series(metrics, "loss") if math.isfinite(v)]:
        tiles.append((f"{statistics.fmean(losses[-10:]):.3f}", "training loss, nats per token"))
    if rates := [v for _, v in series(metrics, "tokens_per_second") if math.isfinite(v)]:
        tiles.append((_short(statistics.median(rates)), "tokens per second"))
    if train.get("seconds") is not None:
        minutes, seconds = divmod(round(train["seconds"]), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
        tiles.append((clock, "training time"))
    return tiles


def _notices(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    notices = []
    losses = series(metrics, "loss")
    if bad := [step for step, loss in losses if not math.isfinite(loss)]:
        count = f"{len(bad)} of {len(losses)} logged losses {'is' if len(bad) == 1 else 'are'}"
        notices.append(f"{count} not finite, the first at step {bad[0]:,}.")
    if not summary:
        notices.append("The run has not finished: it has written no summary yet.")
    if resumed := _resumed(metrics):
        steps = ", ".join(f"{step:,}" for step in resumed)
        notices.append(f"The run was resumed at step {steps}; the figures mark where.")
    return notices


def _resumed(metrics: Iterable[Mapping[str, Any]]) -> list[int]:
    return sorted({row["step"] for row in metrics if row.get("event") == "resumed"})


def _figures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, markupsafe.Markup]:
    """The figures there is data for, as SVG, by name."""
    resumed = _resumed(metrics)
    plots = {
        "loss": ("loss", "held_out_loss", "nats per token", 9.0, 3.6),
        "throughput": ("tokens_per_second", None, "tokens per second", 9.0, 2.3),
        "learning_rate": ("learning_rate", None, "learning rate", 4.4, 2.3),
        "grad_norm": ("grad_norm", None, "gradient norm", 4.4, 2.3),
    }
    figures = {}
    for name, (key, held_out_key, label, width, height) in plots.items():
        points = series(metrics, key)
        if any(math.isfinite(value) for _, value in points):
            held_out = series(metrics, held_out_key) if held_out_key else []
            figures[name] = _plot(name, points, held_out, resumed, label, (width, height))
    return figures


def _plot(
    name: str,
    points: Points,
    held_out: Points,
    resumed: Sequence[int],
    label: str,
    size: tuple[float, float],
) -> markupsafe.Markup:
    """A line over steps: faint as logged, strong when smoothed, held-out points on top."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the report's figures need matplotlib; pip install 'lm-lifecycle[report]'"
        ) from error

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        steps, values = zip(*points, strict=True)
        smoothed = smooth(points, len(points) // 16)
        if name == "throughput":  # its dips (evaluation, checkpoints) say nothing of a trend
            median = statistics.median(value for _, value in smooth(points, 1))
            smoothed = [(steps[0], median), (steps[-1], median)]
        exact = name == "learning_rate" or len(points) < 50
        marker = "o" if len(points) == 1 else ""
        axes.plot(
            steps,
            [v if math.isfinite(v) else math.nan for v in values],
            color=_ACCENT,
            linewidth=1.8 if exact else 0.9,
            alpha=1.0 if exact else 0.4,
            marker=marker,
            label="training" if exact else "training, each step logged",
        )
        if not exact:
            axes.plot(*zip(*smoothed, strict=True), color=_ACCENT, linewidth=1.8, label="smoothed")
        if shown := [(s, v) for s, v in held_out if math.isfinite(v)]:
            axes.plot(
                *zip(*shown, strict=True),
                color=_SECOND,
                linewidth=1.0,
                linestyle=(0, (2, 2)),
                marker="o",
                markersize=4,
                label="held-out",
            )
        for i, step in enumerate(resumed):
            mark = axes.axvline(step, color=_TEXT, linewidth=0.9, linestyle=(0, (1, 3)))
            mark.set_label("resumed" if i == 0 else "_")
        axes.set_xlabel("step")
        axes.set_title(label, loc="left", fontsize=8.5, color=_TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=round(size[0]), integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
        axes.margins(x=0.015)
        if name in ("throughput", "learning_rate"):
            axes.set_ylim(bottom=0)
        if name == "loss":
            axes.legend(loc="upper right")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), name, f"{label} over training steps")


def _inline(svg: str, name: str, description: str) -> markupsafe.Markup:
    """Makes a matplotlib SVG part of a page: the page's colours, names that meet no others."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = svg.replace('role="img">', f'role="img" aria-label="{description}">', 1)
    for color, variable in _COLORS.items():
        svg = svg.replace(color, variable)
    return markupsafe.Markup(svg)


def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags are --name=value")
    try:
        print(write_from_workdir(flags.FLAGS.workdir))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    app.run(main)
