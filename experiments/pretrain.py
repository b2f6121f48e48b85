"""Pre-train a language model on text.

    python -m experiments.pretrain --config=quicktest --workdir=runs/quicktest

Makes a tokenizer and a packed dataset from text (Python's own documentation and source, or
--config.data.files='dir/**/*.txt'), trains, evaluates on held-out text in bits per byte, samples,
and writes a report. The same command resumes, on as many hosts as it is started on (see
`lm.distributed.start` for how they find each other). The workdir receives `config.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/<step>`, `data/`, `summary.json` and `report.html`.

SIGTERM saves and ends the run; `--profile_steps=10:15` traces steps into `<workdir>/profile`.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping

import jax

from data_pipelines import local_text
from experiments.assemble import layout_of, make_run, make_stream, profile_steps
from experiments.configs import pretrain as configs
from experiments.configs.pretrain import Pretrain
from experiments.summary import summarize
from lm import distributed
from lm.config import codec, program
from lm.config import command_line as config_lib
from lm.config.command_line import ConfigError, input_errors
from lm.data.batches import HeldOut
from lm.data.corpus import Corpus, open_corpus
from lm.data.files import split_patterns
from lm.data.packed import pack_source
from lm.files.base import replacing
from lm.run.parts import Run
from lm.run.session import session

CONFIGS = {
    "quicktest": configs.quicktest,
    "demo": configs.demo,
    "twenty_minutes": configs.twenty_minutes,
}


def main(config: Pretrain, workdir: pathlib.Path) -> None:
    room = config.model.max_length
    if config.sampling.prompts and config.sampling.max_new_tokens >= room:
        raise ConfigError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} leaves no room for a prompt "
            f"in model.max_length={room}; use at most {room - 1}, or sampling.prompts= for none"
        )
    with session(config, workdir) as opened:
        run, corpus = assemble(config, workdir)
        keep_tokenizer(corpus, workdir)
        outcome = opened.train(run, profile_steps())
        if outcome.reason == "finished":
            params = outcome.state.params
            if jax.process_count() > 1 and config.sampling.prompts:
                params = distributed.fetch(params)
            if distributed.is_first_process():
                summarize(run, config, corpus, params)


def assemble(
    config: Pretrain, workdir: pathlib.Path, corpus: Corpus | None = None
) -> tuple[Run, Corpus]:
    """A run and the corpus it trains on.

    Args:
      config, workdir: of the run.
      corpus: None to build it, or to open it if it has been built.

    Raises:
      ConfigError: sizes that do not divide, a corpus that is empty or does not fit the model.
    """
    with input_errors():
        layout = layout_of(config, config.model)
        corpus = corpus or build_corpus(config, workdir)
        tokenizer, length = corpus.tokenizer(), config.train.sequence_length
        if tokenizer.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={config.model.vocab_size}, but the tokenizer in "
                f"{corpus.directory} has {tokenizer.vocab_size}; set --config.model.vocab_size="
                f"{tokenizer.vocab_size}, or another data.directory"
            )
        held_out = {}
        for name in corpus.validation_names:
            source = corpus.source("validation", name).head(config.data.max_held_out_tokens)
            packed = pack_source(source, length, name=name)
            held_out[name] = HeldOut(packed, config.train.batch_size)
        mixture = tuple(source.share for source in config.data.sources) or None
        sources = [corpus.packed("train", length, name) for name in corpus.names]
        stream = make_stream(config, sources, layout, mixture)
        run = make_run(
            config, workdir, config.model, layout, tokenizer, stream, held_out, corpus.directory
        )
        return run, corpus


def open_run(workdir: str | pathlib.Path, edits: Mapping[str, str] | None = None) -> Run:
    """The run that a workdir holds, with its own configuration and edits of it.

    Raises:
      ConfigError: there is no run in `workdir`, or its files do not fit together.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if not (workdir / "config.json").exists():
        raise ConfigError(
            f"{workdir} has no config.json, so it is not the folder of a run; give one that "
            "experiments.pretrain was given as --workdir"
        )
    config = config_lib.override(codec.load(workdir / "config.json", Pretrain), edits or {})
    directory, own = corpus_directory(config, workdir), workdir / "data"
    if not directory.exists() and own.exists():  # the run was moved with its data
        directory = own
    with input_errors():
        return assemble(config, workdir, open_corpus(directory))[0]


def corpus_directory(config: Pretrain, workdir: pathlib.Path) -> pathlib.Path:
    """Where tokenizer and datasets are."""
    directory = config.data.directory
    return pathlib.Path(directory).expanduser() if directory else workdir / "data"


def keep_tokenizer(corpus: Corpus, workdir: pathlib.Path) -> None:
    """Copy a tokenizer that is stored elsewhere, so that the run opens by its path alone."""
    if distributed.is_first_process() and corpus.directory.parent != workdir:
        workdir.mkdir(parents=True, exist_ok=True)
        with replacing(workdir / corpus.tokenizer_path.name) as file:
            file.write(corpus.tokenizer_path.read_bytes())


def build_corpus(config: Pretrain, workdir: pathlib.Path) -> Corpus:
    """Tokenizer and datasets, made the first time: by the first process, for all."""
    data, directory = config.data, corpus_directory(config, workdir)
    begun = any((workdir / "checkpoints").glob("[0-9]*"))
    return local_text.build(
        directory,
        split_patterns(data.files) or None,
        sources=data.sources,
        validation=data.validation,
        tokenizer=os.path.expanduser(data.tokenizer) or None,
        vocab_size=config.model.vocab_size,
        max_bytes=math.ceil(data.max_megabytes * 1e6) or None,
        held_out=data.held_out,
        progress=distributed.is_first_process(),
        begun=begun,
        process_index=jax.process_index(),
        wait=distributed.barrier if jax.process_count() > 1 else None,
    )


if __name__ == "__main__":
    program.run(main, configs=CONFIGS, workdir=True)
