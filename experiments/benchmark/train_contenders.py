"""Contenders of the benchmark of the training step.

Neither JAX nor PyTorch is imported before its contender is built.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import statistics
from collections.abc import Callable
from typing import Any

from experiments.benchmark.harness import Answer, BenchmarkError, say, timed

TORCH = ("torch", "transformers")
NEEDS = {"jax": (), "torch": TORCH, "torch_compile": TORCH}  # modules of each contender
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


def jax_worker(size: Size, precision: str, remat: str | None) -> tuple[Callable, Answer]:
    """(a function that does a step and returns the loss, facts about the contender)."""
    from lm.formats.families import make_config
    from lm.model import num_params
    from lm.run.process import keep_freed_memory

    keep_freed_memory()
    config = make_config(
        "llama", vocab_size=size.vocab_size, embed_dim=size.embed_dim, hidden_dim=size.hidden_dim,
        num_layers=size.num_layers, num_heads=size.num_heads, num_kv_heads=size.num_kv_heads,
        max_length=size.length,
    )  # fmt: skip
    remat = remat or "none"
    step, _ = make_jax_step(config, token_ids(size), precision, remat)
    return step, {"num_parameters": num_params(config), "remat": remat}


def make_jax_step(
    config: Any, ids: Any, precision: str, remat: str, attention: str | None = None
) -> tuple[Callable[[], float], float]:
    """(a step of training on one batch of ids [B, T], seconds to compile it)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lm.kernels.attention import attention as attend
    from lm.model import param_specs
    from lm.sharding import Layout, MeshShape, make_mesh, make_rules
    from lm.train.accumulation import Accumulation
    from lm.train.objective import NextToken
    from lm.train.optimizers import AdamW, make_optimizer
    from lm.train.state import init_state
    from lm.train.step import make_train_step

    layout = Layout(make_mesh(MeshShape(), jax.devices()[:1]), make_rules())
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
    compiled, figures = timed(lambda: step.lower(state, batch).compile())

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run, figures["seconds"]


def torch_worker(size: Size, precision: str, compiled: bool) -> tuple[Callable, Answer]:
    """As `jax_worker`, for PyTorch at its best: SDPA, and the faster of its two quick AdamWs."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.embed_dim, intermediate_size=size.hidden_dim,
        num_hidden_layers=size.num_layers, num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads, max_position_embeddings=size.length,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    call = torch.compile(model) if compiled else model
    ids = torch.from_numpy(token_ids(size))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]

    def make(kind: str) -> Any:
        return torch.optim.AdamW(
            [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
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
        seconds[kind] = timed(trial.step)[1]["seconds"]
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


def time_accelerator(
    model: str, batch_size: int, rounds: int, attention: str | None, remat: str = "full",
    length: int = 4096, peak_tflops: float | None = None, **changes: Any,
) -> Answer:  # fmt: skip
    """One model's step in bfloat16 on the first device, as a row.

    Args:
      model: a name in `lm.formats.known`.
      batch_size, length: rows of whole documents, and their tokens.
      rounds: timed steps.
      attention: implementation, see `lm.kernels.attention.attention`.
      remat: see `lm.model.remat`.
      peak_tflops: what MFU is a share of; None for the device's in `lm.hardware.chips`.
      **changes: of the model, see `known_model`.

    Raises:
      BenchmarkError: the step does not fit the device, or its peak is not known.
    """
    import jax
    import numpy as np

    from lm.formats.known import known_model
    from lm.hardware.chips import peak_flops
    from lm.model import num_params, train_flops

    device = jax.devices()[0]
    peak_tflops = peak_tflops or (peak_flops(device.device_kind) or 0) / 1e12
    if not peak_tflops:
        raise BenchmarkError(f"the peak of {device.device_kind!r} is unknown; give --peak_tflops")
    config = known_model(model, **changes)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, length))
    say(
        f"{model}: {num_params(config):,} parameters, {batch_size} x {length} tokens, remat {remat}"
    )
    try:
        step, seconds_to_compile = make_jax_step(config, ids, "bfloat16", remat, attention)
        say(f"compiled in {seconds_to_compile:.0f} s")
        loss = [step() for _ in range(2)][-1]
        seconds = []
        for i in range(rounds):
            loss, figures = timed(step)
            seconds.append(figures["seconds"])
            say(f"  step {i + 1}/{rounds}: {seconds[-1]:.3f} s, loss {loss:.3f}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise BenchmarkError(
            f"batch_size={batch_size} with remat={remat} does not fit the device; use a smaller "
            "--batch_size, or --remat=full"
        ) from error
    rate = batch_size * length / statistics.median(seconds)
    tflops = rate * train_flops(config, length) / 1e12
    return {
        "model": model, "batch_size": batch_size, "sequence_length": length, "remat": remat,
        "attention": attention, "seconds_per_step": statistics.median(seconds),
        "tokens_per_second": rate, "tflops": tflops, "mfu": tflops / peak_tflops,
        "peak_tflops": peak_tflops,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "compile_seconds": seconds_to_compile, "loss": loss,
    }  # fmt: skip


def contender(name: str) -> dict[str, Callable[..., Answer]]:
    """What a contender's process answers: `open`, which also warms up, then `step`s."""
    run: Callable[[], float] = lambda: 0.0  # noqa: E731 - until it is opened

    def open(size: dict[str, int], precision: str, remat: str | None) -> Answer:
        nonlocal run
        if name == "jax":
            run, facts = jax_worker(Size(**size), precision, remat)
        else:
            run, facts = torch_worker(Size(**size), precision, name == "torch_compile")
        for _ in range(2):
            run()
        return facts

    def step() -> Answer:
        loss, figures = timed(run)
        return figures | {"loss": loss}

    return {"open": open, "step": step, "accelerator": time_accelerator}
