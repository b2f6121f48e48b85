"""Lines over steps as SVG inside a page, and numbers for reading.

Figures need matplotlib: `pip install 'lm-lifecycle[report]'`. They take their colours from the page
around them, so that they follow light and dark.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import markupsafe
import numpy as np

Points = list[tuple[float, float]]

NUM_COLORS = 8
# matplotlib draws in fixed colours; these stand for the page's own, which follow light and dark.
_COLORS = {"#010101": "var(--muted)", "#020202": "var(--line)", "#030303": "var(--paper)"}
_COLORS |= {f"#0404{i:02x}": f"var(--c{i})" for i in range(NUM_COLORS)}
_TEXT, _GRID, _PAPER, *SERIES = _COLORS
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

# Events marked on the lines: name -> (matplotlib's marker, text of the legend).
MARKS = {
    "resumed": ("o", "resumed"),
    "rewound": ("<", "rewound"),
    "skipped": ("x", "step skipped"),
    "save_failed": ("v", "save failed"),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a figure.

    Attributes:
      name: shown in the legend.
      points: (x, y), x ascending.
      color: index of the page's series colours; from `NUM_COLORS` on they repeat, dashed.
      raw: drawn faintly underneath, as logged.
      dotted: points joined by dots, for what is measured only now and then.
      marks: (x, event), drawn on the line.
    """

    name: str
    points: Points
    color: int = 0
    raw: Points = dataclasses.field(default_factory=list)
    dotted: bool = False
    marks: Sequence[tuple[float, str]] = ()


def smooth(points: Points, weight: float) -> Points:
    """Means around each point in which the k-th neighbour counts `weight` ** k, without a lag.

    Points that are not finite are left out, and leave their neighbours intact. Towards the ends the
    mean reaches less far, equally on both sides, so that a straight line stays straight.

    Raises:
      ValueError: a weight outside [0, 1).
    """
    if not 0 <= weight < 1:
        raise ValueError(f"smooth={weight} must be in [0, 1): 0 for none, 0.9 for a steady line")
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    ys = np.array([y for _, y in finite], np.float64)
    furthest = min(math.ceil(5 / (1 - weight)), len(ys)) if weight else 0
    kernel = weight ** np.abs(np.arange(-furthest, furthest + 1))
    means = []
    for i in range(len(ys)):
        reach = min(furthest, i, len(ys) - 1 - i)
        near = kernel[furthest - reach : furthest + reach + 1]
        means.append(float(near @ ys[i - reach : i + reach + 1] / near.sum()))
    return [(x, mean) for (x, _), mean in zip(finite, means, strict=True)]


def thin(points: Points, limit: int = 1000) -> Points:
    """At most about `limit` points: the lowest and the highest of each stretch, so spikes stay."""
    if len(points) <= limit:
        return points
    kept = []
    for part in np.array_split(np.arange(len(points)), limit // 2):
        values = [(points[i][1], int(i)) for i in part]
        finite = [v for v in values if math.isfinite(v[0])] or values
        kept += sorted({min(finite)[1], max(finite)[1]})
    return [points[i] for i in kept]


def plot(
    name: str,
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    size: tuple[float, float] = (9.0, 3.6),
    from_zero: bool = False,
    focus: float = 0.0,
    legend: bool = False,
    marks: bool = True,
) -> markupsafe.Markup:
    """The lines as SVG for a page.

    Args:
      name: unique on the page; prefixes the names inside the SVG.
      title: what the y axis shows.
      lines: drawn in order.
      x_label: what the x axis shows.
      size: in inches of 72 points.
      from_zero: the y axis begins at 0.
      focus: the y axis is scaled to the lines from this fraction of the x axis on, so raw values,
        spikes, and a steep beginning may be cut off.
      legend: name the lines.
      marks: name the marks.

    Raises:
      ModuleNotFoundError: matplotlib, of the `report` extra, is missing.
    """
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
        for line in lines:
            _draw(axes, line)
        axes.set_xlabel(x_label)
        axes.set_title(title, loc="left", fontsize=8.5, color=_TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(round(size[0]), integer=x_label == "step"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
        axes.margins(x=0.015)
        if from_zero:
            axes.set_ylim(bottom=0)
        elif focus and (shown := _late(lines, focus)):
            margin = 0.06 * (max(shown) - min(shown)) or 0.5
            axes.set_ylim(min(shown) - margin, max(shown) + margin)
        if handles := _legend(axes, lines if legend else (), lines if marks else ()):
            axes.legend(handles=handles, loc="best", handlelength=1.6)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), name, f"{title} by {x_label}")


def _draw(axes: Any, line: Line) -> None:
    color = SERIES[line.color % NUM_COLORS]
    if line.raw:
        axes.plot(*_columns(line.raw), color=color, linewidth=0.8, alpha=0.3)
    alone = {"marker": "o"} if len(line.points) == 1 else {}
    axes.plot(*_columns(line.points), color=color, **(_dashes(line) | alone))
    finite = [(x, y) for x, y in line.points if math.isfinite(y)]
    for event, (marker, _) in MARKS.items():
        at = [x for x, found in line.marks if found == event and finite]
        if at:
            heights = np.interp(at, [x for x, _ in finite], [y for _, y in finite])
            axes.plot(at, heights, **_mark(marker, color), zorder=5)


def _dashes(line: Line) -> dict[str, Any]:
    if line.dotted:
        return {"linewidth": 1.0, "linestyle": (0, (2, 2)), "marker": "o", "markersize": 3.5}
    return {"linewidth": 1.7, "linestyle": (0, (4, 2)) if line.color >= NUM_COLORS else "-"}


def _columns(points: Points) -> tuple[list[float], list[float]]:
    shown = thin(points)
    return [x for x, _ in shown], [y if math.isfinite(y) else math.nan for _, y in shown]


def _mark(marker: str, color: str) -> dict[str, Any]:
    return {
        "marker": marker,
        "linestyle": "none",
        "markersize": 5.5,
        "markeredgewidth": 1.4,
        "markeredgecolor": color,
        "markerfacecolor": _PAPER,
    }


def _late(lines: Sequence[Line], focus: float) -> list[float]:
    """Values of the lines from the fraction `focus` of the x axis on."""
    xs = [x for line in lines for x, _ in line.points]
    start = min(xs, default=0) + focus * (max(xs, default=0) - min(xs, default=0))
    return [y for line in lines for x, y in line.points if x >= start and math.isfinite(y)]


def _legend(axes: Any, named: Sequence[Line], marked: Sequence[Line]) -> list[Any]:
    """Handles of the lines to name, and of the marks found on `marked`."""
    handles = []
    for line in named:
        color = SERIES[line.color % NUM_COLORS]
        handles += axes.plot([], [], color=color, label=line.name, **_dashes(line))
    used = {event for line in marked for _, event in line.marks}
    for event, (marker, text) in MARKS.items():
        if event in used:
            handles += axes.plot([], [], label=text, **_mark(marker, _TEXT))
    return handles


def _inline(svg: str, name: str, description: str) -> markupsafe.Markup:
    """Makes a matplotlib SVG part of a page: the page's colours, unique names."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    label = markupsafe.escape(description)
    svg = svg.replace('role="img">', f'role="img" aria-label="{label}">', 1)
    for color, variable in _COLORS.items():
        svg = svg.replace(color, variable)
    return markupsafe.Markup(svg)


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


def words(name: str) -> str:
    """A key as a label: 'num_bytes' -> 'bytes'."""
    return str(name).removeprefix("num_").replace("_", " ")


def short(value: float) -> str:
    """1234567 -> '1.23M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def size_of(num_bytes: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} GB"


def _tick(x: float) -> str:
    return short(x) if abs(x) >= 1e6 else f"{x:,.0f}" if x == int(x) else f"{x:.3g}"
