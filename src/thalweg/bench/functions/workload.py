"""The workload: a model on one thread, imported, loaded, and served in process and over HTTP."""

from __future__ import annotations

import http.client
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.core import SamplingParams
    from thalweg.engine.start import Engine
    from thalweg.tokenizer.base import Tokenizer

PHASES = {
    "import": "import",
    "load": "load",
    "prefill": "step",
    "decode": "step",
    "grammar": "step",
    "http": "request",
}
"""What runs, in order, and what its figures are divided by."""

Phase = Callable[[str], AbstractContextManager[None]]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "tags", "count"],
        "additionalProperties": False,
    }
)
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@dataclass(frozen=True, slots=True)
class Sizes:
    prompts: int
    prompt_len: int
    prefill_batches: int
    decode_steps: int
    grammar_tokens: int
    http_rounds: int


FULL = Sizes(prompts=8, prompt_len=256, prefill_batches=4, decode_steps=64, grammar_tokens=32, http_rounds=6)
QUICK = Sizes(prompts=4, prompt_len=64, prefill_batches=1, decode_steps=8, grammar_tokens=8, http_rounds=1)


def run(model: str | None, sizes: Sizes, phase: Phase) -> dict[str, int]:
    """Run it all with a model's folder (None: the bundled one). `phase(name)` is entered around each phase. Returns how
    many units of PHASES each was."""
    with phase("import"):
        from thalweg.config.engine import EngineConfig
        from thalweg.core import Grammar, SamplingParams
        from thalweg.engine.start import Engine
        from thalweg.text.codec import load_codec

        importlib.import_module("thalweg.server.run")  # by its name, as this room and the server are neighbours
    config = EngineConfig(
        model=model,
        device="cpu",
        max_num_seqs=sizes.prompts,
        max_model_len=1024,
        cache_memory=256 << 20,
        enable_prefix_caching=False,  # the prompts are alike, and each is to be computed
        enforce_eager=True,  # ops are called by name
    )
    with phase("load"):
        engine = Engine(config)
        tokenizer = load_codec(config).tokenizer
    assert tokenizer is not None
    try:
        _Batch(engine, tokenizer, _varied(sizes.prompts, 4), sizes.prompt_len).run()  # what is made on first use
        one = [SamplingParams(max_tokens=1)] * sizes.prompts
        steps = 0
        with phase("prefill"):
            for _ in range(sizes.prefill_batches):
                steps += _Batch(engine, tokenizer, one, sizes.prompt_len).run()
        batch = _Batch(engine, tokenizer, _varied(sizes.prompts, sizes.decode_steps + 1), 16)
        batch.run_prompts()
        with phase("decode"):
            decode = batch.run()
        grammar = Grammar("json_schema", SCHEMA)
        params = SamplingParams(max_tokens=sizes.grammar_tokens, temperature=0, grammar=grammar)
        with phase("grammar"):
            engine.grammars.compiled(grammar).result()
            guided = _Batch(engine, tokenizer, [params] * 2, 16).run()
    finally:
        engine.close()
    return {
        "import": 1,
        "load": 1,
        "prefill": steps,
        "decode": decode,
        "grammar": guided,
        "http": _serve(model, sizes, phase),
    }


def _varied(count: int, max_tokens: int) -> list[SamplingParams]:
    """Greedy ones, sampled ones, and one with log-probabilities."""
    from thalweg.core import SamplingParams

    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 1},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0.8, "seed": 2, "presence_penalty": 0.5},
    ]
    return [SamplingParams(max_tokens=max_tokens, ignore_eos=True, **kinds[i % len(kinds)]) for i in range(count)]


class _Batch:
    """Requests that start together, driven step by step to their ends, with their text."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, params: list[SamplingParams], prompt_len: int) -> None:
        from thalweg.core import Request
        from thalweg.text.output import OutputProcessor

        self._core = engine.core
        self._outputs = OutputProcessor(tokenizer, frozenset(engine.info.eos_token_ids))
        for i, each in enumerate(params):
            prompt = [(7 * i + 3 * j) % 256 for j in range(prompt_len)]
            request = Request(id=f"r{i}", prompt_token_ids=prompt, params=each)
            self._core.add(request)
            self._outputs.add(request)
        self._begun: set[str] = set()
        self._count = len(params)

    def run_prompts(self) -> None:
        """Until every request has a token, and nothing runs."""
        while len(self._begun) < self._count:
            self._step()
        for _, future in self._core._in_flight:
            future.result()

    def run(self) -> int:
        """To the end. Returns how many steps that took."""
        loops = 0
        while self._core.has_work():
            self._step()
            loops += 1
        return loops - 1  # the last one only takes in what the one before it began

    def _step(self) -> None:
        for update in self._core.step():
            if update.token_ids:
                self._begun.add(update.request_id)
            self._outputs.process(update)


def _serve(model: str | None, sizes: Sizes, phase: Phase) -> int:
    """The server, whose engine process is not counted, with a plain client on a thread of its own, which ends it."""
    with socket.create_server(("127.0.0.1", 0)) as any_port:
        port: int = any_port.getsockname()[1]
    requests, ended = _requests(), threading.Event()

    def ask_all() -> None:
        try:
            while not _is_ready(port):
                if ended.wait(0.05):
                    return
            for each in requests:  # routes, schemas and templates are made on first use
                _ask(port, *each)
            with phase("http"):
                for each in requests * sizes.http_rounds:
                    _ask(port, *each)
                time.sleep(0.05)  # for what comes after an answer
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_all)
        try:
            folder = [] if model is None else [model]
            _command("serve", *folder, "--device=cpu", f"--port={port}", "--max-model-len=1024", "--cache-memory=256M")
        finally:
            ended.set()
        asked.result()
    return sizes.http_rounds * len(requests)


def _command(*words: str) -> None:
    """`python -m thalweg`, in this process. Raises RuntimeError if it fails."""
    sys.argv[1:] = words
    try:
        runpy.run_module("thalweg", run_name="__main__")
    except SystemExit as e:
        if e.code:
            raise RuntimeError(f"thalweg {words[0]} ended with exit code {e.code}") from None


def _is_ready(port: int) -> bool:
    try:
        _ask(port, "/health", None)
    except (OSError, _NotOk):
        return False
    return True


def _requests() -> list[tuple[str, Any]]:
    user = [{"role": "user", "content": "Ben has 3 apples and buys 4. How many has he?"}]
    chat: dict[str, Any] = {"messages": user, "max_tokens": 8, "temperature": 0}
    text = {"prompt": "1 + 1 =", "max_tokens": 8, "temperature": 0}
    path, schema = "/v1/chat/completions", {"name": "s", "schema": json.loads(SCHEMA)}
    return [
        ("/health", None),
        ("/v1/models", None),
        ("/metrics", None),
        ("/tokenize", {"prompt": "two words"}),
        ("/v1/completions", text),
        ("/v1/completions", {**text, "stream": True, "logprobs": 1}),
        (path, chat),
        (path, {**chat, "stream": True}),
        (path, {**chat, "tools": [TOOL]}),
        (path, {**chat, "response_format": {"type": "json_schema", "json_schema": schema}}),
    ]


def _ask(port: int, path: str, body: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise _NotOk(f"{path} answered {answer.status}: {text.decode(errors='replace')[:200]}")


class _NotOk(RuntimeError):
    """An answer other than 200."""
