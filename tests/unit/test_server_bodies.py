"""Large bodies are read as json.loads reads them, and others have their turn meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from tests.unit.server_double import ClientDouble, run
from tests.unit.test_server_errors import error_of
from thalweg.server.bodies import MAX_CONTAINERS, MAX_LARGE_DEPTH, PIECE_BYTES, loads
from thalweg.tokenizer.hf import BATCH_CHARS

BIG = "x" * (3 * PIECE_BYTES)


def read(text: str, known: frozenset[str] | None = None) -> tuple[Any, int]:
    """What comes of it, and how often others had their turn."""
    turns = 0

    async def main() -> Any:
        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        try:
            return await loads(text.encode(), known)
        finally:
            task.cancel()

    return asyncio.run(main()), turns


@pytest.mark.parametrize(
    "value",
    [
        [*range(50_000)],
        [-1.5e3, 2, 0.25] * 10_000,
        [[i] * (i % 300) for i in range(2000)],
        [{"role": "user", "content": 'a, [b] {c} "d" \\ é 😀' * 50} for _ in range(500)],
        {"messages": [{"content": BIG}, {"content": [{"text": BIG}, {"text": "x"}]}], "n": 1, "stop": None},
        {str(i): {"a": [i, {"b": True}]} for i in range(5000)},
        BIG,
        [BIG, 1, [], {}, "", None, *[True] * 20_000],
        [[[[[[*range(20_000)]]]]]],
    ],
)
@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_large_bodies_are_what_json_makes_of_them(value: Any, layout: dict[str, Any]) -> None:
    text = json.dumps(value, **layout)
    got, turns = read(f"  {text}\n")
    assert got == json.loads(text)
    assert turns > len(text) / PIECE_BYTES / 2 or BIG in str(value)  # a text is read in one go


@pytest.mark.parametrize(
    "text",
    [
        "[" + "1," * 50_000 + "]",
        "[" + "1," * 50_000 + ",1]",
        "[," + "1," * 50_000 + "1]",
        "[" + "1 " * 50_000 + "]",
        "[" + "01," * 50_000 + "1]",
        "[" + "1," * 50_000,
        '[{"a": ' + "1," * 50_000 + "1}]",
        '["' + BIG,
        f'{{"a": "{BIG}", "a"}}',
        f'{{"a": "{BIG}"}} x',
        f'["{BIG}\n"]',
        "[" + '{"a": 1},' * 20_000 + "{]",
    ],
)
def test_large_bodies_that_are_no_json_are_refused(text: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(json.JSONDecodeError):
        read(text)


def test_any_damage_to_a_body_is_seen() -> None:
    draw = random.Random(0)
    good = json.dumps({"a": [*range(9000)], "b": [{"c": "d" * 99, "e": [1, 2.5, None]}] * 900, "f": "g" * 40_000})
    for _ in range(300):
        at = draw.randrange(len(good))
        text = good[:at] + draw.choice(',:[]{}"\\1 -x') + good[at + draw.randrange(2) :]
        try:
            wanted = json.loads(text)
        except json.JSONDecodeError:
            with pytest.raises(json.JSONDecodeError):
                read(text)
        else:
            assert read(text)[0] == wanted


def test_large_values_of_unknown_fields_are_not_looked_at() -> None:
    got, _ = read(json.dumps({"a": BIG, "b": [BIG], "c": 1}), frozenset({"a"}))
    assert got == {"a": BIG, "b": None, "c": 1}


def test_large_values_do_not_nest_without_end() -> None:
    for depth in (MAX_LARGE_DEPTH + 2, 100_000):
        with pytest.raises(RecursionError):
            read("[" * depth + f'"{BIG}"' + "]" * depth)


def test_no_body_has_containers_without_end() -> None:
    code = json.dumps(["if (a[0]) { b[1] = {} }" * 20] * 20_000)
    assert read(code)[0] == json.loads(code)  # brackets in texts are text
    for text in (
        "[" + "[]," * MAX_CONTAINERS + "1]",
        json.dumps([{"a": [{}] * 999}] * 110),
        json.dumps({str(i): [] for i in range(MAX_CONTAINERS + 1)}),
    ):
        with pytest.raises(HTTPException, match="objects and lists"):
            read(text)


def test_requests_with_large_bodies_are_answered_as_others_are() -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        text = "wörld " * 10_000
        response = await http.post("/tokenize", json={"prompt": text, "return_token_strs": True, "y": [text]})
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["tokens"] == list(text.encode())
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert int(response.headers["content-length"]) == len(response.content)
        back = await http.post("/detokenize", json={"tokens": answer["tokens"]})
        assert back.json() == {"prompt": text}
        bad = await http.post("/detokenize", json={"tokens": [*answer["tokens"], 10**6]})
        assert (bad.status_code, error_of(bad)["param"]) == (400, "tokens")
        broken = await http.post("/tokenize", content=json.dumps({"prompt": text})[:-1])
        assert (broken.status_code, error_of(broken)["code"]) == (400, "invalid_json")
        deep = await http.post("/tokenize", content='{"prompt": ' + "[" * 80_000 + "]" * 80_000 + "}")
        assert deep.status_code == 400
        number = await http.post("/tokenize", content='{"n": 1, "prompt": [' + "1," * 20_000 + "9" * 5000 + "]}")
        assert number.status_code == 400
        chat = {"messages": [{"role": "user", "content": "x"}]}
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", chat)):
            response = await http.post(path, json={**body, "temperature": 200, "user": text})
            assert (response.status_code, error_of(response)["param"]) == (400, "temperature")

    run(work)


def test_long_texts_have_the_ids_of_short_ones(tmp_path: Any) -> None:
    import tokenizers

    from thalweg.tokenizer.hf import HFTokenizer

    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "Ġ": 3}, merges=[("a", "b")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    text = made.to_str()
    ours = HFTokenizer(text, json.loads(text), tmp_path)
    piece = "ab a b<s>ba "
    for allow_special in (False, True):
        short = ours.encode(piece, allow_special)
        count = 2 * BATCH_CHARS // len(piece)
        assert ours.encode(piece * count, allow_special) == short * count
