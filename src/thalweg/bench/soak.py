"""A server under clients of every kind for a while: what must never happen, and what must be free at the end."""

from __future__ import annotations

import asyncio
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from thalweg.bench.server_process import ProcessUse, ServerProcess, serving
from thalweg.bench.soak_clients import Clients, draw_cases, solo
from thalweg.config import env
from thalweg.config.engine import EngineConfig
from thalweg.config.model_source import model_folder
from thalweg.http_client import HttpClient, HttpError
from thalweg.tokenizer.load import load_tokenizer

NUM_CASES = 40
IDLE_SECONDS = 20.0  # to be idle, and to close what nobody uses any more
LAST_STREAMS = 8
SETTLED_SECONDS = 300.0  # a run has to last until memory says something of leaks
MAX_GROWTH_BYTES, MAX_GROWTH_SHARE = 16 << 20, 0.05
MAX_EARLY_GROWTH_BYTES = 256 << 20  # in shorter runs: allocators take what the largest steps need

# Metrics that are zero when nothing is under way.
IDLE = ("num_requests_running", "num_requests_waiting", "state_slots_used", "kv_cache_usage_perc")


@dataclass(slots=True)
class SoakResult:
    """`faults` is empty when all went well. Memory in bytes by process: early in the run, late in it, greatest."""

    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    generated_tokens: int = 0
    preemptions: int = 0
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # before, after
    tasks: tuple[int, int] = (0, 0)
    drain_seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


async def soak(
    config: EngineConfig,
    *,
    seconds: float,
    concurrency: int,
    max_queued: int,
    seed: int,
    on_tick: Callable[[float, Clients], object],
) -> SoakResult:
    """Start a server, learn what requests answer by themselves, run `concurrency` clients at once for `seconds`, end
    it by SIGTERM in the middle of streams. `on_tick` hears once a second. Raises ThalwegError when it cannot begin.
    """
    result = SoakResult()
    with tempfile.TemporaryDirectory(prefix="thalweg-soak-") as folder:
        log = Path(folder) / "log"
        async with serving(config, log, "--max-queued-requests", str(max_queued)) as server:
            await _Soak(config, server, result, seed).run(seconds, concurrency, on_tick)
            result.faults += [f"still there: {what}" for what in server.leftovers()]
        if "Traceback" in (text := log.read_text(errors="replace")):
            result.faults.append(f"the server's log has a traceback: {text[-600:]}")
    return result


class _Soak:
    def __init__(self, config: EngineConfig, server: ServerProcess, result: SoakResult, seed: int) -> None:
        self._config, self._server, self._result, self._seed = config, server, result, seed
        self._http = HttpClient(server.url, env.read("THALWEG_API_KEY"))  # which the server reads too
        self._samples: list[dict[str, ProcessUse]] = []

    async def run(self, seconds: float, concurrency: int, on_tick: Callable[[float, Clients], object]) -> None:
        result, server, http = self._result, self._server, self._http
        [model] = (await http.json("GET", "/v1/models"))["data"]
        weights = self._config.load_format != "dummy"
        tokenizer = load_tokenizer(model_folder(self._config.model, self._config.revision, weights=weights))
        cases = draw_cases(tokenizer, NUM_CASES, model["max_model_len"], self._seed)
        cases = [await solo(http, model["id"], case) for case in cases]
        vocab_size = 2**31 - 1  # of any model, no token has this id
        clients = Clients(http, model["id"], cases, vocab_size, self._seed)
        await self._until_idle()
        before, tasks_before = server.use(), await self._metric("server_tasks")

        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(clients.run())
            while (past := time.monotonic() - began) < seconds and not self._dead():
                on_tick(past, clients)
                self._samples.append(server.use())
                await self._check_health(clients)
                await asyncio.sleep(1.0)
            clients.stopping = True
        result.seconds = time.monotonic() - began
        if self._dead():
            clients.fault(f"the server ended by itself with exit code {server.process.returncode}")
        else:
            await self._until_idle()
            await self._check_held(before, tasks_before)
            await self._end(clients, [c for c in cases if c.tokens > 20] or cases)
        result.counts = dict(sorted(clients.counts.items()))
        result.faults += clients.faults
        http.close()

    async def _check_health(self, clients: Clients) -> None:
        """A server under load still says at once that it is well."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(10):
                await self._http.json("GET", "/health")
        except (HttpError, TimeoutError) as e:
            clients.fault(f"/health: {type(e).__name__}: {e}")
        clients.counts["health, ms at most"] = max(
            clients.counts["health, ms at most"], round(1e3 * (time.monotonic() - began))
        )

    async def _check_held(self, before: dict[str, ProcessUse], tasks_before: float) -> None:
        """Nothing is held that was not held before: files, sockets, tasks; and memory has not grown."""
        result = self._result
        result.generated_tokens = int(await self._metric("generation_tokens_total"))
        result.preemptions = int(await self._metric("num_preemptions_total"))
        self._http.close()
        deadline = time.monotonic() + IDLE_SECONDS
        while True:
            after, tasks = self._server.use(), await self._metric("server_tasks")
            result.tasks = int(tasks_before), int(tasks)
            # The connection that asks is open now and was open before.
            result.files = {name: (before[name].files, use.files) for name, use in after.items()}
            more = {name: pair for name, pair in result.files.items() if pair[1] > pair[0]}
            if not more and tasks <= tasks_before:
                break
            if time.monotonic() > deadline:
                result.faults.append(f"held at the end, before and after: files {more}, tasks {result.tasks}")
                break
            await asyncio.sleep(0.5)
        for name in after:
            memory = [use[name].memory for use in self._samples]
            fifth = max(1, len(memory) // 5)
            early = round(statistics.median(memory[fifth : 2 * fifth] or memory))
            late = round(statistics.median(memory[-fifth:]))
            result.memory[name] = {"early": early, "late": late, "most": max(memory)}
            allowed = max(MAX_GROWTH_BYTES, MAX_GROWTH_SHARE * early)
            if late - early > (allowed if result.seconds >= SETTLED_SECONDS else MAX_EARLY_GROWTH_BYTES):
                result.faults.append(f"memory of the {name} grew from {early >> 20} to {late >> 20} MiB")

    async def _end(self, clients: Clients, cases: list[Any]) -> None:
        """SIGTERM in the middle of streams: they end as ever, and the server with 0."""
        process = self._server.process
        streams = [asyncio.create_task(clients.check_stream(cases[i % len(cases)])) for i in range(LAST_STREAMS)]
        while not await self._metric("num_requests_running") and not all(s.done() for s in streams):
            await asyncio.sleep(0.002)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for kind in await asyncio.gather(*streams):
            clients.counts[f"{kind} through SIGTERM"] += 1
        try:
            await asyncio.wait_for(process.wait(), 60)
        except TimeoutError:
            clients.fault("the server has not ended 60 s after SIGTERM")
        self._result.drain_seconds = time.monotonic() - began
        if process.returncode != 0:
            clients.fault(f"the server ended with {process.returncode} after SIGTERM, expected 0")
        try:
            await HttpClient(self._server.url).json("GET", "/health")
            clients.fault("/health answers after the end")
        except HttpError:
            pass

    async def _until_idle(self) -> None:
        deadline = time.monotonic() + IDLE_SECONDS
        while busy := {name: value for name in IDLE if (value := await self._metric(name))}:
            if time.monotonic() > deadline:
                self._result.faults.append(f"not idle after {IDLE_SECONDS:g} s without requests: {busy}")
                return
            await asyncio.sleep(0.1)

    async def _metric(self, name: str) -> float:
        async with self._http.request("GET", "/metrics") as answer:
            text = (await answer.read()).decode()
        found = re.search(rf"^thalweg_{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def _dead(self) -> bool:
        return self._server.process.returncode is not None
