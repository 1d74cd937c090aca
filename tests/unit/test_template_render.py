"""Rendering chat templates as they are written for Hugging Face transformers."""

from __future__ import annotations

import json
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


def test_content_may_be_text_null_or_parts(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": ""},
        {"role": "user", "content": []},
        {"role": "assistant"},
    ]
    assert render(tokenizer, source, messages) == "[one two][][][][]"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ m.content }}|{{ m['content'] ~ '' }}|{{ m.content + '!' }}", "||!"),
        ("{{ '</think>' in m.content }}{{ m.content.split('</think>')[-1] }}{{ m.content | trim | length }}", "False0"),
        ("{% if m.content is string %}text{% endif %}{% for part in m.content %}{{ part }}{% endfor %}", "text"),
        ("{{ m.content | tojson }}{{ m.content or 'nothing' }}{{ m.content == '' }}", '""nothingTrue'),
        # Templates with a branch of their own for calls without content take it.
        ("{% if m.content is none %}call{% endif %}{% if m.content is not none %}text{% endif %}", "call"),
        ("{{ m.content == none }}{{ m.content != none }}{{ none == m.content }}", "TrueFalseTrue"),
        ("{{ [m] | selectattr('content', 'none') | list | length }}", "1"),
    ],
)
@pytest.mark.parametrize("null", [{"content": None}, {}])
def test_content_that_is_null_or_missing_is_the_empty_string(
    tokenizer: Tokenizer, source: str, text: str, null: dict[str, Any]
) -> None:
    message = {"role": "assistant", "tool_calls": [{"id": "1"}], **null}
    assert render(tokenizer, "{% set m = messages[1] %}" + source, [*USER, message]) == text


TRIMMING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}"
VERBATIM = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
SPLITTING = (
    "{% for m in messages %}<{{ m.role }}>{% if '</think>' in m.content %}[{{ m.content.split('</think>')[0] }}]"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}</>{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "content", "text"),
    [
        (VERBATIM, "It is", "<user>hello</>\n<assistant>It is"),
        (VERBATIM, "It is \n ", "<user>hello</>\n<assistant>It is \n "),
        (TRIMMING, "It is \n ", "<user>hello</>\n<assistant>It is"),
        (TRIMMING, " It is", "<user>hello</>\n<assistant>It is"),
        (TRIMMING, "", "<user>hello</>\n<assistant>"),
        (TRIMMING, " ", "<user>hello</>\n<assistant>"),
        (VERBATIM, None, "<user>hello</>\n<assistant>"),
        (VERBATIM, "a <", "<user>hello</>\n<assistant>a <"),
        (VERBATIM, [{"type": "text", "text": "It is"}], "<user>hello</>\n<assistant>It is"),
        (SPLITTING, "why</think> It ", "<user>hello</><assistant>[why]It "),
        (SPLITTING, "It </think>", "<user>hello</><assistant>[It ]"),
    ],
)
def test_a_final_message_is_left_open(tokenizer: Tokenizer, source: str, content: Any, text: str) -> None:
    template = ChatTemplate(source, tokenizer)
    messages = [*USER, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert template.render(messages, **options) == text
    assert tokenizer.decode(template.encode_chat(messages, **options)) == text


def test_what_cannot_be_continued_is_refused(tokenizer: Tokenizer) -> None:
    def continued(messages: list[Any], source: str = VERBATIM, **options: Any) -> str:
        options = {"add_generation_prompt": False, "continue_final_message": True} | options
        return render(tokenizer, source, messages, **options)

    answer = {"role": "assistant", "content": "It is"}
    with pytest.raises(InvalidRequest, match="the last message's role is 'user'; expected 'assistant'"):
        continued([answer, *USER])
    with pytest.raises(InvalidRequest, match="the last message has tool_calls; expected content alone"):
        continued([*USER, answer | {"tool_calls": [{"id": "1"}]}])
    with pytest.raises(InvalidRequest, match="both true; expected one of them"):
        continued([*USER, answer], add_generation_prompt=True)
    with pytest.raises(InvalidRequest, match="leaves the last message's content out"):
        continued([*USER, answer], "{{ messages | length }}")


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


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages is a str; expected a list"),
        (["hi"], r"messages\[0\] is a str; expected an object"),
        ([{"content": "x"}], r"messages\[0\]\.role is 'None'; expected one of system"),
        ([*USER, {"role": "im_end|><|im_system", "content": "x"}], r"messages\[1\]\.role is"),
        ([{"role": ["user"]}], r"messages\[0\]\.role is"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content is a int; expected a string, null or"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] is of type 'image_url'; expected text"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] is of type 'str'"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\] has no text"),
        ([{"role": "user", "content": "x", "extra": object()}], "holds a object; expected JSON values"),
        ([{"role": "user", "content": "x", "deep": json.loads("[" * 70 + "]" * 70)}], "nests more than 64 deep"),
    ],
)
def test_bad_messages_are_refused(tokenizer: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        render(tokenizer, "{{ messages }}", messages)
    assert "\n" not in str(caught.value)


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
