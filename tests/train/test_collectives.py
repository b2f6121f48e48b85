"""The collectives of the compiled step are those its layout needs.

First what can be reasoned about each layout, then golden lists that hold everything else still.
Goldens are kept by version of JAX, as XLA's choices change; add a version, or accept a change:

    python tests/train/test_collectives.py --regenerate

XLA's CPU backend does not make reduce-scatters out of all-reduces whose results are split, as
others do: gradients show as all-reduces here, but for those the fused cross-entropy asks for.
"""

# ruff: noqa: E402

import functools
import json
import math
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # the path and the devices that pytest would have set up
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))

import jax
import pytest

from lm.model import param_specs
from lm.sharding import MeshShape
from tests.train.hlo import collectives, summary
from tests.train.tiny import TIED, UNTIED, Case, compiled_step

GOLDEN = pathlib.Path(__file__).with_name("golden_collectives.json")
FSDP8, TENSOR8 = MeshShape(fsdp=8), MeshShape(tensor=8)
ALL = MeshShape(data=2, fsdp=2, tensor=2)
TWO_AXES = Case(MeshShape(data=2, fsdp=4), zero_axes=("fsdp", "data"))
CASES = [
    Case(),
    Case(MeshShape(data=8), zero=0),
    *[Case(FSDP8, zero=zero) for zero in (1, 2, 3)],
    Case(FSDP8, zero=3, remat="full"),
    Case(FSDP8, zero=2, num_micro_batches=2),
    TWO_AXES,
    Case(MeshShape(data=2, tensor=4), config=TIED),
    Case(TENSOR8, config=TIED, loss="reference"),
    Case(TENSOR8, sequence_parallel=True),
    Case(ALL, zero=3, sequence_parallel=True),
    Case(ALL, zero=3, sequence_parallel=True, num_micro_batches=4, config=TIED),
]
# Whole weights as one device multiplies them, layers apart: the sizes a gathered weight has.
SPECS = jax.tree.leaves(param_specs(UNTIED))
MATRICES = {s.shape[-2:] for s in SPECS if len(s.shape) - (s.axes[0] == "layers") == 2}
SCALARS = 4 * 40  # bytes: sums of loss, counts and norms


@functools.cache
def found(case: Case):
    return collectives(compiled_step(case).as_text(), case.layout.mesh)


def of(case: Case, op: str, *axes: str):
    return [c for c in found(case) if c.op == op and (not axes or c.axes == axes)]


def matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n > 1)


def test_one_device_talks_to_nobody():
    assert found(Case()) == []


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_of_micro_batches_are_reduced_once(zero):
    """As many bytes for four micro-batches as for one, and none of them in their loop."""

    def reduced(num: int) -> int:
        case = Case(MeshShape(data=2, fsdp=2), zero=zero, num_micro_batches=num, loss="reference")
        large = [c for c in of(case, "all-reduce") if c.num_bytes > 1024]  # matrices
        assert not num - 1 or not any(c.loops for c in large), large
        # A layer's gradient, in the loop over the layers, is sent once per layer.
        layers = UNTIED.num_layers
        return sum(c.num_bytes * (layers if c.loops else 1) for c in large)

    assert reduced(4) == reduced(1) > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_moved_about_for_want_of_a_sharding(case):
    """All-to-alls, permutes and groups within an axis are XLA mending shardings that disagree."""
    large = {axis for axis, size in case.layout.mesh.shape.items() if size > 1}
    for c in found(case):
        assert c.op not in ("all-to-all", "collective-permute"), c
        assert c.axes and set(c.axes) <= large, c


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_gradients_are_moved_over_data(case):
    """Over `data`, alone or with others, nothing is gathered; what is summed is a gradient."""
    for c in found(case):
        if "data" in c.axes and case is not TWO_AXES:
            assert c.op in ("all-reduce", "reduce-scatter"), c


def test_data_parallelism_sums_each_gradient_once():
    case = Case(MeshShape(data=8), zero=0)
    assert {c.op for c in found(case)} == {"all-reduce"}
    # The layers' gradients are summed inside the scan's body, which is there once for both.
    shapes = [s.shape[1:] if s.axes[0] == "layers" else s.shape for s in SPECS]
    once = sum(4 * math.prod(shape) for shape in shapes)
    assert once <= sum(c.num_bytes for c in found(case)) <= once + SCALARS


@pytest.mark.parametrize("remat", ["none", "full"])
def test_zero_3_gathers_each_weight_once_a_pass(remat):
    case = Case(FSDP8, zero=3, remat=remat)
    gathered = of(case, "all-gather")
    assert {matrix(c.shape) for c in gathered} == MATRICES
    layers = [c for c in gathered if c.loops == 1]
    # Seven matrices a layer; recomputing the layer takes them again on the way back.
    assert len(layers) == (7 if remat == "none" else 14)
    assert len(gathered) - len(layers) in (2, 3)  # embedding; output, in one pass or both
    for c in of(case, "all-reduce", "fsdp"):
        assert len(matrix(c.shape)) < 2 or matrix(c.shape) in MATRICES, c


def test_two_axes_are_gathered_and_scattered_one_at_a_time():
    large = [c for c in found(TWO_AXES) if c.num_bytes > SCALARS]
    assert {c.axes for c in large} == {("data",), ("fsdp",)}
    gathered = {axis: of(TWO_AXES, "all-gather", axis) for axis in ("data", "fsdp")}
    assert {matrix(c.shape) for c in gathered["fsdp"]} == MATRICES
    assert len(gathered["data"]) == len(gathered["fsdp"])  # a quarter of each, first


@pytest.mark.parametrize("zero", [1, 2])
def test_zero_1_and_2_gather_updated_weights_after_the_loops(zero):
    gathered = of(Case(FSDP8, zero=zero), "all-gather")
    assert len(gathered) == 9  # each stacked matrix once, the embedding, the output
    assert all(c.loops == 0 for c in gathered)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.mesh.tensor > 1 and not c.sequence_parallel], ids=str
)
def test_tensor_parallelism_gathers_nothing(case):
    assert not of(case, "all-gather")


@pytest.mark.parametrize("case", [c for c in CASES if c.mesh.tensor > 1], ids=str)
def test_tensor_parallelism_moves_activations_never_weights(case):
    batch, length, width = 16 // (case.mesh.data * case.mesh.fsdp), 16, UNTIED.embed_dim
    activation = 4 * batch * length * width // case.num_micro_batches
    for c in found(case):
        if "tensor" in c.axes:
            assert c.num_bytes <= activation, c
            assert matrix(c.shape) not in MATRICES, c


def test_sequence_parallelism_gathers_before_blocks_only():
    case = Case(TENSOR8, sequence_parallel=True)
    inside = [c for c in of(case, "all-gather") if c.loops]
    assert len(inside) == 4  # before each of two blocks, and of each's gradient
    assert {c.shape for c in inside} == {(16, 16, 32)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    golden = json.loads(GOLDEN.read_text()).get(jax.__version__)
    if golden is None:
        pytest.skip(f"no golden collectives for jax {jax.__version__}; see the file's docstring")
    assert summary(found(case)) == golden[str(case)]


def regenerate() -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden[jax.__version__] = {str(case): summary(found(case)) for case in CASES}
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    print(f"wrote {len(CASES)} layouts for jax {jax.__version__} to {GOLDEN}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit("usage: python tests/train/test_collectives.py --regenerate")
    regenerate()
