"""llama.cpp as an oracle for vocabularies, through the `xllamacpp` wheel.

As a program it answers one request on standard input (see `tokenize_live`), so that it can run
in an environment of its own:

    python -m venv /somewhere && /somewhere/bin/pip install xllamacpp
    LM_LLAMACPP_PYTHON=/somewhere/bin/python python -m pytest tests/tokenizers

A model of one layer and width 32 is written around each vocabulary.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDTH = 32


def python() -> str | None:
    """An interpreter that has the peer, or None."""
    if "LM_LLAMACPP_PYTHON" in os.environ:
        return os.environ["LM_LLAMACPP_PYTHON"]
    return sys.executable if importlib.util.find_spec("xllamacpp") else None


def tokenize_live(
    vocabularies: Sequence[Mapping[str, Any]], lines: Sequence[str], parse_special: Sequence[bool]
) -> tuple[str, list[list[list[list[int]]]]]:
    """Version of the peer, and ids by vocabulary, by value of `parse_special`, by line."""
    interpreter = python()
    assert interpreter is not None
    with tempfile.TemporaryDirectory() as directory:
        paths = []
        for n, vocabulary in enumerate(vocabularies):
            paths.append(vocabulary.get("path") or str(Path(directory, f"{n}.gguf")))
            if "path" not in vocabulary:
                write_model(Path(paths[-1]), vocabulary)
        request = {"paths": paths, "lines": list(lines), "parse_special": list(parse_special)}
        result = subprocess.run(
            [interpreter, __file__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    answer = json.loads(result.stdout.splitlines()[-1])
    return answer["version"], answer["ids"]


def write_model(path: Path, vocabulary: Mapping[str, Any]) -> None:
    """A GGUF file that llama.cpp loads, with the `tokenizer.*` keys of `vocabulary`."""
    import numpy as np  # here, as the program has only xllamacpp

    from lm.files import write_gguf

    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": _WIDTH,
        "llama.feed_forward_length": _WIDTH,
        "llama.attention.head_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    size = len(vocabulary["tokenizer.ggml.tokens"])
    tensors = {"token_embd.weight": np.zeros((size, _WIDTH), np.float32)}
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        tensors[f"{name}.weight"] = np.ones(_WIDTH, np.float32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{name}.weight"] = np.zeros((_WIDTH, _WIDTH), np.float32)
    write_gguf(path, metadata | dict(vocabulary), tensors)


def _tokenize(model: str, lines: list[str], parse_special: list[bool]) -> list[list[list[int]]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def post(line: str, special: bool) -> list[int]:
        body = {"content": line, "add_special": True, "parse_special": special}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["tokens"]

    return [[post(line, special) for line in lines] for special in parse_special]


def main() -> None:
    import importlib.metadata

    request = json.load(sys.stdin)
    lines, parse_special = request["lines"], request["parse_special"]
    ids = [_tokenize(path, lines, parse_special) for path in request["paths"]]
    version = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    print("\n" + json.dumps({"version": version, "ids": ids}))


if __name__ == "__main__":
    main()
