"""The whole engine on a CUDA device: kernels, graphs and references give the same tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.models import naive_kimi_linear as naive
from tests.models import random_checkpoint as random
from thalweg import LLM, SamplingParams

pytestmark = pytest.mark.gpu

# Dimensions that every kernel serves, small enough to run in seconds.
SERVED = dict(layers=4, full=(3,), hidden=256, kda_heads=4, kda_dim=128, heads=4, nope=128, rope=64, value=128,
              rank=128, experts=16, top_k=4, shared=1, inner=128, vocab=1000, context=600)  # fmt: skip
PARAMS = [
    SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=25, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=30, seed=4, top_p=0.9, ignore_eos=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(**SERVED)
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


def prompts(n: int, vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, vocab, 3 + 17 * i).tolist() for i in range(n)]


def test_logits_in_float32(folder: Path) -> None:
    c = random.config(**SERVED)
    ids = prompts(5, c["vocab_size"])[4]
    expected = naive.logits(c, random.weights(c), ids).numpy()
    for chunk in (512, 20, 1):
        with LLM(str(folder), device="cuda", dtype="float32", max_num_seqs=2, max_num_batched_tokens=chunk) as llm:
            np.testing.assert_allclose(llm.prompt_logits(ids).cpu().numpy(), expected, atol=1e-3, rtol=0)


def test_graphs_give_the_tokens_of_eager_steps(folder: Path) -> None:
    results = []
    for eager in (True, False):
        with LLM(
            str(folder), device="cuda", dtype="bfloat16", max_num_seqs=6, max_num_batched_tokens=64, enforce_eager=eager
        ) as llm:
            assert llm.info.decode_steps.startswith("eager" if eager else "CUDA graphs"), llm.info.decode_steps
            outputs = llm.generate(prompts(9, 1000), PARAMS * 3)
            results.append([o.outputs[0].token_ids for o in outputs])
            stats = llm.engine.core.stats()
            assert (stats.blocks_used, stats.slots_used) == (0, 0)
    # A graph pads its batch, which may round a tie the other way in bf16.
    assert sum(a == b for a, b in zip(*results, strict=True)) >= 5


def test_kernels_give_the_tokens_of_references_in_float32(folder: Path) -> None:
    results = []
    for prefer in ({"*": "reference"}, {}):
        with LLM(str(folder), device="cuda", dtype="float32", max_num_seqs=4, op_preference=prefer) as llm:
            results.append([o.outputs[0].token_ids for o in llm.generate(prompts(6, 1000), PARAMS * 2)])
    assert results[0] == results[1]


def test_no_step_waits_for_the_device(folder: Path) -> None:
    import torch

    with LLM(str(folder), device="cuda", dtype="bfloat16", max_num_seqs=4, max_num_batched_tokens=900) as llm:
        params = [SamplingParams(max_tokens=6, temperature=t, ignore_eos=True) for t in (0, 1) * 6]
        asked = [ids * 3 for ids in prompts(12, 1000)]  # cut into chunks, prefilled together, mixed with decode rows
        expected = [o.outputs[0].token_ids for o in llm.generate(asked, params)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = [o.outputs[0].token_ids for o in llm.generate(asked, params)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [len(ids) for ids in again] == [len(ids) for ids in expected] == [6] * 12


def test_oracle_greedy(shared_dir: Path) -> None:
    oracle = shared_dir / "oracles" / "kimi_linear"
    greedy = np.load(oracle / "greedy.npy")
    with LLM(str(oracle), device="cuda", dtype="float32", max_num_seqs=3) as llm:
        outputs = llm.generate(
            [row[:20].tolist() for row in greedy], SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        )
        assert [o.outputs[0].token_ids for o in outputs] == [row[20:].tolist() for row in greedy]


def test_the_bundled_model_answers_in_bfloat16() -> None:
    from thalweg.evals.arith_problems import problems
    from thalweg.evals.runner import last_number

    asked = problems("eval", 0, 50)
    with LLM(device="cuda", dtype="bfloat16", max_num_seqs=32) as llm:
        answers = llm.chat(
            [[{"role": "user", "content": p.question}] for p in asked], SamplingParams(temperature=0, max_tokens=200)
        )
    right = sum(last_number(o.outputs[0].text) == p.answer for o, p in zip(answers, asked, strict=True))
    assert right >= 45


def test_nothing_compiles_once_the_engine_is_ready(folder: Path) -> None:
    command = [sys.executable, "-m", "tests.models.compiles_when_ready", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == ""
