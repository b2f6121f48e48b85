"""What all tokenizers share: streams, the splitter, bytes of tokens, offsets."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.tokenizers import from_gguf, train_sentencepiece
from lm.tokenizers.base import Splitter
from tests.refuses import refuses
from tests.tokenizers import golden, lines

RECORDED = json.loads(golden.FILE.read_text())["vocabularies"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Byte-level, SentencePiece without and with a dummy prefix, and one trained here."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return {
        "bytes": from_gguf({**RECORDED["bytes"], "tokenizer.ggml.pre": "llama-bpe"}),
        "pieces": from_gguf({**RECORDED["pieces"], "tokenizer.ggml.add_space_prefix": False}),
        "prefixed": from_gguf(RECORDED["pieces"]),
        "trained": train_sentencepiece(lines.library(2000), path, 600),
    }


KINDS = pytest.mark.parametrize("kind", ["bytes", "pieces", "prefixed", "trained"])


def comes_back(kind, text):
    """What decoding gives for the text; None where a foreign vocabulary cannot tell.

    With a dummy prefix llama.cpp puts a space after every token it finds in the text first.
    """
    if kind == "prefixed" and any(token in text for token in ("  ", "\n\n\n", "<tag>")):
        return None
    return text if kind in ("bytes", "trained") else text.replace("\u2581", " ")


def streamed(tokenizer, ids, *args):
    stream = tokenizer.stream(*args)
    pieces = [stream.push(i) for i in ids]
    return pieces, stream.finish()


@KINDS
@pytest.mark.parametrize("num_lines", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_streams_add_up_on_text(tokenizers, kind, num_lines):
    tokenizer = tokenizers[kind]
    texts = [*lines.synthetic(num_lines, golden.SPECIAL, seed=4), *lines.library(num_lines)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        pieces, last = streamed(tokenizer, ids)
        assert "".join(pieces) + last == tokenizer.decode(ids)
        if (expected := comes_back(kind, text)) is not None:
            assert "".join(pieces) == expected and last == ""


@KINDS
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_streams_add_up_on_any_ids(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    bytes_first = [i for i, b in enumerate(tokenizer.token_bytes) if len(b) == 1]
    ids = data.draw(
        st.lists(
            st.sampled_from(bytes_first) | st.integers(0, tokenizer.vocab_size - 1), max_size=20
        )
    )
    for skip_special in (True, False):
        for continuation in (True, False):
            pieces, last = streamed(tokenizer, ids, skip_special, continuation)
            whole = tokenizer.decode(ids, skip_special, continuation)
            assert "".join(pieces) + last == whole
            # What was given out never has to be taken back.
            for end in range(len(ids)):
                assert whole.startswith("".join(pieces[:end]))
            expected = b"".join(
                b"" if skip_special and i in tokenizer.special_ids else tokenizer.token_bytes[i]
                for i in ids
            ).decode("utf-8", "replace")
            assert whole in (expected, expected.replace(" ", "", 1))
            if continuation or not tokenizer.strips_space:
                assert whole == expected


@KINDS
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, max_size=3))
def test_round_trip_and_special_tokens(tokenizers, kind, texts):
    tokenizer = tokenizers[kind]
    encoded = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, encoded, strict=True):
        if (expected := comes_back(kind, text)) is not None:
            assert tokenizer.decode(ids) == expected
        assert ids == tokenizer.encode(text)
        assert not tokenizer.special_ids & set(ids)


@KINDS
def test_text_cannot_forge_special_tokens(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for name, token_id in tokenizer.special_tokens.items():
        text = f"a{name}b"
        assert not tokenizer.special_ids & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        parsed = tokenizer.encode(text, parse_special=True)
        assert [i for i in parsed if i in tokenizer.special_ids] == [token_id]
        if not tokenizer.strips_space:
            assert tokenizer.decode(parsed, skip_special=False) == text
            assert tokenizer.decode(parsed) == "ab"


@KINDS
def test_offsets_cover_the_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in lines.synthetic(300, tuple(tokenizer.special_tokens), seed=5):
        if kind in ("pieces", "prefixed"):
            text = text.replace("\u2581", "_")
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text, parse_special=True)
        assert offsets[0][0] == 0 and offsets[-1][1] == len(text)
        for (_, end), (start, _) in itertools.pairwise(offsets):
            assert end - 1 <= start <= end  # tokens that share a character
        for i, (start, end) in zip(ids, offsets, strict=True):
            if (
                tokenizer.token_bytes[i].decode("utf-8", "ignore").encode()
                == (tokenizer.token_bytes[i])
            ):
                piece = tokenizer.token_bytes[i].decode()
                assert text[start:end] in (piece, piece.removeprefix(" "))


def splits(tokens, text):
    """The definition, place by place."""
    parts, rest, at = [], "", 0
    while at < len(text):
        found = max((t for t in tokens if text.startswith(t, at)), key=len, default=None)
        if found:
            parts += [rest, tokens[found]] if rest else [tokens[found]]
            rest, at = "", at + len(found)
        else:
            rest, at = rest + text[at], at + 1
    return parts + [rest] if rest else parts


@settings(max_examples=150, deadline=None)
@given(st.sets(st.text("ab<", min_size=1, max_size=4), max_size=6), st.text("ab<\n", max_size=20))
def test_splitter_takes_the_longest_from_left_to_right(names, text):
    tokens = {name: i for i, name in enumerate(sorted(names))}
    assert Splitter(tokens).split(text) == splits(tokens, text)


def test_rows_of_the_model():
    """Any number of padding rows has no text; refused is only text with a token without a row."""
    metadata = {**RECORDED["bytes"], "tokenizer.ggml.pre": "llama-bpe"}
    tokens = metadata["tokenizer.ggml.tokens"]
    last = len(tokens)
    more = {
        "tokenizer.ggml.tokens": [*tokens, "<image>"],
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], 3],
    }
    tokenizer = from_gguf(metadata | more)
    tokenizer.use_with(last + 5000)
    assert tokenizer.encode("a<image>", parse_special=True)[-1] == last
    assert tokenizer.decode([last + 1, last + 4999]) == ""
    assert tokenizer.stream().push(last + 4999) == ""
    tokenizer = from_gguf(metadata | more)
    tokenizer.use_with(last)
    assert last not in tokenizer.encode("<image>")
    for encode in (tokenizer.encode_prompt, tokenizer.encode_with_offsets):
        words = f"the token '<image>' ({last}), and the model has only {last} rows"
        refuses(lambda encode=encode: encode("a<image>b"), words)
    assert tokenizer.encode_prompt("ab")


@KINDS
def test_bad_use(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for wrong in (-1, tokenizer.vocab_size):
        words = f"token id {wrong} is outside"
        refuses(lambda wrong=wrong: tokenizer.decode([0, wrong]), words)
        refuses(lambda wrong=wrong: tokenizer.stream().push(wrong), words)
    refuses(lambda: tokenizer.encode("a\udc80"), "lone surrogate '\\udc80' at character 1")
    refuses(lambda: tokenizer.encode_with_offsets("a\udc80"), "lone surrogate")


def test_tokens_a_model_lacks_are_refused():
    bare = {k: v for k, v in RECORDED["bytes"].items() if "token_id" not in k}
    tokenizer = from_gguf({**bare, "tokenizer.ggml.pre": "gpt-2"})
    assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, -1)
    refuses(lambda: tokenizer.encode("a", bos=True), "no BOS token")
    refuses(lambda: tokenizer.encode("a", eos=True), "no EOS token")
