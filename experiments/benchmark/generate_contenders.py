"""Contenders of the benchmark of generation.

Each is made from a GGUF file, and gives a function `generate(batch, new, length) -> None` that
continues `batch` prompts of `length` tokens by `new` each, greedily, with ends of sequence ignored.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

from experiments.benchmark.harness import Answer, per_call, timed

Generate = Callable[[int, int, int], None]
MAX_LENGTH = 1024  # positions of the context
SLOTS = 16  # rows llama.cpp runs at once; more wait


def prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """The prompts everyone reads."""
    numpy = importlib.import_module("numpy")
    rows = numpy.random.default_rng(0).integers(10, min(vocab_size, 40_000), (batch, length))
    return rows.tolist()


def ours(path: pathlib.Path, dtype: str, keep_quantized: bool = False) -> tuple[Generate, dict]:
    import jax
    import jax.numpy as jnp

    from lm.formats import load_pretrained
    from lm.infer import Request
    from lm.infer.generate import LocalSampler
    from lm.infer.serving import serving_form

    opened = load_pretrained(path, dtype=jnp.dtype(dtype), keep_quantized=keep_quantized)
    params = serving_form(opened.params, jnp.dtype(dtype), donate=True)
    samplers: dict[int, LocalSampler] = {}

    def generate(batch: int, new: int, length: int) -> None:
        if batch not in samplers:
            samplers[batch] = LocalSampler(
                params, opened.config, eos_ids=(), max_batch=batch, max_length=MAX_LENGTH,
                dtype=jnp.dtype(dtype),
            )  # fmt: skip
        rows = prompts(batch, length, opened.config.vocab_size)
        requests = [Request(prompt=row, max_new_tokens=new) for row in rows]
        samplers[batch].sample(requests)

    return generate, {"weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params))}


def transformers(path: pathlib.Path, dtype: str, blocks: bool = False) -> tuple[Generate, dict]:
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("transformers")
    model = library.AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        dtype=getattr(torch, dtype),
        gguf_file=path.name,
        quantization_config=library.GgufConfig(dequantize=not blocks),
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    vocab_size = model.config.vocab_size

    def generate(batch: int, new: int, length: int) -> None:
        ids = torch.tensor(prompts(batch, length, vocab_size))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
        assert out.shape[1] == length + new, out.shape

    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return generate, {"weight_bytes": sum(held.values())}


def llamacpp(path: pathlib.Path) -> tuple[Generate, dict]:
    library: Any = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = SLOTS * MAX_LENGTH, SLOTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.verbosity, params.cache_prompt = 0, False
    server = library.Server(params)

    def one(row: list[int], new: int) -> None:
        asked = {"prompt": row, "n_predict": new, "temperature": 0.0, "ignore_eos": True,
                 "cache_prompt": False}  # fmt: skip
        reply = server.handle_completions(asked)
        usage = reply.get("usage", {"completion_tokens": reply.get("tokens_predicted")})
        assert usage["completion_tokens"] == new, reply

    def generate(batch: int, new: int, length: int) -> None:
        rows = prompts(batch, length, 40_000)
        with concurrent.futures.ThreadPoolExecutor(batch) as threads:
            list(threads.map(lambda row: one(row, new), rows))

    return generate, {"weight_bytes": path.stat().st_size}


CONTENDERS: dict[str, Callable[[pathlib.Path], tuple[Generate, dict]]] = {
    "ours_float32": lambda path: ours(path, "float32"),
    "ours_bfloat16": lambda path: ours(path, "bfloat16"),
    "ours_blocks": lambda path: ours(path, "float32", keep_quantized=True),
    "transformers_float32": lambda path: transformers(path, "float32"),
    "transformers_bfloat16": lambda path: transformers(path, "bfloat16"),
    "transformers_blocks": lambda path: transformers(path, "float32", blocks=True),
    "llamacpp": llamacpp,
}
TORCH = ("torch", "transformers")
LIBRARIES = {"transformers": TORCH, "llamacpp": ("xllamacpp",)}
NEEDS = {name: LIBRARIES.get(name.partition("_")[0], ()) for name in CONTENDERS}


def contender(name: str) -> dict[str, Callable[..., Answer]]:
    """What a contender's process answers: `open` once, then `generate`."""
    opened: list[Generate] = []

    def open(path: str) -> Answer:
        (function, facts), figures = timed(lambda: CONTENDERS[name](pathlib.Path(path)))
        opened.append(function)
        load = {"load_seconds": figures["seconds"], "load_peak_bytes": figures["peak_bytes"]}
        return facts | load

    def generate(batch: int, new: int, length: int) -> Answer:
        return timed(lambda: opened[0](batch, new, length))[1]

    return {"open": open, "generate": generate}


def bandwidth() -> float:
    """Bytes per second that a sum over 256 MB reads, the best of ten."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1 << 26,), jnp.float32)
    total = jax.jit(jnp.sum).lower(x).compile()
    return x.nbytes / min(per_call(lambda: total(x), 1, jax.block_until_ready) for _ in range(10))
