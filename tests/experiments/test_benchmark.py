"""The benchmark: its processes, its arithmetic, its errors."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.benchmark import train as benchmark
from experiments.benchmark.train_contenders import SIZES, Size
from lm.model import train_flops
from lm.model.known import known_model

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_ours_alone_as_json():
    result = run(
        "train", "--sizes=tiny", "--precisions=bfloat16", "--contenders=jax", "--rounds=2",
        "--format=json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    (row,) = report["rows"]
    assert row["tokens_per_second"] == pytest.approx(
        SIZES["tiny"].num_tokens / row["seconds_per_step"]
    )
    assert row["ratio"] is None
    assert row["peak_bytes"] > 50e6
    assert 0 < row["loss"] < 5
    assert report["environment"]["versions"]["jax"]
    assert "round 2/2" in result.stderr


@pytest.mark.oracle
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the peers extra",
)
def test_against_torch():
    result = run("train", "--sizes=tiny", "--precisions=float32", "--contenders=jax,torch",
                 "--rounds=3")  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:-1] for line in result.stdout.splitlines() if "| tiny |" in line]
    assert [row[2].strip() for row in rows] == ["jax", "torch"]
    assert float(rows[1][5]) == 1.0
    # Both train: repeating one batch brings each below the loss of a uniform guess.
    assert all(float(row[-1]) < math.log(SIZES["tiny"].vocab_size) for row in rows)


def test_ratio_is_to_the_fastest_peer():
    rows = [
        {"contender": "jax", "seconds_per_step": 2.0},
        {"contender": "torch", "seconds_per_step": 4.0},
        {"contender": "torch_compile", "seconds_per_step": 3.0},
    ]
    benchmark.add_ratios(rows)
    assert [row["ratio"] for row in rows] == [1.5, 0.75, 1.0]


def test_a_worker_that_fails_is_told_of():
    with pytest.raises(benchmark.BenchmarkError, match="num_kv_heads=3 does not divide"):
        benchmark.Worker("jax", Size(32, 2, 4, 3, 64, 128, 2, 16), "float32", None)


def test_accelerator_row_on_cpu():
    row = benchmark.time_accelerator(
        "llama3_2_1b", 2, 32, "full", None, 2, 1.0,
        vocab_size=128, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=64,
    )  # fmt: skip
    config = known_model(
        "llama3_2_1b", vocab_size=128, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2,
        hidden_dim=64,
    )  # fmt: skip
    assert row["tokens_per_second"] == pytest.approx(64 / row["seconds_per_step"])
    flops = row["tokens_per_second"] * train_flops(config, 32)
    assert row["mfu"] == pytest.approx(flops / 1e12)


def test_missing_peers_leave_ours(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert benchmark.available(["jax", "torch", "torch_compile"]) == ["jax"]
    assert "lm-lifecycle[peers]" in capsys.readouterr().err
    with pytest.raises(benchmark.BenchmarkError, match="no contender"):
        benchmark.available(["torch"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--sizes=huge", "--contenders=jax"), "huge.*tiny, small, large"),
        (("train", "--precisions=int3"), "int3.*float32, bfloat16"),
        (("evaluate",), "Known: train"),
    ],
)
def test_errors(arguments, message):
    result = run(*arguments)
    assert result.returncode != 0
    assert re.search(message, result.stdout + result.stderr)
    assert "Traceback" not in result.stderr
