"""Hostile formats, comparisons and copies: each is refused before it takes time or memory."""

from __future__ import annotations

import time

import pytest

from tests.fixtures.tokenizer_folders import write_kimi
from tests.unit.test_template_sandbox import END, LOOP, USER
from thalweg.errors import InvalidRequest
from thalweg.tokenizer import template_limits
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.load import load_tokenizer
from thalweg.tokenizer.template import ChatTemplate


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("kimi")))


BIG = "{% set b = 'a' * 4000000 %}"
TREES = (
    "{% set ns = namespace(x=['a'], y=['a'], z=('a',), w={'a': 1}) %}{% for i in range(64) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"
    "{% set ns.z = (ns.z, ns.z) %}{% set ns.w = {'a': ns.w, 'b': ns.w} %}{% endfor %}"
)
DEEP = "{% set ns = namespace(x=[0] * 90000) %}{% for i in range(200) %}{% set ns.x = [ns.x] %}{% endfor %}"
KEEPING = (
    "{% set ns = namespace(l=[]) %}{% set b = 'a' * 4000000 %}{% set q = [0] * 90000 %}{% for i in range(10000) %}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%1000000000d' % 1 }}",
        "{{ '%.1000000000f' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%-*s' % (-1000000000, 'a') }}",
        "{{ '%(a)1000000000s' % {'a': 1} }}",
        BIG + "{{ ('%(a)s' * 100) % {'a': b} }}",
        BIG + "{{ '%s%s%s' % (b,b,b) }}",
        BIG + "{{ ('%s' * 3) | format(b,b,b) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:.1000000000f}'.format(1.0) }}",
        "{{ '{:{w}}'.format(1, w=1000000000) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        BIG + "{{ ('{0}' * 100).format(b) }}",
        BIG + "{{ ('{a}' * 100).format_map({'a': b}) }}",
        BIG + "{{ (('{0}' * 100) | safe).format(b) }}",
        "{{ ('{:>1000000000}'|safe).format(1) }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'.rjust(1000000000) }}",
        "{{ 'a'.zfill(1000000000) }}",
        "{{ '\t'.expandtabs(1000000000) }}",
        "{{ '\t'.expandtabs(tabsize=1000000000) }}",
        "{{ ('a'|safe).center(1000000000) }}",
        "{{ 'a' | center(1000000000) }}",
        BIG + "{{ b.translate({97: b}) }}",
        BIG + "{{ b.translate('x'.maketrans({'a': b})) }}",
        BIG + "{{ b.replace('a', 'aa' * 100) }}",
        BIG + "{{ b | replace('a', 'aa' * 100) }}",
        BIG + "{{ b.replace('', b) }}",
        BIG + "{{ (b|safe).replace('a', 'aa' * 100) }}",
        BIG + "{{ b.join(['a', 'b', 'c', 'd']) }}",
        BIG + "{{ (b|safe).join(['a', 'b', 'c', 'd']) }}",
        BIG + "{{ b.join('abcdefg') }}",
        BIG + "{{ b | wordwrap(1, wrapstring=b) }}",
        BIG + "{{ b | wordwrap(1) }}",
        BIG + "{{ b | pprint }}",
        BIG + "{{ b | striptags }}",
        BIG + "{{ b|urlize }}",
        "{{ ('<!---->' * 500000) | striptags }}",
        "{{ [1] | batch(1000000000, 0) | list }}",
        "{{ [1] | slice(1000000000) | list }}",
        "{{ 2.5 | round(1000000000, 'ceil') }}",
        "{{ 1 | round(-1000000000) }}",
        "{{ ('f' * 4000000) | int(base=16) }}",
        BIG + "{{ b | sort }}",
        BIG + "{{ b|unique|list }}",
        BIG + "{{ b|map('upper')|list }}",
        BIG + "{{ b|list }}",
        BIG + "{{ b|max }}",
        "{{ range(100000) | map('string') | map('upper') | map('lower') | list }}",
        "{{ range(100000) | select('number') | select('odd') | list }}",
        "{{ range(100000) | map('string') | list | sum(start='') }}",
        "{{ ([[0]*1000]*90000) | sum(start=[]) }}",
        "{{ range(100000) | map('center', 1000) | join }}",
        "{{ [{'a': {'a': 1}}] | map(attribute='a.' * 4000000) | list }}",
        "{{ [{}] | sort(attribute='a.' * 4000000) }}",
        "{{ [{}] | join(',', attribute='a.' * 4000000) }}",
        "{{ [{}] | groupby('a.' * 4000000) }}",
        "{{ [{}] | selectattr('a.' * 4000000) | list }}",
        TREES + "{{ ns.x == ns.y }}",
        TREES + "{{ ns.w == {'a': 1} }}{{ ns.x != ns.y }}",
        TREES + "{{ ns.x in [ns.y] }}",
        TREES + "{{ ns.x is eq(ns.y) }}",
        TREES + "{{ ns.x is in([ns.y]) }}",
        TREES + "{{ [ns.x] | select('equalto', ns.y) | list }}",
        TREES + "{{ [ns.x, ns.y] | sort }}",
        TREES + "{{ [ns.x, ns.y]|reverse|sort }}",
        TREES + "{{ [ns.x, ns.y] | max }}",
        TREES + "{{ {ns.z: 1} }}",
        TREES + "{{ {}[ns.z] }}",
        TREES + "{{ {}.get(ns.z) }}",
        TREES + "{{ [ns.z] | unique | list }}",
        TREES + "{{ dict([(ns.z, 1)]) }}",
        TREES + "{{ [ns.y].index(ns.x) }}",
        TREES + "{{ [ns.y].count(ns.x) }}",
        TREES + "{{ [{'k': ns.x}, {'k': ns.y}] | groupby('k') }}",
        TREES + "{{ {'a': ns.x, 'b': ns.y} | dictsort(by='value') }}",
        TREES + "{% for q in [ns.x, ns.y] %}{{ loop.changed(q) }}{% endfor %}",
        TREES + "{{ ns.x | e }}",
        TREES + "{{ ns.x | forceescape }}",
        TREES + "{{ ns.x | pprint }}",
        TREES + "{{ {'a': ns.x} | xmlattr }}",
        TREES + "{{ ns.x | urlencode }}",
        TREES + "{{ ns.x | wordcount }}",
        TREES + "{{ ns.x is lower }}",
        TREES + "{{ '%s' % (ns.x,) }}",
        TREES + "{{ '%s' % ns.x }}",
        TREES + "{{ '{}'.format(ns.x) }}",
        TREES + "{{ '{!r}'.format(ns.x) }}",
        TREES + "{{ '{0[0]}'.format(ns.x) }}",
        TREES + "{{ ns.x | center(3) }}",
        TREES + "{{ ns.x | striptags }}",
        TREES + "{{ ns.x | indent }}",
        TREES + "{{ ns.x|safe }}",
        TREES + "{{ raise_exception(ns.x) }}",
        TREES + "{{ ns.w|string }}",
        TREES + "{{ ns.w|tojson(indent=2) }}",
        TREES + "{{ ns.x|title }}",
        TREES + "{{ ns.z|string }}",
        TREES + "{{ ns.w.items() }}",
        TREES + "{{ 'a' ~ ns.w }}",
        TREES + "{{ ns.x|truncate }}{{ ns.x|truncate(5) }}",
        TREES + "{{ ns.x|filesizeformat }}",
        DEEP + "{{ ns.x | tojson(indent=16) }}",
        DEEP + "{{ ns.x | pprint }}",
        "{{ lipsum(n=100000000) }}",
        "{{ lipsum(max=100000000, min=99999999) }}",
        "{{ 3 ** -(10**9) }}",
        "{{ (10**60) ** 60 }}",
        "{{ 'x' | map('center', 10**9) | list }}",
        "{% filter center(1000000000) %}x{% endfilter %}",
        "{% set x | center(1000000000) %}x{% endset %}",
        "{{ 'a' * 9000000 }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ (1,) * 10**9 }}",
        "{{ x | default('a' * 10**9) }}",
        KEEPING + "{% set ns.l = ns.l + [b[1:]] %}{% endfor %}",
        KEEPING + "{% set ns.l = ns.l + [b | upper] %}{% endfor %}",
        KEEPING + "{% set ns.l = ns.l + [q.copy()] %}{% endfor %}",
        "{% set ns = namespace(x=3) %}" + LOOP + "{% set ns.x = ns.x - (ns.x * -ns.x) %}" + END,
    ],
)
def test_formats_comparisons_and_copies_are_bounded(
    tokenizer: Tokenizer, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", 100_000)
    monkeypatch.setattr(template_limits, "MAX_ITEMS", 100_000)
    monkeypatch.setattr(template_limits, "MAX_WORK", 50_000_000)
    template = ChatTemplate(source, tokenizer)
    began = time.perf_counter()
    with pytest.raises(InvalidRequest, match="the chat template failed on these messages: it "):
        template.render(USER)
    assert time.perf_counter() - began < 3
