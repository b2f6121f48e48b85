"""What llama.cpp computes, to compare with. Needs llama-cpp-python 0.3.36, built by pip.

    python tests/formats/llama_cpp_oracle.py generations F32.gguf golden_gemma3_exact_gelu.json
    python tests/formats/llama_cpp_oracle.py perplexity F32.gguf IDS.json --window=2048

F32.gguf has the model's weights decoded to float32 (`gguf.dequantize` of each tensor). As it comes
llama.cpp looks GELU up in a table of 16-bit numbers by its argument rounded to 16 bits, which moves
Gemma's log-probabilities by 1e-3 to 1e-2. For the golden file that was left out: in
`vendor/llama.cpp/ggml/src/ggml-cpu/vec.h` the line `#define GGML_GELU_FP16` was commented out
before building. IDS.json is a list of token ids.
"""

import argparse
import json
import pathlib

import llama_cpp
import numpy as np

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl named",
    "def fibonacci(n):\n",
    "Q: What is 17 + 25?\nA:",
    "Photosynthesis is the process by which",
)
MAX_NEW_TOKENS, RECORDED = 32, 16
BATCH = 512


class Model:
    """Weights, activations and cache in float32."""

    def __init__(self, path: str, length: int) -> None:
        self.llama = llama_cpp.Llama(
            path, n_ctx=length, n_batch=BATCH, n_threads=2, n_threads_batch=2, logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
        )  # fmt: skip

    def logits(self, ids: list[int], first: int) -> np.ndarray:
        """[ids, vocabulary] after each of the ids, the first of which is at position `first`."""
        batch, context = self.llama._batch, self.llama._ctx
        batch.set_batch(batch=ids, n_past=first, logits_all=True)
        context.decode(batch)
        shape = len(ids), self.llama.n_vocab()
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.llama.ctx), shape=shape)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llama.ctx), True)


def logprobs(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def generations(path: str) -> list[dict]:
    """Greedy tokens, and the five best of the first ones."""
    model, found = Model(path, 1024), []
    for prompt in PROMPTS:
        model.clear()
        prompt_ids = model.llama.tokenize(prompt.encode(), add_bos=True, special=True)
        last = logprobs(model.logits(prompt_ids, 0)[-1])
        output, best = [], []
        while len(output) < MAX_NEW_TOKENS:
            top = np.argsort(-last, kind="stable")[:5]
            best.append([[int(i), round(float(last[i]), 6)] for i in top])
            output.append(int(top[0]))
            if output[-1] == model.llama.token_eos():
                break
            last = logprobs(model.logits(output[-1:], len(prompt_ids) + len(output) - 1)[-1])
        found.append({
            "prompt": prompt, "prompt_ids": prompt_ids, "output_ids": output,
            "top5_first16": best[:RECORDED],
        })  # fmt: skip
    return found


def perplexity(path: str, ids: list[int], window: int) -> dict:
    """Of windows that do not overlap; every token of a window but its first is scored."""
    model, total, count = Model(path, window), 0.0, 0
    for start in range(0, len(ids), window):
        row = ids[start : start + window]
        model.clear()
        for begin in range(0, len(row) - 1, BATCH):
            part, targets = row[begin : begin + BATCH], row[begin + 1 : begin + BATCH + 1]
            logits = model.logits(part, begin)
            for row_logits, target in zip(logits, targets, strict=False):
                total -= logprobs(row_logits)[target]
                count += 1
    mean = float(total / count)
    return {"tokens": count, "nats_per_token": mean, "perplexity": float(np.exp(mean))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["generations", "perplexity"])
    parser.add_argument("model")
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--window", type=int, default=2048)
    asked = parser.parse_args()
    if asked.what == "perplexity":
        print(perplexity(asked.model, json.loads(asked.file.read_text()), asked.window))
    else:
        made = {
            "made_by": "tests/formats/llama_cpp_oracle.py",
            "engine": f"llama-cpp-python {llama_cpp.__version__} without GGML_GELU_FP16",
            "model": pathlib.Path(asked.model).name,
            "results": generations(asked.model),
        }
        asked.file.write_text(json.dumps(made) + "\n")
