"""Calls as models get them wrong: still calls, with arguments that are JSON, and no marks for the client to see."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.server_double import ClientDouble
from tests.unit.test_server_parsers import PARSERS, arguments_of, call, marked, read
from tests.unit.test_server_tools import KIMI, added_up, ask
from thalweg.server.parsers.events import CallArguments, CallBegin, Content, Event, Reasoning
from thalweg.server.parsers.marks import MARK_OF

F, G = '{"name": "f", "arguments": {"a": "x"}}', '{"name": "g", "arguments": {}}'
FX = call(0, "f", '{"a": "x"}')
ARGS = '<|tool_call_argument_begin|>{"a": "x"}'


@pytest.mark.parametrize(
    ("block", "events"),
    [
        ('{"name": "f", "arguments": null}', call(0, "f", "{}")),
        ('{"name": "f"}', call(0, "f", "{}")),
        ('{"name": "f", "arguments": ""}', call(0, "f", "{}")),
        ('{"name": "f", "arguments": "{\\"a\\": \\"x\\"}"}', FX),
        ('{"arguments": {"a": "x"}, "name": "f"}', FX),
        ('{"name": "f", "parameters": {"a": "x"}}', FX),
        ('{"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}', FX),
        (F + "\n" + G, [*FX, *call(1, "g", "{}")]),
        (f"[{F}, {G}]", [*FX, *call(1, "g", "{}")]),
        (f"[\n{F},\n{G},\n]\n", [*FX, *call(1, "g", "{}")]),
        ('{"name": "g", "arguments": null}' + F, [*call(0, "g", "{}"), *call(1, "f", '{"a": "x"}')]),
        (F[:-1], FX),
        (F + "}", FX),
        (F[:-1] + ', "id": "{7}"}' + G, [*FX, *call(1, "g", "{}")]),
        ("{'name': 'f', 'arguments': {'a': 'x',},}", FX),
        ('{"name": "f", "arguments": {"a": "x",}}', FX),
        (f"Sure:\n{F}\nDone.", [Content("\nSure:"), *FX, Content("\nDone.")]),
    ],
)
@pytest.mark.parametrize("end", ["\n</tool_call>", "</tool_call></tool_call>"])
def test_hermes(block: str, events: list[Event], end: str) -> None:
    text = marked(f"<tool_call>\n{block}{end}")
    assert read("hermes", [text]) == read("hermes", list(text)) == events


@pytest.mark.parametrize("text", [f"<tool_call>{F}", f"<tool_call>{F}<tool_call>", f"<tool_call>{F[:-1]}"])
def test_hermes_without_the_end_of_the_call(text: str) -> None:
    assert read("hermes", [marked(text)]) == FX


F1, G1 = "<function=f>\n<parameter=b>\n3\n", "</function>\n"
THREE = call(0, "f", '{"b": 3}')


@pytest.mark.parametrize(
    ("text", "events"),
    [
        (f"<tool_call>\n{F1}{G1}</tool_call>", THREE),
        (f"<tool_call>\n{F1}</parameter>\n</tool_call>", THREE),
        (f"<tool_call>\n{F1}</tool_call>", THREE),
        (f"<tool_call>\n{F1}", THREE),
        (f"<tool_call>\n{F1}</param", THREE),
        (f"<tool_call>\n{F1}<parameter=a>\nx\n{G1}", call(0, "f", '{"b": 3, "a": "x"}')),
        (f"<tool_call>\n{F1}{G1}<function=g>\n{G1}</tool_call>", [*THREE, *call(1, "g", "{}")]),
        (f"<tool_call>\n{F1}<function=g>{G1}</tool_call>", [*THREE, *call(1, "g", "{}")]),
        (f"<tool_call>\n{F1}<tool_call><function=g></tool_call>", [*THREE, *call(1, "g", "{}")]),
        (f"<tool_call>{F1}</parameter></parameter>{G1}{G1}</tool_call>", THREE),
        (f"<tool_call>{F1}</parameter><parameter=b>4</parameter>{G1}</tool_call>", THREE),
        ("<tool_call><function=f><parameter=a>1 < 2</b></parameter>", call(0, "f", '{"a": "1 < 2</b>"}')),
        ("<tool_call><function=f><parameter=a>1 <b", call(0, "f", '{"a": "1 <b"}')),
        (f"<tool_call>So:\n{F1}{G1}</tool_call>", [Content("So:"), *THREE]),
    ],
)
def test_qwen3_coder(text: str, events: list[Event]) -> None:
    assert read("qwen3_coder", [marked(text)]) == read("qwen3_coder", list(marked(text))) == events


def test_qwen3_coder_streams_strings_as_they_come() -> None:
    parser = PARSERS["qwen3_coder"]()
    parser.feed(marked("<tool_call><function=f><parameter=a>"))
    pieces = ["\n", "\n", 'one "', "\n", "\n", "<", "b>", "\n", "</param"]
    given = ["".join(e.text for e in parser.feed(piece) if isinstance(e, CallArguments)) for piece in pieces]
    assert given == ["", "", '\\none \\"', "", "\\n", "", "\\n<b>", "", ""]
    assert [e for e in parser.feed("eter></function>") if isinstance(e, CallArguments)] == [
        CallArguments(0, '"'),
        CallArguments(0, "}"),
    ]


@pytest.mark.parametrize(
    ("text", "ids", "after"),
    [
        (f"<|tool_call_begin|>functions.f:3{ARGS}", ["functions.f:3"], ""),
        (f"<|tool_call_begin|> functions.f:3 \n{ARGS}}}}}\n Ok", ["functions.f:3"], "Ok"),
        (f"<|tool_call_begin|>f:3{ARGS}<|tool_call_end|>", ["functions.f:3"], ""),
        (f"<|tool_call_begin|>f{ARGS}<|tool_call_begin|>f{ARGS}", ["functions.f:0", "functions.f:1"], ""),
        ('<|tool_call_begin|>functions.f:3{"a": "x"}<|tool_call_end|>', ["functions.f:3"], ""),
        (f"<|tool_calls_section_begin|>functions.f:3{ARGS}<|tool_calls_section_end|>", ["functions.f:3"], ""),
        ('<|tool_call_begin|>f:3<|tool_call_argument_begin|> "{\\"a\\": \\"x\\"}"', ["functions.f:3"], ""),
        ("<|tool_call_begin|>f:3<|tool_call_argument_begin|> {'a': 'x',", ["functions.f:3"], ""),
    ],
)
def test_kimi_k2(text: str, ids: list[str], after: str) -> None:
    events = read("kimi_k2", [marked(text)])
    assert read("kimi_k2", list(marked(text))) == events
    assert [e.id for e in events if isinstance(e, CallBegin)] == ids
    assert list(map(json.loads, arguments_of(events))) == [{"a": "x"}] * len(ids)
    assert "".join(e.text for e in events if isinstance(e, Content)) == after


@pytest.mark.parametrize("rest", ["", " ", "null", "{", "{}", '""'])
@pytest.mark.parametrize("end", ["", "<|tool_call_end|>", "<|tool_calls_section_end|>"])
def test_kimi_k2_without_arguments(rest: str, end: str) -> None:
    text = marked(
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{rest}{end}"
    )
    assert read("kimi_k2", [text]) == call(0, "f", "{}", "functions.f:0")


def test_calls_within_reasoning() -> None:
    for after, events in (
        ("", []),
        ("</think>Ok.", [Content("Ok.")]),
        (" b</think>Ok.", [Reasoning("  b"), Content("Ok.")]),
    ):
        text = marked(f"<think>a <tool_call>{F}</tool_call>{after}")
        assert read("hermes", [text]) == read("hermes", list(text)) == [Reasoning("a"), *FX, *events]
    # What is no call is a thought; a thought's mark ends an open call, and is left out of arguments.
    assert read("hermes", [marked("<think>a <tool_call>b</tool_call></think>c")]) == [Reasoning("ab"), Content("c")]
    assert read("hermes", [marked(f"<think>a<tool_call>{F}</think>c")]) == [Reasoning("a"), *FX, Content("c")]
    within = F.replace("x", "x</think>y<think>z")
    assert read("hermes", [marked(f"<tool_call>{within}</tool_call>c")]) == [
        *call(0, "f", '{"a": "xyz"}'),
        Content("c"),
    ]


def divided(text: str) -> list[str]:
    return text.split("·")


PIECES = {
    "kimi_k2": divided(
        "<think>·Hm. ·</think>·Look.\n·<|tool_calls_section_begin|>·<|tool_call_begin|>·functions.f:0"
        '·<|tool_call_argument_begin|>·{"a": "x· y\\n·", ·"b": ·[1, tr·ue]·}·<|tool_call_end|>·<|tool_call_begin|>'
        "·functions.·g·:1·<|tool_call_argument_begin|>·{·}·<|tool_call_end|>·<|tool_calls_section_end|>· Done."
    ),
    "hermes": divided(
        '<think>·Hm. ·</think>·Look.\n·<tool_call>·\n{·"name": ·"f"·, ·"arguments": ·{·"a": ·"x\\·n"·, "b": ·1·2·}·}\n'
        '·</tool_call>·\n·<tool_call>·[{"arguments"·: null, "name": "g"·},· {"name": "h·", "arguments": {}·}]'
        "·</tool_call>·Done."
    ),
    "qwen3_coder": divided(
        "<think>·Hm. ·</think>·Look.\n·<tool_call>·\n·<function=f>·\n·<parameter=a>·\nx <y\n·</parameter>·\n"
        "·<parameter=b>·\n1·2\n·</parameter>·\n·</function>·\n·</tool_call>·\n·<tool_call>·<function=·g>·</function>"
        "·</tool_call>·Done."
    ),
}


@st.composite
def spoilt(draw: st.DrawFn, pieces: list[str]) -> str:
    """The pieces with some dropped, doubled or cut, and the end perhaps missing."""
    out = []
    for piece in pieces:
        kind = draw(st.sampled_from(["keep"] * 8 + ["drop", "double", "cut"]))
        if kind == "cut":
            piece = piece[: draw(st.integers(0, len(piece)))]
        out.append({"drop": "", "double": piece * 2}.get(kind, piece))
    return "".join(out[: draw(st.integers(len(out) // 2, len(out)))])


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data())
def test_spoilt_output_reads_the_same_in_any_pieces_and_gives_json(name: str, data: st.DataObject) -> None:
    text = marked(data.draw(spoilt(PIECES[name])))
    begun = data.draw(st.booleans())
    whole = read(name, [text], begun)
    assert read(name, list(text), begun) == whole
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6))), len(text)]
    assert read(name, [text[a:b] for a, b in itertools.pairwise(cuts)], begun) == whole
    for arguments in arguments_of(whole):
        assert isinstance(json.loads(arguments), dict)
    shown = "".join(e.id + e.name if isinstance(e, CallBegin) else e.text for e in whole)
    assert not set(shown) & set(MARK_OF.values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_over_http_a_stream_adds_up_to_the_whole(data: st.DataObject) -> None:
    answer = data.draw(spoilt(PIECES["kimi_k2"]))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        **data.draw(st.sampled_from([{}, {"stop": "k"}, {"max_tokens": 40}])),
    }
    whole = ask(ClientDouble(answer=answer, template=KIMI), body)["choices"][0]
    chunks = ask(ClientDouble(answer=answer, template=KIMI), {**body, "stream": True})
    message = whole["message"]
    assert added_up(chunks) == {**message, "content": message["content"] or None}
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    if whole["finish_reason"] != "length":
        assert whole["finish_reason"] == ("tool_calls" if message.get("tool_calls") else "stop")
