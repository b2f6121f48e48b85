"""Fine-tune a model on conversations, with a loss on what the assistant says alone.

    python -m experiments.sft --config=quicktest --workdir=runs/sft
    python -m experiments.sft --config=lora --config.model=PATH_OR_NAME \
        --config.data.files='chats/*.jsonl' --workdir=runs/lora

A line of the JSONL files is {"messages": [{"role": "user", "content": "..."}, ...]}; the model's
chat template says how they become text, and which of it is the assistant's. All weights train, or
LoRA adapters (--config.lora.rank=16). The same command resumes, bit for bit. The workdir is that of
`experiments.pretrain`, with the tokenizer in `data/` and, for adapters, the model beneath them in
`base/`, once; `python -m experiments.generate --model=WORKDIR --chat --prompt=...` opens it.
"""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

from absl import logging

from experiments.assemble import layout_of, make_run, make_stream, profile_steps
from experiments.configs import sft as configs
from experiments.configs.sft import Sft
from lm import distributed
from lm.config import program
from lm.config.command_line import input_errors
from lm.data.batches import HeldOut
from lm.data.conversations import (
    PLAIN_TEMPLATE,
    Conversation,
    pack_conversations,
    read_conversations,
)
from lm.data.files import find_files, read_text, split_patterns
from lm.files.base import replacing
from lm.run.finetune import adapters_over, from_scratch, pretrained
from lm.run.metrics import read
from lm.run.parts import Run
from lm.run.session import session
from lm.run.workdir import result
from lm.tokenizers import ChatTemplate

CONFIGS = {"quicktest": configs.quicktest, "full": configs.full, "lora": configs.lora}


def main(config: Sft, workdir: pathlib.Path) -> None:
    with session(config, workdir) as opened:
        run = assemble(config, workdir)
        outcome = opened.train(run, profile_steps())
        if outcome.reason == "finished" and distributed.is_first_process():
            rows = read(workdir / "metrics.jsonl")
            for last in [row for row in rows if "held_out_loss" in row][-1:]:
                held_out = {name: last[f"held_out_{name}"] for name in ("loss", "bits_per_byte")}
                print(f"held-out loss {held_out['loss']:.4f}")
                path = workdir / "summary.json"
                with result(path, "the loss is above"), replacing(path) as file:
                    file.write(json.dumps({"held_out": held_out}).encode() + b"\n")
            print(f"try it: python -m experiments.generate --model={workdir} --chat --prompt=...")


def assemble(config: Sft, workdir: pathlib.Path) -> Run:
    """A run over conversations, from the model that `config` names.

    Raises:
      ConfigError: the model cannot be opened, a line is not a conversation, sizes do not divide.
    """
    with input_errors():
        train, held_out = conversations(config, workdir)
        folder, seed, length = workdir / "data", config.train.seed, config.train.sequence_length
        template = template_of(config, folder)
        if isinstance(config.model, str):
            base = pretrained(config.model, template, folder, config.ignore_config_keys)
        else:
            texts = (str(m["content"]) for each in train for m in each.messages)
            base = from_scratch(config.model, seed, template or PLAIN_TEMPLATE, folder, texts)
        layout, chat = layout_of(config, base.config), ChatTemplate.of(base.tokenizer)
        packed = pack_conversations(train, base.tokenizer, chat, length, "train")
        held = {}
        if held_out:
            rows = pack_conversations(held_out, base.tokenizer, chat, length, "validation")
            held = {"validation": HeldOut(rows, config.train.batch_size)}
        if packed.num_dropped:
            distributed.print_once(f"{packed.num_dropped} conversations are left out: the first "
                                   f"{length} tokens have none of the assistant")  # fmt: skip
        others: dict[str, Any] = {"initial": base.load}
        if config.lora is not None:
            others = adapters_over(base, config.lora, seed, workdir / "base", layout)
        return make_run(
            config, workdir, base.config, layout, base.tokenizer,
            make_stream(config, [packed], layout),
            held, folder, **others,
        )  # fmt: skip


def conversations(config: Sft, workdir: pathlib.Path) -> list[list[Conversation]]:
    """What `split` finds, copied; a run that has begun goes on with its copy, which is reported."""
    if not config.data.files:
        return split(config)
    copies = [workdir / "data" / f"{name}.jsonl" for name in ("train", "validation")]
    begun = any((workdir / "checkpoints").glob("[0-9]*")) and all(c.is_file() for c in copies)
    try:
        found, why = split(config), "they have changed"
    except (OSError, ValueError) as error:
        if not begun:
            raise
        found, why = [], str(error)
    texts = ["".join(json.dumps(each.content) + "\n" for each in part) for part in found]
    if begun and texts != [copy.read_text() for copy in copies]:
        logging.warning("the run goes on with its copy of the conversations: %s", why)
        return [list(read_conversations([c] if c.stat().st_size else [])) for c in copies]
    if not begun and distributed.is_first_process():
        copies[0].parent.mkdir(parents=True, exist_ok=True)
        for copy, text in zip(copies, texts, strict=True):
            with replacing(copy) as file:
                file.write(text.encode())
    return found


def split(config: Sft) -> list[list[Conversation]]:
    """Conversations to train on and to evaluate on: of files, or sums of small numbers."""
    data = config.data
    found = list(
        read_conversations(find_files(split_patterns(data.files))) if data.files else sums(2000)
    )
    if data.validation:
        return [found, list(read_conversations(find_files(split_patterns(data.validation))))]
    return [
        [each for each in found if each.share >= data.held_out],
        [each for each in found if each.share < data.held_out],
    ]


def template_of(config: Sft, folder: pathlib.Path) -> str:
    """The chat template in the file that `config` names, or the run's own if it has gone."""
    path, own = config.data.template, folder / "chat_template.jinja"
    if path and not pathlib.Path(path).expanduser().exists() and own.is_file():
        logging.warning("the run goes on with its own chat template: '%s' has gone", path)
        return own.read_text(encoding="utf-8")
    return read_text(path) if path else ""


def sums(count: int) -> Iterator[Conversation]:
    """Conversations that a tiny model can learn from."""
    rng = random.Random(0)
    for i in range(count):
        a, b = rng.randrange(30), rng.randrange(30)
        user = {"role": "user", "content": f"What is {a} plus {b}?"}
        answer = {"role": "assistant", "content": f"{a} + {b} = {a + b}"}
        yield Conversation(f"sum {i}", [user, answer])


if __name__ == "__main__":
    program.run(main, configs=CONFIGS, workdir=True)
