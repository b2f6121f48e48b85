"""The benchmarks, end to end on a CPU; their processes, arithmetic and errors."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re

import numpy as np
import pytest

from experiments.benchmark import harness, kernels, kernels_contenders, train
from experiments.benchmark.harness import BenchmarkError, Worker
from experiments.benchmark.kernels_contenders import Case
from experiments.benchmark.train_contenders import SIZES, Size, time_accelerator
from lm.formats.known import known_model
from lm.kernels.attention import Scores, View
from lm.kernels.attention.reference import mask
from lm.model import train_flops
from tests.commands import call_apart, calls_apart, printed
from tests.refuses import refuses

TINY_LLAMA = {"vocab_size": 128, "embed_dim": 32, "num_layers": 2, "num_heads": 4,
              "num_kv_heads": 2, "hidden_dim": 64}  # fmt: skip


def run(arguments: str) -> tuple[str, str]:
    """What a benchmark prints on stdout and stderr."""
    status, out, err = call_apart("benchmark", *arguments.split())
    assert status == 0, err
    return out, err


@pytest.mark.oracle
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the peers extra",
)
def test_train_against_torch():
    out, _ = run("train --sizes=tiny --precisions=float32 --contenders=jax,torch --rounds=3")
    rows = [line.split("|")[1:-1] for line in out.splitlines() if "| tiny |" in line]
    assert [row[2].strip() for row in rows] == ["jax", "torch"]
    assert float(rows[1][5]) == 1.0
    # Both train: repeating one batch brings each below the loss of a uniform guess.
    assert all(float(row[-1]) < math.log(SIZES["tiny"].vocab_size) for row in rows)


def test_ratio_is_to_the_fastest_peer():
    seconds = {"jax": 2.0, "torch": 4.0, "torch_compile": 3.0}
    rows = [{"contender": name, "seconds_per_step": s} for name, s in seconds.items()]
    train.add_ratios(rows)
    assert [row["ratio"] for row in rows] == [1.5, 0.75, 1.0]
    train.add_ratios(rows[:1])
    assert rows[0]["ratio"] is None


def test_accelerator_row_on_cpu():
    row = time_accelerator("llama3_2_1b", 2, 2, None, length=32, peak_tflops=1.0, **TINY_LLAMA)
    config = known_model("llama3_2_1b", **TINY_LLAMA)
    assert row["tokens_per_second"] == pytest.approx(64 / row["seconds_per_step"])
    assert row["mfu"] * 1e12 == pytest.approx(row["tokens_per_second"] * train_flops(config, 32))


def test_missing_peers_leave_ours(monkeypatch, capsys):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert train.available(["jax", "torch", "torch_compile"]) == ["jax"]
    assert "lm-lifecycle[peers]" in capsys.readouterr().err
    refuses(lambda: train.available(["torch"]), "no contender", error=BenchmarkError)


def test_all_kernels_and_the_step_on_a_cpu(tmp_path):
    path = tmp_path / "kernels.json"
    out, err = run(f"kernels --sizes=tiny --rounds=1 --format=json --json={path}")
    report = json.loads(path.read_text())
    assert json.loads(out) == report and "round 1/1" in err
    assert {row["contender"] for row in report["attention"]} == {"flash", "blocked"}
    for row in report["attention"]:
        assert "error" not in row
        # bfloat16 keeps eight bits: its rounding shows, and nothing much larger.
        assert all(1e-4 < error < 2e-2 for error in row["max_errors"].values()), row
        case = Case(**{f.name: row[f.name] for f in dataclasses.fields(Case)})
        assert row["both_tflops"] * row["both_seconds"] == pytest.approx(3.5e-12 * case.flops)
    (paged,), (step,) = report["paged"], report["train"]
    assert paged["max_error"] < 2e-2 and paged["of_copy"] > 0
    rate = SIZES["tiny"].num_tokens / step["seconds_per_step"]
    assert step["tokens_per_second"] == pytest.approx(rate)
    assert step["peak_bytes"] > 50e6 and 0 < step["loss"] < 5
    assert report["environment"]["versions"]["jax"]
    assert report["environment"]["command"].startswith("python -m experiments.benchmark kernels --")
    lines = kernels.tables(report).splitlines()
    for row in (*report["attention"], paged):
        begin = f"| {row['case']} | {row['contender']} |"
        assert sum(line.startswith(begin) for line in lines) == 1


def test_work_is_that_of_the_mask():
    case = Case(40, 2, 4, 2, 8, num_documents=3, window=7)
    positions, segments = case.rows()
    seen = mask(View(positions, positions, segments, segments), Scores(1.0, window=7))
    assert case.flops == 4 * 8 * 4 * int(np.sum(seen))
    assert len(np.unique(segments)) == 3


def test_a_wrong_kernel_shows(tmp_path):
    case = dataclasses.replace(kernels.cases("tiny")[0], length=64)
    path = str(tmp_path / "expected.npz")
    kernels_contenders.expected(case, path)
    right = kernels_contenders.JaxContender("reference", case).results(case.sample)
    assert max(kernels_contenders.errors(case, right, path).values()) < 2e-2
    wrong = [right[0], right[1], right[2][:, ::-1], right[3]]
    found = kernels_contenders.errors(case, wrong, path)
    assert found["dk"] > 0.1 and found["dv"] < 2e-2


def test_others_go_on_without_a_contender_that_fails_or_hangs():
    case = dataclasses.asdict(kernels.cases("tiny")[0])
    with Worker("kernels", "cudnn", 200, harness.ON_CPU) as worker:
        # There is no cuDNN on a CPU; the process lives on and says so.
        failed = worker.ask("open", case=case)
        assert "error" in failed and not worker.lost
        taken = harness.interleaved([worker], 3, lambda w: w.ask("open", case=case))
        assert taken == {"cudnn": [failed]}  # not asked again
        worker.timeout = 0.01
        hung = worker.ask("expect", case=case, path=os.devnull)
        assert "no answer for" in hung["error"]
        assert worker.ask("time", what="both", repeats=1) == hung
    table = kernels.tables({"attention": [{"case": "x", "contender": "cudnn"} | hung]})
    assert "| x | cudnn | no answer for" in table
    with Worker("train", "jax", None, harness.ON_CPU) as worker:
        size = dataclasses.asdict(Size(32, 2, 4, 3, 64, 128, 2, 16))
        demand = functools.partial(worker.demand, size=size, precision="float32", remat=None)
        words = "jax failed: ", "num_kv_heads=3 does not divide"
        refuses(lambda: demand("open"), *words, error=BenchmarkError)


def test_contenders_go_first_in_turn():
    workers = [type("W", (), {"name": name})() for name in "abc"]
    order = []
    harness.interleaved(workers, 3, lambda w: order.append(w.name) or {})
    assert "".join(order) == "abcbcacab"


ERRORS = {
    "train --sizes=huge --contenders=jax": "--sizes=huge: use some of tiny, small, large",
    "train --parts=paged": "Unknown command line flag 'parts'.*",
    "evaluate": "no benchmark 'evaluate'; use one of train, kernels, generate",
    "kernels --sizes=large": "--sizes=large: kernels have tiny or full",
    "kernels --sizes=full": "--sizes=full needs an accelerator, .*; use --sizes=tiny",
    "kernels --contenders=mosaic_gpu": "--contenders=mosaic_gpu: use some of flash, blocked",
    "kernels --json=/nowhere/x.json": "--json=.*: there is no folder /nowhere.*",
    "generate": "no model; give a .gguf file .*",
}


def test_errors():
    done = calls_apart("benchmark", [arguments.split() for arguments in ERRORS])
    for each, message in zip(done, ERRORS.values(), strict=True):
        error = printed(each, status=2)
        assert re.fullmatch(f"error: {message}\n", error), error
