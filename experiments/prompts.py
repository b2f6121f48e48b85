"""Rows of prompts for a model: read from a file, checked, and encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm.config.command_line import ConfigError, input_errors
from lm.data.jsonl import read_jsonl
from lm.formats import Pretrained
from lm.infer import Messages
from lm.infer.tokenized import encode_prompt

KEYS = ("prompt", "messages", "adapter")  # of a row


def read_rows(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a JSONL file of prompts, each with `file:line`; empty lines are passed over.

    Raises:
      ConfigError: the file has no prompts, or one is malformed.
    """
    found = False
    with input_errors():
        for number, _, row in read_jsonl(path, "prompt", "messages"):
            found = True
            where = f"{path}:{number}"
            check_row(row, where)
            yield where, row
    if not found:
        raise ConfigError(f'{path} has no prompts; give rows like {{"prompt": "Hello"}}')


def check_row(row: Any, where: str) -> None:
    """Raises ConfigError unless a row has either a prompt or messages."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ConfigError(
            f'{where} has to be an object with either "prompt" or "messages", not {row!r:.80}'
        )
    for key in row.keys() - set(KEYS):
        raise ConfigError(f"{where}: unknown key {key!r}; a row has {', '.join(KEYS)}")
    if not isinstance(row.get("adapter"), str | None):
        raise ConfigError(f'{where}: "adapter" is {row["adapter"]!r:.80}; it has to be a name')
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise ConfigError(f'{where}: "prompt" is {row["prompt"]!r:.80}; it has to be text')
        return
    messages = row["messages"]
    fine = isinstance(messages, list) and messages
    if not fine or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ConfigError(
            f'{where}: "messages" has to be a list of objects with "role" and "content", '
            f"not {messages!r:.80}"
        )


def adapter_of(row: Mapping[str, Any], adapters: Mapping[str, int], where: str) -> int | None:
    """The number of the adapter a row names.

    Raises:
      ConfigError: there is none of that name.
    """
    name = row.get("adapter")
    if name is not None and name not in adapters:
        known = ", ".join(adapters) or "none; give them as --adapter=NAME=DIRECTORY"
        raise ConfigError(f"{where}: no adapter {name!r}; there are {known}")
    return None if name is None else adapters[name]


def encode(
    opened: Pretrained, row: Mapping[str, Any], where: str, chat: bool = False
) -> Sequence[int]:
    """Token ids of a row; with `chat` a prompt is a user's turn.

    Raises:
      ConfigError: they are none, or too many for the model.
    """
    most = opened.config.max_length
    try:
        messages = row.get("messages")
        if messages is None and chat:
            messages = [{"role": "user", "content": row["prompt"]}]
        prompt = row["prompt"] if messages is None else Messages(messages)
        ids = encode_prompt(opened.tokenizer, prompt)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if len(ids) >= most:
        raise ConfigError(
            f"{where}: the prompt's {len(ids)} tokens leave no room for a new one in the model's "
            f"context of {most}; shorten it to at most {most - 1}"
        )
    return ids
