"""The benchmark of the kernels, end to end on a CPU; its arithmetic; contenders that fail."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments.benchmark import kernel_contenders
from experiments.benchmark import kernels as benchmark_kernels
from experiments.benchmark.kernel_contenders import Case
from lm.kernels.attention import View
from lm.kernels.attention.reference import mask

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", "kernels", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_all_parts_on_a_cpu(tmp_path):
    path = tmp_path / "kernels.json"
    result = run("--sizes=tiny", "--rounds=1", f"--json={path}")
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    assert {row["contender"] for row in report["attention"]} == {"flash", "blocked"}
    for row in report["attention"]:
        assert "error" not in row
        # bfloat16 keeps eight bits: its rounding shows, and nothing much larger.
        assert all(1e-4 < error < 2e-2 for error in row["max_errors"].values()), row
        case = Case(**{f.name: row[f.name] for f in dataclasses.fields(Case)})
        assert row["both_tflops"] * row["both_seconds"] == pytest.approx(3.5e-12 * case.flops)
    (paged,) = report["paged"]
    assert paged["max_error"] < 2e-2
    assert paged["of_copy"] > 0
    (train,) = report["train"]
    assert train["tokens_per_second"] > 0
    assert report["environment"]["versions"]["jax"]
    lines = result.stdout.splitlines()
    assert len([line for line in lines if "| flash |" in line]) == 2
    for row in (*report["attention"], paged):
        assert any(line.startswith(f"| {row['case']} | {row['contender']} |") for line in lines)


def test_work_is_that_of_the_mask():
    case = Case(40, 2, 4, 2, 8, num_documents=3, window=7)
    positions, segments = case.rows()
    seen = mask(View(positions, positions, segments, segments), True, 7)
    assert case.flops == 4 * 8 * 4 * int(np.sum(seen))
    assert len(np.unique(segments)) == 3


def test_a_wrong_kernel_shows(tmp_path):
    case = dataclasses.replace(benchmark_kernels.cases("tiny")[0], length=64)
    path = str(tmp_path / "expected.npz")
    kernel_contenders.expected(case, path)
    contender = kernel_contenders.JaxContender("reference", case)
    right = contender.results(case.sample)
    assert max(kernel_contenders.errors(case, right, path).values()) < 2e-2
    wrong = [right[0], right[1], right[2][:, ::-1], right[3]]
    found = kernel_contenders.errors(case, wrong, path)
    assert found["dk"] > 0.1 and found["dv"] < 2e-2


def test_others_go_on_without_one_that_cannot_dies_or_hangs():
    case = benchmark_kernels.cases("tiny")[0]
    worker = benchmark_kernels.Worker("cudnn", timeout=200)
    try:
        # There is no cuDNN on a CPU; the process lives on and says so.
        answer = worker.ask(do="open", case=dataclasses.asdict(case))
        assert "error" in answer and not worker.lost
        worker.timeout = 0.01
        hung = worker.ask(do="expect", case=dataclasses.asdict(case), path=os.devnull)
        assert "no answer for" in hung["error"]
        assert worker.ask(do="time", what="both", repeats=1) == hung
    finally:
        worker.close()
    row = {"case": "x", "contender": "cudnn"} | hung
    assert "| x | cudnn | no answer for" in benchmark_kernels.tables({"attention": [row]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes=large",), "--sizes=large: kernels have tiny or full"),
        (("--sizes=full",), "needs an accelerator, JAX has a CPU; use --sizes=tiny"),
        (("--parts=matmul",), "--parts=matmul: use some of attention, paged, train"),
        (("--contenders=mosaic_gpu",), "--contenders=mosaic_gpu: use some of flash, blocked"),
        (("--json=/nowhere/x.json",), "there is no folder /nowhere"),
    ],
)
def test_errors(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr), result.stderr
