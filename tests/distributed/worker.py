"""What tests run as one of several processes: `python -m tests.distributed.worker MODE [...]`."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.distributed.collectives import barrier, broadcast, fetch, print_once
from lm.distributed.preemption import PreemptionNotice
from lm.distributed.startup import start


def loop(failing: int | None) -> None:
    """Steps with a collective in each, until an agreed step or one process's exception."""
    notice = PreemptionNotice()
    notice.install()
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    ones = np.ones(len(jax.devices()), np.float32)
    x = jax.make_array_from_callback(ones.shape, sharding, lambda index: ones[index])
    step_fn = jax.jit(lambda x: x + 1e-3 * jnp.sum(x), out_shardings=sharding)
    for step in range(10**6):
        x = step_fn(x).block_until_ready()
        if step == 5:
            print("READY", flush=True)
        if step == 10 and jax.process_index() == failing:
            raise FloatingPointError("the loss of step 10 is nan")
        if notice.agreed(step):
            print(f"AGREED {step}", flush=True)
            sys.exit(PreemptionNotice.EXIT)
        time.sleep(0.02)


def exchange() -> None:
    """Barriers, a broadcast of values of several sizes, and printing once."""
    me = jax.process_index()
    barrier("first")
    values = [None, {"step": 3, "name": "ä" * 2000}, list(range(5000)), ""]
    for value in values:
        received = broadcast(value if me == 0 else "not this")
        print("RECEIVED", json.dumps(received == value), flush=True)
    print_once("SAID by", me)


def train_once(path: pathlib.Path) -> None:
    """Metrics and gradients of one step, and held-out loss, written by process 0."""
    from lm.data.batches import Batches, HeldOut
    from lm.data.packed import pack_source
    from lm.data.sources import ArraySource, Document
    from lm.sharding import MeshShape, named_sharding
    from lm.train.state import init_state
    from lm.train.step import make_eval_step
    from lm.weights import path_name
    from tests.train import tiny

    rng = np.random.default_rng(0)
    source = ArraySource.from_documents(
        Document(rng.integers(0, tiny.UNTIED.vocab_size, n, dtype=np.int32), int(n))
        for n in rng.integers(2, 40, 60)
    )
    packed = pack_source(source, 16, name="text")
    case = tiny.Case(mesh=MeshShape(fsdp=4, tensor=2))
    layout = case.layout
    rows = named_sharding(layout.mesh, layout.rules.activations, ("batch", "sequence"))
    optimizer = tiny.keep_gradients()
    state = init_state(tiny.param_specs(case.config), optimizer, jax.random.key(0), layout)
    evaluate = make_eval_step(tiny.OBJECTIVE, layout, case.gradient)
    held_out = HeldOut(packed, 8)
    terms = [
        evaluate(state.params, held_out.device_batch(i, rows))["loss"] for i in range(len(held_out))
    ]
    state, metrics = tiny.compiled_step(case)(
        state, Batches([packed], 16, seed=3).device_batch(2, rows)
    )
    numbers: dict[str, Any] = {name: np.float32(value) for name, value in metrics.items()}
    numbers["held_out"] = np.float64(sum(float(term.sum) for term in terms) / held_out.num_pairs)
    for key, gradient in jax.tree_util.tree_leaves_with_path(fetch(state.opt_state)):
        numbers["gradient/" + path_name(key)] = gradient
    if jax.process_index() == 0:
        np.savez(path, **numbers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["loop", "train"])
    parser.add_argument("--failing", type=int)
    parser.add_argument("--path", type=pathlib.Path)
    parser.add_argument("--timeout", type=float, default=30.0)
    args = parser.parse_args()
    with start(timeout=args.timeout, start_timeout=240.0):
        if args.mode == "loop":
            exchange()
            loop(args.failing)
        else:
            train_once(args.path)
    print("END", flush=True)


if __name__ == "__main__":
    main()
