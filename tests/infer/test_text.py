"""Text that stops: whatever the pieces it comes in."""

import random

import pytest

from lm.infer.text import StoppedText


class Pieces:
    """A stream whose tokens are indices of given pieces."""

    def __init__(self, pieces, last=""):
        self.pieces, self.last = pieces, last

    def push(self, token_id):
        return self.pieces[token_id]

    def finish(self):
        return self.last


def run(pieces, stops, last=""):
    text = StoppedText(Pieces(pieces, last), stops)
    out = []
    for i in range(len(pieces)):
        out.append(text.push(i))
        if text.stopped:
            break
    out.append(text.finish())
    assert "".join(out) == text.text
    return text, out


def test_no_stop():
    text, out = run(["ab", "", "c"], [], last="\ufffd")
    assert (text.text, text.stopped, out) == ("abc\ufffd", False, ["ab", "", "c", "\ufffd"])


def test_what_may_become_a_stop_is_held_back():
    text, out = run(["a#", "#b", "##", "#c"], ["###"])
    assert out == ["a", "##b", "", "", ""]
    assert (text.text, text.stopped) == ("a##b", True)


def test_the_first_stop_counts():
    text, _ = run(["one two three"], ["three", "two", "owt"])
    assert text.text == "one "


SPECIAL = {"<|im_end|>": 3, "<|im": 4, "<other>": 5}
WRITTEN = ["a", "<|im_end|>", "\n", "", "", ""]  # special tokens have no text of their own


@pytest.mark.parametrize(
    ("ids", "stop", "expected"),
    [
        ([0, 3, 0], "<|im_end|>", "a"),
        ([0, 1, 0], "<|im_end|>", "a"),  # spelled out in letters
        ([0, 4, 0, 3, 0], "<|im_end|>", "aa"),
        ([0, 5, 0, 3, 2, 0], "<|im_end|>\n", "aa"),
        ([0, 3, 0, 2], "<|im_end|>\n", "aa\n"),
        ([0, 0, 3, 5, 0], "a<|im_end|><other>", "a"),
        ([0, 3, 4], "<|im", "a"),
    ],
)
def test_a_stop_that_names_special_tokens(ids, stop, expected):
    text = StoppedText(Pieces(WRITTEN), [stop], SPECIAL)
    for i in ids:
        text.push(i)
        if text.stopped:
            break
    text.finish()
    assert text.text == expected
    assert text.stopped == (ids != [0, 3, 0, 2])


@pytest.mark.parametrize("seed", range(5))
def test_cuts_do_not_matter(seed):
    """The text before the first occurrence, for random texts over two letters and random cuts."""
    rng = random.Random(seed)
    for _ in range(200):
        whole = "".join(rng.choice("ab") for _ in range(rng.randrange(40)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(3, 6)))]
        cuts = sorted(rng.randrange(len(whole) + 1) for _ in range(rng.randrange(8)))
        pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        text, _ = run(pieces, stops)
        assert text.text == whole.split(stops[0])[0]
        assert text.stopped == (stops[0] in whole)
