"""Chat templates as Hugging Face renders them, and templates that mean harm."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fastlm.tokenizers import Tokenizer, TokenizerError

MESSAGES = [
    {"role": "system", "content": 'Be <kind> & "brief".'},
    {"role": "user", "content": " Hi \u00e9 "},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "B"},
]
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(template: str, messages: Any = MESSAGES, **variables: Any) -> str:
    tokenizer = Tokenizer.train_bpe(["some text"], 257)
    tokenizer.chat_template = template
    return tokenizer.chat(messages, **variables)


def test_chatml() -> None:
    body = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES)
    assert chat(CHATML) == body + "<|im_start|>assistant\n"
    assert chat(CHATML, add_generation_prompt=False) == body


def test_the_conventions_of_hugging_face() -> None:
    assert chat("{{ bos_token }}|{{ eos_token }}") == "<|endoftext|>|<|endoftext|>"
    assert chat("{{ messages[0].content | tojson }}") == '"Be <kind> & \\"brief\\"."'  # nothing escaped for HTML
    assert chat("{{ messages[1] | tojson(indent=1) }}") == '{\n "role": "user",\n "content": " Hi \u00e9 "\n}'
    assert chat("{{ messages[0].content }}") == MESSAGES[0]["content"]
    assert chat("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}") == "x\n" * 4  # trim and lstrip
    assert chat("{{ messages[1].content.strip().split(' ')[0] }}") == "Hi"
    assert chat("{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.role }} {% endfor %}") == "system user "
    assert chat("{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}") == "4"
    assert chat("{% generation %}{{ messages[2].content }}{% endgeneration %}") == "A"
    assert chat("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert chat("{% if tools %}{{ tools | tojson }}{% else %}none{% endif %}", tools=[{"name": "f"}]) == '[{"name": "f"}]'
    assert chat("{% if tools %}x{% else %}none{% endif %}") == "none"
    assert chat("{{ thinking }}", thinking=True) == "True"


def test_a_template_may_refuse() -> None:
    with pytest.raises(TokenizerError, match="refuses these messages: roles must alternate"):
        chat("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ foo",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages.no.such }}",
        "{{ no_such_function() }}",
        "{% include '/etc/passwd' %}",
        "{{" + "(" * 100_000,
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000000 }}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "x" * (1 << 20) + "x",
    ],
    ids=lambda t: t[:24],
)
def test_broken_and_hostile_templates(template: str) -> None:
    start = time.process_time()  # a busy machine takes longer, the template does not
    with pytest.raises(TokenizerError, match=r"\[chat\]"):
        chat(template)
    assert time.process_time() - start < 2


def test_messages_are_checked() -> None:
    with pytest.raises(TokenizerError, match="message 0 must be a mapping with role and content"):
        chat(CHATML, [{"content": "x"}])
