"""Hostile chat templates: no way out through attributes, and no way to use up time or memory."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from tests.fixtures.tokenizer_folders import write_kimi
from thalweg.errors import CheckpointError, InvalidRequest
from thalweg.tokenizer import template_limits
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.load import load_tokenizer
from thalweg.tokenizer.template import ChatTemplate

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("kimi")))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ range.__globals__['time'] }}",
        "{{ range.__code__ }}",
        "{{ self.__init__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ dict.fromkeys('ab') }}",
        "{% for x in [1] %}{{ loop._iterable }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m._func }}",
        "{{ [messages] | map(attribute='__class__') | list }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{{ messages | selectattr('__class__') | list }}",
        "{{ messages | sort(attribute='__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{a.__class__}'.format_map({'a': ''}) }}",
        "{{ 'x'.encode() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ (1).to_bytes(10, 'big') }}",
        "{{ '{0.append}'.format(messages) }}",
        "{{ '{}'.format.__globals__ }}",
        "{{ 'x' | attr('__cla' ~ 'ss__') }}",
        "{{ [''] | map('attr', '__class__') | list }}",
        "{{ ('<' | e).__class__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ (messages | map('upper')).gi_frame }}",
    ],
)
def test_no_way_out_through_attributes(tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template is not safe to run: ") as caught:
        ChatTemplate(source, tokenizer).render(USER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% from 'os' import path %}",
        "{% extends 'x' %}",
        "{% autoescape true %}{{ 1 }}{% endautoescape %}",
        "{{ '' | attr('__class__') }}",
    ],
)
def test_what_chat_does_not_need_is_absent(tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template does not compile"):
        ChatTemplate(source, tokenizer)


LOOP = "{% for i in range(100000) %}"
END = "{% endfor %}"
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(64) %}"
TREE = "{% set ns = namespace(x=['a']) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        LOOP * 3 + END * 3,
        LOOP + "{% for j in messages * 100 %}{% endfor %}" + END,
        LOOP + LOOP + "{{ loop.length }}{% continue %}" + END + END,
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [0] * 10**9 }}",
        "{{ 2 ** (10**9) }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% set ns = namespace(x=3) %}" + LOOP + "{% set ns.x = ns.x * ns.x %}" + END,
        DOUBLING + "{% set ns.x = ns.x ~ ns.x %}" + END,
        DOUBLING + "{% set ns.x = ns.x + ns.x %}" + END,
        DOUBLING + "{% set ns.x = ns.x | replace('a', 'aa') %}" + END,
        DOUBLING + "{% set ns.x = ns.x.replace('a', 'aa') %}" + END,
        DOUBLING + "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}" + END,
        DOUBLING + "{% set ns.x = ns.x.join([ns.x, ns.x]) %}" + END,
        DOUBLING + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}" + END,
        DOUBLING + "{% set ns.x = ([ns.x] + [ns.x]) | string %}" + END,
        "{% set x = 'a' * 4000000 %}{{ x | indent(10**9) }}",
        "{% set x = '\n' * 4000000 %}{{ x | indent(16, blank=true, first=true) }}",
        "{% set x = 'a' * 4000000 %}{{ x }}{{ x }}{{ x }}",
        "{% set x = 'a' * 4000000 %}{% for i in range(1000) %}{% set l = x | list %}{% endfor %}",
        "{% set x = 'a' * 4000000 %}{% for i in range(1000) %}{% set l = x.split('b') %}{% endfor %}",
        LOOP + "aaaaaaaaaa" * 100 + END,
        TREE + "{{ ns.x }}",
        TREE + "{{ ns.x | tojson }}",
        TREE + "{{ ns.x | string }}",
        TREE + "{{ ns.x | upper }}",
        TREE + "{{ ns.x | trim }}",
        TREE + "{{ ns.x ~ '' }}",
        TREE + "{{ ns.x | join }}",
        TREE + "{{ ns.x | replace('a', 'b') }}",
        TREE + "{{ ns }}",
        TREE + "{{ {'k': ns.x}.items() }}",
        "{{ {} | tojson(indent=10**9) }}",
        "{{ [1, 2] | tojson(separators=('a' * 100000, 'b')) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ strftime_now('%-1000000000d') }}",
        "{{ strftime_now('%_9999999999Y') }}",
        "{% macro m(n) %}{{ m(n - 1) }}{{ m(n - 1) }}{% endmacro %}{{ m(10) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for x in [[[]]] recursive %}{{ loop([x]) }}{% endfor %}",
    ],
)
def test_no_way_to_use_up_time_or_memory(tokenizer: Tokenizer, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tenth of the real limits, so that reaching them takes a test little time.
    monkeypatch.setattr(template_limits, "MAX_STEPS", 100_000)
    monkeypatch.setattr(template_limits, "MAX_ITEMS", 100_000)
    monkeypatch.setattr(template_limits, "MAX_WORK", 50_000_000)
    template = ChatTemplate(source, tokenizer)
    if LOOP not in source and "macro" not in source:  # tracing makes every allocation slow
        tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(InvalidRequest, match="the chat template failed on these messages: ") as caught:
            template.render(USER)
        if tracemalloc.is_tracing():
            assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 3
    assert "\n" not in str(caught.value)


def test_steps_are_bounded_as_shipped(tokenizer: Tokenizer) -> None:
    began = time.perf_counter()
    with pytest.raises(InvalidRequest, match="it takes more than"):
        ChatTemplate(LOOP * 3 + END * 3, tokenizer).render(USER)
    assert time.perf_counter() - began < template_limits.MAX_SECONDS + 2


def test_time_is_bounded_where_steps_are_not(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    template = ChatTemplate("{% set x = range(100000) | list %}" + LOOP + "{% set y = x | sort %}" + END, tokenizer)
    began = time.perf_counter()
    with pytest.raises(InvalidRequest, match=r"more than 0\.05 seconds"):
        template.render(USER)
    assert time.perf_counter() - began < 2


def test_one_render_does_not_use_the_next_ones_budget(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(LOOP + END + "done", tokenizer)
    monkeypatch.setattr(template_limits, "MAX_STEPS", 150_000)
    for _ in range(2):
        assert template.render(USER) == "done"


def test_a_long_conversation_is_within_the_limits(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim }}\n{% endfor %}"
    messages = [{"role": "user", "content": "word " * 1000}] * 1000
    assert len(ChatTemplate(source, tokenizer).render(messages)) == 1000 * 5006
