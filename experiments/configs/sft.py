"""Configurations of `experiments.sft`."""

from __future__ import annotations

import dataclasses

from experiments.configs.common import LearningRate, Train, Training
from experiments.configs.pretrain import llama
from lm.config.fields import BelowOne, Checked, Seed
from lm.model import ModelConfig
from lm.run.finetune import Lora
from lm.run.loop import Intervals
from lm.train.optimizers import Muon


@dataclasses.dataclass(frozen=True)
class Conversations(Checked):
    """What to learn from.

    Attributes:
      files: names or glob patterns of JSONL files, one {"messages": [...]} per line, separated by
        commas or blanks, or as a JSON list; none for sums of small numbers.
      validation: the same, to evaluate on; none for a part of `files`.
      held_out: share of the conversations in `files` kept for evaluation where there is no
        `validation`; 0 for none.
      template: a file with the chat template; none for the tokenizer's own, or a plain one.
      seed: of the order.
    """

    files: str = ""
    validation: str = ""
    held_out: BelowOne = 0.05
    template: str = ""
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(Training):
    """Supervised fine-tuning.

    Attributes:
      model: to begin with, a path or name as `experiments.generate --model` opens it; or a
        configuration, for a model with random weights and a tokenizer of its own.
      lora: train adapters; none to train every weight.
      ignore_config_keys: keys of the model's config.json to pass over, because they do not change
        what it computes.
    """

    model: str | ModelConfig
    data: Conversations = Conversations()
    lora: Lora | None = None
    ignore_config_keys: tuple[str, ...] = ()


def quicktest() -> Sft:
    """Under a minute on two cores: a model of 0.2 million parameters learns to add small numbers.

    Command: python -m experiments.sft --config=quicktest --workdir=runs/sft
    """
    return Sft(
        model=llama(290, 96, 2, 4, 2, 256, max_length=256),
        optimizer=Muon(),
        learning_rate=LearningRate(peak=1e-2),
        train=Train(num_steps=200, batch_size=16, sequence_length=128, unroll=True),
        intervals=Intervals(log=10, evaluate=50, save=50),
    )


def full() -> Sft:
    """Every weight of an instruction-tuned model of 135 million, on --config.data.files.

    Command: python -m experiments.sft --config=full --config.data.files=chats.jsonl --workdir=W
    """
    return Sft(
        model="smollm2-135m-instruct",
        learning_rate=LearningRate(peak=2e-5),
        train=Train(num_steps=300, batch_size=32, sequence_length=1024, num_micro_batches=4),
    )


def lora() -> Sft:
    """The same with adapters of rank 16 alone.

    Command: python -m experiments.sft --config=lora --config.data.files=chats.jsonl --workdir=W
    """
    return dataclasses.replace(full(), lora=Lora(), learning_rate=LearningRate(peak=2e-4))
