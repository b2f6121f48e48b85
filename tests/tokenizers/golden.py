"""Token ids by llama.cpp, recorded: small vocabularies under every rule, and real models.

    LM_LLAMACPP_PYTHON=/somewhere/bin/python python -m tests.tokenizers.golden

writes the ids in golden.json anew (see llamacpp.py for the interpreter). The vocabularies are part
of the file: `bytes`, 700 tokens of byte-level BPE with words cut by white space only, and `pieces`,
1,000 of SentencePiece with every type of token, both trained on Python's standard library and
`lines.synthetic`, which makes the lines too. Ids are kept as hashes of BLOCK lines.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.tokenizers import lines, llamacpp

FILE = Path(__file__).with_name("golden.json")
NUM_LINES, BLOCK = 2000, 50
SPECIAL = ("<|im_start|>", "<|im_end|>", "<unused7>", "<tag>", "<unk>", "<bos>", "<end_of_turn>")
MODELS = ("smollm2-135m-instruct", "gemma3-270m")


def all_lines() -> list[str]:
    return lines.synthetic(NUM_LINES, SPECIAL, seed=1)


def c1_control(line: str) -> bool:
    """llama.cpp's tables have no category for U+0080 to U+009F but U+0085: words end there."""
    return any("\x80" <= char <= "\x9f" and char != "\x85" for char in line)


def cased(line: str) -> bool:
    """llama.cpp leaves marks out of words, and takes letters beyond ASCII for either case."""
    return c1_control(line) or any(
        char > "\x7f" and (char.isupper() or unicodedata.category(char)[0] == "M") for char in line
    )


def wide_space(line: str) -> bool:
    """llama.cpp takes no space for part of the range U+0800 to U+4E00, which this rule names.

    Nor does it know the hieroglyphs of Unicode 16.
    """
    return c1_control(line) or any(
        "\U00013460" <= char <= "\U000143fa" or (char >= "\u0800" and char.isspace())
        for char in line
    )


def never(line: str) -> bool:
    return False


# Vocabulary, what differs in its metadata, which lines llama.cpp is known to read differently.
SMALL: list[tuple[str, dict[str, Any], Callable[[str], bool]]] = [
    *(
        ("bytes", {"tokenizer.ggml.pre": pre}, c1_control)
        for pre in ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "qwen35", "deepseek-v3")
    ),
    *(("bytes", {"tokenizer.ggml.pre": pre}, c1_control) for pre in ("falcon", "seed-coder")),
    *(("bytes", {"tokenizer.ggml.pre": pre}, cased) for pre in ("tekken", "gpt-4o")),
    ("bytes", {"tokenizer.ggml.pre": "deepseek-coder"}, wide_space),
    ("bytes", {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True}, c1_control),
    ("pieces", {}, never),
    ("pieces", {"tokenizer.ggml.add_space_prefix": False}, never),
    ("pieces", {"tokenizer.ggml.add_bos_token": False}, never),
    ("pieces", {"tokenizer.ggml.add_eos_token": True}, never),
]


def digest(ids: Sequence[Sequence[int]]) -> list[str]:
    """One hash for each BLOCK lines."""
    return [
        hashlib.sha256(json.dumps(ids[i : i + BLOCK]).encode()).hexdigest()[:12]
        for i in range(0, len(ids), BLOCK)
    ]


def small(golden: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metadata of each small case."""
    return [{**golden["vocabularies"][name], **changes} for name, changes, _ in SMALL]


def main() -> None:
    from lm.files.packaged import find_packaged

    golden: dict[str, Any] = {"vocabularies": json.loads(FILE.read_text())["vocabularies"]}
    peers = [*small(golden), *({"path": str(find_packaged(model))} for model in MODELS)]
    version, ids = llamacpp.tokenize_live(peers, all_lines(), (False, True))
    golden["made_by"] = f"python -m tests.tokenizers.golden, {version} (llama.cpp)"
    golden["num_lines"], golden["block"] = NUM_LINES, BLOCK
    skips = [*(skip for _, _, skip in SMALL), c1_control, never]
    golden["cases"] = []
    for case, skip in zip(ids, skips, strict=True):
        skipped = [i for i, line in enumerate(all_lines()) if skip(line)]
        kept = [[row for i, row in enumerate(rows) if i not in set(skipped)] for rows in case]
        golden["cases"].append(
            {"skipped": skipped, "plain": digest(kept[0]), "parsed": digest(kept[1])}
        )
    FILE.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
