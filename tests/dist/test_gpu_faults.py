"""Ranks on two GPUs: how they end, and what a death leaves. A rank may then wait in a kernel for the dead one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.dist.processes import lives, maps, needs_proc, serving, shared_memory, stop, until
from tests.dist.test_faults import ENGINE_DIED, PROMPT, WITHIN, check_error
from tests.e2e.tiny_model import CONTEXT, EOS, VOCAB, write_tiny_model
from tests.models import random_checkpoint as random
from tests.models.served import KIMI

pytestmark = [pytest.mark.gpu, needs_proc]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that every kernel serves."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, not {torch.cuda.device_count()}")
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    c = random.config(**{**KIMI, "vocab": VOCAB, "context": CONTEXT}, eos_token_id=EOS)
    return random.write(folder, c, random.weights(c))


@pytest.fixture
def tmp() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


SCRIPT = """
from thalweg import LLM, SamplingParams
llm = LLM({folder!r}, device="cuda", dtype="bfloat16", tensor_parallel_size=2, max_num_seqs=4, cache_memory=1 << 30)
print(llm.info.decode_steps)
print(llm.generate([5, 9, 2, 7], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))[0].outputs[0].token_ids)
{end}
"""


@pytest.mark.parametrize("end", ["llm.close()", "", "raise KeyError('a test')"])
def test_an_exit_says_nothing_of_process_groups(folder: Path, end: str) -> None:
    before = shared_memory()
    began = time.monotonic()
    script = SCRIPT.format(folder=str(folder), end=end)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert run.returncode == ("KeyError" in end), run.stderr
    assert run.stdout.startswith("CUDA graphs"), run.stdout
    for word in ("ProcessGroup", "destroy_process_group", "NCCL", "Warning", "WARN"):
        assert word not in run.stderr, run.stderr
    assert shared_memory() <= before
    print(f"{end or 'no close'}: {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize(
    ("point", "victim"),
    [("decode", "rank 1"), ("kernels", "rank 1"), ("loading", "rank 1"), ("prefill", "rank 1"), ("decode", "engine")],
)
def test_a_death_ends_all(folder: Path, tmp: Path, tmp_path: Path, point: str, victim: str) -> None:
    before = shared_memory()
    options = ("-tp", "2", "--device", "cuda", "--dtype", "bfloat16", "--max-num-seqs", "4", "--cache-memory", "1GiB")
    with (
        serving(tmp_path / "log", tmp, str(folder), *options, "--sse-ping-interval", "0.1") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        file = {"loading": "model.safetensors", "kernels": "libnvrtc.so"}.get(point)
        if file is not None:  # while the ranks start: the other one comes as far as it does without this one
            pid = server.all_of(2)[victim]
            until(lambda: any(maps(pid, name) for name in (file, *_versions(file))), f"{file} is not opened")
            stop(pid)
            os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            check_error(server, victim, server.check_gone(WITHIN))
            print(f"{point}, {victim}: all ended after {time.monotonic() - began:.1f} s")
            return
        url = server.url()
        pid = server.all_of(2)[victim]
        if point == "prefill":
            stop(pid)
        lines: list[str] = []

        def stream() -> str:
            with httpx.stream("POST", f"{url}/v1/completions", json=PROMPT, timeout=60) as response:
                lines.append("")
                lines.extend(line for line in response.iter_lines() if line.startswith("data: "))
            return lines[-1]

        answer = pool.submit(stream)
        until(lambda: len(lines) > (0 if point == "prefill" else 10), "nothing runs")
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        assert '"engine_dead"' in answer.result(WITHIN)
        told = time.monotonic() - began
        code = server.check_gone(WITHIN)
        print(f"{point}, {victim}: told after {told:.1f} s, all ended after {time.monotonic() - began:.1f} s")
        check_error(server, victim, code)
        assert code == ENGINE_DIED
        assert not lives(pid)
    assert shared_memory() <= before


def _versions(file: str) -> list[str]:
    return [f"{file}.{n}" for n in (12, 13, 14)] if file.endswith(".so") else []
