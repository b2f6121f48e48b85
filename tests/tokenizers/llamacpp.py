"""llama.cpp as an oracle for vocabularies, through the `xllamacpp` wheel.

As a program it answers one request on standard input (see `tokenize_live`), so that it can run
in an environment of its own:

    python -m venv /somewhere && /somewhere/bin/pip install xllamacpp gguf
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
    request = {"vocabularies": list(vocabularies), "lines": list(lines)}
    request["parse_special"] = list(parse_special)
    interpreter = python()
    assert interpreter is not None
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
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in vocabulary.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    square = np.zeros((_WIDTH, _WIDTH), np.float32)
    vector = np.ones(_WIDTH, np.float32)
    size = len(vocabulary["tokenizer.ggml.tokens"])
    writer.add_tensor("token_embd.weight", np.zeros((size, _WIDTH), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", vector)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenize(model: Path, lines: list[str], parse_special: list[bool]) -> list[list[list[int]]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
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
    ids = []
    with tempfile.TemporaryDirectory() as directory:
        for n, vocabulary in enumerate(request["vocabularies"]):
            if "path" in vocabulary:
                path = Path(vocabulary["path"])
            else:
                path = Path(directory, f"{n}.gguf")
                write_model(path, vocabulary)
            ids.append(_tokenize(path, request["lines"], request["parse_special"]))
    version = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    print("\n" + json.dumps({"version": version, "ids": ids}))


if __name__ == "__main__":
    main()
