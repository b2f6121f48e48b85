"""Who takes part in the benchmark of the training step; each is built in a process of its own.

Neither JAX nor PyTorch is imported before its contender is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

CONTENDERS = ("jax", "torch", "torch_compile")
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama and its batch."""

    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    vocab_size: int
    batch_size: int
    length: int

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.length


SIZES = {
    "tiny": Size(32, 2, 4, 2, 64, 128, 2, 16),
    "small": Size(256, 6, 4, 2, 704, 4096, 16, 256),
    "large": Size(512, 8, 8, 4, 1408, 8192, 4, 512),
}


def token_ids(size: Size) -> Any:
    """The batch everyone reads: int64 [B, T]."""
    numpy = importlib.import_module("numpy")
    rng = numpy.random.default_rng(0)
    return rng.integers(0, size.vocab_size, (size.batch_size, size.length))


def jax_worker(size: Size, precision: str, options: dict[str, Any]) -> tuple[Callable, dict]:
    """(a function that does a step and returns the loss, facts about the contender)."""
    from lm.model.families import make_config

    config = make_config(
        "llama",
        vocab_size=size.vocab_size,
        embed_dim=size.embed_dim,
        hidden_dim=size.hidden_dim,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        max_length=size.length,
    )
    remat = options.get("remat") or "none"
    step, num_parameters, _ = make_jax_step(config, token_ids(size), precision, remat)
    return step, {"num_parameters": num_parameters, "remat": remat}


def make_jax_step(
    config: Any, ids: Any, precision: str, remat: str, attention: str | None = None
) -> tuple[Callable[[], float], int, float]:
    """(a step of training on one batch of ids [B, T], number of parameters, seconds to compile)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lm.kernels.attention import attention as attend
    from lm.model import num_params, param_specs
    from lm.sharding import Layout, MeshShape, make_mesh, make_rules
    from lm.train.accumulation import Accumulation
    from lm.train.objective import NextToken
    from lm.train.optimizers import AdamW, make_optimizer
    from lm.train.state import init_state
    from lm.train.step import make_train_step

    layout = Layout(make_mesh(MeshShape()), make_rules())
    optimizer = make_optimizer(AdamW(B1, B2, EPS, WEIGHT_DECAY))
    function = None if attention is None else functools.partial(attend, implementation=attention)
    gradient = Accumulation(
        config, 1, jnp.dtype(precision), remat, attention=function,
        unroll=jax.default_backend() == "cpu",
    )  # fmt: skip
    step = make_train_step(
        NextToken(), optimizer, lambda step: jnp.float32(LEARNING_RATE), layout, gradient,
        max_grad_norm=MAX_GRAD_NORM,
    )  # fmt: skip
    state = init_state(param_specs(config), optimizer, jax.random.key(0), layout)
    rows, length = ids.shape
    weights = np.ones((rows, length), np.float32)
    weights[:, -1] = 0  # the last token of a row has no target
    batch = {
        "ids": ids.astype(np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "targets": np.roll(ids, -1, axis=1).astype(np.int32),
        "weights": weights,
    }
    batch = jax.device_put(batch, layout.mesh.devices.flat[0])
    before = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - before

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run, num_params(config), seconds


def torch_worker(size: Size, precision: str, options: dict[str, Any]) -> tuple[Callable, dict]:
    """As `jax_worker`, for PyTorch at its best: SDPA, and the faster of its two quick AdamWs."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.embed_dim,
        intermediate_size=size.hidden_dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).train()
    call = torch.compile(model) if options["compile"] else model
    ids = torch.from_numpy(token_ids(size))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]

    def make(kind: str) -> Any:
        return torch.optim.AdamW(
            [dict(group) for group in groups],
            lr=LEARNING_RATE, betas=(B1, B2), eps=EPS, weight_decay=WEIGHT_DECAY, **{kind: True},
        )  # fmt: skip

    def gradient() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        return loss

    gradient()
    seconds = {}
    for kind in ("fused", "foreach"):
        trial = make(kind)
        trial.step()
        before = time.perf_counter()
        trial.step()
        seconds[kind] = time.perf_counter() - before
    best = min(seconds, key=lambda kind: seconds[kind])
    del trial
    optimizer = make(best)
    optimizer.zero_grad(set_to_none=True)

    def run() -> float:
        loss = gradient()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    count = sum(p.numel() for p in model.parameters())
    return run, {"num_parameters": count, "optimizer": best, "threads": torch.get_num_threads()}


def peak_bytes() -> int:
    """The largest resident size this process ever had."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def work(contender: str, commands: TextIO, answers: TextIO) -> None:
    """A contender's process: builds its step, then does one whenever a line asks for it."""

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    case = json.loads(commands.readline())
    size, precision, options = Size(**case["size"]), case["precision"], case["options"]
    try:
        if contender == "jax":
            from lm.run.process import keep_freed_memory

            keep_freed_memory()
            step, facts = jax_worker(size, precision, options)
        else:
            compiled = contender == "torch_compile"
            step, facts = torch_worker(size, precision, options | {"compile": compiled})
        for _ in range(2):
            step()
    except Exception as error:  # told to the parent, which goes on without this contender
        answer(error=f"{type(error).__name__}: {error}"[:400])
        return
    answer(**facts)
    for _ in commands:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        answer(seconds=wall, cpu_seconds=cpu, loss=loss, peak_bytes=peak_bytes())
