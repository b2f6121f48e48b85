"""Rows of prompts for a model: read from a file, checked, and encoded."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm.config.command_line import ConfigError, input_errors
from lm.data.files import read_text
from lm.data.jsonl import read_jsonl
from lm.formats import Pretrained
from lm.infer import Messages
from lm.infer.tokenized import encode_prompt
from lm.tokenizers import ChatTemplate

# Of a row: what its chat template reads besides messages, with the type and the words for it.
CHAT: dict[str, tuple[type, str]] = {
    "tools": (list, "a list of JSON schemas"),
    "documents": (list, "a list of objects"),
    "chat_template_kwargs": (dict, "an object of the template's own variables"),
    "continue_final_message": (bool, "true or false"),
}
KEYS = ("prompt", "messages", "adapter", *CHAT)


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
    for key, (kind, words) in CHAT.items():
        if not isinstance(row.get(key), kind | None):
            raise ConfigError(f'{where}: "{key}" is {row[key]!r:.80}; it has to be {words}')
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
    opened: Pretrained,
    row: Mapping[str, Any],
    where: str,
    chat: bool = False,
    template: ChatTemplate | None = None,
) -> Sequence[int]:
    """Token ids of a row; with `chat` a prompt is a user's turn.

    Args:
      template: renders messages; None for the tokenizer's own.

    Raises:
      ConfigError: they are none, or too many for the model; or the prompt is a text, and has what
        only chat templates read.
    """
    most = opened.config.max_length
    given = {key: row[key] for key in CHAT if row.get(key) is not None}
    messages = row.get("messages")
    if messages is None and chat:
        messages = [{"role": "user", "content": row["prompt"]}]
    if messages is None and given:
        raise ConfigError(
            f'{where}: "{next(iter(given))}" is for chat templates; give "messages", or --chat'
        )
    try:
        if messages is None:
            prompt = row["prompt"]
        else:
            variables = dict(given.get("chat_template_kwargs", {}))
            variables |= {key: given[key] for key in ("documents",) if key in given}
            goes_on = given.get("continue_final_message", False)
            prompt = Messages(messages, given.get("tools", ()), variables, goes_on)
        ids = encode_prompt(opened.tokenizer, prompt, template)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if len(ids) >= most:
        raise ConfigError(
            f"{where}: the prompt's {len(ids)} tokens leave no room for a new one in the model's "
            f"context of {most}; shorten it to at most {most - 1}"
        )
    return ids


def chat_template(opened: Pretrained, value: str | None) -> ChatTemplate | None:
    """The template that `--chat_template` names: one of the model's, or the one in a file.

    Raises:
      ConfigError: it is neither, or not a template.
    """
    tokenizer = opened.tokenizer
    if value is None:
        return None
    try:
        if value in tokenizer.chat_templates:
            return ChatTemplate.of(tokenizer, value)
        if pathlib.Path(value).expanduser().is_file():
            return ChatTemplate.with_tokens(tokenizer, read_text(value))
    except ValueError as error:
        raise ConfigError(f"--chat_template={value}: {error}") from error
    known = ", ".join(sorted(tokenizer.chat_templates)) or "none"
    raise ConfigError(f"--chat_template={value}: no such file, and the model's own are {known}")


def json_of(name: str, value: str | None, key: str) -> dict[str, Any]:
    """What a flag gives all rows: JSON, or the file that holds it; {} if it is not set.

    Args:
      name: the flag.
      key: of rows.

    Raises:
      ConfigError: it is not JSON of the right type.
    """
    if value is None:
        return {}
    kind, words = CHAT[key]
    with input_errors():
        text = value if value.lstrip()[:1] in ("[", "{") else read_text(value)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--{name}={value:.80} is not JSON: {error}") from error
    if not isinstance(found, kind):
        raise ConfigError(f"--{name}={value:.80}: {found!r:.80} has to be {words}")
    return {key: found}
