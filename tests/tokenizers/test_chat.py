"""Chat templates against transformers, their masks, and templates that mean harm."""

import json

import pytest

from lm.files.gguf import read_gguf
from lm.files.packaged import find_packaged
from lm.tokenizers import ChatTemplate, FastTokenizer, TemplateError, from_gguf
from tests.refuses import refuses
from tests.tokenizers import golden, templates

BYTES = json.loads(golden.FILE.read_text())["vocabularies"]["bytes"]
TURNS = [
    {"role": "user", "content": "Hi <b>&\"'é \U0001f642\n"},
    {"role": "assistant", "content": " Hello  there"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "get", "arguments": {"city": "Zürich <&>"}}}],
    },
    {"role": "tool", "content": '{"t": 3}'},
    {"role": "assistant", "content": "3 degrees"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get",
            "description": "Gets 'it' — <now>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}]}]
CASES = {
    "chatml": (templates.CHATML, [TURNS, TURNS[:1], WITH_SYSTEM], [None]),
    "llama3": (templates.LLAMA3, [TURNS, WITH_SYSTEM, CALLS], [None, TOOLS]),
    "qwen2.5": (templates.QWEN25, [TURNS, WITH_SYSTEM, CALLS], [None, TOOLS]),
    "gemma": (templates.GEMMA, [TURNS, WITH_SYSTEM, PARTS], [None]),
    "mistral": (templates.MISTRAL, [TURNS, TURNS[:1]], [None]),
    "marked": (templates.MARKED, [TURNS, [{"role": "debug"}, *TURNS]], [None]),
}
BOS, EOS = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="session")
def tokenizer():
    return from_gguf({**BYTES, "tokenizer.ggml.pre": "qwen2"})


@pytest.fixture(scope="session")
def oracle(tokenizer):
    transformers = pytest.importorskip("transformers", reason="needs the `peers` extra")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=BOS, eos_token=EOS
    )


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(oracle, name):
    source, conversations, toolsets = CASES[name]
    template = ChatTemplate(source, BOS, EOS)
    for messages in conversations:
        for tools in toolsets:
            for prompt in (False, True):
                text = template.render(messages, prompt, tools)
                assert text == oracle.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=source,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
                assert text


@pytest.mark.oracle
@pytest.mark.model
def test_the_template_of_a_real_file_equals_transformers(oracle):
    try:
        path = find_packaged("smollm2-135m-instruct")
    except FileNotFoundError as error:
        pytest.skip(f"{error}")
    real = from_gguf(read_gguf(path).metadata)
    template = ChatTemplate.of(real)
    for messages in (TURNS, WITH_SYSTEM):
        assert template.render(messages, True) == oracle.apply_chat_template(
            messages, chat_template=template.source, add_generation_prompt=True, tokenize=False
        )
    ids, mask = template.encode(real, TURNS)
    written = [real.token_bytes[i] for i, mine in zip(ids, mask, strict=True) if mine]
    assert b"".join(written) == b" Hello  there<|im_end|>4<|im_end|>"


@pytest.mark.oracle
def test_mask_of_marked_templates_equals_transformers(oracle, tokenizer):
    expected = oracle.apply_chat_template(
        TURNS,
        chat_template=templates.MARKED,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = ChatTemplate(templates.MARKED, BOS, EOS).encode(tokenizer, TURNS)
    assert ids == expected["input_ids"]
    assert [int(m) for m in mask] == expected["assistant_masks"]


def written(template, messages, tools=None):
    rendered = template.spans(messages, tools)
    assert rendered.text == template.render(messages, tools=tools)
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (templates.CHATML, TURNS, [" Hello  there<|im_end|>", "4<|im_end|>"]),
        (templates.MARKED, TURNS, [" Hello  there<|im_end|>", "4<|im_end|>"]),
        (templates.LLAMA3, TURNS, ["Hello  there<|eot_id|>", "4<|eot_id|>"]),
        (templates.GEMMA, TURNS, ["Hello  there<end_of_turn>", "4<end_of_turn>"]),
        (templates.MISTRAL, TURNS, ["  Hello  there".strip().join([" ", EOS]), f" 4{EOS}"]),
        (
            templates.QWEN25.replace("{%- if message.content %}", "{{- '\\n' }}{%- if 0 %}"),
            CALLS,
            [
                '\n<tool_call>\n{"name": "get", "arguments": {"city": "Zürich <&>"}}\n</tool_call>'
                "<|im_end|>",
                "3 degrees<|im_end|>",
            ],
        ),
    ],
)
def test_what_the_assistant_wrote(source, messages, expected):
    template = ChatTemplate(source, BOS, EOS, ["<|eot_id|>", "<end_of_turn>"])
    assert written(template, messages) == expected


def test_mask_marks_the_tokens_of_the_spans(tokenizer):
    ids, mask = ChatTemplate(templates.CHATML, BOS, EOS).encode(tokenizer, TURNS)
    assert tokenizer.decode(ids, skip_special=False) == ChatTemplate(templates.CHATML).render(TURNS)
    mine = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(mine, skip_special=False) == " Hello  there<|im_end|>4<|im_end|>"


def test_bos_is_added_to_the_mask_too():
    with_bos = from_gguf({**BYTES, "tokenizer.ggml.pre": "llama-bpe"})
    ids, mask = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").encode(
        with_bos, TURNS[:1]
    )
    assert ids[0] == with_bos.bos_id and len(ids) == len(mask) and not any(mask)


def test_a_template_that_forgets_has_no_mask():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>b</think>c"},
        {"role": "user", "content": "d"},
    ]
    template = ChatTemplate(templates.FORGETFUL)
    words = "message 1 differently once more follows", "{% generation %}"
    refuses(lambda: template.spans(messages), *words, error=TemplateError)
    assert template.render(messages)


def test_a_generation_block_in_a_macro_is_an_error():
    source = (
        "{% macro turn(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )
    template = ChatTemplate(source)
    assert "2+2?" in template.render(TURNS)
    refuses(lambda: template.spans(TURNS), "inside a macro", error=TemplateError)


def doubling(first, step):
    loop = "{% for i in range(99) %}{% set n.s = " + step + " %}{% endfor %}"
    return "{% set n = namespace(s=" + first + ") %}" + loop


HARMFUL = {
    "attributes": ("{{ ''.__class__.__mro__ }}", "breaks out of its sandbox"),
    "globals": ("{{ cycler.__init__.__globals__.os.popen('id') }}", "breaks out of its sandbox"),
    "attr": ("{{ messages|attr('__class__') }}", "breaks out of its sandbox"),
    "format": ("{{ '{0.__class__}'.format(messages) }}", "'format' is not allowed"),
    "context": ("{{ self._TemplateReference__context }}", "breaks out of its sandbox"),
    "mutation": ("{{ messages.append(1) }}", "breaks out of its sandbox"),
    "mutation of a message": ("{{ messages[0].update(a=1) }}", "breaks out of its sandbox"),
    "import": ("{% import 'os' as os %}", "fails"),
    "range": ("{{ range(9999999)|list }}", "range of 9999999 numbers; 100000 at most"),
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "too much work",
    ),
    "output": (
        "{% set x = 'a' * 99999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
        "too much work",
    ),
    "block": (
        "{% set y %}{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}{% endset %}{{ y }}",
        "too much work",
    ),
    "repetition": ("{{ 'a' * 10000000000 }}", "too much work"),
    "power": ("{{ 9 ** 999999999 }}", "operator '**' is not allowed"),
    "integers": (doubling("9", "n.s * n.s"), "integers over 256 bits"),
    "concatenation": (doubling("'a'", "n.s ~ n.s"), "too much work"),
    "addition": (doubling("[1]", "n.s + n.s"), "too much work"),
    "nesting": (doubling("[1]", "[n.s, n.s]") + "{{ n.s == n.s }}", "too much work"),
    "tuples": (doubling("1", "(n.s, n.s)") + "{{ {n.s: 1} }}", "unhashable"),
    "join": ("{{ (['a' * 99999] * 99999)|join }}", "too much work"),
    "string join": ("{{ ('a' * 99999).join(['b'] * 99999) }}", "too much work"),
    "replace": ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", "too much work"),
    "replace filter": ("{{ ('a' * 99999)|replace('a', 'b' * 99999) }}", "too much work"),
    "json": ("{{ (['a' * 99999] * 99999)|tojson }}", "too much work"),
    "width": ("{{ 'a'|indent(10 ** 9) }}", "not allowed"),
    "indent": ("{{ '\n\n'|indent(1000000000) }}", "indent by more than 1000"),
    "percent": ("{{ '%999999999d' % 1 }}", "operator '%' is not allowed"),
    "padding": ("{{ 'a'.ljust(1000000000) }}", "'ljust' is not allowed"),
    "recursion": ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "shadowing": (
        "{% set spend = 1 %}{% macro turn(x) %}{% endmacro %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "too much work",
    ),
    "missing method": ("{{ messages[0].text() }}", "has no attribute 'text'"),
    "missing in a sum": ("{{ 'a' + nothing }}", "'nothing' is undefined"),
    "refusal": ("{{ raise_exception('roles') }}", "refuses its input: roles"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "syntax": ("a\n{% if %}", "wrong in line 2"),
    "unclosed generation": ("{% generation %}", "wrong in line 1"),
    "depth": ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "does not compile"),
    "size": ("a" * 1_000_001, "has 1000001 characters; 1000000 at most"),
}


LONG = {"nesting": pytest.mark.slow}  # spends its bounds in small steps


# Unbounded, each of the costly ones takes hours or all memory.
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [pytest.param(n, marks=LONG.get(n, ())) for n in HARMFUL])
def test_harmful_templates_are_errors(name):
    source, message = HARMFUL[name]
    refuses(lambda: ChatTemplate(source).render(TURNS), message, error=TemplateError)


def test_what_templates_may_do():
    source = (
        "{% if nothing %}a{% endif %}{{ nothing is defined }}{{ nothing or 'b' }}"
        "{% for x in nothing %}{% endfor %}{{ messages[0].get('z', 'c') }}{{ none }}"
        "{{ {'k': '<é>'}|tojson }}{{ (1, 2)|tojson }}{{ ['a', 'b']|join(', ') }}"
        "{{ '  x\ny'|indent(2) }}{{ 7 % 4 }}{% set n = namespace(i=0) %}"
        "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{% set n.i = n.i + i %}"
        "{% endfor %}{{ n.i }}{{ strftime_now('%Y')|length }}{{ 'a-b'.split('-')[1] }}"
    )
    expected = 'FalsebcNone{"k": "<é>"}[1, 2]a, b  x\n  y334b'
    assert ChatTemplate(source).render(TURNS) == expected
    assert ChatTemplate("{{ mood }}").render(TURNS, mood="calm") == "calm"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ nothing }}{{ messages[0].name }}{{ messages[0]['name'] }}|", "|"),
        ("{{ 'a' ~ nothing }}{{ nothing|length }}{{ nothing|default('d') }}", "a0d"),
        ("{% macro f(x, y) %}{{ x }}{{ y }}{% endmacro %}{{ f('a') }}", "a"),
        ("{{ tools is none }}{{ documents is none }}{{ mood is defined }}", "TrueTrueFalse"),
        ("{{ unk_token is defined }}{{ unk_token }}{{ eos_token }}", "False<|im_end|>"),
    ],
)
def test_what_is_undefined_is_printed_as_nothing(source, expected):
    assert ChatTemplate(source, BOS, EOS).render(TURNS) == expected


def test_a_long_conversation_is_within_the_bounds():
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    assert len(ChatTemplate(templates.CHATML).render(messages)) > 10_000_000


def test_templates_come_with_the_tokenizer(tokenizer):
    refuses(lambda: ChatTemplate.of(tokenizer), "no chat template 'default' (none at all)")
    named = {"tokenizer.chat_template": "{{ eos_token }}", "tokenizer.chat_template.rag": "r"}
    templated = from_gguf({**BYTES, "tokenizer.ggml.pre": "qwen2", **named})
    assert isinstance(templated, FastTokenizer)
    assert ChatTemplate.of(templated).render([]) == "<|im_end|>"
    assert ChatTemplate.of(templated, "rag").render([]) == "r"
    refuses(lambda: ChatTemplate.of(templated, "x"), "no chat template 'x' (default, rag)")
