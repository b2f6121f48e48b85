"""GGUF vocabularies against llama.cpp, recorded and live, and against what they were made from."""

import json

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from lm.files.gguf import read_gguf
from lm.files.packaged import find_packaged
from lm.tokenizers import from_gguf
from tests.conftest import ROOT
from tests.tokenizers import golden, lines, llamacpp

RECORDED = json.loads(golden.FILE.read_text())
SMALL = golden.small(RECORDED)
SHARED = ROOT.parent / "shared" / "data" / "llamacpp"
NAMES = [f"{name}-{'-'.join(map(str, changes.values()))}" for name, changes, _ in golden.SMALL]
LINES = golden.all_lines()


@pytest.fixture(scope="session")
def real():
    """The tokenizer of a packaged model, by its name."""
    opened = {}

    def open_one(name):
        if name not in opened:
            try:
                path = find_packaged(name)
            except FileNotFoundError as error:
                pytest.skip(f"{error}")
            opened[name] = from_gguf(read_gguf(path).metadata, str(path))
        return opened[name]

    return open_one


def encoded(tokenizer, texts, parse_special):
    """What llama.cpp's `add_special` gives: the model's own BOS and EOS around the text."""
    return tokenizer.encode_batch(
        texts, tokenizer.add_bos, tokenizer.add_eos, parse_special=parse_special
    )


def check_recorded(tokenizer, case):
    assert (RECORDED["num_lines"], RECORDED["block"]) == (len(LINES), golden.BLOCK)
    skipped = set(case["skipped"])
    assert len(skipped) < 0.75 * len(LINES)
    kept = [line for i, line in enumerate(LINES) if i not in skipped]
    for key, parse_special in (("plain", False), ("parsed", True)):
        ids = encoded(tokenizer, kept, parse_special)
        assert golden.digest(ids) == case[key], key
    assert case["plain"] != case["parsed"]


@pytest.mark.parametrize("n", range(len(SMALL)), ids=NAMES)
def test_equals_llamacpp_recorded(n):
    check_recorded(from_gguf(SMALL[n]), RECORDED["cases"][n])


@pytest.mark.model
@pytest.mark.parametrize("n", range(len(golden.MODELS)), ids=golden.MODELS)
def test_real_vocabulary_equals_llamacpp_recorded(real, n):
    tokenizer = real(golden.MODELS[n])
    check_recorded(tokenizer, RECORDED["cases"][len(SMALL) + n])
    for ids in tokenizer.encode_batch(LINES, parse_special=True):
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def kept(tokenizer, text):
    return tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(llamacpp.python() is None, reason="needs xllamacpp; see llamacpp.py")
@pytest.mark.parametrize("name", golden.MODELS)
def test_real_vocabulary_equals_llamacpp_live(real, name):
    tokenizer = real(name)
    texts = [*lines.synthetic(5000, golden.SPECIAL, seed=2), *lines.library(5000)]
    if name == "smollm2-135m-instruct":
        # Bytes that this vocabulary lacks are lost; the library drops them before it merges.
        texts = [text for text in texts if not golden.c1_control(text) and kept(tokenizer, text)]
        assert len(texts) > 8000
    path = {"path": str(find_packaged(name))}
    _, [[plain, parsed]] = llamacpp.tokenize_live([path], texts, (False, True))
    assert encoded(tokenizer, texts, False) == plain
    assert encoded(tokenizer, texts, True) == parsed


@pytest.mark.slow
@pytest.mark.skipif(llamacpp.python() is None, reason="needs xllamacpp; see llamacpp.py")
def test_the_record_is_what_llamacpp_says_today():
    _, ids = llamacpp.tokenize_live(SMALL[:2], LINES[:200], (False,))
    for n in range(2):
        skipped = set(RECORDED["cases"][n]["skipped"])
        kept = [row for i, row in enumerate(ids[n][0]) if i not in skipped]
        full = len(kept) // golden.BLOCK
        assert golden.digest(kept)[:full] == RECORDED["cases"][n]["plain"][:full]


@pytest.mark.model
@pytest.mark.parametrize("file", ["smollm2_f32", "smollm2_q4_1", "gemma3_f32", "gemma3_q4_k_m"])
def test_recorded_generations(real, file):
    path = SHARED / f"{file}.json"
    if not path.is_file():
        pytest.skip(f"needs recorded generations at {path}")
    tokenizer = real("smollm2-135m-instruct" if "smol" in file else "gemma3-270m")
    results = json.loads(path.read_text())["results"]
    assert results
    for result in results:
        assert tokenizer.encode_prompt(result["prompt"]) == result["prompt_ids"]
        ids = result["output_ids"]
        text = tokenizer.decode(ids, skip_special=False, continuation=True)
        assert text == result["text"]
        stream = tokenizer.stream(skip_special=False, continuation=True)
        assert "".join(map(stream.push, ids)) + stream.finish() == text


@pytest.fixture(scope="module", params=["gpt-2", "smollm"])
def pair(request):
    """Our reading of a rule, and the same rule as `tokenizers` has it built in."""
    metadata = RECORDED["vocabularies"]["bytes"]
    tokens = metadata["tokenizer.ggml.tokens"]
    oracle = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        )
    )
    words = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if request.param == "smollm":
        words = [pre_tokenizers.Digits(individual_digits=True), *words]
    oracle.pre_tokenizer, oracle.decoder = pre_tokenizers.Sequence(words), decoders.ByteLevel()
    return from_gguf({**metadata, "tokenizer.ggml.pre": request.param}), oracle


@pytest.mark.parametrize("num_lines", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_equals_the_library_s_own_pretokenizers(pair, num_lines):
    """C1 controls included."""
    tokenizer, oracle = pair
    texts = [*lines.synthetic(num_lines, seed=3), *lines.library(num_lines)]
    ids = tokenizer.encode_batch(texts)
    assert ids == [row.ids for row in oracle.encode_batch_fast(texts)]
    assert [tokenizer.decode(row) for row in ids] == oracle.decode_batch(ids) == texts


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_equals_the_library(pair, text):
    tokenizer, oracle = pair
    assert tokenizer.encode(text) == oracle.encode(text).ids


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_ids_decode_as_the_library_does(pair, data):
    tokenizer, oracle = pair
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    ids = [i for i in ids if i not in tokenizer.special_ids]
    assert tokenizer.decode(ids) == oracle.decode(ids)


def test_ends_and_rules():
    byte_level, pieces = from_gguf(SMALL[0]), from_gguf(SMALL[-1])
    assert (byte_level.bos_id, byte_level.eos_id, byte_level.pad_id) == (1, 2, -1)
    assert byte_level.eos_ids == (2, 0)  # <|im_end|> by the file, <|endoftext|> by its name
    assert not byte_level.add_bos and not byte_level.strips_space
    turn = SMALL[-1]["tokenizer.ggml.tokens"].index("<end_of_turn>")
    assert pieces.eos_ids == (2, turn)
    assert pieces.add_bos and pieces.add_eos and pieces.strips_space
    assert pieces.encode_prompt("a")[:1] == [1] and pieces.encode_prompt("a")[-1] == 2
    assert pieces.encode_prompt("<s>a") == pieces.encode_prompt("a")
    llama = from_gguf({**SMALL[0], "tokenizer.ggml.pre": "llama-bpe"})
    assert llama.add_bos and llama.encode_prompt("")[:1] == [1]


@pytest.mark.parametrize("base", [SMALL[0], SMALL[-1]], ids=["bytes", "pieces"])
def test_empty_and_equal_tokens(base):
    """As in llama.cpp: an empty token is never made of text, of equal ones the last is used."""
    more = {"tokens": ["", "<twice>", "<twice>"], "token_type": [1, 4, 4], "scores": [0.0] * 3}
    keys = {f"tokenizer.ggml.{key}": values for key, values in more.items()}
    longer = {key: [*base[key], *values] for key, values in keys.items() if key in base}
    plain, tokenizer = from_gguf(base), from_gguf({**base, **longer})
    size = plain.vocab_size
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.encode("a  b") == plain.encode("a  b")
    assert tokenizer.encode("<twice>")[-1] == size + 2
    assert tokenizer.decode([size]) == "" and tokenizer.decode([size + 2]) == "<twice>"
    assert tokenizer.decode([size + 1]) == "<twice>"


def change(**changes):
    keys = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {k: v for k, v in ({**SMALL[0], **keys}).items() if v is not None}


TOKENS = SMALL[0]["tokenizer.ggml.tokens"]
MERGES = SMALL[0]["tokenizer.ggml.merges"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (change(model=None), "has no tokenizer.ggml.model"),
        (change(model="bert"), "model='bert', WordPiece"),
        (change(model="t5"), "model='t5', SentencePiece unigram"),
        (change(model="rwkv"), "model='rwkv', RWKV"),
        (change(model="new"), "model='new' which is not supported"),
        (change(model=3), "model is 3; a string was expected"),
        (change(pre=None), "has no pre-tokenizer"),
        (change(pre="zyx"), "the unknown pre-tokenizer 'zyx'.*smollm"),
        (change(tokens=None), "has no tokenizer.ggml.tokens"),
        (change(token_type=[1, 1]), f"token_type has 2 entries for {len(TOKENS)} tokens"),
        (change(token_type=[9] * len(TOKENS)), "token 0 has the unknown type 9"),
        (change(merges=None), "has no tokenizer.ggml.merges"),
        (change(merges=[*MERGES, "zq xj"]), rf"merge {len(MERGES)} .'zq xj'. needs .* 'zq'"),
        (change(merges=["ab"]), "merge 0 is 'ab'; 'left right' was expected"),
        (change(eos_token_id=10**6), r"eos_token_id=1000000 is outside"),
        (change(bos_token_id=None, add_bos_token=True), "add_bos_token is true, and"),
        (change(model="llama"), "has no tokenizer.ggml.scores"),
        (change(model="llama", scores=[0.0]), f"scores has 1 entries for {len(TOKENS)}"),
        (change(model="llama", scores=[float("nan")] * len(TOKENS)), "score of token 0 is nan"),
        (
            {
                **SMALL[-1],
                "tokenizer.ggml.token_type": [6] * len(SMALL[-1]["tokenizer.ggml.tokens"]),
            },
            "byte tokens must be <0x00> to <0xFF>, and .* is none of them",
        ),
    ],
)
def test_bad_metadata(metadata, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(metadata, "file.gguf")
