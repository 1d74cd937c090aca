"""Parsers of reasoning and tool calls: the same whatever the pieces; no exception and no marker."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thalweg.server.parsers import hermes, kimi_k2, qwen3_coder
from thalweg.server.parsers.calls import CallParser
from thalweg.server.parsers.events import CallArguments, CallBegin, Content, Event, Reasoning
from thalweg.server.parsers.marks import MARK_OF, Spelled
from thalweg.server.parsers.reader import Reader
from thalweg.server.parsers.thinking import Thinking

SCHEMAS = {"f": {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}}


def ids() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"call_{next(numbers)}"


PARSERS: dict[str, Callable[[], CallParser]] = {
    "kimi_k2": lambda: kimi_k2.KimiK2(ids()),
    "hermes": lambda: hermes.Hermes(ids()),
    "qwen3_coder": lambda: qwen3_coder.Qwen3Coder(ids(), SCHEMAS),
}


def marked(text: str) -> str:
    for marker, mark in MARK_OF.items():
        text = text.replace(marker, mark)
    return text


def read(name: str, pieces: list[str], begun: bool = False) -> list[Event]:
    """The events of all pieces, those that are more of the same joined."""
    reader = Reader(Thinking(begun), PARSERS[name]())
    events = [e for piece in pieces for e in reader.feed(piece)] + reader.feed("", last=True)
    joined: list[Event] = []
    for e in events:
        last = joined[-1] if joined else None
        if isinstance(e, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + e.text)
        elif isinstance(e, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + e.text)
        elif isinstance(e, CallArguments) and isinstance(last, CallArguments):
            joined[-1] = CallArguments(e.index, last.text + e.text)
        else:
            joined.append(e)
    return joined


def call(index: int, name: str, arguments: str, call_id: str | None = None) -> list[Event]:
    return [CallBegin(index, call_id or f"call_{index}", name), CallArguments(index, arguments)]


def arguments_of(events: list[Event]) -> list[str]:
    """Of each call in order."""
    begun = [e.index for e in events if isinstance(e, CallBegin)]
    assert begun == list(range(len(begun)))
    pieces = [(e.index, e.text) for e in events if isinstance(e, CallArguments)]
    return ["".join(text for index, text in pieces if index == i) for i in begun]


KIMI = (
    "<think> Hm.\n</think>\n\nLet me look.\n<|tool_calls_section_begin|>"
    '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "a}\\"{模"}\n<|tool_call_end|>'
    '<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{"a": {"b": [1, {}]}}<|tool_call_end|>'
    "<|tool_call_begin|>functions.none:2<|tool_call_argument_begin|><|tool_call_end|>"
    "<|tool_calls_section_end|>"
)
HERMES = (
    'Ok.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "a}\\"{模"}}\n</tool_call>\n'
    '<tool_call>{"arguments": {"x": 1.50}, "name": "f"}</tool_call>\n'
    '<tool_call>{"name": "g", "arguments": "{\\"y\\": []}"}</tool_call>\nDone.'
)
CODER = (
    "<tool_call>\n<function=f>\n<parameter=a>\n12\n\nx < y\n</parameter>\n<parameter=b>\n12\n</parameter>\n"
    "<parameter=c>\n[1, null]\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=g>\n</function>\n</tool_call>"
)


def test_kimi_k2() -> None:
    assert read("kimi_k2", [marked(KIMI)]) == [
        Reasoning("Hm."),
        Content("Let me look."),
        *call(0, "get_weather", '{"city": "a}\\"{模"}', "functions.get_weather:0"),
        *call(1, "now", '{"a": {"b": [1, {}]}}', "functions.now:1"),
        *call(2, "none", "{}", "functions.none:2"),
    ]


def test_hermes() -> None:
    assert read("hermes", [marked(HERMES)]) == [
        Content("Ok."),
        *call(0, "get_weather", '{"city": "a}\\"{模"}'),
        *call(1, "f", '{"x": 1.5}'),
        *call(2, "g", '{"y": []}'),
        Content("\nDone."),
    ]


def test_calls_that_a_model_gave_one_id_have_ids_of_their_own() -> None:
    written = '<|tool_call_begin|>functions.f:7<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'
    events = read("kimi_k2", [marked(written * 2)])
    assert [e.id for e in events if isinstance(e, CallBegin)] == ["functions.f:7", "functions.f:8"]


def test_qwen3_coder() -> None:
    assert read("qwen3_coder", [marked(CODER)]) == [
        *call(0, "f", '{"a": "12\\n\\nx < y", "b": 12, "c": [1, null]}'),
        *call(1, "g", "{}"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("kimi_k2", "<|tool_call_begin|>f<|tool_call_end|> b", "f b"),
        ("kimi_k2", "<|tool_calls_section_begin|> Hello.<|tool_calls_section_end|>", " Hello."),
        ("kimi_k2", '<|tool_call_begin|>two words<|tool_call_argument_begin|>{"a": 1}', 'two words{"a": 1}'),
        ("kimi_k2", "<|tool_call_begin|>f<|tool_call_argument_begin|>[1]<|tool_call_end|>", "f[1]"),
        ("kimi_k2", "<|tool_call_begin|>functions.f", "functions.f"),
        ("kimi_k2", "a<|tool_calls_section_end|><|tool_call_end|>b </think>", "ab "),
        ("hermes", "<tool_call>not JSON</tool_call>", "not JSON"),
        ("hermes", '<tool_call>{"name": "get_wea', '{"name": "get_wea'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', '{"name": 3, "arguments": {}}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": [1]}'),
        ("hermes", "<tool_call>" + "[" * 10_000 + "</tool_call>", "[" * 10_000),
        ("qwen3_coder", "<tool_call>\nf(1)\n</tool_call>", "\nf(1)"),
        ("qwen3_coder", "<tool_call>a</function><parameter=x>b</tool_call>", "a</function><parameter=x>b"),
        ("hermes", " a \n", " a \n"),
    ],
)
def test_what_is_no_call_is_content(name: str, text: str, content: str) -> None:
    assert "".join(e.text for e in read(name, [marked(text)]) if isinstance(e, Content)).rstrip() == content.rstrip()
    assert not any(isinstance(e, CallBegin) for e in read(name, [marked(text)]))


def test_reasoning_that_the_prompt_began() -> None:
    assert read("hermes", [marked("\nso\n\nso </think>\n\n 4")], begun=True) == [Reasoning("so\n\nso"), Content("4")]
    assert read("hermes", ["so"], begun=True) == [Reasoning("so")]
    cut = read(
        "kimi_k2", [marked("so <|tool_calls_section_begin|><|tool_call_begin|>f<|tool_call_argument_begin|>{")], True
    )
    assert cut == [Reasoning("so"), *call(0, "f", "{}", "functions.f:0")]


FRAGMENTS = [*MARK_OF.values(), *'{}[]"\\:, \n', "functions.f:0", '{"name": "f", "arguments": ', '{"a": 1}', "é模"]
FRAGMENTS += ["<function=f>", "<parameter=a>", "</parameter>", "</function>", "true", "x"]


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join), st.booleans(), st.data())
@example(marked(KIMI), False, None)
@example(marked(HERMES), False, None)
@example(marked(CODER), False, None)
def test_any_split_gives_the_same_and_no_marker_leaks(name: str, text: str, begun: bool, data: st.DataObject) -> None:
    whole = read(name, [text], begun)
    assert read(name, list(text), begun) == whole
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert read(name, pieces, begun) == whole
    for event in whole:
        shown = event.name + event.id if isinstance(event, CallBegin) else event.text
        assert not set(shown) & set(MARK_OF.values())
    for arguments in arguments_of(whole):
        assert isinstance(json.loads(arguments), dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=6), JSON, max_size=4), st.booleans(), st.sampled_from([None, 1]))
def test_arguments_are_what_the_model_wrote(arguments: dict[str, object], ascii_only: bool, indent: int | None) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    head, end = marked("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"), marked("<|tool_call_end|>")
    assert read("kimi_k2", list(head + written + end)) == call(0, "f", written, "functions.f:0")
    head, end = marked('<tool_call>\n{"name": "f", "arguments": '), marked("}\n</tool_call>")
    assert read("hermes", list(head + written + end)) == call(0, "f", written)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<", "<tool", "_call>", "a", "</"]), max_size=12))
def test_spelled_markers_are_found_in_any_pieces(fragments: list[str]) -> None:
    text = "".join(fragments)
    markers = ("<tool_call>", "</tool_call>")
    for pieces in (fragments, list(text)):
        spelled = Spelled(markers)
        got = "".join(map(spelled.feed, pieces)) + spelled.end()
        assert got == text.replace(markers[0], MARK_OF[markers[0]]).replace(markers[1], MARK_OF[markers[1]])
