"""Conversations become rows in which the assistant's tokens count, and no others."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from lm.data.batches import Batches, HeldOut
from lm.data.conversations import (
    PLAIN_TEMPLATE,
    Conversation,
    pack_conversations,
    read_conversations,
)
from lm.data.corpus import CorpusError
from lm.tokenizers import ChatTemplate, train_sentencepiece
from tests.refuses import refuses

TURNS = [
    [("system", "Be brief."), ("user", "Who?"), ("assistant", "Me, of course.")],
    [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four. " * 8)],
    [("user", "Why? " * 40), ("assistant", "Because.")],
]
CONVERSATIONS = [
    Conversation(f"line {i}", [{"role": role, "content": text} for role, text in turns])
    for i, turns in enumerate(TURNS)
]
# Without generation blocks: where the assistant wrote is found by rendering turn by turn.
BARE = PLAIN_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [message["content"] for each in CONVERSATIONS for message in each.messages]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("t") / "tokenizer.model", 290)


@pytest.mark.parametrize("source", [PLAIN_TEMPLATE, BARE])
@pytest.mark.parametrize("seq_len", [256, 300])
def test_targets_that_count_are_what_the_template_marks(tokenizer, source, seq_len):
    template = ChatTemplate(source, "<s>", "</s>")
    packed = pack_conversations(CONVERSATIONS, tokenizer, template, seq_len, "chats")
    batch = HeldOut(packed, packed.num_rows).host_batch(0)
    found = {}
    for r in range(packed.num_rows):
        for segment, (document, start, _) in enumerate(packed.row(r)[1].tolist(), 1):
            assert start == 0  # no part of a conversation without what went before
            counts = (batch["segment_ids"][r] == segment) & (batch["weights"][r] > 0)
            ids = batch["targets"][r][counts].tolist()
            found[document] = tokenizer.decode(ids, skip_special=False, continuation=True)
    wanted = [
        "".join(f"{text}</s>" for role, text in turns if role == "assistant") for turns in TURNS
    ]
    assert found == dict(enumerate(wanted))
    texts = sum(len(text) for turns in TURNS for role, text in turns if role == "assistant")
    assert packed.num_bytes == texts


def test_what_is_longer_than_a_row_is_cut_and_without_the_assistant_left_out(tokenizer):
    template = ChatTemplate(PLAIN_TEMPLATE, "<s>", "</s>")
    packed = pack_conversations(CONVERSATIONS, tokenizer, template, 64, "chats")
    ((documents, _),) = packed.shards
    assert packed.num_dropped == 1 and len(documents) == 2
    assert max(documents.lengths) <= 65
    pack = functools.partial(pack_conversations, CONVERSATIONS[2:], tokenizer)
    words = "no conversation with a token of the assistant"
    refuses(lambda: pack(template, 64, "chats"), words, error=CorpusError)
    strict = ChatTemplate("{{ raise_exception('roles must alternate') }}", "<s>", "</s>")
    words = ("line 2: ", "roles must alternate")
    refuses(lambda: pack(strict, 64, "chats"), *words, error=CorpusError)


def test_the_order_of_the_data_depends_on_the_mask(tokenizer):
    """So that a run does not go on with another one."""
    silent = BARE.replace("message['role'] == 'assistant'", "false")
    marked = silent.replace(
        "{{ message['content'] + '\\n' }}",
        "{% generation %}{{ message['content'] + '\\n' }}{% endgeneration %}",
    )
    plain = PLAIN_TEMPLATE.replace(" ~ eos_token", "")
    streams = [
        Batches([pack_conversations(
            CONVERSATIONS, tokenizer, ChatTemplate(source, "<s>", "</s>"), 256, "chats"
        )], 2)
        for source in (plain, marked)
    ]  # fmt: skip
    np.testing.assert_array_equal(*(s.sources[0].shards[0][0].read(0) for s in streams))
    assert streams[0].state(1) != streams[1].state(1)


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    answer = {"role": "assistant", "content": "a"}
    for line, words in (
        ({}, "'messages' is not a list of objects"),
        ({"messages": []}, "'messages' is not a list of objects"),
        ({"messages": ["hi"]}, "messages.0.role is None; use system, "),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages.0.role is 'bot'"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content is a NoneType"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content is a int"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ({"messages": [answer], "tools": {}}, "'tools' is a dict"),
        ([], "a JSON list, not an object with 'messages'"),
    ):
        good = json.dumps({"messages": [answer]})
        path.write_text(f"{good}\n\n{json.dumps(line)}\n")
        where = "chats.jsonl', line 3: "
        refuses(lambda: list(read_conversations([path])), where, words, error=CorpusError)
