"""Rendering chat templates as they are written for Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tokenizer_folders import byte_level_tokenizer, write_hf, write_kimi
from thalweg.errors import CheckpointError, InvalidRequest
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.load import load_tokenizer
from thalweg.tokenizer.template import ChatTemplate, load_template

USER = [{"role": "user", "content": "hello"}]

KIMI = """\
{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
  <|im_{{ message.role }}|>{{ message.name or message.role }}<|im_middle|>{{ message.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_assistant|>assistant<|im_middle|>
{%- endif -%}
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("kimi")))


def render(tokenizer: Tokenizer, source: str, messages: list[Any] = USER, **options: Any) -> str:
    return ChatTemplate(source, tokenizer).render(messages, **options)


def test_kimi_layout(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(KIMI, tokenizer)
    messages = [{"role": "system", "content": "be brief"}, *USER]
    text = (
        "<|im_system|>system<|im_middle|>be brief<|im_end|><|im_user|>user<|im_middle|>hello<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    assert template.render(messages) == text
    ids = template.encode_chat(messages)
    assert ids == tokenizer.encode(text, allow_special=True)
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == 2
    assert template.render(USER, add_generation_prompt=False).endswith("hello<|im_end|>")
    tools = [{"type": "function", "function": {"name": "f", "description": 'ü "<b>"'}}]
    assert template.render(USER, tools=tools).startswith(
        "<|im_system|>tool_declare<|im_middle|>"
        '[{"type":"function","function":{"name":"f","description":"ü \\"<b>\\""}}]<|im_end|><|im_user|>'
    )
    assert template.render(USER, tools=[]) == template.render(USER)


def test_blocks_are_trimmed_as_transformers_does(tokenizer: Tokenizer) -> None:
    source = "a\n  {% if true %}\nb\n  {% endif %}\n{{ 'c' }}\n\n"
    assert render(tokenizer, source) == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}", "[BOS]|<|im_end|>|"),
        ("{{ messages[0]['content'] | trim | length }}{{ messages | length }}", "51"),
        ("{{ {'b': 'é<>&', 'a': None} | tojson }}", '{"b": "é<>&", "a": null}'),
        (
            "{{ {'b': 'é', 'a': 1} | tojson(indent=1, sort_keys=true, ensure_ascii=true) }}",
            '{\n "a": 1,\n "b": "\\u00e9"\n}',
        ),
        (
            (
                "{% for i in [0, 1, 2] %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% if i > 1 %}"
                "{% break %}{% endif %}x{% endfor %}"
            ),
            "0x2",
        ),
        (
            "{% for m in [1, 2] %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% else %}no{% endfor %}",
            "0False21True2",
        ),
        ("{% for x in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for k, v in {'a': [1]}.items() recursive %}{{ k }}{{ v }}{% endfor %}", "a[1]"),
        ("{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "10"),
        ("{% macro m(x, y='d') %}({{ x ~ y ~ 1 }}){% endmacro %}{{ m('a') }}{{ m('b', y=none) }}", "(ad1)(bNone1)"),
        ("{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}in{% endcall %}", "<in>"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x | upper }}", "a1A1"),
        ("{% filter upper %}abc{% endfilter %}", "ABC"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hello!"),
        (
            "{{ 'a-b'.split('-')[-1] }}{{ ' x '.strip() }}{{ 'ab'.replace('a', 'c') }}{{ ','.join(['p', 'q']) }}",
            "bxcbp,q",
        ),
        ("{{ [3, 1, 2] | sort | join(' ') }}{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | list }}", "1 2 3[1, 2]"),
        ("{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'equalto', 2) | list }}", "[{'a': 2}]"),
        ("{{ [{'a': 1}, {'a': 2}] | join('+', attribute='a') }}", "1+2"),
        ("{{ 'a\nb\n\nc' | indent(2) }}", "a\n  b\n\n  c"),
        (
            "{{ 'x' * 3 }}{{ [1] + [2] }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 1 + 1 }}{{ 'a' + 'b' }}{{ 1.5 * 2 }}",
            "xxx[1, 2]3322ab3.0",
        ),
        ("{{ none }}{{ missing }}{{ missing is defined }}{{ true }}{{ 1.0 }}", "NoneFalseTrue1.0"),
        ("{{ strftime_now('%Y') | length }}{{ dict(a=1).get('b', 'z') }}", "4z"),
        ('{% for k, v in \'{"city": "Ulm"}\' | items %}{{ k }}={{ v }}{% endfor %}', "city=Ulm"),
        ("{% for k, v in {'a': 1} | items %}{{ k }}={{ v }}{% endfor %}{{ nothing | items | list }}", "a=1[]"),
    ],
)
def test_the_language(tokenizer: Tokenizer, source: str, text: str) -> None:
    assert render(tokenizer, source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content.replace('/think', '').strip() }}{% endfor %}",
        "{% for m in messages %}{{ ''.join(['hel', 'lo']) }}{% endfor %}",
        "{% block b scoped %}{{ messages[0].content.replace('/think', '') }}{% endblock %}",
        "{% macro m(t) %}{{ t.replace('/', '') }}{% endmacro %}{% for x in messages %}{{ m(x.content) }}{% endfor %}",
    ],
)
def test_methods_of_texts_work_within_loops_and_blocks(tokenizer: Tokenizer, source: str) -> None:
    assert render(tokenizer, source) == "hello"


def test_errors_of_the_template_are_one_line(tokenizer: Tokenizer) -> None:
    refusing = "{{ raise_exception('roles must\\nalternate') }}"
    with pytest.raises(InvalidRequest, match="the chat template refused: roles must alternate"):
        render(tokenizer, refusing)
    for source in ("{{ missing.name }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ messages[0].content() }}"):
        with pytest.raises(InvalidRequest, match="the chat template failed on these messages: ") as caught:
            render(tokenizer, source)
        assert "\n" not in str(caught.value)
    for source in ("a\n{% if %}", "{{", "{{ x | no_such_filter }}", "{% nonsense %}", "{{ " + "(" * 5000 + " }}"):
        with pytest.raises(CheckpointError, match="the chat template does not compile") as caught_early:
            render(tokenizer, source)
        assert "\n" not in str(caught_early.value)
    with pytest.raises(CheckpointError, match="at line 2"):
        render(tokenizer, "a\n{% if %}")


def test_further_variables(tokenizer: Tokenizer) -> None:
    source = "{% if enable_thinking is defined and enable_thinking is false %}off{% else %}on{% endif %}"
    assert render(tokenizer, source) == "on"
    assert render(tokenizer, source, enable_thinking=False) == "off"
    template = ChatTemplate("{{ messages }}", tokenizer)
    for name in ("messages", "bos_token", "raise_exception", "range"):
        with pytest.raises(InvalidRequest, match=f"chat_template_kwargs has '{name}'"):
            template.encode_chat(USER, **{name: "x"})


def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_hf(tmp_path, byte_level_tokenizer()))
    assert load_template(tmp_path, tokenizer) is None

    def rendered(config: dict[str, Any], **options: Any) -> str:
        write_hf(tmp_path, byte_level_tokenizer(), **config)
        template = load_template(tmp_path, tokenizer)
        assert template is not None
        return template.render(USER, **options)

    assert rendered({"chat_template": "config"}) == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert rendered({"chat_template": named}) == "plain"
    assert rendered({"chat_template": named}, tools=[{"type": "function"}]) == "tools"
    for wrong in (3, [], [{"name": "other", "template": "x"}], [{"name": "default", "template": 1}]):
        with pytest.raises(CheckpointError, match="chat_template is neither a string nor a list"):
            rendered({"chat_template": wrong})
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered({"chat_template": "config"}) == "file"
