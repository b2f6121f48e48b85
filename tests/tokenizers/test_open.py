"""Opening tokenizers from folders and files, and the tokenizer.json kind against its library."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lm.tokenizers import (
    ChatTemplate,
    FastTokenizer,
    SentencePieceTokenizer,
    from_gguf,
    open_tokenizer,
    train_sentencepiece,
)
from tests.refuses import refuses
from tests.tokenizers import golden, lines, llamacpp

RECORDED = json.loads(golden.FILE.read_text())["vocabularies"]
SPECIAL = ["<bos>", "<eos>", "<end_of_turn>"]
LINES = [*lines.synthetic(1000, tuple(SPECIAL), seed=6), *lines.library(1000)]


def train(layout):
    """A tokenizer of the library's own making: byte-level, or SentencePiece-like with fallback."""
    if layout == "byte-level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), SPECIAL
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(" ", 1, 0)] if layout == "prefixed" else [])
        )
        steps = [normalizers.Prepend("\u2581")] if layout == "prefixed" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
        alphabet, special = [], [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines.library(1500, seed=1), trainer)
    if layout != "byte-level":  # byte tokens are ordinary ones in such files
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=["byte-level", "fallback", "prefixed"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    train(request.param).save(str(path / "tokenizer.json"))
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "chat_template": "old"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ends = [SPECIAL.index("<eos>"), SPECIAL.index("<end_of_turn>")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    return path


def test_equals_the_library(folder):
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode_batch(LINES, parse_special=True)
    assert ids == [row.ids for row in oracle.encode_batch_fast(LINES, add_special_tokens=False)]
    assert [tokenizer.encode_prompt(text) for text in LINES[:200] if "<bos>" not in text] == [
        oracle.encode(text).ids for text in LINES[:200] if "<bos>" not in text
    ]
    # Of bytes that form no character the library's byte fallback makes one U+FFFD each.
    texts = [tokenizer.decode(row) for row in ids]
    assert texts == [oracle.decode(row) for row in ids]
    assert tokenizer.decode(ids[0], skip_special=False) == oracle.decode(
        ids[0], skip_special_tokens=False
    )


def test_plain_text_holds_no_special_tokens(folder):
    tokenizer = open_tokenizer(folder)
    text = "a<bos><eos>b"
    assert not tokenizer.special_ids & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rules_of_a_folder(folder):
    tokenizer = open_tokenizer(folder)
    assert isinstance(tokenizer, FastTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.eos_ids == (1, 2)
    assert tokenizer.add_bos and not tokenizer.add_eos
    assert set(tokenizer.special_tokens) == set(SPECIAL)
    template = ChatTemplate.of(tokenizer)
    text = template.render([{"role": "user", "content": "hi"}])
    assert text == "<bos>hi"
    assert tokenizer.encode_prompt(text).count(0) == 1
    assert open_tokenizer(folder / "tokenizer.json").fingerprint == tokenizer.fingerprint


def test_the_configuration_overrides_the_post_processor(tmp_path):
    train("byte-level").save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(tmp_path).add_bos
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config = {"add_bos_token": False, "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(tmp_path)
    assert not tokenizer.add_bos
    assert tokenizer.chat_templates == {"default": "a", "tool_use": "b"}


def test_gguf_files_and_training_runs(tmp_path):
    metadata = {**RECORDED["bytes"], "tokenizer.ggml.pre": "qwen2"}
    llamacpp.write_model(tmp_path / "m.gguf", metadata)
    tokenizer = open_tokenizer(tmp_path / "m.gguf")
    assert tokenizer.fingerprint == from_gguf(metadata).fingerprint
    assert tokenizer.token_bytes == from_gguf(metadata).token_bytes
    llamacpp.write_model(tmp_path / "p.gguf", RECORDED["pieces"])
    pieces = open_tokenizer(str(tmp_path / "p.gguf"))
    assert pieces.fingerprint == from_gguf(RECORDED["pieces"]).fingerprint

    trained = train_sentencepiece(LINES[1000:], tmp_path / "run" / "data" / "tokenizer.model", 700)
    (tmp_path / "run" / "config.json").write_text("{}")
    for path in (tmp_path / "run", tmp_path / "run" / "data", trained.path):
        opened = open_tokenizer(path)
        assert isinstance(opened, SentencePieceTokenizer)
        assert opened.fingerprint == trained.fingerprint
        assert opened.eos_ids == (trained.eos_id,)


def test_a_folder_with_a_model_file_has_its_configuration(tmp_path):
    trained = train_sentencepiece(LINES[1000:], tmp_path / "tokenizer.model", 700)
    config = {"add_bos_token": False, "add_eos_token": True, "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (False, True)
    assert tokenizer.chat_templates == {"default": "x"}
    assert tokenizer.encode("a b") == trained.encode("a b")


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_foreign_sentencepiece_models_equal_sentencepiece(tmp_path, kind, prefix):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines.library(1500)),
        model_prefix=str(tmp_path / "m"),
        vocab_size=800,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<x>", "abc"],
        control_symbols=["<turn>"],
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    tokenizer = open_tokenizer(tmp_path / "m.model")
    texts = [text.replace("\u2581", "") for text in lines.synthetic(2000, ("<x>",), seed=7)]
    ids = tokenizer.encode_batch(texts)
    assert ids == oracle.encode(texts)
    assert [tokenizer.decode(row) for row in ids] == oracle.decode(ids)
    assert tokenizer.strips_space == prefix
    turn = oracle.piece_to_id("<turn>")
    assert tokenizer.encode("a<turn>b", parse_special=True).count(turn) == 1
    assert turn not in tokenizer.encode("a<turn>b")


def test_what_cannot_be_opened(tmp_path):
    nowhere = tmp_path / "nowhere"
    words = f"no tokenizer at '{nowhere}': it does not exist"
    refuses(lambda: open_tokenizer(nowhere), words, error=FileNotFoundError)
    words = "no tokenizer in", "; give a folder with"
    refuses(lambda: open_tokenizer(tmp_path), *words, error=FileNotFoundError)
    for name, content, words in (
        ("a.txt", b"a", "a.txt' is not a tokenizer; give a folder with"),
        ("tokenizer.json", b"{}", "is not a tokenizer.json"),
        ("m.gguf", b"GGUFxxxx", "m.gguf"),
    ):
        (tmp_path / name).write_bytes(content)
        refuses(lambda name=name: open_tokenizer(tmp_path / name), words)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "holds a list; an object was expected"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"5": {"text": "<no>"}}}',
            "malformed table of added tokens",
        ),
        (
            "tokenizer_config.json",
            '{"chat_template": 5}',
            "chat_template is 5; a text was expected",
        ),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "'name' and 'template'"),
        ("tokenizer_config.json", "[" * 100_000, "is not JSON"),
        ("chat_template.jinja", b"caf\xe9", "chat_template.jinja' is not UTF-8"),
    ],
)
def test_bad_configurations(tmp_path, file, content, message):
    train("byte-level").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(lambda: open_tokenizer(tmp_path), message)


def test_decoders_without_bytes_are_refused():
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    refuses(
        lambda: FastTokenizer(words, "bert"), "'bert' decodes with WordPiece, which has no bytes"
    )
    tokenizer = train("byte-level")
    pair = [("<bos>", 0), ("<eos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <eos> $A <eos>", special_tokens=pair
    )
    refuses(lambda: FastTokenizer(tokenizer, "odd"), "more around a text than one BOS and one EOS")
