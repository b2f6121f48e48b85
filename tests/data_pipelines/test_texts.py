from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import texts as stages
from data_pipelines.texts import Candidate, Text


@pytest.mark.parametrize(
    ("name", "body", "kind", "reason"),
    [
        ("a.txt", "A short line.", "user", None),
        ("a.txt", "One chapter on one line. " * 500, "user", None),
        ("a.txt", " \n\t", "user", "empty"),
        ("a.txt", "text\0text", "user", "binary"),
        ("a.txt", "\x01\x02ab" * 20, "user", "binary"),
        ("a.js", "var a=1;" * 500, "user", "long lines or minified"),
        ("a.py", "x = 'abc'\n" * 20 + "y" * 3000, "source", "long lines or minified"),
        ("a.py", "x = 1", "source", "too short"),
        ("a.py", "0x1f, 0x20,\n" * 50, "source", "mostly numbers or symbols"),
        ("a.txt", "the same line over again\n" * 500, "docs", "repetitive"),
        ("a.txt", "Real prose has words, and they differ from line to line.\n" * 2, "docs", None),
    ],
)
def test_what_is_dropped_and_why(name, body, kind, reason):
    dropped = Counter()
    kept = list(stages.keep([Text(name, body, kind)], dropped))
    assert (len(kept), dropped) == ((0, {reason: 1}) if reason else (1, {}))


def test_docstrings_are_named_and_in_order():
    source = '''"""The module."""
class Shape:
    """A shape."""
    def area(self):
        """Its area."""
        def helper():
            """Inside."""
async def fetch():
    """Fetches."""
def bare(): pass
'''
    assert stages.docstrings(source, "shapes").split("\n\n\n") == [
        "shapes\n\nThe module.",
        "shapes.Shape\n\nA shape.",
        "shapes.Shape.area\n\nIts area.",
        "shapes.Shape.area.helper\n\nInside.",
        "shapes.fetch\n\nFetches.\n",
    ]
    assert stages.docstrings("print 'python 2'", "old") == ""


@given(st.text("ab \n", max_size=400), st.integers(2, 50))
def test_cut_loses_nothing_but_blank_sections(body, size):
    sections = list(stages.cut([Text("t", body, "user")], size))
    assert all(0 < len(s.text) <= size and s.text.strip() for s in sections)
    assert len({s.name for s in sections}) == len(sections)
    joined = "".join(s.text for s in sections)
    assert joined.split() == body.split() or "".join(joined.split()) == "".join(body.split())


def test_cut_prefers_paragraphs():
    body = "first line\nsecond line\n\nnext paragraph is here"
    sections = [s.text for s in stages.cut([Text("t", body, "user")], 40)]
    assert sections == ["first line\nsecond line\n\n", "next paragraph is here"]


def test_licences_that_differ_in_the_owner_are_one():
    body = "Permission is hereby granted, free of charge.\n"
    texts = [
        Text("a/LICENSE", f"Copyright 2020 A\n{body}", "docs"),
        Text("b/LICENSE", f"COPYRIGHT 2021 B\n{body.upper()}", "docs"),
        Text("c/README.md", f"Copyright 2021 B\n{body}", "docs"),
        Text("d/README.md", f"Copyright 2021 B\n{body}", "docs"),
    ]
    dropped = Counter()
    kept = [t.name for t in stages.deduplicate(texts, dropped, set())]
    assert kept == ["a/LICENSE", "c/README.md"]
    assert dropped == {"duplicate": 2}


@given(st.floats(0, 1))
def test_mix_keeps_the_proportion_and_then_the_rest(fraction):
    prose = [Text(f"p{i}", "x" * 10, "docs") for i in range(100)]
    source = [Text(f"s{i}", "x" * 20, "source") for i in range(100)]
    mixed = list(stages.mix([(iter(prose), fraction), (iter(source), 1 - fraction)]))
    expected = (prose if fraction > 0 else []) + (source if fraction < 1 else [])
    assert sorted(t.name for t in mixed) == sorted(t.name for t in expected)
    if 0.1 < fraction < 0.4:
        taken = list(stages.take(mixed, 1000))
        share = sum(t.num_bytes for t in taken if t.kind == "docs") / 1000
        assert abs(share - fraction) < 0.05


@pytest.mark.parametrize(
    ("name", "kind", "content", "expected"),
    [
        ("module.py", "source", "# Copyright 2020 A\n# So\n\nx = 1\n", ["x = 1\n"]),
        ("module.py", "docstrings", '# Copyright 2020 A\n"""Doc."""\n', ["module\n\nDoc.\n"]),
        ("comment.py", "source", "# Explains x.\nx = 1\n", ["# Explains x.\nx = 1\n"]),
        ("METADATA", "metadata", "Name: a\nVersion: 1\n\n# Thing\nDoes.\n", ["# Thing\nDoes.\n"]),
        ("windows.txt", "user", "\ufeffa\r\nb\r\n", ["a\nb\n"]),
        ("latin.txt", "docs", b"caf\xe9", []),
    ],
)
def test_reading_takes_out_what_the_kind_asks(tmp_path, name, kind, content, expected):
    path, dropped = tmp_path / name, Counter()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    candidate = Candidate(path, name, kind, path.stat().st_size)
    assert [t.text for t in stages.read([candidate], dropped)] == expected
    assert dropped == ({} if expected else {"not UTF-8": 1})


def test_system_files_come_once_each_for_one_use():
    files = stages.find_system_files(0)
    assert files == stages.find_system_files(0)
    assert len({f.path for f in files}) == len(files) > 500
    uses = Counter(f.kind for f in files)
    python = uses["docstrings"] + uses["source"]
    assert 0.45 < uses["source"] / python < 0.55
    assert uses["metadata"] > 5
    assert not any("__pycache__" in f.name for f in files)
    order = stages.shuffled(files, 1)
    assert order == stages.shuffled(reversed(files), 1) != stages.shuffled(files, 2)
