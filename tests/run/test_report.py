"""The page about one run or several: what it shows, that it asks for nothing, what is refused."""

import html.parser
import json
import math
import pathlib
import random
import re
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lm.run import figures, report
from lm.run.goodput import KINDS
from lm.run.metrics import MetricsWriter
from lm.run.report import Run
from tests.commands import command

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest; collects tags, attributes and text."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.stack, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(self.source)
        self.close()
        assert self.stack == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)


def is_self_contained(page: Page) -> bool:
    """Nothing is requested or run, and every reference inside the page is found, once."""
    assert not {"link", "script", "img", "iframe", "object", "image"} & set(page.tags)
    assert not re.search(r"https?:|@import|src=", page.source)
    assert "default-src 'none'" in page.source
    ids = [value for name, value in page.attributes if name == "id"]
    used = re.findall(r"url\(([^)]*)\)", page.source)
    used += [value for name, value in page.attributes if name.endswith("href")]
    return bool(used) and len(ids) == len(set(ids)) and set(used) <= {f"#{i}" for i in ids}


def rows(num_steps, resumed=None):
    source = random.Random(0)
    found = []
    for step in range(1, num_steps + 1):
        row = {
            "step": step,
            "loss": 3 + 6 * math.exp(-step / 30) + source.gauss(0, 0.1),
            "tokens": 65_536,
            "tokens_per_second": source.gauss(30_000, 500),
            "learning_rate": 1e-3 * min(1, step / 10),
            "grad_norm": 1 + source.random(),
            "mfu": 0.413,
        }
        held_out = {"held_out_loss": row["loss"], "held_out_loss/wiki": 4.0}
        found.append(row | (held_out if step % 20 == 0 else {}))
        if step == resumed:
            found.append({"event": "resumed", "step": step})
    return found


ACCOUNT = dict.fromkeys(KINDS, 0.0) | {"step": 3600.0, "lost": 300.0, "compile": 100.0}
EVENTS = [
    {"event": "skipped", "step": 70, "grad_norm": 12.5},
    {"event": "skipped", "step": 71, "grad_norm": 14.5},
    {"event": "skipped", "step": 95, "undone": True},
    {"event": "rewound", "step": 80, "from_step": 99, "reason": "<spikes>"},
    {"event": "save_failed", "step": 90, "error": "No space left on device"},
    {"event": "goodput", "step": 50, "share": 0.5, "seconds": ACCOUNT, "num_starts": 1},
    {"event": "goodput", "step": 100, "share": 0.9, "seconds": ACCOUNT, "num_starts": 2},
]
SUMMARY = {
    "title": "Pretraining & <b>more</b>",
    "held_out": {
        "bits_per_byte": 1.8, "ngram_bits_per_byte": 2.4, "loss": 3.5, "num_bytes": 512_000,
        "figures": [{"set": "wiki", "weights": "last", "bits_per_byte": 1.25, "loss": 3.0},
                    {"set": "wiki", "weights": "EMA", "bits_per_byte": 1.125, "loss": 2.5}],
    },
    "model": {"num_parameters": 3_412_992, "family": "llama"},
    "samples": [{"prompt": "<script>alert(1)</script>",
                 "text": "  indented\n\ttext </div> & more\ud800"}],
    "corpus": {"documents": 1843},
    "environment": {"device": "CPU", "mesh": {"data": 8}, "command": "python -m x --config=y"},
    "files": [{"path": "checkpoints/100", "what": "weights", "num_bytes": 41_000_000}],
}  # fmt: skip
CONFIG = {"seed": 7, "model": {"stacks": [{"repeats": 6, "window": None}]}, "betas": [0.9, 0.95]}


def render(folder, *runs, **options):
    path = folder / "new" / "page.html"
    assert report.write(path, runs, **options) == path
    return Page(path)


def test_the_page_of_a_run(tmp_path):
    page = render(tmp_path, Run("a", rows(100, resumed=60) + EVENTS, CONFIG, SUMMARY))
    for words in (
        "1.800 bits per byte of held-out text, 25 % fewer than the order-3 byte n-gram",
        "512 kB the model never saw; 3.5 nats per token",
        "order-3 byte n-gram 2.4 uncompressed 8",
        "3.41M parameters", "100 steps", "6.55M tokens", "41.3% MFU", "90.0% goodput",
        "90.0% of 1:06:40 in steps that count; started 2 times.",
        "step 1:00:00 90.0 % lost 5:00 7.5 % compile 1:40 2.5 %",
        "set weights bits per byte loss wiki last 1.25 3 wiki EMA 1.125 2.5",
        "60 resumed 70 skipped 2 steps, the last 71", "95 skipped the step was thrown away later",
        "80 rewound from step 99, reason <spikes>", "error No space left on device",
        "documents 1,843", "checkpoints/100 weights 41 MB",
        "python -m x --config=y", "seed 7", "repeats 6", "window None", "betas (0.9, 0.95)",
        "Pretraining & <b>more</b>", "<script>alert(1)</script>",
    ):  # fmt: skip
        assert words in page.text, words
    assert "  indented\n\ttext &lt;/div&gt; &amp; more?" in page.source  # white space and all
    assert page.tags.count("svg") == 4
    marks = {"resumed", "rewound", "step skipped", "save failed"}
    lines = {"training, smoothed", "held-out", "held-out: wiki"}
    assert lines | marks <= set(page.words)
    assert page.words.count("step skipped") == 1  # named in one figure of four
    assert re.search(r"(29\.\d|30(\.\d)?)k tokens/s", page.text)
    assert is_self_contained(page)
    svg = "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL))
    assert not re.findall(r"(?:stroke|fill): ?#\w+", svg)  # the page's colours, light and dark
    for colors in re.findall(r":root \{(.*?)\}", page.source, re.DOTALL):
        assert all(f"{variable}:" in colors for variable in re.findall(r"var\((--\w+)\)", svg))


@pytest.mark.parametrize(
    "metrics",
    [[], rows(1), [{"event": "resumed", "step": 0}], [{"step": 1, "loss": math.nan}],
     [{"step": 1, "held_out_loss": 2.0}]],
)  # fmt: skip
@pytest.mark.parametrize("summary", [{}, {"held_out": {"bits_per_byte": math.nan}}, SUMMARY])
def test_short_and_empty_runs(tmp_path, metrics, summary):
    page = render(tmp_path, Run("a", metrics, {}, summary))
    has_loss = any(math.isfinite(row.get("loss", math.nan)) for row in metrics)
    assert ("No step with a finite loss" in page.text) == (not has_loss)
    assert ("has not finished" in page.text) == (not summary)
    assert ("not finite bits per byte" in page.text) == (len(summary) == 1)


def test_losses_that_are_not_finite_are_reported_and_a_worse_model_is_not_praised(tmp_path):
    metrics = rows(60)
    metrics[9]["loss"], metrics[20]["loss"] = math.nan, math.inf
    held_out = {"bits_per_byte": 3.0, "ngram_bits_per_byte": 2.4}
    page = render(tmp_path, Run("a", metrics, {}, {"held_out": held_out}))
    assert "2 of 60 logged losses are not finite, the first at step 10" in page.text
    assert "nan" not in page.text.lower().split()
    assert "25 % more than the order-3 byte n-gram" in page.text


def test_series_and_sets():
    metrics = [{"step": 3, "x": 1.0}, {"step": 1, "x": 2.0}, {"step": 3, "x": 9.0}, {"step": 2}]
    assert Run("a", metrics).series("x") == [(1, 2.0), (3, 9.0)]
    names = ["loss", "held_out_loss", "held_out_loss/a/b", "ema_held_out_loss/w"]
    found = {"held-out": names[1], "held-out: a/b": names[2], "held-out: w, EMA": names[3]}
    assert report.held_out_sets(names, "held_out_loss") == found


def make(workdir, *, scale=1.0, config=None, summary=None, drop=(), seconds=1.0):
    """A run that was resumed at 20 and rewound to 30, and skipped a step that it threw away."""
    account = dict.fromkeys(KINDS, 0.0) | {"step": 30.0 / scale, "lost": 10.0}
    with MetricsWriter(workdir, tensorboard=False) as writer:
        writer.event("skipped", 35)
        writer.truncate_after(30)
        writer.event("skipped", 10)
        writer.event("resumed", 20)
        writer.event("rewound", 30, from_step=36)
        for step in range(2, 41, 2):
            row = {
                "loss": scale * (2 + math.exp(-step / 10)), "grad_norm": 1.0,
                "learning_rate": 1e-3, "tokens": 100, "tokens_per_second": 1000 * scale,
                "seconds": seconds * step,
            }  # fmt: skip
            if step % 10 == 0:
                row |= {"held_out_bits_per_byte": scale, "held_out_bits_per_byte/wiki": 2 * scale}
            writer.write(step, {k: v for k, v in row.items() if k not in drop})
        share = account["step"] / sum(account.values())
        writer.event("goodput", 40, share=share, seconds=account, num_starts=2)
    (workdir / "config.json").write_text(json.dumps(config or {}))
    if summary is not None:
        (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    config = {"train": {"seed": 0, "num_steps": 40}, "model": {"stacks": [{"num_repeats": 2}]}}
    other = {"train": {"seed": 0, "num_steps": 50},
             "model": {"stacks": [{"num_repeats": 3}, {"a": 1}]}}  # fmt: skip
    summary = {"model": {"num_parameters": 2_816_064}, "environment": {"device": "8 x <v5e>"}}
    return [
        make(root / "<a>" / "w", config=config, summary=summary),
        make(root / "b" / "w", scale=1.5, config=other, seconds=2.0),
    ]


def test_the_page_of_several_runs(workdirs, tmp_path):
    page = render(tmp_path, *report.load(workdirs))
    assert is_self_contained(page)
    assert "<a> 2.82M parameters · 8 x <v5e>" in page.text and "b not finished" in page.text
    for name, title in report.TITLES.items():
        assert (name == "held_out_loss") or title in page.text
    assert page.tags.count("svg") == 6 + 3 * 2  # two validation sets; swatches of two runs
    assert {"resumed", "rewound", "step skipped"} <= set(page.words)
    header, *table = cells(page, "Final figures")
    assert header == ["", "a", "b"]
    found = {name: values for name, *values in table}
    assert found["steps"] == ["40", "40"]
    assert found["tokens"] == ["4k", "4k"]
    assert found["held-out, bits per byte"] == ["1.0000", "1.5000"]
    assert found["held-out: wiki, bits per byte"] == ["2.0000", "3.0000"]
    assert found["tokens/s"] == ["1k", "1.5k"]
    assert found["goodput"] == ["75.0%", "66.7%"]
    assert found["time"] == ["0:40", "0:30"]
    assert found["skipped"] == ["2", "2"] and found["rewound"] == ["1", "1"]
    best = re.findall(r'<td class="number best">(.*?)</td>', page.source)
    assert best == [found["training loss"][0], "1.0000", "2.0000", "1.5k", "75.0%"]
    assert cells(page, "What differs") == [
        ["setting", "a", "b"],
        ["train.num_steps", "40", "50"],
        ["model.stacks.0.num_repeats", "2", "3"],
        ["model.stacks.1.a", "–", "1"],
    ]
    many = render(tmp_path, *report.load(workdirs[:1]) * 9, metrics=["loss"])
    assert "stroke-dasharray" in many.source and "the same configuration" in many.text


def cells(page, title):
    """Header and rows of the table under a heading, as texts."""
    part = page.source[page.source.index(f"<h2>{title}</h2>") :]
    rows = re.findall(r"<tr>(.*?)</tr>", part[: part.index("</table>")], re.S)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[re.sub(r"<[^>]*>|&[lg]t;", "", cell).strip() for cell in row] for row in found]


def test_marks_are_of_the_steps_that_stayed(workdirs):
    (run,) = report.load(workdirs[:1])
    assert run.marks("loss") == [(10, "skipped"), (20, "resumed"), (30, "rewound")]
    assert run.marks("learning_rate") == [(20, "resumed"), (30, "rewound")]


def test_axes(workdirs, tmp_path):
    runs = report.load(workdirs)
    for x, place, label in (
        ("step", 17, "step"), ("tokens", 1700, "training tokens"),
        ("time", 17, "seconds of the run"),
    ):  # fmt: skip
        assert report.abscissa(runs[0], x)(17) == pytest.approx(place)
        page = render(tmp_path, *runs, metrics=["loss"], smooth=0.0, x=x)
        assert label in page.text
        assert page.tags.count("svg") == 1 + 2 * 3  # the figure, and swatches of two runs


def test_runs_are_named_by_what_they_do_not_share():
    for paths, names in (
        ("/r/a /r/b", "a b"), ("/r/a/w /r/b/w", "a b"), ("/r/a/w /r/a/w/w", "w w/w"),
        ("/r/x/1 /r/y/2", "x/1 y/2"), ("/r/a", "a"),
    ):  # fmt: skip
        assert report.run_names([pathlib.Path(p) for p in paths.split()]) == names.split()


def test_what_cannot_be_compared_is_refused(workdirs, tmp_path):
    with MetricsWriter(tmp_path / "empty", tensorboard=False) as writer:
        writer.event("resumed", 0)
    with MetricsWriter(tmp_path / "other", tensorboard=False) as writer:
        writer.write(1, {"reward": 1.0})
    old = make(tmp_path / "old", drop=("seconds", "tokens"))
    for folders, options, error, message in (
        ([], {}, ValueError, "no runs to compare; give their workdirs"),
        ([tmp_path / "no"], {}, FileNotFoundError, r"no has no metrics\.jsonl.*--workdir"),
        ([workdirs[0]] * 2, {}, ValueError, "is given twice"),
        ([workdirs[0], tmp_path / "empty"], {}, ValueError, "has logged no step yet"),
        (workdirs, {"metrics": ["los"]}, ValueError, "no run has logged 'los'; there is loss, gr"),
        (workdirs, {"smooth": 1.0}, ValueError, r"smooth=1.0 must be in \[0, 1\)"),
        ([old], {"x": "time"}, ValueError, "old has logged no 'seconds', which --x=time needs"),
        ([old], {"x": "tokens"}, ValueError, "old has logged no 'tokens', which --x=tokens needs"),
        ([workdirs[0], tmp_path / "other"], {}, ValueError, "no metric in common: .*other has rew"),
    ):
        with pytest.raises(error, match=message):
            report.write(tmp_path / "p.html", report.load(folders), **options)
    assert not (tmp_path / "p.html").exists()


def test_smoothing_is_the_weighted_mean_it_says_and_keeps_lines():
    """An impulse spreads as w^|k|, normalized: 1 + 2 (w + w^2 + ...) = (1 + w) / (1 - w)."""
    line = [(step, 2.0 * step) for step in range(200)]
    broken = [(0, 1.0), (1, math.nan), (2, 1.0), (3, math.inf), (4, 1.0)]
    for w in (0.0, 0.9):
        assert np.array(figures.smooth(line, w)) == pytest.approx(np.array(line))
        assert figures.smooth(broken, w) == [(0, 1.0), (2, 1.0), (4, 1.0)]
    w = 0.8
    spread = dict(figures.smooth([(i, float(i == 100)) for i in range(201)], w))
    assert spread[100] == pytest.approx((1 - w) / (1 + w), rel=1e-2)
    assert spread[103] / spread[100] == pytest.approx(w**3)
    assert sum(spread.values()) == pytest.approx(1.0)


def test_thinning_keeps_spikes_and_order():
    points = [(i, math.sin(i / 1000)) for i in range(100_000)]
    points[31_415], points[50_000] = (31_415, 99.0), (50_000, math.nan)
    thinned = figures.thin(points, 400)
    assert len(thinned) <= 400 and (31_415, 99.0) in thinned
    assert thinned == sorted(thinned) and set(thinned) <= set(points)
    assert figures.thin(points[:300], 400) == points[:300]


def test_quantities():
    for value, shown in (
        (1234567, "1,234,567"), (0.000123456, "0.0001235"), (12345.6, "12,346"),
        (math.inf, "not finite"), (None, "–"), (True, "True"), ([1, 2.5], "1, 2.5"), ("1e3", "1e3"),
    ):  # fmt: skip
        assert figures.quantity(value) == shown


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lm-lifecycle\[report\]'"):
        report.write(tmp_path / "report.html", [Run("a", rows(3))])


def test_the_commands(workdirs, tmp_path):
    (workdirs[1] / "report.html").unlink(missing_ok=True)
    out = command("report", f"--workdir={workdirs[1]}")
    assert out == f"{workdirs[1]}/report.html\n"
    page = Page(workdirs[1] / "report.html")
    assert "has not finished" in page.text and "num_steps 50" in page.text
    output = f"--output={tmp_path}/c.html"
    out = command("plot", workdirs[1], workdirs[0], output, "--metric=grad_norm")
    assert out == f"{tmp_path}/c.html\n"
    assert "grad norm" in Page(tmp_path / "c.html").text
    for wrong in (("plot", tmp_path / "no", output), ("report", f"--workdir={tmp_path}/no")):
        error = command(*wrong, status=2)
        assert error.startswith("error: ") and "no metrics.jsonl" in error
