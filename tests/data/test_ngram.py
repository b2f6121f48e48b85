import argparse
import inspect
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.ngram import ByteNgram
from tests.refuses import refuses


class DictionaryNgram:
    """Interpolated Kneser-Ney as the formulas of Chen & Goodman (1999) read, in dictionaries."""

    def __init__(self, documents, order):
        self.order = order
        self.tables = {}
        counts = Counter()
        for document in documents:
            text = b"\n" * order + document
            for i in range(order, len(text)):
                counts[text[i - order : i + 1]] += 1
        for n in range(order, -1, -1):
            self.tables[n] = counts
            # N1+(. suffix): the number of distinct bytes seen before a suffix.
            before = defaultdict(set)
            for gram in counts:
                before[gram[1:]].add(gram[0])
            counts = Counter({suffix: len(s) for suffix, s in before.items()})

    def prob(self, context, byte, n):
        if n < 0:
            return 1 / 256
        table = self.tables[n]
        context = context[len(context) - n :]
        followers = {g[-1]: c for g, c in table.items() if g[:-1] == context}
        lower = self.prob(context[1:], byte, n - 1)
        if not followers:
            return lower
        ones = sum(c == 1 for c in table.values())
        twos = sum(c == 2 for c in table.values())
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        total = sum(followers.values())
        seen = max(followers.get(byte, 0) - discount, 0) / total
        return seen + discount * len(followers) / total * lower

    def log2_probs(self, documents):
        for document in documents:
            text = b"\n" * self.order + document
            for i in range(self.order, len(text)):
                yield math.log2(self.prob(text[i - self.order : i], text[i], self.order))


TEXT = st.lists(st.text("ab\n c", max_size=12).map(str.encode), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(TEXT.filter(any), TEXT, st.integers(0, 3))
def test_equals_the_formulas(train, test, order):
    model, oracle = ByteNgram.fit(train, order), DictionaryNgram(train, order)
    expected = list(oracle.log2_probs(test))
    np.testing.assert_allclose(model.log2_probs(test), expected, rtol=1e-12)


@pytest.mark.parametrize("context", [b"", b"th", b"the", b"zzz", b"\xff\x00\xff"])
def test_probabilities_sum_to_one(context):
    model = ByteNgram.fit([b"the theme of the thesis", b"then there"] * 3)
    documents = [context + bytes([b]) for b in range(256)]
    logs = model.log2_probs(documents).reshape(256, -1)[:, -1]
    assert np.exp2(logs).sum() == pytest.approx(1, abs=1e-12)


def test_longer_contexts_help_on_text_and_documents_are_apart():
    text = inspect.getsource(argparse).encode()
    half = len(text) // 2
    scores = [ByteNgram.fit([text[:half]], n).bits_per_byte([text[half:]]) for n in range(4)]
    assert scores[0] > scores[1] > scores[2] > scores[3]
    assert 1 < scores[3] < 3
    model = ByteNgram.fit([text])
    apart = np.concatenate([model.log2_probs([b"abc"]), model.log2_probs([b"", b"xyz"])])
    np.testing.assert_array_equal(model.log2_probs([b"abc", b"xyz"]), apart)


def test_bad_input():
    refuses(lambda: ByteNgram.fit([b"a"], order=4), "order=4")
    refuses(lambda: ByteNgram.fit([b"", b""]), "no bytes to fit")
    refuses(lambda: ByteNgram.fit([b"a"]).bits_per_byte([b""]), "no bytes to score")
