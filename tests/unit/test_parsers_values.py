"""Arguments as models write them, to JSON: what is JSON stays as it is, the rest becomes it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_server_parsers import JSON, ids, marked
from thalweg.server.json_schema.document import Document
from thalweg.server.parsers.coerce import coerce
from thalweg.server.parsers.events import CallArguments
from thalweg.server.parsers.objects import MAX_DEPTH, ObjectWriter, read_object, to_json
from thalweg.server.parsers.qwen3_coder import Qwen3Coder


def written(text: str, pieces: list[str] | None = None) -> str:
    writer = ObjectWriter()
    return "".join(writer.feed(piece)[0] for piece in pieces or [text]) + writer.end()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.text(max_size=6), JSON, max_size=4), st.booleans(), st.sampled_from([None, 0, "\t"]), st.data()
)
def test_json_comes_out_as_it_is_and_at_any_cut_what_came_can_be_completed(
    value: dict[str, Any], ascii_only: bool, indent: int | str | None, data: st.DataObject
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    writer = ObjectWriter()
    assert writer.feed(text + "} more") == (text, len(text))
    assert writer.done
    cut = text[: data.draw(st.integers(1, len(text)))]
    writer = ObjectWriter()
    shown, _ = writer.feed(cut)
    assert text.startswith(shown)  # what was shown is not taken back
    assert isinstance(json.loads(shown + writer.end()), dict)


SCRAPS = [
    *"{}[]\"',: \n\t\\/0",
    "\\u",
    "d83d",
    "\\udc00",
    "tru",
    "e",
    "None",
    "-1.",
    "e5",
    "NaN",
    "1e999",
    "é模",
    '"a": ',
    "\x00",
]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(SCRAPS), max_size=25).map(lambda scraps: "{" + "".join(scraps)), st.data())
def test_any_text_becomes_an_object_the_same_in_any_pieces(text: str, data: st.DataObject) -> None:
    whole = written(text)
    assert isinstance(json.loads(whole), dict)
    whole.encode()
    assert written(text, list(text)) == whole
    cut = data.draw(st.integers(0, len(text)))
    assert written(text, [text[:cut], text[cut:]]) == whole
    assert json.loads(to_json(json.loads(whole))) == json.loads(whole)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1, }', {"a": 1}),
        ('{"a": [1, 2,]}', {"a": [1, 2]}),
        ('{"a": "x\ny\t\x00"}', {"a": "x\ny\t\x00"}),
        ("{'a': 'it\\'s', 'b': 'it's', 'c': '\"'}", {"a": "it's", "b": "it's", "c": '"'}),
        ('{"a": "say "hi" now", "b": 2}', {"a": 'say "hi" now', "b": 2}),
        ('{"a": "\\d+\\u12\\\n"}', {"a": "\\d+\\u12\\\n"}),
        ('{"a": "\\ud83d\\ude00\\ud83d\\udc00 \\ude00"}', {"a": "\U0001f600\U0001f400 \ufffd"}),
        ('{"a": "\\ud83dx", "b": "\\ud83d"}', {"a": "\ufffdx", "b": "\ufffd"}),
        ('{"a": True, "b": None, "c": NaN, "d": undefined}', {"a": True, "b": None, "c": None, "d": None}),
        ("{a: hello world, b: 0x1F}", {"a": "hello world", "b": "0x1F"}),
        ('{"a": , "b": }', {"a": None, "b": None}),
        ('{"a": "x"\n"b": [1\n2]}', {"a": "x", "b": [1, 2]}),
        ('{"a": [1, {"b": "c"}', {"a": [1, {"b": "c"}]}),
        ('{"a": [{"b": 1]', {"a": [{"b": 1}]}),
        ('{"a": 1, "b": tr', {"a": 1}),
        ('{"a": 1, "b": -', {"a": 1}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": 1, "b": "c\\', {"a": 1, "b": "c"}),
        ('{"a": ' + "9" * 5000 + ', "b": 1e999}', {"a": "9" * 5000, "b": "1e999"}),
        ('{"a": ' + "[" * (MAX_DEPTH + 5), None),
    ],
)
def test_what_is_nearly_json_is_mended(text: str, value: Any) -> None:
    got = json.loads(written(text))
    assert value is None or got == value


@pytest.mark.parametrize(
    ("head", "flood"), [('{"a": ', " "), ('{"a": ""', "\n"), ('{"a": ', "x"), ("{", " "), ('{"a', "x")]
)
def test_a_model_that_repeats_itself_costs_the_same_for_each_character(head: str, flood: str) -> None:
    writer = ObjectWriter()
    writer.feed(head)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            writer.feed(flood)
        return time.perf_counter() - began

    early = min(seconds(2000) for _ in range(5))
    seconds(300_000)
    late = min(seconds(2000) for _ in range(5))
    assert late < 3 * early + 0.01


def test_objects_that_follow_one_another_are_read_in_linear_time() -> None:
    text, at = "{}" * 50_000, 0
    while at < len(text):
        _, at, complete = read_object(text, at)
        assert complete


NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ROOT = {
    "$defs": {
        "n": {"type": ["integer", "null"], "$anchor": "count"},
        "of text": {"type": "string"},
        "loop": {"$ref": "#/$defs/loop"},
    }
}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": ["string"]}, "null", "null"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "1"}, "1", "1"),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, "1", "1"),
        (NULLABLE, "null", None),
        (NULLABLE, "None", None),
        (NULLABLE, "12", "12"),
        (NULLABLE, "x\ny", "x\ny"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, " +12 ", 12),
        ({"type": "integer"}, "12.0", 12),
        ({"type": "integer"}, '"12"', 12),
        ({"type": "integer"}, "twelve", "twelve"),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"$ref": "#/$defs/n"}, "007", 7),
        ({"$ref": "#count"}, "007", 7),
        ({"$ref": "#/$defs/of%20text"}, "007", "007"),
        ({"$ref": "#/$defs/n"}, "None", None),
        ({"$ref": "#/$defs/loop"}, "1", 1),
        ({"enum": [1, None]}, "1", 1),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, "2", 2),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "FALSE", False),
        ({"type": "boolean"}, '"false"', False),
        ({"type": "null"}, "None", None),
        ({"type": "object"}, "{'a': True, 'b': [None,]}", {"a": True, "b": [None]}),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"type": "array"}, "['a', 1]", ["a", 1]),
        ({"oneOf": [{"type": "array"}, {"type": "string"}]}, "[1, 2]", [1, 2]),
        ({"oneOf": [{"type": "array"}, {"type": "string"}]}, "a, b", "a, b"),
        (None, "12", 12),
        (None, "[1, null]", [1, None]),
        (None, "None", "None"),
        ({}, "text", "text"),
        (True, "[" * 5000, "[" * 5000),
        ({"type": 7, "anyOf": {}, "$ref": "other.json"}, "x", "x"),
    ],
)
def test_values_have_the_type_that_the_schema_wants(schema: Any, text: str, value: Any) -> None:
    got = coerce(text, schema, Document(ROOT))
    assert (got, type(got)) == (value, type(value))
    assert json.loads(to_json(got)) == got


def test_schemas_of_odd_shapes_and_parameters_that_they_do_not_have() -> None:
    text = marked("<tool_call><function=f><parameter=a>1</parameter><parameter=b>\\ud800</parameter></function>")
    for schema in ({}, {"properties": []}, {"properties": {"a": None, "b": {"type": "object"}}}):
        events = Qwen3Coder(ids(), {"f": schema}).feed(text)
        arguments = "".join(e.text for e in events if isinstance(e, CallArguments))
        assert json.loads(arguments) == {"a": 1, "b": "\\ud800"}


def test_halves_of_surrogate_pairs_stay_escaped() -> None:
    text = marked('<tool_call><function=f><parameter=a>["\\ud800"]</parameter></function></tool_call>')
    events = Qwen3Coder(ids(), {}).feed(text)
    "".join(e.text for e in events if isinstance(e, CallArguments)).encode()
