"""The end of a pre-training run: baselines, samples, `summary.json`, and the report."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.configs.pretrain import Pretrain
from lm.data.batches import HeldOut
from lm.data.corpus import Corpus
from lm.data.ngram import ByteNgram
from lm.distributed.collectives import print_once
from lm.files.base import replacing
from lm.infer.generate import LocalSampler
from lm.infer.requests import Request
from lm.model import num_params, train_flops, unstack
from lm.run import metrics as metrics_lib
from lm.run import report
from lm.run.parts import Run
from lm.run.workdir import result
from lm.tokenizers.base import Tokenizer

Tree = Any
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def summarize(run: Run, config: Pretrain, corpus: Corpus, params: Tree) -> None:
    """Write `summary.json` and `report.html`, and name every file the run made.

    Args:
      run: what was trained.
      config: what it was assembled from.
      corpus: the text it was trained on.
      params: the model, in arrays that this process can read.
    """
    workdir = run.workdir
    rows = metrics_lib.read(workdir / "metrics.jsonl")
    held_out = held_out_measures(run, corpus, params, rows)
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    samples = draw_samples(config, params, run.tokenizer)
    own_text = config.data.files or config.data.sources
    summary = {
        "title": f"Pre-training on {'your' if own_text else 'local'} text",
        **({"held_out": held_out} if held_out else {}),
        "model": {
            "num_parameters": num_params(config.model),
            "layers": config.model.num_layers,
            "width": config.model.embed_dim,
            "vocabulary": config.model.vocab_size,
            "train_flops_per_token": train_flops(config.model, config.train.sequence_length),
        },
        "train": {
            "num_steps": run.num_steps,
            "loss": training_loss(rows),
            "tokens_per_second": statistics.median(speeds) if speeds else None,
        },
        "samples": samples,
        "corpus": {k: v for k, v in corpus.summary.items() if not isinstance(v, dict)},
        "environment": environment(),
        "files": files_made(workdir, corpus),
    }
    again = "make room, and give the same command again"
    with result(workdir / "summary.json", again), replacing(workdir / "summary.json") as file:
        file.write(json.dumps(summary, indent=2).encode() + b"\n")
    for sample in samples:
        print_once(f"\n--- {sample['prompt']!r} continued ---\n{sample['prompt']}{sample['text']}")
    if held_out:
        print_once(
            f"\nheld-out bits per byte: {held_out['bits_per_byte']:.3f} "
            f"(order-3 byte n-gram {held_out['ngram_bits_per_byte']:.3f}, raw text 8)"
        )
    else:
        why = f"{workdir / 'metrics.jsonl'} has none" if run.held_out else "nothing is held out"
        print_once(f"\nno held-out figures: {why}")
    if importlib.util.find_spec("matplotlib"):
        command = f"python -m experiments.report --workdir={workdir} writes it"
        with result(workdir / "report.html", command):
            report.write_from_workdir(workdir)
    else:
        print_once("no report: matplotlib is missing; pip install 'lm-lifecycle[report]', then "
            f"python -m experiments.report --workdir={workdir}")  # fmt: skip
    print_once("\nfiles made:")
    for name in ("report.html", "summary.json", "metrics.jsonl", "config.json", "tensorboard",
                 "checkpoints", "data"):  # fmt: skip
        path = corpus.directory if name == "data" else workdir / name
        if path.exists():
            print_once(f"  {path}")


def held_out_measures(
    run: Run, corpus: Corpus, params: Tree, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The last figures of the first held-out set, an n-gram's on the same bytes; None without.

    Where the rows are lost the model is evaluated again, which takes a single process.
    """
    last = next((row for row in reversed(rows) if "held_out_bits_per_byte" in row), None)
    if last is None and jax.process_count() == 1:
        last = run.evaluate(params)
    if not last or not run.held_out:
        return None
    print_once("baselines on the same held-out text ...")
    documents = held_out_documents(run, corpus)
    ngram = ByteNgram.fit((t.encode() for t in corpus.texts("train")), order=3)
    return {
        "bits_per_byte": last["held_out_bits_per_byte"],
        "ngram_bits_per_byte": ngram.bits_per_byte(documents),
        "loss": last["held_out_loss"],
        "num_bytes": sum(map(len, documents)),
        "figures": held_out_figures(last),
    }


def training_loss(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean of the last ten logged losses; None without any."""
    losses = [row["loss"] for row in rows if "loss" in row and "event" not in row][-10:]
    return statistics.fmean(losses) if losses else None


def held_out_figures(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte and loss of each held-out set, with the last weights and their average."""
    found = []
    for key in row:
        measure, _, name = key.partition("/")
        if measure.removeprefix("ema_") == "held_out_bits_per_byte":
            found.append(
                {
                    "set": name or "validation",
                    "weights": "EMA" if measure.startswith("ema_") else "last",
                    "bits_per_byte": row[key],
                    "loss": row[key.replace("bits_per_byte", "loss", 1)],
                }
            )
    return found if len(found) > 1 else []


def held_out_documents(run: Run, corpus: Corpus) -> list[bytes]:
    """The text of the first held-out set, as far as training was evaluated on it."""
    name, held_out = next(iter(run.held_out.items()))
    assert isinstance(held_out, HeldOut)
    count = sum(len(source) for source, _ in held_out.packed.shards)
    return [t.encode() for t in itertools.islice(corpus.texts("validation", name), count)]


def draw_samples(config: Pretrain, params: Tree, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """What the model goes on with after each of the configured prompts."""
    if not config.sampling.prompts:
        return []
    params = jax.device_put(unstack(params), jax.local_devices()[0])
    sampler = LocalSampler(params, config.model, tokenizer=tokenizer, dtype=jnp.float32)
    requests = [
        Request(
            prompt=tokenizer.encode(prompt, bos=tokenizer.bos_id >= 0),
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            seed=i,
        )
        for i, prompt in enumerate(config.sampling.prompts)
    ]
    pairs = zip(config.sampling.prompts, sampler.sample(requests), strict=True)
    return [
        {"prompt": prompt, "text": sample.text or sample.error or ""} for prompt, sample in pairs
    ]


def environment() -> dict[str, Any]:
    """Device, versions, date and command of this run."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "command": "python -m experiments.pretrain " + " ".join(sys.argv[1:]),
    }


def files_made(workdir: pathlib.Path, corpus: Corpus) -> list[dict[str, Any]]:
    """The run's files, for the report."""
    what = {
        workdir / "metrics.jsonl": "one object a logged step",
        workdir / "config.json": "the configuration",
        workdir / "summary.json": "held-out figures, samples, environment",
        workdir / "tensorboard": "the same metrics for TensorBoard",
        workdir / "checkpoints": "weights and optimizer state",
        corpus.tokenizer_path: "SentencePiece tokenizer",
        corpus.dataset_path: "tokenized documents, TFDS in array_record files",
    }
    return [
        {"path": str(path), "what": note, "num_bytes": size_of(path)} for path, note in what.items()
    ]


def size_of(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())
