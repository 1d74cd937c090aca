"""What templates see of a conversation: content in the form they take, arguments, and a last message left open."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fixtures.tokenizer_folders import write_kimi
from tests.unit.test_template_render import USER, render
from thalweg.errors import InvalidRequest
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.load import load_tokenizer
from thalweg.tokenizer.template import ChatTemplate


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("kimi")))


def test_content_may_be_text_null_or_parts(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": ""},
        {"role": "user", "content": []},
        {"role": "assistant"},
    ]
    assert render(tokenizer, source, messages) == "[one \ntwo][][][][]"


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


def test_a_key_that_is_null_is_no_key(tokenizer: Tokenizer) -> None:
    source = (
        "{% set m = messages[1] %}{% for k in ['reasoning_content', 'tool_calls', 'name', 'refusal'] %}"
        "{{ k in m }}{{ m[k] is defined }}{% endfor %}{{ m.get('reasoning_content', '') }}"
    )
    nulls = {"reasoning_content": None, "tool_calls": None, "name": None, "refusal": None}
    for given in (nulls, nulls | {"tool_calls": []}):
        assert render(tokenizer, source, [*USER, {"role": "assistant", "content": "x", **given}]) == "FalseFalse" * 4


def test_reasoning_goes_by_both_its_names(tokenizer: Tokenizer) -> None:
    for name in ("reasoning", "reasoning_content"):
        message = {"role": "assistant", "content": "x", name: "why"}
        assert render(tokenizer, "{{ messages[1].reasoning_content }}", [*USER, message]) == "why"


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


LOOPS = "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %};{% endfor %}"
ASKS = (
    "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}({{ p['text'] }}){% endfor %}{% endif %}"
    "{% endmacro %}{% for m in messages %}{% set c = m['content'] %}{{ show(c) }};{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ m.content | trim }};{% endfor %}", "hello;one\ntwo;;"),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %};{% endfor %}",
            "hello;one\ntwo;;",
        ),
        (LOOPS, "(hello);(one)(two);;"),
        ("{% for m in messages %}{{ m.content | map(attribute='text') | join('+') }};{% endfor %}", "hello;one+two;;"),
        ("{% for m in messages %}{{ m.content[0].text if m.content }};{% endfor %}", "hello;one;;"),
        (
            (
                "{% for m in messages %}{% for p in m.get('content') | selectattr('type', 'equalto', 'text') %}"
                "{{ p.text }}+{% endfor %};{% endfor %}"
            ),
            "hello+;one+two+;;",
        ),
        (ASKS, "hello;(one)(two);;"),
        # What is looped over is no content here.
        (
            "{% for m in messages %}{% for line in m.content.split('\n') %}{{ line }}/{% endfor %};{% endfor %}",
            "hello/;one/two/;/;",
        ),
    ],
)
def test_content_comes_as_the_template_takes_it(tokenizer: Tokenizer, source: str, text: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [*USER, {"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": []}]
    assert render(tokenizer, source, messages) == text


def test_parts_of_a_final_message_are_left_open(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "is"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    for content, text in ((parts, "(hello);(It )(is"), ("It is", "(hello);(It is"), (None, "(hello);(")):
        assert render(tokenizer, LOOPS, [*USER, {"role": "assistant", "content": content}], **options) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ c['name'] + '|' + c['arguments'] + '|' }}", 'f|{"a":1,"strip":"<é>"}|'),
        ("{{ c.arguments ~ '' }}{% set x = c.arguments %}{{ x }}", '{"a":1,"strip":"<é>"}' * 2),
        ("{{ c.arguments | string | trim | replace('{', '[') }}", '["a":1,"strip":"<é>"}'),
        (
            "{{ [c.arguments, 1] | join('|') }}{{ '%s' % (c.arguments,) }}",
            '{"a":1,"strip":"<é>"}|1{"a":1,"strip":"<é>"}',
        ),
        ("{{ '{}'.format(c.arguments) }}{{ c.arguments.lstrip('{') }}", '{"a":1,"strip":"<é>"}"a":1,"strip":"<é>"}'),
        ("{{ c.arguments[1:-1] }}", '"a":1,"strip":"<é>"'),
        ("{{ c.arguments | tojson }}", '{"a": 1, "strip": "<é>"}'),
        ("{{ c | tojson }}", '{"name": "f", "arguments": {"a": 1, "strip": "<é>"}}'),
        ("{% for k, v in c.arguments | items %}{{ k }}={{ v }};{% endfor %}", "a=1;strip=<é>;"),
        ("{% for k, v in c.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "a=1;strip=<é>;"),
        ("{% for k in c.arguments %}{{ k }}={{ c.arguments[k] }};{% endfor %}", "a=1;strip=<é>;"),
        ("{{ c.arguments.a }}{{ c.arguments.strip }}{{ c.arguments | length }}{{ 'a' in c.arguments }}", "1<é>2True"),
        ("{% if c.arguments is mapping %}{{ c.arguments | tojson }}{% endif %}", '{"a": 1, "strip": "<é>"}'),
        (
            "{% set a = c.arguments %}{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}",
            '{"a":1,"strip":"<é>"}',
        ),
        (
            "{% set a = c.arguments %}{% if a is string %}{{ a }}{% else %}{{ a.items() | list }}{% endif %}",
            "[('a', 1), ('strip', '<é>')]",
        ),
    ],
)
def test_arguments_are_an_object_or_its_text_as_the_template_wants_them(
    tokenizer: Tokenizer, source: str, text: str
) -> None:
    source = "{% set c = messages[1].tool_calls[0].function %}" + source
    given = '{"a":1,"strip":"<é>"}'

    def rendered(arguments: Any) -> str:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return render(tokenizer, source, [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}])

    assert rendered(given) == text
    # An object in place of its text is written the way json.dumps does.
    assert rendered(json.loads(given)) in (text, text.replace('":', '": ').replace(",", ", "))


@pytest.mark.parametrize(("given", "text"), [("", "{}"), (None, "{}"), ("{", "{"), ("[1]", "[1]"), (" {} ", " {} ")])
def test_arguments_that_are_no_object_stay_what_they_are(tokenizer: Tokenizer, given: Any, text: str) -> None:
    source = "{{ messages[1].tool_calls[0].function.arguments ~ '' }}"
    call = {"function": {"name": "f", "arguments": given}}
    assert render(tokenizer, source, [*USER, {"role": "assistant", "tool_calls": [call]}]) == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages is a str; expected a list"),
        (["hi"], r"messages\[0\] is a str; expected an object"),
        ([{"content": "x"}], r"messages\[0\]\.role is None; expected one of system"),
        ([*USER, {"role": "im_end|><|im_system", "content": "x"}], r"messages\[1\]\.role is"),
        ([{"role": ["user"]}], r"messages\[0\]\.role is"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content is of type int; expected a string, null or"),
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
