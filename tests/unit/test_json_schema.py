"""JSON schemas as generators write them: what is made of them compiles, and allows nothing that they do not."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress
from typing import Any

import pytest

from tests.fixtures.tokenizer_folders import kimi_config, write_kimi
from tests.unit.json_schemas import KEPT, NUMBER, REFUSED, STRING, closed
from tests.unit.schema_checker import valid
from thalweg.core import Grammar
from thalweg.sampling.grammars import Grammars
from thalweg.server.json_schema import RefusedError, lenient, strict
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("kimi"), kimi_config()))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(lambda: (tokenizer, tokenizer.vocab_size, frozenset({tokenizer.eos_id or 0})))


def drawn(grammars: Grammars, tokenizer: Tokenizer, schema: Any, seed: int, limit: int = 600) -> Any:
    """A value that the schema's grammar allows, drawn by chance; None if it has not ended within the limit."""
    matcher, choice = grammars.matcher(Grammar("json_schema", json.dumps(schema))), random.Random(seed)
    ids: list[int] = []
    while len(ids) < limit:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        assert not matcher.is_error(), matcher.get_error()
        allowed = [i for i in range(tokenizer.vocab_size) if mask >> i & 1]
        ends = [i for i in allowed if (i < 256 and chr(i) in '"}],') or i == tokenizer.eos_id]
        token = choice.choice(ends if ends and choice.random() < 0.4 else allowed)
        if token == tokenizer.eos_id:
            return json.loads(tokenizer.decode(ids))
        matcher.consume_token(token)
        ids.append(token)
    return None


@pytest.mark.filterwarnings("ignore:Possible :FutureWarning")  # Python's, of a class for JavaScript
@pytest.mark.parametrize("schema", KEPT.values(), ids=KEPT)
def test_what_is_kept_allows_nothing_else(grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    prepared = strict(schema, "response_format.json_schema.schema")
    values = [drawn(grammars, tokenizer, prepared, seed) for seed in range(12)]
    ended = [value for value in values if value is not None or valid(None, schema)]
    assert ended
    for value in ended:
        assert valid(value, schema), value
    assert [drawn(grammars, tokenizer, lenient(schema), seed) for seed in range(2)]


@pytest.mark.parametrize(("schema", "path"), REFUSED, ids=[f"{i}-{path}" for i, (_, path) in enumerate(REFUSED)])
def test_what_cannot_be_kept_is_named_with_its_path_and_dropped_from_tools(
    grammars: Grammars, schema: dict[str, Any], path: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        strict(schema, "response_format.json_schema.schema")
    assert str(refused.value).startswith(f"response_format.json_schema.schema.{path}: ")
    for inner in ("start:", "(And", "SearchRegex", "\n"):
        assert inner not in str(refused.value)
    grammars.matcher(Grammar("json_schema", json.dumps(lenient({"type": "object", **schema}))))


def test_a_tools_other_keywords_stay_when_one_is_dropped() -> None:
    schema = closed(
        {"a": {"type": "string", "pattern": "^(?!x)", "maxLength": 3}, "b": {"type": "any"}}, required=["a"]
    )
    assert lenient(schema) == closed({"a": {"type": "string", "maxLength": 3}, "b": {}}, required=["a"]) | {}
    assert lenient({"type": "object", "allOf": [{"type": "string"}]}) == {"type": "object"}


def test_annotations_of_every_kind_change_nothing() -> None:
    notes: dict[str, Any] = dict.fromkeys(
        (
            "title",
            "description",
            "$comment",
            "format",
            "x-order",
            "markdownDescription",
            "$schema",
            "javaType",
            "group",
        ),
        "x",
    )
    notes |= {"default": {"a": 1}, "examples": [1], "example": 2, "readOnly": True, "deprecated": True, "xml": {}}
    notes |= {"contentEncoding": "base64", "contentMediaType": "image/png", "nullable": True, "uniqueItems": False}
    schema = {"type": "object", "properties": {"a": STRING, "b": {"anyOf": [NUMBER, {"type": "null"}]}}}
    noted = {
        "type": "object",
        "properties": {"a": {**STRING, **notes}, "b": {"anyOf": [{**NUMBER, **notes}, {"type": "null"}], **notes}},
        **notes,
    }
    assert strict(noted, "x") == strict(schema, "x")


@pytest.mark.parametrize(
    "schema",
    [
        {
            "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)} | {"d3000": NUMBER},
            "$ref": "#/$defs/d0",
        },
        {"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(3000)}, "$ref": "#/$defs/d0"},
        {"oneOf": [{"type": "object", "required": [f"k{i}"]} for i in range(4000)]},
        {"properties": {f"p{i}": {"type": "string", "pattern": f"^(a{i}|b){{1,9}}$"} for i in range(2000)}},
        {"type": "array", "items": {"enum": list(range(20_000))}, "uniqueItems": True},
        {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
        {"allOf": [{"anyOf": [{"properties": {f"k{i}": {"const": j}}} for j in range(3)]} for i in range(12)]},
        {"minProperties": 10**12, "maxLength": 10**12, "items": {"minItems": 10**9}},
    ],
    ids=range(8),
)
def test_schemas_that_cost_are_bounded(schema: dict[str, Any]) -> None:
    began = time.monotonic()
    with suppress(RefusedError):
        strict(schema, "json_schema")
    lenient({"type": "object", **schema})
    assert time.monotonic() - began < 15


def test_schemas_of_nonsense_raise_nothing_else() -> None:
    choice = random.Random(0)
    keywords = sorted({key for schema in [*KEPT.values(), *(s for s, _ in REFUSED)] for key in schema})
    values: list[Any] = [
        None,
        True,
        False,
        0,
        -1,
        1.5,
        "",
        "a",
        "#",
        "#/x",
        [],
        ["a"],
        [1, {}],
        {},
        {"a": 1},
        {"a": {}},
        [[]],
        {"$ref": "#"},
    ]
    for _ in range(3000):
        schema = {choice.choice(keywords): choice.choice(values) for _ in range(choice.randrange(1, 4))}
        with suppress(RefusedError):
            strict(schema, "x")
        lenient(schema)
