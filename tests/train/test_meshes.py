"""Every layout computes the step of one device: the loss, and the gradient of every weight."""

import pytest

from lm.sharding import MeshShape
from tests.train import test_collectives
from tests.train.tiny import TIED, UNTIED, Case, assert_same, run

FSDP8, TENSOR8 = MeshShape(fsdp=8), MeshShape(tensor=8)
ALL = MeshShape(data=2, fsdp=2, tensor=2)

CASES = [
    Case(MeshShape(data=8), zero=0, config=TIED),
    Case(MeshShape(data=8), zero=0, num_micro_batches=2, loss="reference"),
    *[Case(FSDP8, zero=zero) for zero in (0, 1, 2, 3)],
    Case(FSDP8, zero=1, num_micro_batches=2),
    Case(FSDP8, zero=2, num_micro_batches=2),
    Case(FSDP8, zero=3, num_micro_batches=2, config=TIED, loss="reference"),
    Case(MeshShape(data=2, fsdp=4), zero=2, config=TIED),
    *[Case(MeshShape(data=2, fsdp=4), zero=zero, zero_axes=("fsdp", "data")) for zero in (1, 2, 3)],
    Case(ALL, config=TIED, num_micro_batches=2, zero_axes=("data", "fsdp")),
    Case(MeshShape(fsdp=2, context=4), zero_axes=("fsdp", "context")),
    Case(MeshShape(fsdp=2, expert=4), config=TIED),  # dense layers split the batch over experts
    Case(MeshShape(data=2, tensor=4), config=TIED),
    Case(MeshShape(data=2, tensor=4), sequence_parallel=True, loss="reference"),
    Case(TENSOR8, config=TIED, loss="reference"),
    Case(TENSOR8, sequence_parallel=True),
    Case(TENSOR8, sequence_parallel=True, num_micro_batches=4, config=TIED),
    Case(MeshShape(fsdp=4, tensor=2), zero=3, sequence_parallel=True, remat="full"),
    *[Case(ALL, zero=zero, num_micro_batches=2, config=TIED) for zero in (0, 1, 2)],
    Case(ALL, zero=3),
    Case(ALL, zero=3, sequence_parallel=True),
    Case(ALL, zero=3, sequence_parallel=True, num_micro_batches=4, config=TIED),
    Case(ALL, zero=2, sequence_parallel=True, num_micro_batches=2, loss="reference"),
]
# Each axis, stage of ZeRO and way to compute in some case: programs whose collectives are looked at
# as well, and these.
DRAWN = {
    Case(MeshShape(data=8), zero=0, num_micro_batches=2, loss="reference"),
    Case(MeshShape(fsdp=2, context=4), zero_axes=("fsdp", "context")),
    Case(MeshShape(fsdp=2, expert=4), config=TIED),
    Case(ALL, zero=2, sequence_parallel=True, num_micro_batches=2, loss="reference"),
} | set(test_collectives.CASES)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in DRAWN else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_equals_one_device(case):
    # One device, one micro-batch, the logits held whole: `test_step` compares it with plain JAX.
    assert case.config in (TIED, UNTIED)
    assert_same(run(case), run(Case(config=case.config, loss="reference")), 2e-5)
