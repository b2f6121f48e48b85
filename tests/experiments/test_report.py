"""The page holds what the run measured, escaped, in one file that asks for nothing."""

import dataclasses
import html.parser
import json
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from experiments import figures, report
from experiments.summary import held_out_figures
from lm.run.goodput import KINDS
from lm.run.metrics import MetricsWriter

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest; collects tags, attributes and text."""

    def __init__(self, source: str):
        super().__init__()
        self.stack, self.tags, self.ids, self.attributes, self.words = [], [], [], [], []
        self.feed(source)
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
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)


def rows(num_steps, resumed=None):
    source = random.Random(0)
    found = []
    for step in range(1, num_steps + 1):
        row = {
            "step": step,
            "loss": 3 + 6 * math.exp(-step / 30) + source.gauss(0, 0.1),
            "tokens_per_second": source.gauss(30_000, 500),
            "learning_rate": 1e-3 * min(1, step / 10),
            "grad_norm": 1 + source.random(),
        }
        found.append(row | ({"held_out_loss": row["loss"]} if step % 20 == 0 else {}))
        if step == resumed:
            found.append({"event": "resumed", "step": step})
    return found


SUMMARY = {
    "title": "Pretraining & <b>more</b>",
    "held_out": {
        "bits_per_byte": 1.8,
        "ngram_bits_per_byte": 2.4,
        "lzma_bits_per_byte": 2.25,
        "loss": 3.5,
        "num_bytes": 512_000,
    },
    "model": {"num_parameters": 3_412_992, "family": "llama"},
    "train": {"num_steps": 100, "num_tokens": 6_553_600, "seconds": 214.2},
    "samples": [
        {"prompt": "<script>alert(1)</script>", "text": "  indented\n\ttext </div> & more"}
    ],
    "corpus": {
        "documents": 1843,
        "sources": [{"name": "a/b", "documents": 12, "num_bytes": 34_567}],
    },
    "environment": {"device": "CPU", "mesh": {"data": 8}, "command": "python -m x --config=y"},
    "files": [
        "config.json",
        {"path": "checkpoints/100", "what": "weights", "num_bytes": 41_000_000},
    ],
}
CONFIG = {"seed": 7, "model": {"stacks": [{"repeats": 6, "window": None}]}, "betas": [0.9, 0.95]}


def render(tmp_path, **inputs):
    path = report.write(tmp_path / "out" / "report.html", **inputs)
    assert path == tmp_path / "out" / "report.html"
    source = path.read_text("utf-8")
    return source, Page(source)


def test_page_shows_what_was_measured(tmp_path):
    _, page = render(tmp_path, metrics=rows(100, resumed=60), summary=SUMMARY, config=CONFIG)
    for words in (
        "1.800 bits per byte of held-out text, 25 % fewer than the order-3 byte n-gram",
        "512 kB the model never saw; 3.5 nats per token",
        "order-3 byte n-gram 2.4 lzma (xz) 2.25 uncompressed 8",
        "3.41M parameters", "100 training steps", "6.55M training tokens",
        "3 min 34 s training time", "Events step what 60 resumed", "documents 1,843",
        "a/b 12 34,567", "checkpoints/100 weights 41 MB", "python -m x --config=y", "seed 7",
        "repeats 6", "window None", "betas (0.9, 0.95)",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") == 4
    assert {"held-out", "training, smoothed", "resumed"} <= set(page.words)
    assert re.search(r"3[01](\.\d)?k tokens per second", page.text)


ACCOUNT = dict.fromkeys(KINDS, 0.0) | {"step": 3600.0, "lost": 300.0, "compile": 100.0}
EVENTS = [
    {"event": "resumed", "step": 60},
    {"event": "skipped", "step": 70, "grad_norm": 12.5},
    {"event": "skipped", "step": 71, "grad_norm": 14.5},
    {"event": "skipped", "step": 95, "undone": True},
    {"event": "rewound", "step": 80, "from_step": 99, "reason": "<spikes>"},
    {"event": "save_failed", "step": 90, "error": "No space left on device"},
    {"event": "goodput", "step": 50, "share": 0.5, "seconds": ACCOUNT, "num_starts": 1},
    {"event": "goodput", "step": 100, "share": 0.9, "seconds": ACCOUNT, "num_starts": 2},
]


def test_page_tells_what_happened_and_where_the_time_went(tmp_path):
    metrics = [row | {"mfu": 0.413} for row in rows(100)]
    for row in metrics[19::20]:
        row["held_out_loss/wiki"] = 4.0
    _, page = render(tmp_path, metrics=metrics + EVENTS, summary={})
    for words in (
        "90.0% goodput", "41.3% MFU", "90.0% of 1:06:40 in steps that count; started 2 times.",
        "step 1:00:00 90.0 % lost 5:00 7.5 % compile 1:40 2.5 %",
        "70 skipped 2 steps, the last 71", "95 skipped the step was thrown away later",
        "80 rewound from step 99, reason <spikes>", "error No space left on device",
    ):  # fmt: skip
        assert words in page.text, words
    marks = {"resumed", "rewound", "step skipped", "save failed"}
    assert {"held-out: wiki"} | marks <= set(page.words)
    assert page.words.count("step skipped") == 1  # named in one figure of four


def test_page_shows_several_validation_sets_and_averaged_weights(tmp_path):
    found = [
        {"set": "wiki", "weights": "last", "bits_per_byte": 1.25, "loss": 3.0},
        {"set": "wiki", "weights": "average", "bits_per_byte": 1.125, "loss": 2.5},
    ]
    held_out = {"bits_per_byte": 1.25, "figures": found}
    _, page = render(tmp_path, metrics=[], summary={"held_out": held_out})
    assert "set weights bits per byte loss wiki last 1.25 3 wiki average 1.125 2.5" in page.text


def test_held_out_figures_of_a_row():
    row = {"loss": 1.0, "held_out_loss": 2.0, "held_out_bits_per_byte": 3.0}
    assert held_out_figures(row) == []  # the headline says it all
    row |= {"ema_held_out_loss/wiki": 4.0, "ema_held_out_bits_per_byte/wiki": 5.0}
    assert held_out_figures(row) == [
        {"set": "validation", "weights": "last", "bits_per_byte": 3.0, "loss": 2.0},
        {"set": "wiki", "weights": "EMA", "bits_per_byte": 5.0, "loss": 4.0},
    ]


def test_a_worse_model_is_not_praised(tmp_path):
    held_out = {"bits_per_byte": 3.0, "ngram_bits_per_byte": 2.4}
    _, page = render(tmp_path, metrics=[], summary={"held_out": held_out})
    assert "25 % more than the order-3 byte n-gram" in page.text


def test_text_of_others_is_escaped(tmp_path):
    source, page = render(tmp_path, metrics=rows(5), summary=SUMMARY, config=CONFIG)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "Pretraining & <b>more</b>" in page.text
    assert "  indented\n\ttext &lt;/div&gt; &amp; more" in source  # white space is the sample's


def test_half_a_character_in_a_sample_is_survived(tmp_path):
    summary = {"samples": [{"prompt": "a", "text": "b\ud800c"}]}
    _, page = render(tmp_path, metrics=[], summary=summary)
    assert "b?c" in page.text


def test_page_is_self_contained(tmp_path):
    source, page = render(tmp_path, metrics=rows(100, resumed=3), summary=SUMMARY, config=CONFIG)
    assert not {"link", "script", "img", "iframe", "object", "image"} & set(page.tags)
    assert not re.search(r"https?:|@import|src=", source)
    for value in re.findall(r"url\(([^)]*)\)", source):
        assert value.startswith("#")
    references = {v for n, v in page.attributes if n.endswith("href")}
    references |= set(re.findall(r"url\((#[^)]*)\)", source))
    assert references
    assert references <= {f"#{name}" for name in page.ids}  # every mark and clip path is found
    assert len(page.ids) == len(set(page.ids))  # and in its own figure
    assert "default-src 'none'" in source


def test_figures_take_the_colours_of_the_page(tmp_path):
    source, _ = render(tmp_path, metrics=rows(100, resumed=3), summary={})
    svg = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert not re.findall(r"(?:stroke|fill): ?#\w+", svg)
    used = set(re.findall(r"var\((--\w+)\)", svg))
    light, dark = re.findall(r":root \{(.*?)\}", source, re.DOTALL)
    for variable in used:
        assert f"{variable}:" in light
        assert f"{variable}:" in dark


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        rows(1),
        rows(2),
        rows(20),  # one held-out point
        [{"event": "resumed", "step": 0}],
        [{"step": 1, "loss": math.nan}],
        [{"step": 1, "held_out_loss": 2.0}],
    ],
)
@pytest.mark.parametrize("summary", [{}, {"held_out": {"bits_per_byte": math.nan}}, SUMMARY])
def test_short_and_empty_runs(tmp_path, metrics, summary):
    _, page = render(tmp_path, metrics=metrics, summary=summary)
    has_loss = any(math.isfinite(row.get("loss", math.nan)) for row in metrics)
    assert ("No step with a finite loss" in page.text) == (not has_loss)
    assert ("has not finished" in page.text) == (not summary)
    assert ("not finite bits per byte" in page.text) == (len(summary) == 1)


def test_losses_that_are_not_finite_are_told(tmp_path):
    metrics = rows(60)
    metrics[9]["loss"], metrics[20]["loss"] = math.nan, math.inf
    _, page = render(tmp_path, metrics=metrics, summary={})
    assert "2 of 60 logged losses are not finite, the first at step 10" in page.text
    assert "nan" not in page.text.lower().split()


def test_series_is_ordered_and_has_each_step_once():
    metrics = [{"step": 3, "x": 1.0}, {"step": 1, "x": 2.0}, {"step": 3, "x": 9.0}, {"step": 2}]
    assert figures.series(metrics, "x") == [(1, 2.0), (3, 9.0)]


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9])
def test_smoothing_keeps_lines_and_skips_what_is_not_finite(weight):
    line = [(step, 2.0 * step) for step in range(200)]
    assert np.array(figures.smooth(line, weight)) == pytest.approx(np.array(line))
    broken = [(0, 1.0), (1, math.nan), (2, 1.0), (3, math.inf), (4, 1.0)]
    assert figures.smooth(broken, weight) == [(0, 1.0), (2, 1.0), (4, 1.0)]


def test_smoothing_is_the_weighted_mean_it_says():
    """An impulse spreads as w^|k|, normalized: 1 + 2 (w + w^2 + ...) = (1 + w) / (1 - w)."""
    w = 0.8
    impulse = [(i, float(i == 100)) for i in range(201)]
    spread = dict(figures.smooth(impulse, w))
    assert spread[100] == pytest.approx((1 - w) / (1 + w), rel=1e-2)
    assert spread[103] / spread[100] == pytest.approx(w**3)
    assert sum(spread.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("weight", [-0.1, 1.0, 9.0])
def test_weights_that_smooth_nothing_are_refused(weight):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        figures.smooth([(0, 1.0)], weight)


def test_thinning_keeps_spikes_and_order():
    points = [(i, math.sin(i / 1000)) for i in range(100_000)]
    points[31_415] = (31_415, 99.0)
    points[50_000] = (50_000, math.nan)
    thinned = figures.thin(points, 400)
    assert len(thinned) <= 400
    assert (31_415, 99.0) in thinned
    assert thinned == sorted(thinned)
    assert set(thinned) <= set(points)
    assert figures.thin(points[:300], 400) == points[:300]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567, "1,234,567"), (0.000123456, "0.0001235"), (12345.6, "12,346"),
        (math.inf, "not finite"), (None, "–"), (True, "True"), ([1, 2.5], "1, 2.5"), ("1e3", "1e3"),
    ],
)  # fmt: skip
def test_quantities(value, shown):
    assert figures.quantity(value) == shown


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 0.125


def test_configuration_may_be_a_dataclass(tmp_path):
    _, page = render(tmp_path, metrics=[], summary={}, config=Config())
    assert "learning_rate 0.125" in page.text


def test_command_makes_the_page_from_the_run(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for row in rows(5):
            writer.write(row.pop("step"), row)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    command = [sys.executable, "-m", "experiments.report", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "1.800 bits per byte" in page.text
    assert "seed 7" in page.text

    (tmp_path / "summary.json").unlink()
    (tmp_path / "config.json").unlink()
    assert "has not finished" in report.write_from_workdir(tmp_path).read_text("utf-8")


def test_a_folder_of_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.jsonl, so it is not the folder"):
        report.write_from_workdir(tmp_path)


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lm-lifecycle\[report\]'"):
        report.write(tmp_path / "report.html", metrics=rows(3), summary={})
