import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.tokenizers import SentencePieceTokenizer, train_sentencepiece
from tests.refuses import refuses

SENTENCES = [
    "def add(first, second):\n    return first + second  # 2024\n",
    "The quick brown fox jumps over the lazy dog.\n\nPack my box with jugs.\n",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e\n\ttabs and    spaces  \n",
]
# Lone surrogates are the only characters of a str that are no text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_sentencepiece(SENTENCES * 5, path, 340)


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, max_size=4), st.booleans(), st.booleans())
def test_round_trip_of_text_never_seen(tokenizer, texts, bos, eos):
    encoded = tokenizer.encode_batch(texts, bos, eos)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert encoded == [tokenizer.encode(text, bos, eos) for text in texts]
    for ids in encoded:
        assert (ids[:1] == [tokenizer.bos_id]) == bos
        assert (ids[-1:] == [tokenizer.eos_id]) == eos
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.bos_id not in ids[bos:]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " lead and trail  ",
        "\0a\0",
        "\u2581\u2581 a\u2581",  # SentencePiece's own mark for a space
        "\r\n\t\x0b\x01\x7f\ufeff",
        "<s></s><pad><unk><0x41>",
        "\u0301\u200d\U0010ffff\uffff\U0001f642",
    ],
)
def test_round_trip_of_awkward_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    assert not special & set(ids)


def test_digits_stand_alone(tokenizer):
    assert len(tokenizer.encode("2024")) == 4


def test_training_is_deterministic_and_survives_the_file(tmp_path):
    first = train_sentencepiece(SENTENCES * 5, tmp_path / "a.model", 320)
    second = train_sentencepiece(SENTENCES * 5, tmp_path / "b.model", 320)
    other = train_sentencepiece(SENTENCES * 5, tmp_path / "c.model", 321)
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert (first.vocab_size, other.vocab_size) == (320, 321)
    assert SentencePieceTokenizer(tmp_path / "a.model").fingerprint == first.fingerprint


def test_a_long_line_is_learned_from(tmp_path):
    # Beyond 4192 bytes SentencePiece by itself drops a line without an error.
    line = "zyx" * 20_000
    tokenizer = train_sentencepiece([line, *SENTENCES * 5], tmp_path / "t.model", 340)
    assert len(tokenizer.encode("zyxzyxzyxzyx")) <= 4


def test_the_sample_is_capped(tmp_path):
    capped = train_sentencepiece(
        [*SENTENCES * 5, "qqqq" * 500], tmp_path / "a.model", 320, max_bytes=300
    )
    short = train_sentencepiece(SENTENCES * 2, tmp_path / "b.model", 320, max_bytes=300)
    assert capped.fingerprint == short.fingerprint


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (SENTENCES, 5000, r"vocab_size=5000 is too large .* at most (\d+); lower vocab_size to \1"),
        (SENTENCES, 100, r"vocab_size=100 is below 261"),
        (SENTENCES, 262, r"vocab_size=262 has no room for .* raise vocab_size, to \d+ for all"),
        (["", ""], 300, r"every document is empty"),
        (["\ud800"], 300, r"lone surrogate '\\ud800' at character 0"),
    ],
)
def test_bad_training_input(tmp_path, texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(texts, tmp_path / "t.model", vocab_size)
    assert not list(tmp_path.iterdir())


def test_the_remedy_for_a_large_vocabulary_works(tmp_path):
    error = refuses(lambda: train_sentencepiece(SENTENCES, tmp_path / "t.model", 5000))
    most = int(str(error).split("at most ")[1].split(";")[0])
    assert train_sentencepiece(SENTENCES, tmp_path / "t.model", most).vocab_size == most


def test_bad_files(tmp_path):
    missing, bad = tmp_path / "missing.model", tmp_path / "bad.model"
    refuses(lambda: SentencePieceTokenizer(missing), "missing.model", error=FileNotFoundError)
    bad.write_bytes(b"no model at all")
    refuses(lambda: SentencePieceTokenizer(bad), "bad.model' is not a SentencePiece model")


def test_import_loads_no_jax():
    code = (
        "import sys, lm.tokenizers, lm.data, data_pipelines.local_text\n"
        "assert not {'jax', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
