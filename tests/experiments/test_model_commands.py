"""The commands that use a finished model: what they print, write and refuse."""

import errno
import importlib
import json
import os

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import model_flags as commands
from experiments.convert import new_folder
from experiments.generate import with_common
from experiments.prompts import adapter_of, encode, json_of, read_rows
from lm.adapters import add_lora, merge
from lm.config.command_line import ConfigError
from lm.data.files import read_text
from lm.formats import load_pretrained, save_huggingface
from lm.formats.peft.io import load_peft, save_peft
from lm.infer import Request
from lm.infer.generate import LocalSampler
from lm.infer.score import Scorer, perplexity
from lm.tokenizers import ChatTemplate
from lm.tokenizers.save import save_tokenizer
from tests.commands import ROOT, apart
from tests.commands import command as run
from tests.formats.tiny_gguf import write_tiny
from tests.refuses import refuses


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def opened(tiny):
    return load_pretrained(tiny)


def test_generate_prints_an_object_a_prompt(tiny, opened, tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    rows = [{"prompt": "def f(x):"}, {"messages": messages}, {"prompt": "The"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows[:2])) + "\n\n" + json.dumps(rows[2]))
    out = run(
        "generate", f"--model={tiny}", f"--prompts={file}", "--max_new_tokens=6", "--logprobs=2",
        "--format=json", "--temperature=0.7", "--top_k=50", "--seed=3", "--batch_size=2",
    )  # fmt: skip
    found = [json.loads(line) for line in out.splitlines()]
    tokenizer = opened.tokenizer
    chat = ChatTemplate.of(tokenizer).render(messages, add_generation_prompt=True)
    sampler = LocalSampler(opened.params, opened.config, tokenizer=tokenizer)
    for i, (text, one) in enumerate(zip(["def f(x):", chat, "The"], found, strict=True)):
        ids = tokenizer.encode_prompt(text)
        assert one["prompt_token_ids"] == ids
        request = Request(
            prompt=ids, max_new_tokens=6, temperature=0.7, top_k=50, seed=3 + i,
            logprobs=True, top_logprobs=2,
        )  # fmt: skip
        (sample,) = sampler.sample([request])
        assert one["token_ids"] == list(sample.token_ids)
        assert (one["text"], one["finish_reason"]) == (sample.text, sample.finish_reason)
        for token, logprob, top, theirs in zip(
            sample.token_ids, sample.logprobs, sample.top_logprobs, one["logprobs"], strict=True
        ):
            assert theirs["token_id"] == token
            assert theirs["logprob"] == pytest.approx(logprob, abs=1e-4)
            assert [t["token_id"] for t in theirs["top"]] == [token_id for token_id, _ in top]
            assert theirs["top"][0]["logprob"] == pytest.approx(top[0][1], abs=1e-4)


def test_one_text_comes_as_it_is_made(tiny, opened):
    out = apart("generate", f"--model={tiny}", "--prompt=The", "--max_new_tokens=9")
    sampler = LocalSampler(opened.params, opened.config, tokenizer=opened.tokenizer)
    ids = opened.tokenizer.encode_prompt("The")
    (sample,) = sampler.sample([Request(prompt=ids, max_new_tokens=9)])
    assert out == sample.text + "\n"


def test_perplexity_of_a_file(tiny, opened, tmp_path):
    text = (ROOT / "LICENSE").read_text()[:1500]
    (tmp_path / "text.txt").write_bytes(text.replace("\n", "\r\n").encode())
    out = run(
        "perplexity", f"--model={tiny}", f"--text={tmp_path / 'text.txt'}", "--window=64",
        "--stride=32", "--format=json", "--max_tokens=300",
    )  # fmt: skip
    found = json.loads(out)
    ids = opened.tokenizer.encode(text)[:300]
    expected = perplexity(Scorer(opened.params, opened.config), opened.tokenizer, ids, 64, 32)
    assert (found["tokens"], found["window"], found["stride"]) == (299, 64, 32)
    for key in ("nats_per_token", "perplexity", "bits_per_byte"):
        assert found[key] == pytest.approx(getattr(expected, key), rel=1e-5)


def test_convert(tiny, opened, tmp_path):
    out = run("convert", f"--model={tiny}", "--format=safetensors", f"--output={tmp_path / 'm'}")
    assert "model.safetensors" in out
    again = load_pretrained(tmp_path / "m")
    assert again.config == opened.config
    np.testing.assert_array_equal(again.params.embed, opened.params.embed)
    assert again.tokenizer.eos_ids == opened.tokenizer.eos_ids
    assert dict(again.tokenizer.chat_templates) == dict(opened.tokenizer.chat_templates)
    error = run("convert", f"--model={tiny}", f"--output={tmp_path / 'm'}", status=2)
    assert error == f"error: {tmp_path / 'm'} is there already; give a new folder as --output\n"


def test_commands_can_be_called_from_one_process(tiny, opened, tmp_path):
    """Importing them all defines no flag twice, and their functions need no flags."""
    names = ("aot", "average", "plot", "pretrain", "replay", "report", "sweep")
    for name in (*names, "convert", "generate", "perplexity"):
        importlib.import_module(f"experiments.{name}")
    from experiments.convert import convert
    from experiments.generate import generate
    from experiments.perplexity import measure

    rows = [{"prompt": "The"}, {"prompt": "def f(x):"}]
    samples = list(generate(opened, rows, max_new_tokens=3))
    assert [len(sample.token_ids) for sample in samples] == [3, 3]
    assert measure(opened, "The quick brown fox.", window=8)["perplexity"] > 1
    convert(tiny, tmp_path / "m")
    assert load_pretrained(tmp_path / "m").config == opened.config


@pytest.fixture
def source(opened, tmp_path):
    """A Hugging Face directory with three ends, a second chat template, no generation_config."""
    folder = tmp_path / "source"
    save_huggingface(opened.params, opened.config, folder, extra={"eos_token_id": [2, 5, 7]})
    save_tokenizer(opened.tokenizer, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize("other", [False, True])
def test_convert_keeps_ends_and_chat_templates(source, tmp_path, other):
    """Copied with the model, and written anew of a tokenizer given apart."""
    output = tmp_path / "m"
    more = [f"--tokenizer={source}"] if other else []
    out = run("convert", f"--model={source}", f"--output={output}", *more)
    assert f"{output}/additional_chat_templates/tool.jinja  14 bytes\n" in out
    was, now = load_pretrained(source).tokenizer, load_pretrained(output).tokenizer
    assert {2, 5, 7} <= set(was.eos_ids)
    assert now.eos_ids == was.eos_ids
    assert dict(now.chat_templates) == dict(was.chat_templates)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((output / name).read_text())
        assert (said["bos_token_id"], said["eos_token_id"]) == (was.bos_id, list(was.eos_ids))


def test_convert_copies_the_generation_config(source, tmp_path):
    text = '{"eos_token_id": 9, "top_k": 64}'
    (source / "generation_config.json").write_text(text)
    run("convert", f"--model={source}", f"--output={tmp_path / 'm'}")
    assert (tmp_path / "m" / "generation_config.json").read_text() == text
    assert (
        load_pretrained(tmp_path / "m").tokenizer.eos_ids
        == load_pretrained(source).tokenizer.eos_ids
    )


def test_chat_templates_stay_in_the_folder(source, tmp_path):
    templates = [{"name": "default", "template": "a"}, {"name": "../../b", "template": "b"}]
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    for path in source.rglob("*.jinja"):  # which would count more
        path.unlink()
    (tmp_path / "m").mkdir()
    with pytest.raises(ValueError, match=r"chat template '\.\./\.\./b' has an invalid file name"):
        save_tokenizer(load_pretrained(source).tokenizer, tmp_path / "m")
    assert not any((tmp_path / "m").iterdir())


def test_convert_refuses_before_it_opens_the_model(tmp_path):
    """The model is not there, and yet it is the output that is told of."""
    (tmp_path / "file").write_text("")
    nowhere = "error: nowhere to write to; give a new folder with --output=DIR\n"
    assert run("convert", "--model=none", "--output=", status=2) == nowhere
    to = tmp_path / "file" / "m"
    error = run("convert", "--model=none", f"--output={to}", status=2)
    assert error == f"error: cannot write {to}: Not a directory; choose another --output\n"
    error = run("convert", "--model=none", "--output=m", "--keep_quantized", status=2)
    assert error == "error: convert decodes blocks; leave --keep_quantized out\n"
    error = run("convert", "--model=none", f"--output={tmp_path / 'm'}", status=2)
    assert "no model 'none'" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_whole_or_not_there(tmp_path, there):
    output = tmp_path / "m"
    if there:
        output.mkdir()

    def fill(reason=None):
        with new_folder(output) as folder:
            assert folder.name == ".m.partial"
            (folder / "model.safetensors").write_text("some")
            if reason == errno.EEXIST:
                fill()
            elif reason is not None:
                raise OSError(reason, os.strerror(reason), "tokenizer.json")

    full = f"cannot write {output}: No space left on device; choose another --output"
    with pytest.raises(ConfigError, match=full):
        fill(errno.ENOSPC)
    with pytest.raises(ConfigError, match="is there"):
        fill(errno.EEXIST)
    assert list(tmp_path.rglob("*")) == ([output] if there else [])
    fill()
    assert list(tmp_path.rglob("*")) == [output, output / "model.safetensors"]


@pytest.mark.oracle
def test_transformers_opens_what_is_converted(tiny, opened, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run("convert", f"--model={tiny}", f"--output={tmp_path / 'm'}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, attn_implementation="eager"
    )
    ends = model.generation_config.eos_token_id
    ends = tuple(ends) if isinstance(ends, list) else (ends,)
    assert ends == opened.tokenizer.eos_ids
    sampler = LocalSampler(opened.params, opened.config, tokenizer=opened.tokenizer)
    for text in ("The quick brown", "def f(x):"):
        ids = tokenizer(text).input_ids
        assert ids == opened.tokenizer.encode_prompt(text)
        prompt = torch.tensor([ids])
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24
        )[0, len(ids) :]
        (ours,) = sampler.sample([Request(prompt=ids, max_new_tokens=24, temperature=0)])
        assert [i for i in made.tolist() if i not in ends] == list(ours.token_ids)


@pytest.fixture(scope="module")
def adapters(opened, tmp_path_factory):
    """Two PEFT directories that change what the model says."""
    found = {}
    for seed, name in enumerate(("terse", "wordy")):
        key = jax.random.key(seed)
        adapted = add_lora(opened.params, opened.config, key, rank=4 + seed)

        def shake(path, x, key=key):
            moved = jax.tree_util.keystr(path, simple=True).endswith("b")
            return 0.3 * jax.random.normal(key, x.shape) if moved else x

        adapted = jax.tree_util.tree_map_with_path(shake, adapted)
        found[name] = tmp_path_factory.mktemp("adapters") / name
        save_peft(adapted, opened.config, found[name])
    return found


def test_rows_choose_among_adapters(tiny, opened, adapters, tmp_path):
    """One batch gives each row what its adapter alone, merged into the model, gives."""
    rows = [{"prompt": "The", "adapter": name} for name in adapters] + [{"prompt": "The"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = run(
        "generate", f"--model={tiny}", f"--prompts={tmp_path / 'rows.jsonl'}", "--format=json",
        "--max_new_tokens=8", *[f"--adapter={name}={path}" for name, path in adapters.items()],
    )  # fmt: skip
    found = [json.loads(line)["token_ids"] for line in out.splitlines()]
    models = [load_peft(path, opened.params, opened.config)[0] for path in adapters.values()]
    request = Request(prompt=opened.tokenizer.encode_prompt("The"), max_new_tokens=8)
    expected = []
    for params in (*map(merge, models), opened.params):
        sampler = LocalSampler(params, opened.config, tokenizer=opened.tokenizer)
        expected.append(list(sampler.sample([request])[0].token_ids))
    assert found == expected
    assert len(set(map(tuple, found))) == 3


def test_convert_merges_an_adapter(tiny, opened, adapters, tmp_path):
    run("convert", f"--model={tiny}", f"--adapter={adapters['wordy']}", f"--output={tmp_path}")
    merged = merge(load_peft(adapters["wordy"], opened.params, opened.config)[0])
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path).params, merged)


def test_adapters_that_cannot_be(tiny, adapters, tmp_path):
    name = adapters["terse"]
    settings = json.loads((name / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_model.safetensors").write_bytes(
        (name / "adapter_model.safetensors").read_bytes()
    )
    (other / "adapter_config.json").write_text(
        json.dumps(settings | {"target_modules": ["c_attn"]})
    )
    both = (f"--adapter=a={name}", f"--adapter={name}")
    for arguments, *words in (
        ((f"--adapter={other}",), "c_attn", " names no module of this model"),
        (("--adapter=nowhere",), "nowhere"),
        (both, "one of several needs a name: NAME=DIRECTORY"),
        (both[:1] * 2, "two adapters are named 'a'"),
    ):
        refuses(lambda a=arguments: open_with(tiny, *a), *words, error=ConfigError)
    wrong = {"adapter": "b"}
    refuses(
        lambda: adapter_of(wrong, {"a": 0}, "x:1"), "x:1: no adapter 'b'; there are a",
        error=ConfigError,
    )  # fmt: skip


def open_with(model, *arguments):
    with flagsaver.flagsaver():
        flags.FLAGS(["", f"--model={model}", *arguments])
        return commands.open_with_adapters()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=smollm3", "--prompt=a"], "error: no model 'smollm3': no such path"),
        (["--prompt=a", "--dtype=float8"], "flag --dtype=float8: value"),
        ([], "give either --prompt=TEXT or --prompts=FILE.jsonl"),
        (["--prompt=a", "--top_p=0"], "flag --top_p=0: '0' is not a finite float32 in (0, 1]"),
    ],
)
def test_flags_that_cannot_be(tiny, arguments, message):
    assert message in run("generate", f"--model={tiny}", *arguments, status=2)


def test_files_that_cannot_be(tmp_path):
    file = tmp_path / "rows.jsonl"
    for text, words in (
        (b'{"prompt": "a"}\n{"prompt": }', "rows.jsonl', line 2: not JSON: Expecting value"),
        (b'{"prompt": "a"}\n\n["a"]', "rows.jsonl', line 3: a JSON list, not an object"),
        (b'{"prompt": "a", "messages": []}', "rows.jsonl:1 has to be an object with either"),
        (b'{"prompt": 5}', 'rows.jsonl:1: "prompt" is 5; it has to be text'),
        (b'{"messages": ["a"]}', 'rows.jsonl:1: "messages" has to be a list of objects'),
        (b"\n \n", "rows.jsonl has no prompts"),
        (b"caf\xe9 au lait", "rows.jsonl', line 1: not UTF-8, byte 0xe9 at byte 4"),
        (None, "rows.jsonl': No such file"),
    ):
        file.unlink() if text is None else file.write_bytes(text)
        refuses(lambda: list(read_rows(str(file))), words, error=ConfigError)


def test_prompts_that_cannot_be(opened):
    for where, row, *words in (
        ("x:1", {"prompt": ""}, ": the prompt is empty, and this model puts no BOS"),
        ("x:2", {"prompt": "word " * 200}, ": the prompt's ", " tokens leave no room ", " of 128"),
        ("x:3", {"messages": [{"role": "user"}], "continue_final_message": True}, ": ", "no text"),
        ("x:4", {"prompt": "a", "tools": [{}]}, ': "tools" is for chat templates; give "messages"'),
    ):
        refuses(lambda r=row, w=where: encode(opened, r, w), where, *words, error=ConfigError)


def test_rows_say_what_their_template_reads(opened):
    source = (
        "{% if tools %}T{{ tools[0].name }}{% endif %}{% if documents %}D{% endif %}{{ mood }}"
        "{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}"
    )
    template = ChatTemplate.with_tokens(opened.tokenizer, source)
    said = {"messages": [{"role": "user", "content": "hi"}]}
    for more, expected in (
        ({}, "hi:"),
        ({"tools": [{"name": "f"}], "documents": [{"text": "d"}]}, "TfDhi:"),
        ({"chat_template_kwargs": {"mood": "calm "}, "tools": []}, "calm hi:"),
        ({"continue_final_message": True, "tools": None}, "hi"),
    ):
        ids = encode(opened, said | more, "x:1", template=template)
        assert opened.tokenizer.decode(ids, skip_special=False).removeprefix("<s>") == expected
    common = {"tools": [1], "chat_template_kwargs": {"a": 1, "b": 2}}
    own = {"tools": None, "chat_template_kwargs": {"b": 3}}
    assert with_common(own, common) == {"tools": [1], "chat_template_kwargs": {"a": 1, "b": 3}}
    assert with_common({}, {}) == {}
    for name, value, words in (
        ("tools", "[", "--tools=[ is not JSON"),
        ("tools", "{}", "has to be a list of JSON schemas"),
        ("chat_template_kwargs", "[1]", "has to be an object of the template's own variables"),
        ("tools", "nowhere.json", "nowhere.json"),
    ):
        refuses(lambda n=name, v=value: json_of(n, v, n), words, error=ConfigError)


def test_line_ends_are_read_as_one_kind(tmp_path):
    (tmp_path / "lines").write_bytes(b"a\r\nb\rc\n")
    assert read_text(str(tmp_path / "lines")) == "a\nb\nc\n"
