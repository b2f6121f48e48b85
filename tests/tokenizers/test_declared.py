"""Tokens and settings beside a vocabulary: right values, and drawn folders against transformers."""

import dataclasses
import json
import random

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lm.tokenizers import ChatTemplate, from_gguf, open_tokenizer
from lm.tokenizers.sentencepiece_fast import fast_vocabulary
from lm.tokenizers.sentencepiece_model import UNIGRAM, serialize
from tests.refuses import refuses
from tests.tokenizers import golden

FLAGS = ("lstrip", "rstrip", "normalized", "single_word")
CONTENTS = ["<eos>", "<|im_start|>", "<|im_end|>", "[PAD]", "tool", "<a b>", "</s>", "<image>"]
NAMES = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]


def bytes_only(*added):
    """256 bytes, of which "a" is 64, and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(list(added))
    return inner


def write(folder, inner, **files):
    """tokenizer.json, and other files by their names without ".json"."""
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


EOS = AddedToken("<eos>", special=True, normalized=False)


def token(content, **flags):
    """An entry of `added_tokens_decoder`."""
    return {"content": content, "special": True, **dict.fromkeys(FLAGS, False), **flags}


def named(**tokens):
    """tokenizer_config.json with tokens by their names."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", **tokens}


def table(*entries, **tokens):
    """tokenizer_config.json with a table of added tokens, numbered from 256 on."""
    numbered = {str(256 + i): entry for i, entry in enumerate(entries)}
    return {"tokenizer_config": named(added_tokens_decoder=numbered, **tokens)}


START, END = token("<|im_start|>"), token("<|im_end|>")
# Added tokens of tokenizer.json, the other files, a text, and its ids ("a" is 64, a space 220).
RIGHT = {
    "in the configuration": ([EOS], table(token("<eos>"), START, END), "<|im_start|>a", [257, 64]),
    "in a file": (
        [EOS],
        {"tokenizer_config": named(), "added_tokens": {"<|im_end|>": 258, "<|im_start|>": 257}},
        "<|im_start|>a<|im_end|>",
        [257, 64, 258],
    ),
    "EOS too": (
        [EOS],
        table(token("<eos>"), END, eos_token="<|im_end|>"),
        "a<|im_end|>",
        [64, 257],
    ),
    "not marked special": (
        [AddedToken("<eos>", special=False, normalized=False)],
        {"tokenizer_config": named()},
        "<eos>a",
        [256, 64],
    ),
    "no padding token": (
        [EOS],
        {"tokenizer_config": named(pad_token="[PAD]")},
        "a[PAD]",
        [64, 257],
    ),
    "names in their order": (
        [EOS],
        {"tokenizer_config": named(pad_token="<p>", image_token="<i>", bos_token="<b>")},
        "<b><p><i>",
        [257, 258, 259],
    ),
    "older map": (
        [EOS],
        {"tokenizer_config": named(pad_token="<no>"), "special_tokens_map": {"pad_token": "<p>"}},
        "<p>a",
        [257, 64],
    ),
    "older map that does not count": (
        [EOS],
        {**table(token("<eos>")), "special_tokens_map": {"pad_token": "a"}},
        "a<p>",
        [64, 27, 79, 29],
    ),
    "more": (
        [EOS],
        {"tokenizer_config": named(additional_special_tokens=["<|a|>", "<|b|>"])},
        "<|b|><|a|>",
        [258, 257],
    ),
    "numbers left out": (
        [EOS],
        {"tokenizer_config": named(), "added_tokens": {"<x>": 300, "<y>": 400}},
        "<eos><y><x>",
        [256, 258, 257],
    ),
    "strips": (
        [EOS],
        table(token("<eos>"), token("<x>", lstrip=True, rstrip=True)),
        "a <x> a",
        [64, 257, 64],
    ),
    "whole words": (
        [EOS],
        table(token("<eos>"), token("aa", single_word=True, special=False)),
        "aa aaa",
        [257, 220, 64, 64, 64],
    ),
    "other flags": (
        [EOS, AddedToken("<x>", special=False, normalized=False)],
        table(token("<eos>"), token("<x>", lstrip=True)),
        "a <x>",
        [64, 257],
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_values(tmp_path, name):
    added, files, text, ids = RIGHT[name]
    tokenizer = open_tokenizer(write(tmp_path, bytes_only(*added), **files))
    assert tokenizer.encode(text, parse_special=True) == ids
    eos = tokenizer.special_tokens[tokenizer.named_tokens["eos_token"]]
    assert tokenizer.eos_ids == (eos,)
    assert eos not in tokenizer.encode(text)  # no text can forge an end


def test_bos_and_eos_that_are_not_there(tmp_path):
    """Asked for without a token they are left out; EOS never follows an open turn."""
    config = named(bos_token=None, add_bos_token=True, add_eos_token=True)
    tokenizer = open_tokenizer(write(tmp_path, bytes_only(EOS), tokenizer_config=config))
    assert tokenizer.encode_prompt("a") == [64, 256]
    assert tokenizer.encode_prompt("a", opened=True) == [64]
    refuses(lambda: tokenizer.encode("a", bos=True), "no BOS token")
    del config["eos_token"]
    tokenizer = open_tokenizer(write(tmp_path, bytes_only(EOS), tokenizer_config=config))
    assert tokenizer.encode_prompt("a") == [64] and tokenizer.eos_ids == ()


def test_templates_bind_every_named_token(tmp_path):
    extra = {"image_token": "<image>"}
    config = named(pad_token="<pad>", boi_token="<boi>", extra_special_tokens=extra)
    folder = write(tmp_path, bytes_only(EOS), tokenizer_config=config)
    tokenizer = open_tokenizer(folder)
    names = ("bos", "eos", "pad", "unk", "image", "boi")
    source = "".join(f"{{{{ {n}_token }}}}{{{{ {n}_token is defined }}}} " for n in names)
    expected = "False <eos>True <pad>True False <image>True <boi>True "
    (folder / "chat_template.jinja").write_text(source)  # counts more than the configuration's
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "no"}))
    for template in (
        ChatTemplate.with_tokens(tokenizer, source),
        ChatTemplate.of(open_tokenizer(folder)),
    ):
        assert template.render([]) == expected
        assert template.render([], pad_token="own").count("own") == 1


# Where the space in front of text goes: settings, and the text of the tokens of "a</s>b".
SPACES = [
    ("model", {}, " a", " b"),
    ("model", {"legacy": True}, " a", " b"),
    ("model", {"legacy": False}, " a", "b"),
    ("model", {"add_prefix_space": False}, "a", "b"),
    ("model", {"legacy": False, "add_prefix_space": False}, "a", "b"),
    ("json", {}, " a", " b"),
    ("json", {"legacy": False}, " a", " b"),  # it was written with that setting
    ("json", {"legacy": False, "add_prefix_space": True}, " a", "b"),
    ("json", {"add_prefix_space": False}, "a", "b"),
    ("json", {"add_prefix_space": False, "tokenizer_class": "GemmaTokenizerFast"}, " a", " b"),
]


@pytest.mark.parametrize(("kind", "settings", "first", "second"), SPACES)
def test_spaces_in_front(tmp_path, kind, settings, first, second):
    model = from_gguf(json.loads(golden.FILE.read_text())["vocabularies"]["pieces"]).model
    if kind == "model":
        (tmp_path / "tokenizer.model").write_bytes(serialize(model))
    else:
        fast_vocabulary(model, "m").save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(tmp_path)
    ids = tokenizer.encode("a</s>b", parse_special=True)
    assert b"".join(tokenizer.token_bytes[i] for i in ids).decode() == f"{first}</s>{second}"
    assert tokenizer.decode(tokenizer.encode("a")) == "a"


@pytest.mark.parametrize(("kind", "legacy"), [("bpe", True), ("bpe", False), ("unigram", True)])
def test_tokens_beside_a_model_file(tmp_path, kind, legacy):
    """They are found anywhere in the text, special or not, as SentencePiece's own."""
    model = from_gguf(json.loads(golden.FILE.read_text())["vocabularies"]["pieces"]).model
    if kind == "unigram":  # as of T5, with its normalization of blanks
        changes = {"model_type": UNIGRAM, "remove_extra_whitespaces": True}
        model = dataclasses.replace(model, **changes)
    (tmp_path / "tokenizer.model").write_bytes(serialize(model))
    size, mark = len(model.pieces), model.pieces[-1]
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|end|>", "legacy": legacy}
    config["additional_special_tokens"] = [mark]  # which the model takes for text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size, "<|in|>": size + 1}))
    tokenizer = open_tokenizer(tmp_path)
    text = f"<|in|>a{mark}<|end|>a<|in|>"
    ids = tokenizer.encode(text, parse_special=True)
    assert [i for i in ids if i >= size - 1] == [size + 1, size - 1, size, size + 1]
    assert size not in tokenizer.encode(text)
    assert (size - 1 in tokenizer.encode(text)) == (not legacy)  # made of its parts, by merges
    assert tokenizer.eos_ids == (size,)
    assert tokenizer.decode(ids, skip_special=False).replace(" ", "") == text
    assert tokenizer.vocab_size == size + 2


@pytest.mark.parametrize(
    ("inside", "settings", "expected"),
    [
        (False, {"add_prefix_space": True}, True),
        (True, {"add_prefix_space": False}, False),
        (True, {"tokenizer_class": "GPT2Tokenizer"}, False),  # its default
        (True, {}, True),
    ],
)
def test_spaces_in_front_of_bytes(tmp_path, inside, settings, expected):
    inner = bytes_only(EOS)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=inside)
    tokenizer = open_tokenizer(write(tmp_path, inner, tokenizer_config=settings))
    assert tokenizer.encode("a") == [220] * expected + [64]


def drawn(rng, folder):
    """A folder in which tokens stand in any of the files, and names anywhere."""
    contents = rng.sample(CONTENTS, rng.randrange(2, len(CONTENTS)))

    def flags(special):
        found = {flag: rng.random() < 0.25 for flag in FLAGS} if rng.random() < 0.5 else {}
        return {**found, "normalized": found.get("normalized", False), "special": special}

    def added(content):
        return AddedToken(content, **flags(rng.random() < 0.6))

    inside = [added(content) for content in contents if rng.random() < 0.5]
    inner = bytes_only(*inside)
    files = {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    outside = [c for c in contents if inner.token_to_id(c) is None]
    table = {**{inner.token_to_id(t.content): t for t in inside}}
    if rng.random() < 0.6:
        table |= {256 + len(inside) + i: added(content) for i, content in enumerate(outside)}
        config["added_tokens_decoder"] = {
            str(i): {
                "content": t.content,
                "special": t.special,
                **{f: getattr(t, f) for f in FLAGS},
            }
            for i, t in table.items()
        }
    else:
        files["added_tokens"] = {c: 256 + len(inside) + i for i, c in enumerate(outside)}
    named = dict(zip(rng.sample(NAMES, 4), rng.choices([*contents, "<new>"], k=4), strict=True))
    named = {
        k: v if rng.random() < 0.5 else {"content": v, **flags(True)} for k, v in named.items()
    }
    for value in named.values():
        if isinstance(value, dict):
            value.pop("special")
            value["__type"] = "AddedToken"
    config |= named
    if rng.random() < 0.3:
        config["additional_special_tokens"] = rng.sample(contents, 1)
    return write(folder, inner, tokenizer_config=config, **files)


def texts(rng):
    parts = [*CONTENTS, "<new>", " ", "a", "b ", "\n", "tools"]
    return ["".join(rng.choices(parts, k=12)) for _ in range(10)]


@pytest.mark.oracle
def test_right_values_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the `peers` extra")
    for name, (added, files, text, ids) in RIGHT.items():
        folder = write(tmp_path / name, bytes_only(*added), **files)
        oracle = transformers.AutoTokenizer.from_pretrained(folder)
        assert oracle.encode(text, add_special_tokens=False) == ids, name


@pytest.mark.oracle
def test_drawn_folders_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the `peers` extra")
    rng = random.Random(1)
    for n in range(20):
        folder = drawn(rng, tmp_path / str(n))
        oracle = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer = open_tokenizer(folder)
        said = (folder / "tokenizer_config.json").read_text()
        for text in texts(rng):
            ids = tokenizer.encode(text, parse_special=True)
            assert ids == oracle.encode(text, add_special_tokens=False), (text, said)
            assert tokenizer.decode(ids, skip_special=False) == oracle.decode(ids)
        names = {k: v for k, v in tokenizer.named_tokens.items() if isinstance(v, str)}
        assert names == oracle.special_tokens_map
        assert {*oracle.all_special_tokens} <= {*tokenizer.special_tokens}, said
