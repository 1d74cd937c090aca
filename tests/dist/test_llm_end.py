"""An `LLM` in a process that ends, whatever its ranks do: an error that says why, and the process's own exit code."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist.processes import lives, needs_proc, until

WITHIN = 10.0  # seconds from a fault to its error, and from there to the end of the process
SCRIPT = """
import os, signal, sys, time
from thalweg import LLM, SamplingParams
from thalweg.errors import EngineDeadError

llm = LLM({folder!r}, device="cpu", step_timeout={step_timeout}, **{options})
ranks = getattr(llm.engine, "ranks", llm.engine)
pids = ranks.pids if ranks else []
print(*pids, flush=True)
stream = llm.stream("a", SamplingParams(max_tokens=400, temperature=0, ignore_eos=True))
for _ in range(5):
    next(stream)
{then}
sys.exit(7)
"""
LOST = """
os.kill(pids[-1], signal.{signal})
began = time.monotonic()
try:
    for _ in stream:
        pass
except EngineDeadError as e:
    print(e)
print(time.monotonic() - began, flush=True)
"""
CLOSED = """
llm.close()
with LLM({folder!r}, device="cpu", **{options}) as another:
    assert another.generate("a", SamplingParams(max_tokens=2))[0].outputs[0].token_ids
"""
OPTIONS: dict[str, dict[str, object]] = {
    "one": {},
    "tensor-parallel": {"tensor_parallel_size": 2},
    "data-parallel": {"data_parallel_size": 2, "enable_expert_parallel": True, "max_num_seqs": 4},
}
SEVERAL = [name for name in OPTIONS if name != "one"]
FORKED = """
del stream
child = os.fork()
if not child:
    try:
        llm.generate("a")
    except EngineDeadError as e:
        print(e, flush=True)
    llm.close()
    sys.exit(0)
print(os.waitpid(child, 0)[1])
print(len(llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids), flush=True)
"""


def said(folder: Path, ranks: str, then: str, step_timeout: float = 60) -> list[str]:
    """What the script says, if it ends as it wants to and leaves no rank behind."""
    values = {"folder": str(folder), "options": OPTIONS[ranks], "step_timeout": step_timeout}
    script = SCRIPT.format(**values, then=then.format(**values))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=120)
            ended = time.monotonic()
        finally:
            process.kill()
    assert process.returncode == 7, (out, err)
    assert not err
    pids, *lines = out.splitlines()
    until(lambda: not any(lives(int(pid)) for pid in pids.split()), "a rank lives on", WITHIN)
    assert time.monotonic() - ended < WITHIN
    return lines


@needs_proc
@pytest.mark.parametrize("ranks", ["one", *(pytest.param(name, marks=pytest.mark.slow) for name in SEVERAL)])
def test_a_process_may_end_in_the_middle_of_a_stream(folder: Path, ranks: str) -> None:
    assert said(folder, ranks, "") == []


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("ranks", SEVERAL)
@pytest.mark.parametrize(
    ("signal", "error", "then"),
    [
        ("SIGKILL", "rank 1 ended with exit code -9", ""),
        ("SIGKILL", "rank 1 ended with exit code -9", CLOSED),
        ("SIGSTOP", "a rank hangs, or --step-timeout is too short", ""),
    ],
    ids=["killed", "killed and closed", "hangs"],
)
def test_a_process_that_lost_a_rank_goes_on_to_its_own_end(
    folder: Path, ranks: str, signal: str, error: str, then: str
) -> None:
    reason, seconds = said(folder, ranks, LOST.replace("{signal}", signal) + then, 5 if signal == "SIGSTOP" else 60)
    assert error in reason
    assert float(seconds) < WITHIN


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("ranks", OPTIONS)
@pytest.mark.parametrize("then", [FORKED, FORKED.replace("    llm.close()\n", "")], ids=["closes", "ends"])
def test_a_fork_of_the_process_has_no_llm_and_leaves_its_parent_s_alone(folder: Path, ranks: str, then: str) -> None:
    error, status, tokens = said(folder, ranks, then)
    assert "in the process that made it" in error
    assert (status, tokens) == ("0", "3")
