"""Adapters of PEFT that carry whole weights: embeddings, outputs, norms, biases, new rows."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lm.adapters import combine, merge
from lm.files import FormatError
from lm.formats import from_huggingface, from_tensors, to_tensors
from lm.formats.families import make_config
from lm.formats.peft.io import load_peft
from lm.model import ModelWeights, unstack
from lm.weights import GGUFBlocks
from tests.formats.directories import assert_same_tree
from tests.model import drawn
from tests.model.huggingface_oracle import build_oracle
from tests.refuses import refuses

V, D = 40, 32
SIZES = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
Q = {"r": 2, "target_modules": ["q_proj"]}


@functools.cache
def base(tied: bool, family: str = "llama"):
    """transformers' model, and ours of the same weights with its configuration."""
    oracle = build_oracle(family, SIZES | {"tie_word_embeddings": tied})
    config = from_huggingface(oracle.json)
    return oracle.model, from_tensors(oracle.arrays(), config), config


def trained(model: Any, rows: int = V, **keys):
    """PEFT's adapter over a copy of the model, with noise in what it trains."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        under = copy.deepcopy(model)
        if rows != V:
            under.resize_token_embeddings(rows, mean_resizing=False)
        model = peft.get_peft_model(under, peft.LoraConfig(task_type="CAUSAL_LM", **keys)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def save(model, path, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path, **how)
    return path


def computed(model) -> tuple[np.ndarray, np.ndarray]:
    """The embedding and the output of a model of PEFT, both [V, D], by what they compute."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        rows = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).numpy()
        return rows, model.get_output_embeddings()(torch.eye(D)).numpy().T


def tables(params: ModelWeights, rows: int) -> tuple[np.ndarray, np.ndarray]:
    merged = merge(params)
    embed = np.asarray(merged.embed)[:rows]
    return embed, embed if merged.output is None else np.asarray(merged.output).T[:rows]


BOTH = ["embed_tokens", "lm_head"]
# Whether the model was tied, what PEFT is told, and whether it is still tied.
TABLES = {
    "saved_both": (True, Q | {"modules_to_save": BOTH}, False),
    "saved_output": (True, Q | {"modules_to_save": ["lm_head"]}, False),
    "saved_embedding": (True, Q | {"modules_to_save": ["embed_tokens"]}, False),
    "saved_tied": (True, Q | {"modules_to_save": BOTH[:1], "ensure_weight_tying": True}, True),
    "lora_embedding": (True, {"r": 2, "target_modules": BOTH[:1]}, False),
    "lora_output": (True, {"r": 2, "target_modules": BOTH[1:]}, False),
    "lora_tied": (True, {"r": 2, "target_modules": BOTH[:1], "ensure_weight_tying": True}, False),
    "untied_saved": (False, Q | {"modules_to_save": BOTH}, False),
    "rows": (True, Q | {"trainable_token_indices": [3, 17]}, True),
    "untied_rows": (False, Q | {"trainable_token_indices": {"embed_tokens": [3]}}, False),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_peft(name, tmp_path):
    tied, keys, still = TABLES[name]
    model, params, config = base(tied)
    theirs = trained(model, **keys)
    adapted, found = load_peft(save(theirs, tmp_path), params, config)
    assert found.tied == still == (adapted.output is None)
    for ours, expected in zip(tables(adapted, V), computed(theirs), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [False, True])
def test_layers_saved_with_the_embedding(tied, tmp_path):
    """save_embedding_layers=True: plain tensors, not in modules_to_save; also of another size."""
    model, params, config = base(tied)
    for rows in (V, V + 3):
        theirs = trained(model, rows, **Q)
        save(theirs, tmp_path, save_embedding_layers=True)
        adapted, found = load_peft(tmp_path, params, config)
        assert (found.tied, found.vocab_size) == (tied, rows)
        for ours, expected in zip(tables(adapted, rows), computed(theirs), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.oracle
def test_norms_and_biases(tmp_path):
    """Of every layer, stacked or not."""
    model, params, config = base(False, "qwen2")
    theirs = trained(model, **Q, modules_to_save=["norm"], bias="all")
    save(theirs, tmp_path)
    expected = {}
    for name, value in theirs.state_dict().items():
        name = name.removeprefix("base_model.model.")
        name = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
        if "original_module" not in name:
            expected[name] = value.numpy()
    for under in (params, unstack(params)):
        adapted, found = load_peft(tmp_path, under, config)
        written = dict(to_tensors(merge(adapted), found))
        changed = [name for name in written if "norm" in name or name.endswith("bias")]
        assert len(changed) == 11
        for name in changed:
            np.testing.assert_allclose(written[name], expected[name], atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="replaces whole weights cannot be one of several"):
        combine(params, [load_peft(tmp_path, params, config)[0]])


def by_hand(path, tensors, model_name="model.", **keys):
    """An adapter as PEFT writes it, with tensors beside the query's."""
    query = f"{model_name}layers.{{}}.self_attn.q_proj.lora_{{}}.weight"
    made = {query.format(i, x): np.ones(shape, np.float32)
            for i in range(2) for x, shape in (("A", (2, D)), ("B", (D, 2)))}  # fmt: skip
    path.mkdir(exist_ok=True)
    save_file({f"base_model.model.{n}": x for n, x in (made | tensors).items()},
              path / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config | keys))
    return path


@functools.cache
def tied_by_hand(tied=True):
    config = make_config("llama", vocab_size=V, embed_dim=D, hidden_dim=16, num_layers=2,
                         num_heads=2, tied=tied)  # fmt: skip
    return drawn.weights(config), config


def test_a_quantized_embedding_keeps_its_blocks(tmp_path):
    """Untied, the output is the same blocks along the other dimension."""
    params, config = tied_by_hand()
    blocks = GGUFBlocks.quantize(params.embed, "Q8_0", "out")
    other = {"lm_head.lora_A.weight": np.ones((2, D), np.float32),
             "lm_head.lora_B.weight": np.ones((V, 2), np.float32)}  # fmt: skip
    path = by_hand(tmp_path, other, target_modules=["q_proj", "lm_head"])
    adapted, found = load_peft(path, params.replace(embed=blocks), config)
    assert not found.tied and isinstance(adapted.output.base, GGUFBlocks)
    base = adapted.output.base.dequantize(jnp.float32)
    np.testing.assert_array_equal(base, blocks.dequantize(jnp.float32).T)
    expected = np.asarray(base)[:, :V] + 2
    np.testing.assert_allclose(merge(adapted).output[:, :V], expected, atol=1e-5)


def test_adapters_of_models_of_more_than_text(tmp_path):
    """Names as in larger models; what is for the vision tower is left aside."""
    params, config = tied_by_hand()
    vision = {"model.vision_tower.layers.0.q_proj.lora_A.weight": np.ones((2, 5), np.float32)}
    expected = load_peft(by_hand(tmp_path / "text", {}), params, config)[0]
    for i, name in enumerate(("model.language_model.", "language_model.model.")):
        patterns = {"target_modules": r".*language_model.*\.q_proj"}
        path = by_hand(tmp_path / f"{i}", vision, name, **patterns)
        adapted, found = load_peft(path, params, config)
        assert found == config
        assert_same_tree(adapted, expected)


EMBED = {"model.embed_tokens.weight": np.ones((V + 1, D), np.float32)}
ROWS = {"model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, D), np.float32)}


@pytest.mark.parametrize(
    ("tied", "tensors", "keys", "words"),
    [
        (False, EMBED, {}, ["vocabulary of 41 tokens, the model has 40", "output is missing"]),
        (True, EMBED, {"modules_to_save": ["embed_tokens"]}, ["(output is missing)"]),
        (True, {"score.weight": np.ones((1, D), np.float32)}, {}, ["score.weight [1, 32] is not"]),
        (True, {"model.norm.weight": np.ones(3, np.float32)}, {}, ["norm.weight is [3], the"]),
        (True, ROWS, {"trainable_token_indices": [V]}, ["indices (40,) are not all of 40"]),
        (True, ROWS, {"trainable_token_indices": [1, 2]}, ["is [1, 32], the model wants [2, 32]"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tied, tensors, keys, words, tmp_path):
    path = by_hand(tmp_path, tensors, **keys)
    refuses(lambda: load_peft(path, *tied_by_hand(tied)), *words, error=FormatError)


def test_places_without_an_adapter(tmp_path):
    """What is there is said, with what to give instead."""
    load = lambda path: load_peft(path, *tied_by_hand())  # noqa: E731
    path = by_hand(tmp_path / "in", {})
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    words = "adapter_model.bin", "pickled weights are not read; save them as safetensors"
    refuses(lambda: load(path), *words, error=FormatError)
    refuses(lambda: load(tmp_path), "give one of the directories in it", "in", error=FormatError)
    refuses(lambda: load(path / "adapter_config.json"), "give a PEFT adapter's directory")
    (tmp_path / "config.json").write_text("{}")
    refuses(lambda: load(tmp_path), "is a model: give it as --model", error=FormatError)


def test_keys_can_be_passed_over(tmp_path):
    path = by_hand(tmp_path, {}, a_new_key=7)
    refuses(lambda: load_peft(path, *tied_by_hand()), "--ignore_config_keys=")
    load_peft(path, *tied_by_hand(), ignore=["a_new_key"])
