"""Conversations in JSONL as packed rows in which only the assistant's tokens count.

A line is `{"messages": [{"role": "user", "content": "..."}, ...]}`, with `tools` (JSON schemas)
where the template reads them. Each conversation is one document: the text of the chat template, of
which a mask says what the assistant wrote.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.corpus import CorpusError
from lm.data.jsonl import read_jsonl
from lm.data.packed import PackedSource
from lm.data.packing import make_plan
from lm.data.sources import ArraySource, Document
from lm.tokenizers import Tokenizer
from lm.tokenizers.chat import ChatTemplate

ROLES = ("system", "developer", "user", "assistant", "tool")
# For tokenizers that bring no template: roles in words, EOS at the end of a turn of the assistant.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages and tools as the template reads them, and the place they are from, for errors."""

    where: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None

    @property
    def content(self) -> dict[str, Any]:
        """The line of a JSONL file that holds it."""
        return {"messages": self.messages, "tools": self.tools}

    @property
    def share(self) -> float:
        """A number in [0, 1) that depends on the messages alone, to split by."""
        digest = hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode())
        return int.from_bytes(digest.digest()[:6], "big") / (1 << 48)


def read_conversations(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Conversation]:
    """The conversations in JSONL files, plain, `.gz` or `.zst`.

    Raises:
      CorpusError: a file cannot be read or is empty, or a line is not a conversation with a turn of
        the assistant; it names file, line and field.
    """
    for path in paths:
        each = None
        for _, where, value in read_jsonl(path, "messages", "tools"):
            each = Conversation(where, value.get("messages", ()), value.get("tools"))
            _check(each)
            yield each
        if each is None:
            raise CorpusError(f"'{path}' has no conversations; leave it out")


def _check(conversation: Conversation) -> None:
    where, messages, tools = conversation.where, conversation.messages, conversation.tools
    if not isinstance(messages, list) or not messages:
        raise CorpusError(f"{where}: 'messages' is not a list of objects, at least one of them")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise CorpusError(f"{where}: messages.{i}.role is {role!r}; use {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise CorpusError(
                f"{where}: messages.{i}.content is a {type(content).__name__}, not a string"
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise CorpusError(f"{where}: no message of the assistant, so there is nothing to learn")
    if not (tools is None or isinstance(tools, list)):
        raise CorpusError(f"{where}: 'tools' is a {type(tools).__name__}, not a list")


@dataclasses.dataclass(frozen=True)
class PackedConversations(PackedSource):
    """Packed rows, of one shard, in which only targets that the assistant wrote count.

    Attributes:
      written: as the documents, 1 for each token of the assistant, else 0.
      num_dropped: conversations cut before the assistant's first token, and so left out.
    """

    written: ArraySource = dataclasses.field(kw_only=True)
    num_dropped: int = 0

    def fill(self, row: int, out: Mapping[str, np.ndarray], i: int) -> None:
        super().fill(row, out, i)
        _, pieces = self.row(row)
        at = 0
        for document, start, length in pieces.tolist():
            out["weights"][i, at : at + length] = self.written.read(document, start + 1, length)
            at += length


def pack_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    seq_len: int,
    name: str,
) -> PackedConversations:
    """Render, tokenize, mask and pack, in memory.

    A conversation longer than a row is cut at its end, so that no row holds a part of one without
    what went before. `num_bytes` counts the text that the assistant wrote.

    Args:
      conversations: in any order.
      tokenizer, template: of the model.
      seq_len: targets per row.
      name: of the source.

    Raises:
      CorpusError: the template refuses a conversation, or none has a token of the assistant.
    """
    documents, masks, num_dropped = [], [], 0
    for each in conversations:
        try:
            ids, mask = template.encode(tokenizer, each.messages, each.tools)
        except ValueError as error:  # of the template, or of the tokenizer
            raise CorpusError(f"{each.where}: {error}") from error
        ids, mask = ids[: seq_len + 1], mask[: seq_len + 1]
        if not any(mask[1:]):
            num_dropped += 1
            continue
        pairs = zip(ids, mask, strict=True)
        num_bytes = sum(len(tokenizer.text_bytes[i]) for i, counts in pairs if counts)
        documents.append(Document(np.asarray(ids, np.int32), num_bytes))
        masks.append(Document(np.asarray(mask, np.int32), 0))
    if not documents:
        raise CorpusError(
            f"'{name}' has no conversation with a token of the assistant in its first {seq_len}; "
            "add conversations, or make the rows longer"
        )
    tokens, written = (ArraySource.from_documents(d) for d in (documents, masks))
    # The plan's hash, which a checkpoint stores, is to cover the mask as well.
    tokens.fingerprint = hashlib.sha256(
        f"{tokens.fingerprint} {written.fingerprint}".encode()
    ).hexdigest()[:32]
    plan = make_plan(tokens, seq_len, tokenizer.fingerprint)
    return PackedConversations([(tokens, plan)], name, written=written, num_dropped=num_dropped)
