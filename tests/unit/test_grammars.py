"""Grammars: compiled under limits, and holding rows to them without touching their neighbours."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from typing import Any

import pytest
import torch

from tests.fixtures.tokenizer_folders import byte_level_tokenizer, kimi_config, write_hf, write_kimi
from thalweg.core import Admission, Grammar, SamplingParams, pack_ids
from thalweg.errors import InvalidRequest
from thalweg.ops.sample.reference import sample
from thalweg.sampling.grammars import COMPILE_THREADS, MAX_COMPILED, Grammars
from thalweg.sampling.sampler import Sampler
from thalweg.sampling.table import SamplingTable
from thalweg.server.parsers.events import CallArguments, CallBegin
from thalweg.server.parsers.formats import CALL_FORMATS, CallFormat, OutputFormat
from thalweg.server.parsers.marks import KIMI_CALL, KIMI_CALL_END, MARK_OF, marks_by_id
from thalweg.server.parsers.reader import Reader
from thalweg.server.schemas import CompletionBody
from thalweg.server.structured import wanted
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.detokenizer import IncrementalDetokenizer
from thalweg.tokenizer.load import load_tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = kimi_config()
    for i, marker in enumerate(MARK_OF):
        if "tool" in marker:
            config["added_tokens_decoder"][str(262 + 100 + i)] = {"content": marker, "special": True}
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("kimi"), config))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_hf(tmp_path_factory.mktemp("hf"), byte_level_tokenizer(), eos_token="<|im_end|>"))


def grammars_of(tokenizer: Tokenizer) -> Grammars:
    assert tokenizer.eos_id is not None
    ends = frozenset({tokenizer.eos_id})
    return Grammars(lambda: (tokenizer, tokenizer.vocab_size + 3, ends))


def sampler_of(tokenizer: Tokenizer) -> Sampler:
    ends = frozenset({tokenizer.eos_id or 0})
    table = SamplingTable(
        4,
        tokenizer.vocab_size + 3,
        device=torch.device("cpu"),
        eos_token_ids=ends,
        grammars=grammars_of(tokenizer),
    )
    return Sampler(table, sample)


def admit(sampler: Sampler, slot: int, params: SamplingParams, output: list[int] | None = None) -> None:
    a = Admission(slot, f"r{slot}", pack_ids([1, 2, *(output or [])]), 2, params, slot, False)
    sampler.table.write(torch.tensor([slot]), *map(torch.from_numpy, sampler.table.admit([a])))


def generated(tokenizer: Tokenizer, grammar: Grammar, seed: int, limit: int = 400, **params: Any) -> list[int]:
    """What random logits give under a grammar, up to its end or the limit."""
    sampler, generator = sampler_of(tokenizer), torch.Generator().manual_seed(seed)
    admit(sampler, 1, SamplingParams(temperature=1.0, grammar=grammar, **params))
    ids: list[int] = []
    while len(ids) < limit:
        logits = torch.randn(1, tokenizer.vocab_size + 3, generator=generator)
        # A push to the end of strings, numbers and texts, which random logits would not find.
        for closing in '"},]0':
            logits[0, ord(closing) if tokenizer.vocab_size > 300 else 0] += 3
        chosen, _, errors = sampler(logits, [1], [len(ids)])
        assert not errors
        now = chosen.tolist()
        sampler.sampled([1], lambda now=now: now)  # type: ignore[misc]
        if now[0] == tokenizer.eos_id:
            break
        ids += now
    return ids


@pytest.mark.parametrize("seed", range(4))
def test_json_of_a_schema(kimi: Tokenizer, byte_level: Tokenizer, seed: int) -> None:
    for tokenizer in (kimi, byte_level):
        value = json.loads(tokenizer.decode(generated(tokenizer, Grammar("json_schema", json.dumps(SCHEMA)), seed)))
        assert list(value) == ["city", "n"]
        assert len(value["city"]) <= 4
        assert 0 <= value["n"] <= 9


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (Grammar("regex", "ab{2}"), "abb"),
        (Grammar("lark", 'start: "x\\n" y\ny: /12{2}/'), "x\n122"),
        (Grammar("lark", 'start: "é模"', "/ {2}/"), "  é模"),
    ],
)
def test_other_kinds(kimi: Tokenizer, grammar: Grammar, expected: str) -> None:
    assert kimi.decode(generated(kimi, grammar, 0)) == expected


JSON_GBNF = r"""
root ::= object  # as llama.cpp's own files have it
value ::= object | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def test_gbnf(kimi: Tokenizer) -> None:
    values = [json.loads(kimi.decode(generated(kimi, Grammar("lark", JSON_GBNF), seed))) for seed in range(6)]
    assert all(isinstance(value, dict) for value in values)
    assert any(values)
    text = 'root ::= my-rule{2} Other "\\u00e9\\n"\nmy-rule ::= "a" | "b"\nOther ::= [ぁ-ぃ]'
    dashes = Grammar("lark", text)
    assert kimi.decode(generated(kimi, dashes, 0))[-2:] == "é\n"


@pytest.mark.parametrize(
    "text", ["root ::= nothing", 'root ::= ("a"', "root ::= " + "(" * 50_000, 'root ::= "\\ud800"'], ids=range(4)
)
def test_gbnf_that_cannot_be_used_is_said_without_another_grammar(kimi: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequest, match="the grammar") as error:
        grammars_of(kimi).matcher(Grammar("lark", text))
    assert "start:" not in str(error.value)
    assert "%llguidance" not in str(error.value)


def test_no_token_named_by_its_text_is_text(kimi: Tokenizer) -> None:
    ids = generated(kimi, Grammar("regex", "(.|\n){20,40}"), 1)
    assert not set(ids) & set(kimi.added_tokens.values())


def test_the_end_is_allowed_where_the_grammar_ends_and_only_there(kimi: Tokenizer) -> None:
    assert kimi.decode(generated(kimi, Grammar("regex", "a{5}"), 0, min_tokens=20)) == "aaaaa"


@pytest.mark.parametrize("order", [[1, 2], [2, 1]])
def test_neighbours_are_not_touched(kimi: Tokenizer, order: list[int]) -> None:
    logits = torch.randn(2, kimi.vocab_size + 3, generator=torch.Generator().manual_seed(0))
    free = SamplingParams(temperature=0.8)
    alone, together = sampler_of(kimi), sampler_of(kimi)
    admit(alone, 1, free)
    expected, _, _ = alone(logits[:1], [1], [5])
    before = logits.clone()
    admit(together, 1, free)
    admit(together, 2, SamplingParams(grammar=Grammar("regex", "z+")))
    ids, _, errors = together(logits[[0, 1] if order == [1, 2] else [1, 0]], order, [5, 5])
    assert not errors
    assert ids[order.index(1)] == expected[0]
    assert kimi.decode([int(ids[order.index(2)])]) == "z"
    assert torch.equal(logits, before)
    assert alone.simple([1])
    assert not together.simple([2])


def test_a_resumed_request_goes_on_within_its_grammar(kimi: Tokenizer) -> None:
    sampler = sampler_of(kimi)
    admit(sampler, 3, SamplingParams(grammar=Grammar("regex", "abc")), kimi.encode("ab"))
    ids, _, _ = sampler(torch.zeros(1, kimi.vocab_size + 3), [3], [9])
    assert kimi.decode(ids.tolist()) == "c"
    admit(sampler, 3, SamplingParams(temperature=0))  # the slot's next request has no grammar
    assert sampler.simple([3])


def test_a_token_that_the_grammar_does_not_have_ends_the_request_alone(kimi: Tokenizer) -> None:
    sampler = sampler_of(kimi)
    for slot in (1, 2):
        admit(sampler, slot, SamplingParams(grammar=Grammar("regex", "a+")))
    sampler.sampled([1, 2], lambda: [ord("a"), ord("b")])
    ids, _, errors = sampler(torch.zeros(2, kimi.vocab_size + 3), [1, 2], [0, 0])
    assert list(errors) == [2]
    assert "grammar" in errors[2]
    assert int(ids[0]) in (ord("a"), kimi.eos_id)


LABELS = [f'label "{i * 7919}" / \\ é' for i in range(3000)]
MANY: dict[str, Any] = {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(600)}}


@pytest.mark.parametrize("seed", range(2))
def test_thousands_of_choices_and_hundreds_of_optional_properties(kimi: Tokenizer, seed: int) -> None:
    asked = asyncio.run(wanted(CompletionBody(prompt="x", structured_outputs={"choice": LABELS})))
    assert asked is not None
    assert kimi.decode(generated(kimi, asked.grammar, seed)) in LABELS
    in_enum = generated(kimi, Grammar("json_schema", json.dumps({"enum": LABELS})), seed)
    assert json.loads(kimi.decode(in_enum)) in LABELS
    closed = json.dumps(MANY | {"additionalProperties": False})
    value = json.loads(kimi.decode(generated(kimi, Grammar("json_schema", closed), seed, limit=20_000)))
    assert value.keys() <= MANY["properties"].keys()


NESTED = json.dumps({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[" * 50_000),
        Grammar("json_schema", '{"items": ' * 1000 + "{}" + "}" * 1000),
        Grammar("json_schema", '{"type": "wat"}'),
        Grammar("json_schema", "false"),
        Grammar("json_schema", '{"$ref": "#"}'),
        Grammar("json_schema", NESTED),
        Grammar("json_schema", '{"$ref": "http://127.0.0.1/schema"}'),
        Grammar("regex", "("),
        Grammar("regex", "(" * 50_000),
        Grammar("regex", "(?=a)b"),
        Grammar("lark", ""),
        Grammar("lark", "start: " + "(" * 20_000),
        Grammar("lark", "start: a\na: b\nb: a"),
        Grammar("lark", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1} A{i + 1}\n" for i in range(25)) + 'A25: "x"'),
        Grammar("lark", "start: <[99999999]>"),
    ],
    ids=range(16),
)
def test_what_cannot_be_used_is_refused_in_one_line(kimi: Tokenizer, grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest, match="the grammar") as error:
        grammars_of(kimi).matcher(grammar)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(((a{1,1000}){1,1000}){1,1000}){1,1000}"),
        Grammar("regex", "(.*a.{40}){30}"),
        Grammar("regex", "x{100000000}"),
        Grammar("json_schema", '{"type": "array", "maxItems": 100000000, "items": {"type": "array"}}'),
        Grammar("json_schema", '{"type": "string", "pattern": "^(a|aa)*b(x+x+)+y(.*.*.*)*$"}'),
    ],
    ids=range(5),
)
def test_what_explodes_elsewhere_runs_or_ends_its_request(kimi: Tokenizer, grammar: Grammar) -> None:
    matcher, choice = grammars_of(kimi).matcher(grammar), random.Random(0)
    for _ in range(30):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or matcher.is_stopped():
            break
        matcher.consume_token(choice.choice([i for i in range(kimi.vocab_size) if mask >> i & 1]))


DEFS = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1500)}
LONG_CHAINS = [
    Grammar("json_schema", json.dumps({"$defs": DEFS | {"d1500": {}}, "$ref": "#/$defs/d0"})),
    Grammar("lark", "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(6000)) + '\nr6000: "b"'),
]


@pytest.mark.parametrize("grammar", LONG_CHAINS, ids=["references", "rules"])
def test_rules_that_lead_to_rules_by_the_thousand_do_not_end_the_process(kimi: Tokenizer, grammar: Grammar) -> None:
    grammars = grammars_of(kimi)
    assert not grammars.matcher(grammar).is_error()  # compiled here and now
    assert not grammars.compiled(grammar).result().is_error()
    grammars.close()


def test_compiled_grammars_are_shared_and_bounded(kimi: Tokenizer) -> None:
    grammars = grammars_of(kimi)
    first = grammars.compiled(Grammar("regex", "a"))
    assert grammars.compiled(Grammar("regex", "a")) is first
    for i in range(MAX_COMPILED):
        grammars.compiled(Grammar("regex", f"a{{{i + 2}}}")).result()
    assert len(grammars._compiled) == MAX_COMPILED
    assert grammars.compiled(Grammar("regex", "a")) is not first


def test_a_grammar_that_is_no_longer_kept_does_not_wait_for_the_threads(kimi: Tokenizer) -> None:
    grammars, busy = grammars_of(kimi), threading.Event()
    try:
        for _ in range(COMPILE_THREADS):
            grammars._pool.submit(busy.wait)
        grammars.compiled(Grammar("regex", "b"))
        for pattern in ("a", "b"):  # not kept, and kept but waiting
            assert not grammars.matcher(Grammar("regex", pattern)).is_error()
    finally:
        busy.set()


def test_without_tokenizer_or_end_there_are_no_grammars(kimi: Tokenizer) -> None:
    for vocabulary in ((None, 10, frozenset({1})), (kimi, kimi.vocab_size, frozenset())):
        with pytest.raises(InvalidRequest, match="the grammar needs"):
            Grammars(lambda v=vocabulary: v).matcher(Grammar("regex", "a"))  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["xml", 3])
def test_a_grammar_of_another_kind(kind: Any) -> None:
    with pytest.raises(InvalidRequest, match="json_schema, regex or lark"):
        Grammar(kind, "x")


TOOLS = [
    {"type": "function", "function": {"name": "find.city-1", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.mark.parametrize("begun", [True, False])
def test_reasoning_comes_before_the_grammar(kimi: Tokenizer, begun: bool) -> None:
    output = OutputFormat(None, True, kimi)
    grammar = Grammar("regex", "a{5}", output.reasoning_lark(begun))
    begin, end = kimi.added_tokens["<think>"], kimi.added_tokens["</think>"]
    seen = set()
    for seed in range(6):
        ids = generated(kimi, grammar, seed, limit=3000)
        assert kimi.decode(ids).endswith("aaaaa")
        assert begun or (ids[0] == begin) == (end in ids)
        seen.add(end in ids)
    assert not begun or seen == {True}


@pytest.mark.parametrize("form", CALL_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("seed", range(3))
def test_calls_that_are_required_parse(kimi: Tokenizer, form: CallFormat, seed: int) -> None:
    grammar = Grammar("lark", "start: calls\n" + form.lark(TOOLS, kimi.added_tokens, False))
    ids = generated(kimi, grammar, seed, limit=3000)
    text = IncrementalDetokenizer(kimi, marks=marks_by_id(form.markers, kimi.added_tokens)).push(ids)
    events = Reader(calls=form.parser(lambda: "id", TOOLS)).feed(text, last=True)
    assert [type(e) for e in events] == [CallBegin, CallArguments]
    begin, arguments = events
    assert isinstance(begin, CallBegin)
    assert isinstance(arguments, CallArguments)
    value = json.loads(arguments.text)
    assert begin.name in ("find.city-1", "now")
    assert list(value) == (["city", "n"] if begin.name == "find.city-1" else [])
    if form.name == "kimi_k2":
        assert {KIMI_CALL, KIMI_CALL_END} <= {kimi.decode([i]) for i in ids}
