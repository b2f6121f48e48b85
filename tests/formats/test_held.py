"""Weights are what the files hold: outputs, text models in larger ones, keys, names of files."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.files import FormatError, is_gguf, open_safetensors, write_safetensors
from lm.formats import (
    from_huggingface,
    from_tensors,
    load_huggingface,
    read_gguf_config,
    save_huggingface,
)
from lm.formats.families import make_config
from lm.formats.known import known_model
from lm.formats.open import locate
from lm.formats.quantized.io import load_unstacked
from tests.formats.directories import logits
from tests.formats.tiny_gguf import write_tiny
from tests.refuses import refuses

CONFIG = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
LAYER = "model.layers.0."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors() -> dict[str, np.ndarray]:
    """Of a tied Llama of one layer, without an output."""
    rng = np.random.default_rng(0)
    shapes = {EMBED: (24, 8), "model.norm.weight": (8,)}
    shapes |= {f"{LAYER}{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
    shapes |= {f"{LAYER}self_attn.{n}_proj.weight": (8, 8) for n in "qkvo"}
    shapes |= {f"{LAYER}mlp.{n}_proj.weight": (8, 8) for n in ("gate", "up", "down")}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def directory(path, arrays, **config):
    path.mkdir(exist_ok=True)
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    return path


def test_an_output_that_differs_from_the_embedding_is_not_tied(tmp_path, capsys):
    """As transformers 5: equal, in any type, they are tied; different, both are used."""
    arrays = tensors()
    head = np.random.default_rng(1).normal(size=(24, 8)).astype(np.float32)
    directory(tmp_path, arrays | {HEAD: head})
    params, config = load_huggingface(tmp_path)
    assert not config.tied and "not tied" in capsys.readouterr().err
    np.testing.assert_array_equal(params.embed[:24], arrays[EMBED])
    np.testing.assert_array_equal(params.output[:, :24], head.T)
    unstacked, same = load_unstacked(tmp_path, from_huggingface(CONFIG))
    assert same == config and np.array_equal(unstacked.output, params.output)
    refuses(lambda: from_tensors(arrays | {HEAD: head}, from_huggingface(CONFIG)), "tied=False")
    capsys.readouterr()
    half = arrays | {EMBED: arrays[EMBED].astype(np.float16)}
    for same in (arrays | {HEAD: arrays[EMBED]}, half | {HEAD: half[EMBED].astype(np.float32)}):
        directory(tmp_path, same)
        params, config = load_huggingface(tmp_path, dtype=np.float32)
        assert config.tied and params.output is None and not capsys.readouterr().err


def test_an_embedding_written_as_the_output(tmp_path):
    arrays = tensors()
    embed = arrays[EMBED]
    directory(tmp_path, {HEAD: arrays.pop(EMBED), **arrays})
    params, config = load_huggingface(tmp_path)
    assert config.tied and np.array_equal(params.embed[:24], embed)


def test_an_output_that_is_missing_or_more(tmp_path):
    directory(tmp_path, tensors(), tie_word_embeddings=False)
    words = "lm_head.weight [24, 8] is missing", '"tie_word_embeddings": true'
    for load in (load_huggingface, lambda path: load_unstacked(path, load_config(path))):
        refuses(functools.partial(load, tmp_path), *words, error=FormatError)
    bias = {HEAD: tensors()[EMBED], "lm_head.bias": np.ones(24, np.float32)}
    directory(tmp_path, tensors() | bias)
    refuses(lambda: load_huggingface(tmp_path), "lm_head.bias [24] is not", error=FormatError)


def load_config(path):
    return from_huggingface(json.loads((path / "config.json").read_text()))


TEXT = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
# How versions of transformers name the text model's tensors in one of more than text.
BENEATH = {
    "first": ("language_model.model.", "language_model."),
    "since 4.52": ("model.language_model.", ""),
    "idefics": ("model.text_model.", ""),
}


@pytest.mark.parametrize("how", BENEATH)
def test_the_text_model_of_a_larger_one(how, tmp_path, capsys):
    """Its tensors alone are read, and its configuration where it leaves out what is usual."""
    body, outside = BENEATH[how]
    arrays = tensors() | {HEAD: np.ones((24, 8), np.float32)}
    named = {
        (body + n.removeprefix("model.") if n.startswith("model.") else outside + n): x
        for n, x in arrays.items()
    }
    vision = {"model.vision_tower.norm.weight": np.ones(3, np.float32)}
    outer = {"model_type": "llava", "tie_word_embeddings": False, "image_token_index": 7}
    directory(tmp_path, named | vision, text_config=TEXT, vision_config={"x": 1}, **outer)
    params, config = load_huggingface(tmp_path)
    assert "as its text model; 1 other tensors" in capsys.readouterr().err
    assert config == from_huggingface(TEXT | {"tie_word_embeddings": False})
    np.testing.assert_array_equal(params.output[:, :24], 1)
    np.testing.assert_array_equal(params.embed[:24], arrays[EMBED])


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma3", "Mistral3"])
def test_logits_of_larger_models_for_text(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = sizes | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    kind = {"Gemma3": {"model_type": "siglip_vision_model"}, "Mistral3": {"model_type": "pixtral"}}
    text = sizes | {"vocab_size": 139, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 12, "num_hidden_layers": 3, "sliding_window": 4, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision | kind[name], image_token_index=130
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.save_pretrained(tmp_path)
    ids = np.arange(9, dtype=np.int32)[None]
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids).long()).logits.numpy()
    params, found = load_huggingface(tmp_path)
    np.testing.assert_allclose(logits(params, ids, found), expected, atol=1e-5)


def test_text_configurations():
    """Defaults, tying and types; of a larger model that is not supported both types are named."""
    published = {  # google/gemma-3-4b-it
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    data = {"model_type": "gemma3", "text_config": published, "vision_config": {"x": 1}}
    assert from_huggingface(data) == known_model("gemma3_4b")
    inner = {"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 4}
    inner |= {"num_key_value_heads": 4, "num_hidden_layers": 2}
    config = from_huggingface(
        {"model_type": "internvl", "tie_word_embeddings": True, "text_config": inner}
    )
    assert (config.family, config.vocab_size, config.tied) == ("qwen2", 151936, True)
    for outer, own, tied in ((True, False, True), (False, True, True), (False, False, False)):
        data = {"model_type": "mistral3", "tie_word_embeddings": outer}
        data |= {"text_config": {"tie_word_embeddings": own}}
        assert from_huggingface(data).tied == tied
    for outer, kind, *words in (
        ("llama4", "llama4_text", "'llama4' with a text model of type 'llama4_text'; supported"),
        ("paligemma", "gemma2", "'paligemma', whose prompts see what comes after them"),
        ("unheard", None, "model_type 'unheard'"),
    ):
        data = {"model_type": outer, "text_config": {"model_type": kind} if kind else {}}
        refuses(functools.partial(from_huggingface, data), *words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mask_token_id", 3), ("boi_token_index", 4), ("_commit_hash", "ab"), ("pretraining_tp", 4),
        ("ffn_dropout", 0.1), ("resid_pdrop", 0.1), ("logit_scale", 1.0), ("num_groups", 1),
        ("min_p", 0.1), ("license", "mit"), ("base_model_tp_plan", {"a": "b"}), ("new", False),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "finetuned": True}),
    ],
)  # fmt: skip
def test_keys_that_change_nothing(key, value):
    from_huggingface(CONFIG | {key: value})


@pytest.mark.parametrize(
    "extra",
    [
        {"logit_scale": 0.5}, {"embedding_multiplier": 12}, {"is_encoder_decoder": True},
        {"quantization": {"bits": 4}}, {"num_experts": 1}, {"use_mrope": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mrope_section": [1]}},
    ],
)  # fmt: skip
def test_other_keys_are_named_and_can_be_passed_over(extra):
    data, key = CONFIG | extra, next(iter(extra))
    key = "mrope_section" if key == "rope_scaling" else key
    refuses(lambda: from_huggingface(data), f"'{key}'=", "--ignore_config_keys=")
    from_huggingface(data, ignore=[key])


def test_a_single_file_beside_an_index(tmp_path):
    """The single file, as in transformers, whether the shards are still there or not."""
    write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(2)})
    place = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(place))
    for shards in (False, True):
        if shards:
            write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"a": np.zeros(2)})
        np.testing.assert_array_equal(open_safetensors(tmp_path).array("a"), 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "PyTorch's pickled weights are not read; save them as safetensors"),
        ("model-00001-of-00002.safetensors", "fetch model.safetensors.index.json as well"),
        ("consolidated.safetensors", "It has consolidated.safetensors, which is named otherwise"),
    ],
)
def test_weights_in_other_files(name, words, tmp_path):
    (tmp_path / name).write_bytes(b"")
    refuses(lambda: open_safetensors(tmp_path), words, error=FileNotFoundError)


def test_git_lfs_pointers(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuses(lambda: open_safetensors(tmp_path), "git lfs pull", error=FormatError)


def test_gguf_files_are_known_by_their_beginning(tmp_path):
    """A blob, another case; parts of a split model are one; of several one has to be named."""
    blob = write_tiny(tmp_path / "sha256-01")
    assert locate(blob) == locate(tmp_path) == blob and is_gguf(blob) and not is_gguf(tmp_path)
    other = blob.rename(tmp_path / "M-00002-of-00002.GGUF")
    assert locate(tmp_path) == other
    first = write_tiny(tmp_path / "M-00001-of-00002.GGUF")
    assert locate(tmp_path) == first
    write_tiny(tmp_path / "z.gguf")
    words = "several GGUF files; give one of them: M-00001-of-00002.GGUF, z.gguf"
    refuses(lambda: locate(tmp_path), words, error=FormatError)


def test_a_gguf_file_beside_a_configuration(tmp_path):
    """As GGUF repositories have; without either the weights that are missing are named."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert locate(tmp_path) == tmp_path
    file = write_tiny(tmp_path / "m.gguf")
    assert locate(tmp_path) == file
    directory(tmp_path, tensors())
    assert locate(tmp_path) == tmp_path


def test_an_adapter_given_as_the_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = "is an adapter, not a model", "'some/model'", f"--adapter={tmp_path}"
    refuses(lambda: locate(tmp_path), *words, error=FormatError)


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, None),
        ({"attn_factor": 1.0, "finetuned": True, "yarn_ext_factor": 1.0}, None),
        ({"attn_factor": 1.5}, 1.5 * (1 + 0.1 * np.log(4))),
        ({"attn_factor": 0.5, "yarn_attn_factor": 3.0}, 1.5 * (1 + 0.1 * np.log(4))),
    ],
)
def test_factors_of_yarn_in_gguf(keys, factor, tmp_path):
    """llama.cpp multiplies them with YaRN's own, 1 + 0.1 ln(factor)."""
    more = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    config = read_gguf_config(write_tiny(tmp_path / "m.gguf", YARN | more))
    found = config.layers[0].attention.rope.scaling.attention_factor
    assert found == (factor and pytest.approx(factor))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope.scaling.attn_factor": 1.5}, "is 1.5 with rope.scaling.type 'none'"),
        (YARN | {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ({"rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor is 1.0"),
        (YARN | {"rope.scaling.yarn_log_multiplier": 0.1}, "rope.scaling.yarn_log_multiplier=0.1"),
        ({"rope.scaling.alpha": 2.0}, "rope.scaling.alpha=2.0, which is not supported"),
        ({"rope.dimension_sections": np.array([4, 4])}, "rope.dimension_sections="),
        ({"rope.freq_base_swa": 9.0}, "rope.freq_base_swa=9.0"),
        ({"attention.clamp_kqv": 8.0}, "attention.clamp_kqv=8.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"attention.causal": False}, "attention.causal=False"),
        ({"general.type": "adapter"}, "general.type is 'adapter'; only whole models"),
    ],
)
def test_keys_of_gguf_that_are_not_understood(keys, words, tmp_path):
    full = {k if k.startswith(("general", "llama")) else f"llama.{k}": v for k, v in keys.items()}
    path = write_tiny(tmp_path / "m.gguf", full)
    error = refuses(lambda: read_gguf_config(path), words, error=FormatError)
    if "--ignore_config_keys" in str(error):
        read_gguf_config(path, ignore=[words.partition("=")[0]])


def test_stretched_twice(tmp_path):
    factors = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = write_tiny(tmp_path / "m.gguf", YARN, tensors=factors)
    refuses(lambda: read_gguf_config(path), "has rope_freqs.weight and", error=FormatError)


def test_a_model_of_the_files_is_written_untied(tmp_path):
    arrays = tensors() | {HEAD: np.ones((24, 8), np.float32)}
    params, config = load_huggingface(directory(tmp_path / "a", arrays))
    save_huggingface(params, config, tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["tie_word_embeddings"] is False
    again = load_file(tmp_path / "b/model.safetensors")
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
    assert make_config("llama", vocab_size=24, embed_dim=8, hidden_dim=8, num_layers=1,
                       num_heads=2, norm=config.norm) == config  # fmt: skip
