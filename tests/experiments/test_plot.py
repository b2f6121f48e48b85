"""Runs side by side: what the page shows, what it refuses, and where events are drawn."""

import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

from experiments import figures, plot
from lm.run.goodput import KINDS
from lm.run.metrics import MetricsWriter
from tests.experiments.test_report import Page


def test_held_out_metrics_by_set_and_weights():
    row = dict.fromkeys(
        ["loss", "held_out_loss", "held_out_loss/a/b", "ema_held_out_loss", "ema_held_out_loss/w"]
    )
    assert figures.held_out_sets([row], "held_out_loss") == {
        "held-out": "held_out_loss",
        "held-out: a/b": "held_out_loss/a/b",
        "held-out, EMA": "ema_held_out_loss",
        "held-out: w, EMA": "ema_held_out_loss/w",
    }


def make(workdir, *, scale=1.0, num_steps=40, config=None, summary=None, drop=(), seconds=1.0):
    """A run that was resumed at 20 and rewound to 30, and skipped a step that it threw away."""
    account = dict.fromkeys(KINDS, 0.0) | {"step": 30.0 / scale, "lost": 10.0}
    with MetricsWriter(workdir, tensorboard=False) as writer:
        writer.event("skipped", 35)
        writer.truncate_after(30)
        writer.event("skipped", 10)
        writer.event("resumed", 20)
        writer.event("rewound", 30, from_step=36)
        for step in range(2, num_steps + 1, 2):
            row = {
                "loss": scale * (2 + math.exp(-step / 10)),
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "tokens": 100,
                "tokens_per_second": 1000 * scale,
                "seconds": seconds * step,
            }
            if step % 10 == 0:
                row |= {"held_out_bits_per_byte": scale, "held_out_bits_per_byte/wiki": 2 * scale}
            writer.write(step, {k: v for k, v in row.items() if k not in drop})
        share = account["step"] / sum(account.values())
        writer.event("goodput", num_steps, share=share, seconds=account, num_starts=2)
    if config is not None:
        (workdir / "config.json").write_text(json.dumps(config))
    if summary is not None:
        (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


CONFIG = {"train": {"seed": 0, "num_steps": 40}, "model": {"stacks": [{"num_repeats": 2}]}}
OTHER = {"train": {"seed": 0, "num_steps": 50}, "model": {"stacks": [{"num_repeats": 3}, {"a": 1}]}}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    summary = {"model": {"num_parameters": 2_816_064}, "environment": {"device": "8 x <v5e>"}}
    return [
        make(root / "<a>" / "w", config=CONFIG, summary=summary),
        make(root / "b" / "w", scale=1.5, config=OTHER, seconds=2.0),
    ]


@pytest.fixture(scope="module")
def source(workdirs, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "new" / "compare.html"
    assert plot.write(output, plot.load(workdirs)) == output
    return output.read_text("utf-8")


def table(source, title):
    """Header and rows of the table under a heading, as texts."""
    part = source[source.index(f"<h2>{title}</h2>") :]
    part = part[: part.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", part, re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[re.sub(r"<[^>]*>|&[lg]t;", "", cell).strip() for cell in row] for row in cells]


def test_final_figures(source):
    header, *rows = table(source, "Final figures")
    assert header == ["", "a", "b"]
    found = {name: values for name, *values in rows}
    assert found["steps"] == ["40", "40"]
    assert found["tokens"] == ["4k", "4k"]
    assert found["held-out, bits per byte"] == ["1.0000", "1.5000"]
    assert found["held-out: wiki, bits per byte"] == ["2.0000", "3.0000"]
    assert found["tokens/s"] == ["1k", "1.5k"]
    assert found["goodput"] == ["75.0%", "66.7%"]
    assert found["time"] == ["0:40", "0:30"]
    assert found["skipped"] == ["2", "2"] and found["rewound"] == ["1", "1"]
    best = re.findall(r'<td class="number best">(.*?)</td>', source)
    assert best == [found["training loss"][0], "1.0000", "2.0000", "1.5k", "75.0%"]


def test_only_what_differs_in_the_configuration_is_listed(source):
    header, *rows = table(source, "What differs")
    assert header == ["setting", "a", "b"]
    assert rows == [
        ["train.num_steps", "40", "50"],
        ["model.stacks.0.num_repeats", "2", "3"],
        ["model.stacks.1.a", "–", "1"],
    ]


def test_page_is_one_self_contained_file(source):
    page = Page(source)
    assert not {"link", "script", "img", "iframe", "object", "image"} & set(page.tags)
    assert not re.search(r"https?:|@import|src=", source)
    assert len(page.ids) == len(set(page.ids))
    assert "<a> 2.82M parameters · 8 x <v5e>" in page.text and "b not finished" in page.text
    assert "<v5e>" not in source
    for name, title in plot.TITLES.items():
        assert (name == "held_out_loss") or title in page.text
    assert page.tags.count("svg") == 6 + 3 * 2  # two validation sets; swatches of two runs
    assert {"resumed", "rewound", "step skipped"} <= set(page.words)


def test_marks_are_of_the_steps_that_stayed(workdirs):
    (run, _) = plot.load(workdirs)
    assert figures.events(run.rows) == [(10, "skipped"), (20, "resumed"), (30, "rewound")]
    assert figures.events(run.rows, "learning_rate") == [(20, "resumed"), (30, "rewound")]


@pytest.mark.parametrize(("x", "places"), [("step", 17), ("tokens", 1700), ("time", 17)])
def test_places_on_the_axis_between_rows(workdirs, x, places):
    (run, _) = plot.load(workdirs)
    assert plot.abscissa(run, x)(17) == pytest.approx(places)


@pytest.mark.parametrize("x", ["tokens", "time"])
def test_every_axis_is_drawn(workdirs, tmp_path, x):
    path = plot.write(tmp_path / "p.html", plot.load(workdirs), metrics=["loss"], smooth=0.0, x=x)
    page = Page(path.read_text("utf-8"))
    assert {"tokens": "training tokens", "time": "seconds of the run"}[x] in page.text
    assert page.tags.count("svg") == 1 + 2 * 3  # the figure, and swatches of two runs


def test_one_run_and_more_runs_than_colours(workdirs, tmp_path):
    (run, _) = plot.load(workdirs)
    page = Page(plot.write(tmp_path / "1.html", [run]).read_text("utf-8"))
    assert "What differs" not in page.text
    html = plot.write(tmp_path / "9.html", [run] * 9, metrics=["loss"]).read_text("utf-8")
    assert "stroke-dasharray" in html and "the same configuration" in html


def test_runs_are_named_by_what_they_do_not_share(tmp_path):
    names = lambda *paths: plot._names([pathlib.Path(p) for p in paths])  # noqa: E731
    assert names("/r/a", "/r/b") == ["a", "b"]
    assert names("/r/a/w", "/r/b/w") == ["a", "b"]
    assert names("/r/a/w", "/r/a/w/w") == ["w", "w/w"]
    assert names("/r/x/1", "/r/y/2") == ["x/1", "y/2"]
    assert names("/r/a") == ["a"]


def test_what_cannot_be_compared_is_refused(workdirs, tmp_path):
    load = plot.load
    with pytest.raises(ValueError, match="no runs to compare; give their workdirs"):
        load([])
    with pytest.raises(FileNotFoundError, match=r"nowhere has no metrics\.jsonl.*--workdir"):
        load([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="is given twice"):
        load([workdirs[0], workdirs[0]])
    with MetricsWriter(tmp_path / "empty", tensorboard=False) as writer:
        writer.event("resumed", 0)
    with pytest.raises(ValueError, match="has logged no step yet"):
        load([tmp_path / "empty"])

    runs = load(workdirs)
    with pytest.raises(ValueError, match=r"no run has logged 'los'; there is loss, grad_norm"):
        plot.write(tmp_path / "p.html", runs, metrics=["los"])
    with pytest.raises(ValueError, match=r"smooth=1.0 must lie in \[0, 1\)"):
        plot.write(tmp_path / "p.html", runs, smooth=1.0)

    old = make(tmp_path / "old", drop=("seconds", "tokens"))
    for x, key in (("time", "seconds"), ("tokens", "tokens")):
        with pytest.raises(ValueError, match=f"old has logged no '{key}', which --x={x} needs"):
            plot.write(tmp_path / "p.html", load([old]), x=x)
    with MetricsWriter(tmp_path / "other", tensorboard=False) as writer:
        writer.write(1, {"reward": 1.0})
    with pytest.raises(ValueError, match=r"no metric in common: .*other has reward"):
        plot.write(tmp_path / "p.html", load([workdirs[0], tmp_path / "other"]))
    assert not (tmp_path / "p.html").exists()


def test_the_command(workdirs, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "experiments.plot", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    output = f"--output={tmp_path}/c.html"
    done = run(str(workdirs[1]), output, "--metric=loss", "--metric=grad_norm", "--x=tokens")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path}/c.html"
    assert "grad norm" in Page((tmp_path / "c.html").read_text("utf-8")).text
    refused = run(str(tmp_path / "no"), output)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("error: ") and "no metrics.jsonl" in refused.stderr
