"""Named sources and validation sets: their files, their errors, and the corpus built of them."""

import dataclasses
import functools
import gzip
import importlib.util
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines import local_text
from data_pipelines.documents import DataSource, SystemText, ValidationSet
from data_pipelines.local_text import build
from lm.config import codec, fields
from lm.data import Batches, DataStage, Share
from lm.data.corpus import CorpusError
from tests.data.foreign import write_tfds
from tests.refuses import refuses

WORDS = ["model", "reads", "rows", "tokens", "while", "loss", "falls", "steps", "weights", "move"]


def sentences(num, seed, words=40, alphabet=WORDS):
    rng = random.Random(seed)
    return [" ".join(rng.choice(alphabet) for _ in range(words)) + f" {i}." for i in range(num)]


def write_jsonl(path, texts, field="text", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": i, field: t} | more) + "\n" for i, t in enumerate(texts))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def write_wiki(directory, texts, field="text"):
    features = {field: tfds.features.Text(), "number": np.int64}
    splits = {"train": texts, "test": ["of the test split"]}
    examples = {s: [{field: t, "number": 1} for t in texts] for s, texts in splits.items()}
    return write_tfds(directory, features, examples)


def documents(source):
    dropped = Counter()
    texts = source.documents(source.find(), 0, dropped, set())
    return [t.text for t in texts], dropped


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three sources and a validation set; a hundred documents of one are in the validation set."""
    root = tmp_path_factory.mktemp("corpus")
    texts = {name: sentences(300, seed) for seed, name in enumerate(("web", "wiki", "exam"))}
    texts["books"] = sentences(40, 9, words=200)
    texts["web"] += texts["exam"][:100]
    write_jsonl(root / "web" / "a.jsonl", texts["web"][:250], "content")
    write_jsonl(root / "web" / "b.jsonl.gz", texts["web"][250:], "content")
    write_wiki(root / "wiki" / "1.0.0", texts["wiki"], "article")
    for i, text in enumerate(texts["books"]):
        (root / "books").mkdir(exist_ok=True)
        (root / "books" / f"{i}.txt").write_text(text)
    write_jsonl(root / "exam.jsonl", texts["exam"])
    sources = (
        DataSource("web", (f"{root}/web/*.jsonl*",), "jsonl", "content", weight=2, held_out=0.1),
        DataSource("wiki", (f"{root}/wiki/*",), "array_record", "article", held_out=0.2),
        DataSource("books", (f"{root}/books/*.txt",), max_epochs=1.5, held_out=0.0),
    )
    validation = (ValidationSet("exam", (f"{root}/exam.jsonl",), "jsonl"),)
    options = {"sources": sources, "validation": validation, "vocab_size": 400, "progress": False}
    return build(root / "out", **options), options, texts


def test_every_source_is_whole_and_apart(corpus):
    built, _, texts = corpus
    assert built.names == ("web", "wiki", "books")
    assert built.validation_names == ("web", "wiki", "exam")
    for name in built.names:
        parts = [list(built.texts(s, name)) for s in built.summary["sources"][name]["splits"]]
        found = [text for part in parts for text in part]
        expected = texts[name][:300] if name == "web" else texts[name]
        assert sorted(found) == sorted(expected)
    assert sorted(built.texts("validation", "exam")) == sorted(texts["exam"])
    assert built.summary["sources"]["web"]["dropped"] == {"duplicate": 100}
    held = len(list(built.texts("validation", "wiki")))
    assert 0.1 * 300 < held < 0.3 * 300


def test_no_validation_text_is_trained_on(corpus):
    built, _, _ = corpus
    training = set(built.texts("train"))
    for name in built.validation_names:
        assert not training & set(built.texts("validation", name))


def test_one_tokenizer_and_its_mark_on_every_plan(corpus, tmp_path):
    built, options, _ = corpus
    again = build(tmp_path / "out", **options, tokenizer=built.tokenizer_path)
    assert again.summary["tokenizer"] == built.summary["tokenizer"]
    # Under another tokenizer the same text is another plan, even where the tokens agree.
    assert again.packed("train", 32, "books").hash == built.packed("train", 32, "books").hash
    marked = dataclasses.replace(again, summary=again.summary | {"tokenizer": {"fingerprint": "x"}})
    assert marked.source("train", "books").fingerprint == built.source("train", "books").fingerprint
    assert marked.packed("train", 32, "books").hash != built.packed("train", 32, "books").hash


def test_the_tokenizer_is_trained_by_weight(tmp_path, monkeypatch):
    """Of a budget of 3000 bytes, sources of weight 2 and 1 get two thirds and one."""
    latin = write_jsonl(tmp_path / "latin.jsonl", sentences(400, 0, 10))
    greek = write_jsonl(tmp_path / "greek.jsonl", sentences(100, 1, 10, ["αβγ", "δεζ", "ηθι"]))
    seen = []

    def train(texts, path, vocab_size, max_bytes):
        total = 0
        for text in texts:
            seen.append(text)
            total += len(text.encode())
            if total >= max_bytes:
                break
        raise ValueError("seen enough")

    monkeypatch.setattr(local_text, "train_sentencepiece", train)
    monkeypatch.setattr(local_text, "_TOKENIZER_BYTES", 3000)
    sources = [
        DataSource("latin", (str(latin),), "jsonl", weight=2),
        DataSource("greek", (str(greek),), "jsonl", weight=1),
    ]
    with pytest.raises(CorpusError, match="seen enough"):
        build(tmp_path / "out", sources=sources, progress=False)
    greek_bytes = sum(len(t.encode()) for t in seen if "α" in t or "δ" in t or "η" in t)
    assert greek_bytes / sum(len(t.encode()) for t in seen) == pytest.approx(1 / 3, abs=0.07)
    numbers = [int(t.split()[-1][:-1]) for t in seen if "α" not in t and "δ" not in t]
    assert max(numbers) > 200  # from all over the file


def test_weights_may_change_but_no_documents(corpus):
    built, options, _ = corpus
    web, *others = options["sources"]
    sources = (dataclasses.replace(web, weight=0.5, max_epochs=3), *others)
    assert build(built.directory, **options | {"sources": sources}).summary == built.summary
    sources = (dataclasses.replace(web, held_out=0.2), *others)
    with pytest.raises(CorpusError, match=r"web\.held_out=0\.2 \(there: 0\.1\)"):
        build(built.directory, **options | {"sources": sources})
    with pytest.raises(CorpusError, match=r"sources=\['wiki', 'books'\] \(there: \['web'"):
        build(built.directory, **options | {"sources": tuple(others)})


def test_a_mixture_of_the_sources_is_trained_on(corpus):
    built, options, _ = corpus
    sources = [built.packed("train", 32, name) for name in built.names]
    mixture = tuple(source.share for source in options["sources"])
    assert mixture[2] == Share("books", 1.0, max_epochs=1.5)
    batches = Batches(sources, [DataStage(8, mixture)], block=8)
    counts = np.bincount(np.concatenate([batches.rows(n)[0] for n in range(4)]), minlength=3)
    assert counts.tolist() == [16, 8, 8]
    tokenizer, batch = built.tokenizer(), batches.host_batch(0)
    text = " ".join(tokenizer.decode(row) for row in batch["ids"])
    assert set(re.findall(r"[a-z]{4,}", text)) & set(WORDS)


def test_a_name_is_asked_for_where_there_are_several(corpus):
    built, _, _ = corpus
    with pytest.raises(CorpusError, match=r"has no None; name one of \('web', 'wiki', 'books', 'e"):
        built.source("train")
    with pytest.raises(CorpusError, match="has no 'webb'"):
        built.packed("train", 32, "webb")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_plain_and_compressed(tmp_path, suffix):
    texts = ["one", "two\nlines", "caf\u00e9 \U0001f600", "", "\u2028 inside"]
    write_jsonl(tmp_path / f"a{suffix}", texts, "body", other=[1, {"body": 2}])
    found, dropped = documents(DataSource("a", (f"{tmp_path}/a*",), "jsonl", "body"))
    assert found == [t for t in texts if t]
    assert dropped == {"empty": 1}


def test_lines_as_windows_writes_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\ntwo"}\r\n\r\n{"text": "three"}')
    assert documents(DataSource("a", (str(path),), "jsonl"))[0] == ["one\ntwo", "three"]


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    source = DataSource("a", (str(path),), "jsonl")
    for line, *words in (
        (b'{"text": "a', "not JSON: Unterminated string", "(character 10)"),
        (b"plain text", "not JSON"),
        (b'["a"]', "a JSON list, not an object with 'text'"),
        (b'{"body": "a", "id": 1}', "no field 'text', only 'body', 'id'; set field"),
        (b"{}", "no field 'text', only none"),
        (b'{"text": null}', "field 'text' is a NoneType, not a string"),
        (b'{"text": "caf\xe9"}', "not UTF-8, byte 0xe9 at byte 14; convert", "iconv"),
        (b'{"text": "ab\\ud83d"}', "field 'text' has half a surrogate", "character 3"),
        (b"[" * 100_000, "nested too deeply"),
    ):
        path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
        refuses(lambda: documents(source), "bad.jsonl', line 2: ", *words, error=CorpusError)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_archive_is_named(tmp_path, suffix):
    """Cut short, or never packed."""
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", sentences(300, 0))
    for content in (path.read_bytes()[:-200], b'{"text": "not packed"}\n'):
        path.write_bytes(content)
        source = DataSource("a", (str(path),), "jsonl")
        refuses(lambda s=source: documents(s), f"a.jsonl{suffix}' is damaged", error=CorpusError)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_archives_of_several_members(tmp_path, suffix):
    texts = sentences(3000, 0)
    path = tmp_path / f"a.jsonl{suffix}"
    parts = [write_jsonl(path, texts[at : at + 1000]).read_bytes() for at in (0, 1000, 2000)]
    path.write_bytes(b"".join(parts))
    assert documents(DataSource("a", (str(path),), "jsonl"))[0] == texts


@pytest.mark.skipif(bool(importlib.util.find_spec("zstandard")), reason="zstandard is there")
def test_zst_without_the_package(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"anything")
    with pytest.raises(CorpusError, match="needs the package zstandard; pip install"):
        documents(DataSource("a", (f"{tmp_path}/a*",), "jsonl"))


def test_tfds_errors_are_named(tmp_path):
    directory = write_wiki(tmp_path / "wiki" / "1.0.0", ["one", "two"])
    source = DataSource("wiki", (str(directory),), "array_record")
    assert documents(source)[0] == ["one", "two"]
    assert documents(dataclasses.replace(source, split="test"))[0] == ["of the test split"]
    for words, changes in {
        "no feature 'body', only ['number', 'text']; set field": {"field": "body"},
        "train example 0: field 'number' is a int, not a string": {"field": "number"},
        "no split 'dev', only ['test', 'train']": {"split": "dev"},
        "no TFDS dataset at": {"files": (str(tmp_path / "wiki"),)},
    }.items():
        changed = dataclasses.replace(source, **changes)
        refuses(lambda changed=changed: documents(changed), words, error=CorpusError)


def test_sources_are_configuration():
    """They go through `config.json` and the command line as any field does."""
    sources = (
        DataSource("web", ("a/*.jsonl", "b/*.jsonl"), "jsonl", weight=0.7, max_tokens=10**9),
        DataSource("books", ("c/**/*.txt",), max_epochs=2.5),
    )
    annotation = tuple[DataSource, ...]
    encoded = json.loads(json.dumps(codec.encode(sources, annotation, "sources")))
    assert codec.decode(encoded, annotation, "sources") == sources
    hints = fields.hints(DataSource)
    assert fields.parse("a/*.txt,b/*.txt", hints["files"]) == ("a/*.txt", "b/*.txt")
    assert fields.parse("none", hints["max_epochs"]) is None
    with pytest.raises(ValueError, match="one of text, jsonl, array_record"):
        fields.parse("parquet", hints["kind"])


def test_bad_configuration():
    for words, changes in {
        "name 'Web' must be lower-case": {"name": "Web"},
        "not one of token_cache, plans": {"name": "plans"},
        "files='a/*.txt' of 'web' must be a tuple": {"files": "a/*.txt"},
        "at least one glob pattern": {"files": ()},
    }.items():
        fields = {"name": "web", "files": ("a",)} | changes
        refuses(lambda fields=fields: DataSource(**fields), words, error=CorpusError)


def test_bad_combinations(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(30, 0))
    source = DataSource("a", (str(path),), "jsonl")
    empty = DataSource("b", (str(write_jsonl(tmp_path / "b.jsonl", ["", " "])),), "jsonl")
    same = ValidationSet("a", source.files)
    for words, options in {
        "['a', 'a'] must have distinct names": {"sources": [source], "validation": [same]},
        "files='x/*.txt' and sources both": {"files": "x/*.txt", "sources": [source]},
        "'b' is empty: every document was dropped (2 empty); add": {"sources": [source, empty]},
    }.items():
        run = functools.partial(build, tmp_path / "out", progress=False, **options)
        refuses(run, words, error=CorpusError)
    assert not (tmp_path / "out").exists()


def test_a_validation_set_takes_its_text_from_the_system_too(small_system, tmp_path):
    system = SystemText("system", 60_000, 0.5, 0.1)
    some = documents(system)[0]
    seen = set()
    taken = write_jsonl(tmp_path / "v.jsonl", some[:1])
    first = ValidationSet("v", (str(taken),), "jsonl")
    list(first.documents(first.find(), 0, Counter(), seen))
    dropped = Counter()
    assert some[0] not in [t.text for t in system.documents([], 0, dropped, seen)]
    assert dropped["duplicate"] >= 1
