"""Tokens and settings beside a vocabulary, on drawn folders, against transformers."""

import json
import random

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lm.tokenizers import open_tokenizer

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


def drawn(rng, folder):
    """A folder in which tokens stand in any of the files, and names anywhere."""
    contents = rng.sample(CONTENTS, rng.randrange(2, len(CONTENTS)))

    def flags(special):
        found = {flag: rng.random() < 0.25 for flag in FLAGS} if rng.random() < 0.5 else {}
        return {**found, "normalized": found.get("normalized", False), "special": special}

    def token(content):
        return AddedToken(content, **flags(rng.random() < 0.6))

    inside = [token(content) for content in contents if rng.random() < 0.5]
    inner = bytes_only(*inside)
    files = {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    outside = [c for c in contents if inner.token_to_id(c) is None]
    table = {**{inner.token_to_id(t.content): t for t in inside}}
    if rng.random() < 0.6:
        table |= {256 + len(inside) + i: token(content) for i, content in enumerate(outside)}
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
