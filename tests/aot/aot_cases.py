"""Small programs compiled for topologies, and what is recorded of them.

JAX_PLATFORMS=cpu python -m tests.aot.aot_cases      # records it anew
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

from lm.aot.programs import Compiled, Program, compile_program, make_program
from lm.aot.question import Aot, Name, Serve, Train
from lm.config import command_line as config_lib
from lm.formats.known import known_model

GOLDEN = pathlib.Path(__file__).with_name("aot_golden.json")
LENGTH, LAYERS, WIDTH, VOCAB = 512, 2, 256, 1024
LARGE = 4096  # bytes of collectives that are recorded: not the sampler's few numbers a row
MODEL = known_model(
    "llama3_8b", num_layers=LAYERS, embed_dim=WIDTH, num_heads=8, num_kv_heads=4, hidden_dim=768,
    vocab_size=VOCAB, max_length=LENGTH,
)  # fmt: skip
SERVE = Serve(prompt_length=256, cache_length=LENGTH)
CONFIG = Aot(MODEL, train=Train(sequence_length=LENGTH), serve=SERVE)

FSDP = {"mesh.fsdp": "4"}
TENSOR = {"mesh.fsdp": "1", "mesh.tensor": "4"}
BOTH = {"mesh.fsdp": "2", "mesh.tensor": "2"}
SEQUENCE = BOTH | {"sharding.sequence_parallel": "true"}
TWO_AXES = {"mesh.fsdp": "2", "mesh.data": "2", "sharding.zero_axes": "fsdp,data"}
RINGS = {"mesh.fsdp": "1", "mesh.context": "2", "mesh.tensor": "2",
         "sharding.sequence_parallel": "true", "sharding.zero_axes": "context"}  # fmt: skip
SLICES = {"mesh.slice": "2"} | TWO_AXES
GPUS = {"mesh.fsdp": "4", "mesh.tensor": "2"}
# name: (program, topology, edits of CONFIG)
CASES: dict[str, tuple[Name, str, dict[str, str]]] = {
    "train, v5e, fsdp": ("train", "v5e:2x2", FSDP),
    "train, v5e, tensor": ("train", "v5e:2x2", TENSOR),
    "train, v5e, fsdp and tensor": ("train", "v5e:2x2", BOTH),
    "train, v5e, sequence parallel": ("train", "v5e:2x2", SEQUENCE),
    "train, v5e, rings and sequence parallel": ("train", "v5e:2x2", RINGS),
    "train, two v5e, two axes": ("train", "2*v5e:2x2", SLICES),
    "train, v6e, two axes": ("train", "v6e:2x2", TWO_AXES),
    "train, h200, fsdp and tensor": ("train", "h200:8", GPUS),
    "prefill, v5e, fsdp and tensor": ("prefill", "v5e:2x2", BOTH),
    "prefill, v6e, tensor": ("prefill", "v6e:2x2", TENSOR),
    "prefill, h200, fsdp and tensor": ("prefill", "h200:8", GPUS),
    "decode, v5e, fsdp and tensor": ("decode", "v5e:2x2", BOTH),
    "decode, v6e, tensor": ("decode", "v6e:2x2", TENSOR),
    "decode, h200, fsdp and tensor": ("decode", "h200:8", GPUS),
}


@functools.cache
def compiled(case: str) -> tuple[Program, Compiled]:
    """A case's program and what the compiler made of it, once a process."""
    name, topology, edits = CASES[case]
    program = make_program(name, config_lib.override(CONFIG, edits), topology)
    return program, compile_program(program)


def record(case: str) -> dict[str, Any]:
    """What is kept of a case. Which collectives wait is a TPU's: on GPUs it differs by the hour."""
    program, found = compiled(case)
    assert found.cost is not None
    collectives: dict[str, list[float]] = {}
    for c in found.cost.collectives:
        if c.wire_bytes > 0.01 * found.cost.wire_bytes and c.payload_bytes > LARGE:
            beside = " beside" if c.is_async and program.device.platform == "tpu" else ""
            total = collectives.setdefault(f"{c.op} {'+'.join(c.axes)} {c.dtype}{beside}", [0, 0])
            total[0] += c.count
            total[1] += c.payload_bytes
    return {
        "peak_bytes": found.memory["peak_memory"],
        "argument_bytes": found.memory["argument_size"],
        "collectives": collectives,
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({case: record(case) for case in CASES}, indent=1) + "\n", "utf-8")
