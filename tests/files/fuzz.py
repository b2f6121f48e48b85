"""Files changed at random: each is read whole, or refused by the one error, in bounded memory.

    python -m tests.files.fuzz --mutations=100000 --seed=0

A change is known by its seed and number, so that what the program reports can be run again with
`--first=NUMBER --mutations=1`.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.files.base import FileFormatError
from lm.files.gguf import read_gguf
from lm.files.safetensors import open_safetensors
from tests.files.samples import Sample, make_samples

# What reading may allocate: a block of 1.6 bits a number becomes float32, strings become objects.
PER_BYTE, EXTRA = 64, 1 << 18

INTERESTING = (0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 127, 128, 255, 256, 1 << 12)
INTERESTING += tuple((1 << k) + d for k in (15, 16, 31, 32, 53, 61, 62, 63, 64) for d in (-1, 0, 1))
JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+|[\[\]{}:,]')
JSON_VALUES: tuple[bytes, ...] = (
    b"NaN", b"Infinity", b"-1", b"0", b"1.0", b"1e400", b"9" * 30, b"9" * 5000, b"true", b"null",
    b"[]", b"{}", b"[" * 40, b"[" * 20000, b'{"a":' * 5000, b'""', b'"F4"', b'"F32"', b'"\\ud800"',
    b'"\xff"', b'"../a.safetensors"', b'"/etc/passwd"', b'"."', b'"a\\u0000b"', b'"__metadata__"',
    b"9223372036854775807", b"18446744073709551616", b"\x00",
)  # fmt: skip


def mutate(sample: Sample, rng: random.Random) -> bytes:
    """The target's bytes with one to three changes."""
    data = bytearray(sample.files[sample.target])
    kinds = [_flip, _cut, _extend, _splice, _field, _field]
    if sample.json_header or not sample.fields:
        kinds += [_json_token] * 4
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(kinds)(data, sample, rng)
    return bytes(data)


def _flip(data: bytearray, sample: Sample, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, sample: Sample, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        del data[at:]
    else:
        del data[at : at + rng.choice((1, 2, 4, 8, 32))]


def _extend(data: bytearray, sample: Sample, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice((1, 8, 32, 1000)))


def _splice(data: bytearray, sample: Sample, rng: random.Random) -> None:
    """A piece of a file of the sample, over or between what is there."""
    source = rng.choice(list(sample.files.values()))
    start = rng.randrange(len(source))
    piece = source[start : start + rng.choice((4, 8, 16, 64, 256))]
    at = rng.randrange(len(data) + 1)
    data[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece


def _field(data: bytearray, sample: Sample, rng: random.Random) -> None:
    """A number that describes the file becomes another."""
    if not sample.fields:
        return
    at, size = rng.choice(sample.fields)
    value = rng.choice((*INTERESTING, len(data), len(data) - at, rng.getrandbits(8 * size)))
    if rng.random() < 0.2:
        value = int.from_bytes(data[at : at + size], "little") + rng.choice((-1, 1))
    data[at : at + size] = (value % (1 << (8 * size))).to_bytes(size, "little")


def _json_token(data: bytearray, sample: Sample, rng: random.Random) -> None:
    """A token of the JSON becomes another, is repeated, or a pair stands twice."""
    start = 8 if sample.json_header else 0
    stop = start + int.from_bytes(data[:8], "little") if sample.json_header else len(data)
    if stop > len(data):
        return
    text = bytes(data[start:stop])
    tokens = list(JSON_TOKEN.finditer(text))
    if not tokens:
        return
    token, other = rng.choice(tokens), rng.choice(tokens)
    new = rng.choice((rng.choice(JSON_VALUES), rng.choice(JSON_VALUES), other[0], token[0] * 2))
    if rng.random() < 0.15:  # a whole pair again
        first, last = sorted((token, other), key=lambda t: t.start())
        new = text[first.start() : last.end()] + b"," + text[first.start() : last.end()]
        token = first
        text = text[: first.start()] + new + text[last.end() :]
    else:
        text = text[: token.start()] + new + text[token.end() :]
    data[start:stop] = text
    if sample.json_header:
        data[:8] = len(text).to_bytes(8, "little")


def read_all(path: Path, kind: str) -> None:
    """Open a model, and read every value and number of it."""
    if kind.startswith("gguf"):
        model = read_gguf(path)
        for value in model.metadata.values():
            _read(value)
        for name in model.tensors:
            assert model.dequantize(name).shape == model.tensors[name].shape
            assert model.raw(name).nbytes == model.tensors[name].nbytes
    else:
        model = open_safetensors(path)
        for name, array in model.stream():
            assert array.shape == model.tensors[name].shape
            array.tobytes()


def _read(value: Any) -> None:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for element in value:
            _read(element)


def run(first: int, mutations: int, seed: int, folder: Path) -> collections.Counter:
    """Read changes `first` to `first + mutations`; gives how many were read and refused.

    Raises:
      AssertionError: something else happened; it says to which change.
    """
    samples = {name: make() for name, make in make_samples().items()}
    places = {name: folder / name.replace(" ", "-") for name in samples}
    for name, sample in samples.items():
        places[name].mkdir()
        read_all(sample.write(places[name]), name)
    outcomes: collections.Counter = collections.Counter()
    names = list(samples)
    tracemalloc.start()
    try:
        for number in range(first, first + mutations):
            name = names[number % len(names)]
            sample = samples[name]
            data = mutate(sample, random.Random(f"{seed} {number}"))
            path = sample.write(places[name], data)
            size = sum(map(len, sample.files.values())) + len(data)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            outcomes[name, _outcome(path, name, number, seed)] += 1
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before <= PER_BYTE * size + EXTRA, (
                f"{name!r}, --seed={seed} --first={number}: {peak - before} bytes of memory for "
                f"{size} bytes of file"
            )
    finally:
        tracemalloc.stop()
    return outcomes


def _outcome(path: Path, name: str, number: int, seed: int) -> str:
    try:
        read_all(path, name)
    except FileFormatError as error:
        text = str(error)
        folder = path.parent if path.suffix else path
        assert text.startswith(str(folder)) and len(text) < 2000, text[:4000]
        return "refused"
    except Exception as error:
        raise AssertionError(f"{name!r}, --seed={seed} --first={number}: {error!r}") from error
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(args.first, args.mutations, args.seed, Path(folder))
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{name:20} {outcome:8} {count}")


if __name__ == "__main__":
    main()
