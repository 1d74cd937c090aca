"""Long texts and large bodies beside others' tokens: the event loop, which sends them, is never held for long."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tokenizer_folders import byte_level_tokenizer, write_hf, write_kimi
from tests.unit.server_double import ClientDouble, serving
from thalweg.server.run import SWITCH_SECONDS
from thalweg.server.settings import ServerSettings
from thalweg.tokenizer.load import load_tokenizer
from thalweg.tokenizer.template import ChatTemplate

SHARE = 0.5  # of the time that a long text takes; it held the others up for all of it. A share, since machines are busy
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"

_words = ["Hello", "wörld,", "<|im_end|>", "{", "}", "12345", "<think>", "\n\n", "漢字", "def f(x):"]
TEXT = " ".join(random.Random(1).choices(_words, k=1_300_000))


@pytest.fixture(autouse=True)
def as_the_server_has_it() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    yield
    sys.setswitchinterval(before)


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenize": ("/tokenize", {"prompt": TEXT[:9_000_000]}),
    "chat": ("/tokenize", {"messages": [{"role": "user", "content": TEXT[:6_000_000]}]}),
    "many messages": (
        "/tokenize",
        {"messages": [{"role": "user", "content": TEXT[i : i + 2000]} for i in range(0, 6_000_000, 2000)]},
    ),
    "messages": ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": TEXT[:6_000_000]}]}),
    "many blocks": (
        "/v1/messages/count_tokens",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 50}] * 45_000}]},
    ),
    "responses": ("/v1/responses", {"input": TEXT[:6_000_000]}),
    "many parts": ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 45_000}]}),
    "metadata of tools": (
        "/v1/responses",
        {"input": "x", "tool_choice": "none", "tools": [{"type": "function", "name": "f", "x": [1] * 2_000_000}]},
    ),
    "detokenize": ("/detokenize", {"tokens": [65, 66, 67, 32] * 500_000}),
    "unknown": ("/tokenize", {"prompt": "x", "x": [{"a": [1, {"b": "c"}]}] * 300_000}),
    "containers": ("/tokenize", {"prompt": [{"a": [1, {"b": "c"}]}] * 300_000}),
}


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["kimi", "hf"])
@pytest.mark.parametrize("name", BODIES)
def test_nobody_is_held_up(name: str, tokenizer: str, tmp_path: Path) -> None:
    write_kimi(tmp_path) if tokenizer == "kimi" else write_hf(tmp_path, byte_level_tokenizer())
    client = ClientDouble()
    codec = client.codec
    codec.tokenizer = load_tokenizer(tmp_path)
    codec.chat_ids = ChatTemplate(TEMPLATE, codec.tokenizer).encode_chat
    client.info.vocab_size = codec.tokenizer.vocab_size
    path, value = BODIES[name]
    body = json.dumps(value).encode()

    async def main() -> list[float]:
        waits: list[float] = []
        shares: list[float] = []

        async def others() -> None:
            while True:
                began = time.perf_counter()
                await asyncio.sleep(0.001)
                waits[-1] = max(waits[-1], time.perf_counter() - began)

        async with serving(client, ServerSettings()) as http:
            waits.append(0.0)
            task = asyncio.create_task(others())
            for _ in range(10):  # other processes hold it up, too
                waits.append(0.0)
                began = time.perf_counter()
                response = await http.post(path, content=body, headers={"content-type": "application/json"})
                assert response.status_code == (400 if name == "containers" else 200), response.text[:300]
                shares.append(waits[-1] / (time.perf_counter() - began))
                if shares[-1] < SHARE:
                    break
            task.cancel()
        return shares

    assert min(asyncio.run(main())) < SHARE
