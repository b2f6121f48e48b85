"""A small Llama as a GGUF file of blocks, with a vocabulary."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.files import quantize, write_gguf
from lm.files.gguf_writer import GGUFTensor


def vocabulary(name: str) -> dict[str, Any]:
    """Metadata of a recorded vocabulary: "bytes" of 700 tokens, "pieces" of 1,006."""
    file = pathlib.Path(__file__).parents[1] / "tokenizers" / "golden.json"
    return json.loads(file.read_text())["vocabularies"][name] | {"tokenizer.ggml.pre": "gpt-2"}


def write_tiny(
    path: pathlib.Path,
    changes: Mapping[str, Any] | None = None,
    *,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    kinds: Sequence[str] = ("Q8_0",),
    tied: bool = True,
) -> pathlib.Path:
    """Two layers of width 64 and a context of 128.

    Args:
      path: of the file.
      changes: metadata to write instead; None leaves a key out.
      tensors: tensors to write instead; None leaves one out.
      kinds: types of the matrices, in turn.
      tied: the output is the embedding.
    """
    rng = np.random.default_rng(0)
    metadata = vocabulary("bytes") | {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    }
    metadata |= changes or {}
    shapes = {"token_embd.weight": (700, 64), "output_norm.weight": (64,)}
    shapes |= {} if tied else {"output.weight": (700, 64)}
    for i in range(2):
        for name, shape in {
            "attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64),
            "attn_v": (32, 64), "attn_output": (64, 64), "ffn_gate": (128, 64),
            "ffn_up": (128, 64), "ffn_down": (64, 128),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}.weight"] = shape
    made: dict[str, Any] = {}
    for n, (name, shape) in enumerate(shapes.items()):
        matrix = len(shape) > 1
        array = rng.normal(not matrix, 0.2, shape).astype(np.float32)
        kind = kinds[n % len(kinds)] if matrix else "F32"
        raw = quantize(array, kind)
        made[name] = GGUFTensor(kind, shape, lambda raw=raw: raw)
    made |= tensors or {}
    write_gguf(path, *({k: v for k, v in x.items() if v is not None} for x in (metadata, made)))
    return path
