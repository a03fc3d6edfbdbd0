"""Chat templates give the text of `transformers`, run in a sandbox, and write one begin token."""

import dataclasses

import pytest

from jaxrl_reason import data
from jaxrl_reason.data import chat_template, get_template

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|' + message.role + '|>' + message.content | trim + eos_token }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|assistant|>' }}\n{%- endif %}\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["hello there 12"], 300)


def with_template(tokenizer, text):
    return dataclasses.replace(tokenizer, chat_template=text)


def test_the_question_is_the_users_turn(tokenizer):
    template = chat_template(get_template("qa"), with_template(tokenizer, CHATML))
    assert template.render_prompt({"question": "1 + 1?"}) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nQuestion: 1 + 1?\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render_solution({"solution": "2"}) == " 2"


def test_a_system_prompt_and_options(tokenizer):
    template = chat_template(get_template("{question}"), with_template(tokenizer, CHATML), "Think.")
    assert template.render_prompt({"question": "{question} {{ 1 }}"}) == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n{question} {{ 1 }}<|im_end|>\n<|im_start|>assistant\n"
    )
    asks = (
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ messages | tojson }}"
    )
    template = chat_template(
        get_template("{question}"), with_template(tokenizer, asks), options={"enable_thinking": False}
    )
    assert template.render_prompt({"question": "é<"}) == '<think></think>[{"role": "user", "content": "é<"}]'


ASKS = (
    "{{ tools is defined and tools is none }} {{ documents is defined and documents is none }} "
    "{{ pad_token }} {{ unk_token is defined and unk_token }} {{ messages[0].content }}"
)


def test_templates_receive_the_names_that_transformers_gives(tokenizer):
    question, row = get_template("{question}"), {"question": "Hi"}
    rendered = lambda t, **options: chat_template(question, with_template(t, ASKS), options=options).render_prompt(row)
    assert rendered(tokenizer) == "True True <pad> False Hi"
    assert rendered(dataclasses.replace(tokenizer, unk_token="<unk>", pad_id=2)) == "True True <eos> <unk> Hi"
    assert rendered(tokenizer, tools=["search"], pad_token="x") == "False True x False Hi"


@pytest.mark.parametrize("add_bos", [False, True])
def test_one_begin_token(tokenizer, add_bos):
    template = chat_template(get_template("{question}"), with_template(tokenizer, LLAMA))
    text = template.render_prompt({"question": " hello "})
    assert text == "<bos><|user|>hello<eos><|assistant|>"
    ids = tokenizer.encode(text, add_bos)
    assert ids[0] == 1 and ids.count(1) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "'list' object .*is not safely callable|access to attribute 'append'"),
        ("{{ raise_exception.__globals__['json'] }}", "access to attribute '__globals__'"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_the_sandbox_stops_hostile_templates(tokenizer, text, message):
    template = chat_template(get_template("{question}"), with_template(tokenizer, text))
    with pytest.raises(ValueError, match=f"chat template cannot render a prompt: .*({message})"):
        template.render_prompt({"question": "x"})


def test_templates_that_cannot_be_rendered_raise_a_sentence(tokenizer):
    with pytest.raises(ValueError, match="has no chat template"):
        chat_template(get_template("plain"), tokenizer)
    with pytest.raises(ValueError, match="is not Jinja that can be read"):
        chat_template(get_template("plain"), with_template(tokenizer, "{% if %}"))
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = chat_template(get_template("plain"), with_template(tokenizer, refuses), "Hello")
    with pytest.raises(ValueError, match="cannot render a prompt: System role not supported"):
        template.render_prompt({"question": "x"})
    with pytest.raises(ValueError, match="names the column 'question'"):
        template.render_prompt({"problem": "x"})


def test_thinking_and_boxed_prompts():
    row = {"question": "1 + 1?"}
    assert get_template("boxed").render_prompt(row) == (
        "1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    text = get_template("think").render_prompt(row)
    assert text.endswith("User: 1 + 1?\nAssistant: <think>") and "\\boxed{}" in text
