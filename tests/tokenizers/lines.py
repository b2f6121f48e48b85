"""Lines of text to compare tokenizers on: deterministic, and as awkward as text gets.

`synthetic` depends on nothing but its arguments, so recorded results hold for every Python;
`library` takes lines of the standard library, which differ between versions.
"""

import pathlib
import random
import sysconfig

# First and last code points of what a kind of text is made of.
_BLOCKS = {
    "latin": [(0x61, 0x7A), (0x41, 0x5A), (0xC0, 0xFF), (0x100, 0x17F)],
    "greek": [(0x391, 0x3A1), (0x3B1, 0x3C9)],
    "cyrillic": [(0x410, 0x44F)],
    "arabic": [(0x621, 0x64A), (0x64B, 0x652), (0x660, 0x669)],
    "hebrew": [(0x5D0, 0x5EA), (0x5B0, 0x5BC)],
    "devanagari": [(0x904, 0x939), (0x93E, 0x94D), (0x966, 0x96F)],
    "thai": [(0xE01, 0xE3A), (0xE40, 0xE4E)],
    "chinese": [(0x4E00, 0x9FA5)],
    "japanese": [(0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x5000), (0x3001, 0x3002)],
    "korean": [(0xAC00, 0xD7A3)],
    "georgian": [(0x10D0, 0x10FA)],
    "mathematics": [(0x2200, 0x22FF), (0x1D400, 0x1D44F), (0x2070, 0x207F)],
    "punctuation": [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0x2010, 0x2027)],
    "numbers": [(0x30, 0x39), (0x660, 0x669), (0x2160, 0x2188), (0xBC, 0xBE), (0xFF10, 0xFF19)],
    "emoji": [(0x1F600, 0x1F64F), (0x1F300, 0x1F37F), (0x1F680, 0x1F6C5)],
    "private": [(0xE000, 0xE0FF), (0xF0000, 0xF00FF), (0x10FF00, 0x10FFFF)],
    "rare": [(0x1, 0x10FF), (0x2000, 0x2FFF), (0xA000, 0xD7FF), (0xF900, 0xFFFD)],
    "planes": [(0x10000, 0x1FFFF), (0x20000, 0x2A6DF), (0x30000, 0x323AF), (0xE0001, 0xE01EF)],
}
_WORDS = """the of and def return class import self None lambda Paris I'm you'll they've WE'RE don't
L'été naïve straße İstanbul ﬁne é Z͑ͫ̓ http://a.b/c?d=1&e=%20 foo_bar camelCase
HTTPServer2 0x1F 3.14159 1,000,000 12345678 2024-01-31 x==y a->b i++ C++ #include <b> </b> \\n $x^2$
{'a':[1,2]} `code` ''' ... -- ??! :-) @user #tag""".split()  # noqa: SIM905
_SEQUENCES = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7\U0001f1ef",
    "\U0001f44d\U0001f3fd\U0001f44b\U0001f3ff",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "\u2764\ufe0f\u200d\U0001f525",
    "1\ufe0f\u20e3",
    "\u202e\u202dabc\u202c",
    "\u200b\u200c\u200d\u2060\ufeff",
    "\u2581\u2581x\u2581",
)
_SPACES = (
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    "\u00a0",
    "\u3000",
    "\u2009",
    "\u2028",
    "\x0b",
    "\x85",
)
_CONTROLS = "".join(map(chr, [*range(0x20), 0x7F, *range(0x80, 0xA0)]))


def synthetic(count: int, special: tuple[str, ...] = (), seed: int = 0) -> list[str]:
    """`count` lines; some contain the names of the special tokens, whole and broken."""
    draw = random.Random(seed)
    return [_line(draw, special) for _ in range(count)]


def _line(draw: random.Random, special: tuple[str, ...]) -> str:
    parts = []
    for _ in range(draw.randint(1, 8)):
        kind = draw.random()
        if kind < 0.35:
            parts.append(" ".join(draw.choices(_WORDS, k=draw.randint(1, 6))))
        elif kind < 0.75:
            parts.append(_word(draw, _BLOCKS[draw.choice(list(_BLOCKS))]))
        elif kind < 0.83:
            parts.append(draw.choice(_SEQUENCES))
        elif kind < 0.87:
            parts.append("".join(draw.choices(_CONTROLS, k=draw.randint(1, 4))))
        elif kind < 0.93:
            parts.append(draw.choice(_SPACES) * draw.choice((1, 2, 3, 7, 16, 33, 64)))
        elif special:
            token = draw.choice(special)
            parts.append(draw.choice((token, token[:-1], token[1:], token + token)))
        parts.append(draw.choice((" ", " ", "", draw.choice(_SPACES))))
    return "".join(parts)


def _word(draw: random.Random, ranges: list[tuple[int, int]]) -> str:
    characters = [chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(1, 12))]
    return draw.choice(("", " ")).join(characters)


def library(count: int, seed: int = 0) -> list[str]:
    """`count` lines, or short runs of lines, of the standard library's source."""
    draw = random.Random(seed)
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files += sorted(pathlib.Path(sysconfig.get_path("stdlib"), "encodings").glob("*.py"))
    lines = []
    for file in draw.sample(files, min(len(files), 60)):
        text = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        at = 0
        while at < len(text):
            size = draw.choice((1, 1, 1, 2, 5))
            lines.append("".join(text[at : at + size]))
            at += size
    return draw.sample(lines, count)
