"""Token ids by llama.cpp, recorded: small vocabularies under every rule, and real models.

    LM_LLAMACPP_PYTHON=/somewhere/bin/python python -m tests.tokenizers.golden

writes golden.json (see llamacpp.py for the interpreter). The vocabularies are in the file; the
lines come from `lines.synthetic`. Ids are kept as hashes of BLOCK lines.
"""

import hashlib
import io
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


def byte_vocabulary(size: int = 700) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary trained on source code, words cut by white space only."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s*\S+\s*"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=[*special, "<tag>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*lines.library(3000), *lines.synthetic(1000, seed=9)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = {**dict.fromkeys(special, 3), "<tag>": 4}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def piece_vocabulary(size: int = 1000) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary with every type of token."""
    import sentencepiece

    # llama.cpp reads tokens up to a NUL.
    texts = [*lines.library(3000), *lines.synthetic(100, seed=9)]
    texts = [text.replace("\0", "") for text in texts]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = processor.vocab_size()
    kinds = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 * processor.is_byte(i)
        for i in range(count)
    ]
    more = {"<end_of_turn>": 3, "<unused7>": 3, "<tag>": 4, "  ": 4, "   ": 4, "\n\n\n": 4}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*map(processor.id_to_piece, range(count)), *more],
        "tokenizer.ggml.scores": [*map(processor.get_score, range(count)), *(0.0 for _ in more)],
        "tokenizer.ggml.token_type": [*(kind or 1 for kind in kinds), *more.values()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def small(golden: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metadata of each small case."""
    return [{**golden["vocabularies"][name], **changes} for name, changes, _ in SMALL]


def main() -> None:
    from lm.files.packaged import find_packaged

    golden: dict[str, Any] = {
        "vocabularies": {"bytes": byte_vocabulary(), "pieces": piece_vocabulary()}
    }
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
