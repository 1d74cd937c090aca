"""Ranks on two GPUs: how they end, and what a death leaves. A rank may then wait in a kernel for the dead one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.dist.processes import children, command, lives, maps, needs_proc, shared_memory, stop, until
from tests.e2e.tiny_model import CONTEXT, EOS, VOCAB, write_tiny_model
from tests.models import random_checkpoint as random
from tests.models.served import KIMI
from thalweg import SamplingParams
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes.client import EngineClient
from thalweg.errors import EngineDeadError

pytestmark = [pytest.mark.gpu, needs_proc]

WITHIN = 10.0  # seconds from a death to the end of all
OPTIONS: dict[str, Any] = dict(
    device="cuda", dtype="bfloat16", tensor_parallel_size=2, max_num_seqs=4, cache_memory=1 << 30
)
ENDLESS = SamplingParams(max_tokens=CONTEXT - 10, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that every kernel serves."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, not {torch.cuda.device_count()}")
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    c = random.config(**{**KIMI, "vocab": VOCAB, "context": CONTEXT}, eos_token_id=EOS)
    return random.write(folder, c, random.weights(c))


SCRIPT = """
from thalweg import LLM, SamplingParams
llm = LLM({folder!r}, **{options!r})
print(llm.info.decode_steps)
llm.generate([5, 9, 2, 7], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
{end}
"""


@pytest.mark.parametrize("end", ["llm.close()", ""])
def test_an_exit_says_nothing_of_process_groups(folder: Path, end: str) -> None:
    script = SCRIPT.format(folder=str(folder), options=OPTIONS, end=end)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("CUDA graphs"), run.stdout
    for word in ("destroy_process_group", "ProcessGroup", "NCCL", "frame #"):
        assert word not in run.stderr, run.stderr


@pytest.mark.parametrize("victim", ["rank 1", "engine"])
def test_a_death_in_decode_ends_all(folder: Path, victim: str) -> None:
    before = shared_memory()

    async def check() -> None:
        client = EngineClient(EngineConfig(str(folder), **OPTIONS))
        await client.start()
        try:
            assert client.info.decode_steps.startswith("CUDA graphs"), client.info.decode_steps
            engine = client.engines[0].process.pid
            rank = _rank(engine)
            answer = client.generate([5, 9, 2, 7], ENDLESS)
            for _ in range(6):
                await anext(answer)
            os.kill(rank if victim == "rank 1" else engine, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(EngineDeadError, match=f"{victim}.* ended with exit code -9"):
                async with asyncio.timeout(WITHIN):
                    async for _ in answer:
                        pass
            until(lambda: not lives(engine) and not lives(rank), "a process lives on", WITHIN)
            print(f"{victim}: all ended after {time.monotonic() - began:.1f} s")
        finally:
            await client.close()

    asyncio.run(check())
    assert shared_memory() <= before


AT_CAPTURE = """
import sys, threading, time
def wait():
    while not hasattr(sys.modules.get("thalweg.runner.capture"), "captured"):
        time.sleep(0.01)
    import torch
    def capture_end(graph):
        open({file!r}, "w").close()
        time.sleep(600)
    torch.cuda.CUDAGraph.capture_end = capture_end
if sys.orig_argv[-1].endswith("/rank-1"):
    threading.Thread(target=wait, daemon=True).start()
"""


def test_a_death_in_the_middle_of_a_capture_ends_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 stays where it would end its first graph; the other one comes as far as it does without it."""
    (tmp_path / "sitecustomize.py").write_text(AT_CAPTURE.format(file=str(tmp_path / "captures")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    async def check() -> None:
        client = EngineClient(EngineConfig(str(folder), **OPTIONS))
        start = asyncio.create_task(client.start())
        try:
            await _until(lambda: (tmp_path / "captures").exists() or start.done())
            engine = client.engines[0].process.pid
            rank = _rank(engine)
            os.kill(rank, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="rank 1 ended with exit code -9"):
                await asyncio.wait_for(start, WITHIN)
            until(lambda: not lives(engine) and not lives(rank), "a process lives on", WITHIN)
        finally:
            await client.close()

    before = shared_memory()
    asyncio.run(check())
    assert shared_memory() <= before


@pytest.mark.parametrize("file", ["model.safetensors", "libnvrtc.so"])
def test_a_death_at_the_start_ends_all(folder: Path, file: str) -> None:
    """As a rank loads weights, and as it compiles kernels; the other one comes as far as it does without it."""

    async def check() -> None:
        client = EngineClient(EngineConfig(str(folder), **OPTIONS))
        start = asyncio.create_task(client.start())
        try:
            await _until(lambda: bool(client.engines))
            engine = client.engines[0].process.pid
            await _until(lambda: _rank(engine))
            rank = _rank(engine)
            await _until(lambda: any(maps(rank, name) for name in (file, *(f"{file}.{n}" for n in (12, 13, 14)))))
            stop(rank)
            os.kill(rank, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(EngineDeadError, match="rank 1 ended with exit code -9"):
                await asyncio.wait_for(start, WITHIN)
            until(lambda: not lives(engine) and not lives(rank), "a process lives on", WITHIN)
            print(f"{file}: all ended after {time.monotonic() - began:.1f} s")
        finally:
            await client.close()

    asyncio.run(check())


def _rank(engine: int) -> int:
    return next((pid for pid in children(engine) if "rank_main" in command(pid)), 0)


async def _until(condition: Any, seconds: float = 90) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
