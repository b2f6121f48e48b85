"""How fine-tuning begins: from a model that exists, all of it or adapters over it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lm import distributed
from lm.adapters import add_lora, trains
from lm.checkpoints import CheckpointError, Checkpoints, Reference, open_checkpoint
from lm.config.fields import Checked, Count, Positive
from lm.data.conversations import PLAIN_TEMPLATE
from lm.formats import load_pretrained
from lm.model import ModelConfig, param_specs, stack
from lm.sharding import Layout
from lm.tokenizers import Tokenizer, open_tokenizer, train_sentencepiece
from lm.tokenizers.save import save_tokenizer
from lm.train.state import TrainState, partition
from lm.weights import initialize, shardings, specs_of

Tree = Any


@dataclasses.dataclass(frozen=True)
class Lora(Checked):
    """Adapters over every matrix of every layer, which train alone; see `lm.adapters.add_lora`."""

    rank: Count = 16
    alpha: Positive | None = None
    rslora: bool = False
    dora: bool = False


@dataclasses.dataclass(frozen=True)
class Base:
    """A model to begin with.

    Attributes:
      config: the model.
      tokenizer: with a chat template named "default".
      load: reads its weights, stacked, or makes random ones.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    load: Callable[[], Tree]


def pretrained(
    name: str, template: str, folder: pathlib.Path, ignore: Collection[str] = ()
) -> Base:
    """The model of that path or name; its tokenizer is stored in `folder` with its chat template.

    Args:
      name: as `load_pretrained` takes it.
      template: of chats, in place of the tokenizer's own; "" to keep that, or to take
        `PLAIN_TEMPLATE` where there is none, as with base models.
      folder: where the run's checkpoints are opened with the tokenizer.
      ignore: see `load_pretrained`.

    Raises:
      CheckpointError, FileNotFoundError, ValueError: as `load_pretrained`.
    """
    opened = load_pretrained(name, ignore=ignore)
    config, tokenizer = opened.config, opened.tokenizer
    del opened  # its weights are read again where they are needed, not held until then
    _set_template(tokenizer, template)
    if distributed.is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, folder)
        ends = json.dumps({"eos_token_id": list(tokenizer.eos_ids)})
        (folder / "generation_config.json").write_text(ends + "\n")
    return Base(
        config, tokenizer, lambda: stack(load_pretrained(name, ignore=ignore).params, config)
    )


def from_scratch(
    config: ModelConfig, seed: int, template: str, folder: pathlib.Path, texts: Iterable[str]
) -> Base:
    """A model with random weights; the first time a tokenizer is trained on `texts`."""
    path = folder / "tokenizer.model"
    if distributed.is_first_process() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_sentencepiece(texts, path, config.vocab_size)
        (folder / "chat_template.jinja").write_text(template)
    distributed.barrier("tokenizer")
    tokenizer = open_tokenizer(path)
    _set_template(tokenizer, template)
    return Base(config, tokenizer, lambda: initialize(param_specs(config), jax.random.key(seed)))


def _set_template(tokenizer: Tokenizer, template: str) -> None:
    if not template and "default" not in tokenizer.chat_templates:
        distributed.print_once("the tokenizer has no chat template: roles are written in words")
        template = PLAIN_TEMPLATE
    if template:
        tokenizer.chat_templates = {**tokenizer.chat_templates, "default": template}


def adapters_over(
    base: Base, lora: Lora, seed: int, directory: pathlib.Path, layout: Layout
) -> dict[str, Any]:
    """The fields of a `Run` that trains adapters alone.

    The model with its new adapters is stored in `directory` the first time, as a checkpoint of its
    own; those of the run refer to it and hold what trains. Both move together.

    Args:
      base: the model beneath.
      lora: which adapters.
      seed: of their initial values.
      directory: in the run's workdir, beside its `checkpoints`.
      layout: mesh and rules.

    Raises:
      CheckpointError: the model beneath cannot be written, or read again.
    """
    specs = param_specs(base.config)
    if not (directory / "0").exists():
        params = jax.device_put(base.load(), shardings(specs, layout.rules, layout.mesh))
        adapted = add_lora(
            params, base.config, jax.random.key(seed), layout=layout, **dataclasses.asdict(lora)
        )
        state = TrainState(jnp.int32(0), *partition(adapted, trains), ())
        with Checkpoints(directory, config=base.config) as checkpoints:
            checkpoints.save(0, state, {}, wait=True)
            for failure in checkpoints.failures():
                raise CheckpointError(f"{directory} could not be written: {failure.error}")
    adapted, _ = open_checkpoint(directory, layout)
    frozen = Reference.of(f"../../{directory.name}/0", partition(adapted, trains)[1])
    return {
        "specs": specs_of(adapted, specs),
        "trains": trains,
        "initial": lambda: open_checkpoint(directory, layout)[0],
        "frozen": frozen,
    }
