"""Programs compiled for topologies: what is sent, held and computed, and how it is reported."""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable

import pytest

from experiments import aot
from experiments.configs.aot import CONFIGS
from lm.aot.answer import FIGURES, answer, table
from lm.aot.figures import PUBLISHED, asked_flops, calibration, chip_for, group_links, model_flops
from lm.aot.programs import bytes_per_device, compile_program, make_program
from lm.aot.question import Aot
from lm.aot.search import REMATS, candidates, first, machine_of, nothing_fits, remedies
from lm.config import command_line as config_lib
from lm.hardware import topologies
from lm.hardware.chips import CHIPS
from lm.model import train_flops
from lm.sharding import MeshShape, make_mesh
from tests.aot import aot_cases
from tests.aot.aot_cases import CASES, CONFIG, LAYERS, LENGTH, MODEL, VOCAB, WIDTH
from tests.commands import call
from tests.hardware.compilers import need
from tests.refuses import refuses

ROOT = pathlib.Path(__file__).resolve().parents[2]
ORACLE = ROOT.parent / "shared" / "oracles" / "aot" / "hlo_census.py"
SLOW = {  # their axes, topologies and programs are those of others together
    "train, v5e, fsdp", "train, v5e, tensor", "train, v6e, two axes", "prefill, v6e, tensor",
    "prefill, h200, fsdp and tensor", "decode, h200, fsdp and tensor",
}  # fmt: skip
PROJECTIONS = 2 * (8 + 4) * 32 * WIDTH  # of a layer's attention
INNER = 3 * 768 * WIDTH
ENDS = 2 * VOCAB * WIDTH  # embedding and output


def wire(cost, op: str, axis: str, dtype: str = "bf16") -> list[float]:
    """[times, bytes] of a kind of collective."""
    found = [c for c in cost.collectives if c.op == op and c.axes == (axis,) and c.dtype == dtype]
    return [sum(c.count for c in found), sum(c.payload_bytes for c in found)]


@pytest.mark.aot
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES]
)
def test_a_program_sends_holds_and_computes_what_is_recorded(case: str) -> None:
    need(CASES[case][1])
    program, compiled = aot_cases.compiled(case)
    assert compiled.cost is not None
    golden = json.loads(aot_cases.GOLDEN.read_text())[case]
    found = aot_cases.record(case)
    again = "python -m tests.aot.aot_cases"
    assert found["peak_bytes"] <= 1.05 * golden["peak_bytes"], again
    assert found["argument_bytes"] == golden["argument_bytes"], again
    assert found["collectives"] == golden["collectives"], again
    PROPERTIES[case.split(",")[0]](program, compiled)
    reported = answer(program, compiled)
    assert reported["fits"]
    parts = {k: v for k, v in reported["bytes_per_device"].items() if k != "total"}
    assert sum(parts.values()) == pytest.approx(reported["bytes_per_device"]["total"])
    assert all(size >= 0 for size in parts.values()), parts
    assert json.loads(json.dumps(reported)) == reported
    assert "predicted" in table(reported)
    terms = reported["roofline"]
    assert reported["predicted_step_seconds"] >= max(terms["compute_seconds"], terms["hbm_seconds"])
    # It counts call-starts twice, and what hosts send between slices not at all.
    if ORACLE.exists() and not re.search("call-start|xla_megascale_runtime", compiled.text):
        agrees_with_the_oracle(program, compiled)


def trained(program, compiled) -> None:
    """Of a training step with full rematerialization."""
    cost, mesh = compiled.cost, program.layout.mesh.shape
    state = bytes_per_device([program.arguments[k] for k in ("weights", "optimizer")])
    assert compiled.memory["alias_size"] >= state  # donated, all of it
    # Nothing is computed beside what the traced program asks for, and that is the analytic count.
    (matmul, kernels), tokens = asked_flops(program), program.tokens
    assert cost.matmul_flops * program.num_devices == pytest.approx(matmul, rel=0.01)
    weights = LAYERS * (PROJECTIONS + INNER)
    not_again = LAYERS * INNER / 3  # the last product of a layer is nobody's input
    expected = tokens * (6 * weights + 3 * ENDS + 2 * (weights - not_again))
    if kernels == 0:  # blocks of 64 queries, each with all keys before its end
        pairs = 64 * sum(range(64, LENGTH + 1, 64)) * program.rows
        expected += (4 + 4 + 10) * 8 * 32 * pairs * LAYERS  # forward, again, backward
    assert matmul == pytest.approx(expected, rel=0.01)
    assert model_flops(program) == tokens * train_flops(MODEL, LENGTH)
    if mesh["tensor"] > 1 and not program.config.sharding.sequence_parallel:
        # Twice a layer each way, once again, and at the embedding and the output.
        size = program.rows // mesh["fsdp"] * LENGTH * WIDTH * 2
        assert wire(cost, "all-reduce", "tensor") == [5 * LAYERS + 2, (5 * LAYERS + 2) * size]
    if mesh["tensor"] > 1 and program.config.sharding.sequence_parallel:
        assert wire(cost, "all-reduce", "tensor")[1] < 0.01 * cost.wire_bytes
    if mesh["fsdp"] > 1:
        # In bfloat16: a layer's matrices once a pass, the ends once; every gradient scattered.
        size, t = 2 * (2 * weights + ENDS) / mesh["tensor"], mesh["tensor"]
        assert wire(cost, "all-gather", "fsdp")[1] == size
        assert wire(cost, "all-gather", "fsdp", "f32")[1] < 0.01 * cost.wire_bytes
        scattered = wire(cost, "reduce-scatter", "fsdp")[1]
        scattered += wire(cost, "all-reduce", "fsdp")[1]
        assert scattered == pytest.approx(2 * (weights + ENDS) / t, rel=0.01)
        assert wire(cost, "reduce-scatter", "fsdp")[1] > 0.9 * scattered
    if mesh["data"] > 1:  # what is left for the second axis
        gathered = 2 * weights + ENDS
        if mesh["slice"] > 1:
            # XLA sums what fsdp left over data and slice at once. libtpu makes of it a scatter, a
            # sum between slices and a gather that nobody asked for: of all but the embedding.
            gathered += weights + ENDS / 2
        assert wire(cost, "all-gather", "data")[1] == gathered * 2 / mesh["fsdp"]
        assert wire(cost, "reduce-scatter", "data")[1] == (weights + ENDS) * 2 / mesh["fsdp"]


def prefilled(program, compiled) -> None:
    """Tensor parallelism reduces twice a layer, and the embedding once."""
    mesh = program.layout.mesh.shape
    size = program.rows // mesh["fsdp"] * program.config.prompt_length * WIDTH * 2
    found = wire(compiled.cost, "all-reduce", "tensor")
    assert found == [2 * LAYERS + 1, (2 * LAYERS + 1) * size]


def decoded(program, compiled) -> None:
    """As prefill, of one token; and the cache is updated where it lies."""
    mesh = program.layout.mesh.shape
    size = program.rows // mesh["fsdp"] * WIDTH * 2
    found = wire(compiled.cost, "all-reduce", "tensor")
    assert found == [2 * LAYERS + 1, (2 * LAYERS + 1) * size]
    assert compiled.memory["alias_size"] >= bytes_per_device(program.arguments["cache"])
    assert any(trips is None for _, _, trips in compiled.cost.loops)


PROPERTIES = {"train": trained, "prefill": prefilled, "decode": decoded}


def agrees_with_the_oracle(program, compiled) -> None:
    """An independent count. It cannot read every form of replica groups, of small things."""
    spec = importlib.util.spec_from_file_location("hlo_census", ORACLE)
    assert spec is not None
    assert spec.loader is not None
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    theirs, _ = oracle.census(compiled.text, program.num_devices)
    cost = compiled.cost
    assert sum(theirs["flops"].values()) == cost.matmul_flops
    wire_bytes = sum(kind["wire"] for kind in theirs["coll"].values())
    small = sum(c.payload_bytes for c in cost.collectives if c.dtype in ("f32", "s32", "u32"))
    assert cost.wire_bytes == pytest.approx(wire_bytes, rel=0.01, abs=2 * small)


@pytest.mark.aot
def test_what_does_not_fit_comes_with_the_compilers_figures_and_what_would() -> None:
    need("v5e:2x2")
    edits = {"train.rows_per_device": "16"}
    config = config_lib.override(CONFIGS["llama3_2_1b"](), edits)
    program = make_program("train", config, "v5e:2x2")
    compiled = compile_program(program)
    reported = answer(program, compiled)
    assert not reported["fits"]
    assert "exceeds available HBM (15.7" in reported["refusal"]
    assert reported["hbm_bytes"] == pytest.approx(15.75 * 2**30, rel=0.001)
    total = reported["bytes_per_device"]["total"]
    assert total > reported["hbm_bytes"]
    assert "DOES NOT FIT" in table(reported)
    chosen = remedies("train", config, machine_of("v5e:2x2"), total)
    assert any(r["change"] == "fewer rows" for r in chosen)
    for remedy in chosen:
        assert remedy["estimated_bytes"] < reported["hbm_bytes"]
        assert all(flag.startswith("--config.") for flag in remedy["flags"])


@pytest.mark.aot
def test_a_search_considers_what_fits_and_puts_the_fastest_first() -> None:
    need("v6e:16x16")
    found = candidates("train", CONFIGS["llama3_70b"](), machine_of("v6e:16x16"))
    speeds = [c.estimate.tokens_per_second for c in found]
    assert speeds == sorted(speeds, reverse=True)
    assert all(c.estimate.total_bytes < 31.25 * 2**30 for c in found)
    assert {c.config.train.remat for c in found} <= set(REMATS)
    # A torus dimension for each axis that shares the state, as its collectives run beside the rest.
    assert found[0].config.sharding.zero_axes == ("fsdp", "data")
    chosen = first(found, 4)
    assert len({c.config.mesh for c in chosen}) >= 2
    # The flags of a candidate make it of the configuration it came from.
    edits = dict(f.removeprefix("--config.").split("=") for f in found[0].flags)
    assert config_lib.override(CONFIGS["llama3_70b"](), edits) == found[0].config


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "shape", "axes", "links"),
    [
        ("v6e:16x16", MeshShape(fsdp=256), ("fsdp",), 4),
        ("v6e:16x16", MeshShape(data=16, fsdp=16), ("fsdp",), 2),
        ("v5e:4x4", MeshShape(data=4, fsdp=4), ("fsdp",), 1),  # ends are joined from 16 on
        ("v5p:4x4x4", MeshShape(fsdp=64), ("fsdp",), 6),
        ("v5p:4x4x4", MeshShape(fsdp=16, tensor=4), ("fsdp", "tensor"), 6),
        ("h200:8", MeshShape(fsdp=8), ("fsdp",), 1),
        ("2*v5e:2x2", MeshShape(slice=2, fsdp=4), ("fsdp",), 2),
        ("2*v5e:2x2", MeshShape(slice=2, fsdp=4), ("slice",), None),  # over the network
    ],
)
def test_links_of_a_mesh_axis(topology, shape, axes, links) -> None:
    need(topology)
    devices = topologies.describe(topology)
    found, slices = group_links(axes, make_mesh(shape, devices), chip_for(devices[0]))
    assert slices == (2 if links is None else 1)
    assert links is None or found == links


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "shape"),
    [("2*v5e:2x2", MeshShape(fsdp=8)), ("v5e:4x2", MeshShape(slice=2, fsdp=4))],
)
def test_a_mesh_of_other_slices_than_there_are_is_refused(topology: str, shape: MeshShape) -> None:
    need(topology)
    devices = topologies.describe(topology)
    refuses(lambda: make_mesh(shape, devices), f"use slice={topology.startswith('2') + 1} and let")


def test_calibration_gives_the_published_utilization() -> None:
    """Causal MFU of the published steps, as worked out by hand from their logs."""
    by_name = {c.name: c for c in CHIPS}
    rows = [row for name in ("TPU v6e", "TPU v5p") for row in calibration(by_name[name])]
    assert [round(row["measured_mfu"], 3) for row in rows] == [0.404, 0.470, 0.685]
    assert len(rows) == len(PUBLISHED)
    assert all(0.4 < row["measured_over_predicted"] < 1 for row in rows)


def test_every_known_model_has_a_configuration() -> None:
    assert all(isinstance(make(), Aot) for make in CONFIGS.values())
    assert config_lib.override(CONFIG, {"optimizer": "Lion"}).optimizer != CONFIG.optimizer


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """The command as a user runs it, without the platform that these tests choose."""
    need("v5e:2x2")
    for name in ("JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        monkeypatch.delenv(name)
    return functools.partial(call, "aot")


@pytest.mark.aot
def test_a_question_that_makes_no_sense_is_one_line_and_status_2(run) -> None:
    status, out, err = run("--config=llama3_8b", "--topology=v5e:4x4", "--config.mesh.fsdp=1",
                           "--config.mesh.tensor=16")  # fmt: skip
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "does not divide num_kv_heads=8; use 1, 2, 4 or 8" in err


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "edits", "message"),
    [
        ("train", {"mesh.fsdp": "3"}, "the mesh fsdp=3 needs 3 devices, 4 present"),
        ("train", {"train.rows_per_device": "0.3"}, "gives 1.2 rows on 4 devices"),
        ("train", {"train.sequence_length": "513"}, "is not between 1 and model.max_length=512"),
        ("train", {"train.attention": "cudnn"}, "needs cuDNN and its GPU to compile; use mosaic"),
        ("train", {"train.attention": "mosaic_gpu"}, "is written for GPUs; use flash, splash"),
        ("train", {"mesh.fsdp": "2", "mesh.stage": "2"}, "the model has no pipeline; use 1"),
        ("train", {"mesh.fsdp": "2", "mesh.expert": "2"}, "has no mixture of experts; use 1"),
        ("train", {"train.num_micro_batches": "3"}, "does not divide the 4 rows of a step"),
        ("train", {"sharding.zero_axes": "tensor"}, "zero_axes"),
        ("prefill", {"serve.prompt_length": "512"}, "leaves no room in serve.cache_length=512"),
        ("prefill", {"serve.cache_length": "513"}, "is not between 1 and model.max_length=512"),
        ("prefill", {"mesh.fsdp": "2", "mesh.context": "2"}, "mesh.context=2: prefill does not"),
        ("prefill", {"train.attention": "splash"}, "is the training step's; prefill uses"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, edits, message) -> None:
    need("v5e:2x2")
    config = config_lib.override(CONFIG, edits)
    refuses(lambda: make_program(name, config, "v5e:2x2"), message)
    if "serve.prompt_length" in edits:  # which decoding does not use
        make_program("decode", config, "v5e:2x2")


@pytest.mark.aot
@pytest.mark.parametrize("mesh", [{}, {"mesh.fsdp": "1"}])
def test_what_cannot_fit_is_an_answer_with_what_it_needs(mesh) -> None:
    need("v5e:2x2")
    machine = machine_of("v5e:2x2")
    config = config_lib.override(CONFIGS["llama3_8b"](), mesh)
    assert candidates("train", config, machine) == []
    advice = nothing_fits("train", config, machine)
    assert "optimizer alone are 89.7 GiB: use more than 6 devices" in advice
    found = aot.search("train", config, "v5e:2x2", 1, [])
    assert found["fits"] is False and found["mfu"] is None and set(FIGURES) <= set(found)
    assert "use more than 6 devices" in table(found)


@pytest.mark.aot
def test_a_search_passes_over_what_does_not_divide() -> None:
    need("v5e:2x2")
    machine = machine_of("v5e:2x2")
    odd = config_lib.override(CONFIG, {"train.sequence_length": "511"})
    found = candidates("train", odd, machine)
    assert found and not any(c.config.sharding.sequence_parallel for c in found)
    for each in found[:3]:
        make_program("train", each.config, "v5e:2x2")
    odd = config_lib.override(CONFIG, {"mesh.context": "3"})
    words = "no mesh of these devices suits the question: ", "context=3"
    refuses(lambda: candidates("train", odd, machine), *words)


@pytest.mark.aot
def test_the_command_prints_one_object_on_the_last_line(run) -> None:
    status, out, err = run(
        "--config=pythia_70m", "--topology=v5e:2x2", "--program=decode", "--format=json"
    )
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["fits"] is True
    assert {name for name in FIGURES if found[name] is None} == {"refusal"}
    assert err.splitlines() == ["compiling decode for v5e:2x2 (4 devices) ..."]


def test_a_child_that_dies_is_an_answer_and_one_that_fails_is_not(
    tmp_path, monkeypatch, capfd
) -> None:
    script = tmp_path / "experiments" / "aot.py"
    script.parent.mkdir()
    monkeypatch.setattr(aot, "__file__", str(script))
    words = "F1124 18:00:48.0 1 ring.cc:3] Check failed: a < b\n    @ 0x1\n"
    script.write_text(f"import os\nos.write(2, {words.encode()!r})\nos.abort()\n")
    found = aot.ask_apart(["--config=llama3_8b"])
    assert found["refusal"] == "the compiler died: Check failed: a < b"
    assert found["fits"] is False and set(found) == set(FIGURES)
    assert "Check failed" in table(found)
    script.write_text("raise KeyError('of ours')\n")
    ask = functools.partial(aot.ask_apart, ["--config=llama3_8b"])
    refuses(ask, "failed with exit status 1", error=RuntimeError)
    assert "KeyError: 'of ours'" in capfd.readouterr().err


@pytest.mark.aot
@pytest.mark.slow
def test_a_search_ends_with_what_the_compiler_accepts(run) -> None:
    status, out, err = run("--config=pythia_70m", "--topology=v5e:2x2", "--search", "--compiled=2",
                           "--format=json")  # fmt: skip
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["fits"] and len(found["search"]["compiled"]) == 2
    speeds = [r["tokens_per_second"] for r in found["search"]["compiled"] if r["fits"]]
    assert found["tokens_per_second"] == max(speeds)
